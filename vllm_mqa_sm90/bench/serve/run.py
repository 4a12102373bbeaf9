# SPDX-License-Identifier: Apache-2.0
"""The runs of `bench serve`: a server for each configuration, a run of vLLM's client for each workload."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_mqa_sm90 import metrics, server
from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.serve import trace
from vllm_mqa_sm90.bench.serve.clients import Clients
from vllm_mqa_sm90.bench.serve.kept import Job, Kept, server_arguments
from vllm_mqa_sm90.bench.serve.report import PLUGIN, Configuration, Measurement, Profiled, Report
from vllm_mqa_sm90.bench.serve.workloads import Workload
from vllm_mqa_sm90.metrics import Drafts
from vllm_mqa_sm90.server import Process, Server, ServerError

_PROFILED_STEPS = 24
_PROFILE_SECONDS = 3.0  # in which these steps pass
_TOKENS_BEFORE_PROFILE = 8  # of each request on average, once all run


def profiler_arguments(folder: Path, steps: int = _PROFILED_STEPS) -> list[str]:
    """What lets a server profile some steps on /start_profile, with a trace of each worker in `folder`."""
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder.resolve()),
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
        "max_iterations": steps,
    }
    return ["--profiler-config", json.dumps(config)]


def bench_arguments(model: str, port: int, arguments: Sequence[str]) -> list[str]:
    """Of the command `vllm`, for its client against a server of ours."""
    return ["bench", "serve", "--model", model, "--host", "127.0.0.1", "--port", str(port), *arguments]


class Run:
    """Fills a report, and writes it as serve.json into `output` after each result."""

    def __init__(self, report: Report, kept: Kept, output: Path, timeout: float) -> None:
        self._report, self._kept, self._output, self._timeout = report, kept, output, timeout
        self._results: dict[Job, Measurement | Profiled | None] = {}  # in the order of the report
        self._logs = output / "logs"
        self._logs.mkdir(exist_ok=True)

    def do(self, jobs: Sequence[Job], *, fresh: bool) -> None:
        """Finds out what the jobs ask for. Unless `fresh`, results of earlier runs count.

        What fails is in the report's `failures`, by job or configuration.
        """
        missing: dict[Configuration, list[Job]] = {}
        for job in jobs:
            self._results[job] = None if fresh else self._kept.load(job)
            if self._results[job] is None:
                missing.setdefault(job.at, []).append(job)
        self._write()
        to_do = sum(map(len, missing.values()))
        # The start of a server counts as one step more.
        with _Progress(to_do + len(missing)) as self._progress:
            if to_do < len(jobs):
                kept = f"{len(jobs) - to_do} of {len(jobs)} results are in {self._output}"
                self._progress.say(f"{kept}; --fresh measures them again")
            for at, its_jobs in missing.items():
                with self._progress.steps(1 + len(its_jobs)):
                    try:
                        self._serve(at, its_jobs)
                    except ServerError as error:
                        self._fail(str(at), error)

    def _serve(self, at: Configuration, jobs: Sequence[Job]) -> None:
        """One server and what is asked of it. ServerError if it does not start, or dies."""
        env, port = self._environment(at), server.free_port()
        arguments = server_arguments(at, self._report)
        if any(job.profiled for job in jobs):
            arguments = [*arguments, *profiler_arguments(self._traces(at))]
        command = server.vllm_serve(Path(self._report.model), port, *arguments)
        clients_log = self._logs / f"{at.stem}-clients.log"
        with Clients(clients_log, env) as clients, Server(command, port, self._logs / f"{at.stem}.log", env) as running:
            seconds = running.wait_ready(
                self._timeout,
                lambda seconds, line: self._progress.show(f"{at}: vllm serve starts, {seconds:.0f} s", line),
            )
            self._progress.step(f"{at}: server ready after {seconds:.0f} s")
            cached: Workload | None = None  # whose prompts the server had last
            for job in jobs:
                try:
                    if job.workload != cached:
                        for _ in range(job.workload.rehearsals):
                            self._ask(job, running, clients, rehearsal=True)
                    cached = job.workload
                    find_out = self._profile if job.profiled else self._measure
                    result = find_out(job, running, clients)
                except Exception as error:  # whatever it is, the others are still worth measuring
                    died = _died(running)
                    if died is not None and isinstance(error, ServerError) and error.log == died.log:
                        error = ServerError(error.what)  # the end of its log comes once
                    self._fail(str(job), error)
                    if died is not None:  # it is not asked again
                        raise died from error
                    continue
                self._kept.save(job, result)
                self._results[job] = result
                self._write()
                self._progress.step(f"{job}: {_in_short(result)}")

    def _environment(self, at: Configuration) -> dict[str, str]:
        # Each side has caches of its own: what one compiled cannot reach the other.
        mode = "require" if at.side == PLUGIN else "off"
        env = server.environment((self._output / "cache" / at.side).resolve(), MQA_SM90=mode)
        if not Path(self._report.model).is_dir():  # a name: from the hub, or from where the user keeps models
            env["HF_HOME"] = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
            env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")
        return env

    def _measure(self, job: Job, running: Server, clients: Clients) -> Measurement:
        return Measurement.middle([self._measure_once(job, running, clients) for _ in range(job.workload.runs)])

    def _measure_once(self, job: Job, running: Server, clients: Clients) -> Measurement:
        before = Drafts.read(running.get("/metrics"))
        client = self._ask(job, running, clients, rehearsal=False)
        drafts = Drafts.read(running.get("/metrics")).since(before)
        return Measurement.of(job.at, job.workload, client, drafts, output.now())

    def _profile(self, job: Job, running: Server, clients: Clients) -> Profiled:
        folder = self._traces(job.at)
        earlier = set(folder.iterdir())
        with self._client(job, running, clients, rehearsal=False) as client:
            self._wait_decoding(job, running, client)
            running.command("/start_profile")
            time.sleep(_PROFILE_SECONDS)
            running.command("/stop_profile")
        traces = sorted(file for file in set(folder.iterdir()) - earlier if ".pt.trace.json" in file.name)
        if not traces:
            raise ServerError(f"the profiler: expected a trace in {folder}, found none; see {self._logs}")
        # Of several GPUs, one stands for all.
        return Profiled(job.at.side, job.at.k, str(job.workload), output.now(), trace.profile(trace.events_of(traces[0])))

    def _traces(self, at: Configuration) -> Path:
        folder = self._output / "traces" / at.stem
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _wait_decoding(self, job: Job, running: Server, client: Process) -> None:
        """Until all requests run and none prefills."""
        concurrency, enough = job.workload.concurrency, math.inf
        while (generated := metrics.total(text := running.get("/metrics"), "vllm:generation_tokens")) < enough:
            if client.ended:
                client.wait_done(self._timeout, lambda _: None)  # says why
                raise ServerError(f"the requests ended before {concurrency} ran at once; see --max-num-seqs")
            if enough == math.inf and metrics.total(text, "vllm:num_requests_running") >= concurrency:
                enough = generated + _TOKENS_BEFORE_PROFILE * concurrency
            self._progress.show(str(job), "waits for all requests to decode")
            time.sleep(0.1)

    def _ask(self, job: Job, running: Server, clients: Clients, *, rehearsal: bool) -> dict[str, Any]:
        """Runs vllm bench serve; the JSON that it wrote. ServerError if it fails, or one of its requests."""
        with self._client(job, running, clients, rehearsal=rehearsal) as client:
            what = f"{job}, rehearsal" if rehearsal else str(job)
            client.wait_done(self._timeout, lambda line: self._progress.show(what, line))
        result = json.loads(self._client_file(job, "json").read_text())
        if result["completed"] != result["num_prompts"]:
            raise ServerError(
                f"vllm bench serve: {result['completed']} of {result['num_prompts']} requests were answered; "
                f"see {self._client_file(job, 'log')} and {self._logs / job.at.stem}.log"
            )
        return result

    def _client(self, job: Job, running: Server, clients: Clients, *, rehearsal: bool) -> Process:
        prompts = job.workload.prompts(rehearsal=rehearsal)
        prompts_file = self._client_file(job, "jsonl")
        if prompts is not None:
            prompts_file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        result_file = self._client_file(job, "json")
        result_file.unlink(missing_ok=True)
        ignore_eos = self._report.acceptance is not None
        arguments = job.workload.arguments(prompts_file, rehearsal=rehearsal, ignore_eos=ignore_eos)
        arguments += ["--save-result", "--result-filename", str(result_file.resolve())]
        command = bench_arguments(self._report.model, running.port, arguments)
        return clients.run(command, self._client_file(job, "log"))

    def _client_file(self, job: Job, suffix: str) -> Path:
        return self._logs / f"{job.stem}.{suffix}"

    def _fail(self, what: str, error: Exception) -> None:
        why = str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
        self._report.failures[what] = why
        self._write()
        self._progress.say(f"{what} failed: {why}")

    def _write(self) -> None:
        self._report.measurements = [each for each in self._results.values() if isinstance(each, Measurement)]
        self._report.profiles = [each for each in self._results.values() if isinstance(each, Profiled)]
        self._report.write(self._output / "serve.json")


def _died(running: Server) -> ServerError | None:
    try:
        running.get("/health")
    except ServerError as error:
        return error
    return None


def _in_short(result: Measurement | Profiled) -> str:
    if isinstance(result, Profiled):
        return f"{result.profile.steps} steps profiled"
    return f"{result.tokens_per_s:.0f} tok/s"


class _Progress:
    """On stderr: a bar with the time left, and a line for each thing that is done. Without a terminal, just the lines."""

    def __init__(self, steps: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=steps)
        self._steps, self._done, self._start = steps, 0, time.monotonic()

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextmanager
    def steps(self, count: int) -> Iterator[None]:
        """Counts `count` steps as done at the end, also those that were not come to."""
        end = self._done + count
        yield
        self._done = end
        self._bar.update(self._task, completed=end)

    def step(self, what: str) -> None:
        """One step more is done."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        self.say(what + self._left())

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(escape(text), soft_wrap=True)

    def show(self, what: str, detail: str) -> None:
        """What goes on now."""
        room = max(0, self._console.width - 50 - len(what))
        self._bar.update(self._task, description=f"{escape(what)}{self._left()}  [dim]{escape(detail[:room])}[/]")

    def _left(self) -> str:
        """Steps differ, from a second to many minutes: their mean so far is a rough guide, and said so."""
        left = self._steps - self._done
        if not self._done or not left:
            return ""
        minutes = (time.monotonic() - self._start) / self._done * left / 60
        return f" (about {minutes:.0f} min left)" if minutes >= 1 else " (about a minute left)"
