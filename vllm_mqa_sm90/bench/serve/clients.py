# SPDX-License-Identifier: Apache-2.0
"""Runs of vLLM's client, `vllm bench serve`, of which each is a fork of one process that imported it.

The imports take longer than many a run.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.server import CLI, Process

# What a run imports, in vLLM 0.26 and 0.33; what another release does not have is passed over.
IMPORTED = [CLI, "vllm.benchmarks.serve", "vllm.entrypoints.cli.benchmark.main", "vllm.entrypoints.cli.serve"]

_FORKS = multiprocessing.get_context("forkserver")


def start(arguments: Sequence[str], log: Path, env: Mapping[str, str], prompts: Path, draw: Callable[[], list[str]]) -> Process:
    """A run of the command `vllm` with these arguments, which says all to `log`; write_prompts(prompts, draw) goes before."""
    log.write_bytes(b"")  # there to be read before the run writes
    _FORKS.set_forkserver_preload(IMPORTED)
    process = _FORKS.Process(target=_run, args=(CLI, list(arguments), log, dict(env), prompts, draw))
    process.start()
    return Process(_Fork(process), log)


def write_prompts(prompts: Path, draw: Callable[[], list[str]]) -> None:
    """For the client's `--dataset-name custom`; where the file is there, nothing is drawn."""
    if not prompts.exists():
        output.write_whole(prompts, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in draw()))


class _Fork:
    """What `server.Process` asks of a subprocess.Popen, of a process of multiprocessing."""

    def __init__(self, process: multiprocessing.Process) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _run(cli: str, arguments: list[str], log: Path, env: dict[str, str], prompts: Path, draw: Callable[[], list[str]]) -> None:
    os.setsid()  # a group of its own, that is stopped as whole
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    write_prompts(prompts, draw)
    sys.argv = ["vllm", *arguments]
    importlib.import_module(cli).main()
