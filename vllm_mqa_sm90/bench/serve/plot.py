# SPDX-License-Identifier: Apache-2.0
"""The plots of a serving benchmark. Needs matplotlib: import this module only to draw.

`python -m vllm_mqa_sm90.bench.serve.plot DIR` draws DIR/serve.json again.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vllm_mqa_sm90.bench import figures
from vllm_mqa_sm90.bench.serve.report import PLUGIN, SIDES, STOCK, Configuration, Measurement, Profiled, Report
from vllm_mqa_sm90.bench.serve.trace import FAMILIES, OTHER
from vllm_mqa_sm90.bench.serve.workloads import Workload

_K_COLOURS = ("#8c8c8c", "#0072b2", "#d55e00", "#009e73")  # distinct to the colour-blind too
_FAMILY_COLOURS = dict(
    zip((*FAMILIES, OTHER), ("#000000", "#d55e00", "#56b4e9", "#e69f00", "#009e73", "#0072b2", "#bfbfbf"), strict=True)
)
# Where both sides have the same figure, stock's marker is a ring around the plugin's.
_STYLES = {
    STOCK: {"linestyle": "--", "marker": "o", "markersize": 6, "markerfacecolor": "none"},
    PLUGIN: {"linestyle": "-", "marker": "o", "markersize": 3},
}
_COLUMNS = 3


def draw(report: Report, directory: Path) -> list[Path]:
    """Writes serve.png and serve.svg, and with profiles serve-steps.png and serve-steps.svg.

    Which of them there is something to draw for: tokens a second need random prompts.
    """
    drawn = {"serve": _throughput(report), "serve-steps": _steps(report)}
    return [path for name, figure in drawn.items() if figure for path in figures.write(figure, report, directory, name)]


def _throughput(report: Report) -> Figure | None:
    """Tokens a second against context, a panel for each concurrency; stock dashed with rings, the plugin solid with dots."""
    panels: dict[tuple[bool, int], list[tuple[int, Measurement]]] = {}
    for measurement in report.measurements:
        workload = Workload.parse(measurement.workload)
        if isinstance(workload.content, int):
            panels.setdefault((workload.cached, workload.concurrency), []).append((workload.content, measurement))
    if not panels:
        return None
    figure, axes = figures.grid(len(panels), _COLUMNS, (3.6, 2.8), 9)
    for panel, ((cached, concurrency), points) in zip(axes.flat, sorted(panels.items()), strict=False):
        lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for context, each in points:
            lines.setdefault((each.side, each.k), []).append((context, each.tokens_per_s))
        for (side, k), line in lines.items():
            panel.plot(*zip(*sorted(line), strict=True), color=_K_COLOURS[k], linewidth=1.2, **_STYLES[side])
        contexts = sorted({context for context, _ in points})
        panel.set_xscale("log", base=2)
        panel.set_xticks(contexts, [f"{context // 1024}k" if context % 1024 == 0 else str(context) for context in contexts])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        prompts = "prompts in the prefix cache" if cached else "new prompts"
        panel.set_title(f"{concurrency} at once, {prompts}", fontsize=9)
        panel.set_xlabel("context, tokens", fontsize=8)
        panel.set_ylabel("output tok/s", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    ks = sorted({each.k for each in report.measurements})
    handles = [Line2D([], [], color=_K_COLOURS[k], label=f"k={k}" if k else "no MTP") for k in ks]
    handles += [Line2D([], [], color="black", label=name, **_STYLES[side]) for side, name in SIDES.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _steps(report: Report) -> Figure | None:
    """GPU time of a decode step by family of kernels, a panel for each workload, and its share of the step."""
    panels: dict[str, list[Profiled]] = {}
    for each in report.profiles:
        panels.setdefault(each.workload, []).append(each)
    if not panels:
        return None
    figure, axes = figures.grid(len(panels), _COLUMNS, (3.6, 3.0), 9)
    for panel, (workload, profiles) in zip(axes.flat, panels.items(), strict=False):
        profiles.sort(key=lambda each: (each.k, list(SIDES).index(each.side)))
        names = [str(Configuration(each.side, each.k)).replace(" ", "\n") for each in profiles]
        below = [0.0] * len(profiles)
        for name, colour in _FAMILY_COLOURS.items():
            heights = [each.profile.families[name] / 1e3 for each in profiles]
            panel.bar(names, heights, bottom=below, color=colour, width=0.7)
            below = [bottom + height for bottom, height in zip(below, heights, strict=True)]
        for place, (each, top) in enumerate(zip(profiles, below, strict=True)):
            if share := report.share_of_step(each, each.profile.busy_us):
                panel.text(place, top, f"{share:.0%} of\nstep", ha="center", va="bottom", fontsize=6)
        panel.set_ylim(top=1.12 * max(below))
        panel.set_title(workload, fontsize=9)
        panel.set_ylabel("ms of kernels in a decode step", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=name) for name, colour in reversed(_FAMILY_COLOURS.items())]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws DIR/serve.json again.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    folder = parser.parse_args().directory
    draw(Report.read(folder / "serve.json"), folder)
