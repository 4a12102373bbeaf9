// What the bindings hand to the kernels: plain pointers and sizes, nothing of PyTorch.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace mqa_sm90 {

constexpr int kHeadDim = 128;      // bytes of one FP8 key or query head
constexpr int kScaleBytes = 4;     // one FP32 scale per cached token
constexpr int kTileTokens = 64;    // tokens scored per step of the kernel: one wgmma M
constexpr int kMaxGroupRows = 8;   // query rows that share a KV tile
constexpr int kSparesPerCta = 4;   // spare shares in the plan, at most, for each CTA

// A plan is a line of entries of four int32 (schedule.cuh): header, shares and, if the step is ragged, its
// group table. The host, which cannot look into it, knows the kind of a plan by its columns, and by nothing
// else: one entry a row makes a uniform plan, two a ragged one. It chooses the kernel by that; the kernel
// checks that the header says the same.
constexpr int kEntryInts = 4;
constexpr int plan_columns(bool ragged) { return ragged ? 2 * kEntryInts : kEntryInts; }

// The header and the shares.
constexpr int64_t share_entries(int64_t num_ctas) { return 1 + num_ctas * (1 + kSparesPerCta); }

// Rows of a plan, of which a ragged one's last may end with an entry too many.
constexpr int64_t plan_rows(int64_t num_ctas, bool ragged, int64_t rows) {
  return ragged ? (share_entries(num_ctas) + rows + 1) / 2 : share_entries(num_ctas);
}

// A step's query rows, in request order, and what says which of them form groups.
struct StepRows {
  const int32_t* context_lens;  // [rows]
  int32_t rows;
  int32_t max_rows;             // of a group; a uniform step's groups all have so many
  bool ragged;
  // A ragged step that has rows has one of these.
  const int32_t* indices;          // [rows]: request of each
  const int32_t* query_start_loc;  // [requests + 1]: first row of each, and the last one's end
  int32_t requests;
};

// Lengths by request, from which those of its rows follow.
struct RequestLens {
  const int32_t* seq_lens;         // [requests]: tokens, those of its rows included
  const int32_t* query_start_loc;  // [requests + 1]: first row of each, and the last one's end
  int32_t requests;
};

struct Group;  // schedule.cuh

struct LogitsParams {
  const void* q;                // [rows, heads, kHeadDim] e4m3, contiguous
  const uint8_t* kv_cache;      // [num_pages] pages, page_stride bytes apart
  const float* weights;         // [rows, heads], contiguous
  const int32_t* context_lens;  // [rows]
  const int32_t* block_table;   // [requests] rows, block_table_stride entries apart
  int32_t* plan;                // a plan for num_ctas; counts while the launch runs
  const Group* group_table;     // a ragged plan's, [rows]; else nullptr
  float* logits;                // [rows] rows, logits_stride elements apart

  int32_t rows, heads;
  int32_t max_rows;             // of a group; a uniform step's groups all have so many
  int32_t requests;
  int32_t page_size;            // tokens per page: 32 or 64
  int64_t num_pages;
  int64_t page_stride;          // bytes, a multiple of 16
  int32_t block_table_width;
  int64_t block_table_stride;   // elements
  int32_t max_context_len;      // columns of `logits` that may be written
  int64_t logits_stride;        // elements
  int32_t num_ctas;
};

// All launch asynchronously on `stream` of the current device and return the launch's status.
cudaError_t launch_row_lens(const RequestLens& lens, int32_t* context_lens, int32_t rows, cudaStream_t stream);
cudaError_t launch_plan(const StepRows& step, int32_t* plan, int32_t num_ctas, cudaStream_t stream);
cudaError_t launch_logits(const LogitsParams& params, cudaStream_t stream);
// Sets the logits that launch_logits leaves alone, past each row's length, to -inf.
cudaError_t launch_clean(const LogitsParams& params, cudaStream_t stream);

// Launches of the logits kernel on the current device by max_rows (index 0 unused), counted on the
// device, so that replays of a CUDA graph count too. Synchronises with the device.
cudaError_t read_launch_counts(unsigned long long counts[kMaxGroupRows + 1]);

// The same on the host, by the same code as the kernels'; for CPU tensors and for tests.
void row_lens_on_host(const RequestLens& lens, int32_t* context_lens, int32_t rows);
// False: a CTA's share would have more tiles than fit in 31 bits; on the device that stops the launch.
bool plan_on_host(const StepRows& step, int32_t* plan, int32_t num_ctas);

}  // namespace mqa_sm90
