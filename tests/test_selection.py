# SPDX-License-Identifier: Apache-2.0
"""Selection: misuse, the oracle on rows that are known, and tracing. What runs on a GPU is in test_selection_gpu.py."""

import pytest
import torch

import vllm_mqa_sm90
from vllm_mqa_sm90 import ops, reference

NAN, INF = float("nan"), float("inf")


def arguments() -> dict[str, object]:
    return {
        "logits": torch.zeros(6, 64),
        "context_lens": torch.zeros(3, 2, dtype=torch.int32),
        "k": 8,
        "out": torch.zeros(6, 8, dtype=torch.int32),
    }


MISUSES = [
    ("logits dtype", "logits", lambda t: t.bfloat16(), "logits: expected dtype float32, given dtype bfloat16"),
    ("logits dims", "logits", lambda t: t[0], r"logits: expected shape \[T, W\], .*given shape \[64\]"),
    ("logits columns", "logits", lambda t: torch.zeros(1, 1).expand(6, 2**24 + 1), r"logits: expected shape .*W at most 2\^24, given shape \[6, 16777217\]"),
    ("logits last stride", "logits", lambda t: torch.zeros(6, 128)[:, ::2], "logits: expected a last stride of 1"),
    ("logits stride", "logits", lambda t: torch.zeros(6, 66)[:, :64], r"logits: expected rows .*a multiple of 4 columns apart, given .*\[66, 1\]"),
    ("logits overlap", "logits", lambda t: t[:1].expand(6, -1), "logits: expected rows that do not overlap"),
    ("logits address", "logits", lambda t: torch.zeros(6 * 64 + 1)[1:].view(6, 64), "logits: expected an address that is a multiple of 16"),
    ("lens dtype", "context_lens", lambda t: t.long(), "context_lens: expected dtype int32, given dtype int64"),
    ("lens rows", "context_lens", lambda t: t[:2], r"context_lens: expected 6 elements, .*given shape \[2, 2\]"),
    ("lens strides", "context_lens", lambda t: torch.zeros(2, 3, dtype=torch.int32).t(), "context_lens: expected a contiguous tensor"),
    ("k 0", "k", lambda k: 0, "k: expected 1 to 2048, given 0"),
    ("k 2049", "k", lambda k: 2049, "k: expected 1 to 2048, given 2049"),
    ("out dtype", "out", lambda t: t.long(), "out: expected dtype int32, given dtype int64"),
    ("out rows", "out", lambda t: t[:5], r"out: expected shape \[6, 8\], given shape \[5, 8\]"),
    ("out k", "out", lambda t: t[:, :7], r"out: expected shape \[6, 8\], given shape \[6, 7\]"),
    ("out strides", "out", lambda t: torch.zeros(8, 6, dtype=torch.int32).t(), "out: expected a last stride of 1"),
    ("out overlap", "out", lambda t: t[:1].expand(6, -1), "out: expected rows that do not overlap"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "says"), [case[1:] for case in MISUSES], ids=[case[0] for case in MISUSES])
def test_misuse_is_named(name, change, says: str) -> None:
    given = arguments()
    with pytest.raises(RuntimeError, match="^vllm_mqa_sm90: " + says):
        vllm_mqa_sm90.topk_indices(**{**given, name: change(given[name])})


def test_right_arguments_on_the_cpu_need_a_gpu() -> None:
    """Also shows that the arguments that the misuses start from are right."""
    for out in arguments()["out"], torch.zeros(6, 20, dtype=torch.int32)[:, :8], None:
        with pytest.raises(RuntimeError, match="logits: expected tensors on a CUDA device .*given device cpu"):
            vllm_mqa_sm90.topk_indices(**{**arguments(), "out": out})


@pytest.mark.parametrize("name", ["logits", "context_lens", "out"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"^vllm_mqa_sm90: {name}: expected a tensor, given list$"):
        vllm_mqa_sm90.topk_indices(**{**arguments(), name: [1]})


def test_what_is_no_int_is_named() -> None:
    for function in vllm_mqa_sm90.topk_indices, reference.topk_indices:
        with pytest.raises(TypeError, match="^vllm_mqa_sm90: k: expected an int, given str$"):
            function(torch.zeros(6, 64), torch.zeros(6, dtype=torch.int32), "8")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_traces_in_one_graph(backend: str) -> None:
    given = arguments()
    inputs = given["logits"].to("meta"), given["context_lens"].to("meta")
    select = torch.compile(lambda logits, lens: vllm_mqa_sm90.topk_indices(logits, lens, 8), fullgraph=True, backend=backend)
    indices = select(*inputs)
    assert indices.shape == (6, 8) and indices.dtype == torch.int32 and indices.device.type == "meta"


@pytest.mark.parametrize(
    ("row", "length", "expected"),
    [
        ([3.0, 1.0, 2.0, 5.0, 4.0], 5, [0, 3, 4]),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 4, [0, 2, 3]),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 3, [0, 1, 2]),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 2, [0, 1, -1]),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 9, [0, 3, 4]),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 0, [-1, -1, -1]),
        ([3.0, 1.0, 2.0, 5.0, 4.0], -(2**31), [-1, -1, -1]),
        ([1.0, 1.0, 1.0, 1.0, 1.0], 5, [0, 1, 2]),
        ([0.0, 1.0, 1.0, 1.0, 1.0], 5, [1, 2, 3]),
        ([-0.0, 0.0, -0.0, 0.0, -1.0], 5, [0, 1, 2]),
        ([NAN, INF, 1.0, -INF, 2.0], 5, [0, 1, 4]),
        ([1.0, NAN, NAN, -NAN, NAN], 5, [1, 2, 3]),
        ([-INF, -INF, -INF, -INF, -3.0], 5, [0, 1, 4]),
        ([-1.0, -2.0, -3.0, -4.0, -0.5], 5, [0, 1, 4]),
    ],
)  # fmt: skip
def test_reference(row: list[float], length: int, expected: list[int]) -> None:
    logits = torch.tensor([row, row])[:, : len(row)]
    indices = reference.topk_indices(logits, torch.tensor([length, 0], dtype=torch.int32), 3)
    assert indices.tolist() == [expected, [-1, -1, -1]] and indices.dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": torch.zeros(6, 64).half()}, "logits: expected dtype torch.float32, given dtype torch.float16"),
        ({"logits": torch.zeros(64)}, r"logits: expected shape \[T, W\], given shape \[64\]"),
        ({"context_lens": torch.zeros(6)}, "context_lens: expected dtype torch.int32, given dtype torch.float32"),
        ({"context_lens": torch.zeros(5, dtype=torch.int32)}, r"context_lens: expected 6 elements, .*given shape \[5\]"),
        ({"context_lens": torch.zeros(6, dtype=torch.int32, device="meta")}, "context_lens: expected device cpu, as logits, given device meta"),
        ({"k": 0}, "k: expected at least 1, given 0"),
    ],
)  # fmt: skip
def test_misuse_of_the_reference_is_named(change: dict, says: str) -> None:
    given = {name: value for name, value in arguments().items() if name != "out"}
    with pytest.raises(ValueError, match="^vllm_mqa_sm90: " + says):
        reference.topk_indices(**{**given, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected 1 to 2048, given 0"),
        ({"k": 2049}, "k: expected 1 to 2048, given 2049"),
        ({"max_context_len": 2**24 + 1}, r"max_context_len: expected at most 2\^24, given 16777217"),
    ],
)
def test_index_topk_launches_nothing_before_it_refuses(options: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "paged_mqa_logits", None)
    with pytest.raises(RuntimeError, match=message):
        ops.index_topk(*[torch.zeros(1)] * 6, **{"k": 8, "max_context_len": 64} | options)
