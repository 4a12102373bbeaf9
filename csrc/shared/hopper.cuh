// SPDX-License-Identifier: Apache-2.0
// The hardware idioms that the kernels use, under plain names. Instructions come from CUTLASS/CuTe
// atoms; the layouts are those of the PTX ISA, chapters "wgmma" and "cp.async.bulk.tensor".
#pragma once

#include <cstdint>
#include <utility>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

namespace mqa_sm90::hopper {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Arrivals of a warp that gives up what all its lanes have read. One would do, after __syncwarp, but
// compute-sanitizer's racecheck does not see that __syncwarp orders the lanes. Compiled with
// NVCC_APPEND_FLAGS=-DMQA_SM90_RACECHECK every lane arrives for itself, which it does see.
#ifdef MQA_SM90_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif

__device__ __forceinline__ void arrive_as_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 < kWarpArrivals) barrier.arrive();
}

// To the same place in the shared memory of the cluster's CTA `rank`; `barrier`, of that CTA, counts the bytes. Nothing else
// orders it, and the CTA may not be gone.
template <typename T>
__device__ __forceinline__ void push(T* place, T value, const Barrier& barrier, int rank) {
  const uint32_t to = cute::set_block_rank(cute::cast_smem_ptr_to_uint(place), rank);
  const uint32_t counts = cute::set_block_rank(cute::cast_smem_ptr_to_uint(&barrier), rank);
  if constexpr (sizeof(T) == 8) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to), "l"(value), "r"(counts) : "memory");
  } else {
    static_assert(sizeof(T) == 4);
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(value), "r"(counts) : "memory");
  }
}

// Adds one to an int32 in shared memory, at an address made by 32-bit arithmetic.
__device__ __forceinline__ void count(uint32_t address) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
}

// Programmatic dependent launch: the kernel's start overlaps the end of the one before it.
inline cudaLaunchAttribute overlap() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Position in a ring of kStages buffers, each guarded by a barrier that flips phase every round.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage >= kStages) {
      stage -= kStages;
      phase ^= 1;
    }
  }
};

// A wgmma operand in shared memory, K-major rows of 128 bytes as TMA's 128-byte swizzle leaves them:
// a descriptor whose upper half is the same for all (groups of 8 rows are 1024 bytes apart).
struct Operand {
  uint32_t low;

  __device__ explicit Operand(const void* smem) : low(cute::cast_smem_ptr_to_uint(smem) >> 4 | 1 << 16) {}

  // `bytes` further on: 32 along K for the next step of an FP8 wgmma, 128 per row.
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
    constexpr uint64_t kHigh = 1ull << 62 | static_cast<uint64_t>(1024 >> 4) << 32;  // swizzle 128 B, stride
    return kHigh | (low + (bytes >> 4));
  }
};

// The widths N of wgmma that CuTe has atoms for: the least that holds `columns`.
constexpr int wgmma_columns(int columns) {
  for (int n : {16, 32, 64, 96, 128, 192, 256}) {
    if (columns <= n) return n;
  }
  return 0;
}

template <int kColumns> struct WgmmaAtom;
template <> struct WgmmaAtom<16> : cute::SM90::GMMA::MMA_64x16x32_F32E4M3E4M3_SS_TN<> {};
template <> struct WgmmaAtom<32> : cute::SM90::GMMA::MMA_64x32x32_F32E4M3E4M3_SS_TN<> {};
template <> struct WgmmaAtom<64> : cute::SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_SS_TN<> {};
template <> struct WgmmaAtom<96> : cute::SM90::GMMA::MMA_64x96x32_F32E4M3E4M3_SS_TN<> {};
template <> struct WgmmaAtom<128> : cute::SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_SS_TN<> {};
template <> struct WgmmaAtom<192> : cute::SM90::GMMA::MMA_64x192x32_F32E4M3E4M3_SS_TN<> {};
template <> struct WgmmaAtom<256> : cute::SM90::GMMA::MMA_64x256x32_F32E4M3E4M3_SS_TN<> {};

// d[64 x kColumns] (+)= a[64 x 32] b[kColumns x 32]^T in FP8 E4M3 with FP32 sums.
// Thread t of the warpgroup has, for j in 0 .. kColumns / 8: d[4j], d[4j+1] = row 16 (t / 32) +
// t % 32 / 4, columns 8j + 2 (t % 4) and the next; d[4j+2], d[4j+3] = the same columns 8 rows below.
template <int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  const auto scale = accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
  [&]<size_t... I>(std::index_sequence<I...>) {
    WgmmaAtom<kColumns>::fma(a, b, d[I]..., scale);
  }(std::make_index_sequence<kColumns / 2>());
}

// Keeps the compiler from computing a pointer anew at each of its uses.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Keeps the compiler from moving uses of registers across the asynchronous wgmma that owns them.
template <typename T, int N>
__device__ __forceinline__ void pin(T (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(registers[i]);
}

}  // namespace mqa_sm90::hopper
