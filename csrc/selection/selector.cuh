// SPDX-License-Identifier: Apache-2.0
// What a CTA of a row's cluster does with its slice of the logits: look at all of them, find the bin in which the row's k-th
// largest is, flag, rank candidates, write. kernel.cuh puts them in order.
#pragma once

#include <cooperative_groups.h>
#include <cutlass/arch/arch.h>

#include "selection/keys.cuh"
#include "selection/selection.h"
#include "shared/hopper.cuh"

namespace mqa_sm90::selection {

constexpr int kThreads = 512, kWarps = kThreads / 32;
// A CTA holds a tile of logits in registers. A warp has consecutive ones, a thread of it a quad of each 128.
constexpr int kQuads = 4, kValues = 4 * kQuads;
constexpr int kWarpTile = 32 * kValues, kTile = kWarps * kWarpTile;
constexpr int kCandidates = 128;
constexpr int kManyOfWarp = 64;  // chosen of kWarpTile: more are written by a look at each bit
constexpr int kMaxCtas = 16;     // of a cluster
constexpr int kCoarse = 64, kFine = kBins / kCoarse;
constexpr int kEach = kBins / kThreads, kThreadsOfCoarse = kFine / kEach;
static_assert(kCoarse == 64 && kFine == 32 && kThreadsOfCoarse == 8 && kMaxCtas == kWarps && kValues == 16);

// In which bin the row's k-th largest logit is.
struct Found {
  int32_t bin;
  int32_t above;              // logits in better bins, at all looks so far
  int32_t above_here;         // of them, those of this slice
  int32_t size;               // logits in the bin
  int32_t candidates_before;  // of them, those in slices before this one
};

struct SharedMemory {
  alignas(16) int32_t histogram[kBins];             // of the slice
  int32_t coarse_of_rank[kMaxCtas][kCoarse + 4];    // sums of kFine bins; 4 more part what is summed from other banks
  alignas(8) int32_t coarse[kCoarse];               // of the row
  int32_t fine_of_rank[kMaxCtas][kFine];            // the bins of one of `coarse`
  Candidate candidates[kCandidates];                // of the row
  int32_t above_of_rank[kMaxCtas];
  uint2 range_of_warp[kWarps];                      // keys of the sample
  Found found;
  Linear bins;                                      // for look_further
  int32_t of_warp[kWarps];                          // sums of bins
  uint32_t low_key, high_key;
  int32_t taken;                                    // candidates of this CTA
  int32_t chosen_before;                            // candidates that are chosen, in slices before this one
  hopper::Barrier coarse_full, fine_full, candidates_full;
};

// Dynamic shared memory: of each tile `flags` and `chosen_of_warp`.
constexpr int kBytesOfTile = kThreads * sizeof(uint16_t) + kWarps * sizeof(int32_t);
constexpr int kMostBytes = kBytesOfTile * (kMaxColumns / kMaxCtas / kTile);
static_assert(sizeof(SharedMemory) + kMostBytes <= 227 * 1024);

// Logits of a CTA, where a row has so many: whole quads, and lines of memory.
__host__ __device__ constexpr int32_t slice_of(int32_t length, int ctas) { return ((length - 1) / ctas + 1 + 31) / 32 * 32; }

// The row's logits from `begin` on, `size` of them.
struct Slice {
  const float* logits;
  int32_t begin, size;
};

// Of the warp's lanes, this one's value and those of the lanes before.
template <typename T>
__device__ __forceinline__ T sum_to_lane(T value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

// kCtas: of a cluster.
template <int kCtas>
struct Selector {
  const SelectionParams& p;
  SharedMemory& shared;
  uint16_t* const flags;          // of the slice, by tile and thread: a bit for each of its logits that is chosen
  const int32_t most_tiles;       // of a slice
  const int32_t row_length;
  const int rank;
  const Slice slice;
  const int lane = cutlass::arch::LaneId(), warp = threadIdx.x / 32;
  float values[kValues];          // of a tile: the first at first, then the one that the last look ended with

  static __device__ __forceinline__ Selector of_row(const SelectionParams& p, SharedMemory& shared, uint16_t* flags,
                                                    int32_t most_tiles, int32_t length) {
    const int row = blockIdx.x / kCtas, rank = blockIdx.x % kCtas;
    const int32_t each = slice_of(length, kCtas), begin = min(rank * each, length);
    return {p, shared, flags, most_tiles, length, rank,
            Slice{p.logits + row * p.logits_stride + begin, begin, min(each, length - begin)}};
  }

  template <typename T>
  __device__ __forceinline__ T* of_rank(T* mine, int r) const {
    if constexpr (kCtas == 1) return mine;
    return cooperative_groups::this_cluster().map_shared_rank(mine, r);
  }

  __device__ __forceinline__ void sync() const {
    if constexpr (kCtas == 1) {
      __syncthreads();
    } else {
      cooperative_groups::this_cluster().sync();
    }
  }

  // By warp, of all tiles: how many of its logits are chosen.
  __device__ __forceinline__ int32_t& chosen_of_warp(int32_t warp) const {
    return reinterpret_cast<int32_t*>(flags + most_tiles * kThreads)[warp];
  }

  __device__ __forceinline__ int32_t tiles() const { return (slice.size + kTile - 1) / kTile; }

  // In the slice, of the thread's first in a tile.
  __device__ __forceinline__ int32_t place_in_slice(int32_t tile) const { return tile * kTile + warp * kWarpTile + lane * 4; }
  __device__ __forceinline__ int32_t index_of_value(int32_t tile, int i) const {
    return slice.begin + place_in_slice(tile) + i / 4 * 128 + i % 4;
  }

  // What is missing in the slice's last tile is the least that a logit can be.
  template <bool kIsWhole = false>
  __device__ __forceinline__ void load(int32_t tile, int quad) {
    const int32_t place = place_in_slice(tile) + quad * 128, left = slice.size - place;
    float* to = values + quad * 4;
    if (kIsWhole || left >= 4) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(slice.logits + place));
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = left > i ? __ldcg(slice.logits + place + i) : -INFINITY;
    }
  }

  __device__ __forceinline__ void load(int32_t tile) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) load(tile, quad);
  }

  // Calls visit(tile, quad) with each in the registers, and end(tile). Begins with the tile that is there, and so alternates:
  // the next look goes the other way. kAhead: a quad that was visited makes room for the next tile's at once; without, tiles
  // are waited for, which takes fewer registers.
  template <bool kForward, bool kAhead = true, typename Visit, typename End>
  __device__ __forceinline__ void look(const Visit& visit, const End& end) {
    const int32_t last = tiles() - 1;
#pragma unroll 1
    for (int32_t n = 0; n <= last; ++n) {
      const int32_t tile = kForward ? n : last - n, next = kForward ? tile + 1 : tile - 1;
      if (!kAhead && n > 0) load(tile);
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        visit(tile, quad);
        if (kAhead && n < last) load<!kForward>(next, quad);
      }
      end(tile);
    }
  }

  // Of 64 bins (two a lane) or 32 the one in which the row's k-th logit is; `above` grows by those in the bins before. By each
  // warp.
  __device__ __forceinline__ int find_among(int32_t first, int32_t second, bool has_two, int32_t& above) const {
    const int32_t sum = sum_to_lane(first + second), want = p.k - above;
    const int owner = __ffs(__ballot_sync(~0u, sum >= want)) - 1;
    const bool in_second = has_two && sum - second < want;
    const uint32_t said = __shfl_sync(~0u, static_cast<uint32_t>(sum - second - (in_second ? 0 : first)) << 1 | in_second, owner);
    above += said >> 1;
    return has_two ? 2 * owner + (said & 1) : owner;
  }

  // By one thread, before each find().
  __device__ __forceinline__ void expect_find() const {
    if constexpr (kCtas > 1) {
      shared.coarse_full.arrive_and_expect_tx(kCtas * kCoarse * sizeof(int32_t));
      shared.fine_full.arrive_and_expect_tx(kCtas * kFine * sizeof(int32_t));
    }
  }

  // From the slices' histograms, at the how many-th look; `last` is what the one before found.
  __device__ __forceinline__ Found find(int look, const Found& last) {
    __syncthreads();
    const int4 bins = *reinterpret_cast<const int4*>(&shared.histogram[threadIdx.x * kEach]);
    if constexpr (kCtas == 1) return find_alone(bins, last.above);
    else return find_together(bins, look, last);
  }

  __device__ __forceinline__ Found find_alone(const int4& bins, int32_t above) {
    const int32_t sum = bins.x + bins.y + bins.z + bins.w, to_lane = sum_to_lane(sum);
    if (lane == 31) shared.of_warp[warp] = to_lane;
    __syncthreads();
    above += __reduce_add_sync(~0u, lane < warp ? shared.of_warp[lane] : 0) + to_lane - sum;
    if (above < p.k && above + sum >= p.k) {
      int32_t bin = threadIdx.x * kEach, size = bins.x;
      if (above + size < p.k) above += size, size = bins.y, ++bin;
      if (above + size < p.k) above += size, size = bins.z, ++bin;
      if (above + size < p.k) above += size, size = bins.w, ++bin;
      shared.found = {bin, above, 0, size, 0};
    }
    __syncthreads();
    return shared.found;
  }

  __device__ __forceinline__ Found find_together(const int4& bins, int look, const Found& last) {
    const int coarse = threadIdx.x / kThreadsOfCoarse, part = threadIdx.x % kThreadsOfCoarse;
    int32_t sum = bins.x + bins.y + bins.z + bins.w;
#pragma unroll
    for (int d = 1; d < kThreadsOfCoarse; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
#pragma unroll
    for (int r = part; r < kCtas; r += kThreadsOfCoarse) hopper::push(&shared.coarse_of_rank[rank][coarse], sum, shared.coarse_full, r);
    shared.coarse_full.wait(look & 1);
    sum = 0;
#pragma unroll
    for (int r = part; r < kCtas; r += kThreadsOfCoarse) sum += shared.coarse_of_rank[r][coarse];
#pragma unroll
    for (int d = 1; d < min(kCtas, kThreadsOfCoarse); d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (part == 0) shared.coarse[coarse] = sum;
    __syncthreads();
    Found found = last;
    const int2 pair = *reinterpret_cast<const int2*>(&shared.coarse[2 * lane]);
    const int coarse_bin = find_among(pair.x, pair.y, true, found.above), first = coarse_bin * kFine;
    const int32_t here = shared.histogram[first + lane];
    if (warp < kCtas) hopper::push(&shared.fine_of_rank[rank][lane], here, shared.fine_full, warp);
    shared.fine_full.wait(look & 1);
    int32_t all = 0;
#pragma unroll (kCtas < 8 ? 2 : 4)
    for (int r = 0; r < kCtas; ++r) all += shared.fine_of_rank[r][lane];
    const int bin = find_among(all, 0, false, found.above);
    found.bin = first + bin;
    found.size = __shfl_sync(~0u, all, bin);
    found.candidates_before = __reduce_add_sync(~0u, lane < rank ? shared.fine_of_rank[lane][bin] : 0);
    int32_t better = lane < bin ? here : 0;
    for (int i = lane; i < coarse_bin; i += 32) better += shared.coarse_of_rank[rank][i];
    found.above_here += __reduce_add_sync(~0u, better);
    if (threadIdx.x == 0) shared.found = found;
    return found;
  }

  // To all CTAs of the row.
  __device__ __forceinline__ void add_candidate(const Found& found, float value, int32_t index) {
    const Candidate candidate = candidate_of(key_of(value), index);
    const int32_t place = found.candidates_before + atomicAdd(&shared.taken, 1);
    if constexpr (kCtas == 1) {
      shared.candidates[place] = candidate;
    } else {
#pragma unroll 1
      for (int r = 0; r < kCtas; ++r) hopper::push(&shared.candidates[place], candidate, shared.candidates_full, r);
    }
  }

  // is_least(value, index): whether a logit is in the bin or above, is_in: whether it is in it.
  template <typename IsLeast, typename IsIn>
  __device__ __forceinline__ void flag(const Found& found, const IsLeast& is_least, const IsIn& is_in) {
    if (kCtas > 1 && warp == 0 && lane < kCtas) {
      hopper::push(&shared.above_of_rank[rank], found.above_here, shared.candidates_full, lane);
      if (lane == 0) {
        shared.candidates_full.arrive_and_expect_tx(found.size * sizeof(Candidate) + kCtas * sizeof(int32_t));
      }
    }
    uint32_t flagged = 0;
    look<false>(
        [&](int32_t tile, int quad) {
          bool has_candidates = false;
#pragma unroll
          for (int i = quad * 4; i < quad * 4 + 4; ++i) {
            const int32_t index = index_of_value(tile, i);
            if (is_least(values[i], index)) flagged |= 1u << i;
            has_candidates |= is_in(values[i], index);
          }
          if (!has_candidates) return;
#pragma unroll
          for (int i = quad * 4; i < quad * 4 + 4; ++i) {
            const int32_t index = index_of_value(tile, i);
            if (is_in(values[i], index)) {
              flagged &= ~(1u << i);
              if (index < slice.begin + slice.size) add_candidate(found, values[i], index);
            }
          }
        },
        [&](int32_t tile) {
          flags[tile * kThreads + threadIdx.x] = flagged;
          const int32_t chosen = __reduce_add_sync(~0u, __popc(flagged));
          if (lane == 0) chosen_of_warp(tile * kWarps + warp) = chosen;
          flagged = 0;
        });
  }

  // Flags those of this slice that are chosen. A warp ranks one at a time.
  __device__ __forceinline__ void choose_candidates() {
    if constexpr (kCtas > 1) shared.candidates_full.wait(0);
    __syncthreads();  // also: all have flagged what they had
    const int32_t size = shared.found.size, above = shared.found.above;
    Candidate others[kCandidates / 32];
#pragma unroll
    for (int i = 0; i < kCandidates / 32; ++i) others[i] = i * 32 + lane < size ? shared.candidates[i * 32 + lane] : 0;
#pragma unroll 1
    for (int32_t c = warp; c < size; c += kWarps) {
      const Candidate mine = shared.candidates[c];
      int32_t better = above;
#pragma unroll
      for (int i = 0; i < kCandidates / 32; ++i) {
        if (i * 32 < size) better += __popc(__ballot_sync(~0u, others[i] > mine));
      }
      if (lane == 0 && better < p.k) {
        const int32_t place = index_of(mine) - slice.begin;
        if (place < 0) {
          atomicAdd(&shared.chosen_before, 1);
        } else if (place < slice.size) {
          const int32_t warp_of_it = place / kWarpTile, thread = warp_of_it * 32 + place / 4 % 32;  // of all tiles'
          const int bit = place % kWarpTile / 128 * 4 + place % 4 + thread % 2 * 16;
          atomicOr(&reinterpret_cast<uint32_t*>(flags)[thread / 2], 1u << bit);
          atomicAdd(&chosen_of_warp(warp_of_it), 1);
        }
      }
    }
    __syncthreads();
  }

  // The indices of what is flagged.
  __device__ __forceinline__ void write(int32_t* out) const {
    out = hopper::opaque(out);
    uint32_t to = shared.chosen_before;
    if constexpr (kCtas > 1) to += __reduce_add_sync(~0u, lane < rank ? shared.above_of_rank[lane] : 0);
    const int32_t count = tiles();
#pragma unroll 1
    for (int32_t tile = 0; tile < count; ++tile) {
      const uint32_t flagged = flags[tile * kThreads + threadIdx.x];
      // How many of each quad, a byte each; all sums to a lane are at most 128.
      uint32_t counts = flagged - (flagged >> 1 & 0x5555);
      counts = (counts & 0x3333) + (counts >> 2 & 0x3333);
      counts = (counts | counts << 8) & 0x00ff00ff;
      counts = (counts | counts << 4) & 0x0f0f0f0f;
      const uint32_t to_lane = sum_to_lane(counts), of_quads = __shfl_sync(~0u, to_lane, 31);
      const uint32_t before = to_lane - counts;
      const int32_t of_lane = lane < kWarps ? chosen_of_warp(tile * kWarps + lane) : 0;
      const uint32_t first = to + __reduce_add_sync(~0u, lane < warp ? of_lane : 0);
      to += __reduce_add_sync(~0u, of_lane);
      if (__dp4a(of_quads, 0x01010101u, 0u) > kManyOfWarp) {
        uint32_t of_quad = first;
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
          uint32_t place = of_quad + (before >> 8 * quad & 0xff);
#pragma unroll
          for (int i = quad * 4; i < quad * 4 + 4; ++i) {
            const bool is_chosen = flagged & 1u << i;
            if (is_chosen) __stcg(out + place, index_of_value(tile, i));
            place += is_chosen;
          }
          of_quad += of_quads >> 8 * quad & 0xff;
        }
      } else {
        // Where each quad's begin, from `first` on: two in a word.
        const uint32_t of_even = of_quads & 0x00ff00ff, of_pairs = of_even + (of_quads >> 8 & 0x00ff00ff);
        uint32_t even = (before & 0x00ff00ff) + (of_pairs << 16);
        uint32_t odd = (before >> 8 & 0x00ff00ff) + (of_pairs << 16) + of_even;
        for (uint32_t rest = flagged; rest != 0; rest &= rest - 1) {
          const int i = __ffs(rest) - 1, shift = i / 8 * 16;
          const bool is_odd = i & 4;
          __stcg(out + first + ((is_odd ? odd : even) >> shift & 0xffff), index_of_value(tile, i));
          even += !is_odd << shift;
          odd += is_odd << shift;
        }
      }
    }
  }

  __device__ __forceinline__ Linear bins_of_sample();
  template <typename IsIn>
  __device__ __forceinline__ void narrow(Range& range, const IsIn& is_in);
  __device__ __forceinline__ void run_further();
  __device__ __forceinline__ void run(int32_t* out);
};

}  // namespace mqa_sm90::selection
