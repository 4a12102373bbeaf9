// SPDX-License-Identifier: Apache-2.0
// Exact top-k of the logits, row by row: the indices of the k largest, in ascending order; of equal ones, the first.
//
// A row has a cluster of CTAs, each with a slice of its logits, which it reads from memory once, into shared memory.
//   1. Count how many logits each bin has (keys.cuh). The histograms of all CTAs tell in which bin the k-th largest is.
//   2. Flag the logits above that bin, in a bitmap of the slice, and those from it on, in another. Those in the bin are
//      candidates, and go to all CTAs.
//   3. Find the last candidate that is chosen, flag the others, and write the indices of what is flagged.
// Where that is not enough (more candidates than there is room for, a bin with NaN, a slice longer than the bitmap)
// the rest is done from memory: slower, and for any logits.
#pragma once

#include <cooperative_groups.h>

#include "selection/keys.cuh"
#include "selection/selection.h"
#include "shared/hopper.cuh"

namespace mqa_sm90::selection {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kChunk = 4096;         // logits loaded at once
constexpr int kPart = kChunk / kWarps;
constexpr int kMaxSlots = 13;        // chunks in shared memory
constexpr int kCandidates = kThreads;
constexpr int kMaxCtas = 16;         // of a cluster
constexpr int kWindow = 65536;       // logits flagged at once, at most
constexpr int kCoarse = 64, kBinsOfCoarse = kBins / kCoarse;
static_assert(kCoarse == 64 && kBinsOfCoarse == 64, "find_among has two a lane");

// What a look at the histograms found.
struct Found {
  int32_t bin;
  int32_t above;              // the row's logits in bins above, at all looks so far
  int32_t size;               // and in it
  int32_t candidates_before;  // of it, those in slices before ours
};

struct SharedMemory {
  union {
    alignas(16) int32_t histogram[kBins];
    int32_t chosen[kMaxTopK];           // afterwards: the slice's indices
  };
  alignas(16) int32_t coarse[kCoarse];  // sums of kBinsOfCoarse bins
  alignas(16) int32_t fine[kCoarse];    // candidates, by further bits of their keys
  Candidate candidates[kCandidates];
  Candidate finalists[kCandidates];     // candidates in the last one's bin of `fine`
  Candidate last;                       // the k-th largest
  int32_t above_of_rank[kMaxCtas];      // logits above the candidates, of each CTA's slice
  int32_t count_of_warp[kWarps];
  uint32_t min_key, max_key;
  int32_t taken;                        // candidates of this CTA
  int32_t final;                        // finalists
  int32_t above;                        // logits of this CTA above the candidates
  Found found;
  hopper::Barrier full[kMaxSlots];
};

// Dynamic shared memory: SharedMemory, two bitmaps of so many bytes, the chunks.
__host__ __device__ constexpr int bitmap_offset() { return (sizeof(SharedMemory) + 127) / 128 * 128; }
__host__ __device__ constexpr int slots_offset(int bitmap_bytes) { return bitmap_offset() + 2 * bitmap_bytes; }

// A row's logits from `begin` to `end`.
struct Slice {
  const float* row;
  int32_t begin, end;
};

// A slice in chunks, of which `slots` at a time are in shared memory. What does not fit is read again at the second look;
// as that goes backwards, what the first one read last is still there.
struct Chunks {
  const Slice& slice;
  float* memory;
  hopper::Barrier* full;
  const int32_t count, slots;
  uint32_t phases = 0;  // of each slot, the last load's

  __device__ __forceinline__ void load_first() const {
    for (int32_t chunk = 0; chunk < min(count, slots); ++chunk) load(chunk, chunk);
  }

  // By one thread. Bulk copies have whole 16 bytes; the thread itself brings what is left at the row's end.
  __device__ __forceinline__ void load(int32_t chunk, int32_t slot) const {
    if (threadIdx.x != 0) return;
    const int32_t first = slice.begin + chunk * kChunk, length = min(slice.end - first, kChunk), whole = length / 4 * 4;
    float* to = memory + slot * kChunk;
    if (whole > 0) {
      cute::SM90_BULK_COPY_G2S::copy(slice.row + first, reinterpret_cast<uint64_t*>(&full[slot]), to,
                                     whole * sizeof(float));
    }
    for (int32_t i = whole; i < length; ++i) to[i] = slice.row[first + i];
    full[slot].arrive_and_expect_tx(whole * sizeof(float));
  }

  // Calls visit(logits, first, last) for this warp's part of each chunk: kPart logits or fewer, with indices from `first`
  // up to `last`. A short chunk is dealt out in parts of 128.
  template <bool kForward, typename Visit>
  __device__ __forceinline__ void look(int warp, const Visit& visit) {
    int32_t slot = kForward ? 0 : (count - 1) % slots;
#pragma unroll 1
    for (int32_t i = 0; i < count; ++i) {
      const int32_t chunk = kForward ? i : count - 1 - i;
      full[slot].wait(phases >> slot & 1);
      const int32_t begin = slice.begin + chunk * kChunk, end = min(slice.end, begin + kChunk);
      const int32_t part = end - begin > kChunk / 2 || kPart == 128 ? kPart : kPart / 2, first = begin + warp * part;
      if (first < end) visit(memory + slot * kChunk + warp * part, first, min(end, first + part));
      const int32_t next = kForward ? chunk + slots : chunk - slots;
      if (next >= 0 && next < count) {
        __syncthreads();
        load(next, slot);
        phases ^= 1u << slot;
      }
      if constexpr (kForward) {
        if (++slot == slots) slot = 0;
      } else {
        if (--slot < 0) slot = slots - 1;
      }
    }
  }

  // A logit after a look backwards: the first chunks are in the first slots.
  __device__ __forceinline__ float logit(int32_t index) const {
    const int32_t i = index - slice.begin;
    return i < slots * kChunk ? memory[i] : slice.row[index];
  }
};

// Of the warp's lanes, this one's value and those of the lanes before.
__device__ __forceinline__ int32_t sum_to_lane(int32_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int32_t other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

// kCtas: of a cluster.
template <int kCtas>
struct Selector {
  const SelectionParams& p;
  SharedMemory& shared;
  uint32_t* bitmap;  // of what is chosen
  const int rank;
  const Slice slice;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

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

  // From this CTA's histogram.
  __device__ __forceinline__ void sum_coarse() {
    constexpr int kEach = kBins / kThreads, kThreadsOfCoarse = kBinsOfCoarse / kEach;
    const auto* bins = reinterpret_cast<const int4*>(&shared.histogram[threadIdx.x * kEach]);
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kEach / 4; ++i) sum += bins[i].x + bins[i].y + bins[i].z + bins[i].w;
#pragma unroll
    for (int d = 1; d < kThreadsOfCoarse; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % kThreadsOfCoarse == 0) shared.coarse[threadIdx.x / kThreadsOfCoarse] = sum;
  }

  // By one warp: of 64 bins the one in which the row's k-th logit from above is; `above` grows by those in higher bins.
  template <int kRanks>
  __device__ __forceinline__ int find_among(int32_t* bins, int32_t& above) const {
    int2 pair{0, 0};  // bins 62 - 2 lane and 63 - 2 lane
#pragma unroll 8
    for (int r = 0; r < kRanks; ++r) {
      int32_t* mine = bins + 62 - 2 * lane;
      const int2 of_it = *reinterpret_cast<const int2*>(kRanks > 1 ? of_rank(mine, r) : mine);
      pair.x += of_it.x, pair.y += of_it.y;
    }
    const int32_t sum = sum_to_lane(pair.x + pair.y);
    const int32_t want = p.k - above;
    const int owner = __ffs(__ballot_sync(~0u, sum >= want)) - 1;
    const bool in_high = sum - pair.x >= want;
    const auto higher = static_cast<uint32_t>(sum - pair.x - (in_high ? pair.y : 0));
    const uint32_t said = __shfl_sync(~0u, higher << 1 | in_high, owner);  // both in one word
    above += said >> 1;
    return 62 - 2 * owner + (said & 1);
  }

  // The bin with the row's k-th largest logit, of which `above` are above the range at hand. All threads get it.
  __device__ __forceinline__ Found find(int32_t above) {
    sum_coarse();
    sync();
    if (warp == 0) {
      Found found{};
      found.above = above;
      const int coarse = find_among<kCtas>(shared.coarse, found.above);
      found.bin = coarse * kBinsOfCoarse + find_among<kCtas>(shared.histogram + coarse * kBinsOfCoarse, found.above);
      if constexpr (kCtas == 1) {
        found.size = shared.histogram[found.bin];
      } else {
        const int32_t of_lane = lane < kCtas ? *of_rank(&shared.histogram[found.bin], lane) : 0;
        found.size = __reduce_add_sync(~0u, of_lane);
        found.candidates_before = __reduce_add_sync(~0u, lane < rank ? of_lane : 0);
      }
      if (lane == 0) shared.found = found;
    }
    __syncthreads();
    return shared.found;
  }

  // To all CTAs of the row, at that place.
  __device__ __forceinline__ void add_candidate(Candidate candidate, int32_t place) {
#pragma unroll 4
    for (int r = 0; r < kCtas; ++r) *of_rank(&shared.candidates[place], r) = candidate;
  }

  // Tells all CTAs of the row how many logits of this one's slice are above the candidates. One warp.
  __device__ __forceinline__ void share_above(int32_t count) {
    if (kCtas > 1 && lane < kCtas) *of_rank(&shared.above_of_rank[rank], lane) = count;
  }

  // That, at the first look.
  __device__ __forceinline__ int32_t count_above(const Found& found) const {
    const int first_coarse = found.bin / kBinsOfCoarse + 1;
    int32_t count = 0;
    for (int i = first_coarse + lane; i < kCoarse; i += 32) count += shared.coarse[i];
    for (int i = found.bin + 1 + lane; i < first_coarse * kBinsOfCoarse; i += 32) count += shared.histogram[i];
    return __reduce_add_sync(~0u, count);
  }

  // Finds the last candidate that is chosen, and where in the row's indices those of this slice begin; calls choose(index)
  // for the candidates of this slice that are chosen.
  template <typename Choose>
  __device__ __forceinline__ int32_t choose_candidates(const Found& found, const Range& range, const Choose& choose) {
    const bool is_one = threadIdx.x < found.size;
    const Candidate mine = is_one ? shared.candidates[threadIdx.x] : 0;
    const int32_t index = index_of(mine);
    const Cut<6> cut(range);
    const int bin = cut.bin_of(static_cast<uint32_t>(mine >> 32), index);
    if (is_one) atomicAdd(&shared.fine[bin], 1);
    __syncthreads();
    int32_t above = found.above;
    const int last_bin = find_among<1>(shared.fine, above);
    const bool is_finalist = is_one && bin == last_bin;
    if (is_finalist) shared.finalists[atomicAdd(&shared.final, 1)] = mine;
    __syncthreads();
    bool chosen = is_one && bin > last_bin;
    if (is_finalist) {
      const int32_t finalists = shared.final, want = p.k - above;
      int32_t better = 0;
      for (int32_t i = 0; i < finalists; ++i) better += shared.finalists[i] > mine;
      if (better == want - 1) shared.last = mine;
      chosen = better < want;
    }
    if (chosen && index >= slice.begin && index < slice.end) choose(index);
    int32_t before = __syncthreads_count(chosen && index < slice.begin);
    if constexpr (kCtas > 1) {
#pragma unroll
      for (int r = 0; r < kCtas; ++r) before += r < rank ? shared.above_of_rank[r] : 0;
    }
    return before;
  }

  // Appends the indices of the flagged logits to `chosen`, of which there are `count`, in order: those in so many half
  // words of the bitmap, whose first bit is of index `first`. Returns how many there are then.
  __device__ __forceinline__ int32_t emit(int32_t halves, int32_t first, int32_t count) {
    const auto* bits = reinterpret_cast<const uint16_t*>(bitmap);
    const int32_t part = ((halves + kWarps - 1) / kWarps + 31) / 32 * 32;  // of a warp
    const int32_t begin = warp * part, end = min(halves, begin + part);
    int32_t of_lane = 0;
    for (int32_t i = begin + lane; i < end; i += 32) of_lane += __popc(bits[i]);
    const int32_t of_warp = __reduce_add_sync(~0u, of_lane);
    if (lane == 0) shared.count_of_warp[warp] = of_warp;
    __syncthreads();
    const int32_t of_other = lane < kWarps ? shared.count_of_warp[lane] : 0;
    int32_t before = count + __reduce_add_sync(~0u, lane < warp ? of_other : 0);
    for (int32_t row = begin; row < end; row += 32) {
      const int32_t i = row + lane;
      const uint32_t half = i < end ? bits[i] : 0;
      const int32_t own = __popc(half), sum = sum_to_lane(own);
      int32_t* to = shared.chosen + before + sum - own;
#pragma unroll
      for (int bit = 0; bit < 16; ++bit) {
        if (half >> bit & 1) *to++ = first + i * 16 + bit;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
    __syncthreads();
    return count + __reduce_add_sync(~0u, of_other);
  }

  __device__ __forceinline__ void write(int32_t* out, int32_t count) const {
    for (int32_t i = threadIdx.x; i < count; i += kThreads) out[i] = shared.chosen[i];
  }

  __device__ __forceinline__ void run(Chunks& chunks, int32_t row_length, int32_t longest_slice, int32_t bitmap_words,
                                      int32_t* out);
  __device__ __forceinline__ void run_from_memory(Found found, int32_t row_length, int32_t* out);
};

// The rest after the first look, for any logits.
template <int kCtas>
__device__ __noinline__ void select_from_memory(const SelectionParams& p, SharedMemory& shared, uint32_t* bitmap, int rank,
                                                const float* row, int32_t begin, int32_t end, int32_t row_length,
                                                int32_t* out) {
  Selector<kCtas>{p, shared, bitmap, rank, Slice{row, begin, end}}.run_from_memory(shared.found, row_length, out);
}

template <int kCtas>
__device__ __forceinline__ void Selector<kCtas>::run(Chunks& chunks, int32_t row_length, int32_t longest_slice,
                                                     int32_t bitmap_words, int32_t* out) {
  auto* histogram = reinterpret_cast<uint8_t*>(shared.histogram);
  const auto count = [&](float logit) { atomicAdd(reinterpret_cast<int32_t*>(histogram + bin_offset(logit)), 1); };
  chunks.look<true>(warp, [&](const float* logits, int32_t first, int32_t last) {
    constexpr int kQuads = kPart / 128;
    float4 quads[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) quads[q] = *reinterpret_cast<const float4*>(logits + q * 128 + 4 * lane);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 v = quads[q];
      const int32_t left = last - first - q * 128 - 4 * lane;
      if (first + q * 128 + 128 <= last) {
        count(v.x), count(v.y), count(v.z), count(v.w);
      } else {
        if (left > 0) count(v.x);
        if (left > 1) count(v.y);
        if (left > 2) count(v.z);
        if (left > 3) count(v.w);
      }
    }
  });
  __syncthreads();
  const Found found = find(0);
  if (found.size > kCandidates || found.bin == kTopBin || longest_slice > kWindow) {
    select_from_memory<kCtas>(p, shared, bitmap, rank, slice.row, slice.begin, slice.end, row_length, out);
    return;
  }

  if (kCtas > 1 && warp == 1) share_above(count_above(found));
  const Range range = Range::of_bin(found.bin, row_length);
  const float low = logit_of(range.low_key), high = logit_of(range.high_key);
  uint32_t* least = bitmap + bitmap_words;  // of what is in the bin, or above
  chunks.look<false>(warp, [&](const float* logits, int32_t first, int32_t last) {
    constexpr int kWords = kPart / 32;
    float values[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) values[w] = logits[w * 32 + lane];
    alignas(16) uint32_t above_flags[kWords], least_flags[kWords];
    const auto flag = [&](bool all_exist) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const bool exists = all_exist || first + w * 32 + lane < last;
        above_flags[w] = __ballot_sync(~0u, exists && !(values[w] <= high));  // NaN is
        least_flags[w] = __ballot_sync(~0u, exists && !(values[w] < low));
      }
    };
    if (first + kPart <= last) flag(true); else flag(false);
    if (lane == 0) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        const int32_t at = (first - slice.begin) / 32 + w;
        if (first + w * 32 >= last) break;
        *reinterpret_cast<uint4*>(bitmap + at) = *reinterpret_cast<const uint4*>(above_flags + w);
        *reinterpret_cast<uint4*>(least + at) = *reinterpret_cast<const uint4*>(least_flags + w);
      }
    }
  });
  __syncthreads();
  const int32_t words = (slice.end - slice.begin + 31) / 32;
  for (int32_t i = threadIdx.x; i < words; i += kThreads) {
    uint32_t candidates = least[i] & ~bitmap[i];
    if (candidates == 0) continue;
    int32_t place = found.candidates_before + atomicAdd(&shared.taken, __popc(candidates));
    for (; candidates != 0; candidates &= candidates - 1) {
      const int32_t index = slice.begin + i * 32 + __ffs(candidates) - 1;
      add_candidate(candidate_of(key_of(chunks.logit(index)), index), place++);
    }
  }
  sync();  // the last time: from here on no CTA needs another's memory

  out += choose_candidates(found, range, [&](int32_t index) {
    const int32_t bit = index - slice.begin;
    atomicOr(&bitmap[bit / 32], 1u << bit % 32);
  });
  write(out, emit(words * 2, slice.begin, 0));
}

template <int kCtas>
__device__ __forceinline__ void Selector<kCtas>::run_from_memory(Found found, int32_t row_length, int32_t* out) {
  // Calls visit(key, index, exists) for each logit from `begin` to `end`, by all lanes of a warp for 32 in a row. Several
  // loads are on their way at once.
  const auto each = [&](int32_t begin, int32_t end, const auto& visit) {
    constexpr int kAtOnce = 8;
    for (int32_t first = begin; first < end; first += kAtOnce * kThreads) {
      float values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t index = first + i * kThreads + threadIdx.x;
        values[i] = index < end ? slice.row[index] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t index = first + i * kThreads + threadIdx.x;
        if (first + i * kThreads + warp * 32 < end) visit(key_of(values[i]), index, index < end);
      }
    }
  };
  Range range = Range::of_bin(found.bin, row_length);
  while (found.size > kCandidates) {
    // The keys that there are: of very unlike ones a few looks are enough then, and equal ones show at once.
    if (threadIdx.x == 0) shared.min_key = ~0u, shared.max_key = 0;
    __syncthreads();
    uint32_t low = ~0u, high = 0;
    each(slice.begin, slice.end, [&](uint32_t key, int32_t index, bool exists) {
      if (exists && range.contains(key, index)) low = min(low, key), high = max(high, key);
    });
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    if (lane == 0) atomicMin(&shared.min_key, low), atomicMax(&shared.max_key, high);
    sync();  // also: all have read the last histograms
#pragma unroll 4
    for (int r = 0; r < kCtas; ++r) {
      low = min(low, *of_rank(&shared.min_key, r)), high = max(high, *of_rank(&shared.max_key, r));
    }
    range.low_key = low, range.high_key = high;
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    const Cut<kBinBits> cut(range);
    each(slice.begin, slice.end, [&](uint32_t key, int32_t index, bool exists) {
      if (exists && range.contains(key, index)) atomicAdd(&shared.histogram[cut.bin_of(key, index)], 1);
    });
    __syncthreads();
    found = find(found.above);
    range = cut.of_bin(range, found.bin);
  }
  int32_t counted = 0;
  each(slice.begin, slice.end, [&](uint32_t key, int32_t index, bool exists) {
    counted += exists && range.is_below(key, index);
    if (exists && range.contains(key, index)) {
      add_candidate(candidate_of(key, index), found.candidates_before + atomicAdd(&shared.taken, 1));
    }
  });
  counted = __reduce_add_sync(~0u, counted);
  if (lane == 0) atomicAdd(&shared.above, counted);
  __syncthreads();
  if (warp == 0) share_above(shared.above);
  sync();
  out += choose_candidates(found, range, [](int32_t) {});
  int32_t count = 0;
  for (int32_t begin = slice.begin; begin < slice.end; begin += kWindow) {
    const int32_t end = min(slice.end, begin + kWindow);
    each(begin, end, [&](uint32_t key, int32_t index, bool exists) {
      const uint32_t flags = __ballot_sync(~0u, exists && candidate_of(key, index) >= shared.last);
      if (lane == 0) bitmap[(index - begin) / 32] = flags;
    });
    __syncthreads();
    count = emit((end - begin + 31) / 32 * 2, begin, count);
  }
  write(out, count);
}

template <int kCtas, int kPerSm>
__global__ void __launch_bounds__(kThreads, kPerSm)
selection_kernel(const __grid_constant__ SelectionParams p, int32_t bitmap_bytes, int32_t slots) {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<SharedMemory*>(shared_bytes);
  const int row = blockIdx.x / kCtas, rank = blockIdx.x % kCtas;
  for (int i = threadIdx.x * 4; i < kBins; i += kThreads * 4) *reinterpret_cast<int4*>(&shared.histogram[i]) = {0, 0, 0, 0};
  if (threadIdx.x == 0) {
    for (int s = 0; s < slots; ++s) shared.full[s].init(1);
    cutlass::arch::fence_barrier_init();
    shared.taken = shared.final = shared.above = 0;
  }
  if (threadIdx.x < kCoarse) shared.fine[threadIdx.x] = 0;
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();  // nothing before this reads what earlier kernels wrote

  const int32_t length = min(max(p.context_lens[row], 0), p.columns);
  int32_t* out = p.indices + row * p.indices_stride;
  if (length <= p.k) {
    for (int32_t i = rank * kThreads + threadIdx.x; i < p.k; i += kCtas * kThreads) out[i] = i < length ? i : -1;
    return;
  }
  const int32_t each = ((length + kCtas - 1) / kCtas + 127) / 128 * 128;
  const Slice slice{p.logits + row * p.logits_stride, min(rank * each, length), min(rank * each + each, length)};
  Chunks chunks{slice, reinterpret_cast<float*>(shared_bytes + slots_offset(bitmap_bytes)), shared.full,
                (slice.end - slice.begin + kChunk - 1) / kChunk, slots};
  chunks.load_first();
  Selector<kCtas> selector{p, shared, reinterpret_cast<uint32_t*>(shared_bytes + bitmap_offset()), rank, slice};
  selector.run(chunks, length, each, bitmap_bytes / 4, out);
}

}  // namespace mqa_sm90::selection
