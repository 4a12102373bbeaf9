# SPDX-License-Identifier: Apache-2.0
"""The demo: its substitute on the CPU, and all of its serving but the model, against a stand-in server process."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fake_server import METRICS
from rich.console import Console

import vllm_mqa_sm90
from vllm_mqa_sm90 import cli, demo, machine, server
from vllm_mqa_sm90.server import Server, ServerError

H100 = {"name": "NVIDIA H100", "compute_cap": "9.0", "driver_version": "580.1"}
A10 = {**H100, "name": "NVIDIA A10", "compute_cap": "8.6"}
FAKE = str(Path(__file__).with_name("fake_server.py"))


def fake_server(tmp_path: Path, *arguments: str) -> Server:
    port = server.free_port()
    return Server([sys.executable, FAKE, str(port), *arguments], port, tmp_path / "log")


def ready(running: Server) -> None:
    running.wait_ready(30, lambda seconds, line: None)


def child_of(log: Path) -> int:
    return int(re.search(r"child (\d+)", log.read_text())[1])


def gone(pid: int) -> bool:
    """Whether the process ends soon (a zombie has ended: its parent is gone, and init reaps it)."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_substitute_agrees_and_prints_its_numbers() -> None:
    out = console()
    assert demo.run_on_cpu(out, num_sms=132) == 0
    text = out.file.getvalue()
    assert re.search(r"tiles of 64 tokens +│ (\d+) visited, \1 needed", text)
    assert "132 (one on each SM" in text
    assert re.search(r"largest error \d\.\de-0[67]", text)
    assert "schedule and reference agree" in text


@pytest.mark.parametrize("damage", ["drop", "twice", "uneven"])
def test_substitute_notices_a_wrong_schedule(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    right = vllm_mqa_sm90.plan

    def wrong(context_lens: torch.Tensor, *, num_sms: int) -> torch.Tensor:
        plan = right(context_lens, num_sms=num_sms)
        if damage == "drop":
            plan[num_sms, 2] -= 1
        elif damage == "twice":
            plan[2] = plan[1]
        else:
            plan[1, 2] += plan[2, 2]
            plan[2, 2] = 0
        return plan

    monkeypatch.setattr(vllm_mqa_sm90, "plan", wrong)
    assert demo.run_on_cpu(console()) == 1


def test_command_runs_the_substitute_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "gpus", lambda: [A10])
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out.startswith("no GPU of compute capability 9.0")


@pytest.mark.parametrize(
    ("cuda", "visible", "seen", "why"),
    [
        (None, None, None, "does not see it, as it was built without CUDA"),
        ("13.0", "", None, "does not see it; CUDA_VISIBLE_DEVICES is '': name the GPU in it, or unset it"),
        ("13.0", None, None, "does not see it; is the driver for CUDA 13.0?"),
        ("13.0", None, "NVIDIA A10", "uses NVIDIA A10: choose with CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_pytorch_does_not_see_is_not_well(
    monkeypatch: pytest.MonkeyPatch, capsys, cuda: str | None, visible: str | None, seen: str | None, why: str
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [A10, H100])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: seen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cli.main(["demo"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"nvidia-smi lists NVIDIA H100, but PyTorch {torch.__version__} {why}") and "schedule" not in out


def test_progress_without_a_terminal_is_a_line_each_time() -> None:
    out = Console(file=io.StringIO(), width=40)
    with demo.waiting(out, "starting") as progress:
        for seconds, detail in (1, "early"), (15, ""), (20, "soon"), (30, "[it] " * 20), (45, "long " * 200):
            progress(seconds, detail)
    assert out.file.getvalue() == f"starting\n  15 s\n  30 s  {('[it] ' * 20).strip()}\n  45 s  {'long ' * 23}long…\n"


def test_free_port_is_free() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", server.free_port()))


def test_server_answers_and_leaves_no_process(tmp_path: Path) -> None:
    with fake_server(tmp_path) as running:
        ready(running)
        child = child_of(tmp_path / "log")
        assert not gone_now(child)
        answer = running.post("/v1/completions", {"prompt": "x", "max_tokens": 5})
        assert answer["usage"]["completion_tokens"] == 5
        events = list(running.stream("/v1/chat/completions", {"max_tokens": 5}))
        assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["kale", "mo", " tisu"]
        assert running.get("/metrics") == METRICS
        with pytest.raises(ServerError, match=r"/nothing answered 404 no such path[\s\S]*child \d+"):
            running.post("/nothing", {})
    assert gone(running.pid) and gone(child)


def gone_now(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_server_that_ignores_sigint_is_killed(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    with Server([sys.executable, "-c", program], 1, tmp_path / "log", grace=0.5) as running:
        while "deaf" not in (tmp_path / "log").read_text():
            time.sleep(0.05)
    assert gone(running.pid)


def test_failed_start_shows_the_end_of_the_log(tmp_path: Path) -> None:
    program = "print('\\n'.join(f'line {i}' for i in range(100))); raise SystemExit('out of \\x1b[31mmemory\\x1b[0m')"
    with Server([sys.executable, "-c", program], server.free_port(), tmp_path / "log") as running:
        with pytest.raises(ServerError) as failure:
            ready(running)
    message = str(failure.value)
    log = tmp_path / "log"
    assert message.startswith(f"the server ended with status 1 while starting; its log is {log}\nthe log ends with\n  line 71\n")
    assert message.endswith("\n  line 99\n  out of memory") and "line 50\n" not in message


ENGINE_FAILURE = """\
(APIServer pid=6) INFO 11-23 04:42:11 [core_client.py:90] waiting for the engine
(EngineCore pid=7) ERROR 11-23 04:43:00 [core.py:1332] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-23 04:43:00 [core.py:1332] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-23 04:43:00 [core.py:1332]   File "core.py", line 4, in run
(EngineCore pid=7) ERROR 11-23 04:43:00 [core.py:1332]     check(config)
(APIServer pid=6) INFO 11-23 04:43:00 [core_client.py:90] waiting for the engine
(EngineCore pid=7) ERROR 11-23 04:43:00 [core.py:1332] pydantic.ValidationError: 1 error for Config
(EngineCore pid=7) ERROR 11-23 04:43:00 [core.py:1332]   the pages are too few
(EngineCore pid=7) Process EngineCore:
"""
CONSEQUENCE = """\
(APIServer pid=6) Traceback (most recent call last):
(APIServer pid=6)   File "api.py", line 9, in main
(APIServer pid=6)     start()
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.mark.parametrize("lines_between", [0, 50])
def test_failed_start_shows_its_first_error(tmp_path: Path, lines_between: int) -> None:
    (tmp_path / "text").write_text(ENGINE_FAILURE + "line\n" * lines_between + CONSEQUENCE)
    program = f"print(open({str(tmp_path / 'text')!r}).read()); raise SystemExit(1)"
    with Server([sys.executable, "-c", program], server.free_port(), tmp_path / "log") as running:
        with pytest.raises(ServerError) as failure:
            ready(running)
    message = str(failure.value)
    assert message.count("pydantic.ValidationError: 1 error for Config") == 1
    assert message.endswith("    start()\n  RuntimeError: Engine core initialization failed. See root cause above.")
    if lines_between:
        start, _, rest = message.partition("\n")
        assert start == f"the server ended with status 1 while starting; its log is {tmp_path / 'log'}"
        cause = "the first error in the log is\n  pydantic.ValidationError: 1 error for Config\n    the pages are too few\nand it ends with\n  line\n"
        assert rest.startswith(cause)


def test_slow_start_ends_at_the_timeout_and_shows_progress(tmp_path: Path) -> None:
    line = "(EngineCore pid=7) INFO 11-23 03:50:55 [model.py:1] loading"
    seen = []
    program = f"import time; print({line!r}, flush=True); time.sleep(600)"
    with Server([sys.executable, "-c", program], server.free_port(), tmp_path / "log") as running:
        with pytest.raises(ServerError, match="not ready after 2 s"):
            running.wait_ready(2, lambda seconds, line: seen.append((seconds, line)))
    assert seen[-1][1] == "INFO [model.py:1] loading"
    assert gone(running.pid)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_the_server(tmp_path: Path, sent: signal.Signals) -> None:
    """A demo that is interrupted while its server runs ends with 130, soon, and leaves nothing behind."""
    (tmp_path / "config.json").write_text("{}")
    program = f"""
import sys, tempfile, torch
from vllm_mqa_sm90 import cli, demo
tempfile.tempdir = {str(tmp_path)!r}
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: (9, 0)
demo.vllm_serve = lambda model, port, *arguments: [sys.executable, {FAKE!r}, str(port)]
demo._ask = lambda console, server, pool: (print("pid", server.pid, flush=True), print(server.log.read_text(), flush=True), __import__("time").sleep(600))
sys.exit(cli.main(["demo", "--checkpoint", {str(tmp_path)!r}]))
"""
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pids = []
    for line in running.stdout:
        if found := re.match(r"(?:pid|child) (\d+)", line):
            pids.append(int(found[1]))
        if len(pids) == 2:
            break
    start = time.monotonic()
    running.send_signal(sent)
    assert running.wait(30) == 130
    assert time.monotonic() - start < 3  # a second, and what a busy machine adds
    running.stdout.close()
    assert len(pids) == 2 and all(map(gone, pids))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_interrupt_does_not_wait_for_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that threads wait for end with the server."""
    (tmp_path / "config.json").write_text("{}")

    def ask(console: Console, running: Server, pool: ThreadPoolExecutor) -> None:
        waiting = pool.submit(running.get, "/slow")
        while "slow" not in running.log.read_text():
            assert not waiting.done()
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "vllm_serve", lambda model, port, *arguments: [sys.executable, FAKE, str(port)])
    monkeypatch.setattr(demo, "_ask", ask)
    out, start = console(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        demo.run_on_gpu(out, tmp_path, 30, [])
    ready_after = float(re.search(r"after (\d+) s", out.file.getvalue())[1])
    assert time.monotonic() - start < ready_after + 5  # the server would answer after 60


def test_the_log_of_a_failed_server_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(demo, "vllm_serve", lambda *_: [sys.executable, "-c", "raise SystemExit('out of memory')"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(["demo", "--checkpoint", str(tmp_path / "model")]) == 1
    (log,) = tmp_path.glob("*.log")
    assert log.read_text() == "out of memory\n"
    out = capsys.readouterr().out
    assert f"its log is {log}\n" in out and out.count("out of memory") == 1



@pytest.mark.parametrize("launches, status", [(7, 0), (0, 1)])
def test_demo_against_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: int, status: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    commands = []

    def serve(model: Path, port: int, *arguments: str) -> list[str]:
        commands.append((model, arguments))
        return [sys.executable, FAKE, str(port), str(launches)]

    monkeypatch.setattr(demo, "vllm_serve", serve)
    out = console()
    assert demo.run_on_gpu(out, tmp_path, 30, ["--enforce-eager"]) == status
    text = out.file.getvalue()
    assert 'after "Native decoding on Hopper:": kalemo tisu (48 tokens)' in text
    assert "keeps 2048: kalemo tisu (32 tokens)" in text
    assert "chat, streamed: kalemo tisu (48 tokens)" in text
    assert "8 requests at once: 512 tokens" in text
    assert "80.0% at position 1, 60.0% at position 2" in text
    assert ("7 at next_n=3" in text) == (status == 0)
    assert ("decode steps ran natively at next_n=3" in text) == (status == 0)
    assert text.rstrip().endswith("server stopped")
    (model, arguments), = commands
    assert model == tmp_path and arguments[-1] == "--enforce-eager"


def test_environment_keeps_caches_in_the_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    env = server.environment(tmp_path, MQA_SM90="require")
    assert env["HOME"].startswith(str(tmp_path)) and os.path.isdir(env["HOME"])
    assert env["TMPDIR"].startswith(str(tmp_path)) and os.path.isdir(env["TMPDIR"])
    assert "XDG_CACHE_HOME" not in env
    assert env["MQA_SM90"] == "require"


def test_wheels_nvcc_is_named_where_there_is_no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(server.shutil, "which", lambda name: None)
    env = server.environment(tmp_path)
    assert Path(env["CUDA_HOME"], "bin", "nvcc").is_file()
    # The reason for the flag: without it this nvcc refuses the headers beside it.
    source = tmp_path / "t.cu"
    source.write_text("#include <cuda/std/cstdint>\n__global__ void kernel() {}\n")
    command = [f"{env['CUDA_HOME']}/bin/nvcc", "-arch=sm_90a", "-cubin", "-o", str(tmp_path / "t.cubin"), str(source)]
    assert subprocess.run(command, env={**os.environ, **env}).returncode == 0
