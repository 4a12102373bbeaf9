# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 check`: would the plugin take over on this machine, and if not, why not."""

import argparse
import contextlib
import json
import sys
from typing import Any

import torch

from vllm_mqa_sm90 import backend, machine, plugin, seams


def examine() -> dict[str, Any]:
    """What the plugin would find here; JSON-able.

    `reasons` against taking over (empty: it would), and what they rest on: `versions` (None: not
    installed), `gpus`, `seams` with the `problem` of each (None: matches).
    """
    versions = {"vllm_mqa_sm90": machine.version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    report: dict[str, Any] = {"reasons": [], "versions": versions, "gpus": machine.gpus(), "seams": []}
    try:
        if backend.mode() == "off":
            report["reasons"].append("MQA_SM90 is off")
    except ValueError as error:
        report["reasons"].append(str(error))
    try:
        versions["vllm"] = seams.vllm_version()
    except ImportError as error:
        versions["vllm"] = None
        report["reasons"].append(f"vLLM cannot be imported: {error}")
        return report
    report["reasons"] += plugin.problems()
    release = seams.release()
    report["seams"] = [
        {"path": seam.path, "why": seam.why, "problem": seam.problem()}
        for seam in (seams.applying(release) if release else ())
    ]
    return report


def _show(report: dict[str, Any]) -> None:
    """Line by line, as long as they come: what is piped is whole and can be searched."""
    for gpu in report["gpus"]:
        _fact("GPU", f"{gpu['name']}, compute capability {gpu['compute_cap']}, driver {gpu['driver_version']}")
    if not report["gpus"]:
        _fact("GPU", "none (nvidia-smi lists none)")
    for name, version in report["versions"].items():
        _fact(name, version or "none")
    if report["seams"]:
        print("\nplaces in vLLM that the plugin knows:")
    for seam in report["seams"]:
        print(f"- {seam['problem'] or seam['path'] + ': as expected'}")
    if not report["reasons"]:
        print("\nThe plugin would take over the sparse indexer's decode here.")
        return
    print("\nThe plugin would not take over here:")
    for reason in report["reasons"]:
        print(f"- {reason}")


def _fact(name: str, value: str) -> None:
    print(f"{name:<15}{value}")


def run(args: argparse.Namespace) -> int:
    """0: would take over here; 1: would not."""
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to stdout
        report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 1 if report["reasons"] else 0


def add_parser(subparsers: Any) -> None:
    """Adds the `check` command."""
    parser = subparsers.add_parser(
        "check",
        help="say whether the plugin would take over here",
        description="Exit status: 0 the plugin would take over here, 1 it would not, 2 wrong usage.",
    )
    parser.add_argument("--json", action="store_true", help="write the findings to stdout as JSON")
    parser.set_defaults(func=run)
