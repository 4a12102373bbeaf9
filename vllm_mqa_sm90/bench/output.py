# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks do alike with their reports, and where these go."""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def directory(text: str) -> Path:
    """A folder to write to, for argparse."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, given the file {text}")
    return path


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def known(of: type, content: dict[str, Any]) -> dict[str, Any]:
    """What of JSON's `content` is a field of the dataclass: the rest follows from these, or is another version's."""
    names = {each.name for each in fields(of)}
    return {name: value for name, value in content.items() if name in names}


def show(report: Any, tables: Sequence[Table], notes: Sequence[str]) -> None:
    """On stdout: what was measured where, the tables, and what there is to say about them."""
    console = Console(highlight=False)
    console.print(report.setting, report.conditions, sep="\n", markup=False, soft_wrap=True)
    for table in tables:
        console.print(table)
        console.print()
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def draw(report: Any, directory: Path, module: str, written: str, plots: str) -> None:
    """Draws a report by `module` of this package, which needs matplotlib; without it says how to do so later.

    written: the file of `directory` that the report is in; plots: what is not drawn.
    """
    name = f"vllm_mqa_sm90.bench.{module}"
    try:
        plot = importlib.import_module(name)
    except ImportError as error:
        print(
            f"{directory}/{written} is written; {plots} are not drawn: {error}. "
            "Install matplotlib (pip install 'vllm-mqa-sm90[bench]'), then draw them: "
            f"python -m {name} {shlex.quote(str(directory))}",
            file=sys.stderr,
        )
        return
    plot.draw(report, directory)
