# SPDX-License-Identifier: Apache-2.0
"""DeepGEMM's paged MQA logits, as the installed vLLM calls them: all that the benchmarks know of its logits.

The functions of `vllm.utils.deep_gemm`, in vLLM 0.24 to 0.33:

- `get_paged_mqa_logits_metadata(context_lens, block_size, num_sms[, indices])`: the schedule. From
  0.28 on it takes the slots that DeepGEMM wants at next_n 4 from `context_lens` itself.
- `fp8_fp4_paged_mqa_logits((q, None), kv_cache, weights, context_lens, block_tables,
  schedule_metadata, max_model_len[, clean_logits][, indices])`: `clean_logits` up to 0.32.
  `indices` (each row's request) is for GPUs other than Hopper.
- `native_next_n_supported(next_n)`: from 0.28 on. Before, vLLM flattens what is not 1 or 2.
"""

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch

from vllm_mqa_sm90.bench.kernel.report import LeftOut
from vllm_mqa_sm90.bench.kernel.step import Step

_VENDORED = "vllm.third_party.deep_gemm"


class DeepGemm:
    """DeepGEMM behind one vLLM's `vllm.utils.deep_gemm`, which is `api`."""

    def __init__(self, api: ModuleType, num_sms: int) -> None:
        self._api = api
        self._num_sms = num_sms
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
        if not flattened:
            if step.max_rows is not None:
                raise LeftOut("vLLM flattens mixed steps")
            if not self.takes(q.shape[1]):
                raise LeftOut(f"this vLLM flattens next_n {q.shape[1]}")
        else:
            q = q.view(-1, 1, *q.shape[-2:])
            context_lens = context_lens.view(-1, 1)
            block_tables = [table.repeat_interleave(step.row_counts, dim=0) for table in block_tables]
        page = step.kv_cache.shape[1]
        schedule = self._api.get_paged_mqa_logits_metadata(context_lens, page, self._num_sms)

        def call(copy: int) -> torch.Tensor:
            return self._api.fp8_fp4_paged_mqa_logits(
                (q, None),
                step.kv_cache,
                step.weights,
                context_lens,
                block_tables[copy],
                schedule,
                max_model_len=step.max_context_len,
                **self._options,
            )

        return call


def load(num_sms: int) -> tuple[DeepGemm, dict[str, str]]:
    """DeepGEMM of the installed vLLM, and the versions of both; raises whatever keeps it from loading."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # stderr shows the progress
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to stdout
        api = importlib.import_module("vllm.utils.deep_gemm")
        try:
            api.get_num_sms()
        except Exception:
            importlib.import_module(_VENDORED)  # vLLM hides why this fails: here it raises
            raise
    versions = {"vllm": sys.modules["vllm"].__version__}
    for name in ("deep_gemm", _VENDORED):  # vLLM prefers the former
        if name in sys.modules:
            versions["deep_gemm"] = getattr(sys.modules[name], "__version__", "unknown")
            break
    return DeepGemm(api, num_sms), versions
