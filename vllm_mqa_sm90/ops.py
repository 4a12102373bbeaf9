# SPDX-License-Identifier: Apache-2.0
"""The kernel's Python interface. Arguments are checked in csrc/ops.cpp, by every caller's path.

A step is B requests with `next_n` query rows each, T = B * next_n rows in request order. The rows
of one request are a group: they share its block table, and the kernel reads each key once for all
of them. `context_lens` says which rows form groups: `[B, next_n]`, or `[T]` for next_n 1.
"""

from pathlib import Path

import torch

HEAD_DIM = 128
"""Elements of one query head, and of the one key head: float8_e4m3fn, so also bytes."""
TOKEN_BYTES = HEAD_DIM + 4
"""A cached token: its key and its float32 scale."""
HEADS = (16, 32, 64)
"""Numbers of query heads that the kernel is compiled for."""
PAGE_SIZES = (32, 64)
"""Tokens per page of the KV cache."""
MAX_NEXT_N = 4
"""Most query rows of one request in one step."""

_PLAN_COLUMNS = 4  # kPlanColumns of csrc/params.h
_SPARES_PER_CTA = 4  # kSparesPerCta of csrc/params.h
_ROW_ALIGNMENT = 64  # columns: whole 256-byte blocks, so that rows of logits share no cache line

_LIBRARY = Path(__file__).with_name("_C.abi3.so")


_loaded = False


@torch.compiler.assume_constant_result
def _load() -> None:
    """Registers the ops, once; raises RuntimeError where the library was not built."""
    global _loaded  # not functools.cache, which torch.compile would trace past
    if _loaded:
        return
    if not _LIBRARY.is_file():
        raise RuntimeError(
            f"vllm_mqa_sm90: {_LIBRARY} does not exist, as the package was not built: "
            "`pip install .` builds it, `python csrc/build.py` in a source tree does so in place"
        )
    torch.ops.load_library(_LIBRARY)
    # Both ops only write into `out`: under tracing there is nothing to make.
    torch.library.register_fake("vllm_mqa_sm90::plan", lambda *_: None)
    torch.library.register_fake("vllm_mqa_sm90::paged_mqa_logits", lambda *_: None)
    _loaded = True


def plan_shape(num_sms: int) -> tuple[int, int]:
    """Shape of the plan for a kernel launched over `num_sms` SMs, each of which holds one CTA."""
    return 1 + num_sms * (1 + _SPARES_PER_CTA), _PLAN_COLUMNS


def plan(context_lens: torch.Tensor, *, num_sms: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Splits a step's tiles over CTAs; one plan serves every layer of the step.

    A tile is 64 tokens of one group; a group has ceil(max(lengths of its rows, 0) / 64) of them.
    The tiles, in group order, are cut into shares of consecutive ones: an equal one for each CTA,
    and, from 16 tiles a CTA on, the last eighth of the tiles in spare shares, for the CTAs that are
    done first. On a GPU this is one small launch on the current stream, with no host synchronisation; CUDA
    graphs may capture it. On CPU tensors the same code runs on the host.

    Args:
        context_lens: int32 `[B, next_n]`, or `[T]` for next_n 1; contiguous. Tokens each row may
            see; 0 or negative marks a padding row.
        num_sms: SMs to plan for; default: `out`'s, else all of the device's.
        out: int32 `plan_shape(num_sms)`, contiguous, on the same device: where to write the plan.

    Returns:
        `out`, or a new tensor like it. Row 0 is `{0, spare shares, 0, 0}`; the rows after it are
        the CTAs' shares, then the spare ones: `{first group, first tile in it, number of tiles, 0}`.

    Raises:
        ValueError: num_sms is missing (CPU tensors without `out`), not positive, or not that of `out`.
        RuntimeError: a wrong dtype, device, shape or stride, named.
    """
    _load()
    if num_sms is None and out is None:
        if not context_lens.is_cuda:
            raise ValueError(f"num_sms: expected a number, as context_lens is on {context_lens.device}, given None")
        num_sms = torch.cuda.get_device_properties(context_lens.device).multi_processor_count
    if num_sms is not None:
        if num_sms < 1:
            raise ValueError(f"num_sms: expected at least 1, given {num_sms}")
        if out is None:
            out = torch.empty(plan_shape(num_sms), dtype=torch.int32, device=context_lens.device)
        elif tuple(out.shape) != plan_shape(num_sms):
            raise ValueError(
                f"out: expected shape {plan_shape(num_sms)} for num_sms {num_sms}, given {tuple(out.shape)}"
            )
    next_n = context_lens.shape[1] if context_lens.dim() == 2 else 1
    torch.ops.vllm_mqa_sm90.plan(context_lens, next_n, out)
    return out


def paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    plan: torch.Tensor,
    *,
    max_context_len: int,
    clean_logits: bool = False,
    prefetch: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of the sparse-attention indexer against a paged FP8 cache.

    For row t of request b and the request's token s < context_lens[t]:

        out[t, s] = k_scale[s] * sum_h weights[t, h] * relu(q[t, h, :] . k[s, :])

    with products of FP8 values and sums in FP32. This is the index score of DeepSeek-V3.2
    (DeepSeek-AI, "DeepSeek-V3.2-Exp", equation 1) with the queries' scale folded into `weights`.
    A row's bits depend on its own query, weights, length and keys alone: not on the batch, on
    next_n, or on the plan's number of CTAs. Asynchronous on the current stream; CUDA graphs may
    capture it, and lengths, block table and plan may change between replays.

    All tensors are on one GPU of compute capability 9.0.

    Args:
        q: float8_e4m3fn `[B, next_n, H, 128]` or `[T, H, 128]`, contiguous; H is 16, 32 or 64.
        kv_cache: uint8 `[pages, page, 1, 132]`, page 32 or 64 tokens. A page's `page * 132` bytes
            are dense: first `page` keys of 128 float8_e4m3fn, then `page` float32 scales. Pages may
            lie any multiple of 16 bytes apart, on a 16-byte boundary.
        weights: float32 `[T, H]`, contiguous.
        context_lens: int32 `[B, next_n]`, or `[T]` for next_n 1; contiguous; next_n is 1 to 4.
            Tokens each row may see; 0 or negative marks a padding row. Tokens past
            `max_context_len` are left out; those past the block table have unspecified logits.
        block_table: int32 `[B or more, max_pages]`, last stride 1. Page of the request's tokens
            [i * page, (i + 1) * page) in column i. Entries past a context are never read from.
        plan: what `plan(context_lens)` returned for the same lengths. The kernel counts in it
            while it runs: launches that may overlap, on two streams, need a plan each.
        max_context_len: columns of the result.
        clean_logits: sets every column at and past its row's length to -inf; else those columns
            are unspecified.
        prefetch: the caller's word that the kernel before this one on the stream (and any that still
            runs beside that one) writes none of `plan`, `context_lens` and `block_table`. They are
            then read while it still runs (programmatic dependent launch). True in a model's layers;
            not right after `plan`.
        out: float32 `[T, max_context_len]`, last stride 1: where to write.

    Returns:
        `out`, or a new tensor like it, with rows a multiple of 64 columns apart. B = 0 is a no-op.

    Raises:
        RuntimeError: a wrong dtype, device, shape, stride, alignment, head count, page size or
            next_n, a block table with too few rows, a negative length limit, another GPU: named.
    """
    _load()
    if out is None:
        columns = max(max_context_len, 0)
        padded = -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        out = torch.empty((context_lens.numel(), padded), dtype=torch.float32, device=context_lens.device)[:, :columns]
    torch.ops.vllm_mqa_sm90.paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_table, plan, max_context_len, prefetch, out
    )
    if clean_logits:
        positions = torch.arange(max_context_len, device=out.device)
        out.masked_fill_(positions >= context_lens.view(-1, 1), float("-inf"))
    return out


def launch_counts(device: torch.device | str | int | None = None) -> dict[int, int]:
    """Launches of the logits kernel so far on one GPU, by next_n.

    Counted on the device, so that replays of a CUDA graph count too: the proof that steps ran
    here. Synchronises with the device.

    Args:
        device: the GPU; default: the current one.

    Raises:
        RuntimeError: no such GPU, or not of compute capability 9.0.
    """
    _load()
    index = device if isinstance(device, int) else None if device is None else torch.device(device).index
    counts = torch.ops.vllm_mqa_sm90.launch_counts(torch.cuda.current_device() if index is None else index)
    return dict(enumerate(counts[1:], start=1))
