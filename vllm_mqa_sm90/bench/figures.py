# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks' plots have alike. Needs matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def grid(panels: int, columns: int, size: tuple[float, float], width: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure with `panels` axes, at most `columns` beside each other; the array of axes has the unused ones too.

    size: of a panel, inches; width: of the figure, at least. `options` go to `Figure.subplots`.
    """
    lines = -(-panels // columns)
    columns = -(-panels // lines)  # as even as can be
    figure = Figure(figsize=(max(size[0] * columns, width), size[1] * lines + 1.2), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, **options)
    for unused in axes.flat[panels:]:
        unused.set_axis_off()
    return figure, axes


def write(figure: Figure, report: Any, directory: Path, name: str, *more: str) -> list[Path]:
    """Writes `name`.png and `name`.svg, with what was measured where, and `more` lines, below."""
    figure.supxlabel("\n".join([report.setting, report.conditions, *more]), fontsize=7, color="#404040")
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths
