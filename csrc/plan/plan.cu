// SPDX-License-Identifier: Apache-2.0
// A small launch each. See shared/schedule.cuh.
#include <algorithm>

#include <cub/block/block_scan.cuh>
#include <cuda/functional>

#include "plan/plan.h"
#include "shared/schedule.cuh"

namespace mqa_sm90 {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kPlanWarps = kPlanThreads / 32;
static_assert(kPlanWarps == 32);
using RowScan = cub::BlockScan<int32_t, kPlanThreads>;

// Sums of 64 bits over the block, as 64 rows of 2^31 tokens have more tiles than 31 bits tell: each warp scans, then
// all warps scan the warps' sums. (BlockScan needs 64 registers or 1.4 us more for it.)
struct TileScan {
  using OfWarp = cub::WarpScan<int64_t>;
  struct Storage {
    typename OfWarp::TempStorage warps[kPlanWarps];
    int64_t sums[kPlanWarps];
  };

  // Of what the threads before have; and of all.
  static __device__ int64_t exclusive_sum(Storage& storage, int64_t value, int64_t& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t before, sum, warps_before;
    OfWarp(storage.warps[warp]).ExclusiveSum(value, before, sum);
    if (lane == 0) storage.sums[warp] = sum;
    __syncthreads();
    OfWarp(storage.warps[warp]).ExclusiveSum(storage.sums[lane], warps_before, total);
    return before + __shfl_sync(~0u, warps_before, warp);
  }
};

union ScanStorage {
  typename RowScan::TempStorage rows;
  TileScan::Storage tiles;
};

// This thread's part of `count` things, a contiguous chunk.
struct Chunk {
  int32_t size, begin, end;

  __device__ explicit Chunk(int32_t count)
      : size((count + kPlanThreads - 1) / kPlanThreads),
        begin(min(static_cast<int32_t>(threadIdx.x) * size, count)),
        end(min(begin + size, count)) {}
};

__device__ void fill_group_table(const StepRows& step, Group* table, int32_t num_ctas,
                                 RowScan::TempStorage& scan_storage) {
  if (threadIdx.x < table_entries(num_ctas, step.rows) - step.rows) table[step.rows + threadIdx.x] = {0, 0, 0, 0};
  const Chunk rows(step.rows);
  if (step.indices != nullptr) {
    int32_t run_start = 0;  // of the last run that starts here or before
    for (int32_t row = rows.begin; row < rows.end; ++row) {
      if (starts_run(step.indices, row)) run_start = row;
    }
    RowScan(scan_storage).ExclusiveScan(run_start, run_start, 0, cuda::maximum<int32_t>{});
    for (int32_t row = rows.begin; row < rows.end; ++row) {
      if (starts_run(step.indices, row)) run_start = row;
      table[row] = group_from_indices(step, row, run_start);
    }
  } else {
    for (int32_t row = rows.begin; row < rows.end; ++row) table[row] = {0, 0, 0, 0};
    __syncthreads();
    for (int32_t r = threadIdx.x; r < step.requests; r += kPlanThreads) enter_request(step, r, table);
  }
  __syncthreads();
}

// One block. First the group table, if the step is ragged. Then thread i counts the tiles of a
// contiguous chunk of groups; a scan gives every chunk its place on the line of tiles; then each
// thread looks up the start of some shares.
__global__ void __launch_bounds__(kPlanThreads)
plan_kernel(const StepRows step, int32_t* plan, int32_t num_ctas) {
  __shared__ ScanStorage scan_storage;
  __shared__ int64_t chunk_start[kPlanThreads];

  Group* table = step.ragged ? group_table_of(plan, num_ctas) : nullptr;
  if (step.ragged) fill_group_table(step, table, num_ctas, scan_storage.rows);
  const Groups groups{table, step.rows, step.max_rows};
  const Chunk chunk(groups.places());
  int64_t tiles = 0;
  for (int32_t place = chunk.begin; place < chunk.end; ++place) {
    tiles += tiles_of_group(step.context_lens, groups.at(place), step.k);
  }
  int64_t total;
  const int64_t start = TileScan::exclusive_sum(scan_storage.tiles, tiles, total);
  chunk_start[threadIdx.x] = start;
  __syncthreads();

  const Cut cut(total, num_ctas);
  if (!cut.fits()) __trap();
  if (threadIdx.x == 0) *reinterpret_cast<PlanHeader*>(plan) = PlanHeader::of(step, total, cut.spares());
  auto* shares = reinterpret_cast<Share*>(plan) + 1;
  for (int32_t i = threadIdx.x; i < share_entries(num_ctas) - 1; i += kPlanThreads) {
    Share share{0, 0, 0, 0};
    if (i < cut.shares()) {
      const int64_t first = cut.start(i);
      const auto num_tiles = static_cast<int32_t>(cut.start(i + 1) - first);
      if (num_tiles > 0) {
        // The last chunk that starts at or before `first`; empty chunks share a start with the next.
        int32_t low = 0, high = kPlanThreads - 1;
        while (low < high) {
          const int32_t middle = (low + high + 1) / 2;
          if (chunk_start[middle] <= first) low = middle; else high = middle - 1;
        }
        int32_t place = low * chunk.size;
        int64_t tile = first - chunk_start[low];
        if (chunk.size > 1) find_group(groups, step.context_lens, step.k, place, tile);  // else the chunk is the group
        share = Share::from(groups.at(place), static_cast<int32_t>(tile), num_tiles);
      }
    }
    shares[i] = share;
  }
}

// Thread i writes the lengths of request i's rows, and row i's where that is padding.
__global__ void row_lens_kernel(const RequestLens lens, int32_t* context_lens, int32_t rows) {
  const int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < lens.requests) enter_row_lens(lens, i, context_lens, rows);
  if (i < rows && i >= lens.query_start_loc[lens.requests]) context_lens[i] = 0;
}

}  // namespace

cudaError_t launch_row_lens(const RequestLens& lens, int32_t* context_lens, int32_t rows, cudaStream_t stream) {
  constexpr int32_t kThreads = 256;
  const int32_t things = lens.requests > rows ? lens.requests : rows;
  if (things == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = (things + kThreads - 1) / kThreads;
  config.blockDim = kThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, row_lens_kernel, lens, context_lens, rows);
}

void row_lens_on_host(const RequestLens& lens, int32_t* context_lens, int32_t rows) {
  for (int32_t request = 0; request < lens.requests; ++request) enter_row_lens(lens, request, context_lens, rows);
  const int32_t end = lens.query_start_loc[lens.requests];
  for (int32_t row = end > 0 ? end : 0; row < rows; ++row) context_lens[row] = 0;
}

cudaError_t launch_plan(const StepRows& step, int32_t* plan, int32_t num_ctas, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = kPlanThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, plan_kernel, step, plan, num_ctas);
}

bool plan_on_host(const StepRows& step, int32_t* plan, int32_t num_ctas) {
  Group* table = step.ragged ? group_table_of(plan, num_ctas) : nullptr;
  if (step.ragged) std::fill_n(table, table_entries(num_ctas, step.rows), Group{0, 0, 0, 0});
  if (step.indices != nullptr) {
    for (int32_t row = 0, run_start = 0; row < step.rows; ++row) {
      if (starts_run(step.indices, row)) run_start = row;
      table[row] = group_from_indices(step, row, run_start);
    }
  } else {
    for (int32_t request = 0; request < step.requests; ++request) enter_request(step, request, table);
  }

  const Groups groups{table, step.rows, step.max_rows};
  int64_t total = 0;
  for (int32_t place = 0; place < groups.places(); ++place) {
    total += tiles_of_group(step.context_lens, groups.at(place), step.k);
  }
  const Cut cut(total, num_ctas);
  if (!cut.fits()) return false;
  *reinterpret_cast<PlanHeader*>(plan) = PlanHeader::of(step, total, cut.spares());
  auto* shares = reinterpret_cast<Share*>(plan) + 1;
  int32_t place = 0;  // of the share before
  int64_t place_start = 0;
  for (int32_t i = 0; i < share_entries(num_ctas) - 1; ++i) {
    Share share{0, 0, 0, 0};
    if (i < cut.shares()) {
      const int64_t first = cut.start(i);
      const auto num_tiles = static_cast<int32_t>(cut.start(i + 1) - first);
      if (num_tiles > 0) {
        int64_t tile = first - place_start;
        find_group(groups, step.context_lens, step.k, place, tile);
        place_start = first - tile;
        share = Share::from(groups.at(place), static_cast<int32_t>(tile), num_tiles);
      }
    }
    shares[i] = share;
  }
  return true;
}

}  // namespace mqa_sm90
