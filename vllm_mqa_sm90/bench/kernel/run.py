# SPDX-License-Identifier: Apache-2.0
"""The run of `bench kernel`: logits, ours and DeepGEMM's, over the memory floor; then whole steps of the indexer.

The floor is the bytes that a step must move at the read bandwidth measured in the same run. Logits are
checked against the FP32 reference before they are timed, selections against the logits that they are of.

A whole step is logits and their top-k: ours, by a plan with k, as a caller of `index_topk` has it; our logits with vLLM's
top-k; and stock vLLM's, DeepGEMM in the way that this vLLM calls it, with vLLM's top-k. vLLM's is each time the fastest of its
kernels that take the step and select rightly, be it the one that vLLM would choose or not.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import vllm_mqa_sm90
from vllm_mqa_sm90 import machine, reference, stopping
from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.kernel import DEFAULT_HEADS, DEFAULT_PAGE, DEFAULT_TOP_K, deepgemm, timing, vllm_topk
from vllm_mqa_sm90.bench.kernel.report import FLATTENED, NATIVE, OURS, SIDES, STEP, STEP_VLLM_TOPK, STEPS, STOCK_STEP
from vllm_mqa_sm90.bench.kernel.report import LeftOut, Report, Row, notes, one_line, tables
from vllm_mqa_sm90.bench.kernel.shapes import Shape
from vllm_mqa_sm90.bench.kernel.step import Step, floor_bytes, make_step

SHAPES = (
    Shape(256, 8192),
    Shape(256, 4096),
    Shape(64, 32768, ragged=True),
    Shape(64, 8192, ragged=True),
    Shape(8, 65536),
    Shape(1, 131072),
    Shape(32, 2048),
    Shape(4, 8192),
)
NEXT_NS = (1, 2, 3, 4)
QUICK_SHAPES = (Shape(256, 8192), Shape(4, 8192))
QUICK_NEXT_NS = (1, 3)
TOLERANCE = 2e-4
"""Relative, in norm: the tensor cores' own accumulation of FP8 products takes 1.3e-4 to 1.7e-4 of it."""

_REPLAYS, _QUICK_REPLAYS = 30, 12
_MIN_CALLS = 60  # in one graph: makes its launch, a few microseconds, little against its time
# DeepGEMM compiles up to two kernels for a case, 20 s: --quick starts on none after these seconds.
_QUICK_DEEP_GEMM_SECONDS = 30

DEVICE = torch.device("cuda")

Show = Callable[[str], None]
Call = Callable[[int], torch.Tensor]  # from the number of a block table to the logits, or to the selected indices


def run(args: argparse.Namespace) -> int:
    """0: all measured; 1: not measurable here, or a result of ours is wrong or missing; 130: interrupted."""
    if problem := _problem():
        return _stop(problem)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    stopping.by_exception()
    try:
        report = measure(args)
    except torch.OutOfMemoryError as error:  # of the read bandwidth: cases note theirs
        return _stop(one_line(error))
    except KeyboardInterrupt:
        _stop("interrupted" + (f"; {args.output}/kernel.json has the cases before" if args.output else ""))
        return 130
    output.show(report, tables(report), notes(report))
    if args.output:
        output.draw(report, args.output, "kernel.plot", "kernel.json", "kernel.png and kernel-steps.png")
    return 1 if any(row.failed for row in report.rows) else 0


def _stop(reason: str) -> int:
    print(f"vllm-mqa-sm90 bench kernel: {reason}", file=sys.stderr)
    return 1


def _problem() -> str | None:
    """Why nothing can be measured here, in one sentence."""
    needed = "needs a GPU of compute capability 9.0 (H100, H200, GH200)"
    if not torch.cuda.is_available():
        return f"{needed}, and PyTorch finds none"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"{needed}, and {torch.cuda.get_device_name()} has {major}.{minor}"
    try:
        vllm_mqa_sm90.launch_counts()
    except (RuntimeError, OSError) as error:  # not built, or for another PyTorch
        return one_line(error)
    return None


def measure(args: argparse.Namespace) -> Report:
    """Runs all cases; after each, the report so far is in `args.output`."""
    started = time.monotonic()
    shapes = dict.fromkeys(args.shape or (QUICK_SHAPES if args.quick else SHAPES))
    next_ns = sorted(set(args.next_n or (QUICK_NEXT_NS if args.quick else NEXT_NS)))
    replays = _QUICK_REPLAYS if args.quick else _REPLAYS
    with _progress(len(shapes) * len(next_ns)) as (show, done):
        show("read bandwidth")
        report = Report(
            gpu=_gpu(),
            versions=_versions(),
            date=output.now(),
            command=_command(args),
            heads=args.heads,
            page=args.page,
            read_bytes_per_s=timing.read_bandwidth(replays),
            top_k=args.top_k,
        )
        show("loading vLLM")
        peer: deepgemm.DeepGemm | str
        try:
            peer, versions = deepgemm.load(report.gpu["sms"])
            report.versions |= versions
        except Exception as error:  # whatever importing a vLLM may raise
            peer = one_line(error)
        topk: vllm_topk.VllmTopK | str
        try:
            topk = vllm_topk.load(DEVICE)
        except Exception as error:
            topk = one_line(error)
        deadline = started + _QUICK_DEEP_GEMM_SECONDS if args.quick else math.inf
        cases = _Cases(report, peer, topk, replays, deadline, show)
        for shape in shapes:
            for next_n in next_ns:
                row = cases.measure(shape, next_n)
                report.rows.append(row)
                if args.output:
                    report.write(args.output / "kernel.json")
                done(row)
    return report


@dataclass(frozen=True)
class _Cases:
    """What the cases of a run share.

    Attributes:
        report: read bandwidth, heads, page size, SMs.
        peer: DeepGEMM, or why there is none.
        topk: vLLM's top-k kernels, or why there are none.
        replays: of each CUDA graph.
        deadline: after this `time.monotonic()` DeepGEMM is left out.
        show: tells what is being done.
    """

    report: Report
    peer: deepgemm.DeepGemm | str
    topk: vllm_topk.VllmTopK | str
    replays: int
    deadline: float
    show: Show

    def measure(self, shape: Shape, next_n: int) -> Row:
        nbytes = floor_bytes(shape, next_n, self.report.heads)
        row = Row(str(shape), next_n, nbytes, nbytes / self.report.read_bytes_per_s * 1e6)
        case = f"{row.name}, next_n {next_n}"
        with _noting(row, OURS):
            self.show(f"{case}: {SIDES[OURS]}")
            step = make_step(shape, next_n, self.report.heads, self.report.page, DEVICE)
            plan = step.plan(num_sms=self.report.gpu["sms"])
            ours = _ours(step, plan)
            self._time(row, OURS, step, ours)
            replan = partial(step.plan, out=plan)
            row.plan_us = timing.replay_us([replan] * _MIN_CALLS, self.replays)
            self.show(f"{case}: {STEPS[STEP]}")  # before DeepGEMM, which may leave the GPU at a lower clock
            with _noting(row, STEP):
                self._time_step(row, step, ours)
            self.show(f"{case}: {STEPS[STEP_VLLM_TOPK]}")
            with _noting(row, STEP_VLLM_TOPK):
                self._time_vllm_topk(row, STEP_VLLM_TOPK, step, ours)
            theirs: dict[str, Call] = {}
            # At next_n 1 a flattened call is the native one.
            for side in (NATIVE, FLATTENED) if next_n > 1 or shape.mixed else (NATIVE,):
                with _noting(row, side):
                    self.show(f"{case}: {SIDES[side]} (compiles at first use)")
                    theirs[side] = self._theirs(step, flattened=side == FLATTENED)
                    self._time(row, side, step, theirs[side])
            native = isinstance(self.peer, deepgemm.DeepGemm) and self.peer.takes(next_n) and not shape.mixed
            stock = NATIVE if native else FLATTENED
            if stock in row.times_us:  # else that side says why not
                self.show(f"{case}: {STEPS[STOCK_STEP]}")
                with _noting(row, STOCK_STEP):
                    self._time_vllm_topk(row, STOCK_STEP, step, theirs[stock])
        return row

    def _theirs(self, step: Step, *, flattened: bool) -> Call:
        if isinstance(self.peer, str):
            raise LeftOut(self.peer)
        if time.monotonic() > self.deadline:
            raise LeftOut(f"not begun, as --quick was {_QUICK_DEEP_GEMM_SECONDS} s old")
        return self.peer.logits(step, flattened=flattened)

    def _time(self, row: Row, side: str, step: Step, call: Call) -> None:
        """Checks the result, then times it with each block table in turn."""
        error = step.relative_error(call(0))
        row.relative_errors[side] = error if math.isfinite(error) else None
        if not error <= TOLERANCE:
            raise LeftOut(f"relative error {error:.1e} against the reference, expected at most {TOLERANCE:.0e}")
        row.times_us[side] = self._replay(step, call)

    def _replay(self, step: Step, call: Call) -> float:
        copies = len(step.block_tables)
        calls = [partial(call, copy) for copy in range(copies)] * -(-_MIN_CALLS // copies)
        return timing.replay_us(calls, self.replays)

    def _time_step(self, row: Row, step: Step, ours: Call) -> None:
        """Our whole step: checked against the reference's selection from our checked logits, then timed."""
        k = self.report.top_k
        logits = ours(0)
        expected = reference.topk_indices(logits, step.context_lens, k)
        plan = step.plan(num_sms=self.report.gpu["sms"], k=k)
        inputs = step.q, step.kv_cache, step.weights, step.context_lens
        options = {"max_context_len": step.max_context_len, "max_rows": step.max_rows, "logits": logits}
        out = torch.empty_like(expected)

        def call(copy: int) -> torch.Tensor:
            return vllm_mqa_sm90.index_topk(*inputs, step.block_tables[copy], plan, k, **options, out=out)

        logits.fill_(math.nan)  # so that what is not written, logit or index, is seen
        out.fill_(-2)
        wrong = int((call(0) != expected).any(dim=1).sum())
        if wrong:
            raise LeftOut(f"the selection of {wrong} of {len(expected)} rows is not the reference's")
        row.step_us[STEP] = self._replay(step, call)

    def _time_vllm_topk(self, row: Row, name: str, step: Step, logits_of: Call) -> None:
        """A whole step with the fastest of vLLM's top-k kernels; one that fails, or selects wrongly, is left out."""
        if isinstance(self.topk, str):
            raise LeftOut(self.topk)
        indices = torch.empty((step.context_lens.numel(), self.report.top_k), dtype=torch.int32, device=DEVICE)
        times: dict[str, float] = {}
        for kernel in self.topk.kernels(logits_of(0)):
            select = partial(self.topk.select, kernel, context_lens=step.context_lens, max_context_len=step.max_context_len)

            def call(copy: int, select: Callable = select) -> torch.Tensor:
                select(logits_of(copy), indices=indices)
                return indices

            with _noting(row, kernel):
                logits = logits_of(0)
                select(logits, indices=indices.fill_(-1))
                if not vllm_topk.is_topk(logits, step.context_lens, indices):
                    raise LeftOut("its selection is wrong")
                times[kernel] = self._replay(step, call)
        if times:
            fastest = min(times, key=times.__getitem__)
            row.step_us[name], row.topk_kernels[name] = times[fastest], vllm_topk.SHORT[fastest]


def _ours(step: Step, plan: torch.Tensor) -> Call:
    inputs = step.q, step.kv_cache, step.weights, step.context_lens

    def call(copy: int, out: torch.Tensor | None) -> torch.Tensor:
        block_table, limits = step.block_tables[copy], {"max_context_len": step.max_context_len}
        return vllm_mqa_sm90.paged_mqa_logits(*inputs, block_table, plan, **limits, max_rows=step.max_rows, out=out)

    out = call(0, None)
    out.fill_(math.nan)  # so that the check sees a logit that is not written
    return partial(call, out=out)


@contextmanager
def _noting(row: Row, side: str) -> Iterator[None]:
    """Whatever goes wrong (a compiler, an op that refuses, memory) is that side's reason, and the run goes on."""
    try:
        yield
    except Exception as error:
        row.times_us.pop(side, None)
        row.left_out[side] = one_line(error)


@contextmanager
def _progress(cases: int) -> Iterator[tuple[Show, Callable[[Row], None]]]:
    """On stderr: a bar; without a terminal, a line a case. Yields what to call at each stage and after each case."""
    console = Console(stderr=True, highlight=False)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=cases)

        def show(stage: str) -> None:
            progress.update(task, description=stage)

        def done(row: Row) -> None:
            progress.advance(task)
            if not console.is_terminal:
                times = ", ".join(f"{side} {us:.1f} us" for side, us in row.times_us.items())
                steps = ", ".join(f"{STEPS[step]} {us:.1f} us" for step, us in row.step_us.items())
                shown = "; ".join(filter(None, (times, steps)))
                console.print(f"{row.name}, next_n {row.next_n}: {shown or 'failed'}", soft_wrap=True)

        yield show, done


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(DEVICE)
    listed = machine.gpus()
    driver = listed[0]["driver_version"] if listed else "unknown"  # one for all GPUs
    return {"name": properties.name, "sms": properties.multi_processor_count, "driver": driver}


def _versions() -> dict[str, str]:
    return {"vllm_mqa_sm90": machine.version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def _command(args: argparse.Namespace) -> str:
    """The command that measures the same; where its output goes is left out."""
    words = ["vllm-mqa-sm90", "bench", "kernel"]
    for shape in args.shape or ():
        words += ["--shape", str(shape)]
    if args.next_n:
        words += ["--next-n", *map(str, args.next_n)]
    if args.heads != DEFAULT_HEADS:
        words += ["--heads", str(args.heads)]
    if args.page != DEFAULT_PAGE:
        words += ["--page", str(args.page)]
    if args.top_k != DEFAULT_TOP_K:
        words += ["--top-k", str(args.top_k)]
    if args.quick:
        words.append("--quick")
    return shlex.join(words)
