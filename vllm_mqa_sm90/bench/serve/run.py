# SPDX-License-Identifier: Apache-2.0
"""The runs of `bench serve`: a server for each configuration, runs of vLLM's client for each workload."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vllm_mqa_sm90
from vllm_mqa_sm90 import checkpoint, metrics, server
from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.serve import clients, trace
from vllm_mqa_sm90.bench.serve.report import PLUGIN, Job, Measurement, Profiled, Report, stem
from vllm_mqa_sm90.bench.serve.steps import full_steps_ms
from vllm_mqa_sm90.bench.serve.trace import Profile
from vllm_mqa_sm90.bench.serve.workloads import Workload
from vllm_mqa_sm90.server import Server, ServerError, speculative_config

# What decides how the plugin's steps run; the rest of the package measures and reports.
_PLUGIN_FILES = ("_C.abi3.so", "backend.py", "ops.py", "plugin.py", "seams.py", "sizes.py", "support.py", "wrappers.py")
# What --save-detailed adds: a figure or a text of each request, or of each message.
_DETAILS = ("start_times", "ttfts", "itls", "input_lens", "output_lens", "generated_texts", "errors")
_DETAILS += ("server_queue_times", "server_ttfts")  # of vLLM 0.33
_PROFILED_STEPS = 24
_STEPS_BEFORE_PROFILE = 16  # in which requests that run come to decode: of their :cached prompts little is left


def profiler_arguments(folder: Path, steps: int = _PROFILED_STEPS, delay: int = 0) -> list[str]:
    """What lets a server profile `steps`, `delay` steps after /start_profile; each worker's trace goes to `folder`."""
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder.resolve()),
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
        "delay_iterations": delay,
        "max_iterations": steps,
    }
    return ["--profiler-config", json.dumps(config)]


def bench_arguments(model: str, port: int, arguments: Sequence[str]) -> list[str]:
    """Of the command `vllm`, for its client against a server of ours."""
    return ["bench", "serve", "--model", model, "--host", "127.0.0.1", "--port", str(port), *arguments]


def server_arguments(k: int, report: Report) -> list[str]:
    """The arguments of the `vllm serve` with k speculative tokens, those of the user last."""
    drafts = ["--speculative-config", json.dumps(speculative_config(k, report.acceptance, report.method))] if k else []
    return [*drafts, *report.vllm_arguments]


class Run:
    """Fills a report, and writes it as serve.json into `folder` after each result."""

    def __init__(self, report: Report, folder: Path, timeout: float) -> None:
        self._report, self._folder, self._timeout = report, folder, timeout
        self._logs = folder / "logs"
        for each in self._logs, folder / "results":
            each.mkdir(exist_ok=True)
        for prompts in self._logs.glob("*.jsonl"):  # of an earlier run, perhaps of another model
            prompts.unlink()

    def do(self, jobs: Sequence[Job], *, fresh: bool, alternate: bool = False) -> None:
        """Finds out what the jobs ask for. Unless `fresh`, results of earlier runs count.

        alternate: both sides' servers of a k are up at once, and asked in turn.
        What fails is in the report's `failures`, by job or server.
        """
        self._fresh = fresh
        self._results = {job: None if fresh else self._load(job) for job in jobs}
        self._write()
        missing = [job for job in jobs if self._results[job] is None]
        with output.Progress(len(jobs)) as self._progress:
            if there := len(jobs) - len(missing):
                text = f"{there} of {len(jobs)} results are in {self._folder}; --fresh measures them again"
                self._progress.say(text, steps=there)
            at_once: dict[Any, list[Job]] = {}
            for job in missing:
                at_once.setdefault(job.k if alternate else job.server, []).append(job)
            for of_servers in at_once.values():
                self._serve(of_servers)

    def _files(self, job: Job) -> list[Path]:
        """Where a job's results are kept, one of each run: a name has a hash of all that the result depends on."""
        digest = _digest(json.dumps(depends_on(job, self._report), sort_keys=True).encode())[:12]
        # Other prompts than cached ones are new to the server only once.
        runs = range(3 if job.workload.cached and not job.profiled else 1)
        return [self._folder / "results" / f"{job.stem}-{digest}.{run}.json" for run in runs]

    def _load(self, job: Job) -> Measurement | Profiled | None:
        """The result that is kept; None where a run is missing."""
        if not all(file.exists() for file in self._files(job)):
            return None
        contents = [json.loads(file.read_text()) for file in self._files(job)]
        if job.profiled:
            return Profiled(job.side, job.k, str(job.workload), Profile(**contents[0]))
        return Measurement.of(job, contents)

    def _serve(self, jobs: Sequence[Job]) -> None:
        """The jobs' servers, at once, and what is asked of them, in turn: what drifts meanwhile is the same for all."""
        with contextlib.ExitStack() as stack:
            running = self._started(jobs, stack)
            cached: dict[str, Workload] = {}  # whose prompts a server had last
            for alike in dict.fromkeys((job.workload, job.profiled) for job in jobs):
                left = [job for job in jobs if (job.workload, job.profiled) == alike]
                for run in range(-1, len(self._files(left[0]))):  # first a rehearsal
                    for job in left[:: -1 if run % 2 == 0 else 1]:
                        if job.server in running and not self._take_turn(job, run, running, cached):
                            left.remove(job)
                for job in left:
                    if job.server in running:
                        self._results[job] = self._load(job)
                        self._write()
                        self._progress.say(f"{job}: {self._results[job]}", steps=1)

    def _take_turn(self, job: Job, run: int, running: dict[str, Server], cached: dict[str, Workload]) -> bool:
        """A run of a job, -1 to rehearse it; whether there may be another."""
        name = job.server
        try:
            if run >= 0:
                self._find_out(job, self._files(job)[run], running[name])
            elif cached.get(name) != job.workload and not (self._report.skips_prefill and name in cached):
                self._rehearse(job, running[name])
                cached[name] = job.workload
        except Exception as error:  # whatever it is, the others are still worth measuring
            self._fail(str(job), error)
            with self._dropped_if_dead(name, running):
                running[name].get("/health")
            return False
        return True

    def _started(self, jobs: Sequence[Job], stack: contextlib.ExitStack) -> dict[str, Server]:
        """The jobs' servers that start, by name, until the stack is left."""
        running = {}
        for job in {job.server: job for job in jobs}.values():
            port, arguments = server.free_port(), server_arguments(job.k, self._report)
            if any(each.profiled for each in jobs):
                arguments += profiler_arguments(self._traces(job), delay=_STEPS_BEFORE_PROFILE)
            command = server.vllm_serve(Path(self._report.model), port, *arguments)
            started = Server(command, port, self._logs / f"{stem(job.server)}.log", self._environment(job.side))
            running[job.server] = stack.enter_context(started)
        for name in list(running):
            with self._dropped_if_dead(name, running):
                took = running[name].wait_ready(
                    self._timeout, lambda seconds, line: self._progress.show(f"{name}: vllm serve starts, {seconds:.0f} s", line)
                )
                self._progress.say(f"{name}: server ready after {took:.0f} s")
        return running

    @contextlib.contextmanager
    def _dropped_if_dead(self, name: str, running: dict[str, Server]) -> Iterator[None]:
        """A server that does not start, or died, is not asked again."""
        try:
            yield
        except ServerError as error:
            del running[name]
            self._fail(name, error)

    def _rehearse(self, job: Job, running: Server) -> None:
        # Cached prompts have to be in the cache, and what runs where they are found there to be compiled: where nobody
        # prefills, only this, once a server.
        for _ in range(2 if job.workload.cached and not self._report.skips_prefill else 1):
            self._ask(job, running, rehearsal=True)

    def _find_out(self, job: Job, file: Path, running: Server) -> None:
        """Keeps what is found in the file; where there is one, nothing is asked."""
        if self._fresh or not file.exists():
            found = self._profile(job, running) if job.profiled else self._ask(job, running)
            output.write_whole(file, json.dumps(found, indent=2, allow_nan=False) + "\n")

    def _environment(self, side: str) -> dict[str, str]:
        # Each side has caches of its own: what one compiled cannot reach the other.
        mode = "require" if side == PLUGIN else "off"
        env = server.environment((self._folder / "cache" / side).resolve(), MQA_SM90=mode)
        if not Path(self._report.model).is_dir():  # a name: from the hub, or from where the user keeps models
            env["HF_HOME"] = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
            env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")
        return env

    def _profile(self, job: Job, running: Server) -> dict[str, Any]:
        folder, count = self._traces(job), job.workload.concurrency
        earlier, started = set(folder.iterdir()), False

        def start_when_all_run() -> None:
            # Long prompts come one after the other: the server tokenizes each.
            nonlocal started
            if not started and metrics.total(running.get("/metrics"), "vllm:num_requests_running") >= count:
                running.command("/start_profile")
                started = True

        self._ask(job, running, meanwhile=start_when_all_run)
        if not started:
            raise ServerError(f"the profiler: {_fewer(count)}")
        running.command("/stop_profile")
        traces = sorted(file for file in set(folder.iterdir()) - earlier if ".pt.trace.json" in file.name)
        if not traces:
            raise ServerError(f"the profiler: expected a trace in {folder}, found none; see {self._logs}")
        # Of several GPUs, one stands for all.
        return asdict(trace.profile(trace.events_of(traces[0]), count))

    def _traces(self, job: Job) -> Path:
        folder = self._folder / "traces" / stem(job.server)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _ask(
        self,
        job: Job,
        running: Server,
        *,
        rehearsal: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Runs vllm bench serve, with a call of `meanwhile` twice a second; the JSON that it wrote, and `itl_ms`.

        ServerError if it fails, or one of its requests, or if cached prompts were never all under way.
        """
        log, found = (self._logs / f"{job.stem}.{suffix}" for suffix in ("log", "json"))
        found.unlink(missing_ok=True)
        # One file for all runs with the same prompts: to draw long ones takes longer than many a run.
        prompts = self._logs / f"{stem(str(job.workload))}{'-rehearsal' if job.workload.apart(rehearsal) else ''}.jsonl"
        draw, ignore_eos = job.workload.prompts(self._report.model, rehearsal=rehearsal), self._report.acceptance is not None
        arguments = job.workload.arguments(prompts, rehearsal=rehearsal, ignore_eos=ignore_eos)
        arguments += ["--save-result", "--save-detailed", "--result-filename", str(found.resolve())]
        what = f"{job}, rehearsal" if rehearsal else str(job)

        def watch(line: str) -> None:
            self._progress.show(what, line)
            meanwhile()

        command = bench_arguments(self._report.model, running.port, arguments)
        with clients.start(command, log, self._environment(job.side), prompts, draw) as client:
            client.wait_done(self._timeout, watch)
        result = json.loads(found.read_text())
        if result["completed"] != result["num_prompts"]:
            raise ServerError(
                f"vllm bench serve: {result['completed']} of {result['num_prompts']} requests were answered; "
                f"see {log} and {self._logs / stem(job.server)}.log"
            )
        result["itl_ms"] = result["median_itl_ms"]
        if job.workload.cached and not rehearsal:
            steps = full_steps_ms(result, job.workload.concurrency)
            if not steps:
                raise ServerError(f"vllm bench serve: {_fewer(job.workload.concurrency)}")
            result["itl_ms"] = statistics.median(steps)
        return {name: value for name, value in result.items() if name not in _DETAILS}

    def _fail(self, what: str, error: Exception) -> None:
        why = str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
        self._report.failures[what] = why
        self._write()
        self._progress.say(f"{what} failed: {why}")

    def _write(self) -> None:
        self._report.measurements = [each for each in self._results.values() if isinstance(each, Measurement)]
        self._report.profiles = [each for each in self._results.values() if isinstance(each, Profiled)]
        self._report.write(self._folder / "serve.json")


def _fewer(concurrency: int) -> str:
    longer = "give longer answers by --tokens, and see --max-num-seqs"
    return f"expected {concurrency} requests under way at once, found fewer: {longer}"


def depends_on(job: Job, report: Report) -> dict[str, Any]:
    """All that a result depends on."""
    workload, model, package = job.workload, Path(report.model), Path(vllm_mqa_sm90.__file__).parent
    return {
        "model": str(model.resolve()) if model.is_dir() else report.model,
        "checkpoint": [_digest_of(model / name) for name in ("config.json", checkpoint.INDEX)],
        "gpus": report.gpus,
        "versions": report.versions,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("VLLM_")},
        "side": job.side,
        "plugin": [_digest_of(package / name) for name in _PLUGIN_FILES] if job.side == PLUGIN else None,
        "server": server_arguments(job.k, report),
        "workload": [str(workload), workload.requests, workload.output_tokens],
        "profiled": job.profiled,
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(file: Path) -> str | None:
    return _digest(file.read_bytes()) if file.is_file() else None
