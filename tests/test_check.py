# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 check`: findings, exit status, and what goes to stdout."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm

from vllm_mqa_sm90 import check, cli, machine, plugin, seams


def check_json() -> subprocess.CompletedProcess[str]:
    """A process of its own: what vLLM writes while it is imported counts."""
    command = [sys.executable, "-m", "vllm_mqa_sm90.cli", "check", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_json_is_all_of_stdout() -> None:
    done = check_json()
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["reasons"] else 0)
    assert report["versions"]["vllm"] == vllm.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert [seam["path"] for seam in report["seams"]] == [seam.path for seam in seams.applying(seams.release())]
    assert [seam["problem"] for seam in report["seams"]] == [None] * len(report["seams"])


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


def run(*, as_json: bool = False) -> int:
    return check.run(argparse.Namespace(json=as_json))


def test_verdict_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plugin, "problems", lambda: iter(()))
    assert run() == 0
    assert "would take over the sparse indexer's decode here" in capsys.readouterr().out


def test_verdict_against(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plugin, "problems", lambda: iter(["the moon", "[the] tide"]))
    monkeypatch.setenv("COLUMNS", "20")  # cuts nothing
    assert run() == 1
    out = capsys.readouterr().out
    assert "The plugin would not take over here:\n- the moon\n- [the] tide\n" in out
    for seam in seams.applying(seams.release()):
        assert f"- {seam.path}: as expected\n" in out


def test_difference_in_vllm_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(seams, "SEAMS", [seams.Seam("vllm.gone:function", "calls it")])
    assert run(as_json=True) == 1
    (seam,) = json.loads(capsys.readouterr().out)["seams"]
    assert (seam["path"], seam["why"]) == ("vllm.gone:function", "calls it")
    assert "ModuleNotFoundError" in seam["problem"]
    assert run() == 1
    assert f"- {seam['problem']}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "reason"), [("off", "MQA_SM90 is off"), ("yes", "given 'yes'")])
def test_mode_counts(monkeypatch: pytest.MonkeyPatch, mode: str, reason: str) -> None:
    monkeypatch.setattr(plugin, "problems", lambda: iter(()))
    monkeypatch.setenv("MQA_SM90", mode)
    assert run() == 1
    assert reason in check.examine()["reasons"][0]


def test_no_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> str:
        raise ModuleNotFoundError("No module named 'vllm'")

    monkeypatch.setattr(seams, "vllm_version", missing)
    assert run() == 1
    assert "vLLM cannot be imported: No module named 'vllm'" in capsys.readouterr().out


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


def test_command_runs_the_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plugin, "problems", lambda: iter(()))
    assert cli.main(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasons"] == []
