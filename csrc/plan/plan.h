// SPDX-License-Identifier: Apache-2.0
// What a step needs before its layers: its rows' lengths, and the plan.
#pragma once

#include <cuda_runtime_api.h>

#include "shared/params.h"

namespace mqa_sm90 {

// Both launch asynchronously on `stream` of the current device and return the launch's status.
cudaError_t launch_row_lens(const RequestLens& lens, int32_t* context_lens, int32_t rows, cudaStream_t stream);
cudaError_t launch_plan(const StepRows& step, int32_t* plan, int32_t num_ctas, cudaStream_t stream);

// The same on the host, by the same code as the kernels'; for CPU tensors and for tests.
void row_lens_on_host(const RequestLens& lens, int32_t* context_lens, int32_t rows);
// False: a CTA's share would have more tiles than fit in 31 bits; on the device that stops the launch.
bool plan_on_host(const StepRows& step, int32_t* plan, int32_t num_ctas);

}  // namespace mqa_sm90
