# SPDX-License-Identifier: Apache-2.0
"""The run of `bench kernel`: logits, ours and DeepGEMM's, over the memory floor; then whole steps of the indexer.

The floor is the bytes that a step must move at the read bandwidth measured in the same run. Logits are
checked against the FP32 reference before they are timed, selections against the logits that they are of.

A whole step is logits and their top-k: ours, by a plan with k, as a caller of `index_topk` has it; our logits with
vLLM's top-k; and stock vLLM's, DeepGEMM in the way that this vLLM calls it, with vLLM's top-k. This is each time the
fastest of its kernels that take the step and select rightly, be it the one that vLLM would choose or not.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import vllm_mqa_sm90
from vllm_mqa_sm90 import machine, reference, stopping
from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.kernel import Shape, vllm_kernels
from vllm_mqa_sm90.bench.kernel.replay import Replayed
from vllm_mqa_sm90.bench.kernel.report import FLATTENED, NAMES, NATIVE, OURS, STEP, STEP_VLLM_TOPK, STOCK_STEP
from vllm_mqa_sm90.bench.kernel.report import LeftOut, Report, Row, notes, one_line, step_table, table
from vllm_mqa_sm90.bench.kernel.step import Step, floor_bytes, make_step
from vllm_mqa_sm90.bench.kernel.vllm_kernels import DeepGemm, TopK, is_topk

_SHAPES = "256x8192", "256x4096", "64x32768:ragged", "64x8192:ragged", "8x65536", "1x131072", "32x2048", "4x8192"
SHAPES = tuple(map(Shape.parse, _SHAPES))
NEXT_NS = (1, 2, 3, 4)
QUICK_SHAPES = (SHAPES[0], SHAPES[-1])
QUICK_NEXT_NS = (1, 3)
TOLERANCE = 2e-4
"""Relative, in norm: the tensor cores' own accumulation of FP8 products takes 1.3e-4 to 1.7e-4 of it."""

_REPLAYS, _QUICK_REPLAYS = 30, 12
_READ_FLOATS = 1 << 30  # 4.3 GB: 86 times the 50 MB of L2
# After heavy kernels a GPU at its power limit keeps its clock low for a while: 29.7 instead of 20.6 us were
# seen on an H200 right after DeepGEMM's flattened calls.
_REST_S = 0.5
_MIN_CALLS = 60  # in one graph: makes its launch, a few microseconds, little against its time

DEVICE = torch.device("cuda")

Call = Callable[[int], torch.Tensor]  # from the number of a block table to the logits, or to the selected indices


def run(args: argparse.Namespace) -> int:
    """0: all measured; 1: not measurable here, or a result of ours is wrong or missing; 130: interrupted."""
    if problem := _problem():
        return output.stop("kernel", problem)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    stopping.by_exception()
    try:
        report = _measure(args)
    except torch.OutOfMemoryError as error:  # of the read bandwidth: cases note theirs
        return output.stop("kernel", one_line(error))
    except KeyboardInterrupt:
        kept = f"; {args.output}/kernel.json has the cases before" if args.output else ""
        return output.stop("kernel", f"interrupted{kept}", status=130)
    output.show(report, [table(report), step_table(report)], notes(report), args.output)
    return 1 if any(row.failed for row in report.rows) else 0


def _problem() -> str | None:
    """Why nothing can be measured here, in one sentence."""
    if not torch.cuda.is_available():
        return f"{output.NEEDS_SM90}, and PyTorch finds none"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"{output.NEEDS_SM90}, and {torch.cuda.get_device_name()} has {major}.{minor}"
    try:
        vllm_mqa_sm90.launch_counts()
    except (RuntimeError, OSError) as error:  # not built, or for another PyTorch
        return one_line(error)
    return None


def _measure(args: argparse.Namespace) -> Report:
    """Runs all cases; after each, the report so far is in `args.output`."""
    shapes = dict.fromkeys(args.shape or (QUICK_SHAPES if args.quick else SHAPES))
    next_ns = sorted(set(args.next_n or (QUICK_NEXT_NS if args.quick else NEXT_NS)))
    with output.Progress(len(shapes) * len(next_ns)) as progress:
        cases = _Cases(args, progress)
        for shape in shapes:
            for next_n in next_ns:
                row = cases.measure(shape, next_n)
                cases.report.rows.append(row)
                if args.output:
                    cases.report.write(args.output / "kernel.json")
                times = ", ".join(f"{NAMES[side]} {us:.1f} us" for side, us in (row.times_us | row.step_us).items())
                progress.say(f"{row}: {times or 'failed'}", steps=1)
    return cases.report


def _loaded(load: Callable[..., Any], *arguments: object) -> Any:
    """What `load` returns, or why it does not: whatever importing a vLLM may raise."""
    try:
        return load(*arguments)
    except Exception as error:
        return LeftOut(one_line(error))


class _Cases:
    """What the cases of a run share: the report with its bandwidth, DeepGEMM and vLLM's top-k, or why these lack."""

    def __init__(self, args: argparse.Namespace, progress: output.Progress) -> None:
        self._progress, self._replays = progress, _QUICK_REPLAYS if args.quick else _REPLAYS
        progress.show("read bandwidth")
        self.report = Report(
            gpu=_gpu(),
            versions={"vllm_mqa_sm90": machine.version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)},
            date=output.now(),
            command=args.command,
            heads=args.heads,
            page=args.page,
            read_bytes_per_s=read_bandwidth(self._replays),
            top_k=args.top_k,
        )
        progress.show("loading vLLM")
        self._peer: DeepGemm | LeftOut = _loaded(vllm_kernels.load_deep_gemm, self.report.gpu["sms"])
        self._topk: TopK | LeftOut = _loaded(vllm_kernels.load_topk, DEVICE)
        self.report.versions |= getattr(self._peer, "versions", {})

    def measure(self, shape: Shape, next_n: int) -> Row:
        """All sides of a case, each with its time or the reason why it has none."""
        nbytes = floor_bytes(shape, next_n, self.report.heads)
        row = Row(str(shape), next_n, nbytes, nbytes / self.report.read_bytes_per_s * 1e6)
        with self._part(row, OURS):
            step = make_step(shape, next_n, self.report.heads, self.report.page, DEVICE)
            plan = step.plan(num_sms=self.report.gpu["sms"])
            ours = _ours(step, plan)
            self._time(row, OURS, step, ours)
            row.plan_us = replay_us([partial(step.plan, out=plan)] * _MIN_CALLS, self._replays)
            with self._part(row, STEP):  # before DeepGEMM, which may leave the GPU at a lower clock
                self._time_step(row, step, ours)
            with self._part(row, STEP_VLLM_TOPK):
                self._time_vllm_topk(row, STEP_VLLM_TOPK, step, ours)
            # At next_n 1 a flattened call is the native one.
            for side in (NATIVE, FLATTENED) if next_n > 1 or shape.mixed else (NATIVE,):
                with self._part(row, side):
                    self._time_theirs(row, side, step)
        return row

    @contextmanager
    def _part(self, row: Row, side: str) -> Iterator[None]:
        """Whatever goes wrong (a compiler, an op that refuses, memory) is that side's reason, and the run goes on."""
        self._progress.show(f"{row}: {NAMES.get(side, side)}")
        try:
            yield
        except Exception as error:
            row.times_us.pop(side, None)
            row.left_out[side] = one_line(error)

    def _time(self, row: Row, side: str, step: Step, call: Call) -> None:
        """Checks the result, then times it with each block table in turn."""
        error = step.relative_error(call(0))
        row.relative_errors[side] = error if math.isfinite(error) else None
        if not error <= TOLERANCE:
            raise LeftOut(f"relative error {error:.1e} against the reference, expected at most {TOLERANCE:.0e}")
        row.times_us[side] = self._replay(step, call)

    def _replay(self, step: Step, call: Call) -> float:
        calls = [partial(call, copy) for copy in range(len(step.block_tables))]
        calls *= -(-_MIN_CALLS // len(calls))
        return replay_us(calls, self._replays)

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

    def _time_theirs(self, row: Row, side: str, step: Step) -> None:
        """DeepGEMM's logits, and stock vLLM's whole step with them where it calls DeepGEMM this way."""
        if isinstance(self._peer, LeftOut):
            raise self._peer
        theirs = self._peer.logits(step, flattened=side == FLATTENED)
        self._time(row, side, step, theirs)
        if side == (NATIVE if self._peer.takes(row.next_n) and step.max_rows is None else FLATTENED):
            with self._part(row, STOCK_STEP):
                self._time_vllm_topk(row, STOCK_STEP, step, theirs)

    def _time_vllm_topk(self, row: Row, name: str, step: Step, logits_of: Call) -> None:
        """A whole step with the fastest of vLLM's top-k kernels; one that fails, or selects wrongly, is left out."""
        if isinstance(self._topk, LeftOut):
            raise self._topk
        indices = torch.empty((step.context_lens.numel(), self.report.top_k), dtype=torch.int32, device=DEVICE)
        times: dict[str, float] = {}
        for kernel in self._topk.kernels(logits_of(0)):
            lengths = {"context_lens": step.context_lens, "max_context_len": step.max_context_len}
            select = partial(self._topk.select, kernel, **lengths, indices=indices)
            with self._part(row, kernel):
                logits = logits_of(0)
                indices.fill_(-1)
                select(logits)
                if not is_topk(logits, step.context_lens, indices):
                    raise LeftOut("its selection is wrong")
                times[kernel] = self._replay(step, lambda copy, select=select: select(logits_of(copy)))
        if times:
            fastest = min(times, key=times.__getitem__)
            row.step_us[name], row.topk_kernels[name] = times[fastest], fastest


def _ours(step: Step, plan: torch.Tensor) -> Call:
    inputs = step.q, step.kv_cache, step.weights, step.context_lens

    def call(copy: int, out: torch.Tensor | None) -> torch.Tensor:
        block_table, limits = step.block_tables[copy], {"max_context_len": step.max_context_len}
        return vllm_mqa_sm90.paged_mqa_logits(*inputs, block_table, plan, **limits, max_rows=step.max_rows, out=out)

    out = call(0, None)
    out.fill_(math.nan)  # so that the check sees a logit that is not written
    return partial(call, out=out)


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(DEVICE)
    listed = machine.gpus()
    driver = listed[0]["driver_version"] if listed else "unknown"  # one for all GPUs
    return {"name": properties.name, "sms": properties.multi_processor_count, "driver": driver}


def replay_us(calls: Sequence[Callable[[], object]], replays: int) -> float:
    """Microseconds that one of `calls` takes on the GPU: `Replayed.us`, after the GPU has rested half a second."""
    replayed = Replayed(calls, replays)
    time.sleep(_REST_S)
    return replayed.us()


def read_bandwidth(replays: int) -> float:
    """Bytes a second that this GPU reads from its memory: PyTorch's sum over 4.3 GB of random floats."""
    values = torch.empty(_READ_FLOATS, device="cuda").normal_()
    return values.nbytes / replay_us([values.sum, values.sum], replays) * 1e6
