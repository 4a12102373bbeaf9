# SPDX-License-Identifier: Apache-2.0
"""Marks in vLLM's profile what happens around a decode step of the sparse indexer.

In vLLM 0.33 the kernels that pack, unpack and expand are all named "kernel", as are those of many others: which one ran
shows only where it was launched. Kernels of a CUDA graph are launched with it: there, what was captured counts.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from comparing_worker import brings_unequal

from vllm_mqa_sm90 import ops, seams

RAGGED, UNIFORM = "indexer: ragged metadata", "indexer: uniform metadata"
"""The metadata builder works on a step whose decoding requests bring unequal, or equal, numbers of query tokens."""
PACK, UNPACK, FLATTEN = "indexer: pack", "indexer: unpack", "indexer: flatten"
"""Query tokens are padded to equal numbers, the top k of the padding are left out, requests become one for each row."""
RAGGED_PLAN, RAGGED_LOGITS = "indexer: ragged plan", "indexer: ragged logits"
"""Our kernel plans for, and computes, rows that are not equally many a request."""
CAPTURED = "captured, "
"""Before the name of a mark that was made while a CUDA graph was captured."""

counts: Counter[str] = Counter()
"""How often each mark was made, profiled or not."""


def mark() -> None:
    """From now on. Once, and after the plugin is in place."""
    builder = seams.resolve(seams.BUILDER_OF_BACKEND)()
    builder.build = marking(builder.build, _metadata)
    stock_builder = seams.resolve(seams.STOCK_BUILDER)
    stock_builder._prepare_decode_tensors = marking(stock_builder._prepare_decode_tensors, _flattening)
    for name, what in ("pack_seq_triton", PACK), ("unpack_seq_triton", UNPACK):
        path = f"{seams.OP}:{name}"
        seams.replace({path: marking(seams.resolve(path), lambda *_, what=what, **__: what)})
    ops.plan = marking(ops.plan, _planning)
    ops.paged_mqa_logits = marking(ops.paged_mqa_logits, _logits)


def marking(stock: Callable[..., Any], what: Callable[..., str | None]) -> Callable[..., Any]:
    """`stock`, with a mark around each call for whose arguments `what` names one."""

    @functools.wraps(stock)
    def marked(*args: Any, **kwargs: Any) -> Any:
        name = what(*args, **kwargs)
        if name is None:
            return stock(*args, **kwargs)
        counts[name] += 1
        counts[CAPTURED + name] += torch.cuda.is_current_stream_capturing()
        with torch.profiler.record_function(name):
            return stock(*args, **kwargs)

    return marked


def _metadata(builder: Any, common_prefix_len: int, common_attn_metadata: Any, *_: Any, **__: Any) -> str:
    return RAGGED if brings_unequal(builder, common_attn_metadata) else UNIFORM


def _flattening(*_: Any, use_native: bool, **__: Any) -> str | None:
    return None if use_native else FLATTEN


def _planning(*_: Any, indices: Any = None, query_start_loc: Any = None, **__: Any) -> str | None:
    return None if indices is None and query_start_loc is None else RAGGED_PLAN


def _logits(
    q: Any, kv_cache: Any, weights: Any, context_lens: Any, block_table: Any, plan: Any, **_: Any
) -> str | None:
    return RAGGED_LOGITS if ops.is_ragged(plan) else None
