# SPDX-License-Identifier: Apache-2.0
"""Builds vLLM's own model classes for a checkpoint on the meta device, as if on an H100, and loads its tensors.

`load_on_meta.py DIR ARCH` prints a JSON line: architecture, tokenizer mode, and for target and draft the parameters that
no tensor filled. A tensor that no parameter wants fails the load. DIR needs config and tokenizer, no weights.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

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
        return 1

    @classmethod
    def log_warnings(cls) -> None:
        pass


class Stream:
    """Stands for the stream of the shared experts."""


def main(directory: str, arch: str) -> None:
    vllm.platforms._current_platform = platform = Hopper()
    torch.cuda.Stream = Stream
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    speculative = speculative_config(SPECULATIVE_TOKENS, ACCEPTANCE_RATES)
    # vLLM before 0.30 does not choose V4's cache by itself.
    cache = "fp8" if arch == "v4" else "auto"
    engine = EngineArgs(model=directory, max_model_len=8192, kv_cache_dtype=cache, speculative_config=speculative)
    config = engine.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{directory}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)

    on_disk = json.loads(Path(directory, "config.json").read_text())
    tensors = [tensor for shard in ARCHITECTURES[arch].shards(on_disk) for tensor in shard]
    platform.device_type = "meta"
    torch.set_default_dtype(torch.bfloat16)
    unfilled = {}
    for role, model_config in ("target", config.model_config), ("draft", config.speculative_config.draft_model_config):
        with torch.device("meta"):
            model = initialize_model(config, model_config=model_config)
        loaded = model.load_weights((t.name, torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta")) for t in tensors)
        unfilled[role] = sorted(dict(model.named_parameters()).keys() - loaded)
    facts = {"architecture": config.model_config.architecture, "tokenizer_mode": config.model_config.tokenizer_mode}
    print(json.dumps({**facts, "unfilled": unfilled}))


if __name__ == "__main__":
    main(*sys.argv[1:])
