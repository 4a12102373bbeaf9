# SPDX-License-Identifier: Apache-2.0
"""Misuse: every error names the argument, what was expected and what was given.

CPU tensors pass through the same checks as CUDA tensors before the op refuses them, so all but the
checks of devices run without a GPU.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from steps import random_ragged_step, random_step

import vllm_mqa_sm90
from vllm_mqa_sm90 import ops

Arguments = dict[str, object]


def valid_arguments(device: str = "cpu") -> Arguments:
    """Three requests of two rows, 32 heads, pages of 64."""
    step = random_step([[70, 71], [5, 6], [0, 130]], heads=32, device=device)
    return {
        "q": step.q,
        "kv_cache": step.kv_cache,
        "weights": step.weights,
        "context_lens": step.context_lens,
        "block_table": step.block_table,
        "plan": vllm_mqa_sm90.plan(step.context_lens, num_sms=4),
        "max_context_len": 130,
        "out": torch.empty(6, 130, device=device),
    }


def valid_ragged_arguments() -> Arguments:
    """Groups of two rows and one, and a padding row."""
    arguments = valid_arguments()
    lens, starts = torch.tensor([70, 71, 5, 0], dtype=torch.int32), torch.tensor([0, 2, 3], dtype=torch.int32)
    return {
        **arguments,
        "q": arguments["q"].flatten(0, 1)[:4],
        "weights": arguments["weights"][:4],
        "context_lens": lens,
        "plan": vllm_mqa_sm90.plan(lens, query_start_loc=starts, num_sms=4),
        "max_rows": 2,
        "out": arguments["out"][:4],
    }


def change(name: str, function: Callable) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, name: function(arguments[name])}


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further on in memory."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return storage[1:].view(tensor.shape).copy_(tensor)


def cache_of(page: int, stride: int, pages: int = 4) -> torch.Tensor:
    return torch.zeros(pages * stride + page * 132, dtype=torch.uint8).as_strided(
        (pages, page, 1, 132), (stride, 132, 132, 1)
    )


def head_count(heads: int) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {
        **arguments,
        "q": torch.zeros(3, 2, heads, 128, dtype=torch.float8_e4m3fn),
        "weights": torch.zeros(6, heads),
    }


def next_n(rows: int) -> Callable[[Arguments], Arguments]:
    return change("context_lens", lambda _: torch.zeros(3, rows, dtype=torch.int32))


# (what is wrong, the change that makes it so, what the error must say)
MISUSES = [
    ("q dtype", change("q", lambda t: t.bfloat16()), "q: expected dtype float8_e4m3fn, given dtype bfloat16"),
    ("q rows", change("q", lambda t: t[:2]), r"q: expected shape \[3, 2, H, 128\] .*given shape \[2, 2, 32, 128\]"),
    ("q groups", change("q", lambda t: t.view(2, 3, 32, 128)), r"q: expected shape .*given shape \[2, 3, 32, 128\]"),
    ("q dims", change("q", lambda t: t.view(6, -1)), r"q: expected shape .*given shape \[6, 4096\]"),
    ("q head dim", change("q", lambda t: t.view(3, 2, 64, 64)), r"q: expected head dimension 128 .*64, 64\]"),
    ("q strides", change("q", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)), "q: expected a contiguous"),
    ("q address", change("q", misaligned), "q: expected an address that is a multiple of 16 bytes, given address 0x"),
    ("8 heads", head_count(8), r"q: expected 16, 32 or 64 heads .*given shape \[3, 2, 8, 128\]"),
    ("128 heads", head_count(128), r"q: expected 16, 32 or 64 heads .*given shape \[3, 2, 128, 128\]"),
    ("kv dtype", change("kv_cache", lambda t: t.view(torch.int8)), "kv_cache: expected dtype uint8, given dtype Char"),
    ("kv dims", change("kv_cache", lambda t: t.squeeze(2)), r"kv_cache: expected shape \[pages, page, 1, 132\]"),
    (
        "kv token",
        change("kv_cache", lambda t: t[..., :128]),
        r"kv_cache: expected shape .*given shape \[\d+, 64, 1, 128",
    ),
    ("no pages", change("kv_cache", lambda t: t[:0]), r"kv_cache: expected .*at least one page, given shape \[0, 64"),
    ("page 16", change("kv_cache", lambda _: cache_of(16, 16 * 132)), "kv_cache: expected pages of 32 or 64 tokens"),
    ("page 128", change("kv_cache", lambda _: cache_of(128, 128 * 132)), "kv_cache: expected pages of 32 or 64 tokens"),
    ("loose page", change("kv_cache", lambda t: t.repeat(1, 2, 1, 1)[:, ::2]), "kv_cache: expected pages dense inside"),
    (
        "page stride",
        change("kv_cache", lambda _: cache_of(64, 8448 + 8)),
        r"kv_cache: expected a page stride .*\[8456, ",
    ),
    ("overlap", change("kv_cache", lambda _: cache_of(64, 8432)), r"kv_cache: expected a page stride .*at least 8448"),
    ("kv address", change("kv_cache", misaligned), "kv_cache: expected an address that is a multiple of 16"),
    ("weights dtype", change("weights", lambda t: t.half()), "weights: expected dtype float32, given dtype float16"),
    ("weights rows", change("weights", lambda t: t[:5]), r"weights: expected shape \[6, 32\], given shape \[5, 32\]"),
    (
        "weights heads",
        change("weights", lambda t: t[:, :16]),
        r"weights: expected shape \[6, 32\], given shape \[6, 16",
    ),
    ("weights strides", change("weights", lambda t: t.t().contiguous().t()), "weights: expected a contiguous tensor"),
    ("weights address", change("weights", misaligned), "weights: expected an address that is a multiple of 16"),
    ("lens dtype", change("context_lens", lambda t: t.long()), "context_lens: expected dtype int32, given dtype int64"),
    ("lens dims", change("context_lens", lambda t: t.view(3, 2, 1)), r"context_lens: expected shape \[B, next_n\]"),
    ("lens strides", change("context_lens", lambda t: t.t().contiguous().t()), "context_lens: expected a contiguous"),
    ("next_n 0", next_n(0), r"context_lens: expected next_n .* from 1 to 8, given shape \[3, 0\]"),
    ("next_n 9", next_n(9), r"context_lens: expected next_n .* from 1 to 8, given shape \[3, 9\]"),
    ("table dtype", change("block_table", lambda t: t.long()), "block_table: expected dtype int32, given dtype int64"),
    (
        "table dims",
        change("block_table", lambda t: t.flatten()),
        r"block_table: expected shape \[R, pages\] with R >= 3",
    ),
    ("table rows", change("block_table", lambda t: t[:2]), r"block_table: expected .*R >= 3.*given shape \[2, "),
    ("table width", change("block_table", lambda t: t[:, :0]), r"block_table: expected at least one column.*\[3, 0\]"),
    (
        "table strides",
        change("block_table", lambda t: t.repeat(1, 2)[:, ::2]),
        "block_table: expected a last stride of 1",
    ),
    ("plan dtype", change("plan", lambda t: t.long()), "plan: expected dtype int32, given dtype int64"),
    (
        "plan shape",
        change("plan", lambda t: t.view(-1, 2)),
        r"plan: expected a uniform plan's shape: \[1 \+ 7 n, 4\].*given shape \[58, 2\]",
    ),
    ("plan rows", change("plan", lambda t: t[:-1]), r"plan: expected .*, given shape \[28, 4\]"),
    (
        "max_rows",
        lambda arguments: {**arguments, "max_rows": 2},
        "max_rows: expected None, as plan is that of a uniform step, given 2",
    ),
    ("k", lambda arguments: {**arguments, "k": 2049}, "k: expected 0 to 2048, given 2049"),
    ("plan without CTAs", change("plan", lambda t: t[:1]), r"plan: expected .*at least one, given shape \[1, 4\]"),
    ("plan strides", change("plan", lambda t: t[::2]), "plan: expected a contiguous tensor"),
    ("plan address", change("plan", misaligned), "plan: expected an address that is a multiple of 16"),
    ("negative max", change("max_context_len", lambda _: -1), r"max_context_len: expected 0 to .*given -1$"),
    ("huge max", change("max_context_len", lambda _: 2**31), r"max_context_len: expected 0 to .*given 2147483648$"),
    ("out dtype", change("out", lambda t: t.bfloat16()), "out: expected dtype float32, given dtype bfloat16"),
    ("out rows", change("out", lambda t: t[:5]), r"out: expected shape \[6, 130\], given shape \[5, 130\]"),
    ("out columns", change("out", lambda t: t[:, :64]), r"out: expected shape \[6, 130\], given shape \[6, 64\]"),
    ("out strides", change("out", lambda t: t.t().contiguous().t()), "out: expected a last stride of 1"),
    ("out overlap", change("out", lambda t: t[:1].expand(6, -1)), "out: expected rows that do not overlap"),
]


@pytest.mark.parametrize(("misuse", "says"), [case[1:] for case in MISUSES], ids=[case[0] for case in MISUSES])
def test_misuse_is_named(misuse: Callable[[Arguments], Arguments], says: str) -> None:
    with pytest.raises(RuntimeError, match="vllm_mqa_sm90: " + says):
        vllm_mqa_sm90.paged_mqa_logits(**misuse(valid_arguments()))


# The same of a ragged step, for what differs.
RAGGED_MISUSES = [
    (
        "lens dims",
        change("context_lens", lambda t: t.view(2, 2)),
        r"context_lens: expected shape \[T\], as the step is ragged, given shape \[2, 2\]",
    ),
    (
        "plan rows",
        change("plan", lambda t: t[:-1]),
        r"plan: expected a ragged plan's shape: \[\(3 \+ 7 n \+ 4\) // 2, 8\] .*given shape \[16, 8\]",
    ),
    (
        "plan of more rows",
        change("plan", lambda t: torch.cat([t, t[:1]])),
        r"plan: expected .*, given shape \[18, 8\]",
    ),
    ("no CTAs", change("plan", lambda t: t[:3]), r"plan: expected .*at least one, given shape \[3, 8\]"),
    ("plan columns", change("plan", lambda t: t.view(-1, 4)[:29]), "max_rows: expected None, as plan is that of a uniform step"),
    ("max_rows 0", change("max_rows", lambda _: 0), "max_rows: expected 1 to 8 rows of a group, given 0"),
    ("max_rows 9", change("max_rows", lambda _: 9), "max_rows: expected 1 to 8 rows of a group, given 9"),
    ("q rows", change("q", lambda t: t[:3]), r"q: expected shape .*\[4, H, 128\].*given shape \[3, 32, 128\]"),
    ("weights rows", change("weights", lambda t: t[:3]), r"weights: expected shape \[4, 32\], given shape \[3, 32\]"),
    (
        "table rows",
        change("block_table", lambda t: t[:0]),
        r"block_table: expected .*R >= 1, .*of the plan, given shape \[0, ",
    ),
    ("out rows", change("out", lambda t: t[:3]), r"out: expected shape \[4, 130\], given shape \[3, 130\]"),
]


@pytest.mark.parametrize(
    ("misuse", "says"), [case[1:] for case in RAGGED_MISUSES], ids=[case[0] for case in RAGGED_MISUSES]
)
def test_misuse_of_a_ragged_step_is_named(misuse: Callable[[Arguments], Arguments], says: str) -> None:
    with pytest.raises(RuntimeError, match="vllm_mqa_sm90: " + says):
        vllm_mqa_sm90.paged_mqa_logits(**misuse(valid_ragged_arguments()))


TENSORS = ("q", "kv_cache", "weights", "context_lens", "block_table", "plan", "out")


@pytest.mark.parametrize("given", [[1, 2], "x", 3, torch.float32], ids=repr)
@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_tensor_is_named(name: str, given: object) -> None:
    expected = f"^vllm_mqa_sm90: {name}: expected a tensor, given {type(given).__name__}$"
    for arguments in valid_arguments(), valid_ragged_arguments():
        with pytest.raises(TypeError, match=expected):
            vllm_mqa_sm90.paged_mqa_logits(**{**arguments, name: given})


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "out"])
def test_none_is_no_tensor(name: str) -> None:
    with pytest.raises(TypeError, match=f"^vllm_mqa_sm90: {name}: expected a tensor, given NoneType$"):
        vllm_mqa_sm90.paged_mqa_logits(**{**valid_arguments(), name: None})


@pytest.mark.parametrize("name", ["max_context_len", "max_rows", "k"])
def test_what_is_no_int_is_named(name: str) -> None:
    for out in None, valid_arguments()["out"]:
        with pytest.raises(TypeError, match=f"^vllm_mqa_sm90: {name}: expected an int, given str$"):
            vllm_mqa_sm90.paged_mqa_logits(**{**valid_arguments(), "out": out, name: "130"})


@pytest.mark.parametrize("name", ["context_lens", "indices", "query_start_loc", "out"])
def test_what_is_no_tensor_is_named_by_plan(name: str) -> None:
    arguments = {"context_lens": torch.zeros(6, dtype=torch.int32), "num_sms": 4}
    with pytest.raises(TypeError, match=f"^vllm_mqa_sm90: {name}: expected a tensor, given list$"):
        vllm_mqa_sm90.plan(**{**arguments, name: [0, 6]})


@pytest.mark.parametrize("name", ["num_sms", "max_rows", "k"])
def test_what_is_no_int_is_named_by_plan(name: str) -> None:
    lens = torch.zeros(6, dtype=torch.int32)
    with pytest.raises(TypeError, match=f"^vllm_mqa_sm90: {name}: expected an int, given float$"):
        vllm_mqa_sm90.plan(**{"context_lens": lens, "indices": lens, "num_sms": 4, name: 2.0})


@pytest.mark.parametrize("name", ["seq_lens", "query_start_loc", "out"])
def test_what_is_no_tensor_is_named_by_row_context_lens(name: str) -> None:
    arguments = {each: torch.zeros(2, dtype=torch.int32) for each in ("seq_lens", "query_start_loc", "out")}
    with pytest.raises(TypeError, match=f"^vllm_mqa_sm90: {name}: expected a tensor, given tuple$"):
        vllm_mqa_sm90.row_context_lens(**{**arguments, name: (0, 1)})


def test_a_cache_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="^vllm_mqa_sm90: kv_cache: expected a tensor, given NoneType$"):
        ops.check_kv_cache(None)


@pytest.mark.parametrize("case", [case for case in MISUSES if case[0].startswith(("kv ", "page ", "no pages", "loose"))])
def test_a_cache_can_be_asked_about_without_a_launch(case: tuple) -> None:
    arguments = valid_arguments()
    ops.check_kv_cache(arguments["kv_cache"])
    with pytest.raises(RuntimeError, match="vllm_mqa_sm90: " + case[2]):
        ops.check_kv_cache(case[1](arguments)["kv_cache"])


def test_right_ragged_arguments_on_the_cpu_need_a_gpu() -> None:
    for max_rows in 2, 8, None:
        with pytest.raises(RuntimeError, match="q: expected tensors on a CUDA device .*given device cpu"):
            vllm_mqa_sm90.paged_mqa_logits(**{**valid_ragged_arguments(), "max_rows": max_rows})


def test_right_arguments_on_the_cpu_need_a_gpu() -> None:
    """Also shows that the arguments that the misuses start from are right."""
    for rows in "grouped", "flat":
        arguments = valid_arguments()
        if rows == "flat":
            arguments["q"] = arguments["q"].flatten(0, 1)
        with pytest.raises(RuntimeError, match="q: expected tensors on a CUDA device .*given device cpu"):
            vllm_mqa_sm90.paged_mqa_logits(**arguments)


LENS = torch.zeros(6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("context_lens", "options", "says"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), {"num_sms": 4}, "context_lens: expected dtype int32"),
        (torch.zeros(3, 9, dtype=torch.int32), {"num_sms": 4}, "context_lens: expected next_n"),
        (torch.zeros(2, 3, dtype=torch.int32).t(), {"num_sms": 4}, "context_lens: expected a contiguous"),
        (torch.zeros(3, 2, dtype=torch.int32), {}, "num_sms: expected a number"),
        (torch.zeros(3, 2, dtype=torch.int32), {"num_sms": 0}, "num_sms: expected at least 1, given 0"),
        (torch.zeros(3, 2, dtype=torch.int32), {"num_sms": 4, "out": torch.zeros(7, 4, dtype=torch.int32)},
         r"out: expected shape \(29, 4\) for num_sms 4, given \(7, 4\)"),
        (torch.zeros(3, 2, dtype=torch.int32), {"out": torch.zeros(8, 4)}, "out: expected dtype int32, given"),
        (torch.zeros(3, 2, dtype=torch.int32), {"out": torch.zeros(8, 3, dtype=torch.int32)},
         r"out: expected a uniform plan's shape: .*, given shape \[8, 3\]"),
        (torch.zeros(3, 2, dtype=torch.int32), {"num_sms": 4, "max_rows": 2}, "max_rows: expected None .*, given 2"),
        (LENS, {"num_sms": 4, "k": -1}, "k: expected 0 to 2048, given -1"),
        (LENS, {"num_sms": 4, "indices": LENS, "k": 2049}, "k: expected 0 to 2048, given 2049"),
        (LENS, {"num_sms": 4, "indices": LENS, "query_start_loc": LENS},
         "indices: expected either indices or query_start_loc, given both"),
        (LENS, {"num_sms": 4, "indices": LENS, "max_rows": 0}, "max_rows: expected 1 to 8 rows of a group, given 0"),
        (LENS, {"num_sms": 4, "indices": LENS, "max_rows": 9}, "max_rows: expected 1 to 8 rows of a group, given 9"),
        (LENS.view(6, 1), {"num_sms": 4, "indices": LENS}, r"context_lens: expected shape \[T\].*given shape \[6, 1\]"),
        (LENS, {"num_sms": 4, "indices": LENS.long()}, "indices: expected dtype int32, given dtype int64"),
        (LENS, {"num_sms": 4, "indices": LENS[:5]}, r"indices: expected shape \[6\], as context_lens, given shape \[5\]"),
        (LENS, {"num_sms": 4, "indices": LENS.view(6, 1)}, r"indices: expected one dimension, given shape \[6, 1\]"),
        (LENS, {"num_sms": 4, "indices": LENS.repeat(2)[::2]}, "indices: expected a contiguous tensor"),
        (LENS, {"num_sms": 4, "query_start_loc": LENS.long()}, "query_start_loc: expected dtype int32, given dtype int64"),
        (LENS, {"num_sms": 4, "query_start_loc": LENS[:0]}, r"query_start_loc: expected shape \[R \+ 1\].*given shape \[0\]"),
        (LENS, {"num_sms": 4, "query_start_loc": LENS.repeat(2)[::2]}, "query_start_loc: expected a contiguous tensor"),
        (LENS, {"indices": LENS, "num_sms": 4, "out": torch.zeros(29, 4, dtype=torch.int32)},
         r"out: expected shape \(18, 8\) for num_sms 4, given \(29, 4\)"),
        (LENS, {"indices": LENS, "out": torch.zeros(29, 4, dtype=torch.int32)},
         r"out: expected a ragged plan's shape: \[\(3 \+ 7 n \+ 6\) // 2, 8\].*, given shape \[29, 4\]"),
    ],
)  # fmt: skip
def test_misuse_of_plan_is_named(context_lens: torch.Tensor, options: dict, says: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=says):
        vllm_mqa_sm90.plan(context_lens, **options)


def test_plan_op_checks_next_n() -> None:
    ops._load()
    with pytest.raises(RuntimeError, match="next_n: expected 2, as context_lens says, given 3"):
        torch.ops.vllm_mqa_sm90.plan(
            torch.zeros(3, 2, dtype=torch.int32), 3, False, 0, torch.zeros(ops.plan_shape(1), dtype=torch.int32)
        )


def test_ragged_plan_op_needs_to_be_told_the_groups() -> None:
    ops._load()
    with pytest.raises(RuntimeError, match="indices: expected either indices or query_start_loc, given neither"):
        out = torch.zeros(ops.plan_shape(1, 6), dtype=torch.int32)
        torch.ops.vllm_mqa_sm90.plan_ragged(LENS, None, None, 8, False, 0, out)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("seq_lens", torch.zeros(2, dtype=torch.int64), "seq_lens: expected dtype int32, given dtype int64"),
        ("seq_lens", torch.zeros(3, dtype=torch.int32), r"seq_lens: expected shape \[2\], .*given shape \[3\]"),
        ("query_start_loc", torch.zeros(0, dtype=torch.int32), r"query_start_loc: expected shape \[R \+ 1\]"),
        ("query_start_loc", torch.zeros(6, dtype=torch.int32)[::2], "query_start_loc: expected a contiguous tensor"),
        ("out", torch.zeros(5, 1, dtype=torch.int32), r"out: expected one dimension, given shape \[5, 1\]"),
        ("out", torch.zeros(5), "out: expected dtype int32, given dtype float32"),
    ],
)
def test_misuse_of_row_lens_is_named(name: str, wrong: torch.Tensor, says: str) -> None:
    arguments = {
        "seq_lens": torch.tensor([5, 6], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2, 3], dtype=torch.int32),
        "out": torch.zeros(3, dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match="vllm_mqa_sm90: " + says):
        vllm_mqa_sm90.row_context_lens(**{**arguments, name: wrong})


def test_walk_refuses_a_foreign_plan() -> None:
    ops._load()
    lens = torch.full((3, 2), 100, dtype=torch.int32)
    out = torch.zeros(6, 5, dtype=torch.int32)
    plan = vllm_mqa_sm90.plan(lens, num_sms=2)
    torch.ops.vllm_mqa_sm90.walk(plan, lens, None, 0, out)
    with pytest.raises(RuntimeError, match=r"vllm_mqa_sm90: out: expected shape \[6, 5\], .*given shape \[5, 5\]"):
        torch.ops.vllm_mqa_sm90.walk(plan, lens, None, 0, out[:5])
    with pytest.raises(RuntimeError, match="plan: expected a plan for 6 rows in groups of 2, k 0, given one for another"):
        torch.ops.vllm_mqa_sm90.walk(vllm_mqa_sm90.plan(lens[:2], num_sms=2), lens, None, 0, out)


def test_missing_library_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_loaded", False)
    monkeypatch.setattr(ops, "_LIBRARY", Path("/nowhere/_C.abi3.so"))
    with pytest.raises(RuntimeError, match=re.escape("/nowhere/_C.abi3.so does not exist") + ".*pip install"):
        vllm_mqa_sm90.plan(torch.zeros(1, dtype=torch.int32), num_sms=1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_traces_in_one_graph(backend: str) -> None:
    def step(q, kv_cache, weights, context_lens, block_table):
        plan = vllm_mqa_sm90.plan(context_lens, num_sms=132)
        return plan, vllm_mqa_sm90.paged_mqa_logits(
            q, kv_cache, weights, context_lens, block_table, plan, max_context_len=130, clean_logits=True
        )

    inputs = [t.to("meta") for t in random_step([[70, 71], [5, 6], [0, 130]], heads=32).inputs()]
    plan, logits = torch.compile(step, fullgraph=True, backend=backend)(*inputs)
    assert plan.shape == ops.plan_shape(132) and plan.dtype == torch.int32 and plan.device.type == "meta"
    assert logits.shape == (6, 130) and logits.dtype == torch.float32 and logits.stride() == (192, 1)


@pytest.mark.parametrize("name", ["indices", "query_start_loc"])
def test_compile_traces_a_ragged_step_in_one_graph(name: str) -> None:
    def step(q, kv_cache, weights, context_lens, block_table, grouping):
        plan = vllm_mqa_sm90.plan(context_lens, **{name: grouping}, max_rows=3, num_sms=132)
        return plan, vllm_mqa_sm90.paged_mqa_logits(
            q, kv_cache, weights, context_lens, block_table, plan, max_context_len=130, max_rows=3, clean_logits=True
        )

    ragged = random_ragged_step([[70, 71, 3], [5], [0, 130]], by=name, heads=32)
    inputs = [t.to("meta") for t in (*ragged.inputs(), ragged.grouping()[name])]
    plan, logits = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert plan.shape == ops.plan_shape(132, 6) and plan.dtype == torch.int32 and plan.device.type == "meta"
    assert logits.shape == (6, 130) and logits.dtype == torch.float32 and logits.stride() == (192, 1)


def test_compiled_plan_equals_eager_plan() -> None:
    lens = torch.tensor([[70, 71], [5, 6], [0, 130]], dtype=torch.int32)
    compiled = torch.compile(lambda t: vllm_mqa_sm90.plan(t, num_sms=3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(lens), vllm_mqa_sm90.plan(lens, num_sms=3))
    flat, starts = lens.flatten(), torch.tensor([0, 1, 5], dtype=torch.int32)

    def ragged(lens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return vllm_mqa_sm90.plan(lens, query_start_loc=starts, num_sms=3)

    compiled = torch.compile(ragged, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(flat, starts), ragged(flat, starts))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "kv_cache", "weights", "block_table", "plan", "out"])
def test_wrong_device_is_named(name: str) -> None:
    arguments = valid_arguments("cuda")
    arguments[name] = arguments[name].cpu()
    with pytest.raises(RuntimeError, match=f"vllm_mqa_sm90: {name}: expected device cuda:0, .*given device cpu"):
        vllm_mqa_sm90.paged_mqa_logits(**arguments)


@pytest.mark.gpu
def test_wrong_device_of_plan_output_is_named() -> None:
    with pytest.raises(RuntimeError, match="out: expected device cuda:0, .*given device cpu"):
        vllm_mqa_sm90.plan(
            torch.zeros(3, 2, dtype=torch.int32, device="cuda"), out=torch.zeros(8, 4, dtype=torch.int32)
        )


@pytest.mark.gpu
def test_launch_counts_of_a_missing_device() -> None:
    with pytest.raises(RuntimeError, match="vllm_mqa_sm90: .*invalid device ordinal"):
        vllm_mqa_sm90.launch_counts(torch.cuda.device_count())
