// SPDX-License-Identifier: Apache-2.0
// Where a logit lies in the order of all: its bin at the first look, and its key.
#pragma once

#include <cstdint>

namespace mqa_sm90::selection {

constexpr int kBinBits = 12, kBins = 1 << kBinBits;

// The first look's bins: 64 an octave from 2^-16 to 2^16, of either sign; magnitudes outside are in the last ones. Scaled
// by 2^-15, magnitudes within have exponents 96 to 127, of which five bits are not all alike; with six of the mantissa
// they number the bins of a sign from 2048 up, and, all bits turned, from 2047 down.
constexpr float kScale = 0x1p-15f, kLeast = 0x1p-31f, kMost = 0x1.fffffep0f;
constexpr int kDropped = 17;        // bits, of a scaled magnitude's
constexpr int kTopBin = kBins - 1;  // of the largest, infinity and NaN

// As an offset in an array of int32.
__device__ __forceinline__ uint32_t bin_offset(float logit) {
  const float scaled = __fmaf_rn(logit, kScale, 0.f);  // -0 becomes +0, and NaN the positive one
  const float magnitude = fmaxf(fminf(fabsf(scaled), kMost), kLeast);  // of a number and NaN, the number
  const int sign = static_cast<int>(__float_as_uint(scaled)) >> 31;
  return (__float_as_uint(magnitude) >> (kDropped - 2) ^ sign) & (kBins - 1) << 2;
}

// Unsigned integers in the order of the logits: -0 is +0, and every NaN one value above all others (as in torch.topk).
__device__ __forceinline__ uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.f));  // NaN comes out as 0x7fffffff
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// The logit with that key.
__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key ^ (static_cast<uint32_t>(~static_cast<int32_t>(key) >> 31) | 0x80000000u));
}

// The least key of a bin; for bin kBins one more than all keys, and so 0.
__device__ __forceinline__ uint32_t first_key_of(int bin) {
  constexpr uint32_t kZero = 0x80000000u;
  if (bin == 0) return 0x007fffffu;  // minus infinity
  if (bin == kBins) return 0;
  if (bin == kBins / 2) return kZero;
  // Magnitudes from this on are in bins as far from the middle as that, or farther.
  const auto edge = [](int steps) {
    return __float_as_uint(__uint_as_float((__float_as_uint(kLeast) >> kDropped) + steps << kDropped) * (1 / kScale));
  };
  return bin > kBins / 2 ? kZero + edge(bin - kBins / 2) : kZero - edge(kBins / 2 - bin);
}

// A logit that may yet be the k-th largest, with its index: larger is better.
using Candidate = uint64_t;
__device__ __forceinline__ Candidate candidate_of(uint32_t key, int32_t index) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~index);
}
__device__ __forceinline__ int32_t index_of(Candidate candidate) { return ~static_cast<int32_t>(candidate); }

// Where the k-th largest logit is: keys and indices within bounds, all included. What has a larger key, or the largest one
// and an index before, is above it.
struct Range {
  uint32_t low_key, high_key;
  int32_t low_index, high_index;

  static __device__ __forceinline__ Range of_bin(int bin, int32_t length) {
    return {first_key_of(bin), first_key_of(bin + 1) - 1, 0, length - 1};
  }
  __device__ __forceinline__ bool contains(uint32_t key, int32_t index) const {
    return key >= low_key && key <= high_key && index >= low_index && index <= high_index;
  }
  __device__ __forceinline__ bool is_below(uint32_t key, int32_t index) const {
    return key > high_key || (key == high_key && index < low_index);
  }
};

// How a range is cut into 2^kBits bins for another look: by keys or, where only one is left, by indices. The lower index
// is the better one, and so in a higher bin.
template <int kBits>
struct Cut {
  static constexpr int kLast = (1 << kBits) - 1;

  bool by_index;
  uint32_t low;  // key or index
  int shift;

  __device__ __forceinline__ explicit Cut(const Range& range)
      : by_index(range.low_key == range.high_key), low(by_index ? range.low_index : range.low_key) {
    const uint32_t last = (by_index ? static_cast<uint32_t>(range.high_index) : range.high_key) - low;
    shift = max(0, 32 - __clz(last) - kBits);
  }
  __device__ __forceinline__ int bin_of(uint32_t key, int32_t index) const {
    return by_index ? kLast - static_cast<int>((index - low) >> shift) : static_cast<int>((key - low) >> shift);
  }
  __device__ __forceinline__ Range of_bin(const Range& range, int bin) const {
    Range part = range;
    const uint32_t first = static_cast<uint32_t>(by_index ? kLast - bin : bin) << shift;
    const uint32_t last = first + ((1u << shift) - 1);
    if (by_index) {
      part.low_index = low + first;
      part.high_index = min(static_cast<uint32_t>(range.high_index), low + last);
    } else {
      part.low_key = low + first;
      part.high_key = last > range.high_key - low ? range.high_key : low + last;
    }
    return part;
  }
};

}  // namespace mqa_sm90::selection
