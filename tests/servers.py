# SPDX-License-Identifier: Apache-2.0
"""Servers of the installed vLLM for GPU tests: how they are started, and what is asked of them."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vllm_mqa_sm90.server import Server, environment, free_port, vllm_serve

MODEL = "small"
REQUEST_SECONDS = 600  # kernels of some models are compiled when a step first needs them


def environment_of(scratch: Path, mode: str) -> dict[str, str]:
    """Of engines with `MQA_SM90=mode`, whose workers find what is in this folder."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return environment(
        scratch,
        MQA_SM90=mode,
        PYTHONPATH=path,
        VLLM_SERVER_DEV_MODE="1",
        # Of hundreds of kernels that DeepGEMM would compile at the start, a test needs a few; FlashInfer's takes minutes.
        VLLM_DEEP_GEMM_WARMUP="skip",
        VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER="0",
        # What FlashInfer chooses by itself wants NVLink multicast, which not every host of several GPUs lets one have.
        VLLM_FLASHINFER_ALLREDUCE_BACKEND="trtllm",
    )


def start(scratch: Path, name: str, model: str, mode: str, *arguments: str, timeout: float = REQUEST_SECONDS) -> Server:
    """A server of `scratch`/`model`; `timeout`: seconds without a word after which a request fails."""
    port = free_port()
    command, env = vllm_serve(scratch / model, port, *arguments), environment_of(scratch, mode)
    return Server(command, port, scratch / f"{name}.log", env, grace=0, timeout=timeout)


def wait_ready(running: Iterable[Server], seconds: float) -> None:
    """For all of them; started together, as a start is mostly the CPU's work."""
    running = list(running)
    with ThreadPoolExecutor(len(running)) as pool:
        list(pool.map(lambda server: server.wait_ready(seconds, lambda *_: None), running))


def wanted(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter that the chosen tests of this file have which use the fixture: what it need make."""
    using = (item for item in request.session.items if item.path == request.path and request.fixturename in item.fixturenames)
    params = (item.callspec.params for item in using if hasattr(item, "callspec"))
    return list(dict.fromkeys(of_test[parameter] for of_test in params if parameter in of_test))


def call_all(server: Server, method: str) -> list[Any]:
    """What the workers answer."""
    return server.post("/collective_rpc", {"method": method})["results"]


def call(server: Server, method: str) -> Any:
    """What the first worker answers."""
    return call_all(server, method)[0]


def completion(prompts: Any, tokens: int) -> dict[str, Any]:
    """The body of a request: greedy, and as long as it says."""
    options = {"model": MODEL, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {**options, "prompt": prompts, "max_tokens": tokens}
