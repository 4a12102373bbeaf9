// SPDX-License-Identifier: Apache-2.0
// The plan: one small launch per step, shared by all layers. See schedule.cuh.
#include <cub/block/block_scan.cuh>

#include "schedule.cuh"

namespace mqa_sm90 {
namespace {

constexpr int kPlanThreads = 1024;

// One block. Thread i counts the tiles of a contiguous chunk of groups; a scan gives every chunk
// its place on the line of tiles; then each thread looks up the start of some CTAs.
__global__ void __launch_bounds__(kPlanThreads)
plan_kernel(const int32_t* __restrict__ context_lens, int32_t groups, int32_t next_n,
            PlanRow* __restrict__ plan, int32_t num_ctas) {
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

  for (int32_t cta = threadIdx.x; cta < num_ctas; cta += kPlanThreads) {
    const int32_t first = first_tile_of_cta(cta, total, num_ctas);
    const int32_t last = first_tile_of_cta(cta + 1, total, num_ctas);
    PlanRow row{0, 0, last - first, 0};
    if (row.num_tiles > 0) {
      // The last chunk that starts at or before `first`; empty chunks share a start with the next.
      int32_t low = 0, high = kPlanThreads - 1;
      while (low < high) {
        const int32_t middle = (low + high + 1) / 2;
        if (chunk_start[middle] <= first) low = middle; else high = middle - 1;
      }
      row.group = low * chunk;
      row.tile = first - chunk_start[low];
      find_group(row, context_lens, next_n);
    }
    plan[cta] = row;
  }
}

}  // namespace

cudaError_t launch_plan(const int32_t* context_lens, int32_t groups, int32_t next_n, int32_t* plan,
                        int32_t num_ctas, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = kPlanThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, plan_kernel, context_lens, groups, next_n, reinterpret_cast<PlanRow*>(plan),
                            num_ctas);
}

void plan_on_host(const int32_t* context_lens, int32_t groups, int32_t next_n, int32_t* plan, int32_t num_ctas) {
  int64_t total = 0;
  for (int32_t g = 0; g < groups; ++g) total += tiles_of_group(context_lens, g, next_n);

  int32_t group = 0;  // of the CTA before
  int64_t group_start = 0;
  for (int32_t cta = 0; cta < num_ctas; ++cta) {
    const int64_t first = first_tile_of_cta(cta, total, num_ctas);
    const int64_t last = first_tile_of_cta(cta + 1, total, num_ctas);
    PlanRow row{0, 0, static_cast<int32_t>(last - first), 0};
    if (row.num_tiles > 0) {
      row.group = group;
      row.tile = static_cast<int32_t>(first - group_start);
      find_group(row, context_lens, next_n);
      group = row.group;
      group_start = first - row.tile;
    }
    reinterpret_cast<PlanRow*>(plan)[cta] = row;
  }
}

}  // namespace mqa_sm90
