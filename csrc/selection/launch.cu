// SPDX-License-Identifier: Apache-2.0
// How many CTAs a row has, and how many of them an SM.
#include <algorithm>

#include "selection/kernel.cuh"

namespace mqa_sm90 {
namespace {

using namespace selection;

constexpr int kBytesOfSm = 228 * 1024, kReservedOfCta = 1024, kMostOfCta = 227 * 1024;  // shared memory

// kPerSm CTAs have room on an SM: the more they are, the fewer logits of each.
template <int kCtas, int kPerSm>
cudaError_t launch(const SelectionParams& p, cudaStream_t stream) {
  const auto kernel = selection_kernel<kCtas, kPerSm>;
  constexpr int kRoom = std::min(kBytesOfSm / kPerSm - kReservedOfCta, kMostOfCta), kChunkBytes = kChunk * sizeof(float);
  const int longest_slice = ((p.columns - 1) / kCtas + 1 + 127) / 128 * 128;
  const int bitmap_bytes = (std::min(longest_slice, kWindow) / 8 + 127) / 128 * 128;
  const int slots = std::clamp((kRoom - slots_offset(bitmap_bytes)) / kChunkBytes, 1,
                               std::min((longest_slice - 1) / kChunk + 1, kMaxSlots));
  const int bytes = slots_offset(bitmap_bytes) + slots * kChunkBytes;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess && kCtas > 8) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = p.rows * kCtas;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[] = {hopper::overlap(), {}};
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kCtas, 1, 1};
  config.attrs = attributes;
  config.numAttrs = kCtas > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, p, bitmap_bytes, slots);
}

}  // namespace

// Lengths are on the device: the number of rows decides alone. As measured, see csrc/README.md.
cudaError_t launch_selection(const SelectionParams& p, cudaStream_t stream) {
  if (p.rows <= 4) return launch<16, 1>(p, stream);
  if (p.rows <= 8) return launch<16, 2>(p, stream);
  if (p.rows <= 32) return launch<8, 2>(p, stream);
  if (p.rows <= 48) return launch<4, 2>(p, stream);
  if (p.rows <= 66) return launch<2, 1>(p, stream);
  if (p.rows <= 132) return launch<2, 2>(p, stream);
  if (p.rows <= 264) return launch<1, 2>(p, stream);
  return launch<1, 3>(p, stream);
}

}  // namespace mqa_sm90
