// SPDX-License-Identifier: Apache-2.0
// The selection kernel, from outside: the k largest of each row's logits.
#pragma once

#include <cuda_runtime_api.h>

#include "shared/params.h"

namespace mqa_sm90 {

constexpr int32_t kMaxColumns = 1 << 24;  // a cluster's flags of so many have room in shared memory

struct SelectionParams {
  const float* logits;          // [rows] rows, logits_stride elements apart, each on a 16-byte boundary
  const int32_t* context_lens;  // [rows]: logits of each; more than `columns` count as so many
  int32_t* indices;             // [rows] rows of k, indices_stride elements apart

  int32_t rows, columns, k;     // k: 1 to kMaxTopK
  int64_t logits_stride;        // elements, a multiple of 4
  int64_t indices_stride;       // elements
};

// Launches asynchronously on `stream` of the current device and returns the launch's status.
cudaError_t launch_selection(const SelectionParams& params, cudaStream_t stream);

}  // namespace mqa_sm90
