// SPDX-License-Identifier: Apache-2.0
// What all kernels and the bindings agree on: sizes, the plan's layout as the host sees it, and a step's rows. Plain
// pointers and numbers, nothing of PyTorch.
#pragma once

#include <cstdint>

namespace mqa_sm90 {

constexpr int kHeadDim = 128;      // bytes of one FP8 key or query head
constexpr int kScaleBytes = 4;     // one FP32 scale per cached token
constexpr int kTileTokens = 64;    // tokens scored per step of the kernel: one wgmma M
constexpr int kMaxGroupRows = 8;   // query rows that share a KV tile
constexpr int kMaxTopK = 2048;     // logits of a row that may be selected
constexpr int kSparesPerCta = 6;   // spare shares in the plan, at most, for each CTA

// A plan is a line of entries of four int32 (shared/schedule.cuh): header, shares and, if the step is ragged, its
// group table. The host, which cannot look into it, knows the kind of a plan by its columns, and by nothing
// else: one entry a row makes a uniform plan, two a ragged one. It chooses the kernel by that; the kernel
// checks that the header says the same.
constexpr int kEntryInts = 4;
constexpr int plan_columns(bool ragged) { return ragged ? 2 * kEntryInts : kEntryInts; }

// The header and the shares.
constexpr int64_t share_entries(int64_t num_ctas) { return 1 + num_ctas * (1 + kSparesPerCta); }

// The group table: an entry for each row of the step, and one that is empty, or two, as a plan has whole rows.
constexpr int64_t table_entries(int64_t num_ctas, int64_t rows) {
  return rows + 1 + (share_entries(num_ctas) + rows + 1) % 2;
}

// Rows of a plan.
constexpr int64_t plan_rows(int64_t num_ctas, bool ragged, int64_t rows) {
  return ragged ? (share_entries(num_ctas) + table_entries(num_ctas, rows)) / 2 : share_entries(num_ctas);
}

// A step's query rows, in request order, and what says which of them form groups.
struct StepRows {
  const int32_t* context_lens;  // [rows]
  int32_t rows;
  int32_t max_rows;             // of a group; a uniform step's groups all have so many
  bool ragged;
  bool padded;                  // launches may have more rows, which are padding
  int32_t k;                    // groups of rows with at most so many tokens need no logits
  // A ragged step that has rows has one of these.
  const int32_t* indices;          // [rows]: request of each
  const int32_t* query_start_loc;  // [requests + 1]: first row of each, and the last one's end
  int32_t requests;
};

// Lengths by request, from which those of its rows follow.
struct RequestLens {
  const int32_t* seq_lens;         // [requests]: tokens, those of its rows included
  const int32_t* query_start_loc;  // [requests + 1]: first row of each, and the last one's end
  int32_t requests;
};

}  // namespace mqa_sm90
