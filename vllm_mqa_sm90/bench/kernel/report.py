# SPDX-License-Identifier: Apache-2.0
"""What `bench kernel` found: kept as JSON, shown as a table."""

import json
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

OURS, NATIVE, FLATTENED = "ours", "native", "flattened"
SIDES = {OURS: "vllm-mqa-sm90", NATIVE: "DeepGEMM native", FLATTENED: "DeepGEMM flattened"}


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
        left_out: why a side has no time.
    """

    shape: str
    next_n: int
    floor_bytes: int
    floor_us: float
    times_us: dict[str, float] = field(default_factory=dict)
    plan_us: float | None = None
    relative_errors: dict[str, float | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether our own result is wrong or missing."""
        return OURS in self.left_out

    def x_floor(self, side: str) -> float:
        return self.times_us[side] / self.floor_us

    def over_ours(self, side: str) -> float:
        return self.times_us[side] / self.times_us[OURS]

    @property
    def name(self) -> str:
        """For people: "64 x 8192 ragged"."""
        return self.shape.replace("x", " x ").replace(":", " ")


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

    def write(self, path: Path) -> None:
        """As JSON, each row with its times over the floor and the GB/s that these amount to."""
        content = asdict(self)
        for row, entry in zip(self.rows, content["rows"], strict=True):
            entry["x_floor"] = {side: row.x_floor(side) for side in row.times_us}
            entry["gb_per_s"] = {side: row.floor_bytes / time / 1e3 for side, time in row.times_us.items()}
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """What `write` wrote."""
        content = json.loads(path.read_text())
        known = {each.name for each in fields(Row)}
        rows = [Row(**{name: value for name, value in entry.items() if name in known}) for entry in content["rows"]]
        return cls(**{**content, "rows": rows})

    @property
    def setting(self) -> str:
        """The run in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.gpu['name']}, driver {self.gpu['driver']}; {versions}; {self.date[:10]}"

    @property
    def conditions(self) -> str:
        """What the times mean, in one line."""
        return (
            f"{self.heads} heads, pages of {self.page}, KV cold in L2; "
            f"floor: bytes that must move at the {self.read_bytes_per_s / 1e12:.3f} TB/s read in this run"
        )


def table(report: Report) -> Table:
    """A line for each case; DeepGEMM's times with their ratio to ours."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    result.add_column("batch x context", no_wrap=True)
    peers = "DeepGEMM\nnative\nus (/ ours)", "DeepGEMM\nflattened\nus (/ ours)"
    for heading in ("next_n", "ours\nus", "x\nfloor", "GB/s", "plan\nus", *peers):
        result.add_column(heading, justify="right", no_wrap=True)
    previous = ""
    for row in report.rows:
        if row.name != previous and previous:
            result.add_section()
        result.add_row(row.name if row.name != previous else "", str(row.next_n), *_cells(row))
        previous = row.name
    return result


def _cells(row: Row) -> list[str]:
    if row.failed:
        return ["[red]failed[/]", *["-"] * 5]
    ours = row.times_us[OURS]
    peers = [
        f"{row.times_us[side]:.1f} ({row.over_ours(side):.2f})" if side in row.times_us else "-"
        for side in (NATIVE, FLATTENED)
    ]
    rate = row.floor_bytes / ours / 1e3
    return [f"{ours:.1f}", f"{row.x_floor(OURS):.2f}", f"{rate:.0f}", f"{row.plan_us:.1f}", *peers]


def notes(report: Report) -> list[str]:
    """Why times are missing: a line for each failure of ours, one for each reason of DeepGEMM's sides."""
    failures = [f"{row.name}, next_n {row.next_n}: {row.left_out[OURS]}" for row in report.rows if row.failed]
    reasons = Counter((side, row.left_out[side]) for row in report.rows for side in row.left_out if side != OURS)
    return failures + [
        f"{SIDES[side]}, {count} of {len(report.rows)} cases: {reason}" for (side, reason), count in reasons.items()
    ]
