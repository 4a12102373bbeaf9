// SPDX-License-Identifier: Apache-2.0
// Host side of the logits kernel: tensor maps and the launch, for one head count a file.
#pragma once

#include <cuda.h>

#include "logits/kernel.cuh"

namespace mqa_sm90 {

// Device counters of launches by max_rows, kept in launch.cu.
cudaError_t launch_counters(unsigned long long** counters);

// cuTensorMapEncodeTiled, through the runtime, so that nothing links against the driver's library.
cudaError_t encode_tensor_map(CUtensorMap* map, int rank, const void* base, const cuuint64_t* sizes,
                              const cuuint64_t* strides, const cuuint32_t* box);

template <typename C>
cudaError_t launch_variant(const LogitsParams& p, cudaStream_t stream) {
  CUtensorMap q_map, kv_map;
  const cuuint64_t q_sizes[] = {kHeadDim, static_cast<cuuint64_t>(p.rows) * C::kHeads};
  const cuuint64_t q_strides[] = {kHeadDim};
  const cuuint32_t q_box[] = {kHeadDim, C::kHeads};
  cudaError_t status = encode_tensor_map(&q_map, 2, p.q, q_sizes, q_strides, q_box);
  if (status != cudaSuccess) return status;

  const cuuint64_t kv_sizes[] = {kHeadDim, static_cast<cuuint64_t>(p.page_size), static_cast<cuuint64_t>(p.num_pages)};
  const cuuint64_t kv_strides[] = {kHeadDim, static_cast<cuuint64_t>(p.page_stride)};
  const cuuint32_t kv_box[] = {kHeadDim, static_cast<cuuint32_t>(p.page_size), 1};
  status = encode_tensor_map(&kv_map, 3, p.kv_cache, kv_sizes, kv_strides, kv_box);
  if (status != cudaSuccess) return status;

  unsigned long long* counters;
  status = launch_counters(&counters);
  if (status != cudaSuccess) return status;

  const auto kernel = paged_mqa_logits_kernel<C>;
  constexpr int kSharedBytes = sizeof(SharedMemory<C>);
  static_assert(kSharedBytes <= C::kMaxSharedBytes);
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = p.num_ctas;
  config.blockDim = C::kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute overlap = hopper::overlap();
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, q_map, kv_map, counters + p.max_rows);
}

template <int kHeads>
cudaError_t launch_heads(const LogitsParams& p, cudaStream_t stream) {
  switch (p.max_rows) {
    case 1: return launch_variant<Config<kHeads, 1>>(p, stream);
    case 2: return launch_variant<Config<kHeads, 2>>(p, stream);
    case 3: return launch_variant<Config<kHeads, 3>>(p, stream);
    case 4: return launch_variant<Config<kHeads, 4>>(p, stream);
    case 5:
    case 6: return launch_variant<Config<kHeads, 6>>(p, stream);
    case 7:
    case 8: return launch_variant<Config<kHeads, 8>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mqa_sm90
