# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against the formula written out as loops over bytes."""

import dataclasses
import math
import re
from collections.abc import Callable

import pytest
import torch
from steps import HEAD_DIM, Step, random_ragged_step, random_step

from vllm_mqa_sm90 import reference


def direct(step: Step) -> torch.Tensor:
    """One logit at a time, in float64."""
    groups, next_n, heads, _ = step.q.shape
    page = step.kv_cache.shape[1]
    logits = torch.full((groups * next_n, step.max_context_len), -math.inf, dtype=torch.float64)
    for group in range(groups):
        for row in range(next_n):
            for s in range(int(step.context_lens[group, row])):
                page_bytes = step.kv_cache[int(step.block_table[group, s // page])].reshape(-1)
                at = s % page
                key = page_bytes[at * HEAD_DIM : (at + 1) * HEAD_DIM].view(torch.float8_e4m3fn).double()
                scale = page_bytes[page * HEAD_DIM + at * 4 :][:4].clone().view(torch.float32).double()
                total = 0.0
                for h in range(heads):
                    dot = float(step.q[group, row, h].double() @ key)
                    total += float(step.weights[group * next_n + row, h]) * max(dot, 0.0)
                logits[group * next_n + row, s] = total * scale
    return logits


@pytest.mark.parametrize("page", [32, 64])
@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
def test_equals_direct_loop(next_n: int, page: int) -> None:
    lens = [[70, 71, 1, 0], [-5, 0, 33, 2]]
    step = random_step([row[:next_n] for row in lens], heads=16, page=page, gap=48)
    expected = direct(step)
    given = step.reference()
    assert torch.equal(torch.isinf(given), torch.isinf(expected))
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-4)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    step = random_step([[300, 299], [128, 7], [0, 65]], heads=16)
    whole = step.reference()
    monkeypatch.setattr(reference, "_CHUNK_TOKENS", 64)
    torch.testing.assert_close(step.reference(), whole)


def special_values_step(device: str = "cpu") -> Step:
    """Four rows over 70 tokens with NaN keys (3, 64), a NaN scale (5), a NaN query head and heads that all clip."""
    step = random_step([[67, 68, 69, 70]], heads=16, device=device)
    page, (first, second) = step.kv_cache.shape[1], step.block_table[0, :2].tolist()
    pages = step.kv_cache.view(len(step.kv_cache), -1)
    for token in 3, 64:
        of_token = pages[first if token < page else second]
        of_token[token % page * HEAD_DIM + 7] = 0xFF
    pages[first][page * HEAD_DIM + 5 * 4 : page * HEAD_DIM + 6 * 4] = 0xFF
    step.q.view(torch.uint8)[0, 1, 2, 9] = 0x7F  # row 1, head 2
    step.q.view(torch.uint8)[0, 2] = 0  # row 2: every score is 0
    step.weights[2] = torch.tensor([-1.0, 1.0], device=device).repeat(8)
    step.weights[3] = -step.weights[3].abs()
    return step


def assert_special_values(logits: torch.Tensor, step: Step) -> None:
    """As the docstrings of op and reference say."""
    scale_of_5, rest = logits[:, 5], torch.arange(67, device=logits.device) != 5
    assert scale_of_5.isnan().all()
    assert logits[:, :67][:, rest].isfinite().all()
    zeros = torch.cat([logits[:, 3], logits[:, 64], logits[2, :67][rest]])
    assert (zeros == 0).all() and not zeros.signbit().any()
    without = step.q.clone()
    without.view(torch.uint8)[0, 1, 2] = 0
    expected = dataclasses.replace(step, q=without).reference()
    torch.testing.assert_close(logits[1, :67][rest], expected[1, :67][rest], rtol=1e-3, atol=1e-2)


def test_nan_and_zero() -> None:
    step = special_values_step()
    assert_special_values(step.reference(), step)


def test_flat_rows_are_groups_of_one() -> None:
    step = random_step([[100], [7]], heads=32)
    flat = reference.paged_mqa_logits(
        step.q.squeeze(1), step.kv_cache, step.weights, step.context_lens.squeeze(1), step.block_table,
        max_context_len=step.max_context_len,
    )  # fmt: skip
    assert torch.equal(flat, step.reference())


@pytest.mark.parametrize("by", ["indices", "query_start_loc"])
def test_rows_of_a_ragged_step_are_those_of_their_request_alone(by: str) -> None:
    """Requests of 0 to 10 rows, padding rows with and without lengths."""
    lens = [[70, 71, 1], [], [5], [0, -3], list(range(60, 70)), [], [33, 32]]
    step = random_ragged_step(lens, by=by, padding=4, heads=16, page=32)
    given = step.reference()
    row = 0
    for request, of_request in enumerate(lens):
        for length in of_request:
            table_row = request if by == "query_start_loc" else int(step.indices[row])
            alone = Step(
                step.q[row].view(1, 1, 16, HEAD_DIM), step.kv_cache, step.weights[row : row + 1],
                torch.tensor([[length]]), step.block_table[table_row : table_row + 1], step.max_context_len,
            )  # fmt: skip
            expected = direct(alone)[0]
            assert torch.equal(torch.isinf(given[row]), torch.isinf(expected))
            torch.testing.assert_close(given[row].double(), expected, rtol=1e-5, atol=1e-4)
            row += 1
    assert len(given) == row + 4 and torch.isinf(given[row:]).all()


def change(name: str, function: Callable[[torch.Tensor], object]) -> Callable[[dict], dict]:
    return lambda arguments: {**arguments, name: function(arguments[name])}


def arguments_of(step: Step) -> dict[str, object]:
    names = ("q", "kv_cache", "weights", "context_lens", "block_table")
    grouping = {name: given for name, given in step.grouping().items() if given is not None}
    return {**dict(zip(names, step.inputs(), strict=True)), "max_context_len": step.max_context_len, **grouping}


def set_entry(row: int, column: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table[row, column] = value
        return table

    return changed


# Of two requests of two rows, 16 heads, pages of 64: (the change, what the error says).
MISUSES = [
    (change("q", lambda t: t.tolist()), "q: expected a tensor, given list"),
    (change("context_lens", lambda t: None), "context_lens: expected a tensor, given NoneType"),
    (change("max_context_len", float), "max_context_len: expected an int, given float"),
    (change("max_context_len", lambda n: -n), "max_context_len: expected at least 0, given -71"),
    (change("q", lambda t: t.float()), "q: expected dtype torch.float8_e4m3fn, given dtype torch.float32"),
    (change("kv_cache", lambda t: t.view(torch.int8)), "kv_cache: expected dtype torch.uint8, given dtype torch.int8"),
    (change("weights", lambda t: t.half()), "weights: expected dtype torch.float32, given dtype torch.float16"),
    (change("context_lens", lambda t: t.long()), "context_lens: expected dtype torch.int32, given dtype torch.int64"),
    (change("block_table", lambda t: t.long()), "block_table: expected dtype torch.int32, given dtype torch.int64"),
    (change("weights", lambda t: t.to("meta")), "weights: expected device cpu, as q, given device meta"),
    (change("context_lens", lambda t: t[None]), "context_lens: expected shape [B, next_n] or [T], given shape [1, 2, 2]"),
    (change("q", lambda t: t[:1]), "q: expected shape [4, H, 128] or [2, 2, H, 128], as context_lens, given shape [1, 2, 16, 128]"),
    (change("q", lambda t: t[..., :64]), "q: expected shape [4, H, 128] or [2, 2, H, 128], as context_lens, given shape [2, 2, 16, 64]"),
    (change("q", lambda t: t.flatten()), "q: expected shape [4, H, 128] or [2, 2, H, 128], as context_lens, given shape [8192]"),
    (change("kv_cache", lambda t: t.squeeze(2)), "kv_cache: expected shape [pages, page, 1, 132], page 32 or 64, given shape [4, 64, 132]"),
    (change("kv_cache", lambda t: t[:, :48]), "kv_cache: expected shape [pages, page, 1, 132], page 32 or 64, given shape [4, 48, 1, 132]"),
    (change("weights", lambda t: t[:3]), "weights: expected shape [4, 16], given shape [3, 16]"),
    (change("block_table", lambda t: t[0]), "block_table: expected shape [R, pages] with R >= 2, given shape [3]"),
    (change("block_table", lambda t: t[:1]), "block_table: expected shape [R, pages] with R >= 2, given shape [1, 3]"),
    (
        change("block_table", lambda t: t[:, :1]),
        "block_table: expected at least 2 columns, for the 71 tokens of request 0, given shape [2, 1]",
    ),
    (
        change("block_table", set_entry(1, 0, -1)),
        "block_table: expected ids of the 4 pages within the context of request 1, given [-1]",
    ),
    (
        change("block_table", set_entry(0, 1, 4)),
        "block_table: expected ids of the 4 pages within the context of request 0, given [4]",
    ),
]


@pytest.mark.parametrize(("misuse", "says"), MISUSES, ids=[says[:60] for _, says in MISUSES])
def test_misuse_is_named(misuse: Callable[[dict], dict], says: str) -> None:
    right = arguments_of(random_step([[70, 71], [5, 6]], heads=16))
    reference.paged_mqa_logits(**right)
    with pytest.raises((TypeError, ValueError), match=f"^vllm_mqa_sm90: {re.escape(says)}$"):
        reference.paged_mqa_logits(**misuse(right))


RAGGED_MISUSES = [
    ("indices", change("context_lens", lambda t: t.view(3, 1)), "context_lens: expected shape [T], as the step is ragged, given"),
    ("indices", change("indices", lambda t: t[:2]), "indices: expected shape [3], as context_lens, given shape [2]"),
    ("indices", change("indices", lambda t: t.long()), "indices: expected dtype torch.int32, given dtype torch.int64"),
    ("indices", change("indices", lambda t: t + 1), "block_table: expected a row for request 2, given shape [2, 3]"),
    ("indices", change("indices", lambda t: t - 2), "block_table: expected a row for request -"),
    (
        "indices",
        lambda arguments: {**arguments, "query_start_loc": arguments["indices"]},
        "indices: expected either indices or query_start_loc, given both",
    ),
    ("query_start_loc", change("query_start_loc", lambda t: t[:0]), "query_start_loc: expected shape [R + 1], given shape [0]"),
    (
        "query_start_loc",
        change("query_start_loc", lambda t: t.flip(0)),
        "query_start_loc: expected numbers from 0 to 3 that do not decrease, given [3, 2, 0]",
    ),
    ("query_start_loc", change("query_start_loc", lambda t: t + 1), "query_start_loc: expected numbers from 0 to 3 that"),
    ("query_start_loc", change("block_table", lambda t: t[:1]), "block_table: expected a row for request 1, given shape [1, 3]"),
]


@pytest.mark.parametrize(("by", "misuse", "says"), RAGGED_MISUSES, ids=[says[:60] for *_, says in RAGGED_MISUSES])
def test_misuse_of_a_ragged_step_is_named(by: str, misuse: Callable[[dict], dict], says: str) -> None:
    right = arguments_of(random_ragged_step([[70, 71], [5]], by=by, heads=16))
    reference.paged_mqa_logits(**right)
    with pytest.raises((TypeError, ValueError), match=f"^vllm_mqa_sm90: {re.escape(says)}"):
        reference.paged_mqa_logits(**misuse(right))


def test_a_table_need_not_reach_past_max_context_len() -> None:
    step = random_step([[100, 90]], heads=16)
    whole = step.reference()
    step.max_context_len, step.block_table = 40, step.block_table[:, :1]
    torch.testing.assert_close(step.reference(), whole[:, :40])


def test_lengths_are_cut_at_max_context_len() -> None:
    step = random_step([[100, 90]], heads=16)
    whole = step.reference()
    step.max_context_len = 40
    torch.testing.assert_close(step.reference(), whole[:, :40])


def test_long_context_in_little_memory() -> None:
    """131072 tokens by 8 rows: whole score matrices would take 268 MB of FP32 per request."""
    step = random_step([[131072, 131071, 131070, 131069]] * 2, heads=64, num_pages=64)
    logits = step.reference()
    assert logits.shape == (8, 131072)
    assert torch.isfinite(logits[0]).all()
    assert torch.isinf(logits[7, 131069:]).all() and torch.isfinite(logits[7, :131069]).all()
