# SPDX-License-Identifier: Apache-2.0
"""Selection on a GPU: always the very indices that the tie rule says."""

import itertools

import pytest
import selections
import torch
from steps import random_ragged_step, random_step

import vllm_mqa_sm90
from vllm_mqa_sm90 import reference

pytestmark = pytest.mark.gpu

K = 2048
SENTINEL = -77


def lens_of(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device="cuda")


def select(logits: torch.Tensor, lens: torch.Tensor, k: int) -> torch.Tensor:
    """Into a view, of which nothing around may change."""
    storage = torch.full((len(logits) + 2, k + 5), SENTINEL, dtype=torch.int32, device="cuda")
    out = storage[1:-1, 2:-3]
    vllm_mqa_sm90.topk_indices(logits, lens, k, out=out)
    chosen = out.clone()
    out.fill_(SENTINEL)
    assert (storage == SENTINEL).all(), "written outside of the indices"
    return chosen


@pytest.mark.parametrize("columns", [1, 100, 2047, 2049, 4096, 4099, 8192, 20001, 131072, 300000])
@pytest.mark.parametrize("kind", selections.KINDS)
def test_every_kind_of_row(kind: str, columns: int) -> None:
    """By the widest clusters, and by the next."""
    logits = selections.rows(kind, 7, columns)
    lens = lens_of(columns, K + 1, columns - 1, K, 0, columns + 9, -(2**31))
    for rows, k in itertools.product((5, 7), (K, 512, 1)):
        assert torch.equal(select(logits[:rows], lens[:rows], k), selections.expected(logits[:rows], lens[:rows], k))


@pytest.mark.parametrize("columns", [9000, 33000, 66000])
@pytest.mark.parametrize("count", [1, 6, 7, 8, 9, 24, 25, 48, 49, 66, 67, 132, 133, 264, 265, 768, 5000])
def test_rows_do_not_depend_on_their_number(count: int, columns: int) -> None:
    """All launches there are (csrc/selection/launch.cu), and more rows than fit at once."""
    if count * columns > 60_000_000:
        columns = 9000
    logits = selections.rows("few values", min(count, 64), columns)
    logits = torch.cat([logits] * -(-count // 64))[:count] if count > 64 else logits
    lens = (torch.arange(count, device="cuda") * 1237 % (columns + 100)).int()
    indices = select(logits, lens, K)
    assert torch.equal(indices, selections.expected(logits, lens, K))
    for row in {0, count // 2, count - 1}:
        assert torch.equal(select(logits[row : row + 1], lens[row : row + 1], K)[0], indices[row])


def test_expected_is_the_reference() -> None:
    for kind in selections.KINDS:
        logits, lens = selections.rows(kind, 3, 700), lens_of(700, 333, 5)
        for k in 100, 512:
            assert torch.equal(selections.expected(logits, lens, k), reference.topk_indices(logits, lens, k))


@pytest.mark.parametrize("columns", [1 << 20, 5_000_000])
def test_long_rows(columns: int) -> None:
    logits = selections.rows("normal", 150, columns) if columns < 1 << 21 else selections.rows("few values", 2, columns)
    lens = (columns - torch.arange(len(logits), device="cuda") * 6_000).int()
    for rows in {2, len(logits)}:
        assert torch.equal(select(logits[:rows], lens[:rows], K), selections.expected(logits[:rows], lens[:rows], K))


def test_logits_past_the_length_are_not_read() -> None:
    """They are larger than all others."""
    logits = selections.rows("normal", 40, 30000)
    lens = (torch.arange(40, device="cuda") * 700 + 2100).int()
    expected = selections.expected(logits, lens, K)
    logits.masked_fill_(torch.arange(30000, device="cuda") >= lens[:, None], torch.inf)
    assert torch.equal(select(logits, lens, K), expected)


@pytest.mark.parametrize("rows", [2, 20, 60, 300])
def test_no_logits(rows: int) -> None:
    chosen = vllm_mqa_sm90.topk_indices(torch.empty(rows, 64, device="cuda")[:, :0], lens_of(*[5] * rows), K)
    assert (chosen == -1).all()


def test_the_last_row_ends_with_the_memory() -> None:
    logits = selections.rows("normal", 5, 9024)
    lens = lens_of(*[9024] * 5)
    assert logits.is_contiguous() and torch.equal(select(logits, lens, K), selections.expected(logits, lens, K))


def test_graph_replays_with_other_lengths() -> None:
    logits, lens = selections.rows("two values", 24, 50000), lens_of(*[50000] * 24)
    out = torch.empty(24, K, dtype=torch.int32, device="cuda")
    vllm_mqa_sm90.topk_indices(logits, lens, K, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vllm_mqa_sm90.topk_indices(logits, lens, K, out=out)
    for seed in range(20):
        logits.copy_(selections.rows(selections.KINDS[seed % len(selections.KINDS)], 24, 50000, seed))
        lens.copy_(torch.randint(-5, 50005, (24,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, selections.expected(logits, lens, K))


def test_two_streams() -> None:
    """Launches that overlap have nothing in common."""
    made = [(selections.rows(kind, rows, 60000, 3), lens_of(*[60000 - 11 * row for row in range(rows)])) for kind, rows in (("normal", 8), ("few values", 150))]
    outs = [torch.empty(len(logits), K, dtype=torch.int32, device="cuda") for logits, _ in made]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, (logits, lens), out in zip(streams, made, outs, strict=True):
            with torch.cuda.stream(stream):
                vllm_mqa_sm90.topk_indices(logits, lens, K, out=out)
    torch.cuda.synchronize()
    for (logits, lens), out in zip(made, outs, strict=True):
        assert torch.equal(out, selections.expected(logits, lens, K))


@pytest.mark.parametrize("k", [1, 512, 2048])
@pytest.mark.parametrize("ragged", [False, True])
def test_index_topk(ragged: bool, k: int) -> None:
    """The same from a plan without the groups that keep all; of those no logit is written."""
    lengths = [[max(0, length - 2 + row) for row in range(3)] for length in (k, k + 1, k + 2, 0, 9000, 1, 64, 3000, k)]
    step = random_ragged_step(lengths, num_pages=300, max_rows=3, device="cuda") if ragged else random_step(lengths, num_pages=300, device="cuda")
    expected = selections.expected(step.run(), step.context_lens, k)
    logits = torch.full((27, 9024), torch.nan, device="cuda")[:, : step.max_context_len]
    options = {"max_context_len": step.max_context_len, "max_rows": step.max_rows}
    plan = step.plan(k=k)
    indices = vllm_mqa_sm90.index_topk(*step.inputs(), plan, k, **options, logits=logits)
    assert torch.equal(indices, expected)
    kept_all = step.context_lens.view(-1, 3).amax(dim=1) <= k
    assert logits.view(torch.int32).view(9, 3, -1)[kept_all].eq(torch.tensor(torch.nan).view(torch.int32)).all()
    assert torch.equal(vllm_mqa_sm90.index_topk(*step.inputs(), plan, k, **options), expected)


@pytest.mark.parametrize("ragged", [False, True])
def test_after_the_logits_kernel(ragged: bool) -> None:
    """Launched behind it without waiting: nothing is read before it is written."""
    lengths = [[9000 + 400 * r + row for row in range(3)] for r in range(20)]
    step = random_ragged_step(lengths, num_pages=500, device="cuda") if ragged else random_step(lengths, num_pages=500, device="cuda")
    plan = step.plan()
    logits = torch.empty(60, -(-step.max_context_len // 64) * 64, device="cuda")[:, : step.max_context_len]
    for turn in range(20):
        logits.fill_(turn)
        step.logits(plan, out=logits)
        indices = vllm_mqa_sm90.topk_indices(logits, step.context_lens, K)
        assert torch.equal(indices, selections.expected(logits, step.context_lens, K))
