// SPDX-License-Identifier: Apache-2.0
// Who computes what. The tiles of a step, in group order, are one line of `total` tiles; CTA c of
// n owns [c * total / n, (c + 1) * total / n). A contiguous share reads each group's block table
// and queries once, and no CTA has more than one tile more than another.
//
// The same code runs in the plan kernel, in the logits kernel and under a host compiler in tests.
#pragma once

#include <cstdint>

#include "params.h"

#ifdef __CUDACC__
#define MQA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MQA_HOST_DEVICE inline
#endif

namespace mqa_sm90 {

// One row of the plan, int32 [num_ctas, kPlanColumns]: where a CTA starts and how far it goes.
struct alignas(16) PlanRow {
  int32_t group;      // first group
  int32_t tile;       // first tile within that group
  int32_t num_tiles;  // tiles to compute, over as many groups as it takes
  int32_t unused;     // 0
};
static_assert(sizeof(PlanRow) == kPlanColumns * sizeof(int32_t));

// Tokens that the longest row of a group sees; its rows have the lengths lens[0 .. next_n).
MQA_HOST_DEVICE int32_t longest_of_group(const int32_t* lens, int32_t next_n) {
  int32_t longest = 0;
  for (int32_t row = 0; row < next_n; ++row) longest = lens[row] > longest ? lens[row] : longest;
  return longest;
}

MQA_HOST_DEVICE int32_t tiles_of_length(int32_t length) {
  return length / kTileTokens + (length % kTileTokens != 0);
}

// Of a group among others, whose rows follow one another in context_lens.
MQA_HOST_DEVICE int32_t tiles_of_group(const int32_t* context_lens, int32_t group, int32_t next_n) {
  return tiles_of_length(longest_of_group(context_lens + static_cast<int64_t>(group) * next_n, next_n));
}

// First tile, on the line of all tiles, of CTA `cta`.
MQA_HOST_DEVICE int64_t first_tile_of_cta(int32_t cta, int64_t total, int32_t num_ctas) {
  return cta * total / num_ctas;
}

// Moves row.group on to the group that tile `row.tile` of it lies in, and counts row.tile from there.
MQA_HOST_DEVICE void find_group(PlanRow& row, const int32_t* context_lens, int32_t next_n) {
  for (;; ++row.group) {
    const int32_t in_group = tiles_of_group(context_lens, row.group, next_n);
    if (row.tile < in_group) return;
    row.tile -= in_group;
  }
}

// A run of tiles of one group.
struct Segment {
  int32_t group;
  int32_t first_tile;
  int32_t num_tiles;
};

// Walks a CTA's share, group by group.
struct Walk {
  int32_t group, tile, remaining, groups;

  MQA_HOST_DEVICE Walk(const PlanRow& row, int32_t groups_in_step)
      : group(row.group), tile(row.tile), remaining(row.num_tiles), groups(groups_in_step) {}

  MQA_HOST_DEVICE bool done() const { return remaining == 0 || group >= groups; }

  // The share of the current group, which has `tiles_in_group` tiles; empty if that is none, or if
  // the plan was made for longer rows.
  MQA_HOST_DEVICE Segment next(int32_t tiles_in_group) {
    const int32_t left = tiles_in_group > tile ? tiles_in_group - tile : 0;
    const Segment segment{group, tile, left < remaining ? left : remaining};
    remaining -= segment.num_tiles;
    ++group;
    tile = 0;
    return segment;
  }
};

}  // namespace mqa_sm90
