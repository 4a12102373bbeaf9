// SPDX-License-Identifier: Apache-2.0
// The logits kernel's producer warps: one for each pipe, which fetches its tiles, and one more for queries and shares.
#pragma once

#include "logits/config.cuh"
#include "logits/logits.h"

namespace mqa_sm90 {

// What producers read ahead. Each lane holds a part, and nothing waits before the parts are put together: what
// all lanes load alike the compiler takes to uniform registers, and waits for it at once.

// Lengths of a group's rows: lane r has row r's.
struct Lengths {
  int32_t of_lane;

  __device__ __forceinline__ void load(const LogitsParams& p, const Group& group) {
    const int32_t row = threadIdx.x % 32;
    of_lane = row < group.rows ? p.context_lens[group.first_row + row] : 0;
  }
  __device__ __forceinline__ int32_t of_row(int row) const { return __shfl_sync(~0u, of_lane, row); }
  __device__ __forceinline__ int32_t longest() const { return __reduce_max_sync(~0u, max(of_lane, 0)); }
};

__device__ __forceinline__ Groups groups_of(const LogitsParams& p) { return {p.group_table, p.rows, p.max_rows}; }

// The group after another: of a ragged step's table entry, lane i has number i % 4.
struct NextGroup {
  int32_t of_lane;

  __device__ __forceinline__ void load(const LogitsParams& p, const Group& group) {
    const int32_t row = group.first_row + group.rows;
    of_lane = 0;
    if (p.group_table != nullptr && row < p.rows) {
      of_lane = reinterpret_cast<const int32_t*>(p.group_table + row)[threadIdx.x % 4];
    }
  }
  __device__ __forceinline__ Group get(const LogitsParams& p, const Group& group) const {
    if (p.group_table == nullptr) return groups_of(p).after(group);
    return {__shfl_sync(~0u, of_lane, 0), __shfl_sync(~0u, of_lane, 1), __shfl_sync(~0u, of_lane, 2),
            __shfl_sync(~0u, of_lane, 3)};
  }
};

constexpr int32_t kNoShare = -1;  // num_tiles, where there is no further share

// Takes a spare share for the CTA, once the tiles of the one before are all on their way. One warp.
// Every CTA fails once, so a launch counts to spares + num_ctas, and atomicInc wraps to 0 for the next.
template <typename C>
__device__ __forceinline__ Share take_spare(const LogitsParams& p, SharedMemory<C>& shared, int32_t spares,
                                            uint32_t& phase) {
  shared.share_empty.wait(phase);
  phase ^= 1;
  int32_t i = 0;
  if (spares > 0 && threadIdx.x % 32 == 0) {
    i = atomicInc(&reinterpret_cast<PlanHeader*>(p.plan)->taken, spares + p.num_ctas - 1);
  }
  i = __shfl_sync(~0u, i, 0);
  const auto* spare_shares = reinterpret_cast<const Share*>(p.plan) + 1 + p.num_ctas;
  const Share share = i < spares ? spare_shares[i] : Share{0, 0, kNoShare, 0};
  if (cute::elect_one_sync()) {
    shared.share = share;
    shared.share_full.arrive();
  }
  return share;
}

// What the others call meanwhile.
template <typename C>
__device__ __forceinline__ Share receive_spare(SharedMemory<C>& shared, uint32_t& phase) {
  hopper::arrive_as_warp(shared.share_empty);
  shared.share_full.wait(phase);
  phase ^= 1;
  return shared.share;
}

// The plan's header, read ahead too: lane i has its word i % 4.
struct HeaderWords {
  int32_t of_lane;

  __device__ __forceinline__ PlanHeader get() const {
    return {0, __shfl_sync(~0u, of_lane, 1), __shfl_sync(~0u, of_lane, 2),
            static_cast<uint32_t>(__shfl_sync(~0u, of_lane, 3))};
  }
};

template <typename C>
__device__ void produce_queries(const LogitsParams& p, const CUtensorMap& q_map, SharedMemory<C>& shared, Share share) {
  constexpr uint64_t kKeep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);  // used by several CTAs
  // Columns that exist both in the output and in the block table.
  const int32_t columns = min(static_cast<int64_t>(p.block_table_width) * p.page_size, int64_t{p.max_context_len});
  const HeaderWords words{p.plan[threadIdx.x % kEntryInts]};
  hopper::RingPosition<C::kQuerySlots> slot;
  Turn<C::kPipes> turn;

  uint32_t phase = 0;
  do {
    Walk walk(share);
    Lengths ahead;
    NextGroup following;
    ahead.load(p, walk.group);
    following.load(p, walk.group);
    // Another step's plan, or none, leads anywhere: nothing is stored before the queries are there.
    if (!words.get().fits(p.group_table != nullptr, p.rows, p.max_rows, p.k)) __trap();

    while (!walk.done()) {
      const Lengths lens = ahead;
      const Group group = walk.group;
      const Segment segment = walk.next(tiles_of_length(lens.longest(), p.k), following.get(p, group));
      ahead.load(p, walk.group);
      following.load(p, walk.group);
      if (segment.num_tiles == 0) continue;
      int32_t lens_of_rows[C::kGroupRows];
#pragma unroll
      for (int r = 0; r < C::kGroupRows; ++r) lens_of_rows[r] = min(max(lens.of_row(r), 0), columns);
      shared.query_empty[slot.stage].wait(slot.phase ^ 1);
      if (cute::elect_one_sync()) {
        SegmentInfo<C::kGroupRows>& info = shared.segment[slot.stage];
        info.first_row = group.first_row;
        info.first_tile = segment.first_tile;
        info.num_tiles = segment.num_tiles;
        info.first_pipe = turn.first;
#pragma unroll
        for (int r = 0; r < C::kGroupRows; ++r) info.lens[r] = lens_of_rows[r];
        hopper::Barrier& full = shared.query_full[slot.stage];
        full.arrive_and_expect_tx(group.rows * (C::kQueryBytes + C::kHeads * 4));
        auto* barrier = reinterpret_cast<uint64_t*>(&full);
#pragma unroll
        for (int r = 0; r < C::kGroupRows; ++r) {
          if (r >= group.rows) break;
          cute::SM90_TMA_LOAD_2D::copy(&q_map, barrier, kKeep, shared.query[slot.stage] + r * C::kQueryBytes, 0,
                                       (group.first_row + r) * C::kHeads);
        }
        cute::SM90_BULK_COPY_G2S::copy(p.weights + static_cast<int64_t>(group.first_row) * C::kHeads, barrier,
                                       shared.weights[slot.stage], group.rows * C::kHeads * 4);
      }
      __syncwarp();
      turn.take(segment.num_tiles);
      slot.advance();
    }
    share = take_spare(p, shared, words.get().spares, phase);
  } while (share.num_tiles != kNoShare);
  shared.query_empty[slot.stage].wait(slot.phase ^ 1);
  if (cute::elect_one_sync()) {
    shared.segment[slot.stage].num_tiles = 0;
    shared.query_full[slot.stage].arrive();
  }
}

// One warp: all threads fetch block-table entries, one issues the copies.
template <typename C>
__device__ void produce_tiles(const LogitsParams& p, const CUtensorMap& kv_map, SharedMemory<C>& shared, Share share,
                              int pipe) {
  constexpr uint64_t kStream = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);  // read once
  const int lane = threadIdx.x % 32;
  const int pages_per_tile = kTileTokens / p.page_size;
  const int page_bytes = p.page_size * kHeadDim;
  const auto num_cache_pages = static_cast<uint32_t>(p.num_pages);

  hopper::RingPosition<C::kStages> stage;
  Turn<C::kPipes> turn;

  // Lane i's page ids, of the pipe's i-th tile from `tile` on: a page of 64 tokens or two of 32.
  struct PageIds { int32_t first, second; };
  const auto load_ids = [&](const Group& group, int32_t tile) {
    const int32_t* block_table = p.block_table + group.request * p.block_table_stride;
    const int32_t page = (tile + lane * C::kPipes) * pages_per_tile;
    // A request of padding rows may be any number.
    const bool exists = static_cast<uint32_t>(group.request) < static_cast<uint32_t>(p.requests);
    const int32_t pages = exists ? p.block_table_width - page : 0;
    return PageIds{pages > 0 ? block_table[page] : 0, pages > 1 && pages_per_tile > 1 ? block_table[page + 1] : 0};
  };

  for (uint32_t phase = 0; share.num_tiles != kNoShare; share = receive_spare(shared, phase)) {
    Walk walk(share);
    Lengths lens_ahead;
    NextGroup following;
    lens_ahead.load(p, walk.group);
    following.load(p, walk.group);
    PageIds ids_ahead = load_ids(walk.group, walk.tile + turn.skip(pipe));

    while (!walk.done()) {
      const Group group = walk.group;
      const int32_t longest = lens_ahead.longest();
      PageIds ids = ids_ahead;
      const Segment segment = walk.next(tiles_of_length(longest, p.k), following.get(p, group));
      int32_t t = turn.skip(pipe);
      turn.take(segment.num_tiles);
      lens_ahead.load(p, walk.group);
      ids_ahead = load_ids(walk.group, turn.skip(pipe));
      following.load(p, walk.group);
      // Pages that hold tokens of this group: nothing past them is named, so nothing past them is read.
      const int32_t num_pages = min(longest / p.page_size + (longest % p.page_size != 0), p.block_table_width);

      while (t < segment.num_tiles) {
        const int32_t tiles_here = min(32, (segment.num_tiles - t + C::kPipes - 1) / C::kPipes);
#pragma unroll 1
        for (int i = 0; i < tiles_here; ++i, t += C::kPipes) {
          const int32_t pages = min(pages_per_tile, num_pages - (segment.first_tile + t) * pages_per_tile);
          const int32_t first = __shfl_sync(~0u, ids.first, i), second = __shfl_sync(~0u, ids.second, i);
          shared.tile_empty[pipe][stage.stage].wait(stage.phase ^ 1);
          if (cute::elect_one_sync()) {
            hopper::Barrier& full = shared.tile_full[pipe][stage.stage];
            full.arrive_and_expect_tx(max(pages, 0) * p.page_size * (kHeadDim + kScaleBytes));
            auto* barrier = reinterpret_cast<uint64_t*>(&full);
            uint8_t* keys = shared.tile[pipe][stage.stage];
            float* scales = shared.k_scale[pipe][stage.stage];
            // An id that names no page reads zeros as keys, by the tensor map, and the scales of the first page.
            const auto load_page = [&](int32_t id, uint8_t* page_keys, float* page_scales) {
              cute::SM90_TMA_LOAD_3D::copy(&kv_map, barrier, kStream, page_keys, 0, 0, id);
              const int32_t page = static_cast<uint32_t>(id) < num_cache_pages ? id : 0;
              cute::SM90_BULK_COPY_G2S::copy(p.kv_cache + page * p.page_stride + page_bytes, barrier, page_scales,
                                             p.page_size * kScaleBytes);
            };
            if (pages > 0) load_page(first, keys, scales);
            if (pages > 1) load_page(second, keys + page_bytes, scales + p.page_size);
          }
          __syncwarp();
          stage.advance();
        }
        if (t < segment.num_tiles) ids = load_ids(group, segment.first_tile + t);
      }
    }
  }
}

}  // namespace mqa_sm90
