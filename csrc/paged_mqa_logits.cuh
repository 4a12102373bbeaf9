// SPDX-License-Identifier: Apache-2.0
// Paged MQA logits for Hopper:
//
//     logits[row, s] = k_scale[s] * sum_h weights[row, h] * relu(q[row, h, :] . k[s, :])
//
// for `next_n` query rows per request ("group") against the request's paged FP8 keys, each key read
// from memory once. Persistent: a CTA walks its share of the plan (schedule.cuh) and deals its
// 64-token tiles out to three pipes in turn. A pipe is a producer warp, a ring of shared-memory
// stages and a consumer warpgroup; one pipe's tensor-core work covers the others' arithmetic. A
// fourth producer warp fetches the queries, for the group at hand and the one after it.
//
// The tile is wgmma's A operand (tokens along M), the queries are B, 64 columns (64 / heads rows) a
// "unit". Each warpgroup alternates between the accumulators of two units: while one is on the
// tensor cores the other is reduced over its heads. Their number does not grow with next_n.
#pragma once

#include "hopper.cuh"
#include "schedule.cuh"

namespace mqa_sm90 {

template <int kHeads_, int kNextN_>
struct Config {
  static constexpr int kHeads = kHeads_;
  static constexpr int kNextN = kNextN_;
  static constexpr int kUnitColumns = 64;                                    // wgmma N
  static constexpr int kRowsPerUnit = kUnitColumns / kHeads;
  static constexpr int kUnits = (kNextN + kRowsPerUnit - 1) / kRowsPerUnit;  // of one tile
  static constexpr int kWeights = kHeads / 8;                                // float2 a thread and row
  static constexpr int kQueryBytes = kHeads * kHeadDim;                      // of one row
  static constexpr int kQuerySlots = 2;                                      // groups whose queries are resident

  static constexpr int kPipes = 3;
  static constexpr int kThreads = kPipes * 128 + 128;                        // consumers, then the producers
  static constexpr int kConsumerRegisters = 160;                             // 3 * 160 + 32 = 4 * 128
  static constexpr int kProducerRegisters = 32;

  static constexpr int kTileBytes = kTileTokens * kHeadDim;
  static constexpr int kMaxSharedBytes = 227 * 1024;                         // of a CTA
  static constexpr int kFixedBytes = kQuerySlots * (kUnits * kUnitColumns * kHeadDim + kNextN * kHeads * 4) + 2048;
  static constexpr int kStagesThatFit = (kMaxSharedBytes - kFixedBytes) / (kPipes * (kTileBytes + kTileTokens * 4));
  static constexpr int kStages = kStagesThatFit < 6 ? kStagesThatFit : 6;    // of a pipe
};

// What the consumers are told about a segment, the next run of tiles.
template <int kNextN>
struct SegmentInfo {
  int32_t first_row, first_tile, num_tiles;  // num_tiles 0: the end
  int32_t lens[kNextN];
};

// Each pipe has a ring of its own. In a common ring a stage's rounds would go to different consumers,
// and a phase bit tells a round only from the next: one that skips rounds can mistake an old for its own.
template <typename C>
struct SharedMemory {
  alignas(1024) uint8_t tile[C::kPipes][C::kStages][C::kTileBytes];
  alignas(1024) uint8_t query[C::kQuerySlots][C::kUnits * C::kUnitColumns * kHeadDim];
  alignas(16) float k_scale[C::kPipes][C::kStages][kTileTokens];
  alignas(16) float weights[C::kQuerySlots][C::kNextN * C::kHeads];
  SegmentInfo<C::kNextN> segment[C::kQuerySlots];
  hopper::Barrier tile_full[C::kPipes][C::kStages], tile_empty[C::kPipes][C::kStages];
  hopper::Barrier query_full[C::kQuerySlots], query_empty[C::kQuerySlots];
};

// Deals a CTA's tiles out to the pipes in turn, across segments.
template <int kPipes>
struct Turn {
  int pipe;
  int first = 0;  // the pipe that takes the next segment's first tile

  // Returns how many tiles of a segment precede this pipe's first one.
  __device__ __forceinline__ int32_t take(int32_t tiles_in_segment) {
    const int32_t skip = (pipe - first + kPipes) % kPipes;
    first = (first + tiles_in_segment) % kPipes;
    return skip;
  }
};

// ---------------------------------------------------------------------------------------------
// Producers
// ---------------------------------------------------------------------------------------------
template <typename C>
__device__ void produce_queries(const LogitsParams& p, const CUtensorMap& q_map, SharedMemory<C>& shared) {
  constexpr uint64_t kKeep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);  // used by several CTAs
  // Columns that exist both in the output and in the block table.
  const int32_t columns = min(static_cast<int64_t>(p.block_table_width) * p.page_size, int64_t{p.max_context_len});
  hopper::RingPosition<C::kQuerySlots> slot;
  Walk walk(reinterpret_cast<const PlanRow*>(p.plan)[blockIdx.x], p.groups);

  while (!walk.done()) {
    const int32_t first_row = walk.group * C::kNextN;
    const int32_t* lens = p.context_lens + first_row;
    const Segment segment = walk.next(tiles_of_length(longest_of_group(lens, C::kNextN)));
    if (segment.num_tiles == 0) continue;
    shared.query_empty[slot.stage].wait(slot.phase ^ 1);
    if (cute::elect_one_sync()) {
      SegmentInfo<C::kNextN>& info = shared.segment[slot.stage];
      info.first_row = first_row;
      info.first_tile = segment.first_tile;
      info.num_tiles = segment.num_tiles;
#pragma unroll
      for (int r = 0; r < C::kNextN; ++r) info.lens[r] = min(lens[r], columns);
      hopper::Barrier& full = shared.query_full[slot.stage];
      full.arrive_and_expect_tx(C::kNextN * (C::kQueryBytes + C::kHeads * 4));
      auto* barrier = reinterpret_cast<uint64_t*>(&full);
#pragma unroll
      for (int r = 0; r < C::kNextN; ++r) {
        cute::SM90_TMA_LOAD_2D::copy(&q_map, barrier, kKeep, shared.query[slot.stage] + r * C::kQueryBytes, 0,
                                     (first_row + r) * C::kHeads);
      }
      cute::SM90_BULK_COPY_G2S::copy(p.weights + static_cast<int64_t>(first_row) * C::kHeads, barrier,
                                     shared.weights[slot.stage], C::kNextN * C::kHeads * 4);
    }
    __syncwarp();
    slot.advance();
  }
  shared.query_empty[slot.stage].wait(slot.phase ^ 1);
  if (cute::elect_one_sync()) {
    shared.segment[slot.stage].num_tiles = 0;
    shared.query_full[slot.stage].arrive();
  }
}

// One warp: all threads fetch block-table entries, one issues the copies.
template <typename C>
__device__ void produce_tiles(const LogitsParams& p, const CUtensorMap& kv_map, SharedMemory<C>& shared, int pipe) {
  constexpr uint64_t kStream = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);  // read once
  const int lane = threadIdx.x % 32;
  const int pages_per_tile = kTileTokens / p.page_size;
  const int page_bytes = p.page_size * kHeadDim;

  hopper::RingPosition<C::kStages> stage;
  Turn<C::kPipes> turn{pipe};
  Walk walk(reinterpret_cast<const PlanRow*>(p.plan)[blockIdx.x], p.groups);

  while (!walk.done()) {
    const int32_t longest = longest_of_group(p.context_lens + walk.group * C::kNextN, C::kNextN);
    const int32_t* block_table = p.block_table + walk.group * p.block_table_stride;
    const Segment segment = walk.next(tiles_of_length(longest));
    // Pages that hold tokens of this group: nothing past them is named, so nothing past them is read.
    const int32_t num_pages = min(longest / p.page_size + (longest % p.page_size != 0), p.block_table_width);

    for (int32_t t = turn.take(segment.num_tiles); t < segment.num_tiles; t += 32 * C::kPipes) {
      // Lane i fetches the ids of the pipe's i-th tile from here on: a page of 64 tokens or two of 32.
      const bool mine = t + lane * C::kPipes < segment.num_tiles;
      const int32_t my_page = (segment.first_tile + t + lane * C::kPipes) * pages_per_tile;
      const int32_t my_pages = mine ? max(0, min(pages_per_tile, num_pages - my_page)) : 0;
      const int32_t my_first = my_pages > 0 ? block_table[my_page] : 0;
      const int32_t my_second = my_pages > 1 ? block_table[my_page + 1] : 0;
      const int32_t tiles_here = min(32, (segment.num_tiles - t + C::kPipes - 1) / C::kPipes);
#pragma unroll 1
      for (int i = 0; i < tiles_here; ++i) {
        const int32_t pages = __shfl_sync(~0u, my_pages, i);
        const int32_t first = __shfl_sync(~0u, my_first, i), second = __shfl_sync(~0u, my_second, i);
        shared.tile_empty[pipe][stage.stage].wait(stage.phase ^ 1);
        if (cute::elect_one_sync()) {
          hopper::Barrier& full = shared.tile_full[pipe][stage.stage];
          full.arrive_and_expect_tx(pages * p.page_size * (kHeadDim + 4));
          auto* barrier = reinterpret_cast<uint64_t*>(&full);
          uint8_t* keys = shared.tile[pipe][stage.stage];
          float* scales = shared.k_scale[pipe][stage.stage];
          const auto load_page = [&](int32_t id, uint8_t* page_keys, float* page_scales) {
            cute::SM90_TMA_LOAD_3D::copy(&kv_map, barrier, kStream, page_keys, 0, 0, id);
            cute::SM90_BULK_COPY_G2S::copy(p.kv_cache + id * p.page_stride + page_bytes, barrier, page_scales,
                                           p.page_size * 4);
          };
          if (pages > 0) load_page(first, keys, scales);
          if (pages > 1) load_page(second, keys + page_bytes, scales + p.page_size);
        }
        __syncwarp();
        stage.advance();
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Consumers: a warpgroup a pipe. Of every unit its thread (warp, i = lane / 4, c = lane % 4) holds
// tokens 16 warp + i and + 8 and columns 8j + 2c, 8j + 2c + 1 (hopper.cuh).
// ---------------------------------------------------------------------------------------------
template <typename C>
struct Consumer {
  struct Tile {
    hopper::Operand keys;
    hopper::Barrier* empty;
    float k_scale;  // of the token whose logits this thread stores
  };

  const LogitsParams& p;
  SharedMemory<C>& shared;
  const int pipe;
  const int lane = threadIdx.x % 32;  // of the warp
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
  // After the reduction lanes c = 0, 2 hold token i of the warp's sixteen and c = 1, 3 token i + 8.
  const int token = warp * 16 + lane / 4 + (lane & 1) * 8;

  hopper::RingPosition<C::kStages> stage;  // of the next tile
  float sums[2][32];                       // accumulators of two units
  float2 weights[C::kNextN][C::kWeights];
  const int32_t* lens;                     // of the group's rows, in shared memory
  float* logits;                           // of this thread's token of the tile being scored, first row

  __device__ Consumer(const LogitsParams& params, SharedMemory<C>& s, int pipe_) : p(params), shared(s), pipe(pipe_) {}

  __device__ __forceinline__ Tile load_tile() {
    shared.tile_full[pipe][stage.stage].wait(stage.phase);
    const Tile t{hopper::Operand(shared.tile[pipe][stage.stage]), &shared.tile_empty[pipe][stage.stage],
                 shared.k_scale[pipe][stage.stage][token]};
    stage.advance();
    return t;
  }

  // Starts one unit on the tensor cores: 64 tokens x 64 columns x 128.
  __device__ __forceinline__ void start(float (&d)[32], const Tile& t, hopper::Operand queries, int unit) {
    hopper::pin(d);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kHeadDim; k += 32) {
      hopper::wgmma_64x64x32(d, t.keys.at(k), queries.at(unit * C::kUnitColumns * kHeadDim + k), k > 0);
    }
    cute::warpgroup_commit_batch();
    hopper::pin(d);
  }

  // Reduces a unit over its heads and stores the logits of its rows. The order of additions depends
  // on nothing but the head count, so a row's bits don't depend on its batch.
  __device__ __forceinline__ void finish(float (&d)[32], const Tile& t, int unit, int32_t position) {
    hopper::pin(d);
#pragma unroll
    for (int r = 0; r < C::kRowsPerUnit; ++r) {
      const int row = unit * C::kRowsPerUnit + r;
      if (row >= C::kNextN) break;
      float low[2] = {0, 0}, high[2] = {0, 0};  // tokens i and i + 8, even and odd columns
#pragma unroll
      for (int j = 0; j < C::kWeights; ++j) {
        const float* sum = d + (r * C::kWeights + j) * 4;
        const float2 w = weights[row][j];
        low[0] = fmaf(w.x, fmaxf(sum[0], 0.f), low[0]);
        low[1] = fmaf(w.y, fmaxf(sum[1], 0.f), low[1]);
        high[0] = fmaf(w.x, fmaxf(sum[2], 0.f), high[0]);
        high[1] = fmaf(w.y, fmaxf(sum[3], 0.f), high[1]);
      }
      // Over the four threads that share the tokens; in the first step each keeps one token.
      const float a = low[0] + low[1], b = high[0] + high[1];
      float sum = (lane & 1 ? b : a) + __shfl_xor_sync(~0u, lane & 1 ? a : b, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if ((lane & 2) == 0 && position < lens[row]) logits[row * p.logits_stride] = sum * t.k_scale;
    }
  }

  // Scores tile `t`: starts each unit's successor, if need be the first unit of the tile after it,
  // before finishing the unit. kParity: which accumulators unit 0 is in. Returns the tile after.
  template <int kParity, bool kLast>
  __device__ __forceinline__ Tile score(Tile t, hopper::Operand queries, int32_t& position) {
    Tile following = t;
#pragma unroll
    for (int unit = 0; unit < C::kUnits; ++unit) {
      float(&current)[32] = sums[(kParity + unit) % 2];
      float(&next)[32] = sums[(kParity + unit + 1) % 2];
      if (unit + 1 < C::kUnits) {
        start(next, t, queries, unit + 1);
        cute::warpgroup_wait<1>();
      } else {
        if constexpr (kLast) {
          cute::warpgroup_wait<0>();
        } else {
          following = load_tile();
          start(next, following, queries, 0);
          cute::warpgroup_wait<1>();
        }
        __syncwarp();  // all lanes have their k_scale
        if (lane == 0) t.empty->arrive();
      }
      finish(current, t, unit, position);
    }
    position += C::kPipes * kTileTokens;
    logits += C::kPipes * kTileTokens;
    return following;
  }

  __device__ __forceinline__ void run() {
    constexpr int kFlip = C::kUnits % 2;  // an odd number of units swaps the accumulators from tile to tile
    hopper::RingPosition<C::kQuerySlots> queries;
    Turn<C::kPipes> turn{pipe};
    for (;; queries.advance()) {
      shared.query_full[queries.stage].wait(queries.phase);
      const SegmentInfo<C::kNextN>& info = shared.segment[queries.stage];
      const int32_t tiles_in_segment = info.num_tiles;
      if (tiles_in_segment == 0) return;
      const int32_t skip = turn.take(tiles_in_segment);
      int32_t left = (tiles_in_segment - skip + C::kPipes - 1) / C::kPipes;
      if (left > 0) {
        int32_t position = (info.first_tile + skip) * kTileTokens + token;
        const hopper::Operand operand(shared.query[queries.stage]);
        logits = p.logits + info.first_row * p.logits_stride + position;
        lens = info.lens;
#pragma unroll
        for (int r = 0; r < C::kNextN; ++r) {
#pragma unroll
          for (int j = 0; j < C::kWeights; ++j) {
            const float* column = &shared.weights[queries.stage][r * C::kHeads + 8 * j + 2 * (lane % 4)];
            weights[r][j] = *reinterpret_cast<const float2*>(column);
          }
        }
        Tile t = load_tile();
        start(sums[0], t, operand, 0);
        for (; left > 2; left -= 2) {
          t = score<0, false>(t, operand, position);
          t = score<kFlip, false>(t, operand, position);
        }
        if (left == 2) {
          t = score<0, false>(t, operand, position);
          score<kFlip, true>(t, operand, position);
        } else {
          score<0, true>(t, operand, position);
        }
      }
      __syncwarp();
      if (lane == 0) shared.query_empty[queries.stage].arrive();
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
paged_mqa_logits_kernel(const __grid_constant__ LogitsParams p, const __grid_constant__ CUtensorMap q_map,
                        const __grid_constant__ CUtensorMap kv_map, unsigned long long* launch_count) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<SharedMemory<C>*>(shared_bytes);

  if (threadIdx.x == 0) {
    for (int pipe = 0; pipe < C::kPipes; ++pipe) {
      for (int s = 0; s < C::kStages; ++s) {
        shared.tile_full[pipe][s].init(1);
        shared.tile_empty[pipe][s].init(4);  // warps of a consumer
      }
    }
    for (int s = 0; s < C::kQuerySlots; ++s) {
      shared.query_full[s].init(1);
      shared.query_empty[s].init(C::kPipes * 4);
    }
    cutlass::arch::fence_barrier_init();
    if (blockIdx.x == 0) atomicAdd(launch_count, 1ull);
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == C::kPipes) {
    cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    if (warp < C::kPipes) {
      produce_tiles<C>(p, kv_map, shared, warp);
    } else {
      produce_queries<C>(p, q_map, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    Consumer<C>(p, shared, warpgroup).run();
  }
}

}  // namespace mqa_sm90
