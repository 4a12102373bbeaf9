// SPDX-License-Identifier: Apache-2.0
// What a step's arguments must be: everything that does not need a GPU to be checked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "bindings/arguments.h"
#include "logits/logits.h"
#include "selection/selection.h"
#include "shared/schedule.cuh"

namespace mqa_sm90 {
namespace {

constexpr int kTokenBytes = kHeadDim + kScaleBytes;

void require_max_rows(int64_t max_rows) {
  require(max_rows >= 1 && max_rows <= kMaxGroupRows, "max_rows", max_rows, "1 to ", kMaxGroupRows, " rows of a group");
}

// 0, where allowed: no row is too short for a selection.
int32_t check_k(int64_t k, int64_t least) {
  require(k >= least && k <= kMaxTopK, "k", k, least, " to ", kMaxTopK);
  return static_cast<int32_t>(k);
}

// What context_lens says of a uniform step: [groups, next_n], or [rows] of next_n 1.
StepRows check_context_lens(const Argument& context_lens) {
  const Tensor& tensor = context_lens.tensor;
  require_dtype(context_lens, ScalarType::Int);
  require(tensor.dim() == 1 || tensor.dim() == 2, context_lens, shape_of, "shape [B, next_n], or [T] for next_n 1");
  const int64_t next_n = tensor.dim() == 2 ? tensor.size(1) : 1;
  require(next_n >= 1 && next_n <= kMaxGroupRows, context_lens, shape_of, "next_n (the second dimension) from 1 to ",
          kMaxGroupRows);
  require(tensor.numel() < kMaxRequests, context_lens, shape_of, "fewer than ", kMaxRequests, " rows");
  require_contiguous(context_lens);
  StepRows step{};
  step.context_lens = data<int32_t>(tensor);
  step.rows = static_cast<int32_t>(tensor.numel());
  step.max_rows = static_cast<int32_t>(next_n);
  return step;
}

// Of a ragged one: [rows].
StepRows check_ragged_context_lens(const Argument& context_lens, int64_t max_rows) {
  require_max_rows(max_rows);
  StepRows step = check_context_lens(context_lens);
  require(context_lens.tensor.dim() == 1, context_lens, shape_of, "shape [T], as the step is ragged");
  step.max_rows = static_cast<int32_t>(max_rows);
  step.ragged = true;
  return step;
}

// The one rule by which the host knows a plan's kind, see shared/params.h.
bool is_ragged(const Tensor& plan) { return plan.dim() == 2 && plan.size(1) == plan_columns(true); }

constexpr int64_t kSharesPerCta = share_entries(1) - 1;

// CTAs that a plan is for.
int64_t ctas_of(const Tensor& plan, int64_t rows) {
  const int64_t entries = plan.numel() / kEntryInts - (is_ragged(plan) ? rows + 1 : 0);
  return (entries - 1) / kSharesPerCta;
}

void check_plan(const Argument& plan, const Argument& context_lens, bool ragged) {
  const Tensor& tensor = plan.tensor;
  const int64_t rows = context_lens.tensor.numel(), columns = plan_columns(ragged);
  require_same_device(plan, context_lens);
  require_dtype(plan, ScalarType::Int);
  const int64_t ctas = tensor.dim() == 2 && tensor.size(1) == columns ? ctas_of(tensor, rows) : 0;
  if (ctas < 1 || ctas >= std::numeric_limits<int32_t>::max() / kSharesPerCta ||
      tensor.size(0) != plan_rows(ctas, ragged, rows)) {
    const std::string of_table = ragged ? " + " + std::to_string(rows) + ") // 2" : "";
    fail(plan.name, shape_of(tensor), "a ", ragged ? "ragged" : "uniform", " plan's shape: [", ragged ? "(3" : "1",
         " + ", kSharesPerCta, " n", of_table, ", ", columns, "] for n CTAs, at least one");
  }
  require_contiguous(plan);
  require_aligned(plan);
}

void require_kv_cache(const Argument& kv_cache) {
  const Tensor& tensor = kv_cache.tensor;
  require_dtype(kv_cache, ScalarType::Byte);
  require(tensor.dim() == 4 && tensor.size(0) >= 1 && tensor.size(2) == 1 && tensor.size(3) == kTokenBytes, kv_cache,
          shape_of, "shape [pages, page, 1, ", kTokenBytes, "] with at least one page");
  const int64_t page_size = tensor.size(1), page_stride = tensor.stride(0);
  require(page_size == 32 || page_size == 64, kv_cache, shape_of, "pages of 32 or 64 tokens (the second dimension)");
  require(tensor.stride(3) == 1 && tensor.stride(1) == kTokenBytes, kv_cache, strides_of,
          "pages dense inside: strides [any, ", kTokenBytes, ", any, 1]");
  require(page_stride >= page_size * kTokenBytes && page_stride % kAlignment == 0, kv_cache, strides_of,
          "a page stride (the first) that is a multiple of ", kAlignment, " bytes and at least ",
          page_size * kTokenBytes);
  require_aligned(kv_cache);
}

// Everything about a step's logits that does not need a GPU to be checked.
LogitsParams check_logits(const Tensor& q, const Tensor& kv_cache, const Tensor& weights, const Tensor& context_lens,
                          const Tensor& block_table, const Tensor& plan, int64_t max_context_len,
                          std::optional<int64_t> max_rows, int64_t k, const Tensor& out) {
  const Argument q_argument{"q", q}, kv_argument{"kv_cache", kv_cache}, weights_argument{"weights", weights},
      lens_argument{"context_lens", context_lens}, table_argument{"block_table", block_table},
      out_argument{"out", out};
  const bool ragged = is_ragged(plan);
  const StepRows step = ragged ? check_ragged_context_lens(lens_argument, max_rows.value_or(kMaxGroupRows))
                               : check_context_lens(lens_argument);
  const int64_t rows = step.rows, next_n = ragged ? 1 : step.max_rows, groups = rows / next_n;
  for (const Argument& argument : {q_argument, kv_argument, weights_argument, table_argument, out_argument}) {
    require_same_device(argument, lens_argument);
  }
  check_plan({"plan", plan}, lens_argument, ragged);
  require(ragged || !max_rows, "max_rows", max_rows.value_or(0), "None, as plan is that of a uniform step");

  require_dtype(q_argument, ScalarType::Float8_e4m3fn);
  require((q.dim() == 4 && q.size(0) == groups && q.size(1) == next_n) || (q.dim() == 3 && q.size(0) == rows),
          q_argument, shape_of, "shape [", groups, ", ", next_n, ", H, ", kHeadDim, "] or [", rows, ", H, ", kHeadDim,
          "], as context_lens of shape ", list_of(context_lens.sizes()), " says");
  const int64_t heads = q.size(-2);
  require(heads == 16 || heads == 32 || heads == 64, q_argument, shape_of,
          "16, 32 or 64 heads (the last dimension but one)");
  require(q.size(-1) == kHeadDim, q_argument, shape_of, "head dimension ", kHeadDim, " (the last dimension)");
  require_contiguous(q_argument);
  require_aligned(q_argument);

  require_kv_cache(kv_argument);

  require_dtype(weights_argument, ScalarType::Float);
  require(weights.dim() == 2 && weights.size(0) == rows && weights.size(1) == heads, weights_argument, shape_of,
          "shape [", rows, ", ", heads, "]");
  require_contiguous(weights_argument);
  require_aligned(weights_argument);

  require(max_context_len >= 0 && max_context_len <= std::numeric_limits<int32_t>::max(), "max_context_len",
          max_context_len, "0 to 2^31 - 1 tokens");

  require_dtype(table_argument, ScalarType::Int);
  const int64_t least_requests = ragged ? std::min<int64_t>(rows, 1) : groups;
  require(block_table.dim() == 2 && block_table.size(0) >= least_requests, table_argument, shape_of,
          "shape [R, pages] with R >= ", least_requests, ", a row for each request of ",
          ragged ? "the plan" : "context_lens");
  require(block_table.size(0) < kMaxRequests, table_argument, shape_of, "fewer than ", kMaxRequests, " rows");
  require(block_table.size(1) > 0 || max_context_len == 0 || groups == 0, table_argument, shape_of,
          "at least one column, as max_context_len is ", max_context_len);
  require(block_table.size(1) <= std::numeric_limits<int32_t>::max(), table_argument, shape_of,
          "fewer than 2^31 columns");
  require(block_table.size(1) <= 1 || block_table.stride(1) == 1, table_argument, strides_of, "a last stride of 1");

  require_rows(out_argument, ScalarType::Float, rows, max_context_len);

  LogitsParams params{};
  params.rows = step.rows;
  params.max_rows = step.max_rows;
  params.k = check_k(k, 0);
  params.requests = static_cast<int32_t>(block_table.size(0));
  params.heads = static_cast<int32_t>(heads);
  params.page_size = static_cast<int32_t>(kv_cache.size(1));
  params.num_pages = kv_cache.size(0);
  params.page_stride = kv_cache.stride(0);
  params.block_table_width = static_cast<int32_t>(block_table.size(1));
  params.block_table_stride = block_table.stride(0);
  params.max_context_len = static_cast<int32_t>(max_context_len);
  params.logits_stride = out.stride(0);
  params.num_ctas = static_cast<int32_t>(ctas_of(plan, step.rows));
  return params;
}

// Everything about a selection that does not need a GPU to be checked.
SelectionParams check_selection(const Tensor& logits, const Tensor& context_lens, int64_t k, const Tensor& out) {
  const Argument logits_argument{"logits", logits}, lens_argument{"context_lens", context_lens}, out_argument{"out", out};
  constexpr int64_t kFloats = kAlignment / sizeof(float);
  require_dtype(logits_argument, ScalarType::Float);
  require(logits.dim() == 2 && logits.size(0) < kMaxRequests && logits.size(1) <= kMaxColumns, logits_argument, shape_of,
          "shape [T, W], T fewer than ", kMaxRequests, ", W at most 2^24");
  const int64_t rows = logits.size(0);
  require(logits.size(1) <= 1 || logits.stride(1) == 1, logits_argument, strides_of, "a last stride of 1");
  require(rows <= 1 || logits.size(1) == 0 || (logits.stride(0) >= logits.size(1) && logits.stride(0) % kFloats == 0),
          logits_argument, strides_of, "rows that do not overlap, a multiple of ", kFloats, " columns apart");
  require_aligned(logits_argument);
  require_same_device(lens_argument, logits_argument);
  require_dtype(lens_argument, ScalarType::Int);
  require(context_lens.numel() == rows, lens_argument, shape_of, rows, " elements, a length for each row of logits");
  require_contiguous(lens_argument);
  const int32_t wanted = check_k(k, 1);
  require_same_device(out_argument, logits_argument);
  require_rows(out_argument, ScalarType::Int, rows, k);

  SelectionParams params{};
  params.rows = static_cast<int32_t>(rows);
  params.columns = static_cast<int32_t>(logits.size(1));
  params.k = wanted;
  params.logits_stride = logits.stride(0);
  params.indices_stride = out.stride(0);
  return params;
}

StepRows check_uniform_plan(const Tensor& context_lens, int64_t next_n, bool padded, int64_t k, const Tensor& out) {
  const Argument lens_argument{"context_lens", context_lens};
  StepRows step = check_context_lens(lens_argument);
  step.padded = padded;
  step.k = check_k(k, 0);
  require(next_n == step.max_rows, "next_n", next_n, step.max_rows, ", as context_lens says");
  check_plan({"out", out}, lens_argument, false);
  return step;
}

// Requests that a query_start_loc is for.
int32_t check_query_start_loc(const Argument& argument, const Argument& reference) {
  require_same_device(argument, reference);
  require_vector(argument);
  const int64_t requests = argument.tensor.size(0) - 1;
  require(requests >= 0 && requests < kMaxRequests, argument, shape_of, "shape [R + 1], R from 0 to ",
          kMaxRequests - 1);
  return static_cast<int32_t>(requests);
}

RequestLens check_row_lens(const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& out) {
  const Argument seq_argument{"seq_lens", seq_lens}, out_argument{"out", out};
  const int32_t requests = check_query_start_loc({"query_start_loc", query_start_loc}, out_argument);
  require_same_device(seq_argument, out_argument);
  require_vector(seq_argument);
  require(seq_lens.size(0) == requests, seq_argument, shape_of, "shape [", requests, "], as query_start_loc says");
  require_vector(out_argument);
  require(out.size(0) < kMaxRequests, out_argument, shape_of, "fewer than ", kMaxRequests, " rows");
  return {data<int32_t>(seq_lens), data<int32_t>(query_start_loc), requests};
}

StepRows check_ragged_plan(const Tensor& context_lens, const std::optional<Tensor>& indices,
                           const std::optional<Tensor>& query_start_loc, int64_t max_rows, bool padded, int64_t k,
                           const Tensor& out) {
  const Argument lens_argument{"context_lens", context_lens};
  StepRows step = check_ragged_context_lens(lens_argument, max_rows);
  step.padded = padded;
  step.k = check_k(k, 0);
  if (indices.has_value() == query_start_loc.has_value()) {
    fail("indices", indices ? "both" : "neither", "either indices or query_start_loc");
  }
  if (indices) {
    const Argument argument{"indices", *indices};
    require_same_device(argument, lens_argument);
    require_vector(argument);
    require(indices->size(0) == step.rows, argument, shape_of, "shape [", step.rows, "], as context_lens");
    step.indices = data<int32_t>(*indices);
  } else {
    step.requests = check_query_start_loc({"query_start_loc", *query_start_loc}, lens_argument);
    step.query_start_loc = data<int32_t>(*query_start_loc);
  }
  check_plan({"out", out}, lens_argument, true);
  return step;
}

}  // namespace
}  // namespace mqa_sm90
