# SPDX-License-Identifier: Apache-2.0
"""The kernel's Python interface. Arguments are checked in csrc/bindings/checks.h, by every caller's path.

A step is T query rows in request order. The rows of one request are a group: they share its row of
the block table, and the kernel reads each key once for all of them. In a uniform step each of B
requests brings `next_n` rows, and the shape of `context_lens` says so: `[B, next_n]`, or `[T]` for
next_n 1. In a ragged step `context_lens` is `[T]`, and `indices` or `query_start_loc`, on the
device, say which rows form groups; the plan then holds a table of them.
"""

from pathlib import Path

import torch

from vllm_mqa_sm90.sizes import (  # noqa: F401: others have some from here
    HEAD_DIM,
    HEADS,
    MAX_NEXT_N,
    MAX_TOPK,
    MAX_TOPK_COLUMNS,
    PAGE_SIZES,
    TOKEN_BYTES,
)

UNIFORM_PLAN_COLUMNS, RAGGED_PLAN_COLUMNS = 4, 8
"""What tells a uniform step's plan from a ragged one's on the host: `plan_columns` of csrc/shared/params.h."""

_SHARES_PER_CTA = 7  # one, and kSparesPerCta of csrc/shared/params.h
_ROW_ALIGNMENT = 64  # columns: whole 256-byte blocks, so that rows of logits share no cache line

_LIBRARY = Path(__file__).with_name("_C.abi3.so")


_loaded = False


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
    # The ops only write into `out`: under tracing there is nothing to make.
    for op in "row_lens", "plan", "plan_ragged", "paged_mqa_logits", "topk_indices":
        torch.library.register_fake(f"vllm_mqa_sm90::{op}", lambda *_: None)
    _loaded = True


# What torch.compiler.assume_constant_result does, but for importing torch._dynamo: seconds, before anything is compiled.
_load._dynamo_marked_constant = True


def plan_shape(num_sms: int, rows: int | None = None) -> tuple[int, int]:
    """Shape of the plan for a kernel launched over `num_sms` SMs, each of which holds one CTA.

    Args:
        num_sms: SMs to plan for.
        rows: T of a ragged step; None: the step is uniform.
    """
    entries = 1 + num_sms * _SHARES_PER_CTA
    if rows is None:
        return entries, UNIFORM_PLAN_COLUMNS
    return (entries + rows + 2) // 2, RAGGED_PLAN_COLUMNS


def is_ragged(plan: torch.Tensor) -> bool:
    """Whether a plan is that of a ragged step."""
    return plan.shape[1] == RAGGED_PLAN_COLUMNS


def check_tensors(*named: tuple[str, object], optional: bool = False) -> None:
    """TypeError for the first of (name, argument) that is no tensor; `optional`: nor None."""
    for name, given in named:
        if not isinstance(given, torch.Tensor) and not (optional and given is None):
            raise TypeError(f"vllm_mqa_sm90: {name}: expected a tensor, given {type(given).__name__}")


def check_ints(*named: tuple[str, object], optional: bool = False) -> None:
    """As `check_tensors`, for ints."""
    for name, given in named:
        if not isinstance(given, (int, torch.SymInt)) and not (optional and given is None):
            raise TypeError(f"vllm_mqa_sm90: {name}: expected an int, given {type(given).__name__}")


def check_kv_cache(kv_cache: torch.Tensor) -> None:
    """Whether `paged_mqa_logits` takes this cache, asked without a launch.

    Args:
        kv_cache: as there; on any device.

    Raises:
        TypeError: it is no tensor.
        RuntimeError: it does not: a wrong dtype, shape, stride or alignment, named.
    """
    check_tensors(("kv_cache", kv_cache))
    _load()
    torch.ops.vllm_mqa_sm90.check_kv_cache(kv_cache)


def row_context_lens(seq_lens: torch.Tensor, query_start_loc: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """The `context_lens` of a ragged step from its requests' lengths.

    The rows of a request are its last tokens, and each sees the tokens up to its own, none where a
    request is shorter than its rows. On a GPU this is
    one small launch on the current stream, with no host synchronisation, which CUDA graphs may capture.

    Args:
        seq_lens: int32 `[R]`, contiguous. Tokens of each request, those of its rows included.
        query_start_loc: int32 `[R + 1]`, contiguous: the rows of request r are those from
            `query_start_loc[r]` up to `query_start_loc[r + 1]`. Must not decrease.
        out: int32 `[T]`, contiguous, on the same device: where to write. Rows from
            `query_start_loc[R]` on are padding: 0.

    Returns:
        `out`.

    Raises:
        TypeError: an argument that is no tensor: named.
        RuntimeError: a wrong dtype, device, shape or stride: named.
    """
    check_tensors(("seq_lens", seq_lens), ("query_start_loc", query_start_loc), ("out", out))
    _load()
    torch.ops.vllm_mqa_sm90.row_lens(seq_lens, query_start_loc, out)
    return out


def plan(
    context_lens: torch.Tensor,
    *,
    indices: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    max_rows: int | None = None,
    padded: bool = False,
    k: int = 0,
    num_sms: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Splits a step's tiles over CTAs; one plan serves every layer of the step.

    A tile is 64 tokens of one group; a group has ceil(max(lengths of its rows, 0) / 64) of them.
    The tiles, in group order, are cut into shares of consecutive ones: an equal one for each CTA, and, from 16
    tiles a CTA on, an eighth of the tiles in spare shares, for the CTAs that are done first; from 128 on, where it
    matters that an SM may be held by another kernel, seven eighths, in ever shorter ones. On a GPU this is one small
    launch on the current stream, with no host synchronisation; CUDA graphs may capture it, and all values may
    change between replays, which rows form groups too. On CPU tensors the same code runs on the host.

    Args:
        context_lens: int32; contiguous. Tokens each row may see; 0 or negative, whatever the value,
            marks a padding row. Uniform step: `[B, next_n]`, next_n 1 to 8, or `[T]` for next_n 1.
            Ragged step: `[T]`.
        indices: int32 `[T]`, contiguous: makes the step ragged. Row of the block table that each
            row's request has; consecutive rows with the same one are a group.
        query_start_loc: int32 `[R + 1]`, contiguous: makes the step ragged, too. The rows of
            request r, and of block table row r, are those from `query_start_loc[r]` up to
            `query_start_loc[r + 1]`; there may be none. Rows from `query_start_loc[R]` on are
            padding, whatever their lengths. Must not decrease.
        max_rows: of a ragged step's groups, 1 to 8 (default). A request with more rows is cut into
            several groups, each of which reads the keys.
        padded: launches with this plan may have more rows than it, which are padding, as a CUDA graph
            has that was captured for more; with the shape that a plan of so many has. And where no group
            has tiles, launches of any kind with this k: they do nothing. Else the rows must be the same.
        k: for `index_topk`, 1 to 2048: groups whose rows all have at most k tokens have no tiles, as the k
            best of them are all. 0: all groups with tokens have tiles.
        num_sms: SMs to plan for; default: `out`'s, else all of the device's.
        out: int32 `plan_shape(num_sms)`, for a ragged step `plan_shape(num_sms, T)`; contiguous,
            on the same device: where to write the plan.

    Returns:
        `out`, or a new tensor like it. Its memory is a line of entries of four int32. The first says
        what the plan is: `{0, spare shares, T, 4 << 24 | k << 12 | no tile << 10 | padded << 9 | ragged << 8
        | rows of a group}`, of a uniform step's groups next_n, of a ragged one's `max_rows`. Then come the CTAs' shares,
        then the spare ones: `{first row of the first group, first tile in it, number of tiles, that group's rows + 16 *
        request}`. A ragged plan goes on with the group table, an entry for each row of the step: `{first
        row, rows, request, 0}` where a group starts, else zeros, and one or two entries of zeros.

    Raises:
        TypeError: an argument that is no tensor, or no int: named.
        ValueError: num_sms is missing (CPU tensors without `out`), not positive, or not that of `out`;
            `max_rows` is given for a uniform step.
        RuntimeError: a wrong dtype, device, shape, stride, `max_rows` or `k`, both `indices` and
            `query_start_loc`: named. 2^31 tiles or more a CTA: on the CPU; on a GPU the launch stops
            with an error.
    """
    check_tensors(("context_lens", context_lens))
    check_tensors(("indices", indices), ("query_start_loc", query_start_loc), ("out", out), optional=True)
    check_ints(("k", k))
    check_ints(("max_rows", max_rows), ("num_sms", num_sms), optional=True)
    _load()
    ragged = indices is not None or query_start_loc is not None
    if max_rows is not None and not ragged:
        raise ValueError(f"max_rows: expected None without indices and query_start_loc, given {max_rows}")
    if num_sms is None and out is None:
        if not context_lens.is_cuda:
            raise ValueError(f"num_sms: expected a number, as context_lens is on {context_lens.device}, given None")
        num_sms = torch.cuda.get_device_properties(context_lens.device).multi_processor_count
    if num_sms is not None:
        if num_sms < 1:
            raise ValueError(f"num_sms: expected at least 1, given {num_sms}")
        shape = plan_shape(num_sms, context_lens.numel() if ragged else None)
        if out is None:
            out = torch.empty(shape, dtype=torch.int32, device=context_lens.device)
        elif tuple(out.shape) != shape:
            raise ValueError(f"out: expected shape {shape} for num_sms {num_sms}, given {tuple(out.shape)}")
    if ragged:
        rows = MAX_NEXT_N if max_rows is None else max_rows
        torch.ops.vllm_mqa_sm90.plan_ragged(context_lens, indices, query_start_loc, rows, padded, k, out)
    else:
        next_n = context_lens.shape[1] if context_lens.dim() == 2 else 1
        torch.ops.vllm_mqa_sm90.plan(context_lens, next_n, padded, k, out)
    return out


def plan_anew(context_lens: torch.Tensor, plan: torch.Tensor, k: int) -> torch.Tensor:
    """`plan(context_lens, padded=True, k=k, out=plan)` for lengths `[B, next_n]`, without asking what the arguments are.

    For a caller that has made such a plan before: to ask takes a third of the call, and each step waits for it.
    """
    torch.ops.vllm_mqa_sm90.plan(context_lens, context_lens.shape[1], True, k, plan)
    return plan


def paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    plan: torch.Tensor,
    *,
    max_context_len: int,
    max_rows: int | None = None,
    k: int = 0,
    clean_logits: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of the sparse-attention indexer against a paged FP8 cache.

    For row t of request b and the request's token s < context_lens[t]:

        out[t, s] = k_scale[s] * sum_h weights[t, h] * relu(q[t, h, :] . k[s, :])

    with products of FP8 values and sums in FP32. relu of NaN is 0: a key with a NaN among its values has
    logit 0, and a query's head with one counts for nothing; scales and weights of NaN make NaN. Where
    all heads score 0 the logit is +0, given a positive scale. This is the index score of DeepSeek-V3.2
    (DeepSeek-AI, "DeepSeek-V3.2-Exp", equation 1) with the queries' scale folded into `weights`.
    A row's bits depend on its own query, weights, length and keys alone: not on the batch, on
    the rows that it shares a group with, or on the plan's number of CTAs. Asynchronous on the
    current stream; CUDA graphs may capture it, and lengths, block table and plan may change between
    replays. A ragged step is told by its plan.

    All tensors are on one GPU of compute capability 9.0.

    Args:
        q: float8_e4m3fn `[T, H, 128]`, or `[B, next_n, H, 128]`, contiguous; H is 16, 32 or 64.
        kv_cache: uint8 `[pages, page, 1, 132]`, page 32 or 64 tokens. A page's `page * 132` bytes
            are dense: first `page` keys of 128 float8_e4m3fn, then `page` float32 scales. Pages may
            lie any multiple of 16 bytes apart, on a 16-byte boundary.
        weights: float32 `[T, H]`, contiguous.
        context_lens: int32 `[B, next_n]`, or `[T]` for next_n 1 and for ragged steps; contiguous;
            next_n is 1 to 8. Tokens each row may see; 0 or negative, whatever the value, marks a padding
            row. Tokens past `max_context_len` are left out; those past the block table have unspecified
            logits.
        block_table: int32 `[R, max_pages]`, last stride 1; R is at least B, and more than any request
            of a ragged step with a row that is not padding. Page of the request's tokens
            [i * page, (i + 1) * page) in column i. Entries past a context are never read from. An id
            that is no page within a context reads as keys of zeros.
        plan: what `plan` returned for the same lengths, and `indices` or `query_start_loc`. The kernel
            counts in it while it runs: launches that may overlap, on two streams, need a plan each. A
            plan for another T, next_n, k or kind of step, or never made, stops the launch with an error, but for
            what `plan` says of `padded` ones.
        max_context_len: columns of the result.
        max_rows: for a ragged step, the plan's (default 8) or more: chooses the kernel, which works in
            vain where groups have fewer rows. A plan for wider groups stops the launch with an error.
        k: the plan's. The logits of groups whose rows all have at most k tokens are unspecified.
        clean_logits: sets every column at and past its row's length to -inf, and past the block table,
            and padding rows whole, by one more launch; else those columns are unspecified.
        out: float32 `[T, max_context_len]`, last stride 1: where to write.

    Returns:
        `out`, or a new tensor like it, with rows a multiple of 64 columns apart. T = 0 is a no-op.

    Raises:
        TypeError: an argument that is no tensor, or no int: named.
        RuntimeError: a wrong dtype, device, shape, stride, alignment, head count, page size,
            next_n or max_rows, a block table with too few rows, a negative length limit, another GPU: named.
    """
    check_tensors(
        ("q", q), ("kv_cache", kv_cache), ("weights", weights), ("context_lens", context_lens),
        ("block_table", block_table), ("plan", plan),
    )  # fmt: skip
    check_tensors(("out", out), optional=True)
    check_ints(("max_context_len", max_context_len), ("k", k))
    check_ints(("max_rows", max_rows), optional=True)
    _load()
    if out is None:
        columns = max(max_context_len, 0)
        padded = -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        out = torch.empty((context_lens.numel(), padded), dtype=torch.float32, device=context_lens.device)[:, :columns]
    torch.ops.vllm_mqa_sm90.paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_table, plan, max_context_len, max_rows, k, clean_logits, out
    )
    return out


def topk_indices(
    logits: torch.Tensor, context_lens: torch.Tensor, k: int, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Of each row of logits the indices of the k largest, exactly and in ascending order.

    Of equal logits the one with the lower index is the larger; -0 equals +0; NaN is larger than all others (as
    in `torch.topk`), and all NaN are equal. So a row's indices, their order included, depend on its own logits
    alone: not on the batch, or on how many CTAs a row has. Reads no logit past a row's length. Asynchronous on the
    current stream; CUDA graphs may capture it, and lengths may change between replays.

    All tensors are on one GPU of compute capability 9.0.

    Args:
        logits: float32 `[T, W]`, W at most 2^24, last stride 1, rows a multiple of 4 columns apart, on a
            16-byte boundary: as `paged_mqa_logits` makes them.
        context_lens: int32 with T elements, contiguous: `[T]` or `[B, next_n]`. Logits of each row; W where more;
            0 or negative, whatever the value, marks a padding row.
        k: 1 to 2048.
        out: int32 `[T, k]`, last stride 1: where to write.

    Returns:
        `out`, or a new tensor like it. Rows of at most k logits have all their indices, then -1.

    Raises:
        TypeError: an argument that is no tensor, or no int: named.
        RuntimeError: a wrong dtype, device, shape, stride, alignment or k: named.
    """
    check_tensors(("logits", logits), ("context_lens", context_lens))
    check_tensors(("out", out), optional=True)
    check_ints(("k", k))
    _load()
    if out is None:
        out = torch.empty((context_lens.numel(), max(k, 0)), dtype=torch.int32, device=logits.device)
    torch.ops.vllm_mqa_sm90.topk_indices(logits, context_lens, k, out)
    return out


def index_topk(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    plan: torch.Tensor,
    k: int,
    *,
    max_context_len: int,
    max_rows: int | None = None,
    logits: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The indexer's decode step, from queries and cache to the k tokens of each row with the best index scores.

    `paged_mqa_logits`, then `topk_indices`, two launches of which the second overlaps the end of the first.

    Args:
        q, kv_cache, weights, context_lens, block_table, max_rows: as for `paged_mqa_logits`. Rows that are padding by
            the plan alone have unspecified indices, unless their lengths are 0 or negative.
        max_context_len: as for `paged_mqa_logits`, at most 2^24.
        plan: what `plan` returned for the same lengths and this k, and `indices` or `query_start_loc`.
        k: 1 to 2048.
        logits: float32 `[T, max_context_len]` as for `topk_indices`: workspace, unspecified afterwards.
        out: int32 `[T, k]`, last stride 1: where to write.

    Returns:
        `out`, or a new tensor like it: tokens in ascending order; of rows of at most k tokens all, then -1.

    Raises:
        TypeError, RuntimeError: as these two.
    """
    check_ints(("k", k), ("max_context_len", max_context_len))
    # What the second launch does not take must not be found out after the first.
    if not 1 <= k <= MAX_TOPK:
        raise RuntimeError(f"k: expected 1 to {MAX_TOPK}, given {k}")
    if max_context_len > MAX_TOPK_COLUMNS:
        raise RuntimeError(f"max_context_len: expected at most 2^24, given {max_context_len}")
    options = {"max_context_len": max_context_len, "max_rows": max_rows, "k": k}
    logits = paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, plan, **options, out=logits)
    return topk_indices(logits, context_lens, k, out=out)


def launch_counts(device: torch.device | str | int | None = None) -> dict[int, int]:
    """Launches of the logits kernel so far on one GPU, by next_n, or max_rows of ragged steps.

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
