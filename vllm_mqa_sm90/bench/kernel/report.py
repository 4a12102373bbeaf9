# SPDX-License-Identifier: Apache-2.0
"""What `bench kernel` found: kept as JSON, shown as tables."""

import json
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.output import figure

OURS, NATIVE, FLATTENED = "ours", "native", "flattened"
SIDES = {OURS: "vllm-mqa-sm90", NATIVE: "DeepGEMM native", FLATTENED: "DeepGEMM flattened"}
STEP, STEP_VLLM_TOPK, STOCK_STEP = "step", "step_vllm_topk", "stock_step"
STEPS = {STEP: "our logits + selection", STEP_VLLM_TOPK: "our logits + vLLM's top-k", STOCK_STEP: "stock vLLM"}
"""Whole steps of the indexer: logits, then their top-k."""
NAMES = SIDES | STEPS


class LeftOut(Exception):
    """Why a side of a case has no time; its text is the whole reason."""


def one_line(error: Exception) -> str:
    """The error in one line of at most 200 characters."""
    if isinstance(error, LeftOut):
        return str(error)
    text = str(error).strip().partition("\n")[0]
    if not text and error.__traceback__ is not None:
        text = f"in {traceback.extract_tb(error.__traceback__)[-1].name}"
    return f"{type(error).__name__}: {text}"[:200]


@dataclass
class Row:
    """One case: a shape at one next_n.

    Attributes:
        shape: as `Shape` reads and writes it.
        next_n: query rows of each request; of a mixed shape, at most.
        floor_bytes: what must move.
        floor_us: that, at the measured read bandwidth.
        times_us: microseconds a call, by side.
        plan_us: microseconds of our plan, which serves all layers of a step.
        relative_errors: against the FP32 reference, by side; null in JSON where not finite.
        left_out: why a side, a whole step or one of vLLM's top-k kernels has no time.
        step_us: microseconds of a whole step, by `STEPS`.
        topk_kernels: the fastest of vLLM's top-k kernels, by whole step.
    """

    shape: str
    next_n: int
    floor_bytes: int
    floor_us: float
    times_us: dict[str, float] = field(default_factory=dict)
    plan_us: float | None = None
    relative_errors: dict[str, float | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    step_us: dict[str, float] = field(default_factory=dict)
    topk_kernels: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a result of ours, logits or selection, is wrong or missing."""
        return OURS in self.left_out or STEP in self.left_out

    def x_floor(self, side: str) -> float:
        return self.times_us[side] / self.floor_us

    def logits_us(self, step: str) -> float:
        """Of a whole step's logits alone."""
        stock = NATIVE if NATIVE in self.times_us else FLATTENED
        return self.times_us[stock if step == STOCK_STEP else OURS]

    def added_us(self, step: str) -> float:
        """What a whole step takes more than its logits alone."""
        return self.step_us[step] - self.logits_us(step)

    @property
    def name(self) -> str:
        """For people: "64 x 8192 ragged"."""
        return self.shape.replace("x", " x ").replace(":", " ")

    def __str__(self) -> str:
        return f"{self.name}, next_n {self.next_n}"


@dataclass
class Report:
    """A run. `read_bytes_per_s` is the measured bandwidth, `date` in ISO 8601 and UTC."""

    gpu: dict[str, Any]
    versions: dict[str, str]
    date: str
    command: str
    heads: int
    page: int
    read_bytes_per_s: float
    rows: list[Row] = field(default_factory=list)
    top_k: int = 2048

    def write(self, path: Path) -> None:
        """As JSON, each row with its times over the floor and what selection adds."""
        content = asdict(self)
        for row, entry in zip(self.rows, content["rows"], strict=True):
            entry["x_floor"] = {side: row.x_floor(side) for side in row.times_us}
            entry["added_us"] = {step: row.added_us(step) for step in row.step_us}
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")

    @property
    def setting(self) -> str:
        """The run in one line."""
        return output.setting(self.gpu["name"], self.gpu["driver"], self.versions, self.date)

    @property
    def conditions(self) -> str:
        """What the times mean, in one line."""
        return (
            f"{self.heads} heads, pages of {self.page}, KV cold in L2; "
            f"floor: bytes that must move at the {self.read_bytes_per_s / 1e12:.3f} TB/s read in this run"
        )

    @property
    def step_conditions(self) -> str:
        """What the times of whole steps mean, in one line."""
        return (
            f"logits, then their top {self.top_k}, which takes (+) us more; "
            f"requests of at most {self.top_k} tokens: our step leaves their logits out"
        )


def table(report: Report) -> Table:
    """A line for each case; DeepGEMM's times with their ratio to ours."""

    def cells(row: Row) -> list[str]:
        if OURS in row.left_out:
            return ["[red]failed[/]", "-", "-", "-", "-"]
        ours = row.times_us[OURS]
        peers = (_with_ratio(row.times_us.get(side), ours) for side in (NATIVE, FLATTENED))
        return [figure(ours, 1), figure(row.x_floor(OURS)), figure(row.plan_us, 1), *peers]

    peers = "DeepGEMM\nnative\nus (/ ours)", "DeepGEMM\nflattened\nus (/ ours)"
    return _table(report, ("ours\nus", "x\nfloor", "plan\nus", *peers), cells)


def step_table(report: Report) -> Table:
    """A line for each case; of whole steps."""

    def cells(row: Row) -> list[str]:
        if row.failed:
            return ["[red]failed[/]", "-", "-"]
        own = (
            f"{row.step_us[step]:.1f} ({row.added_us(step):+.1f})" if step in row.step_us else "-"
            for step in (STEP, STEP_VLLM_TOPK)
        )
        return [*own, _with_ratio(row.step_us.get(STOCK_STEP), row.step_us.get(STEP))]

    result = _table(report, ("ours\nus (+)", "ours, vLLM's top-k\nus (+)", "stock\nus (/ ours)"), cells)
    result.title, result.title_justify, result.title_style = report.step_conditions, "left", ""
    return result


def _table(report: Report, headings: Sequence[str], cells: Callable[[Row], list[str]]) -> Table:
    lines = [(row.name, str(row.next_n), *cells(row)) for row in report.rows]
    return output.table(("batch x context", "next_n", *headings), lines, gap=1)


def _with_ratio(us: float | None, ours: float | None) -> str:
    ratio = f" ({us / ours:.2f})" if us and ours else ""
    return f"{figure(us, 1)}{ratio}"


def notes(report: Report) -> list[str]:
    """Which of vLLM's top-k kernels was fastest, and why times are missing: each failure of ours, each other reason."""
    kernels = Counter(row.topk_kernels[STEP_VLLM_TOPK] for row in report.rows if STEP_VLLM_TOPK in row.topk_kernels)
    fastest = ", ".join(f"{name} in {count}" for name, count in kernels.items())
    found = [f"vLLM's fastest top-k: {fastest} cases"] if kernels else []
    found += [f"{row}: {row.left_out[side]}" for row in report.rows for side in (OURS, STEP) if side in row.left_out]
    reasons = Counter(each for row in report.rows for each in row.left_out.items() if each[0] not in (OURS, STEP))
    others = ((NAMES.get(side, side), count, reason) for (side, reason), count in reasons.items())
    return found + [f"{name}, {count} of {len(report.rows)} cases: {reason}" for name, count, reason in others]
