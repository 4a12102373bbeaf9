# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 check`: would the plugin take over on this machine, and if not, why not."""

import argparse
import contextlib
import gc
import json
import os
import sys
from typing import Any

from vllm_mqa_sm90 import machine

IMPORTING = "importing PyTorch and vLLM: seconds, more of them the first time after they were installed"


def examine() -> dict[str, Any]:
    """What the plugin would find here; JSON-able.

    `reasons` against taking over, all of them (empty: it would), and what they rest on: `versions` (None: not
    installed), `gpus`, `environment`, `seams`: each place in vLLM once, with its `problem` (None: matches). `topk`:
    whose top-k would follow the plugin's logits (None: there would be none).
    """
    # Of a vLLM without a GPU warnings are many, and say nothing that is not among the reasons.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    from vllm_mqa_sm90 import backend, plugin, seams

    versions = {"vllm_mqa_sm90": machine.version(), "torch": torch.__version__, "cuda": torch.version.cuda, "vllm": None}
    gpus, environment = machine.gpus(), machine.environment()
    report: dict[str, Any] = {"versions": versions, "gpus": gpus, "environment": environment, "seams": [], "topk": None}
    mode_problem = vllm_problem = None
    try:
        mode_problem = "MQA_SM90 is off" if backend.mode() == "off" else None
    except ValueError as error:
        mode_problem = str(error)
    try:
        versions["vllm"] = seams.vllm_version()
    except ModuleNotFoundError as error:
        missing = error.name == "vllm"
        vllm_problem = "vLLM is not installed in this Python" if missing else f"vLLM cannot be imported: {error}"
    except Exception as error:  # whatever a broken one may raise
        vllm_problem = f"vLLM cannot be imported: {type(error).__name__}: {error}"

    gpu_problem, library_problem = _gpu_problem(gpus), plugin.library_problem()
    if vllm_problem is not None:
        found = [gpu_problem, mode_problem, vllm_problem, library_problem]
        return {"reasons": [reason for reason in found if reason is not None], **report}
    # What vLLM sees counts, as where there is no nvidia-smi; why it sees none, nvidia-smi may say better.
    if (seen := plugin.gpu_problem()) is None or gpu_problem is None:
        gpu_problem = seen
    found = [gpu_problem, mode_problem, plugin.release_problem(), library_problem, plugin.seams_problem()]
    report = {"reasons": [reason for reason in found if reason is not None], **report}
    places: dict[str, dict[str, Any]] = {}
    release = seams.release()
    for seam in seams.applying(release) if release else ():
        place = places.setdefault(seam.path, {"path": seam.path, "why": seam.why, "problem": None})
        place["problem"] = place["problem"] or seam.problem()
    report["seams"] = list(places.values())
    if not report["reasons"]:
        report["topk"] = plugin.whose_topk()
    return report


def _gpu_problem(gpus: list[dict[str, str]]) -> str | None:
    if not gpus:
        return "no GPU: nvidia-smi lists none"
    if any(gpu["compute_cap"] == "9.0" for gpu in gpus):
        return None
    names = ", ".join(dict.fromkeys(f"{gpu['name']} ({gpu['compute_cap']})" for gpu in gpus))
    return f"the GPU is {names}; the kernel is for compute capability 9.0 (H100, H200, GH200)"


def _show(report: dict[str, Any]) -> None:
    """Line by line, as long as they come: what is piped is whole and can be searched."""
    for gpu in report["gpus"]:
        _fact("GPU", f"{gpu['name']}, compute capability {gpu['compute_cap']}, driver {gpu['driver_version']}")
    if not report["gpus"]:
        _fact("GPU", "none (nvidia-smi lists none)")
    for name, value in {**report["versions"], **report["environment"]}.items():
        _fact(name, value or "none")
    if places := report["seams"]:
        differ = sum(place["problem"] is not None for place in places)
        _fact("code of vLLM", f"{len(places)} places that the plugin replaces or relies on, {differ or 'none'} unlike expected")
    if not report["reasons"]:
        print(f"\nThe plugin would take over the sparse indexer's decode here. Top-k: {report['topk']}.")
        return
    print("\nThe plugin would not take over here:")
    for reason in report["reasons"]:
        print(f"- {reason}")


def _fact(name: str, value: str) -> None:
    print(f"{name:<15}{value}")


def run(args: argparse.Namespace) -> int:
    """0: would take over here; 1: would not."""
    print(IMPORTING, file=sys.stderr, flush=True)
    gc.disable()  # the imports make a million objects that stay
    try:
        with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to stdout
            report = examine()
    finally:
        gc.enable()
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
