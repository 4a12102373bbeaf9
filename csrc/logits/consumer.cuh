// SPDX-License-Identifier: Apache-2.0
// The logits kernel's consumers: a warpgroup for all or half of a group's rows.
#pragma once

#include "logits/epilogue.cuh"

namespace mqa_sm90 {

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
  const Place place;

  hopper::RingPosition<C::kStages> stage;  // of the next tile
  bool arrived = false;                    // it is known to have

  __device__ Consumer(const LogitsParams& params, SharedMemory<C>& s, int index)
      : p(params), shared(s), pipe(index / C::kConsumersPerPipe), place{index % C::kConsumersPerPipe * C::kRows} {}

  __device__ __forceinline__ void run() {
    hopper::RingPosition<C::kQuerySlots> slot;
    for (;; slot.advance()) {
      shared.query_full[slot.stage].wait(slot.phase);
      const SegmentInfo<C::kGroupRows>& info = shared.segment[slot.stage];
      if (info.num_tiles == 0) return;
      const int32_t skip = Turn<C::kPipes>{info.first_pipe}.skip(pipe);
      const int32_t tiles = (info.num_tiles - skip + C::kPipes - 1) / C::kPipes;
      // Without tiles as without live rows, in one chain of branches: with another around it the compiler takes the
      // descriptors out of uniform registers, and copies them back for each wgmma.
      score_for<C::kRows>(tiles > 0 ? live_rows(info) : 0, slot.stage, skip, tiles);
      hopper::arrive_as_warp(shared.query_empty[slot.stage]);
    }
  }

  // The first of this consumer's rows, as many as it takes to have all that see a segment's tiles.
  __device__ __forceinline__ int live_rows(const SegmentInfo<C::kGroupRows>& info) const {
    int live = 0;
#pragma unroll
    for (int r = 0; r < C::kRows; ++r) {
      if (info.lens[place.first_row + r] > info.first_tile * kTileTokens) live = r + 1;
    }
    return live;
  }

  // A segment's tiles, from its `skip`-th on, for its live rows, of which there are at most kMost.
  template <int kMost>
  __device__ __forceinline__ void score_for(int live, int slot, int32_t skip, int32_t tiles) {
    if constexpr (kMost == 0) {
      // The tensor cores are the other consumer's alone.
      for (; tiles > 0; --tiles) hopper::arrive_as_warp(*load_tile().empty);
    } else {
      constexpr int kLess = kMost - 1;
      if (live > kLess) {
        Scoring<kMost>(*this, slot).run(slot, skip, tiles);
      } else {
        score_for<kLess>(live, slot, skip, tiles);
      }
    }
  }

  __device__ __forceinline__ Tile load_tile() {
    if (!arrived) shared.tile_full[pipe][stage.stage].wait(stage.phase);
    arrived = false;
    const Tile t{hopper::Operand(shared.tile[pipe][stage.stage]), &shared.tile_empty[pipe][stage.stage],
                 shared.k_scale[pipe][stage.stage][place.token]};
    stage.advance();
    return t;
  }

  // Of one segment, for the consumer's first kRows rows: how the tiles are scored. A tile's tensor-core work and the
  // epilogue's arithmetic take turns.
  template <int kRows>
  struct Scoring {
    using Epilogue = mqa_sm90::Epilogue<C, kRows>;

    Consumer& consumer;
    const hopper::Operand queries;
    typename Epilogue::Sums sums;  // the accumulators
    Epilogue epilogue;

    __device__ __forceinline__ Scoring(Consumer& c, int slot)
        : consumer(c), queries(c.shared.query[slot] + c.place.first_row * C::kQueryBytes), epilogue(c.place) {}

    __device__ __forceinline__ void run(int slot, int32_t skip, int32_t tiles) {
      Tile t = consumer.load_tile();
      start(t);
      epilogue.begin(consumer.p, consumer.shared, slot, skip);
      typename Epilogue::Partial partial;
      for (;;) {
        // Asked while the tensor cores are busy: after the reduction they would wait for the answer.
        const auto& stage = consumer.stage;
        consumer.arrived = consumer.shared.tile_full[consumer.pipe][stage.stage].test_wait(stage.phase);
        await(t);
        epilogue.reduce(sums, partial);
        if (--tiles == 0) break;
        const float k_scale = t.k_scale;
        t = consumer.load_tile();
        start(t);
        // The branch keeps the compiler from mixing finish() into start(): the tensor cores come first.
        if (epilogue.warp_stores()) epilogue.finish(k_scale, partial);
        epilogue.advance();
      }
      epilogue.finish(t.k_scale, partial);
    }

    // Starts a tile on the tensor cores: 64 tokens x kColumns x 128.
    __device__ __forceinline__ void start(const Tile& t) {
      hopper::pin(sums);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kHeadDim; k += 32) {
        hopper::wgmma<Epilogue::kColumns>(sums, t.keys.at(k), queries.at(k), k > 0);
      }
      cute::warpgroup_commit_batch();
      hopper::pin(sums);
    }

    // Waits for the sums, and frees the tile's stage.
    __device__ __forceinline__ void await(const Tile& t) {
      cute::warpgroup_wait<0>();
      hopper::pin(sums);
      hopper::arrive_as_warp(*t.empty);
    }
  };
};

}  // namespace mqa_sm90
