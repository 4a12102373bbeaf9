# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernels for the indexer's top-k in decode steps, called as the installed vLLM calls them.

In vLLM 0.24 to 0.33 `sparse_attn_indexer` chooses by the number of rows: `cooperative_topk` up to a limit of the
release (32; where `indexer_topk` has another, that), else `persistent_topk`; `top_k_per_row_decode` is what it has for
other k than 512, 1024 and 2048. Which is the fastest depends on the step, so the benchmark tries all that take it.
"""

import contextlib
import importlib
import sys
from types import SimpleNamespace

import torch

COOPERATIVE, PERSISTENT, PER_ROW = "cooperative_topk", "persistent_topk", "top_k_per_row_decode"
SHORT = {COOPERATIVE: "cooperative", PERSISTENT: "persistent", PER_ROW: "per row"}

_WORKSPACE_BYTES = 1024 * 1024  # as vLLM gives them
_COOPERATIVE_ROWS = 32


class VllmTopK:
    """The kernels behind `ops`, which is `torch.ops._C` once vLLM has loaded its library."""

    def __init__(self, ops: object, device: torch.device, cooperative_rows: int = _COOPERATIVE_ROWS) -> None:
        self._ops = ops
        self._cooperative_rows = cooperative_rows
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def kernels(self, logits: torch.Tensor) -> list[str]:
        """Those that this vLLM has for such logits `[T, columns]`."""
        cooperative = len(logits) <= self._cooperative_rows and logits.stride(0) % 4 == 0
        fitting = (COOPERATIVE, PERSISTENT, PER_ROW) if cooperative else (PERSISTENT, PER_ROW)
        return [name for name in fitting if hasattr(self._ops, name)]

    def select(
        self, kernel: str, logits: torch.Tensor, context_lens: torch.Tensor, max_context_len: int, indices: torch.Tensor
    ) -> None:
        """Writes `indices` `[T, k]`: of each row of `logits` the k largest among the first `context_lens`, in any order.

        `indices` is -1 before: vLLM clears its buffer, so a kernel need not fill up rows with fewer.
        """
        rows, k = indices.shape
        lens = context_lens.view(-1, 1)  # a length for each row, as vLLM has them in every mode
        if kernel == PER_ROW:
            self._ops.top_k_per_row_decode(logits, 1, lens, indices, rows, *logits.stride(), k)
        else:
            getattr(self._ops, kernel)(logits, lens, indices, self._workspace, k, max_context_len)


def load(device: torch.device) -> VllmTopK:
    """Those of the installed vLLM; raises whatever keeps them from loading."""
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to stdout
        importlib.import_module("vllm._custom_ops")  # loads the library
        try:
            chooser = importlib.import_module("vllm.model_executor.layers.indexer_topk")
        except ModuleNotFoundError:  # before 0.30
            chooser = SimpleNamespace()
    found = VllmTopK(torch.ops._C, device, getattr(chooser, "AUTO_COOPERATIVE_MAX_ROWS", _COOPERATIVE_ROWS))
    if not found.kernels(torch.empty(1, 4)):
        raise RuntimeError(f"this vLLM has none of {', '.join(SHORT)}")
    return found


def is_topk(logits: torch.Tensor, context_lens: torch.Tensor, indices: torch.Tensor) -> bool:
    """Whether each row of `indices` has different ones within its length, with the k largest logits, and -1 for the rest.

    Of equal logits any will do, and any order: vLLM promises neither. NaN equals nothing.
    """
    k, columns = indices.shape[1], logits.shape[1]
    lens = context_lens.view(-1, 1).clamp(0, columns)
    beyond = torch.arange(columns, device=logits.device) >= lens
    best = logits.masked_fill(beyond, -torch.inf).topk(min(k, columns), dim=1).values
    chosen = indices.long().sort(dim=1, descending=True).values  # -1 last
    valid = torch.arange(k, device=logits.device) < lens
    in_range = torch.where(valid, (chosen >= 0) & (chosen < lens), chosen == -1).all()
    different = ((chosen[:, 1:] != chosen[:, :-1]) | ~valid[:, 1:]).all()
    values = logits.gather(1, chosen.clamp(0, columns - 1)).masked_fill(~valid, -torch.inf)
    same = torch.equal(values.sort(dim=1, descending=True).values[:, : best.shape[1]], best)
    return bool(in_range) and bool(different) and same
