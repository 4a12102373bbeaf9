# SPDX-License-Identifier: Apache-2.0
"""`forking.py FD CLI`: imports a command and forks for each run of it. Its other end is `clients.Clients`.

A program by itself: importing our package would have every run import PyTorch, needed or not.
"""

import contextlib
import importlib
import os
import sys
from multiprocessing.connection import Connection
from types import ModuleType


def main(descriptor: str, cli: str) -> None:
    """Runs what comes over the connection, until it is closed. Sends each run's process id, and then its exit status."""
    connection = Connection(int(descriptor))
    module = importlib.import_module(cli)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.suppress(SystemExit):
        call(module, ["bench", "serve", "--help"])  # which imports what a run does
    while True:
        try:
            arguments, log = connection.recv()
        except EOFError:
            return
        if not (pid := os.fork()):
            os.setsid()  # a group of its own, that is stopped as whole
            with open(log, "ab") as output:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(output.fileno(), stream.fileno())
            return call(module, arguments)
        connection.send(pid)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def call(module: ModuleType, arguments: list[str]) -> None:
    sys.argv = ["vllm", *arguments]
    module.main()


if __name__ == "__main__":
    here = os.path.dirname(__file__)
    sys.path[:] = [folder for folder in sys.path if folder != here]  # where a `trace` is not Python's
    main(*sys.argv[1:])
