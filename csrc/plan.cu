// SPDX-License-Identifier: Apache-2.0
// The plan: one small launch per step, shared by all layers. See schedule.cuh.
#include <cub/block/block_scan.cuh>

#include "schedule.cuh"

namespace mqa_sm90 {
namespace {

constexpr int kPlanThreads = 1024;

// One block. Thread i counts the tiles of a contiguous chunk of groups; a scan gives every chunk
// its place on the line of tiles; then each thread looks up the start of some shares.
__global__ void __launch_bounds__(kPlanThreads)
plan_kernel(const int32_t* __restrict__ context_lens, int32_t groups, int32_t next_n,
            int32_t* __restrict__ plan, int32_t num_ctas) {
  using Scan = cub::BlockScan<int32_t, kPlanThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ int32_t chunk_start[kPlanThreads];

  const int32_t chunk = (groups + kPlanThreads - 1) / kPlanThreads;
  const int32_t begin = min(static_cast<int32_t>(threadIdx.x) * chunk, groups);
  const int32_t end = min(begin + chunk, groups);
  int32_t tiles = 0;  // 2^31 tiles are 1.4e11 tokens
  for (int32_t g = begin; g < end; ++g) {
    tiles += tiles_of_group(context_lens, g, next_n);
  }
  int32_t start, total;
  Scan(scan_storage).ExclusiveSum(tiles, start, total);
  chunk_start[threadIdx.x] = start;
  __syncthreads();

  const Cut cut(total, num_ctas);
  if (threadIdx.x == 0) *reinterpret_cast<PlanHeader*>(plan) = PlanHeader{0, cut.spares, {0, 0}};
  auto* shares = reinterpret_cast<Share*>(plan) + 1;
  for (int32_t i = threadIdx.x; i < plan_rows(num_ctas) - 1; i += kPlanThreads) {
    Share share{0, 0, 0, 0};
    if (i < cut.shares()) {
      const auto first = static_cast<int32_t>(cut.start(i));
      share.num_tiles = static_cast<int32_t>(cut.start(i + 1)) - first;
      if (share.num_tiles > 0) {
        // The last chunk that starts at or before `first`; empty chunks share a start with the next.
        int32_t low = 0, high = kPlanThreads - 1;
        while (low < high) {
          const int32_t middle = (low + high + 1) / 2;
          if (chunk_start[middle] <= first) low = middle; else high = middle - 1;
        }
        share.group = low * chunk;
        share.tile = first - chunk_start[low];
        if (chunk > 1) find_group(share, context_lens, next_n);  // else the chunk is the group
      }
    }
    shares[i] = share;
  }
}

}  // namespace

cudaError_t launch_plan(const int32_t* context_lens, int32_t groups, int32_t next_n, int32_t* plan,
                        int32_t num_ctas, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = kPlanThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, plan_kernel, context_lens, groups, next_n, plan, num_ctas);
}

void plan_on_host(const int32_t* context_lens, int32_t groups, int32_t next_n, int32_t* plan, int32_t num_ctas) {
  int64_t total = 0;
  for (int32_t g = 0; g < groups; ++g) total += tiles_of_group(context_lens, g, next_n);

  const Cut cut(total, num_ctas);
  *reinterpret_cast<PlanHeader*>(plan) = PlanHeader{0, cut.spares, {0, 0}};
  auto* shares = reinterpret_cast<Share*>(plan) + 1;
  int32_t group = 0;  // of the share before
  int64_t group_start = 0;
  for (int32_t i = 0; i < plan_rows(num_ctas) - 1; ++i) {
    Share share{0, 0, 0, 0};
    if (i < cut.shares()) {
      const int64_t first = cut.start(i);
      share.num_tiles = static_cast<int32_t>(cut.start(i + 1) - first);
      if (share.num_tiles > 0) {
        share.group = group;
        share.tile = static_cast<int32_t>(first - group_start);
        find_group(share, context_lens, next_n);
        group = share.group;
        group_start = first - share.tile;
      }
    }
    shares[i] = share;
  }
}

}  // namespace mqa_sm90
