# SPDX-License-Identifier: Apache-2.0
"""Ragged steps on a GPU: against the FP32 oracle, and each row against the same row computed alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import POISON, TILE, Step, assert_accurate, poisoned, random_ragged_step

import vllm_mqa_sm90
from vllm_mqa_sm90 import reference

pytestmark = pytest.mark.gpu

BY = pytest.mark.parametrize("by", ["indices", "query_start_loc"])


def rows_in_groups(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are in a group, and the request of each; of the others 0."""
    request = torch.zeros(step.context_lens.numel(), dtype=torch.int64, device="cuda")
    grouped = torch.zeros_like(request, dtype=torch.bool)
    for first, end, of_group in reference.groups_of(step.context_lens, **step.grouping()):
        grouped[first:end] = True
        if 0 <= of_group < len(step.block_table):  # else padding
            request[first:end] = of_group
    return grouped, request


def rows_alone(step: Step) -> Step:
    """The same rows as a uniform step of next_n 1."""
    grouped, request = rows_in_groups(step)
    return Step(
        q=step.q,
        kv_cache=step.kv_cache,
        weights=step.weights,
        context_lens=step.context_lens.masked_fill(~grouped, 0),
        block_table=step.block_table[request],
        max_context_len=step.max_context_len,
    )


def check(step: Step, *, num_sms: int | None = None) -> None:
    """Accuracy, bits, and that nothing outside the rows' tiles is written, before, between or after them."""
    alone = rows_alone(step)
    expected = alone.run(clean_logits=True)
    columns, lens = step.max_context_len, alone.context_lens.view(-1, 1)
    storage = torch.full((len(expected) + 2, columns + 3 * TILE), POISON, device="cuda")
    plan = step.plan(num_sms=num_sms)
    step.logits(plan, out=storage[1:-1, :columns])
    given = storage[1:-1]
    positions = torch.arange(storage.shape[1], device="cuda")
    assert given[positions >= -(-lens.clamp(min=0) // TILE) * TILE].isnan().all()
    assert storage[0].isnan().all() and storage[-1].isnan().all()
    valid = positions[:columns] < lens
    assert torch.equal(given[:, :columns][valid], expected[valid])
    assert_accurate(given[:, :columns], step)


lengths = st.one_of(st.integers(-1, 300), st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]))


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(st.lists(lengths, max_size=8), min_size=1, max_size=7),
    by=st.sampled_from(["indices", "query_start_loc"]),
    max_rows=st.one_of(st.none(), st.integers(1, 8)),
    padding=st.integers(0, 5),
    heads=st.sampled_from([16, 32, 64]),
    page=st.sampled_from([32, 64]),
    num_sms=st.sampled_from([None, 1, 3, 40]),
    seed=st.integers(0, 2**31),
)
def test_random_steps(requests, by, max_rows, padding, heads, page, num_sms, seed) -> None:
    """Every step of 0 to 8 rows a request; with less max_rows than a request has, it is cut."""
    step = random_ragged_step(
        requests, by=by, max_rows=max_rows, padding=padding, heads=heads, page=page, device="cuda", seed=seed
    )
    check(step, num_sms=num_sms)


def large_requests(seed: int, batch: int, longest: int, most_rows: int) -> list[list[int]]:
    """Decode-like: a request's rows see one token more each."""
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(1, longest, (batch,), generator=generator).tolist()
    counts = torch.randint(0, most_rows + 1, (batch,), generator=generator).tolist()
    return [[context + row for row in range(count)] for context, count in zip(contexts, counts, strict=True)]


@BY
@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 5, 6, 7, 8])
def test_large_steps(max_rows: int, by: str) -> None:
    """More than a tile, a share and a thread of the plan can hide: spare shares, 1100 requests, up to 2,000 tokens."""
    step = random_ragged_step(
        large_requests(max_rows, 1100, 2000, max_rows),
        by=by,
        max_rows=max_rows,
        padding=9,
        num_pages=2000,
        device="cuda",
    )
    assert step.plan(num_sms=132)[0, 1] > 0
    check(step, num_sms=132)


def test_requests_of_many_rows_are_cut() -> None:
    """A prefill of 100 rows between decodes."""
    requests = [[500, 501], list(range(200, 300)), [70], list(range(1, 12))]
    for max_rows in 1, 3, 6, 8:
        check(random_ragged_step(requests, by="query_start_loc", max_rows=max_rows, device="cuda"))


def random_partition(rows: int, requests: int, generator: torch.Generator, longest: int) -> list[list[int]]:
    """Requests of 0 to 8 rows each with any lengths, of at most `rows` rows together."""
    partition, left = [], rows
    for _ in range(requests):
        count = min(int(torch.randint(0, 9, (), generator=generator)), left)
        left -= count
        partition.append(torch.randint(-1, longest + 1, (count,), generator=generator).tolist())
    return partition


@BY
@pytest.mark.parametrize("max_rows", [3, 8])
def test_graph_replay_with_changing_boundaries_and_lengths(by: str, max_rows: int) -> None:
    """One capture of plan and logits for 48 rows and 16 requests; all else changes between replays."""
    rows, requests, longest = 48, 16, 3000
    generator = torch.Generator().manual_seed(5)

    def fresh(most: int) -> Step:
        partition = random_partition(rows, requests, generator, most)
        return random_ragged_step(
            partition, by=by, max_rows=max_rows, padding=rows - sum(map(len, partition)), num_pages=500,
            device="cuda", seed=most,
        )  # fmt: skip

    step = fresh(longest)
    step.max_context_len = longest
    step.block_table = torch.full((requests, longest // 64 + 2), -1, dtype=torch.int32, device="cuda")
    step.context_lens.zero_()
    plan = torch.empty(vllm_mqa_sm90.plan_shape(132, rows), dtype=torch.int32, device="cuda")
    out = poisoned(step)

    def run() -> None:
        step.plan(out=plan)
        step.logits(plan, out=out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    before = vllm_mqa_sm90.launch_counts()
    seen = set()
    for most in 1, 64, 65, 500, longest, longest, 900, 20:
        step.take(fresh(most))
        told = step.indices if by == "indices" else step.query_start_loc
        seen.add(tuple(told.tolist()))
        out.fill_(POISON)
        graph.replay()
        assert_accurate(out, step)
        expected = rows_alone(step).run(clean_logits=True)
        valid = expected > -torch.inf
        assert torch.equal(out[valid], expected[valid])
    assert len(seen) > 4
    after = vllm_mqa_sm90.launch_counts()
    # rows_alone() has next_n 1.
    assert after[max_rows] == before[max_rows] + 8 and after[1] == before[1] + 8


def test_overlapping_launches_change_no_bit() -> None:
    """Launches that overlap, in a graph, with spare shares counted in one plan."""
    step = random_ragged_step(large_requests(3, 300, 3000, 3), max_rows=3, num_pages=500, device="cuda")
    plan = step.plan(num_sms=40)
    assert plan[0, 1] > 0
    expected = rows_alone(step).run(clean_logits=True)
    outs = [poisoned(step) for _ in range(4)]
    torch.cuda.synchronize()
    step.logits(plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            step.logits(plan, out=out)
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    valid = expected > -torch.inf
    assert all(torch.equal(out[valid], expected[valid]) for out in outs)


@BY
def test_steps_without_any_tile_write_nothing(by: str) -> None:
    step = random_ragged_step([[0, -1], [], [-(2**31)]], by=by, padding=4, device="cuda")
    step.max_context_len = 200
    assert step.run(out=poisoned(step)).isnan().all()


def test_max_context_len_cuts_rows() -> None:
    step = random_ragged_step([[300, 100, 131], [129]], device="cuda")
    step.max_context_len = 130
    check(step)


def test_compile() -> None:
    step = random_ragged_step([[500, 501, 502], [64], [], [1, 2]], by="query_start_loc", max_rows=3, device="cuda")

    def call(starts: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        plan = vllm_mqa_sm90.plan(inputs[3], query_start_loc=starts, max_rows=3)
        return vllm_mqa_sm90.paged_mqa_logits(*inputs, plan, max_context_len=502, max_rows=3, clean_logits=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = (step.query_start_loc, *step.inputs())
    assert torch.equal(compiled(*arguments), call(*arguments))


@BY
@pytest.mark.parametrize("padding", [0, 1, 5, 100])
def test_clean_logits(padding: int, by: str) -> None:
    """Also of padding rows, whose lengths must not count where query_start_loc tells them."""
    lens = [[70, 71, 1], [], [5], [0, -3], list(range(600, 620)), [], [33, 32]]
    step = random_ragged_step(lens, by=by, padding=padding, max_rows=3, device="cuda")
    step.max_context_len = 700
    out = step.run(out=poisoned(step), clean_logits=True)
    assert_accurate(out, step)
    assert torch.equal(out == -torch.inf, step.reference() == -torch.inf) and not out.isnan().any()


def test_a_plan_for_narrower_groups_is_legal() -> None:
    step = random_ragged_step([[100, 101], [300], [5, 6]], max_rows=2, device="cuda")
    plan, expected = step.plan(), step.run(clean_logits=True)
    for step.max_rows in 3, 6, 8:
        assert torch.equal(step.logits(plan, clean_logits=True), expected)


@BY
def test_padded_plans_serve_launches_of_more_rows(by: str) -> None:
    """In a buffer where an older plan has left a longer table."""
    step = random_ragged_step([[900, 901], [300], [65], [2000, 2001, 2002], [700]], by=by, max_rows=3, device="cuda")
    plan, expected = step.plan(), step.run(clean_logits=True)
    few = {name: told[: 4 if by == "indices" else 3] for name, told in step.grouping().items() if told is not None}
    rows = 4 if by == "indices" else 3  # query_start_loc's two requests
    shape = vllm_mqa_sm90.plan_shape(torch.cuda.get_device_properties(0).multi_processor_count, rows)
    vllm_mqa_sm90.plan(step.context_lens[:rows].clone(), **few, max_rows=3, padded=True, out=plan[: shape[0]])
    out = step.logits(plan, out=poisoned(step))
    valid = expected[:rows] > -torch.inf
    assert torch.equal(out[:rows][valid], expected[:rows][valid]) and out[rows:].isnan().all()
    cleaned = step.logits(plan, out=poisoned(step), clean_logits=True)
    assert torch.equal(cleaned[:rows], expected[:rows]) and (cleaned[rows:] == -torch.inf).all()


FOREIGN_PLANS = {
    "wider groups": ("random_ragged_step([[100, 101, 102]], max_rows=3, device='cuda')", "step.max_rows = 2"),
    "wider groups of the same kernel": (
        "random_ragged_step([[100] * 6], max_rows=6, device='cuda')",
        "step.max_rows = 5",
    ),
    "other rows of a ragged step": (
        "random_ragged_step([[100, 101], [64]], by='query_start_loc', padding=1, max_rows=3, device='cuda')",
        "for name in ('q', 'weights', 'context_lens'): setattr(step, name, getattr(step, name)[:3])",
    ),
    "another next_n": (
        "random_step([[100, 101]] * 6, device='cuda')",
        "step.context_lens = step.context_lens.view(4, 3); step.q = step.q.view(4, 3, 64, 128)",
    ),
    "fewer rows": (
        "random_step([[100, 101]] * 6, device='cuda')",
        "step.context_lens, step.q, step.weights = step.context_lens[:5], step.q[:5], step.weights[:10]",
    ),
    "another k, of which all rows are kept": (
        "random_step([[100, 101]] * 6, device='cuda')",
        "plan = vllm_mqa_sm90.plan(step.context_lens, padded=True, k=101)",
    ),
    "no plan": ("random_step([[100, 101]] * 6, device='cuda')", "plan.zero_()"),
    "no plan but garbage": ("random_step([[100, 101]] * 6, device='cuda')", "plan.fill_(-1)"),
}


@pytest.mark.parametrize("case", FOREIGN_PLANS)
def test_plans_for_other_launches_stop_them(tmp_path: Path, case: str) -> None:
    """In a process of its own, as the CUDA context is lost."""
    made, changed = FOREIGN_PLANS[case]
    program = f"""
import torch
import vllm_mqa_sm90
from steps import random_ragged_step, random_step
step = {made}
plan = step.plan()
step.logits(plan)
torch.cuda.synchronize()
print("planned", flush=True)
{changed}
step.logits(plan)
torch.cuda.synchronize()
print("not stopped", flush=True)
"""
    paths = [str(Path(__file__).parent), str(Path(vllm_mqa_sm90.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["planned"], done.stderr
    assert done.returncode != 0 and "CUDA error" in done.stderr
