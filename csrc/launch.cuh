// SPDX-License-Identifier: Apache-2.0
// Host side of the logits kernel: tensor maps and the launch, for one head count a file.
#pragma once

#include <cuda.h>

#include "paged_mqa_logits.cuh"

namespace mqa_sm90 {

// Device counters of launches by max_rows, kept in logits.cu.
cudaError_t launch_counters(unsigned long long** counters);

// cuTensorMapEncodeTiled, through the runtime, so that nothing links against the driver's library.
// A map of bytes; `strides` are those of all dimensions but the first.
cudaError_t encode_tensor_map(CUtensorMap* map, CUtensorMapSwizzle swizzle, int rank, const void* base,
                              const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box);

template <typename C>
cudaError_t launch_variant(const LogitsParams& p, cudaStream_t stream) {
  CUtensorMap q_map, key_map, scale_map;
  const cuuint64_t q_sizes[] = {kHeadDim, static_cast<cuuint64_t>(p.rows) * C::kHeads};
  const cuuint64_t q_strides[] = {kHeadDim};
  const cuuint32_t q_box[] = {kHeadDim, C::kHeads};
  cudaError_t status = encode_tensor_map(&q_map, CU_TENSOR_MAP_SWIZZLE_128B, 2, p.q, q_sizes, q_strides, q_box);
  if (status != cudaSuccess) return status;

  // A page: its tokens' keys, then their scales.
  const auto page_tokens = static_cast<cuuint32_t>(p.page_size);
  const auto pages = static_cast<cuuint64_t>(p.num_pages), page_stride = static_cast<cuuint64_t>(p.page_stride);
  const cuuint64_t key_sizes[] = {kHeadDim, page_tokens, pages};
  const cuuint64_t key_strides[] = {kHeadDim, page_stride};
  const cuuint32_t key_box[] = {kHeadDim, page_tokens, 1};
  status = encode_tensor_map(&key_map, CU_TENSOR_MAP_SWIZZLE_128B, 3, p.kv_cache, key_sizes, key_strides, key_box);
  if (status != cudaSuccess) return status;

  const cuuint32_t scale_box[] = {page_tokens * kScaleBytes, 1};
  const cuuint64_t scale_sizes[] = {scale_box[0], pages};
  status = encode_tensor_map(&scale_map, CU_TENSOR_MAP_SWIZZLE_NONE, 2, p.kv_cache + page_tokens * kHeadDim,
                             scale_sizes, &page_stride, scale_box);
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
  // Programmatic dependent launch: the kernel's start overlaps the end of the one before it.
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, q_map, key_map, scale_map, counters + p.max_rows);
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
