# SPDX-License-Identifier: Apache-2.0
"""The oracles: paged MQA logits and their selection in plain PyTorch FP32, on any device."""

import itertools

import torch

from vllm_mqa_sm90.ops import check_ints, check_tensors
from vllm_mqa_sm90.sizes import HEAD_DIM, PAGE_SIZES, TOKEN_BYTES

_CHUNK_TOKENS = 16384  # scored at once, so that memory does not grow with the context


def split_pages(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys float32 `[n * page, 128]` and scales float32 `[n * page]` of uint8 pages `[n, page, 1, 132]`."""
    num_pages, page_size = pages.shape[:2]
    page_bytes = pages.reshape(num_pages, -1)
    keys = page_bytes[:, : page_size * HEAD_DIM].contiguous().view(torch.float8_e4m3fn)
    scales = page_bytes[:, page_size * HEAD_DIM :].contiguous().view(torch.float32)
    return keys.float().view(-1, HEAD_DIM), scales.view(-1)


def groups_of(
    context_lens: torch.Tensor, indices: torch.Tensor | None = None, query_start_loc: torch.Tensor | None = None
) -> list[tuple[int, int, int]]:
    """First row, end and request of each group of a step; arguments as for `vllm_mqa_sm90.plan`."""
    if indices is not None:
        requests, counts = torch.unique_consecutive(indices, return_counts=True)
        ends = counts.cumsum(0)
        return list(zip((ends - counts).tolist(), ends.tolist(), requests.tolist(), strict=True))
    if query_start_loc is not None:
        bounds = query_start_loc.tolist()
        return [(start, end, r) for r, (start, end) in enumerate(itertools.pairwise(bounds)) if start < end]
    next_n = context_lens.shape[1] if context_lens.dim() == 2 else 1
    return [(r * next_n, (r + 1) * next_n, r) for r in range(context_lens.shape[0])]


def paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_context_len: int,
    indices: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `vllm_mqa_sm90.paged_mqa_logits` computes, with every operation in FP32.

    Arguments as there, and as for `vllm_mqa_sm90.plan`; tensors may have any strides and lie on any device, a request
    may have any number of rows and heads. As there, relu of NaN is 0, and a sum of scores that are all 0 is +0. Reads
    only the pages that the block table names for tokens within a context.
    Goes request by request, so it is slow, and synchronises.

    Returns:
        float32 `[T, max_context_len]`, -inf at and past each row's length, and in rows of no request.

    Raises:
        TypeError: an argument that is no tensor, or no int: named.
        ValueError: a wrong dtype, device or shape, a block table without a row for a request or without columns for
            its tokens, a page id within a context that is no page: named.
    """
    _check(q, kv_cache, weights, context_lens, block_table, max_context_len, indices, query_start_loc)
    heads, page_size = q.shape[-2], kv_cache.shape[1]
    queries, rows = q.reshape(-1, heads, HEAD_DIM), context_lens.numel()
    lens = context_lens.reshape(rows).clamp(0, max_context_len)
    logits = q.new_full((rows, max_context_len), float("-inf"), dtype=torch.float32)
    positions = torch.arange(max_context_len, device=q.device)
    for first, end, request in groups_of(context_lens, indices, query_start_loc):
        query = queries[first:end].float().view(-1, HEAD_DIM)
        longest = int(lens[first:end].max())
        if not longest:
            continue
        _check_request(block_table, request, longest, kv_cache)
        for start in range(0, longest, _CHUNK_TOKENS):
            stop = min(start + _CHUNK_TOKENS, longest)
            pages = block_table[request, start // page_size : -(-stop // page_size)]
            keys, scales = split_pages(kv_cache[pages.long()])
            keys, scales = keys[: stop - start], scales[: stop - start]
            # FP8 values fit TF32 too, so the products are exact whatever matmul precision is set.
            scores = torch.relu(query @ keys.T).nan_to_num(nan=0.0).view(end - first, heads, -1)
            sums = (scores * weights[first:end, :, None]).sum(dim=1) + 0.0  # + 0.0 makes +0 of -0
            logits[first:end, start:stop] = sums * scales
        logits[first:end].masked_fill_(positions >= lens[first:end, None], float("-inf"))
    return logits


def topk_indices(logits: torch.Tensor, context_lens: torch.Tensor, k: int) -> torch.Tensor:
    """What `vllm_mqa_sm90.topk_indices` selects, by a stable sort of each row: int32 `[T, k]`.

    Arguments as there; tensors may have any strides and lie on any device, k may be any number. Synchronises.

    Raises:
        TypeError: an argument that is no tensor, or no int: named.
        ValueError: a wrong dtype, device or shape: named.
    """
    check_tensors(("logits", logits), ("context_lens", context_lens))
    check_ints(("k", k))
    _expect(logits.dtype == torch.float32, "logits", "dtype torch.float32", f"dtype {logits.dtype}")
    _expect(logits.dim() == 2, "logits", "shape [T, W]", _shape(logits))
    _expect(context_lens.dtype == torch.int32, "context_lens", "dtype torch.int32", f"dtype {context_lens.dtype}")
    fits = context_lens.numel() == len(logits)
    _expect(fits, "context_lens", f"{len(logits)} elements, a length for each row of logits", _shape(context_lens))
    given = f"device {context_lens.device}"
    _expect(context_lens.device == logits.device, "context_lens", f"device {logits.device}, as logits", given)
    _expect(k >= 1, "k", "at least 1", k)
    indices = torch.full((len(logits), k), -1, dtype=torch.int32, device=logits.device)
    for row, length in enumerate(context_lens.flatten().clamp(0, logits.shape[1]).tolist()):
        # Equal ones keep their order, and NaN comes first, but on a GPU not the negative one.
        values = logits[row, :length]
        best = values.masked_fill(values.isnan(), torch.nan).sort(descending=True, stable=True).indices[:k]
        indices[row, : len(best)] = best.sort().values.int()
    return indices


def _check(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    indices: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
) -> None:
    """Whether the arguments fit each other, but for the values in them."""
    tensors = {
        "q": (q, torch.float8_e4m3fn),
        "kv_cache": (kv_cache, torch.uint8),
        "weights": (weights, torch.float32),
        "context_lens": (context_lens, torch.int32),
        "block_table": (block_table, torch.int32),
    }
    grouping = {name: given for name, given in (("indices", indices), ("query_start_loc", query_start_loc)) if given is not None}
    tensors |= {name: (given, torch.int32) for name, given in grouping.items()}
    check_tensors(*((name, given) for name, (given, _) in tensors.items()))
    check_ints(("max_context_len", max_context_len))
    for name, (given, dtype) in tensors.items():
        _expect(given.dtype == dtype, name, f"dtype {dtype}", f"dtype {given.dtype}")
        _expect(given.device == q.device, name, f"device {q.device}, as q", f"device {given.device}")
    _expect(max_context_len >= 0, "max_context_len", "at least 0", max_context_len)
    _expect(len(grouping) < 2, "indices", "either indices or query_start_loc", "both")

    flat = (1,) if grouping else (1, 2)
    shape = "[T], as the step is ragged" if grouping else "[B, next_n] or [T]"
    _expect(context_lens.dim() in flat, "context_lens", f"shape {shape}", _shape(context_lens))
    rows = context_lens.numel()
    requests, next_n = context_lens.shape if context_lens.dim() == 2 else (rows, 1)
    fits = q.shape[:-2] in ((rows,), (requests, next_n)) and q.shape[-2] > 0 and q.shape[-1] == HEAD_DIM
    expected = f"shape [{rows}, H, {HEAD_DIM}] or [{requests}, {next_n}, H, {HEAD_DIM}], as context_lens"
    _expect(fits, "q", expected, _shape(q))
    expected = f"shape [pages, page, 1, {TOKEN_BYTES}], page {' or '.join(map(str, PAGE_SIZES))}"
    fits = kv_cache.dim() == 4 and kv_cache.shape[1] in PAGE_SIZES and kv_cache.shape[2:] == (1, TOKEN_BYTES)
    _expect(fits, "kv_cache", expected, _shape(kv_cache))
    _expect(weights.shape == (rows, q.shape[-2]), "weights", f"shape [{rows}, {q.shape[-2]}]", _shape(weights))
    least = 0 if grouping else requests  # those of a ragged step are looked at one by one
    fits = block_table.dim() == 2 and len(block_table) >= least
    _expect(fits, "block_table", f"shape [R, pages] with R >= {least}", _shape(block_table))
    if indices is not None:
        _expect(indices.shape == (rows,), "indices", f"shape [{rows}], as context_lens", _shape(indices))
    if query_start_loc is not None:
        fits = query_start_loc.dim() == 1 and len(query_start_loc) > 0
        _expect(fits, "query_start_loc", "shape [R + 1]", _shape(query_start_loc))
        bounds = query_start_loc.tolist()
        fits = bounds[0] >= 0 and bounds == sorted(bounds) and bounds[-1] <= rows
        _expect(fits, "query_start_loc", f"numbers from 0 to {rows} that do not decrease", bounds)


def _check_request(block_table: torch.Tensor, request: int, length: int, kv_cache: torch.Tensor) -> None:
    """Whether the block table names pages for the first `length` tokens of a request."""
    pages, page_size = kv_cache.shape[:2]
    _expect(0 <= request < len(block_table), "block_table", f"a row for request {request}", _shape(block_table))
    columns = -(-length // page_size)
    expected = f"at least {columns} columns, for the {length} tokens of request {request}"
    _expect(block_table.shape[1] >= columns, "block_table", expected, _shape(block_table))
    used = block_table[request, :columns]
    wrong = used[(used < 0) | (used >= pages)].tolist()
    _expect(not wrong, "block_table", f"ids of the {pages} pages within the context of request {request}", wrong[:1])


def _expect(holds: bool, name: str, expected: str, given: object) -> None:
    if not holds:
        raise ValueError(f"vllm_mqa_sm90: {name}: expected {expected}, given {given}")


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {list(tensor.shape)}"
