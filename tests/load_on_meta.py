# SPDX-License-Identifier: Apache-2.0
"""Builds vLLM's own model classes for a checkpoint on the meta device, as if on an H100, and loads its tensors.

`load_on_meta.py DIR ARCH` prints a JSON line: architecture, tokenizer mode, and for target and draft the parameters
that no tensor filled, apart from what a drafter takes from the target. A tensor that no parameter wants fails the load.
DIR needs config and tokenizer, no weights.
"""

import json
import logging
import os
import sys
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # asks a driver

import torch
import vllm.platforms
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability

from vllm_mqa_sm90.architectures import ARCHITECTURES
from vllm_mqa_sm90.checkpoint import ACCEPTANCE_RATES
from vllm_mqa_sm90.demo import SPECULATIVE_TOKENS
from vllm_mqa_sm90.server import speculative_config


class Hopper(NonNvmlCudaPlatform):
    """vLLM's CUDA platform with an H100's answers instead of a driver's."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30

    @classmethod
    def device_count(cls) -> int:
        return 8

    @classmethod
    def log_warnings(cls) -> None:
        pass


class Unwanted(logging.Handler):
    """Fails where a model says that it passes over a tensor, and goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Skipping unknown"):
            raise ValueError(record.getMessage())


class Stream:
    """Stands for the stream of the shared experts."""


def main(directory: str, arch: str) -> None:
    vllm.platforms._current_platform = platform = Hopper()
    torch.cuda.Stream = Stream
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.worker.workspace import init_workspace_manager

    architecture = ARCHITECTURES[arch]
    if architecture.method == "dspark":
        # The runner that has it, which vLLM would choose were there a driver.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    arguments = [directory, "--max-model-len", "8192", *architecture.arguments]
    # vLLM before 0.30 does not choose V4's cache by itself.
    arguments += ["--kv-cache-dtype", "fp8"] if arch == "v4" else []
    speculative = speculative_config(SPECULATIVE_TOKENS, ACCEPTANCE_RATES, architecture.method)
    arguments += ["--speculative-config", json.dumps(speculative)]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    config = EngineArgs.from_cli_args(parser.parse_args(["--model", *arguments])).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{directory}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)

    on_disk = json.loads(Path(directory, "config.json").read_text())
    tensors = [tensor for shard in architecture.shards(on_disk) for tensor in shard]
    platform.device_type = "meta"
    init_workspace_manager(torch.device("meta"))
    torch.set_default_dtype(torch.bfloat16)
    logging.getLogger("vllm").addHandler(Unwanted())
    unfilled = {}
    for role, model_config in ("target", config.model_config), ("draft", config.speculative_config.draft_model_config):
        with torch.device("meta"):
            model = initialize_model(config, model_config=model_config)
        loaded = model.load_weights((t.name, torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta")) for t in tensors)
        owned = {"embed_tokens.weight": "has_own_embed_tokens", "lm_head.weight": "has_own_lm_head"}
        borrowed = tuple(name for name, owns in owned.items() if not getattr(model, owns, True))
        names = dict(model.named_parameters()).keys() - loaded
        unfilled[role] = sorted(name for name in names if not name.endswith(borrowed))
    facts = {"architecture": config.model_config.architecture, "tokenizer_mode": config.model_config.tokenizer_mode}
    print(json.dumps({**facts, "unfilled": unfilled}))


if __name__ == "__main__":
    main(*sys.argv[1:])
