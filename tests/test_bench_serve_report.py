# SPDX-License-Identifier: Apache-2.0
"""What `bench serve` makes of its figures: ratios, the best k, tables, JSON, plots."""

import io
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console
from rich.table import Table

from vllm_mqa_sm90.bench import plot
from vllm_mqa_sm90.bench.serve.report import (
    Job,
    Measurement,
    Profiled,
    Report,
    best_table,
    notes,
    profile_table,
    table,
)
from vllm_mqa_sm90.bench.serve.steps import full_steps_ms
from vllm_mqa_sm90.bench.serve.trace import FAMILIES, Profile
from vllm_mqa_sm90.bench.serve.workloads import Workload

GPU = {"name": "NVIDIA H100", "compute_cap": "9.0", "driver_version": "580.1"}


def measured(side: str, k: int, tokens_per_s: float, workload: str = "4x1024:cached") -> Measurement:
    rates = [0.8, 0.6][:k]
    itl_ms = 2360 * (1 + sum(rates)) / tokens_per_s  # by both one server is as fast over another
    return Measurement(side, k, workload, 123.4, itl_ms, 5.678, tokens_per_s, 0.7 if k else None, rates, {}, [itl_ms])


def profiled(side: str, k: int) -> Profiled:
    families = dict.fromkeys((*FAMILIES, "other"), 100.0) | {"index logits": 300.0}
    return Profiled(side, k, "4x1024:cached", Profile(20, 1200.0, 1080.0, families))


@pytest.fixture
def report() -> Report:
    found = Report("model", [GPU], {"vllm": "0.26.0"}, "2026-01-01T00:00:00", "bench serve", ["--x", "1"], [0.813, 0.63])
    figures = ("stock", 0, 200.0), ("plugin", 0, 204.0), ("plugin", 2, 459.0), ("stock", 2, 300.0), ("stock", 1, 310.0)
    found.measurements = [measured(*each) for each in figures] + [measured("plugin", 2, 50.0, "1xshort")]
    found.profiles = [profiled("plugin", 2), profiled("stock", 2)]
    found.failures = {"plugin k=1": "the server ended"}
    return found


def shown(report: Report, table: Callable[[Report], Table] = table) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(report))
    return console.file.getvalue()


def test_ratios(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "serve.json")
    entries = json.loads((tmp_path / "serve.json").read_text())["measurements"]
    assert [(each["over_no_mtp"], each["over_stock"]) for each in entries] == [
        pytest.approx(each) for each in ((1, 1), (1, 1.02), (459 / 204, 1.53), (1.5, 1), (1.55, 1))
    ] + [(None, None)]


def test_cached_prompts_are_compared_by_decode_steps_others_by_tokens_a_second(report: Report) -> None:
    report.measurements = [
        Measurement(side, k, workload, 1.0, itl, 1.0, tokens_per_s, None, [0.5] * k, {}, [itl])
        for workload in ("4x1024:cached", "4x1024")
        for side, k, itl, tokens_per_s in (("stock", 0, 10.0, 100.0), ("stock", 1, 12.0, 120.0), ("plugin", 1, 8.0, 130.0))
    ]
    report.measurements[2].accepted_at = [0.25]  # with the same k it is chance
    _, _, cached, _, _, new = report.measurements
    assert report.over(cached, "stock", 1) == 1.5 and report.over(cached, "stock", 0) == pytest.approx(1.25 * 10 / 8)
    assert report.over(new, "stock", 1) == pytest.approx(13 / 12) and report.over(new, "stock", 0) == 1.3
    assert report.over(cached, "plugin", 0) is None


@pytest.fixture
def many(report: Report) -> Report:
    """With 0 to 7 speculative tokens, of which stock vLLM is best with 2, the plugin with 3."""
    report.measurements = []
    for workload, times in (("8x8192:cached", 1), ("8x1024:cached", 0.5), ("1x8192:cached", 0.25)):
        for k in range(8):
            rates = [0.8, 0.6, 0.5, 0.3, 0.2, 0.1, 0.1][:k]
            for side, itl in ("stock", 10 + 4 * k), ("plugin", 10 + 2 * k):
                report.measurements.append(
                    Measurement(side, k, workload, 1.0, itl * times, 1.0, 100.0, 0.5 if k else None, rates, {}, [100.0])
                )
    return report


def test_best_k_by_hand(many: Report, tmp_path: Path) -> None:
    many.write(tmp_path / "serve.json")
    content = json.loads((tmp_path / "serve.json").read_text())
    stock, plugin = 2.4 / 0.018, 2.9 / 0.016
    assert content["best"][:2] == [
        {"workload": "8x8192:cached", "side": "stock", "k": 2, "request_tokens_per_s": pytest.approx(stock), "over_stock": 1},
        {
            "workload": "8x8192:cached", "side": "plugin", "k": 3,
            "request_tokens_per_s": pytest.approx(plugin), "over_stock": pytest.approx(plugin / stock),
        },
    ]  # fmt: skip
    found = content["measurements"][4]
    assert found["tokens_per_step"] == pytest.approx(2.4) and found["request_tokens_per_s"] == pytest.approx(2400 / 18)
    lines = [" ".join(line.split()) for line in shown(many, best_table).splitlines()]
    assert lines[1] == "workload server k=0 k=1 k=2 k=3 k=4 k=5 k=6 k=7 best k x stock"
    assert lines[3:5] == [
        "8x8192:cached stock 100 129 133 132 123 113 103 94.7 2 1.00",
        "plugin 100 150 171 181 178 170 159 150 3 1.36",
    ]


def test_without_stock_or_with_a_gap_the_best_k_has_no_ratio(many: Report) -> None:
    many.measurements = [each for each in many.measurements if each.side == "plugin"]
    del many.measurements[1]
    lines = [" ".join(line.split()) for line in shown(many, best_table).splitlines()]
    assert lines[3] == "8x8192:cached plugin 100 - 171 181 178 170 159 150 3 -"


def test_table(report: Report) -> None:
    lines = [" ".join(line.split()) for line in shown(report).splitlines()]
    assert lines[3:8] == [
        "4x1024:cached stock k=0 123 11.80 5.68 200 - - 1.00 1.00",
        "plugin k=0 123 11.57 5.68 204 - - 1.00 1.02",
        "stock k=1 123 13.70 5.68 310 70.0 80 1.55 1.00",
        "stock k=2 123 18.88 5.68 300 70.0 80 60 1.50 1.00",
        "plugin k=2 123 12.34 5.68 459 70.0 80 60 2.25 1.53",
    ]
    assert lines[9] == "1xshort plugin k=2 123 113.28 5.68 50 70.0 80 60 - -"


def test_longest_table_is_as_wide_as_a_terminal(report: Report) -> None:
    rates = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7]
    report.measurements = [
        Measurement("plugin", k, "8x131072:cached", 99999.0, 99.99, 99.99, 99999.0, 1.0, rates[:k], {}, [1.0])
        for k in range(8)
    ]
    assert "…" not in shown(report) and "…" not in shown(report, best_table)
    assert shown(report).count("\n") > 3 + 8  # seven positions take two lines


def test_profile_table(report: Report) -> None:
    report.measurements[3].itl_ms = 1.2
    report.profiles.append(profiled("stock", 3))  # was not measured
    lines = [" ".join(line.split()) for line in shown(report, profile_table).splitlines()]
    assert lines[3:6] == [
        "4x1024:cached stock k=2 1.08 90 300 25 100 8",
        "plugin k=2 1.08 9 300 2 100 1",
        "stock k=3 1.08 - 300 - 100 -",
    ]


def test_notes_and_conditions_say_what_the_figures_are(report: Report) -> None:
    assert report.setting == "NVIDIA H100, driver 580.1; vllm 0.26.0; 2026-01-01"
    synthetic = "acceptance is NOT the model's: vLLM's synthetic one, set to 0.813, 0.63"
    assert report.conditions == f"model with --x 1; {synthetic}"
    assert notes(report) == ["plugin k=1 failed: the server ended"]
    for each, runs in zip(report.measurements[1:], ([12.1, 12.0, 12.2], [9.9, 10.3, 10.0]), strict=False):
        each.runs, each.itl_ms = runs, statistics.median(runs)
    widest = "at most 4.0% apart (4x1024:cached, plugin k=2)"
    assert notes(report)[0] == f"cached prompts: the middle of 3 runs, whose ITL is {widest}"
    report.acceptance, report.gpus = None, [GPU, GPU]
    assert report.conditions == "model with --x 1; acceptance is that of the model's own drafts"
    assert report.setting.startswith("NVIDIA H100 (2 visible), driver ")


def test_steps_in_which_all_requests_are_under_way() -> None:
    begins, gaps = [0.0, 2.0, 2.0], [[1.0] * 8, [0.5] * 4, [0.25] * 24]
    client = {"start_times": begins, "ttfts": [1.0, 1.0, 0.5], "itls": gaps}  # from 1 to 9, 3 to 5 and 2.5 to 8.5
    assert full_steps_ms(client, 3) == [1000] * 2 + [500] * 4 + [250] * 8
    assert full_steps_ms(client, 2) == [1000] * 5 + [500] * 4 + [250] * 24
    assert full_steps_ms(client, 1) == [1000] * 8 + [500] * 4 + [250] * 24
    assert full_steps_ms(client, 4) == []
    # One after the other, at the same moment too, and one that has a single token.
    assert full_steps_ms({"start_times": [0.0, 2.0, 3.0], "ttfts": [1.0, 0.0, 0.0], "itls": [[1.0], [1.0], []]}, 1) == [1000] * 2
    assert full_steps_ms({"start_times": [0.0, 2.0], "ttfts": [1.0, 0.0], "itls": [[1.0], [1.0]]}, 2) == []


def test_middle_run() -> None:
    times = {"median_ttft_ms": 3.0, "median_tpot_ms": 1.0, "output_throughput": 90.0}
    runs = [{**times, "itl_ms": itl_ms} for itl_ms in (2.0, 3.0, 1.0)]
    runs[0] |= {"spec_decode_acceptance_rate": 70.0, "spec_decode_per_position_acceptance_rates": [0.8, 0.6]}
    job = Job("stock", 2, Workload(4, 1024, cached=True))
    middle = Measurement.of(job, runs)
    assert (middle.tokens_per_s, middle.runs) == (90, [2, 3, 1])
    assert (middle.ttft_ms, middle.itl_ms, middle.tpot_ms, middle.client) == (3, 2, 1, runs[0])
    assert (middle.side, middle.k, middle.workload) == ("stock", 2, "4x1024:cached")
    assert (middle.accepted, middle.accepted_at) == (0.7, [0.8, 0.6])
    assert Measurement.of(job, runs[1:2]).accepted is None


def test_plots(report: Report, tmp_path: Path) -> None:
    report.measurements.append(measured("stock", 0, 150.0, "4x8192:cached"))
    names = ["serve.png", "serve.svg", "serve-steps.png", "serve-steps.svg"]
    assert [path.name for path in plot.draw(report, tmp_path)] == names
    for name in ("serve", "serve-steps"):
        assert imread(tmp_path / f"{name}.png").shape[0] > 300
        assert "set to 0.813, 0.63" in svg_text(tmp_path / f"{name}.svg")
    texts = svg_text(tmp_path / "serve.svg").splitlines()
    assert "1024 tokens, in the prefix cache" in texts and "4 at once" in texts
    assert not any("8192 tokens" in text or "short" in text for text in texts)  # with one k there is no line to draw
    assert " 9%" in svg_text(tmp_path / "serve-steps.svg").splitlines()


def test_plots_of_many(many: Report, tmp_path: Path) -> None:
    many.profiles = [profiled(side, k) for k in range(8) for side in ("plugin", "stock")]
    many.profiles += [replace(each, workload="4x64:cached") for each in many.profiles]
    plot.draw(many, tmp_path)
    texts = svg_text(tmp_path / "serve.svg").splitlines()
    assert [text for text in texts if "tokens, in" in text or "at once" in text] == [
        "1024 tokens, in the prefix cache", "8192 tokens, in the prefix cache", "1 at once", "8 at once",
    ]  # fmt: skip
    texts = svg_text(tmp_path / "serve-steps.svg").splitlines()
    assert [text for text in texts if ":cached" in text] == ["4x64:cached", "4x1024:cached"]
    assert [texts.count(text) for text in ("stock", "plugin", "k=7", "top-k")] == [16, 16, 2, 1]


def svg_text(path: Path) -> str:
    """What an SVG's texts are: matplotlib draws them as paths, with the text in a comment."""
    return "\n".join(re.findall("<!-- (.*?) -->", path.read_text(), re.DOTALL))


def test_nothing_to_draw(report: Report, tmp_path: Path) -> None:
    report.measurements, report.profiles = report.measurements[-1:], []
    assert plot.draw(report, tmp_path) == []
