# SPDX-License-Identifier: Apache-2.0
"""`bench kernel`'s whole steps of the indexer: vLLM's top-k kernels, checks of selections, and what is made of the times."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from kernel_bench import CPU, TWO_SHAPES, FakeTopK, bench_kernel, on_cpu, small_copies  # noqa: F401: fixtures among them
from matplotlib.image import imread
from rich.console import Console

from vllm_mqa_sm90 import cli, reference
from vllm_mqa_sm90.bench import plot
from vllm_mqa_sm90.bench.kernel import report
from vllm_mqa_sm90.bench.kernel import run as kernel_run
from vllm_mqa_sm90.bench.kernel.report import FLATTENED, NATIVE, OURS, STEP, STEP_VLLM_TOPK, STOCK_STEP, Report, Row
from vllm_mqa_sm90.bench.kernel.vllm_kernels import COOPERATIVE, PER_ROW, PERSISTENT, TopK, is_topk

# Of the first, the rows have more tokens than k, some of them or none of the others.
SHAPES = ("--shape", "2x700", "--shape", "3x600:ragged", "--shape", "2x64", "--top-k", "512")


# vLLM's kernels.


def test_kernels_by_logits() -> None:
    topk = TopK(FakeTopK(), CPU)
    assert topk.kernels(torch.empty(32, 8)) == [COOPERATIVE, PERSISTENT, PER_ROW]
    assert topk.kernels(torch.empty(33, 8)) == topk.kernels(torch.empty(32, 9)) == [PERSISTENT, PER_ROW]
    assert TopK(FakeTopK(), CPU, cooperative_rows=64).kernels(torch.empty(64, 8))[0] == COOPERATIVE
    assert TopK(types.SimpleNamespace(persistent_topk=None), CPU).kernels(torch.empty(1, 8)) == [PERSISTENT]


@pytest.mark.parametrize("kernel", [COOPERATIVE, PERSISTENT, PER_ROW])
def test_kernels_get_what_they_ask_for(kernel: str) -> None:
    logits = torch.randn(6, 1024)[:, :1000]
    lens = torch.tensor([[0, 1], [511, 512], [999, 1000]], dtype=torch.int32)
    indices = torch.full((6, 512), -1, dtype=torch.int32)
    TopK(FakeTopK(), CPU).select(kernel, logits, lens, 1000, indices)
    assert is_topk(logits, lens, indices)
    assert torch.equal(indices.sort(dim=1).values[-1], reference.topk_indices(logits, lens, 512)[-1])


def test_the_installed_vllm_has_these_kernels(driver_path: str) -> None:
    """With the arguments that they are called with, and with the limit of rows that this release has."""
    code = f"""
import torch, vllm, vllm._C_stable_libtorch
from vllm_mqa_sm90.bench.kernel import vllm_kernels
topk = vllm_kernels.load_topk(torch.device("cpu"))
kernels = [topk.kernels(torch.empty(rows, 8)) for rows in (1, 32, 33, 64, 65)]
print(vllm.__version__, sum("{COOPERATIVE}" in names for names in kernels), *kernels[0], flush=True)
for name in kernels[0]:
    print(*(argument.name for argument in getattr(torch.ops._C, name).default._schema.arguments))
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": driver_path, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, *arguments = done.stdout.splitlines()
    version, within, *kernels = first.split()
    assert kernels == [COOPERATIVE, PERSISTENT, PER_ROW]
    assert int(within) == (2 if version.startswith("0.26.") else 4)  # up to 32 rows; up to 64
    with_workspace = "logits lengths output workspace k max_seq_len"
    assert arguments == [with_workspace, with_workspace, "logits next_n seq_lens indices numRows stride0 stride1 topK"]


def test_is_topk() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 9.0], [5.0, 4.0, torch.nan, 0.0, 0.0]])
    lens = torch.tensor([4, 2], dtype=torch.int32)

    def of(*rows: list[int]) -> bool:
        return is_topk(logits, lens, torch.tensor(rows, dtype=torch.int32))

    assert of([0, 2], [1, 0]) and of([3, 0], [0, 1])  # of equal ones any, in any order
    assert of([2, 3, 0], [0, 1, -1]) and of([3, 0, 2], [-1, 1, 0])
    assert not of([0, 1], [0, 1])  # not the largest
    assert not of([0, 4], [0, 1])  # past the length
    assert not of([0, 0], [0, 1])  # twice the same
    assert not of([0, 2], [0, -1])  # too few
    assert not of([0, 2, 3], [0, 1, 2])  # too many
    assert not of([0, 2, 3], [0, 1, -2])
    assert of([0, 1, 2, 3, -1, -1, -1], [0, 1, -1, -1, -1, -1, -1])  # k above the columns


# Runs.


def test_run(
    on_cpu: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times by the order of calls: 10 us and 1 more each. Stock is native for one and two query tokens."""
    replay_us = kernel_run.replay_us
    monkeypatch.setattr(kernel_run, "replay_us", lambda *given: replay_us(*given) + len(on_cpu.timed) - 1)
    status, content = bench_kernel(tmp_path, *SHAPES, "--next-n", "1", "2", "3")
    assert status == 0
    assert content["top_k"] == 512 and "--top-k 512" in content["command"]
    rows = content["rows"]
    assert len(rows) == 9
    for row in rows:
        assert list(row["step_us"]) == [STEP, STEP_VLLM_TOPK, STOCK_STEP]
        first = PERSISTENT if "ragged" in row["shape"] else COOPERATIVE  # 937 columns: no multiple of four
        assert row["topk_kernels"] == {STEP_VLLM_TOPK: first, STOCK_STEP: first}
        stock = FLATTENED if row["next_n"] == 3 else NATIVE
        for step, side in (STEP, OURS), (STEP_VLLM_TOPK, OURS), (STOCK_STEP, stock):
            assert row["added_us"][step] == pytest.approx(row["step_us"][step] - row["times_us"][side])
    # Logits, plan, our step, vLLM's kernels after our logits; native, and they after that.
    assert rows[0]["step_us"] == {STEP: 12.0, STEP_VLLM_TOPK: 13.0, STOCK_STEP: 17.0}
    assert on_cpu.topk.calls.count(PER_ROW) >= len(rows)
    assert (tmp_path / "kernel-steps.png").is_file() and (tmp_path / "kernel-steps.svg").is_file()
    captured = capsys.readouterr()
    assert "vLLM's fastest top-k: cooperative_topk in 6, persistent_topk in 3 cases" in captured.out
    assert "12.0 (+2.0)" in captured.out and "17.0 (1.42)" in captured.out
    assert "our logits + selection 12.0 us" in captured.err


def test_mixed_steps_are_stock_when_flattened(on_cpu: types.SimpleNamespace, tmp_path: Path) -> None:
    status, content = bench_kernel(tmp_path, "--shape", "4x600:mixed", "--next-n", "1", "2", "--top-k", "512")
    assert status == 0
    assert all(list(row["step_us"]) == [STEP, STEP_VLLM_TOPK, STOCK_STEP] for row in content["rows"])


def test_cooperative_has_a_limit_of_rows(on_cpu: types.SimpleNamespace, tmp_path: Path) -> None:
    _, content = bench_kernel(tmp_path, "--shape", "17x64", "--next-n", "2")
    assert COOPERATIVE not in on_cpu.topk.calls and on_cpu.topk.rows == {34}
    assert content["rows"][0]["topk_kernels"] == {STEP_VLLM_TOPK: PERSISTENT, STOCK_STEP: PERSISTENT}
    assert COOPERATIVE not in content["rows"][0]["left_out"]


def test_a_wrong_selection_of_ours_fails(
    on_cpu: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_cpu.spoil = lambda indices: indices[1].copy_(indices[1].flip(0))  # the right ones, in another order
    status, content = bench_kernel(tmp_path, *SHAPES, "--next-n", "2")
    assert status == 1
    assert STEP not in content["rows"][0]["step_us"] and STEP_VLLM_TOPK in content["rows"][0]["step_us"]
    assert "2 x 700, next_n 2: the selection of 1 of 4 rows is not the reference's" in capsys.readouterr().out


def test_an_unwritten_index_is_seen(on_cpu: types.SimpleNamespace, tmp_path: Path) -> None:
    on_cpu.spoil = lambda indices: indices[-1].fill_(-2)
    assert bench_kernel(tmp_path, "--shape", "2x64", "--next-n", "1")[0] == 1


def test_wrong_kernels_of_vllm_are_left_out(
    on_cpu: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_cpu.topk.wrong = {COOPERATIVE, PERSISTENT}
    status, content = bench_kernel(tmp_path, *SHAPES, "--next-n", "3")
    assert status == 0
    assert all(set(row["topk_kernels"].values()) == {PER_ROW} for row in content["rows"])
    assert f"{PERSISTENT}, 3 of 3 cases: its selection is wrong" in capsys.readouterr().out
    on_cpu.topk.wrong.add(PER_ROW)
    status, content = bench_kernel(tmp_path, *SHAPES, "--next-n", "3")
    assert status == 0
    assert all(row["step_us"] == {STEP: 10.0} and row["topk_kernels"] == {} for row in content["rows"])


def test_without_deep_gemm_vllms_topk_is_measured(
    on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(num_sms: int) -> None:
        raise AssertionError("no CUDA home")

    monkeypatch.setattr("vllm_mqa_sm90.bench.kernel.vllm_kernels.load_deep_gemm", missing)
    status, content = bench_kernel(tmp_path, *TWO_SHAPES, "--next-n", "2")
    assert status == 0
    assert all(list(row["step_us"]) == [STEP, STEP_VLLM_TOPK] for row in content["rows"])


@pytest.mark.parametrize("k", ["100", "2049", "all"])
def test_other_k_are_wrong_usage(k: str) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "kernel", "--top-k", k])
    assert exit.value.code == 2


# Reports.


def two_rows() -> Report:
    """The second one's step skips what its logits alone do not, and has no stock side."""
    result = Report(
        gpu={"name": "NVIDIA H100 80GB HBM3", "sms": 132, "driver": "580.1"},
        versions={"vllm_mqa_sm90": "0.1.0"},
        date="2026-01-31T12:00:00+00:00",
        command="vllm-mqa-sm90 bench kernel",
        heads=64,
        page=64,
        read_bytes_per_s=3.11e12,
    )
    result.rows = [
        Row(
            "64x32768:ragged", 3, 300_000_000, 100.0, {OURS: 110.0, FLATTENED: 260.0}, 3.0,
            step_us={STEP: 130.5, STEP_VLLM_TOPK: 141.0, STOCK_STEP: 290.0},
            topk_kernels={STEP_VLLM_TOPK: COOPERATIVE, STOCK_STEP: COOPERATIVE},
        ),
        Row("32x2048", 1, 3_000_000, 3.0, {OURS: 5.5}, 3.0, step_us={STEP: 4.25}),
    ]  # fmt: skip
    return result


def test_step_table_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.step_table(two_rows()))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    assert "64 x 32768 ragged 3 130.5 (+20.5) 141.0 (+31.0) 290.0 (2.22)".split() in lines
    assert "32 x 2048 1 4.2 (-1.2) - -".split() in lines
    assert "…" not in text
    assert "their top 2048" in text


def test_plot_of_steps(tmp_path: Path) -> None:
    names = [path.name for path in plot.draw(two_rows(), tmp_path)]
    assert names == ["kernel.png", "kernel.svg", "kernel-steps.png", "kernel-steps.svg"]
    pixels = torch.from_numpy(imread(tmp_path / "kernel-steps.png")[..., :3])
    for colour in plot.STEP_COLOURS.values():
        exact = torch.tensor([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        assert (pixels - exact).abs().amax(dim=-1).lt(0.01).sum() > 500
