// SPDX-License-Identifier: Apache-2.0
// Paged MQA logits for Hopper:
//
//     logits[row, s] = k_scale[s] * sum_h weights[row, h] * relu(q[row, h, :] . k[s, :])
//
// for the query rows of a request ("group") against the request's paged FP8 keys, each key read
// from memory once. Persistent: a CTA walks its shares of the plan (schedule.cuh) and deals their
// 64-token tiles out to its pipes in turn. A pipe is a producer warp, a ring of shared-memory stages
// and a consumer warpgroup; for groups of more than four rows there is one pipe with two consumers,
// and each scores all its tiles for half of the rows. One more warp fetches the queries, for the
// group at hand and the next, and spare shares.
//
// The tile is wgmma's A operand (tokens along M), the queries of a consumer's rows are B: a tile is
// scored by four instructions. A consumer's tensor-core work and its arithmetic take turns; the other's fill in.
#pragma once

#include "hopper.cuh"
#include "schedule.cuh"

namespace mqa_sm90 {

template <int kHeads_, int kGroupRows_>
struct Config {
  static constexpr int kHeads = kHeads_;
  static constexpr int kGroupRows = kGroupRows_;                             // of the widest group
  static constexpr int kConsumersPerPipe = kGroupRows > 4 ? 2 : 1;           // which share a group's rows
  static constexpr int kRows = kGroupRows / kConsumersPerPipe;               // of a consumer
  static_assert(kRows * kConsumersPerPipe == kGroupRows);

  static constexpr int kColumns = hopper::wgmma_columns(kHeads * kRows);     // of which the first are used
  // As many as the consumers' sums and weights leave registers for.
  static constexpr int kPipes = kConsumersPerPipe > 1 ? 1 : kColumns <= 128 ? 3 : 2;
  static constexpr int kConsumers = kPipes * kConsumersPerPipe;
  static constexpr int kWeights = kHeads / 8;                                // float2 a thread and row
  static constexpr int kQueryBytes = kHeads * kHeadDim;                      // of one row
  static constexpr int kQuerySlots = 2;                                      // groups whose queries are resident
  static constexpr int kQuerySlotBytes = (kGroupRows - kRows) * kQueryBytes + kColumns * kHeadDim;

  static constexpr int kThreads = kConsumers * 128 + 128;                    // consumers, then the producers
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;     // 3 * 160 + 32 = 4 * 128
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;       // 2 * 232 + 40 = 3 * 168

  static constexpr int kTileBytes = kTileTokens * kHeadDim;
  static constexpr int kMaxSharedBytes = 227 * 1024;                         // of a CTA
  static constexpr int kFixedBytes = kQuerySlots * (kQuerySlotBytes + kGroupRows * kHeads * 4) + 2048;
  static constexpr int kStagesThatFit = (kMaxSharedBytes - kFixedBytes) / (kPipes * (kTileBytes + kTileTokens * 4));
  static constexpr int kStagesThatPay = 8 * kConsumersPerPipe;
  static constexpr int kStages = kStagesThatFit < kStagesThatPay ? kStagesThatFit : kStagesThatPay;  // of a pipe
};

// What the consumers are told about a segment, the next run of tiles.
template <int kGroupRows>
struct SegmentInfo {
  int32_t first_row, first_tile, num_tiles;  // num_tiles 0: the end
  int32_t first_pipe;                        // that takes the first tile; the others follow in turn
  int32_t lens[kGroupRows];                  // 0 past the group's rows
};

// Each pipe has a ring of its own. In a common ring a stage's rounds would go to different consumers,
// and a phase bit tells a round only from the next: one that skips rounds can mistake an old for its own.
template <typename C>
struct SharedMemory {
  alignas(1024) uint8_t tile[C::kPipes][C::kStages][C::kTileBytes];
  alignas(1024) uint8_t query[C::kQuerySlots][C::kQuerySlotBytes];
  alignas(16) float k_scale[C::kPipes][C::kStages][kTileTokens];
  alignas(16) float weights[C::kQuerySlots][C::kGroupRows * C::kHeads];
  SegmentInfo<C::kGroupRows> segment[C::kQuerySlots];
  Share share;  // after the CTA's own
  hopper::Barrier tile_full[C::kPipes][C::kStages], tile_empty[C::kPipes][C::kStages];
  hopper::Barrier query_full[C::kQuerySlots], query_empty[C::kQuerySlots];
  hopper::Barrier share_full, share_empty;
};

// Deals a CTA's tiles out to the pipes in turn, across segments.
template <int kPipes>
struct Turn {
  int first = 0;  // the pipe that takes the next segment's first tile

  // Tiles of the next segment that precede a pipe's first one.
  __device__ __forceinline__ int32_t skip(int pipe) const { return (pipe - first + kPipes) % kPipes; }

  __device__ __forceinline__ void take(int32_t tiles_in_segment) { first = (first + tiles_in_segment) % kPipes; }
};

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

// ---------------------------------------------------------------------------------------------
// Producers
// ---------------------------------------------------------------------------------------------
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
    if (!words.get().fits(p.group_table != nullptr, p.rows, p.max_rows)) __trap();

    while (!walk.done()) {
      const Lengths lens = ahead;
      const Group group = walk.group;
      const Segment segment = walk.next(tiles_of_length(lens.longest()), following.get(p, group));
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
      const Segment segment = walk.next(tiles_of_length(longest), following.get(p, group));
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

// ---------------------------------------------------------------------------------------------
// Consumers: a warpgroup for all or half of a group's rows. Of a tile's sums its thread (warp, i = lane / 4,
// c = lane % 4) holds tokens 16 warp + i and + 8, and of every 8 columns the two from 2c on (hopper.cuh).
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
  const int first_row;                // of a group's, that is this consumer's
  const int lane = threadIdx.x % 32;  // of the warp
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
  // After the reduction even lanes hold token i of the warp's sixteen and odd lanes token i + 8.
  const int token = warp * 16 + lane / 4 + (lane & 1) * 8;

  hopper::RingPosition<C::kStages> stage;  // of the next tile
  bool arrived = false;                    // it is known to have

  __device__ Consumer(const LogitsParams& params, SharedMemory<C>& s, int index)
      : p(params), shared(s), pipe(index / C::kConsumersPerPipe), first_row(index % C::kConsumersPerPipe * C::kRows) {}

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
      if (info.lens[first_row + r] > info.first_tile * kTileTokens) live = r + 1;
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
                 shared.k_scale[pipe][stage.stage][token]};
    stage.advance();
    return t;
  }

  // Of one segment, for the consumer's first kRows rows: how the tiles are scored.
  template <int kRows>
  struct Scoring {
    static constexpr int kColumns = hopper::wgmma_columns(C::kHeads * kRows);
    // Of rows: lanes c = 0, 1 store the first one's logits, lanes 2, 3 the second one's.
    static constexpr int kPairs = (kRows + 1) / 2;

    Consumer& consumer;
    const int lane = consumer.lane;
    const hopper::Operand queries;
    float sums[kColumns / 2];  // the accumulators: q . k
    float2 weights[kRows][C::kWeights];
    float* logits[kPairs];     // where this thread stores next
    int32_t left[kPairs];      // tokens of that row from there on
    int32_t left_of_warp;      // likewise, of the longest of these rows and the warp's first token

    __device__ __forceinline__ Scoring(Consumer& c, int slot)
        : consumer(c), queries(c.shared.query[slot] + c.first_row * C::kQueryBytes) {}

    __device__ __forceinline__ void run(int slot, int32_t skip, int32_t tiles) {
      Tile t = consumer.load_tile();
      start(t);
      prepare(slot, skip);
      float partial[kRows][2];
      for (;;) {
        // Asked while the tensor cores are busy: after the reduction they would wait for the answer.
        const auto& stage = consumer.stage;
        consumer.arrived = consumer.shared.tile_full[consumer.pipe][stage.stage].test_wait(stage.phase);
        reduce(t, partial);
        if (--tiles == 0) break;
        const float k_scale = t.k_scale;
        t = consumer.load_tile();
        start(t);
        // The branch keeps the compiler from mixing store() into start(): the tensor cores come first.
        if (left_of_warp > 0) store(k_scale, partial);
        left_of_warp -= C::kPipes * kTileTokens;
      }
      store(t.k_scale, partial);
    }

    // Where to store, up to where, and the weights of this thread's columns.
    __device__ __forceinline__ void prepare(int slot, int32_t skip) {
      const SegmentInfo<C::kGroupRows>& info = consumer.shared.segment[slot];
      const int first_row = consumer.first_row;
      const int32_t* lens = info.lens + first_row;
      const int32_t tile_position = (info.first_tile + skip) * kTileTokens, position = tile_position + consumer.token;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int row = 2 * pair + (lane >> 1 & 1);
        logits[pair] =
            consumer.p.logits + (info.first_row + first_row + row) * consumer.p.logits_stride + position;
        left[pair] = row < kRows ? lens[row] - position : 0;
      }
      left_of_warp = longest_of_rows(lens, kRows) - tile_position - consumer.warp * 16;
      const float* weights_of_rows = consumer.shared.weights[slot] + first_row * C::kHeads;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < C::kWeights; ++j) {
          weights[r][j] = *reinterpret_cast<const float2*>(weights_of_rows + r * C::kHeads + 8 * j + 2 * (lane % 4));
        }
      }
    }

    // Starts a tile on the tensor cores: 64 tokens x kColumns x 128.
    __device__ __forceinline__ void start(const Tile& t) {
      hopper::pin(sums);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kHeadDim; k += 32) hopper::wgmma<kColumns>(sums, t.keys.at(k), queries.at(k), k > 0);
      cute::warpgroup_commit_batch();
      hopper::pin(sums);
    }

    // Waits for the sums, frees the tile's stage and adds up this thread's share of each row's heads,
    // for its two tokens. The order of additions depends on nothing but the head count, here and in
    // store(), so a row's bits don't depend on its batch.
    __device__ __forceinline__ void reduce(const Tile& t, float (&partial)[kRows][2]) {
      cute::warpgroup_wait<0>();
      hopper::pin(sums);
      hopper::arrive_as_warp(*t.empty);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float low[2] = {0, 0}, high[2] = {0, 0};  // tokens i and i + 8, even and odd columns
#pragma unroll
        for (int j = 0; j < C::kWeights; ++j) {
          const float* sum = sums + (r * C::kWeights + j) * 4;
          const float2 w = weights[r][j];
          low[0] = fmaf(w.x, fmaxf(sum[0], 0.f), low[0]);
          low[1] = fmaf(w.y, fmaxf(sum[1], 0.f), low[1]);
          high[0] = fmaf(w.x, fmaxf(sum[2], 0.f), high[0]);
          high[1] = fmaf(w.y, fmaxf(sum[3], 0.f), high[1]);
        }
        partial[r][0] = low[0] + low[1];
        partial[r][1] = high[0] + high[1];
        hopper::pin(partial[r]);
      }
    }

    // Adds up over the four threads that share the tokens, and stores the logits. In each step of two
    // lanes each gives away half of what it has and keeps the sums of the rest: tokens, then rows.
    __device__ __forceinline__ void store(float k_scale, const float (&partial)[kRows][2]) {
      const auto exchange = [this](float first, float second, int bit) {
        return (lane & bit ? second : first) + __shfl_xor_sync(~0u, lane & bit ? first : second, bit);
      };
      float logit[2 * kPairs];
#pragma unroll
      for (int r = 0; r < 2 * kPairs; ++r) {
        logit[r] = r < kRows ? exchange(partial[r][0], partial[r][1], 1) : logit[r - 1];
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const float sum = exchange(logit[2 * pair], logit[2 * pair + 1], 2);
        if (left[pair] > 0) __stcs(logits[pair], sum * k_scale);  // streaming: the L2 gives them up first
        logits[pair] += C::kPipes * kTileTokens;
        left[pair] -= C::kPipes * kTileTokens;
      }
    }
  };
};

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
