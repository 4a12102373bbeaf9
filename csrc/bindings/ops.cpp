// SPDX-License-Identifier: Apache-2.0
// The binding to PyTorch: device, stream, launch, registration. Stable ABI only, so that one binary serves
// PyTorch 2.11 and later.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "plan/plan.h"

// Lives in libtorch_cuda. Weak, so that the library loads, with its CPU ops, under a PyTorch without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace mqa_sm90 {
namespace {

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

void plan_cuda(const Tensor& context_lens, int64_t next_n, bool padded, int64_t k, const Tensor& out) {
  plan_on_device(check_uniform_plan(context_lens, next_n, padded, k, out), out);
}

void plan_cpu(const Tensor& context_lens, int64_t next_n, bool padded, int64_t k, const Tensor& out) {
  plan_here(check_uniform_plan(context_lens, next_n, padded, k, out), out);
}

void plan_ragged_cuda(const Tensor& context_lens, std::optional<Tensor> indices, std::optional<Tensor> query_start_loc,
                      int64_t max_rows, bool padded, int64_t k, const Tensor& out) {
  plan_on_device(check_ragged_plan(context_lens, indices, query_start_loc, max_rows, padded, k, out), out);
}

void plan_ragged_cpu(const Tensor& context_lens, std::optional<Tensor> indices, std::optional<Tensor> query_start_loc,
                     int64_t max_rows, bool padded, int64_t k, const Tensor& out) {
  plan_here(check_ragged_plan(context_lens, indices, query_start_loc, max_rows, padded, k, out), out);
}

const Group* table_of(const Tensor& plan, int32_t num_ctas) {
  return is_ragged(plan) ? group_table_of(data<int32_t>(plan), num_ctas) : nullptr;
}

// For callers who must know before the first launch; check_logits asks it of each.
void check_kv_cache(const Tensor& kv_cache) { require_kv_cache({"kv_cache", kv_cache}); }

void logits_cuda(const Tensor& q, const Tensor& kv_cache, const Tensor& weights, const Tensor& context_lens,
                 const Tensor& block_table, const Tensor& plan, int64_t max_context_len,
                 std::optional<int64_t> max_rows, int64_t k, bool clean_logits, const Tensor& out) {
  LogitsParams params =
      check_logits(q, kv_cache, weights, context_lens, block_table, plan, max_context_len, max_rows, k, out);
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

// CPU tensors pass the same checks as CUDA tensors, so that a misuse reads the same, and then cannot go on.
[[noreturn]] void refuse_cpu(const char* argument) {
  fail(argument, "device cpu", "tensors on a CUDA device (on the CPU use vllm_mqa_sm90.reference)");
}

void logits_cpu(const Tensor& q, const Tensor& kv_cache, const Tensor& weights, const Tensor& context_lens,
                const Tensor& block_table, const Tensor& plan, int64_t max_context_len,
                std::optional<int64_t> max_rows, int64_t k, bool, const Tensor& out) {
  check_logits(q, kv_cache, weights, context_lens, block_table, plan, max_context_len, max_rows, k, out);
  refuse_cpu("q");
}

void topk_indices_cuda(const Tensor& logits, const Tensor& context_lens, int64_t k, const Tensor& out) {
  SelectionParams params = check_selection(logits, context_lens, k, out);
  const int32_t device = out.get_device_index();
  require_sm90(device);
  if (params.rows == 0) return;
  params.logits = data<float>(logits);
  params.context_lens = data<int32_t>(context_lens);
  params.indices = data<int32_t>(out);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(launch_selection(params, current_stream(device)), "launch of the selection kernel");
}

void topk_indices_cpu(const Tensor& logits, const Tensor& context_lens, int64_t k, const Tensor& out) {
  check_selection(logits, context_lens, k, out);
  refuse_cpu("logits");
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
void walk(const Tensor& plan, const Tensor& context_lens, std::optional<int64_t> max_rows, int64_t k,
          const Tensor& out) {
  const Argument plan_argument{"plan", plan}, lens_argument{"context_lens", context_lens}, out_argument{"out", out};
  const bool ragged = is_ragged(plan);
  const StepRows step = ragged ? check_ragged_context_lens(lens_argument, max_rows.value_or(kMaxGroupRows))
                               : check_context_lens(lens_argument);
  check_plan(plan_argument, lens_argument, ragged);
  const int32_t kept = check_k(k, 0);
  require_same_device(out_argument, lens_argument);
  require_dtype(out_argument, ScalarType::Int);
  require_contiguous(out_argument);
  const auto& header = *data<PlanHeader>(plan);
  if (!header.fits(ragged, step.rows, step.max_rows, kept)) {
    fail("plan", "one for another", "a plan for ", step.rows, " rows in groups of ", ragged ? "at most " : "",
         step.max_rows, ", k ", kept);
  }

  const auto num_ctas = static_cast<int32_t>(ctas_of(plan, step.rows));
  const Groups groups{table_of(plan, num_ctas), step.rows, step.max_rows};
  const auto* shares = data<Share>(plan) + 1;
  std::vector<int32_t> visits;
  for (int32_t s = 0; s < share_entries(num_ctas) - 1; ++s) {
    for (Walk walk(shares[s]); !walk.done();) {
      const Group group = walk.group;
      const Segment segment = walk.next(tiles_of_group(step.context_lens, group, kept), groups.after(group));
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
  library.def("plan(Tensor context_lens, int next_n, bool padded, int k, Tensor(a!) out) -> ()");
  library.def(
      "plan_ragged(Tensor context_lens, Tensor? indices, Tensor? query_start_loc, int max_rows, bool padded, int k, "
      "Tensor(a!) out) -> ()");
  library.def(
      "paged_mqa_logits(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table, "
      "Tensor(a!) plan, int max_context_len, int? max_rows, int k, bool clean_logits, Tensor(b!) out) -> ()");
  library.def("check_kv_cache(Tensor kv_cache) -> ()");
  library.def("topk_indices(Tensor logits, Tensor context_lens, int k, Tensor(a!) out) -> ()");
  library.def("launch_counts(int device) -> int[]");
  library.def("walk(Tensor plan, Tensor context_lens, int? max_rows, int k, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_mqa_sm90, CUDA, library) {
  library.impl("row_lens", TORCH_BOX(&mqa_sm90::row_lens_cuda));
  library.impl("plan", TORCH_BOX(&mqa_sm90::plan_cuda));
  library.impl("plan_ragged", TORCH_BOX(&mqa_sm90::plan_ragged_cuda));
  library.impl("paged_mqa_logits", TORCH_BOX(&mqa_sm90::logits_cuda));
  library.impl("topk_indices", TORCH_BOX(&mqa_sm90::topk_indices_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_mqa_sm90, CPU, library) {
  library.impl("row_lens", TORCH_BOX(&mqa_sm90::row_lens_cpu));
  library.impl("plan", TORCH_BOX(&mqa_sm90::plan_cpu));
  library.impl("plan_ragged", TORCH_BOX(&mqa_sm90::plan_ragged_cpu));
  library.impl("paged_mqa_logits", TORCH_BOX(&mqa_sm90::logits_cpu));
  library.impl("topk_indices", TORCH_BOX(&mqa_sm90::topk_indices_cpu));
  library.impl("walk", TORCH_BOX(&mqa_sm90::walk));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_mqa_sm90, CompositeExplicitAutograd, library) {
  library.impl("launch_counts", TORCH_BOX(&mqa_sm90::launch_counts));
  library.impl("check_kv_cache", TORCH_BOX(&mqa_sm90::check_kv_cache));
}
