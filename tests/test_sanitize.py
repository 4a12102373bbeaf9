# SPDX-License-Identifier: Apache-2.0
"""tests/sanitize.sh, with stand-ins for compute-sanitizer and for the builds."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOAKED = "5 steps from seed 0, 0 wrong, 3 s, NVIDIA H100 80GB HBM3"
CLEAN = f"{SOAKED}\n========= ERROR SUMMARY: 0 errors"
NO_RACE = f"{SOAKED}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
UNINITIALIZED = "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at void {}(Params)+0x1d0"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the script needs of the repository, with a compute-sanitizer that keeps its arguments and says what `say` has it say."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for folder in "tests", "vllm_mqa_sm90", "bin":
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "tests" / "sanitize.sh", tmp_path / "tests")
    (tmp_path / "vllm_mqa_sm90" / "_C.abi3.so").write_text("the normal build")
    (tmp_path / "vllm_mqa_sm90" / "ops.py").write_text("")
    fake = tmp_path / "bin" / "compute-sanitizer"
    fake.write_text(
        '#!/bin/sh\necho "$PYTHONPATH ${PYTORCH_NO_CUDA_MEMORY_CACHING:-cached} $*" >>arguments\n'
        'cat "$2.says"\nexit "$(cat "$2.exits")"\n'
    )
    # The build: what it was told, and a library.
    python = tmp_path / "bin" / "python"
    python.write_text(
        '#!/bin/sh\necho "$NVCC_APPEND_FLAGS $*" >>builds\n[ ! -e no-build ] || exit 1\n'
        'echo "for racecheck" >build/racecheck/vllm_mqa_sm90.so\nmkdir -p build/racecheck/vllm_mqa_sm90\n'
        "mv build/racecheck/vllm_mqa_sm90.so build/racecheck/vllm_mqa_sm90/_C.abi3.so\n"
    )
    for each in fake, python:
        each.chmod(0o755)
    for tool in "memcheck", "initcheck", "synccheck", "racecheck":
        say(tmp_path, tool, NO_RACE if tool == "racecheck" else CLEAN)
    return tmp_path


def say(tree: Path, tool: str, text: str, status: int = 0) -> None:
    (tree / f"{tool}.says").write_text(text + "\n")
    (tree / f"{tool}.exits").write_text(str(status))


def sanitize(tree: Path, *tools: str, **environment: str) -> tuple[int, list[str]]:
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(tree / "tests" / "sanitize.sh"), *tools]
    done = subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_four_tools_find_nothing(tree: Path) -> None:
    status, lines = sanitize(tree, STEPS="7", SEED="30")
    assert status == 0, lines
    assert [line.split(": ")[:2] for line in lines] == [
        [tool, "found nothing"] for tool in ("memcheck", "initcheck", "synccheck", "racecheck")
    ]
    assert all(SOAKED in line and "SUMMARY: 0" in line for line in lines)
    memcheck, initcheck, synccheck, racecheck = (tree / "arguments").read_text().splitlines()
    for call in memcheck, initcheck, synccheck, racecheck:
        assert "python tests/soak.py --small --verbose --steps 7 --seconds 60 --seed 30" in call
        assert ("--kernel-name kns=mqa_sm90 --error-exitcode 9" in call) == (call != initcheck)
        assert ("--run-only" in call) == (call == initcheck)
        assert (" 1 --tool" in call) == (call in (memcheck, initcheck))
        assert call.startswith(f"{tree}{'/build/racecheck' if call == racecheck else ''} ")


def test_racecheck_has_a_library_of_its_own_and_keeps_it(tree: Path) -> None:
    assert sanitize(tree, "racecheck")[0] == 0
    assert (tree / "builds").read_text() == " -DMQA_SM90_RACECHECK build/racecheck/csrc/build.py\n"
    package = tree / "build" / "racecheck" / "vllm_mqa_sm90"
    assert (package / "_C.abi3.so").read_text() == "for racecheck\n" and (package / "ops.py").exists()
    assert (tree / "vllm_mqa_sm90" / "_C.abi3.so").read_text() == "the normal build"
    (tree / "no-build").touch()
    (tree / "vllm_mqa_sm90" / "ops.py").write_text("changed")
    assert sanitize(tree, "racecheck")[0] == 0  # as csrc is the same
    assert (package / "ops.py").read_text() == "changed"
    (tree / "csrc" / "shared" / "hopper.cuh").write_text("changed")
    for _ in range(2):  # a failed build leaves nothing that looks like one
        status, lines = sanitize(tree, "racecheck")
        assert status == 1 and "its library cannot be built" in lines[0]


@pytest.mark.parametrize(
    ("tool", "text", "status"),
    [
        ("memcheck", CLEAN.replace("0 errors", "3 errors"), 9),
        ("synccheck", CLEAN, 9),
        ("memcheck", CLEAN.replace("0 wrong", "1 wrong"), 1),
        ("memcheck", "========= ERROR SUMMARY: 0 errors", 0),  # the soak did not end
        ("memcheck", SOAKED, 0),  # the tool did not
        ("racecheck", NO_RACE.replace("0 hazards", "1 hazards"), 0),
        ("initcheck", f"{UNINITIALIZED.format('mqa_sm90::selection::selection_kernel<16, 1>')}\n{CLEAN}", 0),
        ("initcheck", SOAKED, 0),
    ],
)
def test_what_is_found_fails(tree: Path, tool: str, text: str, status: int) -> None:
    say(tree, tool, text, status)
    result, lines = sanitize(tree, "memcheck", "initcheck", "synccheck", "racecheck")
    assert result == 1
    assert [line.split(":")[0] for line in lines if "FOUND SOMETHING" in line] == [tool]


def test_initcheck_in_kernels_of_pytorch_is_not_ours(tree: Path) -> None:
    text = f"{UNINITIALIZED.format('at::native::sort_kernel')}\n{CLEAN.replace('0 errors', '1 error')}"
    say(tree, "initcheck", text)
    status, lines = sanitize(tree, "initcheck")
    assert status == 0 and "0 in our kernels (ERROR SUMMARY: 1 error in all)" in lines[0]


def test_wrong_usage_and_no_sanitizer(tree: Path) -> None:
    assert sanitize(tree, "memcheck", "leakcheck") == (
        2, ["sanitize.sh: expected memcheck, initcheck, synccheck or racecheck, given leakcheck"],
    )  # fmt: skip
    (tree / "bin" / "compute-sanitizer").unlink()
    if not shutil.which("compute-sanitizer"):
        assert sanitize(tree, CUDA_HOME="/nowhere")[0] == 1
