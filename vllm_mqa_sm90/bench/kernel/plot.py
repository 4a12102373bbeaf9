# SPDX-License-Identifier: Apache-2.0
"""The plot of a kernel benchmark. Needs matplotlib: import this module only to draw.

`python -m vllm_mqa_sm90.bench.kernel.plot DIR` draws DIR/kernel.json again.
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vllm_mqa_sm90.bench import figures
from vllm_mqa_sm90.bench.kernel.report import FLATTENED, NATIVE, OURS, SIDES, Report, Row

COLOURS = {OURS: "#0072b2", NATIVE: "#8c8c8c", FLATTENED: "#e69f00"}  # distinct to the colour-blind too
_FLOOR = {"color": "black", "linewidth": 0.8, "linestyle": "--", "label": "memory floor"}
_COLUMNS = 4
_BAR = 0.29  # of the distance between two next_n


def draw(report: Report, directory: Path) -> list[Path]:
    """Writes kernel.png and kernel.svg: a panel for each shape, times over the floor for each next_n."""
    panels: dict[str, list[Row]] = {}
    for row in report.rows:
        panels.setdefault(row.name, []).append(row)
    figure, axes = figures.grid(len(panels), _COLUMNS, (3.1, 2.5), 8, sharey=True)
    for panel, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(panel, name, rows)
    for panel in axes[:, 0]:
        panel.set_ylabel("time / memory floor")

    sides = [side for side in SIDES if any(side in row.times_us for row in report.rows)]
    handles = [Patch(color=COLOURS[side], label=SIDES[side]) for side in sides] + [Line2D([], [], **_FLOOR)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figures.write(figure, report, directory, "kernel")


def _draw_panel(panel: Axes, name: str, rows: list[Row]) -> None:
    places: dict[str, list[float]] = {side: [] for side in SIDES}
    for middle, row in enumerate(rows):
        for index, side in enumerate(row.times_us):
            places[side].append(middle + (index - (len(row.times_us) - 1) / 2) * _BAR)
    for side in SIDES:
        heights = [row.x_floor(side) for row in rows if side in row.times_us]
        bars = panel.bar(places[side], heights, width=_BAR, color=COLOURS[side])
        panel.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    panel.axhline(1, **_FLOOR)
    panel.set_title(name, fontsize=10)
    panel.set_xticks(range(len(rows)), [f"next_n {row.next_n}" for row in rows], fontsize=8)
    panel.set_xlim(-0.6, len(rows) - 0.4)
    panel.tick_params(axis="x", length=0)
    panel.tick_params(axis="y", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws DIR/kernel.json again.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    folder = parser.parse_args().directory
    draw(Report.read(folder / "kernel.json"), folder)
