# SPDX-License-Identifier: Apache-2.0
"""Runs of vLLM's client, `vllm bench serve`, of which each is a fork of one process that imported it.

The imports take longer than many a run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from vllm_mqa_sm90.server import CLI, Process, start

_PROGRAM = Path(__file__).with_name("forking.py")


class Clients(Process):
    """The process that has, or will soon have, imported the client; a context manager, as each `run` is.

    Its start returns at once: the imports go on meanwhile.
    """

    def __init__(self, log: Path, env: Mapping[str, str]) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, str(_PROGRAM), str(theirs.fileno()), CLI]
        with theirs:
            # It has nothing to finish: no grace.
            super().__init__(start(command, log, env, pass_fds=[theirs.fileno()]), log, grace=0)

    def run(self, arguments: Sequence[str], log: Path) -> Process:
        """A run of the command `vllm` with these arguments; one at a time. ServerError if the imports failed."""
        log.write_bytes(b"")  # there to be read before the run writes
        try:
            self._connection.send((list(arguments), str(log)))
            return Process(_Fork(self._connection), log)
        except (EOFError, OSError) as error:
            raise self._error("vLLM's client cannot be imported") from error


class _Fork:
    """What `Process` asks of a subprocess.Popen, of a process whose parent is at the other end of the connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._status: int | None = None
        self.pid: int = connection.recv()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        if self._status is None:
            if not self._connection.poll(timeout):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self._status = self._connection.recv()
        return self._status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)
