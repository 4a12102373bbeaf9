# SPDX-License-Identifier: Apache-2.0
"""The oracle: paged MQA logits in plain PyTorch FP32, on any device."""

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


def paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_context_len: int,
) -> torch.Tensor:
    """What `vllm_mqa_sm90.paged_mqa_logits` computes, with every operation in FP32.

    Arguments as there; `kv_cache` may have any strides. Reads only the pages that the block table
    names for tokens within a context. Goes request by request, so it is slow, and synchronises.

    Returns:
        float32 `[T, max_context_len]`, -inf at and past each row's length.
    """
    groups = context_lens.shape[0]
    next_n = context_lens.shape[1] if context_lens.dim() == 2 else 1
    heads, page_size = q.shape[-2], kv_cache.shape[1]
    queries = q.reshape(groups, next_n * heads, HEAD_DIM)
    weights = weights.view(groups, next_n, heads, 1)
    limit = min(max_context_len, block_table.shape[1] * page_size)
    lens = context_lens.view(groups, next_n).clamp(0, limit)
    logits = q.new_full((groups, next_n, max_context_len), float("-inf"), dtype=torch.float32)
    for group, longest in enumerate(lens.amax(dim=1).tolist()):
        query = queries[group].float()
        for start in range(0, longest, _CHUNK_TOKENS):
            stop = min(start + _CHUNK_TOKENS, longest)
            pages = block_table[group, start // page_size : -(-stop // page_size)]
            keys, scales = split_pages(kv_cache[pages.long()])
            keys, scales = keys[: stop - start], scales[: stop - start]
            # FP8 values fit TF32 too, so the products are exact whatever matmul precision is set.
            scores = torch.relu(query @ keys.T).view(next_n, heads, -1)
            logits[group, :, start:stop] = (scores * weights[group]).sum(dim=1) * scales
    positions = torch.arange(max_context_len, device=q.device)
    logits.masked_fill_(positions >= lens.unsqueeze(-1), float("-inf"))
    return logits.view(groups * next_n, max_context_len)
