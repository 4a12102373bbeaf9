// SPDX-License-Identifier: Apache-2.0
// Exact top-k of the logits, row by row: the indices of the k largest, in ascending order; of equal ones, the first.
//
// A row has a cluster of CTAs, each with a slice of its logits, which its threads hold in registers, a tile at a time.
//   1. A sample says how to cut the row's logits into bins. Count how many each bin has; the histograms of all CTAs say in
//      which bin the k-th largest is.
//   2. Flag the logits above that bin. Those in the bin are candidates, and go to all CTAs.
//   3. Rank the candidates, flag those that are chosen, and write the indices of what is flagged.
// A bin with more candidates than there is room for is cut into bins in turn, by the bits of its logits.
#pragma once

#include "selection/selector.cuh"

namespace mqa_sm90::selection {

// Bins for the range of a sample, half as wide again above it. The same for all CTAs of a row.
template <int kCtas>
__device__ __forceinline__ Linear Selector<kCtas>::bins_of_sample() {
  const float* row = slice.logits - slice.begin;
  // A line of 128 bytes for each warp.
  const int32_t line = static_cast<int32_t>(static_cast<int64_t>(2 * warp + 1) * row_length / (2 * kWarps)) / 32 * 32;
  const float value = __ldcg(row + min(line + lane, row_length - 1));
  load(0);
  const bool is_finite = fabsf(value) < INFINITY;
  const uint32_t key = key_of(value);
  const uint32_t low = __reduce_min_sync(~0u, is_finite ? key : ~0u), high = __reduce_max_sync(~0u, is_finite ? key : 0);
  if (lane == 0) shared.range_of_warp[warp] = {low, high};
  __syncthreads();
  const uint2 of_lane = shared.range_of_warp[lane % kWarps];
  return Linear::over(logit_of(__reduce_min_sync(~0u, of_lane.x)), logit_of(__reduce_max_sync(~0u, of_lane.y)));
}

// The rest after the first look, where a bin has more logits than candidates may be: cuts what keys it has and at last, of one
// key, the indices. As a function of its own, to which shared memory says all, it takes no registers from the usual case.
template <int kCtas>
__device__ __noinline__ void look_further(const SelectionParams& p, SharedMemory& shared, uint16_t* flags, int32_t most_tiles,
                                          int32_t length) {
  auto selector = Selector<kCtas>::of_row(p, shared, flags, most_tiles, length);
  selector.load(max(selector.tiles() - 1, 0));
  selector.run_further();
}

// Makes ready for another look at the logits that is_in(value, index) says, and narrows the range to the keys that they have.
template <int kCtas>
template <typename IsIn>
__device__ __forceinline__ void Selector<kCtas>::narrow(Range& range, const IsIn& is_in) {
  sync();  // all have read the last histograms
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[i] = 0;
  if (threadIdx.x == 0) {
    shared.low_key = ~0u, shared.high_key = 0;
    expect_find();
  }
  sync();
  uint32_t low = ~0u, high = 0;
  look<false, false>(
      [&](int32_t tile, int quad) {
#pragma unroll
        for (int i = quad * 4; i < quad * 4 + 4; ++i) {
          const uint32_t key = key_of(values[i]);
          if (is_in(values[i], index_of_value(tile, i))) low = min(low, key), high = max(high, key);
        }
      },
      [](int32_t) {});
  low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
  if (lane < kCtas) atomicMin(of_rank(&shared.low_key, lane), low), atomicMax(of_rank(&shared.high_key, lane), high);
  sync();
  range.low_key = shared.low_key, range.high_key = shared.high_key;
}

template <int kCtas>
__device__ __forceinline__ void Selector<kCtas>::run_further() {
  const int32_t end = slice.begin + slice.size;
  Range range{0, 0, 0, row_length - 1};
  const auto is_in = [&](float value, int32_t index) { return index < end && range.contains(key_of(value), index); };
  {
    const Linear bins = shared.bins;
    const int bin = shared.found.bin;
    narrow(range, [&](float value, int32_t index) { return index < end && bins.bin_of(value) == bin; });
  }
  Found found = shared.found;
#pragma unroll 1
  for (int n = 1;; ++n) {
    const Cut<kBinBits> cut(range);
    look<true, false>(
        [&](int32_t tile, int quad) {
#pragma unroll
          for (int i = quad * 4; i < quad * 4 + 4; ++i) {
            const int32_t index = index_of_value(tile, i);
            if (is_in(values[i], index)) atomicAdd(&shared.histogram[cut.bin_of(key_of(values[i]), index)], 1);
          }
        },
        [](int32_t) {});
    found = find(n, found);
    range = cut.of_bin(range, found.bin);
    if (found.size <= kCandidates) break;
    narrow(range, is_in);
  }
  flag(found, [&](float value, int32_t index) { return index < end && range.is_least(key_of(value), index); }, is_in);
}

template <int kCtas>
__device__ __forceinline__ void Selector<kCtas>::run(int32_t* out) {
  const Linear bins = bins_of_sample();
  // The last bin has what is missing in the last tile.
  if (threadIdx.x == 0) atomicSub(&shared.histogram[kBins - 1], tiles() * kTile - slice.size);
  const uint32_t base = cute::cast_smem_ptr_to_uint(shared.histogram) - (__float_as_uint(Linear::kFirst) << 2);
  look<true>(
      [&](int32_t, int quad) {
#pragma unroll
        for (int i = quad * 4; i < quad * 4 + 4; ++i) hopper::count(base + (__float_as_uint(bins.place_of(values[i])) << 2));
      },
      [](int32_t) {});
  if constexpr (kCtas > 1) cute::cluster_wait();  // all CTAs are there
  const Found found = find(0, Found{});
  if (found.size <= kCandidates) {
    const float bin = bins.place_of_bin(found.bin);
    flag(found, [&](float value, int32_t) { return bins.place_of(value) <= bin; },
         [&](float value, int32_t) { return bins.place_of(value) == bin; });
  } else {
    if (threadIdx.x == 0) shared.bins = bins;
    __syncthreads();
    look_further<kCtas>(p, shared, flags, most_tiles, row_length);
  }
  choose_candidates();
  write(out);
}

template <int kCtas, int kPerSm>
__global__ void __launch_bounds__(kThreads, kPerSm)
selection_kernel(const __grid_constant__ SelectionParams p, int32_t most_tiles) {
  extern __shared__ __align__(16) uint16_t flags[];
  __shared__ __align__(16) uint8_t shared_bytes[sizeof(SharedMemory)];
  auto& shared = *reinterpret_cast<SharedMemory*>(shared_bytes);
  const int row = blockIdx.x / kCtas, rank = blockIdx.x % kCtas;
  for (int i = threadIdx.x * 4; i < kBins; i += kThreads * 4) *reinterpret_cast<int4*>(&shared.histogram[i]) = {0, 0, 0, 0};
  if (threadIdx.x == 0) {
    shared.taken = shared.chosen_before = 0;
    if constexpr (kCtas > 1) {
      for (auto* barrier : {&shared.coarse_full, &shared.fine_full, &shared.candidates_full}) barrier->init(1);
      cutlass::arch::fence_barrier_init();
    }
  }
  __syncthreads();
  if constexpr (kCtas > 1) cute::cluster_arrive_relaxed();  // waited for before anything is pushed
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();  // nothing before this reads what earlier kernels wrote

  const int32_t length = min(max(p.context_lens[row], 0), p.columns);
  int32_t* out = p.indices + row * p.indices_stride;
  if (length <= p.k) {
    for (int32_t i = rank * kThreads + threadIdx.x; i < p.k; i += kCtas * kThreads) out[i] = i < length ? i : -1;
    if constexpr (kCtas > 1) cute::cluster_wait();
    return;
  }
  auto selector = Selector<kCtas>::of_row(p, shared, flags, most_tiles, length);
  if (threadIdx.x == 0) selector.expect_find();
  selector.run(out);
}

}  // namespace mqa_sm90::selection
