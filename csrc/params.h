// What the bindings hand to the kernels: plain pointers and sizes, nothing of PyTorch.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace mqa_sm90 {

constexpr int kHeadDim = 128;      // bytes of one FP8 key or query head
constexpr int kTileTokens = 64;    // tokens scored per step of the kernel: one wgmma M
constexpr int kMaxNextN = 4;       // query rows of one group that share a KV tile
constexpr int kPlanColumns = 4;    // int32 columns of the plan, see schedule.cuh
constexpr int kSparesPerCta = 4;   // spare shares in the plan, at most, for each CTA

constexpr int64_t plan_rows(int64_t num_ctas) { return 1 + num_ctas * (1 + kSparesPerCta); }

// One step: `groups` requests of `next_n` query rows each, rows in request order.
struct LogitsParams {
  const void* q;                // [groups * next_n, heads, kHeadDim] e4m3, contiguous
  const uint8_t* kv_cache;      // [num_pages] pages, page_stride bytes apart
  const float* weights;         // [groups * next_n, heads], contiguous
  const int32_t* context_lens;  // [groups * next_n]
  const int32_t* block_table;   // [groups] rows, block_table_stride entries apart
  int32_t* plan;                // [plan_rows(num_ctas), kPlanColumns]; counts while the launch runs
  float* logits;                // [groups * next_n] rows, logits_stride elements apart

  int32_t groups, next_n, heads;
  int32_t page_size;            // tokens per page: 32 or 64
  int64_t num_pages;
  int64_t page_stride;          // bytes, a multiple of 16
  int32_t block_table_width;
  int64_t block_table_stride;   // elements
  int32_t max_context_len;      // columns of `logits` that may be written
  int64_t logits_stride;        // elements
  int32_t num_ctas;
  // The kernel launched before writes none of the plan, the lengths and the block table: they are read
  // while it still runs.
  bool prefetch;
};

// Both launch asynchronously on `stream` of the current device and return the launch's status.
cudaError_t launch_plan(const int32_t* context_lens, int32_t groups, int32_t next_n, int32_t* plan,
                        int32_t num_ctas, cudaStream_t stream);
cudaError_t launch_logits(const LogitsParams& params, cudaStream_t stream);

// Launches of the logits kernel on the current device by next_n (index 0 unused), counted on the
// device, so that replays of a CUDA graph count too. Synchronises with the device.
cudaError_t read_launch_counts(unsigned long long counts[kMaxNextN + 1]);

// The plan on the host, by the same code as the kernel's; for CPU tensors and for tests.
void plan_on_host(const int32_t* context_lens, int32_t groups, int32_t next_n, int32_t* plan, int32_t num_ctas);

}  // namespace mqa_sm90
