# SPDX-License-Identifier: Apache-2.0
"""The plugin where the newest models and modes run, in a real vLLM without a GPU: many drafts, decode context
parallelism, DeepSeek-V4.1, GLM-5.3."""

import importlib
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from no_gpu import (  # noqa: F401 (fixtures)
    KPOOL,
    V4,
    V32,
    V41,
    add_cache,
    clean,
    groups_of,
    hopper,
    k_of,
    log,
    make_builder,
    make_config,
    make_spec,
    make_step,
    plan_of,
    run_op,
    schedules,
    without_slot_mapping,
)
from vllm_mqa_sm90 import backend, ops, reference, seams, support, wrappers

RELEASE = seams.release()
K = 128  # tokens that the tests' top-k selects
HEADS_AND_DIM = 64, 128


def select_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def topk_indices(logits: torch.Tensor, context_lens: torch.Tensor, k: int, *, out: torch.Tensor) -> None:
        out.copy_(reference.topk_indices(logits, context_lens, k))

    monkeypatch.setattr(ops, "topk_indices", topk_indices)


def give_logits(monkeypatch: pytest.MonkeyPatch, of_rows: torch.Tensor) -> list[dict[str, Any]]:
    """Our kernel's place gives these, float32 `[T, W]`, as its own; the options of each call."""
    called = []

    def paged_mqa_logits(q: torch.Tensor, *args: Any, max_context_len: int, **options: Any) -> torch.Tensor:
        called.append(options | {"rows": q.shape[:-2].numel(), "plan": args[4]})
        out = torch.full((len(of_rows), max_context_len + 64), torch.nan)[:, :max_context_len]
        out[:, : of_rows.shape[1]] = of_rows
        return out

    monkeypatch.setattr(ops, "paged_mqa_logits", paged_mqa_logits)
    return called


# More drafts than a group has rows.


@pytest.mark.parametrize(
    ("tokens", "query", "groups"),
    [
        (8, [9, 9], [[0, 8, 0], [8, 1, 0], [9, 8, 1], [17, 1, 1]]),
        (9, [10, 3, 1], [[0, 8, 0], [8, 2, 0], [10, 3, 1], [13, 1, 2]]),
        (17, [18, 0, 17], [[0, 8, 0], [8, 8, 0], [16, 2, 0], [18, 8, 2], [26, 8, 2], [34, 1, 2]]),
        (9, [1, 1], [[0, 1, 0], [1, 1, 1]]),
    ],
)
def test_requests_of_more_rows_are_cut_into_groups(
    schedules: list[Any], log: Callable[[int], list[str]], tokens: int, query: list[int], groups: list[list[int]]
) -> None:
    config = make_config(tokens)
    builder = make_builder(config, make_spec(), add_cache(config))
    assert builder.refusal is None and not log(logging.WARNING)
    assert f"decodes natively (next_n={tokens + 1}, no flattening), in groups of 8 rows" in log(logging.INFO)[-1]
    context = [4000, 70, 300][: len(query)]
    step = make_step(context, query)
    decode = builder.build(0, step).decode
    lens = [length - rows + 1 + row for length, rows in zip(context, query) for row in range(rows)]
    assert decode.seq_lens.tolist() == [[length] for length in lens]
    assert decode.block_table.data_ptr() == step.block_table_tensor.data_ptr()
    assert groups_of(decode.schedule_metadata) == groups
    plan = plan_of(decode.seq_lens.view(-1), query_start_loc=step.query_start_loc, max_rows=ops.MAX_NEXT_N)
    assert torch.equal(decode.schedule_metadata, plan)
    assert not schedules


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 12])
def test_cuda_graphs_hold_no_more_than_vllms(schedules: list[Any], tokens: int) -> None:
    """Else one that was captured of decodes may replay over a prefill."""
    config = make_config(tokens)
    add_cache(config)
    builder, stock = seams.resolve(seams.BUILDER_OF_BACKEND)(), seams.resolve(seams.STOCK_BUILDER)
    ours, theirs = (of.get_cudagraph_support(config, make_spec()) for of in (builder, stock))
    assert ours.value <= theirs.value
    assert ours == theirs or 3 <= tokens + 1 <= ops.MAX_NEXT_N  # where vLLM flattens


@pytest.mark.skipif(RELEASE < (0, 30), reason="the op calls its top-k's CUDA kernels itself")
def test_vllms_op_passes_all_rows_of_many_drafts(schedules: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(9)
    layer = add_cache(config)
    metadata = make_builder(config, make_spec(), layer).build(0, make_step([400, 200], [10, 4]))
    called = give_logits(monkeypatch, torch.randn(14, 400))
    monkeypatch.setattr(sys.modules[seams.OP], "get_indexer_topk", lambda _: lambda *_: None)
    run_op(monkeypatch, layer, metadata, 14, torch.zeros(14, K, dtype=torch.int32), K)
    ((call,),) = [called]
    assert (call["rows"], call["max_rows"], call["k"]) == (14, 8, 0)


if RELEASE >= (0, 32):

    def test_draft_steps_of_many_drafts_make_our_plan(schedules: list[Any]) -> None:
        config = make_config(9)
        builder = make_builder(config, make_spec(), add_cache(config))
        metadata = builder.build(0, make_step([64, 128], [1, 1]))
        metadata.seq_lens += 1
        builder.update_draft_decode_metadata(metadata)
        starts = torch.arange(3, dtype=torch.int32)
        lens = torch.tensor([65, 129], dtype=torch.int32)
        assert torch.equal(metadata.decode.schedule_metadata, plan_of(lens, query_start_loc=starts, max_rows=8))


# Decode context parallelism: a rank has those of a request's tokens that lie in its turns, of `interleave` each.


def owned(length: int, ranks: int, rank: int, interleave: int) -> list[int]:
    """Positions of a request's tokens that the rank has, in the order of its cache."""
    return [token for token in range(length) if token // interleave % ranks == rank]


def make_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(sys.modules[seams.INDEXER], "get_dcp_group", lambda: SimpleNamespace(rank_in_group=rank))


def parallel_config(tokens: int, ranks: int, interleave: int, **others: Any) -> Any:
    parallel = {"decode_context_parallel_size": ranks, "cp_kv_cache_interleave_size": interleave}
    return make_config(tokens, **parallel, **others)


def parallel_step(context: list[int], query: list[int], ranks: int, rank: int, interleave: int, tokens: int | None) -> Any:
    step = make_step(context, query, tokens)
    local = [len(owned(length, ranks, rank, interleave)) for length in context]
    step.dcp_local_seq_lens = torch.tensor(local, dtype=torch.int32)
    return step


PARALLEL = {  # drafts, context, query, padded tokens
    "k=0": (0, [300, 1, 2, 3000], [1] * 4, None),
    "k=2": (2, [300, 3, 5, 3000], [3] * 4, None),
    "k=2, first drafts": (2, [300, 1, 5, 3000], [1] * 4, None),
    "ragged": (2, [300, 1, 4, 3000], [3, 1, 2, 3], None),
    "padded requests": (2, [300, 70, 0], [3, 3, 0], 9),
    "padded rows": (2, [300, 70, 0], [3, 3, 0], 8),
    "k=9": (9, [300, 11, 4000], [10, 10, 10], None),
}

if RELEASE >= (0, 29):

    # 0.29 refuses other turns than of 1.
    @pytest.mark.parametrize(("ranks", "interleave"), [(2, 1), (4, 1), *([(2, 64), (8, 16)] if RELEASE >= (0, 30) else [])])
    @pytest.mark.parametrize("case", PARALLEL)
    def test_ranks_of_decode_context_parallelism_choose_what_one_would(
        schedules: list[Any], monkeypatch: pytest.MonkeyPatch, case: str, ranks: int, interleave: int
    ) -> None:
        """Each rank's op over its own tokens, up to the merge, which is made here: the best of all ranks' best."""
        tokens, context, query, padded = PARALLEL[case]
        rows = padded or sum(query)
        lens = [length - bring + 1 + row for length, bring in zip(context, query) for row in range(bring)]
        lens += [0] * (rows - len(lens))
        scores = torch.randn(rows, max(context))
        candidates: list[dict[int, float]] = [{} for _ in range(rows)]
        select_on_cpu(monkeypatch)
        for rank in range(ranks):
            make_rank(monkeypatch, rank)
            config = parallel_config(tokens, ranks, interleave, index_topk=K)
            layer = add_cache(config)
            builder = make_builder(config, make_spec(), layer)
            assert builder.refusal is None
            metadata = builder.build(0, parallel_step(context, query, ranks, rank, interleave, padded))
            decode = metadata.decode
            mine = [owned(length, ranks, rank, interleave) for length in lens]
            assert decode.seq_lens.flatten().tolist() == [len(positions) for positions in mine]
            assert k_of(decode.schedule_metadata) == 0  # the merge reads the logits of short rows, too
            ragged = ops.is_ragged(decode.schedule_metadata)
            starts = {"query_start_loc": builder._query_start_loc, "max_rows": min(tokens + 1, 8)} if ragged else {}
            plan = plan_of(decode.seq_lens.view(-1) if ragged else decode.seq_lens, **starts)
            assert torch.equal(decode.schedule_metadata, plan)

            if RELEASE < (0, 30):
                continue  # its top-k is CUDA kernels
            local = torch.full((rows, len(owned(max(context), ranks, rank, interleave))), torch.nan)
            for row, positions in enumerate(mine):
                local[row, : len(positions)] = scores[row, positions]

            def merge(logits: torch.Tensor, indices: torch.Tensor, topk: int, *_: Any, **__: Any) -> None:
                assert topk == K and logits.shape[0] == len(indices) == rows
                for row, positions in enumerate(mine):
                    chosen = [index for index in indices[row].tolist() if index >= 0]
                    assert len(set(chosen)) == len(chosen) == min(len(positions), K)
                    candidates[row].update({positions[index]: float(logits[row, index]) for index in chosen})

            give_logits(monkeypatch, local)
            monkeypatch.setattr(sys.modules[seams.OP], "_merge_dcp_topk_global", merge)
            others = {"dcp_rank": rank, "dcp_world_size": ranks, "cp_kv_cache_interleave_size": interleave}
            run_op(monkeypatch, layer, metadata, rows, torch.zeros(rows, K, dtype=torch.int32), K, **others)
        if RELEASE >= (0, 30):
            for row, length in enumerate(lens):
                best = sorted(candidates[row], key=candidates[row].get, reverse=True)[:K]
                expected = reference.topk_indices(scores[row : row + 1], torch.tensor([length], dtype=torch.int32), K)
                assert sorted(best) == [index for index in expected[0].tolist() if index >= 0]
        assert not schedules

    def test_parallel_ranks_without_query_tokens_merge_nothing(
        schedules: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All ranks alike, as merging is a collective."""
        monkeypatch.setattr(sys.modules[seams.INDEXER], "build_prefill_chunk_metadata", lambda *_, **__: None)
        for rank in range(2):
            make_rank(monkeypatch, rank)
            config = parallel_config(2, 2, 1)
            builder = make_builder(config, make_spec(), add_cache(config))
            metadata = builder.build(0, parallel_step([300, 90], [0, 90], 2, rank, 1, None))
            assert (metadata.num_decodes, metadata.decode) == (0, None)


@pytest.mark.parametrize(
    ("axis", "cache", "release", "reason"),
    [
        ("prefill", V32, (0, 33), "prefill context parallelism is on, for which the kernel is not proven"),
        ("decode", V32, (0, 28), "which the attention cannot on Hopper before vLLM 0.29"),
        ("decode", V32, (0, 29), None),
        ("decode", V4, (0, 33), "for which the kernel is not proven with this model"),
        (None, V41, (0, 29), "the model is taken over from vLLM 0.30 on"),
        (None, KPOOL, (0, 32), "the model is taken over from vLLM 0.33 on"),
        (None, "other.Cache", (0, 33), "one that this version does not know: other.Cache"),
    ],
)
def test_what_keeps_vllms_path(
    monkeypatch: pytest.MonkeyPatch, axis: str | None, cache: str, release: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(seams, "release", lambda: release)
    found = support.problem([cache], dcp=axis == "decode", pcp=axis == "prefill")
    assert found is None if reason is None else re.search(reason, found)


# DeepSeek-V4.1: one layer chooses blocks of candidates by the logits, later ones mask theirs outside of them.

if RELEASE >= (0, 30):

    @pytest.mark.parametrize("write", [True, False])
    @pytest.mark.parametrize(
        ("tokens", "query", "padded"), [(0, [1, 1, 1], None), (7, [8, 8, 8], None), (5, [6, 1, 0], None), (2, [3, 3, 0], 8)]
    )
    def test_candidate_blocks_of_v41_see_all_logits(
        schedules: list[Any], monkeypatch: pytest.MonkeyPatch, tokens: int, query: list[int], padded: int | None, write: bool
    ) -> None:
        """Those of rows that the top-k keeps whole, too; and what the mask leaves is selected from."""
        block, blocks = 16, 4
        config = make_config(tokens, heads=32, index_topk=K)
        config.model_config.hf_text_config.candidate_topk_blocks = 8
        layer = add_cache(config, V41, "DeepseekV41IndexerBackend")
        builder = make_builder(config, make_spec(block_size=256, compression=4), layer)
        assert builder.refusal is None and wrappers.steps.selection == seams.Selection(K, left_out=0)
        with without_slot_mapping():
            metadata = builder.build(0, make_step([4000, 90, 800], query, padded))
        rows = padded or sum(query)
        lens = metadata.decode.seq_lens.flatten()
        assert len(lens) == rows and k_of(metadata.decode.schedule_metadata) == 0
        logits = torch.randn(rows, 1000)
        called = give_logits(monkeypatch, logits)
        select_on_cpu(monkeypatch)
        seen = []

        def write_blocks(logits: torch.Tensor, starts: None, ends: torch.Tensor, top: int, size: int, out: Any, repeat: int) -> None:
            seen.append((ends.tolist(), repeat))

        def mask(logits: torch.Tensor, starts: None, ends: torch.Tensor, chosen: Any, size: int, repeat: int) -> None:
            seen.append((ends.tolist(), repeat))
            logits[:, : block * blocks] = -torch.inf

        monkeypatch.setattr(sys.modules[seams.OP], "_select_candidate_blocks", write_blocks)
        monkeypatch.setattr(sys.modules[seams.OP], "_apply_candidate_mask", mask)
        chosen = torch.zeros(rows, K, dtype=torch.int32)
        candidates = torch.zeros(rows, blocks, dtype=torch.int32)
        others = {"candidate_blocks": candidates, "candidate_block_size": block, "candidate_write": write}
        run_op(monkeypatch, layer, metadata, rows, chosen, K, q_quant=torch.empty(rows, 32, 128), **others)
        assert seen == [(lens.tolist(), 1)] and called[0]["k"] == 0
        if not write:
            logits[:, : block * blocks] = -torch.inf
        assert torch.equal(chosen, reference.topk_indices(logits, lens, K))


# GLM-5.3: keys are pools of tokens, and the op is the model's own.

if RELEASE >= (0, 33):
    importlib.import_module(seams.KPOOL_OP)  # before the platform says that there are CUDA kernels

    @pytest.fixture
    def kpool_op(monkeypatch: pytest.MonkeyPatch, hopper: None) -> Any:
        """Its module, restored afterwards, without the kernels around ours."""
        module = sys.modules[seams.KPOOL_OP]
        for name in "fp8_fp4_paged_mqa_logits", "get_indexer_topk":
            monkeypatch.setattr(module, name, getattr(module, name))
        expand = SimpleNamespace(expand_pools_and_append_tail=lambda pools, lens, kpool: pools.int())
        monkeypatch.setattr(module, "kpool_ops", expand)
        monkeypatch.setattr(module, "_fill_short_decode_causal_indices", lambda *_: False)
        return module

    @pytest.mark.parametrize(
        ("tokens", "query", "padded"), [(0, [1, 1, 1], None), (3, [4, 4, 4], None), (3, [4, 1, 2], None), (9, [10, 1, 0], 12)]
    )
    def test_pools_of_glm53_are_ours_to_score_and_select(
        kpool_op: Any, schedules: list[Any], monkeypatch: pytest.MonkeyPatch, tokens: int, query: list[int], padded: int | None
    ) -> None:
        stock = {name: getattr(kpool_op, name) for name in ("fp8_fp4_paged_mqa_logits", "get_indexer_topk")}
        config = make_config(tokens, heads=16, index_topk=4 * K)
        config.model_config.hf_text_config.index_kpool = 4
        other = make_config(tokens)
        make_builder(other, make_spec(), add_cache(other))
        assert {name: getattr(kpool_op, name) for name in stock} == stock  # another model's builder leaves it
        backend._builders.clear()
        layer = add_cache(config, KPOOL, "Glm5NextIndexerBackend")
        builder = make_builder(config, make_spec(block_size=256, compression=4), layer)
        assert builder.refusal is None and wrappers.steps.selection == seams.Selection(K, left_out=K)
        for name, function in stock.items():
            assert getattr(kpool_op, name) is not function
        ours = {name: getattr(kpool_op, name) for name in stock}
        make_builder(config, make_spec(block_size=256, compression=4), layer)
        assert {name: getattr(kpool_op, name) for name in stock} == ours  # once

        with without_slot_mapping():
            metadata = builder.build(0, make_step([4000, 300, 800], query, padded))
        rows = padded or sum(query)
        decode = metadata.decode
        lens = decode.seq_lens.flatten()
        context = [length - bring + 1 + row for length, bring in zip([4000, 300, 800], query) for row in range(bring)]
        assert lens.tolist() == [length // 4 for length in context] + [0] * (rows - sum(query))
        assert decode.per_req_decode_lens.tolist() == query  # its writes into the cache go by request
        logits = torch.randn(rows, 1000)
        called = give_logits(monkeypatch, logits)
        select_on_cpu(monkeypatch)
        context = SimpleNamespace(attn_metadata={layer: metadata})
        monkeypatch.setattr(kpool_op, "get_forward_context", lambda: context)
        chosen = torch.full((rows, 4 * K), -7, dtype=torch.int32)
        kpool_op.sparse_attn_indexer_kpool(
            hidden_states=torch.empty(rows, 8), k_cache_prefix=layer, kv_cache=torch.empty(2, 64, 132),
            q_quant=torch.empty(rows, 32, 128), q_scale=None, k=None, weights=torch.empty(rows, 32),
            quant_block_size=128, scale_fmt=None, topk_tokens=4 * K, head_dim=128, max_pool_len=1024, total_seq_lens=300,
            topk_indices_buffer=chosen, skip_k_cache_insert=True, index_kpool=4,
            positions=torch.arange(rows, dtype=torch.int64),
        )  # fmt: skip
        assert torch.equal(chosen[:, :K], reference.topk_indices(logits, lens, K))
        assert called[0]["k"] == K and called[0]["rows"] == rows
        assert not schedules

    @pytest.mark.parametrize(
        ("tokens", "context", "query", "padded"),
        [
            (0, [300, 1, 7, 3000], [1] * 4, None), (3, [300, 5, 9, 3000], [4] * 4, None),
            (3, [300, 1, 9, 3000], [4, 1, 2, 4], None), (9, [300, 11, 4000], [10, 3, 10], 24), (3, [300, 70, 0], [4, 4, 0], 12),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("interleave", [4, 64])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_parallel_ranks_of_glm53_see_the_pools_that_they_have(
        kpool_op: Any, schedules: list[Any], monkeypatch: pytest.MonkeyPatch, tokens: int, context: list[int], query: list[int],
        padded: int | None, interleave: int, rank: int,
    ) -> None:  # fmt: skip
        make_rank(monkeypatch, rank)
        config = parallel_config(tokens, 2, interleave, heads=16, index_topk=4 * K)
        config.model_config.hf_text_config.index_kpool = 4
        layer = add_cache(config, KPOOL, "Glm5NextIndexerBackend")
        builder = make_builder(config, make_spec(block_size=256, compression=4), layer)
        assert builder.refusal is None and wrappers.steps.selection == seams.Selection(K, left_out=0)
        with without_slot_mapping():
            decode = builder.build(0, parallel_step(context, query, 2, rank, interleave, padded)).decode
        lens = [max(length - bring + 1 + row, 0) for length, bring in zip(context, query) for row in range(bring)]
        lens += [0] * (len(decode.seq_lens.flatten()) - len(lens))
        pools = [sum(first // interleave % 2 == rank for first in range(0, length // 4 * 4, 4)) for length in lens]
        assert decode.seq_lens.flatten().tolist() == pools
        assert k_of(decode.schedule_metadata) == 0 and not schedules

    def test_another_op_of_glm53_is_left_to_vllm(
        kpool_op: Any, schedules: list[Any], log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kpool_op, "get_indexer_topk", lambda backend, k: None)
        seams.op_problem.cache_clear()
        config = make_config(3, heads=16, index_topk=4 * K)
        builder = make_builder(config, make_spec(block_size=256, compression=4), add_cache(config, KPOOL, "Glm5NextIndexerBackend"))
        reason = f"{seams.KPOOL_OP}:get_indexer_topk: expected parameters (backend), found (backend, k)"
        assert builder.refusal == reason and reason in log(logging.WARNING)[-1]
        seams.op_problem.cache_clear()


# The record.


def test_table_of_support_is_the_readmes() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "\n".join(support.table()) + "\n" in readme


@pytest.mark.parametrize("cache", support.CACHES)
def test_table_has_all_that_is_taken_over(cache: str) -> None:
    modes = " ".join(row.mode for row in support.TABLE if row.cache == cache)
    assert "any number of drafts" in modes or ("0 to 7 drafts" in modes and "8 drafts or more" in modes)
    assert "decode context parallelism" in modes


@pytest.mark.parametrize("row", support.TABLE, ids=lambda row: f"{row.model}, {row.mode}")
def test_table_says_what_the_plugin_does(monkeypatch: pytest.MonkeyPatch, row: support.Mode) -> None:
    served = {served.release for served in row.served}
    if not row.cache:
        assert row.since is None and not served
        return
    for minor in range(seams.OLDEST[1], seams.NEWEST[1] + 1):
        release = 0, minor
        monkeypatch.setattr(seams, "release", lambda: release)
        monkeypatch.setattr(seams, "op_problem", lambda op: None)
        problem = support.problem([row.cache], dcp="decode context" in row.mode, pcp=False)
        if row.since is not None and release >= row.since:
            assert problem is None
        else:
            assert problem is not None or row.stock.startswith("vLLM"), release
            assert release not in served
