// SPDX-License-Identifier: Apache-2.0
// Where a logit lies in the order of all: its bin at the first look, and its key.
#pragma once

#include <cfloat>
#include <cstdint>

namespace mqa_sm90::selection {

constexpr int kBinBits = 11, kBins = 1 << kBinBits;

// The first look's bins, all of one width; larger logits are in lower ones. A logit's place is 2^23 and its bin: floats from
// there on are the integers.
struct Linear {
  static constexpr float kFirst = 0x1p23f;

  float scale, offset;

  // So that [low, high] fills all bins but the first third. Whatever the two are, of larger logits no place is higher: the
  // scale is a positive number, and NaN, which counts as the largest, is saturated to 0.
  static __device__ __forceinline__ Linear over(float low, float high) {
    const float scale = fmaxf(fminf(__fdividef(1 / 1.5f, high - low), 1e30f), 1e-30f);
    return {scale, fmaxf(fmaf(low, scale, 1), -FLT_MAX)};  // a number: minus infinity is in the last bin
  }

  __device__ __forceinline__ float place_of(float logit) const {
    return fmaf(__saturatef(fmaf(logit, -scale, offset)), kBins - 1, kFirst);
  }
  __device__ __forceinline__ float place_of_bin(int bin) const { return kFirst + bin; }
  __device__ __forceinline__ int bin_of(float logit) const { return __float_as_int(place_of(logit)) - __float_as_int(kFirst); }
};

// Unsigned integers in the order of the logits: -0 is +0, and every NaN one value above all others (as in torch.topk).
__device__ __forceinline__ uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.f));  // NaN comes out as 0x7fffffff
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// The logit with that key.
__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key ^ (static_cast<uint32_t>(~static_cast<int32_t>(key) >> 31) | 0x80000000u));
}

// A logit that may yet be the k-th largest, with its index: larger is better.
using Candidate = uint64_t;
__device__ __forceinline__ Candidate candidate_of(uint32_t key, int32_t index) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~index);
}
__device__ __forceinline__ int32_t index_of(Candidate candidate) { return ~static_cast<int32_t>(candidate); }

// Where the k-th largest logit is: keys and indices within bounds, all included. Indices are bounded where one key is left.
struct Range {
  uint32_t low_key, high_key;
  int32_t low_index, high_index;

  __device__ __forceinline__ bool contains(uint32_t key, int32_t index) const {
    return key >= low_key && key <= high_key && index >= low_index && index <= high_index;
  }
  // In it, or above: of several keys all indices are within.
  __device__ __forceinline__ bool is_least(uint32_t key, int32_t index) const {
    return key > high_key || (key >= low_key && index <= high_index);
  }
};

// How a range is cut into 2^kBits bins for another look: by keys or, where only one is left, by indices. The larger key, and
// the lower index, is the better one, and so in a lower bin.
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
    return by_index ? static_cast<int>((index - low) >> shift) : kLast - static_cast<int>((key - low) >> shift);
  }
  __device__ __forceinline__ Range of_bin(const Range& range, int bin) const {
    Range part = range;
    const uint32_t first = static_cast<uint32_t>(by_index ? bin : kLast - bin) << shift;
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
