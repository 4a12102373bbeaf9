# SPDX-License-Identifier: Apache-2.0
"""The plots of a kernel benchmark. Needs matplotlib: import this module only to draw.

`python -m vllm_mqa_sm90.bench.kernel.plot DIR` draws DIR/kernel.json again.
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vllm_mqa_sm90.bench import figures
from vllm_mqa_sm90.bench.kernel.report import FLATTENED, NATIVE, OURS, SIDES, STEP, STEP_VLLM_TOPK, STEPS, STOCK_STEP
from vllm_mqa_sm90.bench.kernel.report import Report, Row

COLOURS = {OURS: "#0072b2", NATIVE: "#8c8c8c", FLATTENED: "#e69f00"}  # distinct to the colour-blind too
STEP_COLOURS = {STEP: "#0072b2", STEP_VLLM_TOPK: "#56b4e9", STOCK_STEP: "#8c8c8c"}
_TOP_K_ALPHA = 0.45  # of a bar's upper part
_FLOOR = {"color": "black", "linewidth": 0.8, "linestyle": "--", "label": "memory floor"}
_COLUMNS = 4
_BAR = 0.29  # of the distance between two next_n


def draw(report: Report, directory: Path) -> list[Path]:
    """Writes kernel.png and kernel.svg, and kernel-steps.png and .svg of a report with whole steps."""
    panels: dict[str, list[Row]] = {}
    for row in report.rows:
        panels.setdefault(row.name, []).append(row)
    return _draw_logits(report, panels, directory) + (_draw_steps(report, panels, directory) if report.has_steps else [])


def _draw_logits(report: Report, panels: dict[str, list[Row]], directory: Path) -> list[Path]:
    """A panel for each shape: times over the floor for each next_n."""
    figure, axes = figures.grid(len(panels), _COLUMNS, (3.1, 2.5), 8, sharey=True)
    for panel, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(panel, name, rows)
    for panel in axes[:, 0]:
        panel.set_ylabel("time / memory floor")

    sides = [side for side in SIDES if any(side in row.times_us for row in report.rows)]
    handles = [Patch(color=COLOURS[side], label=SIDES[side]) for side in sides] + [Line2D([], [], **_FLOOR)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figures.write(figure, report, directory, "kernel")


def _draw_steps(report: Report, panels: dict[str, list[Row]], directory: Path) -> list[Path]:
    """A panel for each shape: microseconds of whole steps for each next_n, what top-k adds above the logits."""
    figure, axes = figures.grid(len(panels), _COLUMNS, (3.1, 2.5), 8)
    for panel, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        for index, step in enumerate(STEPS):
            places = [middle + (index - 1) * _BAR for middle, row in enumerate(rows) if step in row.step_us]
            totals = [row.step_us[step] for row in rows if step in row.step_us]
            # A step that skips requests may take less than the logits of them all.
            logits = [min(row.logits_us(step), row.step_us[step]) for row in rows if step in row.step_us]
            panel.bar(places, logits, width=_BAR, color=STEP_COLOURS[step])
            added = [total - part for total, part in zip(totals, logits, strict=True)]
            bars = panel.bar(places, added, bottom=logits, width=_BAR, color=STEP_COLOURS[step], alpha=_TOP_K_ALPHA)
            panel.bar_label(bars, [f"{total:.1f}" for total in totals], fontsize=6, padding=1)
        _dress(panel, name, rows)
        panel.margins(y=0.1)
    for panel in axes[:, 0]:
        panel.set_ylabel("microseconds")

    steps = [step for step in STEPS if any(step in row.step_us for row in report.rows)]
    handles = [Patch(color=STEP_COLOURS[step], label=STEPS[step]) for step in steps]
    handles.append(Patch(facecolor="black", alpha=_TOP_K_ALPHA / 2, label="of it, added by top-k"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figures.write(figure, report, directory, "kernel-steps", report.step_conditions)


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
    _dress(panel, name, rows)


def _dress(panel: Axes, name: str, rows: list[Row]) -> None:
    """Its title and axes."""
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
