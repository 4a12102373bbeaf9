# SPDX-License-Identifier: Apache-2.0
"""The oracle: paged MQA logits in plain PyTorch FP32, on any device."""

import itertools

import torch

from vllm_mqa_sm90.ops import HEAD_DIM

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

    Arguments as there, and as for `vllm_mqa_sm90.plan`; `kv_cache` may have any strides, a request
    any number of rows. As there, relu of NaN is 0, and a sum of scores that are all 0 is +0. Reads only the pages that the block table names for tokens within a context.
    Goes request by request, so it is slow, and synchronises.

    Returns:
        float32 `[T, max_context_len]`, -inf at and past each row's length, and in rows of no request.
    """
    heads, page_size = q.shape[-2], kv_cache.shape[1]
    queries, rows = q.reshape(-1, heads, HEAD_DIM), context_lens.numel()
    limit = min(max_context_len, block_table.shape[1] * page_size)
    lens = context_lens.reshape(rows).clamp(0, limit)
    logits = q.new_full((rows, max_context_len), float("-inf"), dtype=torch.float32)
    positions = torch.arange(max_context_len, device=q.device)
    for first, end, request in groups_of(context_lens, indices, query_start_loc):
        query = queries[first:end].float().view(-1, HEAD_DIM)
        longest = int(lens[first:end].max())
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
