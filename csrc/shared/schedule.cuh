// SPDX-License-Identifier: Apache-2.0
// Who computes what. The tiles of a step, in group order, are one line. The plan cuts it into shares:
// first one for each CTA, all of the same length, then spare ones, for the CTAs that are done first. (SMs don't get equal
// parts of the memory's bandwidth, and another kernel may hold some.) A share is contiguous, so that it reads a group's
// block table and queries once.
//
// The same code runs in the plan kernel, in the logits kernel and under a host compiler in tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "shared/params.h"

#ifdef __CUDACC__
#define MQA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MQA_HOST_DEVICE inline
#endif

namespace mqa_sm90 {

// Rows that share keys: consecutive ones of a request.
struct alignas(16) Group {
  int32_t first_row, rows;
  int32_t request;  // row of the block table
  int32_t unused;   // 0
};

// A run of tiles, from one group on over as many as it takes.
struct alignas(16) Share {
  static constexpr int kRowsBits = 4;

  int32_t first_row;  // of the first group
  int32_t tile;       // first tile within that group
  int32_t num_tiles;
  uint32_t packed;    // the rest of that group: request and rows; so that nothing has to be looked up

  MQA_HOST_DEVICE static Share from(const Group& first, int32_t tile, int32_t num_tiles) {
    return {first.first_row, tile, num_tiles, static_cast<uint32_t>(first.request) << kRowsBits | first.rows};
  }

  MQA_HOST_DEVICE Group first_group() const {
    const auto rows = static_cast<int32_t>(packed & ((1u << kRowsBits) - 1));
    return {first_row, rows, static_cast<int32_t>(packed >> kRowsBits), 0};
  }
};
constexpr int64_t kMaxRequests = int64_t{1} << (32 - Share::kRowsBits);

// The plan's first entry. The shares follow, in a ragged plan then the group table: for each row the group that
// starts there, all 0 where none does.
struct alignas(16) PlanHeader {
  static constexpr uint32_t kVersion = 4;  // of the plan's layout; what was never planned has none
  // Bits of `kind`: rows of a group, these, k, the version.
  static constexpr uint32_t kRagged = 1 << 8, kPadded = 1 << 9, kEmpty = 1 << 10;
  static constexpr int kKBit = 12, kVersionBit = 24;
  static_assert(kMaxTopK < 1 << (kVersionBit - kKBit));

  uint32_t taken;   // spare shares that the running launch has handed out; 0 between launches
  int32_t spares;   // how many there are
  int32_t rows;     // of the step
  uint32_t kind;    // of the step and its groups

  MQA_HOST_DEVICE static uint32_t kind_of(bool ragged, int32_t max_rows, int32_t k) {
    return kVersion << kVersionBit | static_cast<uint32_t>(k) << kKBit | (ragged ? kRagged : 0) |
           static_cast<uint32_t>(max_rows);
  }

  MQA_HOST_DEVICE static PlanHeader of(const StepRows& step, int64_t tiles, int32_t spares) {
    const uint32_t more = (step.padded ? kPadded : 0) | (tiles == 0 ? kEmpty : 0);
    return {0, spares, step.rows, kind_of(step.ragged, step.max_rows, step.k) | more};
  }

  // Whether the plan is for a launch with this k, of so many rows in groups of so many, of a ragged step at most: a
  // ragged plan for narrower groups will do. A padded one may have fewer rows, and, where it leads to no tile, be for
  // any rows and groups, but not for another k: groups without tiles here may have some there.
  MQA_HOST_DEVICE bool fits(bool ragged, int32_t launch_rows, int32_t max_rows, int32_t k) const {
    if ((kind & kPadded) && (kind & kEmpty)) return kind >> kKBit == kind_of(false, 0, k) >> kKBit;  // version and k
    const uint32_t least = kind_of(ragged, ragged ? 1 : max_rows, k), most = kind_of(ragged, max_rows, k);
    const uint32_t own = kind & ~(kPadded | kEmpty);
    return own >= least && own <= most && (kind & kPadded ? rows <= launch_rows : rows == launch_rows);
  }
};
constexpr size_t kEntryBytes = kEntryInts * sizeof(int32_t);
static_assert(sizeof(Share) == kEntryBytes && sizeof(PlanHeader) == kEntryBytes && sizeof(Group) == kEntryBytes);

// Of a ragged plan.
MQA_HOST_DEVICE Group* group_table_of(int32_t* plan, int32_t num_ctas) {
  return reinterpret_cast<Group*>(plan) + share_entries(num_ctas);
}

// The groups of a step, in order.
struct Groups {
  const Group* table;  // nullptr: a uniform step
  int32_t rows;
  int32_t next_n;      // of a uniform step

  // Places that may hold a group: rows of a ragged step, groups of a uniform one.
  MQA_HOST_DEVICE int32_t places() const { return table != nullptr ? rows : rows / next_n; }

  MQA_HOST_DEVICE Group at(int32_t place) const {
    return table != nullptr ? table[place] : Group{place * next_n, next_n, place, 0};
  }

  // A group without rows at the end.
  MQA_HOST_DEVICE Group after(const Group& group) const {
    const int32_t row = group.first_row + group.rows;
    if (row >= rows) return {row, 0, 0, 0};
    return table != nullptr ? table[row] : Group{row, group.rows, group.request + 1, 0};
  }
};

// For the table: the group that starts at `row` of a step told by `indices`. `run_start` is the first of
// the rows around it with the same index.
MQA_HOST_DEVICE Group group_from_indices(const StepRows& step, int32_t row, int32_t run_start) {
  if ((row - run_start) % step.max_rows != 0) return {0, 0, 0, 0};
  const int32_t request = step.indices[row];
  int32_t end = row + 1;
  while (end < row + step.max_rows && end < step.rows && step.indices[end] == request) ++end;
  return {row, end - row, request, 0};
}

MQA_HOST_DEVICE bool starts_run(const int32_t* indices, int32_t row) {
  return row == 0 || indices[row] != indices[row - 1];
}

// Enters the groups of a request of a step told by `query_start_loc` into the table.
MQA_HOST_DEVICE void enter_request(const StepRows& step, int32_t request, Group* table) {
  const int32_t given = step.query_start_loc[request], given_end = step.query_start_loc[request + 1];
  const int32_t start = given > 0 ? given : 0, end = given_end < step.rows ? given_end : step.rows;
  for (int32_t row = start; row < end; row += step.max_rows) {
    const int32_t left = end - row;
    table[row] = {row, left < step.max_rows ? left : step.max_rows, request, 0};
  }
}

// Writes the lengths of a request's rows, its last tokens: each sees the tokens up to its own.
MQA_HOST_DEVICE void enter_row_lens(const RequestLens& lens, int32_t request, int32_t* context_lens, int32_t rows) {
  const int32_t given = lens.query_start_loc[request], end = lens.query_start_loc[request + 1];
  for (int32_t row = given > 0 ? given : 0; row < end && row < rows; ++row) {
    const int64_t length = int64_t{lens.seq_lens[request]} - (end - row) + 1;
    context_lens[row] = static_cast<int32_t>(length > 0 ? length : 0);
  }
}

// Tokens that the longest of some rows sees.
MQA_HOST_DEVICE int32_t longest_of_rows(const int32_t* lens, int32_t rows) {
  int32_t longest = 0;
  for (int32_t row = 0; row < rows; ++row) longest = lens[row] > longest ? lens[row] : longest;
  return longest;
}

// Of a group whose longest row sees so many tokens: none where the k best of them are all of them.
MQA_HOST_DEVICE int32_t tiles_of_length(int32_t length, int32_t k) {
  return length <= k ? 0 : length / kTileTokens + (length % kTileTokens != 0);
}

MQA_HOST_DEVICE int32_t tiles_of_group(const int32_t* context_lens, const Group& group, int32_t k) {
  return tiles_of_length(longest_of_rows(context_lens + group.first_row, group.rows), k);
}

// a / b of numbers that are not negative, in 32 bits where these do: the GPU divides 64 in a hundred instructions.
MQA_HOST_DEVICE int64_t divide(int64_t a, int32_t b) {
  return a >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// A number of tiles in so many parts, as equal as can be.
struct Parts {
  int64_t each;  // at least
  int32_t rest, parts;

  MQA_HOST_DEVICE Parts(int64_t tiles, int32_t count)
      : each(divide(tiles, count)), rest(static_cast<int32_t>(tiles - each * count)), parts(count) {}

  // Where part `i` starts: i * tiles / parts.
  MQA_HOST_DEVICE int64_t start(int32_t i) const { return each * i + divide(int64_t{rest} * i, parts); }
};

// How a line of `total` tiles is cut: own shares for the CTAs, then spare ones, an eighth of the line. A CTA whose SM another
// kernel holds comes late, and does its own share alone: where that is long, so that a launch would take nearly twice its time,
// own shares have but an eighth, too, and before the short spare shares long ones have a half and middling ones a quarter.
// The later a share is handed out the shorter it is, so that all CTAs end together.
struct Cut {
  static constexpr int32_t kSpareTiles = 4;     // of a short share, at least
  static constexpr int32_t kTilesWorthIt = 16;  // of a CTA: with fewer there are no spare shares
  static constexpr int32_t kManyTiles = 128;    // of a CTA: with fewer there are short ones alone, as each share takes time

  int32_t short_shares, long_shares;  // and as many middling ones
  int64_t eighth;                     // of the line; 0: there are no spare shares
  int64_t own_tiles;
  Parts own, long_ones, middling, short_ones;

  MQA_HOST_DEVICE Cut(int64_t total, int32_t ctas)
      : short_shares(total < int64_t{kTilesWorthIt} * ctas ? 0 : least(total / 8 / kSpareTiles, (kSparesPerCta - 2) * ctas)),
        long_shares(total < int64_t{kManyTiles} * ctas ? 0 : ctas),
        eighth(short_shares > 0 ? total / 8 : 0),
        own_tiles(total - (long_shares > 0 ? 7 : 1) * eighth),
        own(own_tiles, ctas),
        long_ones(4 * eighth, ctas),
        middling(2 * eighth, ctas),
        short_ones(eighth, short_shares > 0 ? short_shares : 1) {}

  MQA_HOST_DEVICE int32_t spares() const { return 2 * long_shares + short_shares; }
  MQA_HOST_DEVICE int32_t shares() const { return own.parts + spares(); }

  // Whether the shares' tiles can be told in 31 bits.
  MQA_HOST_DEVICE bool fits() const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    return own.each < kMost && (long_shares == 0 || long_ones.each < kMost);
  }

  // First tile of a share, on the line; shares() gives its end.
  MQA_HOST_DEVICE int64_t start(int32_t share) const {
    if (share < own.parts) return own.start(share);
    share -= own.parts;
    if (long_shares == 0) return own_tiles + short_ones.start(share);
    if (share < long_shares) return own_tiles + long_ones.start(share);
    share -= long_shares;
    if (share < long_shares) return own_tiles + 4 * eighth + middling.start(share);
    return own_tiles + 6 * eighth + short_ones.start(share - long_shares);
  }

 private:
  MQA_HOST_DEVICE static int32_t least(int64_t a, int32_t b) { return a < b ? static_cast<int32_t>(a) : b; }
};

// Moves `place` on to the group that tile `tile` from its start on lies in, and counts `tile` from there.
MQA_HOST_DEVICE void find_group(const Groups& groups, const int32_t* context_lens, int32_t k, int32_t& place,
                                int64_t& tile) {
  for (;; ++place) {
    const int32_t in_group = tiles_of_group(context_lens, groups.at(place), k);
    if (tile < in_group) return;
    tile -= in_group;
  }
}

// A run of tiles of one group.
struct Segment {
  int32_t first_tile;
  int32_t num_tiles;
};

// Walks a share, group by group.
struct Walk {
  Group group;
  int32_t tile, remaining;

  MQA_HOST_DEVICE explicit Walk(const Share& share)
      : group(share.first_group()), tile(share.tile), remaining(share.num_tiles) {}

  MQA_HOST_DEVICE bool done() const { return remaining == 0 || group.rows == 0; }

  // The part in the current group, which has `tiles_in_group` tiles; empty if that is none, or if
  // the plan was made for longer rows. Goes on to `following`.
  MQA_HOST_DEVICE Segment next(int32_t tiles_in_group, const Group& following) {
    const int32_t left = tiles_in_group > tile ? tiles_in_group - tile : 0;
    const Segment segment{tile, left < remaining ? left : remaining};
    remaining -= segment.num_tiles;
    group = following;
    tile = 0;
    return segment;
  }
};

}  // namespace mqa_sm90
