# SPDX-License-Identifier: Apache-2.0
"""The plots of a serving benchmark. Needs matplotlib: import this module only to draw.

`python -m vllm_mqa_sm90.bench.serve.plot DIR` draws DIR/serve.json again.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vllm_mqa_sm90.bench import figures
from vllm_mqa_sm90.bench.serve.report import PLUGIN, SIDES, STOCK, Measurement, Profiled, Report
from vllm_mqa_sm90.bench.serve.trace import FAMILIES, OTHER
from vllm_mqa_sm90.bench.serve.workloads import Workload

_FAMILY_COLOURS = dict(
    zip((*FAMILIES, OTHER), ("#000000", "#d55e00", "#56b4e9", "#e69f00", "#009e73", "#0072b2", "#bfbfbf"), strict=True)
)
# Where both sides have the same figure, stock's marker is a ring around the plugin's.
_STYLES = {
    STOCK: {"linestyle": "--", "marker": "o", "markersize": 6, "markerfacecolor": "none"},
    PLUGIN: {"linestyle": "-", "marker": "o", "markersize": 3},
}
_BEST = {"marker": "*", "markersize": 11}
_COLUMNS = 3
_FEW_BARS = 6  # so many in a panel of three beside each other


def draw(report: Report, directory: Path) -> list[Path]:
    """Writes serve.png and serve.svg, and with profiles serve-steps.png and serve-steps.svg.

    Which of them there is something to draw for: serve needs workloads with several numbers of speculative tokens.
    """
    drawn = {"serve": _speeds(report), "serve-steps": _steps(report)}
    return [path for name, figure in drawn.items() if figure for path in figures.write(figure, report, directory, name)]


def _speeds(report: Report) -> Figure | None:
    """Tokens a second of a request against k, a panel for each context; a colour for each concurrency, the best k a star."""
    panels: dict[str, list[Measurement]] = {}
    for each in sorted(report.measurements, key=lambda each: (Workload.parse(each.workload).order, each.k)):
        panels.setdefault(_title(Workload.parse(each.workload)), []).append(each)
    panels = {title: found for title, found in panels.items() if len({each.k for each in found}) > 1}
    if not panels:
        return None
    drawn = [each for found in panels.values() for each in found]
    ks = sorted({each.k for each in drawn})
    concurrencies = sorted({Workload.parse(each.workload).concurrency for each in drawn})
    shades = np.linspace(0, 0.8, len(concurrencies))
    colours = dict(zip(concurrencies, colormaps["viridis"](shades), strict=True))
    figure, axes = figures.grid(len(panels), _COLUMNS, (3.6, 2.8), 9)
    for panel, (title, found) in zip(axes.flat, panels.items(), strict=False):
        lines: dict[tuple[str, str], list[Measurement]] = {}
        for each in found:
            lines.setdefault((each.workload, each.side), []).append(each)
        for (workload, side), line in lines.items():
            speeds = [each.request_tokens_per_s for each in line]
            colour = colours[Workload.parse(workload).concurrency]
            panel.plot([each.k for each in line], speeds, color=colour, linewidth=1.2, **_STYLES[side])
            best = speeds.index(max(speeds))
            panel.plot(line[best].k, speeds[best], color=colour, **{**_STYLES[side], **_BEST})
        panel.set_xticks(ks)
        panel.set_xlim(ks[0] - 0.3, ks[-1] + 0.3)
        panel.set_ylim(0, 1.08 * max(each.request_tokens_per_s for each in found))
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("speculative tokens, k", fontsize=8)
        panel.set_ylabel("tok/s of a request, decoding", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colours[each], label=f"{each} at once") for each in concurrencies]
    handles += [Line2D([], [], color="black", label=name, **_STYLES[side]) for side, name in SIDES.items()]
    handles.append(Line2D([], [], color="black", linestyle="", label="best k", **_BEST))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _title(workload: Workload) -> str:
    """What workloads of one panel have in common."""
    if not workload.random:
        return f"{workload.content} prompts"
    return f"{workload.content} tokens, {'in the prefix cache' if workload.cached else 'new'}"


def _steps(report: Report) -> Figure | None:
    """GPU time of a decode step by family of kernels and its share of the step, a panel for each workload, by context."""
    panels: dict[str, list[Profiled]] = {}
    for each in sorted(report.profiles, key=lambda each: Workload.parse(each.workload).order):
        panels.setdefault(each.workload, []).append(each)
    if not panels:
        return None
    most = max(map(len, panels.values()))
    columns, width = (_COLUMNS, 3.6) if most <= _FEW_BARS else (2, 0.35 * most)
    figure, axes = figures.grid(len(panels), columns, (width, 3.0), 9)
    for panel, (workload, profiles) in zip(axes.flat, panels.items(), strict=False):
        profiles.sort(key=lambda each: (each.k, list(SIDES).index(each.side)))
        ks = sorted({each.k for each in profiles})
        # The sides of a k beside each other, and a gap after them.
        sides = [side for side in SIDES if side in {each.side for each in profiles}]
        places = [(len(sides) + 0.6) * ks.index(each.k) + sides.index(each.side) for each in profiles]
        below = [0.0] * len(profiles)
        for name, colour in _FAMILY_COLOURS.items():
            heights = [each.profile.families[name] / 1e3 for each in profiles]
            panel.bar(places, heights, bottom=below, color=colour, width=0.8)
            below = [bottom + height for bottom, height in zip(below, heights, strict=True)]
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
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=name) for name, colour in reversed(_FAMILY_COLOURS.items())]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws DIR/serve.json again.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    folder = parser.parse_args().directory
    draw(Report.read(folder / "serve.json"), folder)
