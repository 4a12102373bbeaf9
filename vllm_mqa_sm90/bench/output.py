# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks do alike: their reports, their tables, their progress."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

NEEDS_SM90 = "needs a GPU of compute capability 9.0 (H100, H200, GH200)"
_DAY = 24 * 3600.0


def write_whole(path: Path, text: str) -> None:
    """The file is there with all of the text or, when this is killed meanwhile, not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def directory(text: str) -> Path:
    """A folder to write to, for argparse."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, given the file {text}")
    return path


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def setting(gpu: str, driver: str, versions: Mapping[str, str], date: str) -> str:
    """Where and when a run was, in one line; `date` is that of `now`."""
    return f"{gpu}, driver {driver}; {', '.join(f'{name} {version}' for name, version in versions.items())}; {date[:10]}"


def stop(benchmark: str, reason: str, status: int = 1) -> int:
    """Says why a benchmark ends; its exit status."""
    print(f"vllm-mqa-sm90 bench {benchmark}: {reason}", file=sys.stderr)
    return status


class Progress(Bar):
    """On stderr: a bar with the time left, and a line for each thing done; without a terminal just the lines."""

    def __init__(self, steps: int) -> None:
        console = Console(stderr=True, highlight=False)
        columns = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        columns += (TextColumn("{task.description}"),)
        # A step may take many minutes: all of them tell the speed.
        options = {"transient": True, "disable": not console.is_terminal, "speed_estimate_period": _DAY}
        super().__init__(*columns, console=console, **options)
        self._steps = self.add_task("", total=steps)

    def show(self, what: str, detail: str = "") -> None:
        """What goes on now."""
        room = max(0, self.console.width - 60 - len(what))
        self.update(self._steps, description=f"{escape(what)}  [dim]{escape(detail[:room])}[/]")

    def say(self, text: str, *, steps: int = 0) -> None:
        """A line that stays; with `steps` that are done."""
        self.advance(self._steps, steps)
        self.console.print(escape(text), soft_wrap=True)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1, gap: int = 0) -> Table:
    """A table whose first column says only once what lines in a row have in common, with a gap before the next.

    left: columns aligned to the left; gap: between columns, besides a space.
    """
    result = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
    for place, heading in enumerate(headings):
        result.add_column(heading, justify="left" if place < left else "right", no_wrap=True)
    previous = ""
    for first, *cells in lines:
        if first != previous and previous:
            result.add_section()
        result.add_row(first if first != previous else "", *cells)
        previous = first
    return result


def figure(value: float | None, digits: int = 2, times: float = 1) -> str:
    """For a table: `times` the value; of None a dash."""
    return "-" if value is None else f"{times * value:.{digits}f}"


def show(report: Any, tables: Sequence[Table], notes: Sequence[str], directory: Path | None) -> None:
    """On stdout what was measured where, the tables, and what there is to say about them; plots in the directory."""
    console = Console(highlight=False)
    console.print(report.setting, report.conditions, sep="\n", markup=False, soft_wrap=True)
    for each in tables:
        console.print(each)
        console.print()
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    if directory is None:
        return
    try:
        from vllm_mqa_sm90.bench import plot
    except ImportError as error:
        how = "pip install 'vllm-mqa-sm90[bench]', and run this again"
        print(f"the results are in {directory}, the plots are not drawn: {error}: {how}", file=sys.stderr)
    else:
        plot.draw(report, directory)
