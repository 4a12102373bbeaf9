# SPDX-License-Identifier: Apache-2.0
"""Contexts without a prefill: what the installed vLLM's connector says is in the cache, the indexer's part has."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

from vllm_mqa_sm90 import reference
from vllm_mqa_sm90.bench.serve.contexts import RandomContexts, fill

PAGE, INDEXER, ATTENTION = 64, "model.layers.0.indexer.k_cache", "model.layers.0.attn"


def connector(role: KVConnectorRole) -> RandomContexts:
    """Of a model whose two caches are one group."""
    spec = SimpleNamespace(block_size=PAGE, dtype=torch.uint8, dcp_sharded=False)
    group = SimpleNamespace(layer_names=[ATTENTION, INDEXER], kv_cache_spec=spec)
    caches = SimpleNamespace(kv_cache_groups=[group], needs_kv_cache_zeroing=False, transfer_group_ids=(0,))
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(get_from_extra_config=lambda name, default: default),
        cache_config=SimpleNamespace(block_size=PAGE, cache_dtype="fp8"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
    )
    return RandomContexts(config, role, caches)


def logits_of(pages: torch.Tensor) -> torch.Tensor:
    """Of one query and all tokens of uint8 pages [n, page, 132]."""
    q = torch.randn(1, 1, 64, 128, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    tokens = pages.shape[0] * PAGE
    table = torch.arange(pages.shape[0], dtype=torch.int32)[None]
    lens = torch.tensor([[tokens]], dtype=torch.int32)
    return reference.paged_mqa_logits(q, pages.unsqueeze(2), torch.ones(1, 64), lens, table, max_context_len=tokens)


def test_a_context_is_there_all_but_its_last_token() -> None:
    scheduler, worker = connector(KVConnectorRole.SCHEDULER), connector(KVConnectorRole.WORKER)
    caches: dict[str, Any] = {ATTENTION: torch.zeros(8, PAGE, 656, dtype=torch.uint8)}
    caches[INDEXER] = torch.zeros(8, PAGE, 132, dtype=torch.uint8)
    worker.register_kv_caches(caches)

    request = SimpleNamespace(request_id="a", num_tokens=2 * PAGE + 5)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (2 * PAGE + 4, False)
    blocks = [SimpleNamespace(block_id=page, is_null=False) for page in (6, 1, 3)]
    of_groups = SimpleNamespace(blocks=(blocks,), get_block_ids=lambda: ([6, 1, 3],))
    scheduler.update_state_after_alloc(request, of_groups, 2 * PAGE + 4)
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    worker.start_load_kv(None)

    assert caches[INDEXER].flatten(1).any(1).tolist() == [False, True, False, True, False, False, True, False]
    assert not caches[ATTENTION].any()
    logits = logits_of(caches[INDEXER][[6, 1, 3]])
    assert logits.isfinite().all() and logits.unique().numel() > 0.99 * logits.numel()

    before = caches[INDEXER].clone()
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    worker.start_load_kv(None)
    assert torch.equal(caches[INDEXER], before)


def test_pages_are_keys_and_then_their_scales() -> None:
    cache = torch.zeros(3, PAGE, 132, dtype=torch.uint8)
    fill(cache, [2])
    keys, scales = cache[2].flatten().split([PAGE * 128, PAGE * 4])
    assert 0.9 < keys.view(torch.float8_e4m3fn).float().std() < 1.1
    assert scales.view(torch.float32).min() >= 0.5 and scales.view(torch.float32).max() <= 1.5
    assert not cache[:2].any()


def test_a_model_without_an_indexer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_caches: expected uint8 \[pages, page, 132\] of an indexer, given .*656"):
        connector(KVConnectorRole.WORKER).register_kv_caches({ATTENTION: torch.zeros(8, PAGE, 656, dtype=torch.uint8)})
