# SPDX-License-Identifier: Apache-2.0
"""Contexts that nobody has to prefill: a KV connector of vLLM's with random index keys, for times of decode steps.

vLLM imports this in a server's processes, where `bench serve --skip-prefill` names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

from vllm_mqa_sm90.sizes import HEAD_DIM, TOKEN_BYTES


class RandomContexts(DecodeBenchConnector):
    """Says that all of a prompt but its last token is in the cache, and fills the indexer's part of it with random keys.

    vLLM's own connector fills both caches with one value: all logits are equal then, which no context has, and the top-k of
    ties is another's work. What attention reads is left as it is (vLLM's caches begin as zeros): its time does not depend on it.
    """

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        self._index_caches = {name: cache for name, cache in kv_caches.items() if _is_index_cache(cache)}
        if not self._index_caches:
            shapes = {name: getattr(cache, "shape", type(cache)) for name, cache in kv_caches.items()}
            raise ValueError(f"kv_caches: expected uint8 [pages, page, {TOKEN_BYTES}] of an indexer, given {shapes}")

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for pages_of_group, _ in self._connector_metadata.reqs_to_fill.values():
            for group, pages in enumerate(pages_of_group):
                for name in self.connector_worker.group_to_layers[group]:
                    if name in self._index_caches:
                        fill(self._index_caches[name], pages)


def _is_index_cache(cache: Any) -> bool:
    return isinstance(cache, torch.Tensor) and cache.dtype == torch.uint8 and cache.shape[-1] == TOKEN_BYTES


def fill(cache: torch.Tensor, pages: Sequence[int]) -> None:
    """Fills pages of an index cache, uint8 [pages, page, 132] (a page has all its FP8 keys, then their scales), in place with
    normal keys and scales from 0.5 to 1.5: of one length, keys would hardly differ in their logits."""
    shape, device = (len(pages), *cache.shape[1:]), cache.device
    tokens = cache[0].numel() // TOKEN_BYTES
    keys = torch.randn(len(pages), tokens * HEAD_DIM, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.rand(len(pages), tokens, device=device).add_(0.5).view(torch.uint8)
    cache[torch.tensor(pages, dtype=torch.int64, device=device)] = torch.cat([keys, scales], dim=1).view(shape)
