# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernels for the indexer in decode steps, DeepGEMM's logits and top-k, as the installed vLLM calls them.

Of `vllm.utils.deep_gemm`, in vLLM 0.24 to 0.33:

- `get_paged_mqa_logits_metadata(context_lens, block_size, num_sms[, indices])`: the schedule. From 0.28 on it takes the
  slots that DeepGEMM wants at next_n 4 from `context_lens` itself.
- `fp8_fp4_paged_mqa_logits((q, None), kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len[,
  clean_logits][, indices])`: `clean_logits` up to 0.32. `indices` (each row's request) is for GPUs other than Hopper.
- `native_next_n_supported(next_n)`: from 0.28 on. Before, vLLM flattens what is not 1 or 2.

For the top-k `sparse_attn_indexer` chooses by the number of rows: `cooperative_topk` up to a limit of the release (32;
where `indexer_topk` has another, that), else `persistent_topk`; `top_k_per_row_decode` is what it has for other k than
512, 1024 and 2048. Which is the fastest depends on the step, so the benchmark tries all that take it.
"""

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch

from vllm_mqa_sm90 import reference
from vllm_mqa_sm90.bench.kernel.report import LeftOut
from vllm_mqa_sm90.bench.kernel.step import Step

COOPERATIVE, PERSISTENT, PER_ROW = "cooperative_topk", "persistent_topk", "top_k_per_row_decode"

_VENDORED = "vllm.third_party.deep_gemm"
_WORKSPACE_BYTES = 1024 * 1024  # as vLLM gives them
_COOPERATIVE_ROWS = 32


class DeepGemm:
    """DeepGEMM behind one vLLM's `vllm.utils.deep_gemm`, which is `api`; `versions` are those of both."""

    def __init__(self, api: ModuleType, num_sms: int, versions: dict[str, str]) -> None:
        self._api, self._num_sms, self.versions = api, num_sms, versions
        parameters = inspect.signature(api.fp8_fp4_paged_mqa_logits).parameters
        self._options = {"clean_logits": False} if "clean_logits" in parameters else {}

    def takes(self, next_n: int) -> bool:
        """Whether this vLLM passes `next_n` rows a request on; else it flattens them."""
        supported = getattr(self._api, "native_next_n_supported", lambda next_n: next_n in (1, 2))
        return supported(next_n)

    def logits(self, step: Step, *, flattened: bool) -> Callable[[int], torch.Tensor]:
        """A function from the number of a block table to the step's logits `[T, max_context_len]`.

        Flattened, each row is a request of its own, with a copy of its request's block table. The
        schedule and these copies are made here, once, as vLLM makes them once a step.
        """
        q, context_lens, block_tables = step.q, step.context_lens, step.block_tables
        if not flattened and step.max_rows is not None:
            raise LeftOut("vLLM flattens mixed steps")
        if not flattened and not self.takes(q.shape[1]):
            raise LeftOut(f"this vLLM flattens next_n {q.shape[1]}")
        if flattened:
            q = q.view(-1, 1, *q.shape[-2:])
            context_lens = context_lens.view(-1, 1)
            block_tables = [table.repeat_interleave(step.row_counts, dim=0) for table in block_tables]
        schedule = self._api.get_paged_mqa_logits_metadata(context_lens, step.kv_cache.shape[1], self._num_sms)

        def call(copy: int) -> torch.Tensor:
            inputs = (q, None), step.kv_cache, step.weights, context_lens, block_tables[copy], schedule
            return self._api.fp8_fp4_paged_mqa_logits(*inputs, max_model_len=step.max_context_len, **self._options)

        return call


def load_deep_gemm(num_sms: int) -> DeepGemm:
    """DeepGEMM of the installed vLLM; raises whatever keeps it from loading."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # stderr shows the progress
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to stdout
        api = importlib.import_module("vllm.utils.deep_gemm")
        try:
            api.get_num_sms()
        except Exception:
            importlib.import_module(_VENDORED)  # vLLM hides why this fails: here it raises
            raise
    versions = {"vllm": sys.modules["vllm"].__version__}
    if found := sys.modules.get("deep_gemm") or sys.modules.get(_VENDORED):  # vLLM prefers the former
        versions["deep_gemm"] = getattr(found, "__version__", "unknown")
    return DeepGemm(api, num_sms, versions)


class TopK:
    """The kernels behind `ops`, which is `torch.ops._C` once vLLM has loaded its library."""

    def __init__(self, ops: object, device: torch.device, cooperative_rows: int = _COOPERATIVE_ROWS) -> None:
        self._ops, self._cooperative_rows = ops, cooperative_rows
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def kernels(self, logits: torch.Tensor) -> list[str]:
        """Those that this vLLM has for such logits `[T, columns]`."""
        cooperative = len(logits) <= self._cooperative_rows and logits.stride(0) % 4 == 0
        fitting = (COOPERATIVE, PERSISTENT, PER_ROW) if cooperative else (PERSISTENT, PER_ROW)
        return [name for name in fitting if hasattr(self._ops, name)]

    def select(
        self, kernel: str, logits: torch.Tensor, context_lens: torch.Tensor, max_context_len: int, indices: torch.Tensor
    ) -> None:
        """Writes `indices` `[T, k]`: the k largest of each row's first `context_lens` of `logits`, in any order.

        `indices` is -1 before: vLLM clears its buffer, so a kernel need not fill up rows with fewer.
        """
        rows, k = indices.shape
        lens = context_lens.view(-1, 1)  # a length for each row, as vLLM has them in every mode
        if kernel == PER_ROW:
            self._ops.top_k_per_row_decode(logits, 1, lens, indices, rows, *logits.stride(), k)
        else:
            getattr(self._ops, kernel)(logits, lens, indices, self._workspace, k, max_context_len)


def load_topk(device: torch.device) -> TopK:
    """Those of the installed vLLM; raises whatever keeps them from loading."""
    limit = _COOPERATIVE_ROWS
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("vllm._custom_ops")  # loads the library
        with contextlib.suppress(ModuleNotFoundError):  # before 0.30
            chooser = importlib.import_module("vllm.model_executor.layers.indexer_topk")
            limit = getattr(chooser, "AUTO_COOPERATIVE_MAX_ROWS", limit)
    found = TopK(torch.ops._C, device, limit)
    if not found.kernels(torch.empty(1, 4)):
        raise RuntimeError(f"this vLLM has none of {COOPERATIVE}, {PERSISTENT}, {PER_ROW}")
    return found


def is_topk(logits: torch.Tensor, context_lens: torch.Tensor, indices: torch.Tensor) -> bool:
    """Whether each row of `indices` has those of the k largest logits in its length, once each, and -1 for the rest.

    Of equal logits any will do, and any order: vLLM promises neither. NaN equals nothing.
    """
    expected = reference.topk_indices(logits, context_lens, indices.shape[1])
    chosen = indices.sort(dim=1).values
    in_range = (chosen >= -1) & (chosen < context_lens.view(-1, 1))
    different = (chosen[:, 1:] != chosen[:, :-1]) | (chosen[:, 1:] < 0)

    def values(of: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, of.clamp(min=0).long()).masked_fill(of < 0, -torch.inf).sort(dim=1).values

    return bool(in_range.all() and different.all()) and torch.equal(values(chosen), values(expected))
