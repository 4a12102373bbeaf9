# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 check`: findings, exit status, and what goes to stdout."""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm

from vllm_mqa_sm90 import check, cli, machine, ops, plugin, seams


def check_json() -> subprocess.CompletedProcess[str]:
    """A process of its own: what vLLM writes while it is imported counts."""
    command = [sys.executable, "-m", "vllm_mqa_sm90", "check", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_json_is_all_of_stdout() -> None:
    done = check_json()
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["reasons"] else 0)
    assert report["versions"]["vllm"] == vllm.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert [seam["path"] for seam in report["seams"]] == list(dict.fromkeys(seam.path for seam in seams.applying(seams.release())))
    assert [seam["problem"] for seam in report["seams"]] == [None] * len(report["seams"])


# PyTorch stands in the way: nothing but what was said before it is imported comes out.
SAID_FIRST = """
import sys
from vllm_mqa_sm90 import cli
sys.modules["torch"] = None
cli.main(["check"])
"""


def test_says_at_once_that_it_imports() -> None:
    done = subprocess.run([sys.executable, "-c", SAID_FIRST], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr.splitlines()[0]) == ("", check.IMPORTING)


@pytest.mark.gpu
def test_takes_over_here() -> None:
    done = check_json()
    report = json.loads(done.stdout)
    assert (done.returncode, report["reasons"]) == (0, [])
    assert report["gpus"][0]["compute_cap"] == "9.0"


@pytest.mark.parametrize("arguments", [(), ("check", "--yaml"), ("no-such-command",)])
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2


H100 = {"name": "NVIDIA H100 80GB HBM3", "compute_cap": "9.0", "driver_version": "580.65.06"}
A100 = {"name": "NVIDIA A100-SXM4-80GB", "compute_cap": "8.0", "driver_version": "580.65.06"}


def run(*, as_json: bool = False) -> int:
    return check.run(argparse.Namespace(json=as_json))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where nothing speaks against it."""
    monkeypatch.delenv("MQA_SM90", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: [H100])
    monkeypatch.setattr(seams, "hopper_problem", lambda: None)


def test_verdict_for(hopper: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert "would take over the sparse indexer's decode here" in out
    count = len({seam.path for seam in seams.applying(seams.release())})
    assert f"{count} places that the plugin replaces or relies on, none unlike expected" in out
    assert f"decode here. Top-k: {plugin.whose_topk()}.\n" in out


def test_verdict_against(hopper: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plugin, "release_problem", lambda: "the moon")
    monkeypatch.setattr(plugin, "library_problem", lambda: "[the] tide")
    monkeypatch.setenv("COLUMNS", "20")  # cuts nothing
    assert run() == 1
    assert "The plugin would not take over here:\n- the moon\n- [the] tide\n" in capsys.readouterr().out
    assert check.examine()["topk"] is None


@pytest.mark.parametrize(
    ("version", "whose"),
    [
        ("0.29.1", "vLLM's: vLLM 0.29.1 has no place for another, as 0.30 has"),
        ("0.30.0", "the plugin's, unless --sparse-indexer-topk-backend names one of vLLM's"),
        ("0.33.0", "the plugin's, unless --sparse-indexer-topk-backend names one of vLLM's"),
    ],
)
def test_whose_topk(hopper: None, monkeypatch: pytest.MonkeyPatch, version: str, whose: str) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: version)
    monkeypatch.setattr(plugin, "seams_problem", lambda: None)
    assert check.examine()["topk"] == whose


def test_difference_in_vllm_is_shown_once(
    hopper: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = seams.Seam("vllm.gone:function", "calls it")
    monkeypatch.setattr(seams, "SEAMS", [gone, seams.Seam("vllm:__version__", "reads it"), gone])
    assert run(as_json=True) == 1
    seam, other = json.loads(capsys.readouterr().out)["seams"]
    assert (seam["path"], seam["why"]) == ("vllm.gone:function", "calls it")
    assert "ModuleNotFoundError" in seam["problem"] and other["problem"] is None
    assert run() == 1
    out = capsys.readouterr().out
    assert out.count(seam["problem"]) == 1 and "2 places that the plugin replaces or relies on, 1 unlike expected" in out


@pytest.mark.parametrize(("mode", "reason"), [("off", "MQA_SM90 is off"), ("yes", "given 'yes'")])
def test_mode_counts(hopper: None, monkeypatch: pytest.MonkeyPatch, mode: str, reason: str) -> None:
    monkeypatch.setenv("MQA_SM90", mode)
    assert run() == 1
    (found,) = check.examine()["reasons"]
    assert reason in found


def test_all_reasons_at_once_the_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM, on an A100, without a library, switched off."""
    monkeypatch.setattr(machine, "gpus", lambda: [A100, A100])
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(ops, "_loaded", False)
    monkeypatch.setattr(ops, "_LIBRARY", Path("/nowhere/_C.abi3.so"))
    monkeypatch.setenv("MQA_SM90", "off")
    gpu, mode, vllm, library = check.examine()["reasons"]
    assert gpu == "the GPU is NVIDIA A100-SXM4-80GB (8.0); the kernel is for compute capability 9.0 (H100, H200, GH200)"
    assert mode == "MQA_SM90 is off"
    assert vllm == "vLLM is not installed in this Python"
    assert "/nowhere/_C.abi3.so does not exist" in library


def test_all_reasons_at_once_with_a_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> str:
        raise AttributeError("current_platform")

    monkeypatch.setattr(machine, "gpus", lambda: [H100])
    monkeypatch.setattr(seams, "hopper_problem", unreadable)
    monkeypatch.setattr(seams, "vllm_version", lambda: "0.99.0")
    monkeypatch.setattr(seams, "applying", lambda to: iter([seams.Seam("vllm.gone:function", "calls it")]))
    platform, release, code = check.examine()["reasons"]
    assert release == "vLLM is 0.99.0; this version is for 0.24 to 0.33"
    assert platform == "AttributeError: current_platform"
    assert code.startswith("vLLM differs from what this version knows: vllm.gone:function: expected to exist")


def test_what_vllm_sees_counts(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi may be missing, or list GPUs that vLLM does not use."""
    monkeypatch.setattr(machine, "gpus", lambda: [])
    assert check.examine()["reasons"] == []
    monkeypatch.setattr(seams, "hopper_problem", lambda: "vLLM found no CUDA GPU (platform CpuPlatform)")
    assert check.examine()["reasons"] == ["no GPU: nvidia-smi lists none"]
    monkeypatch.setattr(machine, "gpus", lambda: [H100])
    assert check.examine()["reasons"] == ["vLLM found no CUDA GPU (platform CpuPlatform)"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'vllm'", name="vllm"), "vLLM is not installed in this Python"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "vLLM cannot be imported: No module named 'x'"),
        (OSError("libcuda.so.1: no such file"), "vLLM cannot be imported: OSError: libcuda.so.1: no such file"),
    ],
)
def test_vllm_that_cannot_be_imported(hopper: None, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def missing() -> str:
        raise error

    monkeypatch.setattr(seams, "vllm_version", missing)
    assert check.examine()["reasons"] == [reason]


def test_environment_for_a_bug_report(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.9'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MQA_SM90", "require")
    run(as_json=True)
    environment = json.loads(capsys.readouterr().out)["environment"]
    assert environment["python"] == f"{platform.python_version()}, {sys.executable}"
    assert platform.release() in environment["os"] and environment["libc"] == " ".join(platform.libc_ver())
    assert environment["nvcc"] == f"{nvcc}, release 13.1"
    assert (environment["CUDA_HOME"], environment["MQA_SM90"]) == (str(tmp_path), "require")
    run()
    out = capsys.readouterr().out
    assert all(value in out for value in environment.values())
    assert "driver 580.65.06" in out and torch.__version__ in out and vllm.__version__ in out


@pytest.fixture
def nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where to write what stands in for it; all GPUs are visible."""
    tool = tmp_path / "nvidia-smi"
    tool.touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tool


def test_gpus_are_those_of_nvidia_smi(nvidia_smi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 580.65.06'\n")
    run()
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0, driver 580.65.06" in capsys.readouterr().out
    nvidia_smi.write_text("#!/bin/sh\nexit 9\n")
    assert check.examine()["gpus"] == []


# Two GPUs; of a MIG part it says nothing.
TWO_GPUS = """\
#!/bin/sh
case "$1" in --id=MIG*) exit 6;; --id=0) ;; *) echo 'NVIDIA A10, 8.6, 580.65.06';; esac
case "$1" in --id=1) ;; *) echo 'NVIDIA H200, 9.0, 580.65.06';; esac
"""


@pytest.mark.parametrize(
    ("visible", "listed"),
    [
        (None, {"8.6", "9.0"}), ("", {"8.6", "9.0"}), ("0", {"9.0"}), ("1", {"8.6"}), ("1,0", {"8.6", "9.0"}),
        ("MIG-1c2d", {"8.6", "9.0"}),
    ],
)  # fmt: skip
def test_gpus_are_those_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, nvidia_smi: Path, visible: str | None, listed: set[str]
) -> None:
    nvidia_smi.write_text(TWO_GPUS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert {gpu["compute_cap"] for gpu in machine.gpus()} == listed


def test_command_runs_the_check(hopper: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasons"] == []
