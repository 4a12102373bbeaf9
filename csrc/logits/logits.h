// SPDX-License-Identifier: Apache-2.0
// The logits kernel, from outside.
#pragma once

#include <cuda_runtime_api.h>

#include "shared/params.h"

namespace mqa_sm90 {

struct Group;  // shared/schedule.cuh

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
  int32_t k;                    // the plan's: groups of rows with at most so many tokens have no logits
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

// Both launch asynchronously on `stream` of the current device and return the launch's status.
cudaError_t launch_logits(const LogitsParams& params, cudaStream_t stream);
// Sets the logits that launch_logits leaves alone, past each row's length, to -inf.
cudaError_t launch_clean(const LogitsParams& params, cudaStream_t stream);

// Launches of the logits kernel on the current device by max_rows (index 0 unused), counted on the
// device, so that replays of a CUDA graph count too. Synchronises with the device.
cudaError_t read_launch_counts(unsigned long long counts[kMaxGroupRows + 1]);

}  // namespace mqa_sm90
