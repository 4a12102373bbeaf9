# SPDX-License-Identifier: Apache-2.0
"""The examples for serving, with stand-ins for what they start."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from weightless import write_weightless

from vllm_mqa_sm90 import checkpoint, seams, support
from vllm_mqa_sm90.architectures import ARCHITECTURES

EXAMPLES = Path(__file__).parent.parent / "examples"
MTP = {"method": "mtp", "num_speculative_tokens": 2}
SYNTHETIC = {**MTP, "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": checkpoint.ACCEPTANCE_RATES[:2]}


@pytest.fixture(params=[True, False], ids=["made", "real"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict]:
    """A model and the speculative configuration that it should get."""
    if not request.param:
        return "deepseek-ai/DeepSeek-V3.2", MTP
    mark_made(tmp_path)
    return str(tmp_path), SYNTHETIC


def stub(folder: Path, name: str, status: int = 0) -> None:
    file = folder / name
    program = f"import json, os, sys; print(json.dumps([{name!r}, *sys.argv[1:], os.environ['MQA_SM90']])); sys.exit({status})"
    file.write_text(f"#!{sys.executable}\n{program}\n")
    file.chmod(0o755)


def stub_programs(folder: Path) -> None:
    for name in ("vllm", "vllm-mqa-sm90"):
        stub(folder, name)


def mark_made(folder: Path) -> None:
    """As a checkpoint of make-checkpoint."""
    checkpoint._write_json(folder / checkpoint.INDEX, {"metadata": {"weights": checkpoint.RANDOM}})


def bash(folder: Path, *words: str, **variables: str) -> tuple[int, list[list[str]]]:
    """Status, and the words of what was started in the place of programs by those in `folder`."""
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CUDA_HOME": "/cuda", **variables}
    done = subprocess.run(["bash", *words], env=env, cwd=EXAMPLES.parent, capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def serve_sh(folder: Path, *words: str, **variables: str) -> tuple[int, list[list[str]]]:
    return bash(folder, "examples/serve.sh", *words, **variables)


def test_serve_sh(model: tuple[str, dict], tmp_path: Path) -> None:
    stub_programs(tmp_path)
    name, speculative = model
    status, (check, serve) = serve_sh(tmp_path, name, "--tensor-parallel-size", "8")
    assert (status, check) == (0, ["vllm-mqa-sm90", "check", "require"])
    assert serve[:4] == ["vllm", "serve", name, "--speculative-config"]
    assert json.loads(serve[4]) == speculative
    assert serve[5:] == ["--tensor-parallel-size", "8", "require"]


def test_serve_sh_of_v41(tmp_path: Path) -> None:
    stub_programs(tmp_path)
    checkpoint._write_json(tmp_path / "config.json", ARCHITECTURES["v41"].config(1, 16))
    _, (_, serve) = serve_sh(tmp_path, str(tmp_path), "--port", "1")
    assert json.loads(serve[4]) == MTP | {"method": "dspark"} and serve[5:] == ["--port", "1", "require"]
    mark_made(tmp_path)
    _, (_, serve) = serve_sh(tmp_path, str(tmp_path), "--port", "1")
    assert json.loads(serve[4]) == SYNTHETIC | {"method": "dspark"}
    assert serve[5:] == ["--language-model-only", "--port", "1", "require"]
    _, (_, serve) = serve_sh(tmp_path, "deepseek-ai/DeepSeek-V4.1-Flash", METHOD="dspark")
    assert json.loads(serve[4]) == MTP | {"method": "dspark"} and serve[5:] == ["require"]


def test_serve_sh_drafts(tmp_path: Path) -> None:
    stub_programs(tmp_path)
    _, (_, serve) = serve_sh(tmp_path, "model", "--port", "1", DRAFTS="0")
    assert serve == ["vllm", "serve", "model", "--port", "1", "require"]
    mark_made(tmp_path)
    for drafts in 1, 7:
        _, (_, serve) = serve_sh(tmp_path, str(tmp_path), DRAFTS=str(drafts))
        rates = checkpoint.ACCEPTANCE_RATES[:drafts]
        expected = SYNTHETIC | {"num_speculative_tokens": drafts, "synthetic_acceptance_rates": rates}
        assert json.loads(serve[4]) == expected and serve[5:] == ["require"]


RELEASED = {
    "deepseek-ai/DeepSeek-V3.2": "v32",
    "zai-org/GLM-5.2-FP8": "glm",
    "deepseek-ai/DeepSeek-V4-Flash-Base": "v4",
    "deepseek-ai/DeepSeek-V4.1-Flash": "v41",
    "zai-org/GLM-5.3-Flash": "glm53",
}


def test_vllm_takes_the_commands_of_the_readme(tmp_path: Path, run_script: Callable[..., Any]) -> None:
    """With made models in the place of the released ones, on two GPUs; those that this vLLM has and can spread so."""
    stub_programs(tmp_path)
    (block,) = re.findall(r"^```bash\nGPUS=8\n(.*?)^```$", (EXAMPLES / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for name, arch in RELEASED.items():
        folder = tmp_path / arch
        folder.mkdir()
        write_weightless(folder, ARCHITECTURES[arch].config(2, 16))
        mark_made(folder)
        assert name in block
        block = block.replace(name, str(folder))
    status, started = bash(tmp_path, "-ec", f"GPUS=2\n{block}")
    commands = [words[1:-1] for words in started if words[:2] == ["vllm", "serve"]]
    assert status == 0 and len(commands) == block.count("examples/serve.sh") == 7
    expected = [
        (2, [2, 1, 1]), (2, [1, 2, 1]), (5, [2, 1, 1]), (5, [2, 1, 2]), (2, [2, 1, 1]), (7, [2, 1, 1]), (2, [2, 1, 1]),
    ]  # fmt: skip
    v32, *_ = support.CACHES.values()
    known = [
        seams.release() >= max(ARCHITECTURES[Path(words[1]).name].since, v32.dcp if spread[2] > 1 else v32.since)
        for words, (_, spread) in zip(commands, expected, strict=True)
    ]
    # vLLM's own choice, where there is a GPU, and so Triton.
    runner = {"VLLM_USE_V2_MODEL_RUNNER": "1"} if seams.release() >= (0, 30) else {}
    parsed = run_script("parse_commands.py", given=json.dumps(list(itertools.compress(commands, known))), **runner)
    found = [(each["k"], each["parallel"]) for each in parsed]
    assert found == list(itertools.compress(expected, known))


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
