// SPDX-License-Identifier: Apache-2.0
// What follows a tile's sums: relu, weights, the sum over heads, the scale, the store.
#pragma once

#include "logits/config.cuh"
#include "logits/logits.h"

namespace mqa_sm90 {

// A thread's place in its consumer warpgroup. Of a tile's sums thread (warp, i = lane / 4, c = lane % 4) holds tokens
// 16 warp + i and + 8, and of every 8 columns the two from 2c on (shared/hopper.cuh).
struct Place {
  const int first_row;                // of a group's, that is the consumer's
  const int lane = threadIdx.x % 32;  // of the warp
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
  // After the reduction even lanes hold token i of the warp's sixteen and odd lanes token i + 8.
  const int token = warp * 16 + lane / 4 + (lane & 1) * 8;
};

// Of one segment, for the consumer's first kRows rows. A tile's sums go through reduce(), which needs them; what that
// leaves goes through finish(), under the next tile's tensor-core work.
template <typename C, int kRows>
struct Epilogue {
  static constexpr int kColumns = hopper::wgmma_columns(C::kHeads * kRows);
  // Of rows: lanes c = 0, 1 store the first one's logits, lanes 2, 3 the second one's.
  static constexpr int kPairs = (kRows + 1) / 2;

  using Sums = float[kColumns / 2];  // q . k, as wgmma leaves them
  using Partial = float[kRows][2];   // of each row, for this thread's two tokens: its share of the sum over heads

  const Place& place;
  float2 weights[kRows][C::kWeights];
  float* logits[kPairs];  // where this thread stores next
  int32_t left[kPairs];   // tokens of that row from there on
  int32_t left_of_warp;   // likewise, of the longest of these rows and the warp's first token

  __device__ __forceinline__ explicit Epilogue(const Place& p) : place(p) {}

  // Where to store, up to where, and the weights of this thread's columns: of the segment in `slot`, from its `skip`-th
  // tile on.
  __device__ __forceinline__ void begin(const LogitsParams& p, const SharedMemory<C>& shared, int slot, int32_t skip) {
    const SegmentInfo<C::kGroupRows>& info = shared.segment[slot];
    const int first_row = place.first_row;
    const int32_t* lens = info.lens + first_row;
    const int32_t tile_position = (info.first_tile + skip) * kTileTokens, position = tile_position + place.token;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int row = 2 * pair + (place.lane >> 1 & 1);
      logits[pair] = p.logits + (info.first_row + first_row + row) * p.logits_stride + position;
      left[pair] = row < kRows ? lens[row] - position : 0;
    }
    left_of_warp = longest_of_rows(lens, kRows) - tile_position - place.warp * 16;
    const float* weights_of_rows = shared.weights[slot] + first_row * C::kHeads;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < C::kWeights; ++j) {
        weights[r][j] = *reinterpret_cast<const float2*>(weights_of_rows + r * C::kHeads + 8 * j + 2 * (place.lane % 4));
      }
    }
  }

  // Adds up this thread's share of each row's heads, for its two tokens. The order of additions depends on nothing but
  // the head count, here and in finish(), so a row's bits don't depend on its batch.
  __device__ __forceinline__ void reduce(const Sums& sums, Partial& partial) {
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

  // Whether any thread of the warp has a logit to store of the tile at hand.
  __device__ __forceinline__ bool warp_stores() const { return left_of_warp > 0; }

  // Adds up over the four threads that share the tokens, and stores the logits. In each step of two
  // lanes each gives away half of what it has and keeps the sums of the rest: tokens, then rows.
  __device__ __forceinline__ void finish(float k_scale, const Partial& partial) {
    const auto exchange = [this](float first, float second, int bit) {
      return (place.lane & bit ? second : first) + __shfl_xor_sync(~0u, place.lane & bit ? first : second, bit);
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

  // After each tile, whether finished or not.
  __device__ __forceinline__ void advance() { left_of_warp -= C::kPipes * kTileTokens; }
};

}  // namespace mqa_sm90
