// SPDX-License-Identifier: Apache-2.0
// Dispatch over head counts, and what the variants share.
#include <cuda.h>

#include "logits/logits.h"

namespace mqa_sm90 {

namespace {
__device__ unsigned long long device_launch_counts[kMaxGroupRows + 1];
}

template <int kHeads>
cudaError_t launch_heads(const LogitsParams& p, cudaStream_t stream);  // heads*.cu

cudaError_t launch_logits(const LogitsParams& p, cudaStream_t stream) {
  switch (p.heads) {
    case 16: return launch_heads<16>(p, stream);
    case 32: return launch_heads<32>(p, stream);
    case 64: return launch_heads<64>(p, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_counters(unsigned long long** counters) {
  return cudaGetSymbolAddress(reinterpret_cast<void**>(counters), device_launch_counts);
}

cudaError_t read_launch_counts(unsigned long long counts[kMaxGroupRows + 1]) {
  const cudaError_t status = cudaDeviceSynchronize();  // launches may be on streams that copies don't wait for
  if (status != cudaSuccess) return status;
  return cudaMemcpyFromSymbol(counts, device_launch_counts, sizeof(device_launch_counts));
}

cudaError_t encode_tensor_map(CUtensorMap* map, int rank, const void* base, const cuuint64_t* sizes,
                              const cuuint64_t* strides, const cuuint32_t* box) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)
               : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint32_t element_strides[] = {1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, const_cast<void*>(base), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace mqa_sm90
