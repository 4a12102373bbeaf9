// SPDX-License-Identifier: Apache-2.0
// Who computes what. The tiles of a step, in group order, are one line. The plan cuts it into shares:
// first one for each CTA, all of the same length, then spare ones, shorter, for the CTAs that are
// done first. (SMs don't get equal parts of the memory's bandwidth.) A share is contiguous, so that
// it reads a group's block table and queries once.
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

// A run of tiles, from one group on over as many as it takes.
struct alignas(16) Share {
  int32_t group;      // first group
  int32_t tile;       // first tile within that group
  int32_t num_tiles;
  int32_t unused;     // 0
};

// The plan, int32 [1 + num_ctas * (1 + kSparesPerCta), kPlanColumns]: this, then the shares.
struct alignas(16) PlanHeader {
  uint32_t taken;       // spare shares that the running launch has handed out; 0 between launches
  int32_t spares;       // how many there are
  int32_t unused[2];    // 0
};
static_assert(sizeof(Share) == kPlanColumns * sizeof(int32_t) && sizeof(PlanHeader) == sizeof(Share));

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

// How a line of `total` tiles is cut.
struct Cut {
  static constexpr int32_t kSparePart = 8;      // one tile in so many is in a spare share
  static constexpr int32_t kSpareTiles = 4;     // of a spare share, at least
  static constexpr int32_t kTilesWorthIt = 16;  // of a CTA: with fewer there are no spare shares

  int64_t total, own;  // `own`: tiles in the CTAs' own shares, which come first
  int32_t num_ctas, spares;

  MQA_HOST_DEVICE Cut(int64_t total_tiles, int32_t ctas) : total(total_tiles), num_ctas(ctas) {
    const int64_t spare_tiles = total >= int64_t{kTilesWorthIt} * ctas ? total / kSparePart : 0;
    const int64_t most = int64_t{kSparesPerCta} * ctas;
    spares = static_cast<int32_t>(spare_tiles / kSpareTiles < most ? spare_tiles / kSpareTiles : most);
    own = spares > 0 ? total - spare_tiles : total;
  }

  MQA_HOST_DEVICE int32_t shares() const { return num_ctas + spares; }

  // First tile of a share, on the line; shares() gives its end.
  MQA_HOST_DEVICE int64_t start(int32_t share) const {
    return share < num_ctas || spares == 0 ? share * own / num_ctas : own + (share - num_ctas) * (total - own) / spares;
  }
};

// Moves share.group on to the group that tile `share.tile` of it lies in, and counts share.tile from there.
MQA_HOST_DEVICE void find_group(Share& share, const int32_t* context_lens, int32_t next_n) {
  for (;; ++share.group) {
    const int32_t in_group = tiles_of_group(context_lens, share.group, next_n);
    if (share.tile < in_group) return;
    share.tile -= in_group;
  }
}

// A run of tiles of one group.
struct Segment {
  int32_t group;
  int32_t first_tile;
  int32_t num_tiles;
};

// Walks a share, group by group.
struct Walk {
  int32_t group, tile, remaining, groups;

  MQA_HOST_DEVICE Walk(const Share& share, int32_t groups_in_step)
      : group(share.group), tile(share.tile), remaining(share.num_tiles), groups(groups_in_step) {}

  MQA_HOST_DEVICE bool done() const { return remaining == 0 || group >= groups; }

  // The part in the current group, which has `tiles_in_group` tiles; empty if that is none, or if
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
