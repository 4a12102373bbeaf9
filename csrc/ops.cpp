// SPDX-License-Identifier: Apache-2.0
// The binding to PyTorch: argument checks, device, stream, launch, registration. Stable ABI only,
// so that one binary serves PyTorch 2.11 and later.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "params.h"
#include "schedule.cuh"

// Lives in libtorch_cuda. Weak, so that the library loads, with its CPU ops, under a PyTorch without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace mqa_sm90 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTokenBytes = kHeadDim + kScaleBytes;
constexpr int kAlignment = 16;  // bytes, of every address that TMA or a vector access starts from

// A tensor under the name by which the caller knows it.
struct Argument {
  const char* name;
  const Tensor& tensor;
};

std::string list_of(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}

// A dtype as torch prints it, for those that a caller is likely to hold.
std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return toString(dtype);
  }
}

// What an error says was given.
std::string dtype_of(const Tensor& tensor) { return "dtype " + name_of(tensor.scalar_type()); }
std::string shape_of(const Tensor& tensor) { return "shape " + list_of(tensor.sizes()); }
std::string strides_of(const Tensor& tensor) {
  return "shape " + list_of(tensor.sizes()) + " with strides " + list_of(tensor.strides());
}
std::string address_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "address " << tensor.data_ptr();
  return text.str();
}
std::string device_of(const Tensor& tensor) {
  if (tensor.is_cuda()) return "device cuda:" + std::to_string(tensor.get_device_index());
  return tensor.is_cpu() ? "device cpu" : "a device that is neither cuda nor cpu";
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename... Expected>
[[noreturn]] void fail(const char* argument, const std::string& given, const Expected&... expected) {
  std::ostringstream text;
  text << "vllm_mqa_sm90: " << argument << ": expected ";
  (text << ... << expected);
  text << ", given " << given;
  throw std::runtime_error(text.str());
}

template <typename... Expected>
void require(bool holds, const Argument& argument, std::string (*given)(const Tensor&), const Expected&... expected) {
  if (!holds) fail(argument.name, given(argument.tensor), expected...);
}

template <typename... Expected>
void require(bool holds, const char* argument, int64_t given, const Expected&... expected) {
  if (!holds) fail(argument, std::to_string(given), expected...);
}

void require_dtype(const Argument& argument, ScalarType dtype) {
  require(argument.tensor.scalar_type() == dtype, argument, dtype_of, "dtype ", name_of(dtype));
}

void require_contiguous(const Argument& argument) {
  require(argument.tensor.is_contiguous(), argument, strides_of, "a contiguous tensor");
}

void require_aligned(const Argument& argument) {
  require(reinterpret_cast<uintptr_t>(argument.tensor.data_ptr()) % kAlignment == 0, argument, address_of,
          "an address that is a multiple of ", kAlignment, " bytes");
}

void require_same_device(const Argument& argument, const Argument& reference) {
  const Tensor &tensor = argument.tensor, &other = reference.tensor;
  require(tensor.is_cuda() == other.is_cuda() && tensor.is_cpu() == other.is_cpu() &&
              tensor.get_device_index() == other.get_device_index(),
          argument, device_of, device_of(other), ", as ", reference.name);
}

void require_vector(const Argument& argument) {
  require_dtype(argument, ScalarType::Int);
  require(argument.tensor.dim() == 1, argument, shape_of, "one dimension");
  require_contiguous(argument);
}

void require_max_rows(int64_t max_rows) {
  require(max_rows >= 1 && max_rows <= kMaxGroupRows, "max_rows", max_rows, "1 to ", kMaxGroupRows, " rows of a group");
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

// The one rule by which the host knows a plan's kind, see params.h.
bool is_ragged(const Tensor& plan) { return plan.dim() == 2 && plan.size(1) == plan_columns(true); }

constexpr int64_t kSharesPerCta = share_entries(1) - 1;

// CTAs that a plan is for.
int64_t ctas_of(const Tensor& plan, int64_t rows) {
  const int64_t entries = plan.numel() / kEntryInts - (is_ragged(plan) ? rows : 0);
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
    fail(plan.name, shape_of(tensor), "a ", ragged ? "ragged" : "uniform", " plan's shape: [", ragged ? "(2" : "1",
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
                          std::optional<int64_t> max_rows, const Tensor& out) {
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

  require_dtype(out_argument, ScalarType::Float);
  require(out.dim() == 2 && out.size(0) == rows && out.size(1) == max_context_len, out_argument, shape_of, "shape [",
          rows, ", ", max_context_len, "]");
  require(max_context_len <= 1 || out.stride(1) == 1, out_argument, strides_of, "a last stride of 1");
  require(rows <= 1 || out.stride(0) >= max_context_len, out_argument, strides_of, "rows that do not overlap");

  LogitsParams params{};
  params.rows = step.rows;
  params.max_rows = step.max_rows;
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

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("vllm_mqa_sm90: ") + what + ": " + cudaGetErrorString(status));
}

// The machine code is for compute capability 9.0 alone.
void require_sm90(int32_t device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  if (major == 9 && minor == 0) return;
  fail("device", "cuda:" + std::to_string(device) + " of " + std::to_string(major) + "." + std::to_string(minor),
       "a GPU of compute capability 9.0 (H100, H200, GH200)");
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

StepRows check_uniform_plan(const Tensor& context_lens, int64_t next_n, const Tensor& out) {
  const Argument lens_argument{"context_lens", context_lens};
  const StepRows step = check_context_lens(lens_argument);
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
                           const std::optional<Tensor>& query_start_loc, int64_t max_rows, const Tensor& out) {
  const Argument lens_argument{"context_lens", context_lens};
  StepRows step = check_ragged_context_lens(lens_argument, max_rows);
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

void row_lens_cuda(const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& out) {
  const RequestLens lens = check_row_lens(seq_lens, query_start_loc, out);
  const int32_t device = out.get_device_index();
  require_sm90(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(launch_row_lens(lens, data<int32_t>(out), static_cast<int32_t>(out.size(0)), current_stream(device)),
             "launch of the row lengths' kernel");
}

void row_lens_cpu(const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& out) {
  row_lens_on_host(check_row_lens(seq_lens, query_start_loc, out), data<int32_t>(out),
                   static_cast<int32_t>(out.size(0)));
}

void plan_on_device(const StepRows& step, const Tensor& out) {
  const int32_t device = out.get_device_index();
  require_sm90(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto num_ctas = static_cast<int32_t>(ctas_of(out, step.rows));
  check_cuda(launch_plan(step, data<int32_t>(out), num_ctas, current_stream(device)), "launch of the plan kernel");
}

void plan_here(const StepRows& step, const Tensor& out) {
  const auto num_ctas = static_cast<int32_t>(ctas_of(out, step.rows));
  if (plan_on_host(step, data<int32_t>(out), num_ctas)) return;
  fail("context_lens", "more for " + std::to_string(num_ctas) + " of them", "at most 2^31 tiles of ", kTileTokens,
       " tokens a CTA");
}

void plan_cuda(const Tensor& context_lens, int64_t next_n, const Tensor& out) {
  plan_on_device(check_uniform_plan(context_lens, next_n, out), out);
}

void plan_cpu(const Tensor& context_lens, int64_t next_n, const Tensor& out) {
  plan_here(check_uniform_plan(context_lens, next_n, out), out);
}

void plan_ragged_cuda(const Tensor& context_lens, std::optional<Tensor> indices, std::optional<Tensor> query_start_loc,
                      int64_t max_rows, const Tensor& out) {
  plan_on_device(check_ragged_plan(context_lens, indices, query_start_loc, max_rows, out), out);
}

void plan_ragged_cpu(const Tensor& context_lens, std::optional<Tensor> indices, std::optional<Tensor> query_start_loc,
                     int64_t max_rows, const Tensor& out) {
  plan_here(check_ragged_plan(context_lens, indices, query_start_loc, max_rows, out), out);
}

const Group* table_of(const Tensor& plan, int32_t num_ctas) {
  return is_ragged(plan) ? group_table_of(data<int32_t>(plan), num_ctas) : nullptr;
}

// For callers who must know before the first launch; check_logits asks it of each.
void check_kv_cache(const Tensor& kv_cache) { require_kv_cache({"kv_cache", kv_cache}); }

void logits_cuda(const Tensor& q, const Tensor& kv_cache, const Tensor& weights, const Tensor& context_lens,
                 const Tensor& block_table, const Tensor& plan, int64_t max_context_len,
                 std::optional<int64_t> max_rows, bool clean_logits, const Tensor& out) {
  LogitsParams params =
      check_logits(q, kv_cache, weights, context_lens, block_table, plan, max_context_len, max_rows, out);
  const int32_t device = q.get_device_index();
  require_sm90(device);
  if (params.rows == 0 || params.max_context_len == 0) return;
  params.q = q.data_ptr();
  params.kv_cache = data<uint8_t>(kv_cache);
  params.weights = data<float>(weights);
  params.context_lens = data<int32_t>(context_lens);
  params.block_table = data<int32_t>(block_table);
  params.plan = data<int32_t>(plan);
  params.group_table = table_of(plan, params.num_ctas);
  params.logits = data<float>(out);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  check_cuda(launch_logits(params, stream), "launch of the logits kernel");
  if (clean_logits) check_cuda(launch_clean(params, stream), "launch of the kernel that cleans logits");
}

// CPU tensors pass the same checks, so that a misuse reads the same, and then cannot go on.
void logits_cpu(const Tensor& q, const Tensor& kv_cache, const Tensor& weights, const Tensor& context_lens,
                const Tensor& block_table, const Tensor& plan, int64_t max_context_len,
                std::optional<int64_t> max_rows, bool, const Tensor& out) {
  check_logits(q, kv_cache, weights, context_lens, block_table, plan, max_context_len, max_rows, out);
  fail("q", "device cpu", "tensors on a CUDA device (on the CPU use vllm_mqa_sm90.reference)");
}

std::vector<int64_t> launch_counts(int64_t device) {
  require(device >= 0 && device <= std::numeric_limits<int32_t>::max(), "device", device, "the index of a CUDA device");
  require_sm90(static_cast<int32_t>(device));
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  unsigned long long counts[kMaxGroupRows + 1] = {};
  check_cuda(read_launch_counts(counts), "reading the launch counts");
  return {counts, counts + kMaxGroupRows + 1};
}

// The tiles that the kernel's walk over `plan` visits, as rows (share, the group's first row, its rows, its
// request, tile) of `out`, which has one row for each. The step is that of a launch.
void walk(const Tensor& plan, const Tensor& context_lens, std::optional<int64_t> max_rows, const Tensor& out) {
  const Argument plan_argument{"plan", plan}, lens_argument{"context_lens", context_lens}, out_argument{"out", out};
  const bool ragged = is_ragged(plan);
  const StepRows step = ragged ? check_ragged_context_lens(lens_argument, max_rows.value_or(kMaxGroupRows))
                               : check_context_lens(lens_argument);
  check_plan(plan_argument, lens_argument, ragged);
  require_same_device(out_argument, lens_argument);
  require_dtype(out_argument, ScalarType::Int);
  require_contiguous(out_argument);
  const auto& header = *data<PlanHeader>(plan);
  if (!header.fits(ragged, step.rows, step.max_rows)) {
    fail("plan", "one for another", "a plan for ", step.rows, " rows in groups of ", ragged ? "at most " : "",
         step.max_rows);
  }

  const auto num_ctas = static_cast<int32_t>(ctas_of(plan, step.rows));
  const Groups groups{table_of(plan, num_ctas), step.rows, step.max_rows};
  const auto* shares = data<Share>(plan) + 1;
  std::vector<int32_t> visits;
  for (int32_t s = 0; s < share_entries(num_ctas) - 1; ++s) {
    for (Walk walk(shares[s]); !walk.done();) {
      const Group group = walk.group;
      const Segment segment = walk.next(tiles_of_group(step.context_lens, group), groups.after(group));
      for (int32_t i = 0; i < segment.num_tiles; ++i) {
        visits.insert(visits.end(), {s, group.first_row, group.rows, group.request, segment.first_tile + i});
      }
    }
  }
  require(out.dim() == 2 && out.size(1) == 5 && out.numel() == static_cast<int64_t>(visits.size()), out_argument,
          shape_of, "shape [", visits.size() / 5, ", 5], a row for each tile that the plan visits");
  std::copy(visits.begin(), visits.end(), data<int32_t>(out));
}

}  // namespace
}  // namespace mqa_sm90

STABLE_TORCH_LIBRARY(vllm_mqa_sm90, library) {
  library.def("row_lens(Tensor seq_lens, Tensor query_start_loc, Tensor(a!) out) -> ()");
  library.def("plan(Tensor context_lens, int next_n, Tensor(a!) out) -> ()");
  library.def(
      "plan_ragged(Tensor context_lens, Tensor? indices, Tensor? query_start_loc, int max_rows, Tensor(a!) out) -> ()");
  library.def(
      "paged_mqa_logits(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table, "
      "Tensor(a!) plan, int max_context_len, int? max_rows, bool clean_logits, Tensor(b!) out) -> ()");
  library.def("check_kv_cache(Tensor kv_cache) -> ()");
  library.def("launch_counts(int device) -> int[]");
  library.def("walk(Tensor plan, Tensor context_lens, int? max_rows, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_mqa_sm90, CUDA, library) {
  library.impl("row_lens", TORCH_BOX(&mqa_sm90::row_lens_cuda));
  library.impl("plan", TORCH_BOX(&mqa_sm90::plan_cuda));
  library.impl("plan_ragged", TORCH_BOX(&mqa_sm90::plan_ragged_cuda));
  library.impl("paged_mqa_logits", TORCH_BOX(&mqa_sm90::logits_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_mqa_sm90, CPU, library) {
  library.impl("row_lens", TORCH_BOX(&mqa_sm90::row_lens_cpu));
  library.impl("plan", TORCH_BOX(&mqa_sm90::plan_cpu));
  library.impl("plan_ragged", TORCH_BOX(&mqa_sm90::plan_ragged_cpu));
  library.impl("paged_mqa_logits", TORCH_BOX(&mqa_sm90::logits_cpu));
  library.impl("walk", TORCH_BOX(&mqa_sm90::walk));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_mqa_sm90, CompositeExplicitAutograd, library) {
  library.impl("launch_counts", TORCH_BOX(&mqa_sm90::launch_counts));
  library.impl("check_kv_cache", TORCH_BOX(&mqa_sm90::check_kv_cache));
}
