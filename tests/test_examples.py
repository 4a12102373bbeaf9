# SPDX-License-Identifier: Apache-2.0
"""The examples for serving, with stand-ins for what they start."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_mqa_sm90 import checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
MTP = {"method": "mtp", "num_speculative_tokens": 2}
SYNTHETIC = {**MTP, "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": checkpoint.ACCEPTANCE_RATES[:2]}


@pytest.fixture(params=[True, False], ids=["made", "real"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict]:
    """A model and the speculative configuration that it should get."""
    if not request.param:
        return "deepseek-ai/DeepSeek-V3.2", MTP
    checkpoint._write_json(tmp_path / checkpoint.INDEX, {"metadata": {"weights": checkpoint.RANDOM}})
    return str(tmp_path), SYNTHETIC


def stub(folder: Path, name: str, status: int = 0) -> None:
    file = folder / name
    program = f"import json, os, sys; print(json.dumps([{name!r}, *sys.argv[1:], os.environ['MQA_SM90']])); sys.exit({status})"
    file.write_text(f"#!{sys.executable}\n{program}\n")
    file.chmod(0o755)


def serve_sh(folder: Path, *words: str, **variables: str) -> tuple[int, list[list[str]]]:
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CUDA_HOME": "/cuda", **variables}
    done = subprocess.run(["bash", EXAMPLES / "serve.sh", *words], env=env, capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_serve_sh(model: tuple[str, dict], tmp_path: Path) -> None:
    for name in ("vllm", "vllm-mqa-sm90"):
        stub(tmp_path, name)
    name, speculative = model
    status, (check, serve) = serve_sh(tmp_path, name, "--tensor-parallel-size", "8")
    assert (status, check) == (0, ["vllm-mqa-sm90", "check", "require"])
    assert serve[:4] == ["vllm", "serve", name, "--speculative-config"]
    assert json.loads(serve[4]) == speculative
    assert serve[5:] == ["--tensor-parallel-size", "8", "require"]


def test_serve_sh_of_v41(tmp_path: Path) -> None:
    for name in ("vllm", "vllm-mqa-sm90"):
        stub(tmp_path, name)
    checkpoint._write_json(tmp_path / "config.json", checkpoint.ARCHITECTURES["v41"].config(1, 16))
    _, (_, serve) = serve_sh(tmp_path, str(tmp_path), "--port", "1")
    assert json.loads(serve[4]) == MTP | {"method": "dspark"} and serve[5:] == ["--port", "1", "require"]
    checkpoint._write_json(tmp_path / checkpoint.INDEX, {"metadata": {"weights": checkpoint.RANDOM}})
    _, (_, serve) = serve_sh(tmp_path, str(tmp_path), "--port", "1")
    assert json.loads(serve[4]) == SYNTHETIC | {"method": "dspark"}
    assert serve[5:] == ["--language-model-only", "--port", "1", "require"]
    _, (_, serve) = serve_sh(tmp_path, "deepseek-ai/DeepSeek-V4.1-Flash", METHOD="dspark")
    assert json.loads(serve[4]) == MTP | {"method": "dspark"} and serve[5:] == ["require"]


def test_serve_sh_stops_where_the_plugin_would_not_take_over(tmp_path: Path) -> None:
    stub(tmp_path, "vllm")
    stub(tmp_path, "vllm-mqa-sm90", status=1)
    assert serve_sh(tmp_path, "model") == (1, [["vllm-mqa-sm90", "check", "require"]])
    status, (serve,) = serve_sh(tmp_path, "model", MQA_SM90="off")
    assert status == 0 and serve[1] == "serve" and serve[-1] == "off"
    assert serve_sh(tmp_path)[0] == 1


def test_offline_py(model: tuple[str, dict], tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(
        """
import json, os
from types import SimpleNamespace as Some

class LLM:
    def __init__(self, **arguments):
        print(json.dumps([os.environ["MQA_SM90"], arguments]))

    def generate(self, prompts, parameters):
        return [Some(prompt=prompt, outputs=[Some(text="kale")]) for prompt in prompts]

    def get_metrics(self):
        yield Some(name="vllm:spec_decode_num_drafts", value=200)
        yield Some(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[160, 120])

SamplingParams = Some
"""
    )
    name, speculative = model
    env = {key: value for key, value in os.environ.items() if key != "MQA_SM90"}
    env["PYTHONPATH"] = f"{tmp_path}:{EXAMPLES.parent}"
    command = [sys.executable, EXAMPLES / "offline.py", name, "--tensor-parallel-size", "2"]
    lines = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    mode, arguments = json.loads(lines[0])
    assert mode == "require"
    assert (arguments["model"], arguments["speculative_config"]) == (name, speculative)
    assert arguments["tensor_parallel_size"] == 2
    assert arguments.keys() <= {field.name for field in dataclasses.fields(EngineArgs)}
    assert lines[-1] == "drafts accepted up to each position: 80.0%, 60.0%"
