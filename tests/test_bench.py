# SPDX-License-Identifier: Apache-2.0
"""`bench kernel`: its arithmetic, its view of DeepGEMM, and whole runs on the CPU with stand-ins for the GPU."""

import argparse
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_bench import (  # noqa: F401: fixtures among them
    CPU,
    SMS,
    TWO_SHAPES,
    FakeDeepGemm,
    bench_kernel,
    on_cpu,
    reference_logits,
    small_copies,
    vllm_0_26,
    vllm_0_33,
)
from matplotlib.image import imread
from rich.console import Console

import vllm_mqa_sm90
from vllm_mqa_sm90 import bench, cli, reference
from vllm_mqa_sm90.bench import plot
from vllm_mqa_sm90.bench.kernel import Shape, report, vllm_kernels
from vllm_mqa_sm90.bench.kernel import run as kernel_run
from vllm_mqa_sm90.bench.kernel import step as steps
from vllm_mqa_sm90.bench.kernel.report import FLATTENED, NATIVE, OURS, STEP, STEP_VLLM_TOPK, LeftOut, Report, Row
from vllm_mqa_sm90.bench.kernel.step import floor_bytes, make_step, row_lengths

# Shapes and the floor.


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("256x8192", Shape(256, 8192)),
        ("1x1", Shape(1, 1)),
        ("64x8192:ragged", Shape(64, 8192, ragged=True)),
        ("3x4:mixed", Shape(3, 4, mixed=True)),
        ("3x4:ragged:mixed", Shape(3, 4, ragged=True, mixed=True)),
    ],
)
def test_shape_reads_and_writes(text: str, shape: Shape) -> None:
    assert Shape.parse(text) == shape
    assert str(shape) == text


@pytest.mark.parametrize(
    "text", ["", "256", "256x", "x8192", "0x5", "5x0", "-1x5", "2x3x4", "2x3:even", "2 x 3", "2x3\n"]
)
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected BATCHxCONTEXT\[:ragged\]\[:mixed\], both at least 1, given"):
        Shape.parse(text)


def test_default_shapes_are_the_table() -> None:
    assert list(map(str, kernel_run.SHAPES)) == [
        "256x8192", "256x4096", "64x32768:ragged", "64x8192:ragged", "8x65536", "1x131072", "32x2048", "4x8192",
    ]  # fmt: skip


def test_ragged_contexts() -> None:
    contexts = Shape(64, 8192, ragged=True).contexts()
    assert len(contexts) == 64
    assert 0.3 * 8192 - 1 <= min(contexts) < 0.5 * 8192
    assert 1.5 * 8192 < max(contexts) <= 1.7 * 8192
    assert contexts == Shape(64, 8192, ragged=True).contexts()
    assert min(Shape(50, 1, ragged=True).contexts()) == 1
    assert Shape(3, 7).contexts() == [7, 7, 7]


def test_row_lengths() -> None:
    assert row_lengths([100, 2, 50], [3, 3, 1]) == [[98, 99, 100], [0, 1, 2], [50]]


def test_rows_of_mixed_shapes() -> None:
    shape = Shape(300, 8192, mixed=True)
    rows = shape.rows(3)
    assert rows == shape.rows(3) and len(rows) == 300
    assert {count: 80 < rows.count(count) < 120 for count in (1, 2, 3)} == {1: True, 2: True, 3: True}
    assert Shape(4, 9).rows(3) == [3] * 4
    assert floor_bytes(Shape(5, 1000, mixed=True), 2, 16) == 5 * 1000 * 132 + sum(
        count * 16 * 132 + sum(range(1000 - count + 1, 1001)) * 4 for count in Shape(5, 1000, mixed=True).rows(2)
    )


@pytest.mark.parametrize(
    ("shape", "next_n", "heads", "parts"),
    [
        # cached tokens, queries, weights, logits
        ((2, 100), 3, 16, (2 * 100 * 132, 6 * 16 * 128, 6 * 16 * 4, 2 * (98 + 99 + 100) * 4)),
        ((1, 2), 4, 64, (2 * 132, 4 * 64 * 128, 4 * 64 * 4, (0 + 0 + 1 + 2) * 4)),
        ((256, 8192), 1, 64, (276_824_064, 2_097_152, 65_536, 8_388_608)),
    ],
)
def test_floor_bytes_by_hand(shape: tuple[int, int], next_n: int, heads: int, parts: tuple[int, ...]) -> None:
    assert floor_bytes(Shape(*shape), next_n, heads) == sum(parts)


def test_floor_of_ragged_shape_counts_each_length() -> None:
    shape = Shape(5, 1000, ragged=True)
    rows = [length for context in shape.contexts() for length in (context - 1, context)]
    expected = sum(shape.contexts()) * 132 + 10 * 32 * 132 + sum(rows) * 4
    assert floor_bytes(shape, 2, 32) == expected


# Steps.


@pytest.mark.parametrize("page", [32, 64])
def test_step_names_each_page_of_each_copy_once(small_copies: None, page: int) -> None:
    shape = Shape(4, 700, ragged=True)
    step = make_step(shape, 3, 16, page, CPU)
    needed = [-(-context // page) for context in shape.contexts()]
    assert step.kv_cache.shape == (sum(needed) * len(step.block_tables), page, 1, 132)
    assert step.kv_cache.numel() >= steps.COLD_BYTES
    assert step.kv_cache.numel() - sum(needed) * page * 132 < steps.COLD_BYTES
    named = [
        page_id for table in step.block_tables for row, count in zip(table.tolist(), needed, strict=True)
        for page_id in row[:count]
    ]  # fmt: skip
    assert sorted(named) == list(range(step.kv_cache.shape[0]))
    assert named != sorted(named)
    assert all(table.shape[1] * page % 256 == 0 and table.min() >= 0 for table in step.block_tables)
    assert step.context_lens.tolist() == row_lengths(shape.contexts(), [3] * 4)
    assert step.query_start_loc.tolist() == [0, 3, 6, 9, 12] and step.max_rows is None
    assert step.max_context_len == max(shape.contexts())
    assert (step.q.shape, step.q.dtype) == ((4, 3, 16, 128), torch.float8_e4m3fn)
    assert step.weights.shape == (12, 16)
    keys, scales = reference.split_pages(step.kv_cache)
    assert keys.isfinite().all() and keys.std() > 0.9
    assert 0.01 <= scales.min() and scales.max() <= 0.03


def test_pages_are_the_same_for_every_next_n(small_copies: None) -> None:
    one, three = (make_step(Shape(2, 300, ragged=True), next_n, 16, 64, CPU) for next_n in (1, 3))
    assert torch.equal(one.kv_cache, three.kv_cache)
    assert all(map(torch.equal, one.block_tables, three.block_tables))
    assert torch.equal(one.context_lens[:, -1], three.context_lens[:, -1])


def test_mixed_step(small_copies: None) -> None:
    shape = Shape(6, 300, ragged=True, mixed=True)
    step = make_step(shape, 3, 16, 64, CPU)
    rows = shape.rows(3)
    assert len(set(rows)) > 1 and step.row_counts.tolist() == rows and step.max_rows == 3
    assert step.context_lens.tolist() == sum(row_lengths(shape.contexts(), rows), [])
    assert step.q.shape == (sum(rows), 16, 128) and step.weights.shape == (sum(rows), 16)
    plan = vllm_mqa_sm90.plan(step.context_lens, query_start_loc=step.query_start_loc, max_rows=3, num_sms=7)
    assert torch.equal(step.plan(num_sms=7), plan)
    right = reference_logits(step)
    assert step.relative_error(right) < 1e-6
    assert step.relative_error(right * (1 + 3e-4)) == pytest.approx(3e-4, rel=1e-2)


def test_relative_error(small_copies: None) -> None:
    step = make_step(Shape(40, 300, ragged=True), 2, 16, 64, CPU)
    right = reference_logits(step)
    assert step.relative_error(right) < 1e-6
    assert step.relative_error(right * (1 + 3e-4)) == pytest.approx(3e-4, rel=1e-2)
    assert step.relative_error(reference_logits(step, 1)) > 0.1
    # What lies past a row's length is nobody's; columns past the longest are not looked at.
    wide = torch.cat([right, torch.zeros(80, 20)], dim=1).nan_to_num(neginf=torch.nan)
    assert step.relative_error(wide) < 1e-6


@pytest.mark.parametrize("request_", [0, 7, 39])
def test_one_bad_logit_is_seen(small_copies: None, request_: int) -> None:
    step = make_step(Shape(40, 300, ragged=True), 2, 16, 64, CPU)
    for row in 2 * request_, 2 * request_ + 1:
        logits = reference_logits(step)
        logits[row, step.context_lens.view(-1)[row] - 1] = torch.nan
        assert not step.relative_error(logits) <= kernel_run.TOLERANCE


# Timing, with a clock that the stand-ins for the GPU advance.


def test_replay_us(monkeypatch: pytest.MonkeyPatch) -> None:
    replay_ms = [50.0, 0.2, 0.9, 0.4, 0.3, 0.5]  # the first only warms up; median of the rest: 0.4
    clock = [0.0]
    calls: list[str] = []
    recorded: list[object] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = clock[0]
            recorded.append(self)

        def elapsed_time(self, end: "Event") -> float:
            return end.time - self.time

    class Graph:
        def replay(self) -> None:
            clock[0] += replay_ms[len(recorded)]

    class Stream:
        def synchronize(self) -> None: ...

    class Context:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    for name, stand_in in {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "stream": Context, "graph": Context,
        "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    us = kernel_run.replay_us([lambda: calls.append("a"), lambda: calls.append("b")], replays=5)
    assert us == pytest.approx(0.4 * 1e3 / 2)
    assert calls == ["a", "b", "a", "b"]  # once eagerly, once captured


def test_read_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 floats in 8 us: 2 bytes a microsecond."""
    monkeypatch.setattr(kernel_run, "_READ_FLOATS", 4)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size))
    monkeypatch.setattr(kernel_run, "replay_us", lambda calls, replays: 8.0)
    assert kernel_run.read_bandwidth(3) == pytest.approx(2e6)


# DeepGEMM, through the functions of two vLLM releases, and those of the installed one.


def installed_vllm(fake: FakeDeepGemm, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The installed vLLM's own functions, on Hopper, over the fake package."""
    api = importlib.import_module("vllm.utils.deep_gemm")
    hopper = types.SimpleNamespace(is_device_capability_family=lambda family: family == 90)
    monkeypatch.setattr(api, "current_platform", hopper)
    monkeypatch.setattr(api, "_get_paged_mqa_logits_metadata_impl", fake.get_paged_mqa_logits_metadata)
    monkeypatch.setattr(api, "_fp8_fp4_paged_mqa_logits_impl", fake.fp8_fp4_paged_mqa_logits)
    return api


@pytest.fixture(params=["0.26", "0.33", "installed"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    fake = FakeDeepGemm()
    if request.param == "installed":
        made = installed_vllm(fake, monkeypatch)
    else:
        made = {"0.26": vllm_0_26, "0.33": vllm_0_33}[request.param](fake)
    monkeypatch.setattr(made, "fake", fake, raising=False)
    return made


def test_deep_gemm_native(api: types.SimpleNamespace, small_copies: None) -> None:
    peer = vllm_kernels.DeepGemm(api, SMS, {})
    for next_n in 1, 2:
        step = make_step(Shape(3, 300, ragged=True), next_n, 16, 64, CPU)
        call = peer.logits(step, flattened=False)
        assert api.fake.metadata_calls[-1] == (step.context_lens.tolist(), 64, SMS)
        for copy in 0, 1:
            assert torch.equal(call(copy), reference_logits(step, copy))
        assert api.fake.logits_calls[-1] == {"next_n": next_n}
    assert len(api.fake.metadata_calls) == 2


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("next_n", [2, 3, 4])
def test_deep_gemm_flattened(api: types.SimpleNamespace, small_copies: None, next_n: int, mixed: bool) -> None:
    step = make_step(Shape(3, 300, ragged=True, mixed=mixed), next_n, 16, 64, CPU)
    call = vllm_kernels.DeepGemm(api, SMS, {}).logits(step, flattened=True)
    lens = step.context_lens.view(-1, 1)
    assert api.fake.metadata_calls == [(lens.tolist(), 64, SMS)]
    for copy in 0, 1:
        torch.testing.assert_close(call(copy), reference_logits(step, copy))
    assert api.fake.logits_calls == [{"next_n": 1}] * 2


def test_deep_gemm_takes_what_vllm_says(api: types.SimpleNamespace, small_copies: None) -> None:
    peer = vllm_kernels.DeepGemm(api, SMS, {})
    newer = hasattr(api, "native_next_n_supported")
    assert [n for n in kernel_run.NEXT_NS if peer.takes(n)] == ([1, 2, 4] if newer else [1, 2])
    step = make_step(Shape(3, 300), 3, 16, 64, CPU)
    with pytest.raises(LeftOut, match="this vLLM flattens next_n 3"):
        peer.logits(step, flattened=False)
    with pytest.raises(LeftOut, match="vLLM flattens mixed steps"):
        peer.logits(make_step(Shape(3, 300, mixed=True), 2, 16, 64, CPU), flattened=False)
    if newer:
        four = make_step(Shape(3, 300), 4, 16, 64, CPU)
        assert torch.equal(peer.logits(four, flattened=False)(0), reference_logits(four))
        assert api.fake.metadata_calls[-1][2] == SMS // 2


def fake_modules(monkeypatch: pytest.MonkeyPatch, get_num_sms: Callable[[], int], vendored: object) -> None:
    api = vllm_0_26(FakeDeepGemm())
    api.get_num_sms = get_num_sms
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="0.26.9"))
    monkeypatch.setitem(sys.modules, "vllm.utils.deep_gemm", api)
    monkeypatch.setitem(sys.modules, "vllm.third_party.deep_gemm", vendored)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)


def test_load_names_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, lambda: SMS, types.SimpleNamespace(__version__="2.5.9"))
    peer = vllm_kernels.load_deep_gemm(SMS)
    assert peer.versions == {"vllm": "0.26.9", "deep_gemm": "2.5.9"}
    assert peer.takes(2) and not peer.takes(3)
    monkeypatch.setitem(sys.modules, "deep_gemm", types.SimpleNamespace(__version__="9.0"))
    assert vllm_kernels.load_deep_gemm(SMS).versions["deep_gemm"] == "9.0"


def test_load_finds_the_reason_that_vllm_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> int:
        raise RuntimeError("DeepGEMM is not available")

    fake_modules(monkeypatch, unavailable, None)  # None: its import fails
    with pytest.raises(ImportError, match="vllm.third_party.deep_gemm"):
        vllm_kernels.load_deep_gemm(SMS)
    fake_modules(monkeypatch, unavailable, types.SimpleNamespace())
    with pytest.raises(RuntimeError, match="DeepGEMM is not available"):
        vllm_kernels.load_deep_gemm(SMS)


def test_loading_vllm_leaves_stdout_alone() -> None:
    code = "from vllm_mqa_sm90.bench.kernel import vllm_kernels\ntry: vllm_kernels.load_deep_gemm(132)\nexcept Exception: pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == ""


# Reports.


def synthetic_report() -> Report:
    """Two shapes at next_n 1 to 3; at the second, DeepGEMM failed, and so did we at next_n 3."""
    result = Report(
        gpu={"name": "NVIDIA H100 80GB HBM3", "sms": SMS, "driver": "580.1"},
        versions={"vllm_mqa_sm90": "0.1.0", "torch": "2.11.0", "vllm": "0.26.0"},
        date="2026-01-31T12:00:00+00:00",
        command="vllm-mqa-sm90 bench kernel",
        heads=64,
        page=64,
        read_bytes_per_s=3.11e12,
    )
    for next_n, ours, native, flattened in ((1, 97.0, 102.8, None), (2, 109.2, 110.3, 201.0), (3, 119.5, None, 300.9)):
        row = Row("256x8192", next_n, 300_000_000, 100.0, plan_us=2.6, relative_errors={OURS: 1.5e-4})
        times = {OURS: ours, NATIVE: native, FLATTENED: flattened}
        row.times_us = {side: time for side, time in times.items() if time is not None}
        if native is None:
            row.left_out[NATIVE] = "this vLLM flattens next_n 3"
        result.rows.append(row)
    no_nvcc = {NATIVE: "AssertionError: in _find_cuda_home"}
    result.rows += [
        Row("64x8192:ragged", 1, 60_000_000, 20.0, {OURS: 26.0}, 2.1, {OURS: 1.5e-4}, dict(no_nvcc)),
        Row("64x8192:ragged", 2, 62_000_000, 20.5, {OURS: 27.0}, 2.1, {OURS: 1.5e-4}, dict(no_nvcc)),
        Row("64x8192:ragged", 3, 64_000_000, 21.0, left_out={OURS: "[relative] error 1.0e-02"}),
    ]
    return result


def test_json_holds_every_row(tmp_path: Path) -> None:
    synthetic_report().write(tmp_path / "kernel.json")
    content = json.loads((tmp_path / "kernel.json").read_text())
    assert (content["gpu"]["driver"], content["read_bytes_per_s"], content["command"]) == (
        "580.1", 3.11e12, "vllm-mqa-sm90 bench kernel",
    )  # fmt: skip
    third = content["rows"][2]
    assert third["times_us"] == {OURS: 119.5, FLATTENED: 300.9}
    assert third["x_floor"] == pytest.approx({OURS: 1.195, FLATTENED: 3.009})


def shown(width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(synthetic_report()))
    return console.export_text()


def test_table_fits_80_columns() -> None:
    lines = [line.split() for line in shown(80).splitlines()]
    assert ["256", "x", "8192", "1", "97.0", "0.97", "2.6", "102.8", "(1.06)", "-"] in lines
    assert ["2", "109.2", "1.09", "2.6", "110.3", "(1.01)", "201.0", "(1.84)"] in lines
    assert ["3", "119.5", "1.20", "2.6", "-", "300.9", "(2.52)"] in lines
    assert ["64", "x", "8192", "ragged", "1", "26.0", "1.30", "2.1", "-", "-"] in lines
    assert ["3", "failed", "-", "-", "-", "-"] in lines
    assert "…" not in shown(80)


def test_notes_are_a_line_for_each_reason() -> None:
    assert report.notes(synthetic_report()) == [
        "64 x 8192 ragged, next_n 3: [relative] error 1.0e-02",
        "DeepGEMM native, 1 of 6 cases: this vLLM flattens next_n 3",
        "DeepGEMM native, 2 of 6 cases: AssertionError: in _find_cuda_home",
    ]


def test_one_line() -> None:
    def deep() -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        deep()
    assert report.one_line(caught.value) == "AssertionError: in deep"
    assert report.one_line(RuntimeError("\nnvcc failed\nlong log")) == "RuntimeError: nvcc failed"
    assert len(report.one_line(RuntimeError("x" * 999))) == 200
    assert report.one_line(LeftOut("as it is")) == "as it is"


def test_plot(tmp_path: Path) -> None:
    assert plot.draw(synthetic_report(), tmp_path) == [tmp_path / "kernel.png", tmp_path / "kernel.svg"]  # no steps
    pixels = imread(tmp_path / "kernel.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900
    for colour in plot.COLOURS.values():
        exact = torch.tensor([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        assert (torch.from_numpy(pixels[..., :3]) - exact).abs().amax(dim=-1).lt(0.01).sum() > 500
    assert "<svg" in (tmp_path / "kernel.svg").read_text()


# The command.


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("kernels",),
        ("kernel", "--shape", "4"),
        ("kernel", "--next-n", "9"),
        ("kernel", "--next-n"),
        ("kernel", "--heads", "8"),
        ("kernel", "--page", "16"),
        ("kernel", "--output", __file__),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", *arguments])
    assert exit.value.code == 2


@pytest.mark.parametrize("gpu", [None, ("NVIDIA A100", 8, 0)])
def test_without_sm90_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    gpu: tuple[str, int, int] | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    if gpu:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu[0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu[1:])
    assert cli.main(["bench", "kernel", "--output", str(tmp_path / "out")]) == 1
    found = "NVIDIA A100 has 8.0" if gpu else "PyTorch finds none"
    needed = "needs a GPU of compute capability 9.0 (H100, H200, GH200)"
    captured = capsys.readouterr()
    assert captured.err == f"vllm-mqa-sm90 bench kernel: {needed}, and {found}\n"
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_run(on_cpu: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, content = bench_kernel(tmp_path, *TWO_SHAPES)
    assert status == 0
    rows = content["rows"]
    assert [(row["shape"], row["next_n"]) for row in rows] == [
        (shape, next_n) for shape in ("3x300:ragged", "2x64") for next_n in (1, 2, 3, 4)
    ]
    assert [sorted(row["times_us"]) for row in rows] == 2 * [
        [NATIVE, OURS], [FLATTENED, NATIVE, OURS], [FLATTENED, OURS], [FLATTENED, OURS],
    ]  # fmt: skip
    for row in rows:
        shape = Shape.parse(row["shape"])
        assert row["floor_bytes"] == floor_bytes(shape, row["next_n"], 16)
        assert row["floor_us"] == pytest.approx(row["floor_bytes"] / 1e12 * 1e6)
        assert row["x_floor"][OURS] == pytest.approx(10 / row["floor_us"])
        assert all(error < 1e-6 for error in row["relative_errors"].values())
        assert row["plan_us"] == 10.0
    assert content["versions"]["vllm"] == "0.26.0" and content["versions"]["torch"] == torch.__version__
    shapes = "--shape 3x300:ragged --shape 2x64"
    assert content["command"] == f"vllm-mqa-sm90 bench kernel --output {tmp_path} --heads 16 {shapes}"
    assert all(calls >= 60 and replays == 30 for calls, replays in on_cpu.timed)
    assert (tmp_path / "kernel.png").is_file() and (tmp_path / "kernel.svg").is_file()
    captured = capsys.readouterr()
    assert "Test GPU, driver 1.2; vllm_mqa_sm90" in captured.out
    assert "10.0 (1.00)" in captured.out
    assert "DeepGEMM native, 2 of 8 cases: this vLLM flattens next_n 3" in captured.out
    assert "3 x 300 ragged, next_n 3: vllm-mqa-sm90 10.0 us, DeepGEMM flattened 10.0 us, " in captured.err


def test_run_of_mixed_steps(on_cpu: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, content = bench_kernel(tmp_path, "--shape", "5x300:mixed", "--next-n", "1", "3")
    assert status == 0
    assert [(row["shape"], row["next_n"]) for row in content["rows"]] == [("5x300:mixed", 1), ("5x300:mixed", 3)]
    for row in content["rows"]:
        assert sorted(row["times_us"]) == [FLATTENED, OURS]
        assert all(error < 1e-6 for error in row["relative_errors"].values())
    assert "DeepGEMM native, 2 of 2 cases: vLLM flattens mixed steps" in capsys.readouterr().out


def test_copies_are_called_in_turn(
    on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def replay_us(calls: list[partial], replays: int) -> float:
        seen.append([call.args[0] for call in calls if call.args])  # the plan has none
        return 10.0

    monkeypatch.setattr(kernel_run, "replay_us", replay_us)
    bench_kernel(tmp_path, "--shape", "2x600", "--next-n", "3")
    ours, _, *others = seen  # our step, three of vLLM's kernels after our logits, flattened, these three after that
    copies = -(-steps.COLD_BYTES // (2 * 10 * 64 * 132))
    assert copies > 1 and ours == list(range(copies)) * -(-60 // copies)
    assert others == [ours] * 8


def test_quick(on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_run, "QUICK_SHAPES", (Shape(2, 100),))
    status, content = bench_kernel(tmp_path, "--quick")
    assert status == 0
    assert [(row["shape"], row["next_n"]) for row in content["rows"]] == [("2x100", 1), ("2x100", 3)]
    assert {replays for _, replays in on_cpu.timed} == {12}
    assert content["command"].endswith("--heads 16 --quick")


@pytest.mark.parametrize(("factor", "text"), [(1.0003, "relative error 3.0e-04"), (float("nan"), "relative error nan")])
def test_wrong_result_is_not_timed(
    on_cpu: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, text: str
) -> None:
    on_cpu.error = factor
    status, content = bench_kernel(tmp_path, *TWO_SHAPES, "--next-n", "3")
    assert status == 1
    assert on_cpu.timed == []
    expected = f"{text} against the reference, expected at most 2e-04"
    assert [row["left_out"] for row in content["rows"]] == [{OURS: expected}] * 2
    assert f"2 x 64, next_n 3: {expected}" in capsys.readouterr().out


def test_an_unwritten_logit_is_seen(
    on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = vllm_mqa_sm90.paged_mqa_logits

    def lazy(*arguments: torch.Tensor, out: torch.Tensor | None = None, **options: int) -> torch.Tensor:
        logits = right(*arguments, **options)
        if out is not None:
            out[:, 1:] = logits[:, 1:]
            return out
        return logits

    monkeypatch.setattr(vllm_mqa_sm90, "paged_mqa_logits", lazy)
    status, content = bench_kernel(tmp_path, "--shape", "2x64", "--next-n", "1")
    assert status == 1 and content["rows"][0]["relative_errors"] == {OURS: None}


def test_refused_case_fails_alone(on_cpu: types.SimpleNamespace, tmp_path: Path) -> None:
    on_cpu.refuses = lambda context_lens: context_lens.shape[1] == 2
    status, content = bench_kernel(tmp_path, "--shape", "2x64", "--next-n", "1", "2", "3")
    assert status == 1
    assert [row["left_out"].get(OURS) for row in content["rows"]] == [
        None, "RuntimeError: q: expected something else", None,
    ]  # fmt: skip


def test_deep_gemm_that_fails_leaves_its_column_empty(
    on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeDeepGemm()
    api = vllm_0_26(fake)

    def no_compiler(*_: object) -> torch.Tensor:
        raise RuntimeError("NVCC compilation failed\n" + "long log\n" * 99)

    monkeypatch.setattr(fake, "get_paged_mqa_logits_metadata", no_compiler)
    monkeypatch.setattr(vllm_kernels, "load_deep_gemm", lambda num_sms: vllm_kernels.DeepGemm(api, SMS, {}))
    status, content = bench_kernel(tmp_path, *TWO_SHAPES, "--next-n", "1", "2")
    assert status == 0
    assert all(list(row["times_us"]) == [OURS] for row in content["rows"])
    out = capsys.readouterr().out
    assert "DeepGEMM native, 4 of 4 cases: RuntimeError: NVCC compilation failed\n" in out
    assert "DeepGEMM flattened, 2 of 4 cases: RuntimeError: NVCC compilation failed\n" in out
    assert "long log" not in out


def test_deep_gemm_with_wrong_result_is_not_compared(
    on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeDeepGemm()
    right = fake.fp8_fp4_paged_mqa_logits
    monkeypatch.setattr(fake, "fp8_fp4_paged_mqa_logits", lambda *arguments: right(*arguments) * 1.01)
    monkeypatch.setattr(vllm_kernels, "load_deep_gemm", lambda num_sms: vllm_kernels.DeepGemm(vllm_0_26(fake), SMS, {}))
    status, content = bench_kernel(tmp_path, "--shape", "2x64", "--next-n", "1")
    assert status == 0
    assert content["rows"][0]["left_out"][NATIVE].startswith("relative error 1.0e-02")


def test_no_vllm(
    on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: object) -> None:
        raise ModuleNotFoundError("No module named 'vllm'")

    monkeypatch.setattr(vllm_kernels, "load_deep_gemm", missing)
    monkeypatch.setattr(vllm_kernels, "load_topk", missing)
    status, content = bench_kernel(tmp_path, "--shape", "2x64", "--next-n", "3")
    assert status == 0 and "vllm" not in content["versions"]
    reason = "1 of 1 cases: ModuleNotFoundError: No module named 'vllm'\n"
    out = capsys.readouterr().out
    for what in "DeepGEMM native", "DeepGEMM flattened", "our logits + vLLM's top-k":
        assert f"{what}, {reason}" in out
    assert content["rows"][0]["step_us"] == {STEP: 10.0} and "stock vLLM, " not in out


def test_interrupted_run_keeps_its_cases(
    on_cpu: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(context_lens: torch.Tensor) -> bool:
        if context_lens.shape[1] == 3:
            raise KeyboardInterrupt
        return False

    on_cpu.refuses = interrupt
    status, content = bench_kernel(tmp_path, "--shape", "2x64")
    assert status == 130
    assert [row["next_n"] for row in content["rows"]] == [1, 2]
    assert f"interrupted; {tmp_path}/kernel.json has the cases before" in capsys.readouterr().err


def test_no_memory_for_the_read_bandwidth(
    on_cpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(replays: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")

    monkeypatch.setattr(kernel_run, "read_bandwidth", full)
    assert cli.main(["bench", "kernel"]) == 1
    assert "vllm-mqa-sm90 bench kernel: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err


def test_without_matplotlib_the_json_stays(
    on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vllm_mqa_sm90.bench.plot")
    monkeypatch.delattr(bench, "plot")
    status, content = bench_kernel(tmp_path, "--shape", "2x64", "--next-n", "3")
    assert status == 0 and len(content["rows"]) == 1
    error = capsys.readouterr().err
    assert f"the results are in {tmp_path}, the plots are not drawn" in error
    assert "pip install 'vllm-mqa-sm90[bench]'" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel.json"]


def test_without_output_nothing_is_written(
    on_cpu: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "kernel", "--shape", "2x64", "--heads", "16"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "2 x 64" in capsys.readouterr().out


# On a GPU.


@pytest.mark.gpu
def test_quick_on_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_mqa_sm90.cli", "bench", "kernel", "--quick", "--output", str(tmp_path)]
    command += ["--shape", "3x2000:ragged", "--shape", "2x5000", "--next-n", "1", "2", "3", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "kernel.json").read_text())
    assert 2e12 < content["read_bytes_per_s"] < 6e12
    assert [(row["shape"], row["next_n"]) for row in content["rows"]] == [
        (shape, next_n) for shape in ("3x2000:ragged", "2x5000") for next_n in (1, 2, 3, 4)
    ]
    for row in content["rows"]:
        assert 1 < row["times_us"][OURS] < 100
        assert 1 < row["plan_us"] < 100
        assert 0 < row["relative_errors"][OURS] <= kernel_run.TOLERANCE
        assert row["step_us"].keys() >= {STEP, STEP_VLLM_TOPK}, row["left_out"]
        assert all(1 < us < 200 for us in row["step_us"].values())
    assert imread(tmp_path / "kernel.png").shape[0] > 300


@pytest.mark.gpu
def test_times_of_known_kernels() -> None:
    """Sleeps of ten times the cycles take ten times as long."""
    long, short = (kernel_run.replay_us([partial(torch.cuda._sleep, cycles)] * 5, 12) for cycles in (2_000_000, 200_000))
    assert 50 < short < 1000
    assert long / short == pytest.approx(10, rel=0.3)
