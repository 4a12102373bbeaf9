// SPDX-License-Identifier: Apache-2.0
// The logits kernel's sizes, and its shared memory, through which producers and consumers know of each other.
#pragma once

#include "shared/hopper.cuh"
#include "shared/schedule.cuh"

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

}  // namespace mqa_sm90
