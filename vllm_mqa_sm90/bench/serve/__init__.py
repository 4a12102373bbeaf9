# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 bench serve`: what 0 to 7 speculative tokens give, with stock vLLM and with the plugin.

For each configuration a `vllm serve` of its own, asked by vLLM's own client, `vllm bench serve`.
What is measured is kept under --output, and not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_mqa_sm90 import checkpoint, machine, stopping
from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.serve import workloads
from vllm_mqa_sm90.bench.serve.report import SIDES, Job, Report, notes, tables
from vllm_mqa_sm90.bench.serve.run import Run
from vllm_mqa_sm90.bench.serve.workloads import Workload
from vllm_mqa_sm90.server import seconds
from vllm_mqa_sm90.sizes import MAX_NEXT_N

_DEFAULT_KS = (0, 1, 2)
_MAX_K = MAX_NEXT_N - 1  # with more a request's rows are no longer one group
# Of vllm serve. With another name for the model the client would not find it.
_OURS = ("--host", "--port", "--served-model-name", "--speculative-config", "--profiler-config")


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
    model = "name or folder of a DSA model; what make-checkpoint wrote"
    parser.add_argument("model", type=_model, metavar="MODEL", help=model)
    ks = f"numbers of speculative tokens, 0 to {_MAX_K} (default: {_joined(_DEFAULT_KS)})"
    parser.add_argument("-k", type=_ks, default=_DEFAULT_KS, metavar="N,...", help=ks)
    parser.add_argument("--side", choices=tuple(SIDES), help="only stock vLLM, or only the plugin (default: both)")
    chosen = parser.add_mutually_exclusive_group()
    workload = "N requests at once, of WHAT: short, humaneval, a number of random tokens, or this with :cached for "
    workload += f"prompts that the prefix cache holds; may be repeated (default: {len(workloads.DEFAULT)} workloads)"
    chosen.add_argument("--workload", action="append", type=Workload.parse, metavar="NxWHAT", help=workload)
    chosen.add_argument("--quick", action="store_true", help=f"one small workload: {_joined(workloads.QUICK)}")
    parser.add_argument(
        "--acceptance",
        type=_rates,
        metavar="RATE,...",
        help="vLLM's synthetic acceptance: the share of drafts accepted up to each position (default: with the random "
        f"weights of make-checkpoint {_joined(checkpoint.ACCEPTANCE_RATES)}, of which the first two are those of real "
        "models on short prompts and the others assume that acceptance falls on as GLM-5.2's does; else none)",
    )
    method = "who drafts: the method of vLLM's --speculative-config, dspark for DeepSeek-V4.1 (default: %(default)s)"
    parser.add_argument("--method", default="mtp", help=method)
    profile = "also profile decode steps of each :cached workload, by family of kernels"
    parser.add_argument("--profile", action="store_true", help=profile)
    skip = "contexts are random index keys that nobody prefills (of :cached workloads): for times, as tokens mean nothing"
    parser.add_argument("--skip-prefill", action="store_true", help=skip)
    tokens = "tokens of each answer to a :cached prompt (default: %(default)d)"
    parser.add_argument("--tokens", type=_count, default=workloads.DECODE_TOKENS, metavar="N", help=tokens)
    alternate = "start both sides of a k at once, and ask them in turn; both have to fit: give -- --kv-cache-memory-bytes"
    parser.add_argument("--alternate", action="store_true", help=alternate)
    parser.add_argument("--fresh", action="store_true", help="measure again what --output has")
    folder, written = Path("bench-serve"), "for results, logs, caches, serve.json and plots (default: %(default)s)"
    parser.add_argument("--output", type=output.directory, default=folder, metavar="DIR", help=written)
    timeout = "for the start of a server, and for each run of the client (default: %(default).0f)"
    parser.add_argument("--timeout", type=seconds, default=1800.0, metavar="SECONDS", help=timeout)
    parser.set_defaults(func=_run, vllm_arguments=[])


def _joined(values: Iterable[Any]) -> str:
    return ",".join(map(str, values))


def _model(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise argparse.ArgumentTypeError(f"expected a folder with a config.json, {text} has none")
    elif path.parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text, re.ASCII):
        expected = "expected a folder, or a name of the form ORG/NAME"
        raise argparse.ArgumentTypeError(f"{expected}, found no folder {text} (make-checkpoint makes one)")
    return path


def _ks(text: str) -> list[int]:
    ks = text.split(",")
    if not all(k.isdecimal() and int(k) <= _MAX_K for k in ks):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to {_MAX_K} with commas between, given {text!r}")
    return sorted(set(map(int, ks)))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a number from 2 on, given {text!r}")
    return int(text)


def _rates(text: str) -> list[float]:
    try:
        rates = list(map(float, text.split(",")))
    except ValueError:
        rates = [-1.0]
    if not all(0 <= low <= high <= 1 for low, high in zip(rates, [1.0, *rates], strict=False)):
        raise argparse.ArgumentTypeError(f"expected shares from 0 to 1, none above the one before, given {text!r}")
    return rates


def _run(args: argparse.Namespace) -> int:
    """0: all measured; 1: not measurable here, or something failed; 2: wrong usage; 130: interrupted."""
    asked = args.workload or (workloads.QUICK if args.quick else workloads.DEFAULT)
    chosen = [dataclasses.replace(workload, decode_tokens=args.tokens) for workload in dict.fromkeys(asked)]
    acceptance = args.acceptance
    if acceptance is None and checkpoint.has_random_weights(args.model):
        acceptance = checkpoint.ACCEPTANCE_RATES
    if problem := _wrong_usage(args, chosen, acceptance):
        return output.stop("serve", problem, status=2)
    gpus = [gpu for gpu in machine.gpus() if gpu["compute_cap"] == "9.0"]
    if not gpus:
        return output.stop("serve", f"{output.NEEDS_SM90}, and nvidia-smi lists none")
    try:
        versions = {"vllm_mqa_sm90": machine.version()}
        versions |= {package: importlib.metadata.version(package) for package in ("vllm", "torch")}
    except importlib.metadata.PackageNotFoundError as error:
        how = "pip install 'vllm-mqa-sm90[serve]'"
        return output.stop("serve", f"needs vLLM in this Python, and finds no {error.name}: {how}")
    if problem := next(filter(None, (workload.missing() for workload in chosen)), None):
        return output.stop("serve", problem, status=2)

    args.output.mkdir(parents=True, exist_ok=True)
    report = Report(
        model=str(args.model),
        gpus=gpus,
        versions=versions,
        date=output.now(),
        command=args.command,
        vllm_arguments=[*(workloads.RANDOM_CONTEXTS if args.skip_prefill else ()), *args.vllm_arguments],
        acceptance=None if acceptance is None else acceptance[: max(args.k)],
        method=args.method,
    )
    jobs = [
        Job(side, k, workload, profiled)
        for k in args.k
        for side in SIDES
        if args.side in (None, side)
        for workload in chosen
        for profiled in ((False, True) if args.profile and workload.cached else (False,))
    ]
    stopping.by_exception()
    try:
        Run(report, args.output, args.timeout).do(jobs, fresh=args.fresh, alternate=args.alternate)
    except KeyboardInterrupt:
        kept = f"{args.output} keeps what was measured: the same command goes on"
        return output.stop("serve", f"interrupted, the server is stopped; {kept}", status=130)
    output.show(report, tables(report), notes(report), args.output)
    return 1 if report.failures else 0


def _wrong_usage(args: argparse.Namespace, chosen: list[Workload], acceptance: Sequence[float] | None) -> str | None:
    if acceptance is not None and len(acceptance) < max(args.k):
        return (
            f"--acceptance: expected a rate for each of the {max(args.k)} draft tokens of -k {_joined(args.k)}, "
            f"given {_joined(acceptance)}: add rates, or leave k={max(args.k)} out"
        )
    for word in args.vllm_arguments:
        if (name := re.split("[=.]", word)[0]) in _OURS:
            return f"{name}: expected only what bench serve does not set itself after --, given {word}: leave it out"
    if args.skip_prefill and not all(workload.cached for workload in chosen):
        return "--skip-prefill: expected :cached workloads alone, given others, which measure prefills: leave them out"
    if args.profile and not any(workload.cached for workload in chosen):
        return "--profile: expected a :cached workload, given none, and others prefill: add one with --workload"
    return None
