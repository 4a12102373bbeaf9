# SPDX-License-Identifier: Apache-2.0
"""DeepSeek Sparse Attention's indexer on Hopper: paged MQA logits for up to eight query rows a group, and their top-k."""

from typing import TYPE_CHECKING, Any

from vllm_mqa_sm90.sizes import HEAD_DIM, HEADS, MAX_NEXT_N, MAX_TOPK, PAGE_SIZES

if TYPE_CHECKING:
    from vllm_mqa_sm90.ops import index_topk, launch_counts, paged_mqa_logits, plan, plan_shape, row_context_lens, topk_indices

_OPS = ("index_topk", "launch_counts", "paged_mqa_logits", "plan", "plan_shape", "row_context_lens", "topk_indices")

__all__ = ["HEADS", "HEAD_DIM", "MAX_NEXT_N", "MAX_TOPK", "PAGE_SIZES", *_OPS]


def __getattr__(name: str) -> Any:
    """The ops and `__version__`, when first asked for: PyTorch takes seconds to import, which not every command needs."""
    if name in _OPS:
        from vllm_mqa_sm90 import ops

        globals().update({each: getattr(ops, each) for each in _OPS})
        return globals()[name]
    if name == "__version__":
        from vllm_mqa_sm90 import machine

        return machine.version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OPS, "__version__"})
