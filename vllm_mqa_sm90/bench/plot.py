# SPDX-License-Identifier: Apache-2.0
"""The plots of the benchmarks. Needs matplotlib: import this module only to draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vllm_mqa_sm90.bench.kernel import report as kernel
from vllm_mqa_sm90.bench.kernel.report import FLATTENED, NATIVE, OURS, STEP, STEP_VLLM_TOPK, STEPS, STOCK_STEP
from vllm_mqa_sm90.bench.serve import report as serve
from vllm_mqa_sm90.bench.serve.report import PLUGIN, STOCK
from vllm_mqa_sm90.bench.serve.trace import FAMILIES, OTHER
from vllm_mqa_sm90.bench.serve.workloads import Workload

# Distinct to the colour-blind too.
COLOURS = {OURS: "#0072b2", NATIVE: "#8c8c8c", FLATTENED: "#e69f00"}
STEP_COLOURS = {STEP: "#0072b2", STEP_VLLM_TOPK: "#56b4e9", STOCK_STEP: "#8c8c8c"}
_FAMILY_COLOURS = dict(
    zip((*FAMILIES, OTHER), ("#000000", "#d55e00", "#56b4e9", "#e69f00", "#009e73", "#0072b2", "#bfbfbf"), strict=True)
)
_TOP_K_ALPHA = 0.45  # of a bar's upper part
_FLOOR = {"color": "black", "linewidth": 0.8, "linestyle": "--", "label": "memory floor"}
_BAR = 0.29  # of the distance between two next_n
# Where both sides have the same figure, stock's marker is a ring around the plugin's.
_STYLES = {
    STOCK: {"linestyle": "--", "marker": "o", "markersize": 6, "markerfacecolor": "none"},
    PLUGIN: {"linestyle": "-", "marker": "o", "markersize": 3},
}
_BEST = {"marker": "*", "markersize": 11}
_FEW_BARS = 6  # so many in a panel of three beside each other


def draw(report: kernel.Report | serve.Report, directory: Path) -> list[Path]:
    """Writes kernel and kernel-steps, or serve and serve-steps, those with something to draw, as .png and .svg."""
    if isinstance(report, kernel.Report):
        drawn = {"kernel": _kernel_times(report), "kernel-steps": _kernel_steps(report)}
    else:
        drawn = {"serve": _serve_speeds(report), "serve-steps": _serve_steps(report)}
    paths = []
    for name, figure in drawn.items():
        for suffix in ("png", "svg") if figure else ():
            paths.append(directory / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=160)
    return paths


def _grid(panels: int, columns: int, size: tuple[float, float], width: float, **options: Any) -> tuple[Figure, Any]:
    """A figure with `panels` axes, at most `columns` beside each other, and the array of these, the unused ones too.

    size: of a panel, inches; width: of the figure, at least. `options` go to `Figure.subplots`.
    """
    lines = -(-panels // columns)
    columns = -(-panels // lines)  # as even as can be
    figure = Figure(figsize=(max(size[0] * columns, width), size[1] * lines + 1.2), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, **options)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    for unused in axes.flat[panels:]:
        unused.set_axis_off()
    return figure, axes


def _captioned(figure: Figure, handles: Sequence[Artist], lines: Iterable[str], **options: Any) -> Figure:
    """With a legend of `handles` above; what was measured where below."""
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, **options)
    figure.supxlabel("\n".join(lines), fontsize=7, color="#404040")
    return figure


def _kernel_times(report: kernel.Report) -> Figure:
    """Times over the floor for each next_n."""
    figure, panels = _by_shape(report, "time / memory floor", sharey=True)
    for panel, rows in panels:
        for middle, row in enumerate(rows):
            for index, side in enumerate(row.times_us):
                place = middle + (index - (len(row.times_us) - 1) / 2) * _BAR
                bar = panel.bar(place, row.x_floor(side), width=_BAR, color=COLOURS[side])
                panel.bar_label(bar, fmt="%.2f", fontsize=6, padding=1)
        panel.axhline(1, **_FLOOR)
    sides = [side for side in kernel.SIDES if any(side in row.times_us for row in report.rows)]
    handles = [Patch(color=COLOURS[side], label=kernel.SIDES[side]) for side in sides] + [Line2D([], [], **_FLOOR)]
    return _captioned(figure, handles, (report.setting, report.conditions))


def _kernel_steps(report: kernel.Report) -> Figure | None:
    """Microseconds of whole steps for each next_n, what top-k adds above the logits."""
    if not any(row.step_us for row in report.rows):
        return None
    figure, panels = _by_shape(report, "microseconds")
    for panel, rows in panels:
        for middle, row in enumerate(rows):
            for step, total in row.step_us.items():
                place = middle + (list(STEPS).index(step) - 1) * _BAR
                style = {"width": _BAR, "color": STEP_COLOURS[step]}
                # A step that skips requests may take less than the logits of them all.
                logits = min(row.logits_us(step), total)
                panel.bar(place, logits, **style)
                bar = panel.bar(place, total - logits, bottom=logits, alpha=_TOP_K_ALPHA, **style)
                panel.bar_label(bar, [f"{total:.1f}"], fontsize=6, padding=1)
        panel.margins(y=0.1)
    steps = [step for step in STEPS if any(step in row.step_us for row in report.rows)]
    handles = [Patch(color=STEP_COLOURS[step], label=STEPS[step]) for step in steps]
    handles.append(Patch(facecolor="black", alpha=_TOP_K_ALPHA / 2, label="of it, added by top-k"))
    return _captioned(figure, handles, (report.setting, report.conditions, report.step_conditions))


def _by_shape(report: kernel.Report, label: str, **options: Any) -> tuple[Figure, list[tuple[Axes, list[kernel.Row]]]]:
    """A figure with a panel for each shape, and the shape's rows; `label` is what is measured upwards."""
    shapes = {row.name: [each for each in report.rows if each.name == row.name] for row in report.rows}
    figure, axes = _grid(len(shapes), 4, (3.1, 2.5), 8, **options)
    for panel, (name, rows) in zip(axes.flat, shapes.items(), strict=False):
        panel.set_title(name, fontsize=10)
        panel.set_xticks(range(len(rows)), [f"next_n {row.next_n}" for row in rows], fontsize=8)
        panel.set_xlim(-0.6, len(rows) - 0.4)
        panel.tick_params(axis="x", length=0)
        panel.tick_params(axis="y", labelsize=8)
    for panel in axes[:, 0]:
        panel.set_ylabel(label)
    return figure, list(zip(axes.flat, shapes.values(), strict=False))


def _serve_speeds(report: serve.Report) -> Figure | None:
    """Tokens a second of a request against k: a panel a context, a colour a concurrency, a star the best k."""
    panels: dict[str, list[serve.Measurement]] = {}
    for each in sorted(report.measurements, key=lambda each: (Workload.parse(each.workload).order, each.k)):
        panels.setdefault(Workload.parse(each.workload).title, []).append(each)
    panels = {title: found for title, found in panels.items() if len({each.k for each in found}) > 1}
    if not panels:
        return None
    drawn = [each for found in panels.values() for each in found]
    ks = sorted({each.k for each in drawn})
    concurrencies = sorted({Workload.parse(each.workload).concurrency for each in drawn})
    shades = np.linspace(0, 0.8, len(concurrencies))
    colours = dict(zip(concurrencies, colormaps["viridis"](shades), strict=True))
    figure, axes = _grid(len(panels), 3, (3.6, 2.8), 9)
    for panel, (title, found) in zip(axes.flat, panels.items(), strict=False):
        for workload, side in dict.fromkeys((each.workload, each.side) for each in found):
            points = (each for each in found if (each.workload, each.side) == (workload, side))
            line = [(each.k, each.request_tokens_per_s) for each in points]
            style = {"color": colours[Workload.parse(workload).concurrency], **_STYLES[side]}
            panel.plot(*zip(*line, strict=True), linewidth=1.2, **style)
            panel.plot(*max(line, key=lambda point: point[1]), **{**style, **_BEST})
        panel.set_xticks(ks)
        panel.set_xlim(ks[0] - 0.3, ks[-1] + 0.3)
        panel.set_ylim(0, 1.08 * max(each.request_tokens_per_s for each in found))
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("speculative tokens, k", fontsize=8)
        panel.set_ylabel("tok/s of a request, decoding", fontsize=8)
        panel.tick_params(labelsize=8)
    handles = [Line2D([], [], color=colours[each], label=f"{each} at once") for each in concurrencies]
    handles += [Line2D([], [], color="black", label=name, **_STYLES[side]) for side, name in serve.SIDES.items()]
    handles.append(Line2D([], [], color="black", linestyle="", label="best k", **_BEST))
    return _captioned(figure, handles, (report.setting, report.conditions), fontsize=8)


def _serve_steps(report: serve.Report) -> Figure | None:
    """GPU time of a decode step by family of kernels, and its share of the step; a panel a workload, by context."""
    order = list(serve.SIDES)
    panels: dict[str, list[serve.Profiled]] = {}
    by_bar = sorted(report.profiles, key=lambda each: (each.k, order.index(each.side)))
    for each in sorted(by_bar, key=lambda each: Workload.parse(each.workload).order):
        panels.setdefault(each.workload, []).append(each)
    if not panels:
        return None
    most = max(map(len, panels.values()))
    columns, width = (3, 3.6) if most <= _FEW_BARS else (2, 0.35 * most)
    figure, axes = _grid(len(panels), columns, (width, 3.0), 9)
    for panel, (workload, profiles) in zip(axes.flat, panels.items(), strict=False):
        # The sides of a k beside each other, and a gap after them.
        ks = sorted({each.k for each in profiles})
        sides = [side for side in order if side in {each.side for each in profiles}]
        places = [(len(sides) + 0.6) * ks.index(each.k) + sides.index(each.side) for each in profiles]
        below = np.zeros(len(profiles))
        for name, colour in _FAMILY_COLOURS.items():
            heights = np.array([each.profile.families[name] / 1e3 for each in profiles])
            panel.bar(places, heights, bottom=below, color=colour, width=0.8)
            below += heights
        for place, each, top in zip(places, profiles, below, strict=True):
            if share := report.share_of_step(each, each.profile.busy_us):
                panel.text(place, top, f" {share:.0%}", ha="center", va="bottom", fontsize=6, rotation=90)
        panel.xaxis.remove_overlapping_locs = False  # of one side alone a bar is in the middle
        panel.set_xticks(places, [each.side for each in profiles], minor=True)
        middles = [(len(sides) + 0.6) * place + (len(sides) - 1) / 2 for place in range(len(ks))]
        panel.set_xticks(middles, [f"k={k}" for k in ks])
        panel.tick_params(axis="x", which="minor", labelrotation=90)
        panel.tick_params(axis="x", which="major", length=0, pad=32)
        panel.set_xlim(-1, places[-1] + 1)
        panel.set_ylim(top=1.15 * max(below))
        panel.set_title(workload, fontsize=9)
        panel.set_ylabel("ms of kernels in a decode step (% of the step)", fontsize=8)
        panel.tick_params(which="both", labelsize=7)
    handles = [Patch(color=colour, label=name) for name, colour in reversed(_FAMILY_COLOURS.items())]
    return _captioned(figure, handles, (report.setting, report.conditions), fontsize=8)
