// SPDX-License-Identifier: Apache-2.0
#include "logits/launch.cuh"

namespace mqa_sm90 {
template cudaError_t launch_heads<16>(const LogitsParams&, cudaStream_t);
}
