# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 bench serve`: what 0 to 7 speculative tokens give, with stock vLLM and with the plugin.

For each configuration a `vllm serve` of its own, asked by vLLM's own client, `vllm bench serve`.
What is measured is kept under --output, and not measured again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mqa_sm90 import checkpoint, machine, stopping
from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.serve import workloads
from vllm_mqa_sm90.bench.serve.kept import Job, Kept
from vllm_mqa_sm90.bench.serve.report import SIDES, Configuration, Report, best_table, notes, profile_table, table
from vllm_mqa_sm90.bench.serve.run import Run
from vllm_mqa_sm90.bench.serve.workloads import Workload
from vllm_mqa_sm90.server import seconds
from vllm_mqa_sm90.sizes import MAX_NEXT_N

_DEFAULT_KS = (0, 1, 2)
_MAX_K = MAX_NEXT_N - 1  # with more a request's rows are no longer one group
# Of vllm serve. With another name for the model the client would not find it.
_OURS = ("--host", "--port", "--served-model-name", "--speculative-config", "--profiler-config")
_DEFAULT_OUTPUT = Path("bench-serve")
_DEFAULT_TIMEOUT = 1800.0


def add_parser(subparsers: Any) -> None:
    """Adds `serve` to the benchmarks."""
    parser = subparsers.add_parser(
        "serve",
        help=f"vllm serve with 0 to {_MAX_K} speculative tokens, stock and with the plugin",
        usage="%(prog)s [options] MODEL [-- VLLM_ARGUMENT ...]",
        description="Starts a vllm serve for each configuration and measures it with vllm bench serve. What follows -- "
        "goes to vllm serve, such as --tensor-parallel-size 8. Exit status: 0 all measured, 1 no GPU of compute "
        "capability 9.0 or something failed, 2 wrong usage.",
    )
    parser.add_argument("model", type=_model, metavar="MODEL", help="name or folder of a DSA model; what make-checkpoint wrote")
    parser.add_argument(
        "-k",
        type=_ks,
        default=_DEFAULT_KS,
        metavar="N,...",
        help=f"numbers of speculative tokens, 0 to {_MAX_K} (default: {_joined(_DEFAULT_KS)})",
    )
    parser.add_argument("--side", choices=tuple(SIDES), help="only stock vLLM, or only the plugin (default: both)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--workload",
        action="append",
        type=_workload,
        metavar="NxWHAT",
        help="N requests at once, of WHAT: short, humaneval, a number of random tokens, or this with :cached for prompts "
        f"that the prefix cache holds; may be repeated (default: {len(workloads.DEFAULT)} workloads)",
    )
    chosen.add_argument("--quick", action="store_true", help=f"one small workload: {_joined(workloads.QUICK)}")
    parser.add_argument(
        "--acceptance",
        type=_rates,
        metavar="RATE,...",
        help="vLLM's synthetic acceptance: the share of drafts accepted up to each position (default: with the random "
        f"weights of make-checkpoint {_joined(checkpoint.ACCEPTANCE_RATES)}, of which the first two are those of real models "
        "on short prompts and the others assume that acceptance falls on as GLM-5.2's does; else none)",
    )
    parser.add_argument(
        "--profile", action="store_true", help="also profile decode steps of each :cached workload, by family of kernels"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what --output has")
    parser.add_argument(
        "--output",
        type=output.directory,
        default=_DEFAULT_OUTPUT,
        metavar="DIR",
        help="for results, logs, caches, serve.json and plots (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=_DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="for the start of a server, and for each run of the client (default: %(default).0f)",
    )
    parser.set_defaults(func=_run, vllm_arguments=[])


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def _model(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise argparse.ArgumentTypeError(f"expected a folder with a config.json, {text} has none")
    elif path.parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"expected a folder, or a name of the form ORG/NAME, found no folder {text} (make-checkpoint makes one)"
        )
    return path


def _ks(text: str) -> tuple[int, ...]:
    ks = text.split(",")
    if not all(k.isdecimal() and int(k) <= _MAX_K for k in ks):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to {_MAX_K} with commas between, given {text!r}")
    return tuple(sorted({int(k) for k in ks}))


def _workload(text: str) -> Workload:
    try:
        return Workload.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(map(float, text.split(",")))
    except ValueError:
        rates = ()
    if not rates or not all(0 <= low <= high <= 1 for low, high in zip(rates, (1.0, *rates), strict=False)):
        raise argparse.ArgumentTypeError(f"expected shares from 0 to 1, none above the one before, given {text!r}")
    return rates


def _run(args: argparse.Namespace) -> int:
    """0: all measured; 1: not measurable here, or something failed; 2: wrong usage; 130: interrupted."""
    chosen = tuple(dict.fromkeys(args.workload or (workloads.QUICK if args.quick else workloads.DEFAULT)))
    acceptance = args.acceptance
    if acceptance is None and checkpoint.has_random_weights(args.model):
        acceptance = checkpoint.ACCEPTANCE_RATES
    if problem := _wrong_usage(args, chosen, acceptance):
        return _stop(problem, status=2)
    gpus = [gpu for gpu in machine.gpus() if gpu["compute_cap"] == "9.0"]
    if not gpus:
        return _stop("needs a GPU of compute capability 9.0 (H100, H200, GH200), and nvidia-smi lists none")
    try:
        versions = {"vllm_mqa_sm90": machine.version()}
        versions |= {package: importlib.metadata.version(package) for package in ("vllm", "torch")}
    except importlib.metadata.PackageNotFoundError as error:
        return _stop(f"needs vLLM in this Python, and finds no {error.name}: pip install 'vllm-mqa-sm90[serve]'")
    if problem := next(filter(None, (workload.missing() for workload in chosen)), None):
        return _stop(problem, status=2)

    args.output.mkdir(parents=True, exist_ok=True)
    report = Report(
        model=str(args.model),
        gpus=gpus,
        versions=versions,
        date=output.now(),
        command=_command(args),
        vllm_arguments=args.vllm_arguments,
        acceptance=None if acceptance is None else list(acceptance[: max(args.k)]),
    )
    configurations = [Configuration(side, k) for k in args.k for side in SIDES if args.side in (None, side)]
    jobs = [
        Job(at, workload, profiled)
        for at in configurations
        for workload in chosen
        for profiled in ((False, True) if args.profile and workload.cached else (False,))
    ]
    stopping.by_exception()
    try:
        Run(report, Kept(args.output / "results", report), args.output, args.timeout).do(jobs, fresh=args.fresh)
    except KeyboardInterrupt:
        reason = f"interrupted, the server is stopped; {args.output} keeps what was measured: the same command goes on"
        return _stop(reason, status=130)
    tables = [table(report)]
    if len({each.k for each in report.measurements}) > 1:
        tables.append(best_table(report))
    if report.profiles:
        tables.append(profile_table(report))
    output.show(report, tables, notes(report))
    output.draw(report, args.output, "serve.plot", "serve.json", "the plots")
    return 1 if report.failures else 0


def _stop(reason: str, status: int = 1) -> int:
    print(f"vllm-mqa-sm90 bench serve: {reason}", file=sys.stderr)
    return status


def _wrong_usage(args: argparse.Namespace, chosen: Sequence[Workload], acceptance: Sequence[float] | None) -> str | None:
    if acceptance is not None and len(acceptance) < max(args.k):
        return (
            f"--acceptance: expected a rate for each of the {max(args.k)} draft tokens of -k {_joined(args.k)}, "
            f"given {_joined(acceptance)}: add rates, or leave k={max(args.k)} out"
        )
    for word in args.vllm_arguments:
        if (name := word.partition("=")[0].partition(".")[0]) in _OURS:
            return f"{name}: expected only what bench serve does not set itself after --, given {word}: leave it out"
    if args.profile and not any(workload.cached for workload in chosen):
        return "--profile: expected a :cached workload, which does nothing but decode, given none: add one with --workload"
    return None


def _command(args: argparse.Namespace) -> str:
    """The command that measures the same; where its output goes is left out."""
    words = ["vllm-mqa-sm90", "bench", "serve", str(args.model), "-k", _joined(args.k)]
    if args.side:
        words += ["--side", args.side]
    for workload in args.workload or ():
        words += ["--workload", str(workload)]
    if args.quick:
        words.append("--quick")
    if args.acceptance:
        words += ["--acceptance", _joined(args.acceptance)]
    if args.profile:
        words.append("--profile")
    if args.vllm_arguments:
        words += ["--", *args.vllm_arguments]
    return shlex.join(words)
