// SPDX-License-Identifier: Apache-2.0
// Paged MQA logits for Hopper:
//
//     logits[row, s] = k_scale[s] * sum_h weights[row, h] * relu(q[row, h, :] . k[s, :])
//
// for the query rows of a request ("group") against the request's paged FP8 keys, each key read
// from memory once. Persistent: a CTA walks its shares of the plan (shared/schedule.cuh) and deals their
// 64-token tiles out to its pipes in turn. A pipe is a producer warp, a ring of shared-memory stages
// and a consumer warpgroup; for groups of more than four rows there is one pipe with two consumers,
// and each scores all its tiles for half of the rows. One more warp fetches the queries, for the
// group at hand and the next, and spare shares.
//
// The tile is wgmma's A operand (tokens along M), the queries of a consumer's rows are B: a tile is
// scored by four instructions. A consumer's tensor-core work and its arithmetic take turns; the other's fill in.
#pragma once

#include "logits/consumer.cuh"
#include "logits/producers.cuh"

namespace mqa_sm90 {

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
paged_mqa_logits_kernel(const __grid_constant__ LogitsParams p, const __grid_constant__ CUtensorMap q_map,
                        const __grid_constant__ CUtensorMap kv_map, unsigned long long* launch_count) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<SharedMemory<C>*>(shared_bytes);

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  Share own;
  if (warpgroup == C::kConsumers) {
    if (threadIdx.x % 128 == 0) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&kv_map));
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&q_map));
    }
    // Nothing before this reads what earlier kernels wrote; consumers follow the producers.
    cudaGridDependencySynchronize();
    own = reinterpret_cast<const Share*>(p.plan)[1 + blockIdx.x];
  }
  if (threadIdx.x == 0) {
    for (int pipe = 0; pipe < C::kPipes; ++pipe) {
      for (int s = 0; s < C::kStages; ++s) {
        shared.tile_full[pipe][s].init(1);
        shared.tile_empty[pipe][s].init(C::kConsumersPerPipe * 4 * hopper::kWarpArrivals);  // warps of the consumers
      }
    }
    for (int s = 0; s < C::kQuerySlots; ++s) {
      shared.query_full[s].init(1);
      shared.query_empty[s].init(C::kConsumers * 4 * hopper::kWarpArrivals);
    }
    shared.share_full.init(1);
    shared.share_empty.init(C::kPipes * hopper::kWarpArrivals);
    cutlass::arch::fence_barrier_init();
    if (blockIdx.x == 0) atomicAdd(launch_count, 1ull);
  }
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion();

  if (warpgroup == C::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    if (warp < C::kPipes) {
      produce_tiles<C>(p, kv_map, shared, own, warp);
    } else if (warp == C::kPipes) {
      produce_queries<C>(p, q_map, shared, own);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    Consumer<C>(p, shared, warpgroup).run();
  }
}

}  // namespace mqa_sm90
