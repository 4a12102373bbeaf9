// SPDX-License-Identifier: Apache-2.0
// For callers who want every logit defined: -inf where the logits kernel writes nothing that counts.
#include <cmath>

#include "logits/logits.h"
#include "shared/schedule.cuh"

namespace mqa_sm90 {
namespace {

constexpr int kCleanThreads = 256;

// Whether a row is in a group: those past the plan's rows, and of a ragged step past the last request, are in none.
__device__ bool has_request(const LogitsParams& p, int32_t row) {
  if (row >= reinterpret_cast<const PlanHeader*>(p.plan)->rows) return false;
  if (p.group_table == nullptr) return true;
  for (int32_t first = row; first >= 0 && first > row - kMaxGroupRows; --first) {
    const int32_t rows = p.group_table[first].rows;
    if (rows > 0) return first + rows > row;
  }
  return false;
}

// A row for each x of the grid, its columns over y.
__global__ void __launch_bounds__(kCleanThreads) clean_kernel(const LogitsParams p) {
  const auto row = static_cast<int32_t>(blockIdx.x);
  const int64_t in_pages = int64_t{p.block_table_width} * p.page_size;
  const int64_t length = has_request(p, row) ? min(int64_t{max(p.context_lens[row], 0)}, in_pages) : 0;
  float* logits = p.logits + row * p.logits_stride;
  const int64_t step = int64_t{kCleanThreads} * gridDim.y;
  for (int64_t i = length + blockIdx.y * kCleanThreads + threadIdx.x; i < p.max_context_len; i += step) {
    logits[i] = -INFINITY;
  }
}

}  // namespace

cudaError_t launch_clean(const LogitsParams& p, cudaStream_t stream) {
  constexpr int32_t kColumnsOfBlock = 16 * kCleanThreads, kMostBlocks = 64;  // of a row
  const int32_t blocks = p.max_context_len / kColumnsOfBlock + 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.rows, blocks < kMostBlocks ? blocks : kMostBlocks);
  config.blockDim = kCleanThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, clean_kernel, p);
}

}  // namespace mqa_sm90
