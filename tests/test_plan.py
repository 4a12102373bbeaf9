# SPDX-License-Identifier: Apache-2.0
"""The schedule: the plan and the kernel's own walk over it, on the host; the device's plan equals it."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import STALE_IDS, TILE, entries, group_table

import vllm_mqa_sm90
from vllm_mqa_sm90 import ops

lengths = st.one_of(
    st.integers(-3, 200),
    st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]),
    st.integers(-(2**31), 4096),
)
ks = st.sampled_from([0, 0, 1, 64, 512, 2048])


@st.composite
def steps(draw: st.DrawFn) -> torch.Tensor:
    next_n = draw(st.integers(1, 8))
    groups = draw(st.integers(0, 40))
    flat = draw(st.lists(lengths, min_size=groups * next_n, max_size=groups * next_n))
    return torch.tensor(flat, dtype=torch.int32).view(groups, next_n)


@dataclasses.dataclass
class RaggedStep:
    """Lengths by request, and the tensors that say the same."""

    requests: list[tuple[int, list[int]]]  # row of the block table, lengths
    context_lens: torch.Tensor
    grouping: dict[str, torch.Tensor]
    max_rows: int

    def groups(self) -> torch.Tensor:
        """(first row, rows, request, 0) of every group, in order."""
        groups, row = [], 0
        for request, lens in self.requests:
            for first in range(0, len(lens), self.max_rows):
                rows = min(self.max_rows, len(lens) - first)
                groups.append((row + first, rows, request, 0))
            row += len(lens)
        return torch.tensor(groups, dtype=torch.int32).view(-1, 4)


def ragged_step(requests: list[list[int]], by: str, max_rows: int, padding: int = 0) -> RaggedStep:
    """Padding rows have stale indices and no length, or lie past the last request and have one."""
    lens = [length for of_request in requests for length in of_request]
    if by == "indices":
        ids = [7 + len(requests) - i for i in range(len(requests))]
        flat = [id for id, of_request in zip(ids, requests, strict=True) for _ in of_request]
        # Padding rows are groups too, whose indices may be those of no request.
        stale = [STALE_IDS[i // 9 % len(STALE_IDS)] for i in range(padding)]
        told = [*zip(ids, requests, strict=True), *((id, [0] * len(list(run))) for id, run in itertools.groupby(stale))]
        told = [(id, of_request) for id, of_request in told if of_request]
        grouping = {"indices": torch.tensor(flat + stale, dtype=torch.int32)}
        lens = lens + [0] * padding
    else:
        told = list(enumerate(requests))
        bounds = [0, *itertools.accumulate(map(len, requests))]
        grouping = {"query_start_loc": torch.tensor(bounds, dtype=torch.int32)}
        lens = lens + [100] * padding
    return RaggedStep(told, torch.tensor(lens, dtype=torch.int32), grouping, max_rows)


@st.composite
def ragged_steps(draw: st.DrawFn) -> RaggedStep:
    requests = draw(st.lists(st.lists(lengths, max_size=11), max_size=30))
    by = draw(st.sampled_from(["indices", "query_start_loc"]))
    return ragged_step(requests, by, draw(st.integers(1, 8)), draw(st.integers(0, 30)))


def plan_for_ctas(context_lens: torch.Tensor, ctas: int, k: int = 0) -> torch.Tensor:
    """A plan for any number of CTAs, odd ones too, poisoned before it is written."""
    out = torch.full(vllm_mqa_sm90.plan_shape(ctas), -7, dtype=torch.int32, device=context_lens.device)
    return vllm_mqa_sm90.plan(context_lens, k=k, out=out)


def ragged_plan_for_ctas(step: RaggedStep, ctas: int, k: int = 0, device: str = "cpu") -> torch.Tensor:
    shape = vllm_mqa_sm90.plan_shape(ctas, len(step.context_lens))
    out = torch.full(shape, -7, dtype=torch.int32, device=device)
    grouping = {name: tensor.to(device) for name, tensor in step.grouping.items()}
    return vllm_mqa_sm90.plan(step.context_lens.to(device), **grouping, max_rows=step.max_rows, k=k, out=out)


def walk(
    plan: torch.Tensor, context_lens: torch.Tensor, ctas: int, max_rows: int | None = None, k: int = 0
) -> torch.Tensor:
    """(share, the group's first row, its rows, its request, tile) in the order of the kernel's walk."""
    tiles = int(entries(plan)[1 : vllm_mqa_sm90.plan_shape(ctas)[0], 2].sum())
    out = torch.full((tiles, 5), -7, dtype=torch.int32)
    torch.ops.vllm_mqa_sm90.walk(plan, context_lens, max_rows, k, out)
    return out


def uniform_groups(context_lens: torch.Tensor) -> torch.Tensor:
    """(first row, rows, request, 0) of every group."""
    groups, next_n = context_lens.shape
    request = torch.arange(groups)
    return torch.stack([request * next_n, torch.full_like(request, next_n), request, request * 0], dim=1).int()


def tiles_of(context_lens: torch.Tensor, groups: torch.Tensor, k: int) -> torch.Tensor:
    """Every (first row, rows, request, tile) of a step in group order, but of groups no longer than k."""
    flat = context_lens.flatten().long()
    longest = torch.tensor([int(flat[first : first + rows].max()) for first, rows, *_ in groups.tolist()]).view(-1)
    per_group = -(-longest.long().clamp(min=0) // TILE) * (longest > k)
    group = torch.repeat_interleave(torch.arange(len(per_group)), per_group)
    first = (per_group.cumsum(0) - per_group)[group]
    return torch.cat([groups[group, :3].int(), (torch.arange(len(group)) - first).int().unsqueeze(1)], dim=1)


VERSION = 4  # of the plan's layout


def check(context_lens: torch.Tensor, ctas: int, k: int = 0) -> None:
    check_shares(plan_for_ctas(context_lens, ctas, k), context_lens, uniform_groups(context_lens), ctas, k)


def check_ragged(step: RaggedStep, ctas: int, k: int = 0) -> None:
    plan, groups = ragged_plan_for_ctas(step, ctas, k), step.groups()
    table = torch.zeros(len(step.context_lens), 4, dtype=torch.int32)
    table[groups[:, 0].long()] = groups
    assert torch.equal(group_table(plan, ctas, len(table)), table)
    assert not entries(plan)[vllm_mqa_sm90.plan_shape(ctas)[0] + len(table) :].any()
    check_shares(plan, step.context_lens, groups, ctas, k, step.max_rows)


def check_shares(
    plan: torch.Tensor, context_lens: torch.Tensor, groups: torch.Tensor, ctas: int, k: int, max_rows: int | None = None
) -> None:
    """With `max_rows` of a ragged plan."""
    header, shares = entries(plan)[0].tolist(), entries(plan)[1 : vllm_mqa_sm90.plan_shape(ctas)[0]]
    visits = walk(plan, context_lens, ctas, max_rows, k)
    # In group order, every (group, tile) exactly once: so each share is contiguous too.
    assert torch.equal(visits[:, 1:], tiles_of(context_lens, groups, k))
    assert torch.equal(visits[:, 0], visits[:, 0].sort().values)
    assert torch.equal(torch.bincount(visits[:, 0], minlength=len(shares)), shares[:, 2].long())

    tiles = len(visits)
    short = min(tiles // 8 // 4, 4 * ctas) if tiles >= 16 * ctas else 0
    many, eighth = tiles >= 128 * ctas, tiles // 8 if short else 0
    sums = [tiles - (7 if many else 1) * eighth, 4 * many * eighth, 2 * many * eighth, eighth]
    counts = [ctas, many * ctas, many * ctas, short]
    spares = sum(counts[1:])
    kind = VERSION << 24 | k << 12 | (context_lens.shape[1] if max_rows is None else 1 << 8 | max_rows) | (not tiles) << 10
    assert header == [0, spares, context_lens.numel(), kind] and not shares[ctas + spares :].any()
    # Own shares, and spare ones in the order in which they are handed out; of each kind as equal as can be.
    for of_kind, expected in zip(shares[: ctas + spares, 2].split(counts), sums, strict=True):
        assert int(of_kind.sum()) == expected
        assert not len(of_kind) or int(of_kind.max() - of_kind.min()) <= 1
    assert not spares or int(shares[ctas : ctas + spares, 2].min()) >= 4


@settings(max_examples=300, deadline=None)
@given(steps(), st.integers(1, 300), ks)
def test_every_tile_once_and_balanced(context_lens: torch.Tensor, ctas: int, k: int) -> None:
    check(context_lens, ctas, k)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 3000), st.integers(0, 2**31), st.sampled_from([0, 4000]))
def test_large_batches(groups: int, next_n: int, ctas: int, seed: int, low: int) -> None:
    torch.manual_seed(seed)
    context_lens = torch.randint(-low, 5000, (groups, next_n), dtype=torch.int32)
    check(context_lens, ctas)


def test_very_long_contexts() -> None:
    check(torch.tensor([[2**26 + 1, 5], [131072, 131071]], dtype=torch.int32), 264)
    longest = torch.tensor([[2**31 - 1]], dtype=torch.int32)
    assert int(plan_for_ctas(longest, 264)[1:, 2].sum()) == 2**31 // TILE


def check_long_line(device: str) -> None:
    """More tiles than 31 bits tell: the shares hold all of them, and start where they must."""
    lens = torch.full((70, 1), 2**31 - 1, dtype=torch.int32, device=device)
    in_row = 2**31 // TILE
    plan = plan_for_ctas(lens, 132).cpu().long()
    spares = int(plan[0, 1])
    row, tile, tiles, packed = plan[1 : 1 + 132 + spares].unbind(1)
    assert spares == 6 * 132 and int(tiles.sum()) == 70 * in_row
    starts = tiles.cumsum(0) - tiles
    assert torch.equal(row, starts // in_row) and torch.equal(tile, starts % in_row)
    assert torch.equal(packed, 1 + 16 * row)
    groups = torch.arange(71, dtype=torch.int32, device=device)
    ragged = vllm_mqa_sm90.plan(lens.flatten(), query_start_loc=groups, num_sms=132)
    assert torch.equal(entries(ragged)[1:925].cpu().long(), plan[1:])


def test_lines_of_more_than_2_31_tiles() -> None:
    check_long_line("cpu")
    lens = torch.full((160, 1), 2**31 - 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="context_lens: expected at most 2.31 tiles of 64 tokens a CTA, given more"):
        plan_for_ctas(lens, 1)


@pytest.mark.gpu
def test_lines_of_more_than_2_31_tiles_on_the_device() -> None:
    check_long_line("cuda")


def test_empty_steps_have_plans_without_tiles() -> None:
    for context_lens in torch.empty((0, 3), dtype=torch.int32), torch.zeros((7, 2), dtype=torch.int32):
        assert not plan_for_ctas(context_lens, 5)[1:].any()


def test_flat_lengths_are_groups_of_one() -> None:
    lens = torch.tensor([100, 0, 65], dtype=torch.int32)
    flat = vllm_mqa_sm90.plan(lens, num_sms=2)
    assert flat.shape == vllm_mqa_sm90.plan_shape(2)
    assert torch.equal(flat, vllm_mqa_sm90.plan(lens.unsqueeze(1), num_sms=2))


@settings(max_examples=300, deadline=None)
@given(ragged_steps(), st.integers(1, 300), ks)
def test_ragged_every_tile_once_and_balanced(step: RaggedStep, ctas: int, k: int) -> None:
    check_ragged(step, ctas, k)


def random_requests(count: int, most_rows: int, low: int, high: int, seed: int) -> list[list[int]]:
    """Requests of 0 to most_rows rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, most_rows + 1, (count,), generator=generator).tolist()
    flat = torch.randint(low, high, (sum(rows),), generator=generator, dtype=torch.int32)
    return [of_request.tolist() for of_request in flat.split(rows)]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2000), st.sampled_from([1, 3, 8, 40]), st.integers(1, 8), st.integers(1, 3000),
    st.integers(0, 2**31), st.sampled_from([0, -4000]), st.sampled_from(["indices", "query_start_loc"]),
)  # fmt: skip
def test_large_ragged_batches(
    count: int, most_rows: int, max_rows: int, ctas: int, seed: int, low: int, by: str
) -> None:
    check_ragged(ragged_step(random_requests(count, most_rows, low, 5000, seed), by, max_rows, count % 7), ctas)


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 300), st.sampled_from(["indices", "query_start_loc"]))
def test_ragged_plan_of_a_uniform_step_is_the_uniform_plan(context_lens: torch.Tensor, ctas: int, by: str) -> None:
    groups, next_n = context_lens.shape
    start = torch.arange(groups + 1, dtype=torch.int32) * next_n
    grouping = {by: start if by == "query_start_loc" else (start[:-1] // next_n).repeat_interleave(next_n)}
    expected = plan_for_ctas(context_lens, ctas)
    for max_rows in {next_n, 8}:
        plan = vllm_mqa_sm90.plan(context_lens.flatten(), **grouping, max_rows=max_rows, num_sms=ctas)
        assert torch.equal(entries(plan)[1 : len(expected)], expected[1:])
        table = group_table(plan, ctas, context_lens.numel())
        assert torch.equal(table[::next_n], uniform_groups(context_lens))


def test_rows_of_one_index_apart_are_groups_of_their_own() -> None:
    lens, indices = torch.tensor([65, 1, 64, 2], dtype=torch.int32), torch.tensor([3, 3, 0, 3], dtype=torch.int32)
    plan = vllm_mqa_sm90.plan(lens, indices=indices, num_sms=1)
    assert group_table(plan, 1, 4).tolist() == [[0, 2, 3, 0], [0, 0, 0, 0], [2, 1, 0, 0], [3, 1, 3, 0]]
    assert entries(plan)[1].tolist() == [0, 0, 4, 2 + 16 * 3]


@pytest.mark.parametrize("shape", [(4, 3), (12, 3), (8, 2), (24, 1), (12, 2), (6, 4)], ids=str)
def test_a_plan_of_another_uniform_step_is_refused(shape: tuple[int, int]) -> None:
    """By the kernel's own check, on the host: other rows, fewer or more, and as many in other groups."""
    plan = vllm_mqa_sm90.plan(torch.full((8, 3), 1000, dtype=torch.int32), num_sms=7)
    with pytest.raises(RuntimeError, match=f"plan: expected a plan for {shape[0] * shape[1]} rows in groups of "):
        walk(plan, torch.full(shape, 1000, dtype=torch.int32), 7)


def test_a_ragged_plan_serves_launches_for_groups_as_wide_or_wider() -> None:
    step = ragged_step([[1000] * 3] * 8, "indices", 3)
    plan = ragged_plan_for_ctas(step, 7)
    expected = walk(plan, step.context_lens, 7, 3)
    for max_rows in 4, 8, None:
        assert torch.equal(walk(plan, step.context_lens, 7, max_rows), expected)
    for max_rows in 1, 2:
        with pytest.raises(RuntimeError, match=f"plan: expected a plan for 24 rows in groups of at most {max_rows}"):
            walk(plan, step.context_lens, 7, max_rows)
    # A step of one row more or less may have a plan of the same shape.
    assert vllm_mqa_sm90.plan_shape(7, 25) == vllm_mqa_sm90.plan_shape(7, 24) == plan.shape
    with pytest.raises(RuntimeError, match="plan: expected a plan for 25 rows in groups of at most 3"):
        walk(plan, torch.cat([step.context_lens, step.context_lens[:1]]), 7, 3)


def test_a_plan_for_another_k_is_refused() -> None:
    lens = torch.full((8, 3), 1000, dtype=torch.int32)
    for k, other in (0, 512), (512, 0), (512, 511):
        plan = vllm_mqa_sm90.plan(lens, k=k, num_sms=7)
        assert len(walk(plan, lens, 7, k=k)) == 8 * 16
        with pytest.raises(RuntimeError, match=f"plan: expected a plan for 24 rows in groups of 3, k {other}, given one for"):
            walk(plan, lens, 7, k=other)


@pytest.mark.parametrize("by", [None, "indices", "query_start_loc"])
def test_a_padded_plan_serves_launches_of_more_rows(by: str | None) -> None:
    """And leads to the tiles of its own rows alone, whatever the others' lengths and an older plan's table are."""
    few, many = [[200, 201]] * 3, [[1000, 1001]] * 8
    if by is None:
        made = [torch.tensor(lens, dtype=torch.int32) for lens in (few, many)]
        grouping = [{}, {}]
    else:
        steps = [ragged_step(lens, by, 2) for lens in (few, many)]
        made, grouping = [step.context_lens for step in steps], [{**step.grouping, "max_rows": 2} for step in steps]
    rows = None if by is None else 2
    buffer = vllm_mqa_sm90.plan(made[1], **grouping[1], num_sms=7)
    shape = vllm_mqa_sm90.plan_shape(7, None if by is None else made[0].numel())
    vllm_mqa_sm90.plan(made[0], **grouping[0], padded=True, out=buffer[: shape[0]])
    launch = made[1].clone()
    launch[: len(made[0])] = made[0]
    assert torch.equal(walk(buffer, launch, 7, rows), walk(buffer[: shape[0]], made[0], 7, rows))
    assert len(walk(buffer, launch, 7, rows)) == 3 * 4

    # Not of fewer rows, of another next_n, or of another kind; nor unless it says so.
    fewer = vllm_mqa_sm90.plan(made[1], **grouping[1], padded=True, num_sms=7)
    with pytest.raises(RuntimeError, match="plan: expected a plan for 6 rows in groups of"):
        walk(fewer[: shape[0]], made[0], 7, rows)
    if by is None:
        with pytest.raises(RuntimeError, match="plan: expected a plan for 16 rows in groups of 4"):
            walk(buffer, launch.view(4, 4), 7)
    vllm_mqa_sm90.plan(made[0], **grouping[0], out=buffer[: shape[0]])
    with pytest.raises(RuntimeError, match="plan: expected a plan for 16 rows in groups of"):
        walk(buffer, launch, 7, rows)


def test_a_padded_plan_without_tiles_serves_any_launch() -> None:
    none = torch.zeros(6, dtype=torch.int32)
    uniform = vllm_mqa_sm90.plan(none.view(2, 3), padded=True, num_sms=7)
    assert not len(walk(uniform, torch.full((9, 1), 100, dtype=torch.int32), 7))
    starts = torch.zeros(3, dtype=torch.int32)
    ragged = vllm_mqa_sm90.plan(none, query_start_loc=starts, padded=True, num_sms=7)
    as_uniform = ragged.view(-1, 4)[: len(uniform)]
    assert not len(walk(as_uniform, torch.full((4, 1), 100, dtype=torch.int32), 7))
    strict = vllm_mqa_sm90.plan(none.view(2, 3), num_sms=7)
    with pytest.raises(RuntimeError, match="plan: expected a plan for 9 rows in groups of 1"):
        walk(strict, torch.full((9, 1), 100, dtype=torch.int32), 7)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_padded_plan_without_tiles_serves_no_launch_with_another_k(ragged: bool) -> None:
    """All rows are kept whole by that k: for a launch with another their logits would be missing."""
    short = torch.tensor([510, 511, 512], dtype=torch.int32)
    starts = {"query_start_loc": torch.tensor([0, 3], dtype=torch.int32)} if ragged else {}
    plan = vllm_mqa_sm90.plan(short if ragged else short.view(1, 3), **starts, padded=True, k=512, num_sms=7)
    as_uniform = plan.view(-1, 4)[: vllm_mqa_sm90.plan_shape(7)[0]]
    other = torch.full((9, 1), 100, dtype=torch.int32)
    assert not len(walk(as_uniform, other, 7, k=512))
    for k in 0, 511, 2048:
        with pytest.raises(RuntimeError, match=f"plan: expected a plan for 9 rows in groups of 1, k {k}, given one for"):
            walk(as_uniform, other, 7, k=k)


@pytest.mark.parametrize("ragged", [False, True])
def test_what_was_never_planned_is_refused(ragged: bool) -> None:
    lens = torch.full((6,), 1000, dtype=torch.int32)
    for garbage in 0, -1, 6:
        plan = torch.full(vllm_mqa_sm90.plan_shape(7, 6 if ragged else None), garbage, dtype=torch.int32)
        plan.view(-1, 4)[1:] = 0
        with pytest.raises(RuntimeError, match="plan: expected a plan for 6 rows in groups of"):
            walk(plan, lens, 7, 8 if ragged else None)


@pytest.mark.parametrize("bounds", [[0, 9], [-5, 2, 4], [3, 1, 7], [0, 2, 2**31 - 1], [2**31 - 1, -(2**31)]])
def test_bounds_that_are_wrong_stay_within_the_step(bounds: list[int]) -> None:
    """The plan is of no use, but neither it nor the walk over it may leave the step's rows."""
    lens = torch.full((5,), 100, dtype=torch.int32)
    start = torch.tensor(bounds, dtype=torch.int32)
    storage = torch.full((30, 8), -7, dtype=torch.int32)
    plan = storage[10 : 10 + vllm_mqa_sm90.plan_shape(1, 5)[0]]
    vllm_mqa_sm90.plan(lens, query_start_loc=start, max_rows=2, out=plan)
    assert (storage[:10] == -7).all() and (storage[10 + len(plan) :] == -7).all()
    first, rows, *_ = group_table(plan, 1, 5).unbind(1)
    assert bool(((first >= 0) & (rows >= 0) & (first + rows <= 5)).all())


def test_shapes_of_plans_tell_ragged_from_uniform_and_their_ctas() -> None:
    uniform = {vllm_mqa_sm90.plan_shape(n) for n in range(1, 300)}
    assert len(uniform) == 299
    for rows in range(700):
        ragged = {vllm_mqa_sm90.plan_shape(n, rows) for n in range(1, 150)}
        assert len(ragged) == 149 and not ragged & uniform
    assert not ops.is_ragged(torch.empty(vllm_mqa_sm90.plan_shape(3)))
    assert ops.is_ragged(torch.empty(vllm_mqa_sm90.plan_shape(3, 0)))


@st.composite
def requests_of_rows(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    """(tokens, rows) of each request, fewer tokens than rows too, as padding has; and rows past them."""
    tokens = st.integers(-(2**31), 2**31 - 1) | st.integers(0, 9) | st.sampled_from([-(2**31), 2**31 - 1])
    requests = draw(st.lists(st.tuples(tokens, st.integers(0, 9)), max_size=40))
    return requests, draw(st.integers(0, 30))


@settings(max_examples=200, deadline=None)
@given(requests_of_rows())
def test_row_lens(drawn: tuple[list[tuple[int, int]], int]) -> None:
    requests, padding = drawn
    expected = [max(tokens - rows + 1 + row, 0) for tokens, rows in requests for row in range(rows)] + [0] * padding
    assert row_lens(requests, padding).tolist() == expected


def row_lens(requests: list[tuple[int, int]], padding: int, device: str = "cpu") -> torch.Tensor:
    tokens, rows = torch.tensor(requests, dtype=torch.int32, device=device).view(-1, 2).unbind(1)
    starts = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()
    out = torch.full((int(starts[-1]) + padding,), -7, dtype=torch.int32, device=device)
    assert vllm_mqa_sm90.row_context_lens(tokens.contiguous(), starts, out=out) is out
    return out


@pytest.mark.parametrize("bounds", [[0, 9], [-5, 2, 4], [3, 1, 7], [0, 2, 2**31 - 1], [2**31 - 1, -(2**31)]])
def test_row_lens_of_wrong_bounds_stay_within_the_step(bounds: list[int]) -> None:
    storage = torch.full((30,), -7, dtype=torch.int32)
    lens, starts = torch.full((len(bounds) - 1,), 100, dtype=torch.int32), torch.tensor(bounds, dtype=torch.int32)
    vllm_mqa_sm90.row_context_lens(lens, starts, out=storage[10:15])
    assert (storage[:10] == -7).all() and (storage[15:] == -7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 31, 256, 1025])
def test_device_row_lens_equal_host_row_lens(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tokens, rows = (torch.randint(high, (count,), generator=generator) for high in (200000, 9))
    requests = list(zip(tokens.tolist(), rows.tolist(), strict=True))
    for padding in 0, 1, 700:
        assert torch.equal(row_lens(requests, padding, "cuda").cpu(), row_lens(requests, padding))


@pytest.mark.gpu
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("groups", [0, 1, 2, 31, 256, 1023, 1024, 1025, 4096, 5000])
def test_device_plan_equals_host_plan(groups: int, next_n: int) -> None:
    torch.manual_seed(groups * 8 + next_n)
    for high in 2, 300, 140000:
        context_lens = torch.randint(-high // 2, high, (groups, next_n), dtype=torch.int32)
        for ctas in 1, 2, 132, 1025:
            k = 512 * (ctas % 2)
            expected = plan_for_ctas(context_lens, ctas, k)
            assert torch.equal(plan_for_ctas(context_lens.cuda(), ctas, k).cpu(), expected), (high, ctas)


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["indices", "query_start_loc"])
@pytest.mark.parametrize("count", [1, 2, 31, 256, 682, 1024, 2500])
def test_device_ragged_plan_equals_host_plan(count: int, by: str) -> None:
    """Steps of one thread a row and of several; requests of many groups that span threads' chunks."""
    for most_rows, low, high in (3, -1, 300), (8, 0, 140000), (50, -300, 300):
        requests = random_requests(count, most_rows, low, high, seed=count + most_rows)
        for max_rows in 1, 3, 8:
            step = ragged_step(requests, by, max_rows, padding=count % 40)
            for ctas in 1, 2, 132, 1025:
                k = 512 * (ctas % 2)
                given = ragged_plan_for_ctas(step, ctas, k, "cuda").cpu()
                assert torch.equal(given, ragged_plan_for_ctas(step, ctas, k)), (most_rows, max_rows, ctas)


@pytest.mark.gpu
def test_default_plan_has_the_devices_sms() -> None:
    plan = vllm_mqa_sm90.plan(torch.ones(3, 2, dtype=torch.int32, device="cuda"))
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert plan.shape == vllm_mqa_sm90.plan_shape(sms) and plan.is_cuda
