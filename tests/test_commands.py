# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-mqa-sm90` and `import vllm_mqa_sm90`: what they load, what they need, and how they end."""

import ast
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vllm_mqa_sm90
from vllm_mqa_sm90 import cli, machine

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(vllm_mqa_sm90.__file__).parent
COMMANDS = [(), ("check",), ("make-checkpoint",), ("demo",), ("bench",), ("bench", "kernel"), ("bench", "serve")]

# What a program imports that ends with SystemExit.
LOADED = """
import sys
from vllm_mqa_sm90 import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    print("status", end.code)
print("loaded", *({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "vllm", "matplotlib"}))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("--no-such-option", 2)])
def test_help_and_usage_errors_do_not_wait_for_pytorch(command: tuple[str, ...], word: str, status: int) -> None:
    done = run("-c", LOADED, *command, word)
    assert done.stdout.splitlines()[-2:] == [f"status {status}", "loaded"], done.stderr
    assert "usage: vllm-mqa-sm90" in (done.stderr if status else done.stdout)


@pytest.mark.parametrize("words", [("-m", "vllm_mqa_sm90"), ("-m", "vllm_mqa_sm90.cli")])
def test_version(words: tuple[str, ...]) -> None:
    done = run(*words, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vllm-mqa-sm90 {vllm_mqa_sm90.__version__}\n", "")
    assert vllm_mqa_sm90.__version__ == machine.version()


def test_import_loads_nothing_that_pytorch_does_not() -> None:
    """torch._dynamo alone takes seconds."""
    program = "import sys, torch; before = {*sys.modules}; from vllm_mqa_sm90 import *; print(*({*sys.modules} - before))"
    loaded = run("-c", program).stdout.split()
    assert "vllm_mqa_sm90.ops" in loaded
    assert [name for name in loaded if not name.startswith("vllm_mqa_sm90")] == []


def test_names_of_the_package() -> None:
    assert {*vllm_mqa_sm90.__all__, "__version__"} <= {*dir(vllm_mqa_sm90)}
    assert all(getattr(vllm_mqa_sm90, name) is not None for name in vllm_mqa_sm90.__all__)
    with pytest.raises(AttributeError, match="module 'vllm_mqa_sm90' has no attribute 'plans'"):
        vllm_mqa_sm90.plans


def test_the_first_use_may_be_in_a_compiled_function() -> None:
    program = """
import torch, vllm_mqa_sm90
lens = torch.tensor([[70, 71], [5, 6]], dtype=torch.int32)
compiled = torch.compile(lambda lens: vllm_mqa_sm90.plan(lens, num_sms=3), fullgraph=True, backend="eager")
print(torch.equal(compiled(lens), vllm_mqa_sm90.plan(lens, num_sms=3)))
"""
    done = run("-c", program)
    assert done.stdout == "True\n", done.stderr


def requirements(text: str) -> set[str]:
    return {re.match(r"[\w-]+", each)[0] for each in re.findall(r'"(.*?)"', text)}


def test_what_modules_import_at_once_is_required() -> None:
    """As numpy is, without which PyTorch warns."""
    project = (ROOT / "pyproject.toml").read_text()
    required = requirements(re.search(r"^dependencies = (.*)", project, re.M)[1])
    of_plots = required | requirements(re.search(r"^bench = (.*)", project, re.M)[1])
    ours = {*sys.stdlib_module_names, "vllm_mqa_sm90"}
    modules = list(PACKAGE.rglob("*.py"))
    assert len(modules) > 20
    for module in modules:
        allowed = of_plots if re.search("plot", module.name) else required
        if module.name == "contexts.py":  # vLLM imports it
            allowed = required | {"vllm"}
        for node in ast.parse(module.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed | ours, module


# A process that says when it is at a point, and goes on for long.
POINTS = {
    "importing": """
import sys
class Slow:
    def find_spec(self, name, *_):
        if name == "torch":
            print("now", file=sys.__stdout__, flush=True)
            try:
                __import__("time").sleep(60)
            except BaseException:  # as C++ in between, which may also abort
                __import__("time").sleep(60)
sys.meta_path.insert(0, Slow())
""",
    "running": """
from vllm_mqa_sm90 import machine
def slow():
    print("now", file=__import__("sys").__stdout__, flush=True)
    __import__("time").sleep(60)
machine.gpus = slow
""",
    # A thread that nobody tells to stop.
    "threads": """
import threading, time
from vllm_mqa_sm90 import machine
def slow():
    threading.Thread(target=time.sleep, args=[60]).start()
    print("now", file=__import__("sys").__stdout__, flush=True)
    time.sleep(60)
machine.gpus = slow
""",
}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("point", POINTS)
def test_a_stop_ends_a_command_at_once_without_a_traceback(point: str, sent: signal.Signals) -> None:
    program = POINTS[point] + "import sys; from vllm_mqa_sm90 import cli; sys.argv[1:] = ['check']; cli.command()"
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout.readline() == "now\n"
    start = time.monotonic()
    running.send_signal(sent)
    out, errors = running.communicate(timeout=30)
    assert time.monotonic() - start < 3  # a second, and what a busy machine adds
    assert (running.returncode, out) == (130, "") and errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", [("demo",), ("bench", "serve", "o/m")], ids=" ".join)
def test_arguments_of_vllm_go_after_two_dashes(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--max-num-seqs", "8"])
    assert end.value.code == 2
    assert "arguments of vllm serve come last, after --: -- --max-num-seqs 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--timeout", "0"])
    assert "argument --timeout: expected a number of seconds above 0, given '0'" in capsys.readouterr().err
