# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` of our own: started on a free loopback port, waited for, asked, and stopped whole."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from vllm_mqa_sm90 import machine

CLI = "vllm.entrypoints.cli.main"  # the command `vllm`: its main() runs what sys.argv says
TAIL_LINES = 30
_INTERRUPTED_GRACE = 0.3  # seconds

_Self = TypeVar("_Self", bound="Process")


class ServerError(Exception):
    """A process of vLLM's did not start, died, or refused a request.

    The message is one line with the path of the process's log, then the log's first error and its tail.
    """

    def __init__(self, what: str, log: Path | None = None, details: str = "") -> None:
        super().__init__(f"{what}\n{details}" if details else what)
        self.what, self.log = what, log


def seconds(text: str) -> float:
    """A timeout, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, given {text!r}")
    return value


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm_serve(model: Path, port: int, *arguments: str) -> list[str]:
    """The command of `vllm serve`, by module, so that it runs in this Python without its script on PATH."""
    command = [sys.executable, "-m", CLI, "serve", str(model)]
    return [*command, "--host", "127.0.0.1", "--port", str(port), *arguments]


def speculative_config(tokens: int, acceptance: Sequence[float] | None = None, method: str = "mtp") -> dict[str, Any]:
    """vLLM's --speculative-config for `tokens` tokens a step from the model's own MTP layer, or what `method` names.

    acceptance: the share of drafts accepted up to each position, for vLLM's synthetic acceptance, which stands in where
    drafts mean nothing; None: the model's own.
    """
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": tokens}
    if acceptance is not None:
        config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": list(acceptance[:tokens])}
    return config


def environment(scratch: Path, **variables: str) -> dict[str, str]:
    """The environment of an offline server that leaves its caches in `scratch`, plus `variables`.

    Where there is no CUDA toolkit, DeepGEMM's run-time compiler is pointed at the wheels' nvcc.
    """
    home, temporary = scratch / "home", scratch / "tmp"
    home.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    env |= {"PYTHONUSERBASE": site.getuserbase(), "HOME": str(home), "TMPDIR": str(temporary)}
    env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # FlashInfer's sampler is compiled at the first start; PyTorch's serves as well here.
    env.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    toolkit = machine.wheels_toolkit()
    if "CUDA_HOME" not in env and shutil.which("nvcc") is None and toolkit is not None:
        env["CUDA_HOME"] = str(toolkit)
        # The wheels' nvcc is newer than the headers beside it, which CCCL refuses by default.
        env["NVCC_PREPEND_FLAGS"] = "-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK"
    return env | variables


def start(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, *, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """The process of a command that says all to `log`, at the head of a process group of its own."""
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches us alone, and we stop the group.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            pass_fds=pass_fds,
        )


class Process:
    """A process that `start` started, or one like it, with everything that it starts, as a context manager.

    Leaving the context stops the whole process group: SIGINT first, SIGKILL after `grace` seconds, after a Ctrl-C
    of ours soon.
    """

    def __init__(self, process: Any, log: Path, *, grace: float = 30.0):
        self._process, self.log, self._grace = process, log, grace

    def __enter__(self: _Self) -> _Self:  # typing.Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a Ctrl-C somebody waits.
        self.stop(min(self._grace, _INTERRUPTED_GRACE) if isinstance(error, KeyboardInterrupt) else self._grace)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait_done(self, timeout: float, progress: Callable[[str], None]) -> None:
        """Waits for the process to end; calls `progress(last log line)` twice a second.

        Raises ServerError if it ends with a status other than 0, or not within `timeout` seconds.
        """
        start = time.monotonic()
        while time.monotonic() - start < timeout:
            progress(self._last_line())
            with contextlib.suppress(subprocess.TimeoutExpired):
                if status := self._process.wait(0.5):
                    raise self._error(f"it ended with status {status}")
                return
        raise self._error(f"it was not done after {timeout:.0f} s")

    def stop(self, grace: float) -> None:
        """Stops the process group, by SIGKILL after `grace` seconds. Harmless when it is already gone."""
        try:
            if self._process.poll() is None:
                # vLLM's front end ends its engine on SIGINT; signalling both at once would make them race.
                self._process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(grace)
        finally:  # also on a second Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @staticmethod
    def _tidy(line: str) -> str:
        """A log line without vLLM's process prefix, colour codes and date."""
        line = re.sub(r"\x1b\[[0-9;]*m", "", line)
        line = re.sub(r"^\([\w.]+ pid=\d+\) ?", "", line)
        return re.sub(r"^(INFO|WARNING|ERROR) [\d-]+ [\d:]+ ", r"\1 ", line).rstrip()

    def _lines(self, last_bytes: int) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - last_bytes))
            text = log.read().decode(errors="replace")
        # Progress bars rewrite their line; only what they last said counts.
        lines = (self._tidy(line.rstrip("\r").rsplit("\r", 1)[-1]) for line in text.split("\n"))
        return [line for line in lines if line]

    def _tail(self, count: int) -> list[str]:
        return self._lines(1 << 16)[-count:]

    def _last_line(self) -> str:
        return "".join(self._tail(1))

    def _cause(self) -> list[str]:
        """The exception of the log's first traceback, often far above those that follow from it; [] without one."""
        # vLLM logs its engine's tracebacks line by line, each with a prefix; other processes may log in between.
        lines = (re.sub(r"^ERROR \[[^]]*\] ", "", line) for line in self._lines(1 << 24))
        lines = (line for line in lines if not line.startswith(("INFO ", "WARNING ")))
        after = itertools.dropwhile(lambda line: line != "Traceback (most recent call last):", lines)
        exception = list(itertools.islice(itertools.dropwhile(lambda line: line.startswith((" ", "Traceback")), after), 5))
        # What follows indented is still its message.
        return exception[:1] + list(itertools.takewhile(lambda line: line.startswith(" "), exception[1:]))

    def _error(self, what: str) -> ServerError:
        tail, cause = self._tail(TAIL_LINES), self._cause()
        parts = [("the log ends with", tail)]
        if cause and not any(line.endswith(cause[0]) for line in tail):
            parts = [("the first error in the log is", cause), ("and it ends with", tail)]
        details = "\n".join("\n  ".join([title, *lines]) for title, lines in parts)
        return ServerError(f"{what}; its log is {self.log}", self.log, details)


class Server(Process):
    """A server process. A request fails when the server says nothing for `timeout` seconds."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        *,
        grace: float = 30.0,
        timeout: float = 600.0,
    ):
        super().__init__(start(command, log, env), log, grace=grace)
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._timeout = timeout

    def wait_ready(self, timeout: float, progress: Callable[[float, str], None]) -> float:
        """Waits for /health; calls `progress(seconds so far, last log line)` twice a second.

        Returns the seconds it took. Raises ServerError if the process ends or `timeout` seconds pass.
        """
        start = time.monotonic()
        while (waited := time.monotonic() - start) < timeout:
            if (status := self._process.poll()) is not None:
                raise self._error(f"the server ended with status {status} while starting")
            with contextlib.suppress(OSError, http.client.HTTPException):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return waited
            progress(waited, self._last_line())
            time.sleep(0.5)
        raise self._error(f"the server was not ready after {timeout:.0f} s")

    def get(self, path: str) -> str:
        """The body of a GET."""
        with self._open(urllib.request.Request(self.url + path)) as response:
            return response.read().decode()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a POST of JSON."""
        with self._open(self._json_request(path, body)) as response:
            return json.load(response)

    def command(self, path: str) -> None:
        """A POST without content, whose answer has none either."""
        with self._open(urllib.request.Request(self.url + path, method="POST")):
            pass

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The JSON events of a streamed answer, as they come."""
        with self._open(self._json_request(path, {**body, "stream": True})) as response:
            for line in response:
                data = line.decode().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data:
                    yield json.loads(data)

    @contextlib.contextmanager
    def _open(self, request: urllib.request.Request) -> Iterator[http.client.HTTPResponse]:
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                yield response
        except urllib.error.HTTPError as error:
            detail = " ".join(error.read().decode(errors="replace").split())
            raise self._error(f"{request.full_url} answered {error.code} {detail}") from error
        except (OSError, http.client.HTTPException) as error:
            raise self._error(f"{request.full_url} did not answer: {error}") from error

    def _json_request(self, path: str, body: Mapping[str, Any]) -> urllib.request.Request:
        return urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
