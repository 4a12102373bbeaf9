// SPDX-License-Identifier: Apache-2.0
// How many CTAs a row has, and how many of them an SM.
#include "selection/kernel.cuh"

namespace mqa_sm90 {
namespace {

using namespace selection;

// kPerSm CTAs have registers on an SM.
template <int kCtas, int kPerSm>
cudaError_t launch(const SelectionParams& p, cudaStream_t stream) {
  const auto kernel = selection_kernel<kCtas, kPerSm>;
  const int most_tiles = (slice_of(p.columns, kCtas) - 1) / kTile + 1, bytes = most_tiles * kBytesOfTile;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
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
  return cudaLaunchKernelEx(&config, kernel, p, most_tiles);
}

}  // namespace

// Lengths are on the device: rows and columns decide alone. As measured, see csrc/README.md.
cudaError_t launch_selection(const SelectionParams& p, cudaStream_t stream) {
  const int tiles = (p.columns - 1) / kTile + 1;
  const auto suits = [&](int ctas, int most_rows) { return tiles > ctas / 2 && p.rows <= most_rows; };
  if (suits(16, 6) || p.columns > kMaxColumns / kMaxCtas) return launch<16, 1>(p, stream);
  if (suits(8, 8)) return launch<8, 1>(p, stream);
  if (suits(4, 24)) return launch<4, 1>(p, stream);
  if (suits(4, 48)) return launch<4, 2>(p, stream);
  if (suits(2, 66)) return launch<2, 1>(p, stream);
  if (p.rows <= 132) return launch<1, 1>(p, stream);
  if (p.rows <= 264) return launch<1, 2>(p, stream);
  return launch<1, 3>(p, stream);
}

}  // namespace mqa_sm90
