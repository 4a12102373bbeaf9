# SPDX-License-Identifier: Apache-2.0
"""Servers on two GPUs with --tensor-parallel-size 2: the plugin is in both workers. `pytest -s` prints what TP=1 answers."""

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from servers import call_all, wait_ready
from test_serving import START_SECONDS, agreeing, complete, prompt, serve

from vllm_mqa_sm90.checkpoint import make_checkpoint
from vllm_mqa_sm90.server import Server

K = 2
SIDES = {"plugin": "require", "stock": "off"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[tuple[str, int], Server]]:
    """Of each side, with one GPU and with two, all started together."""
    torch.cuda.empty_cache()  # what tests before this file's left
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mqa-sm90-")))
        make_checkpoint(scratch / "model")
        running = {}
        for side, mode in SIDES.items():
            for gpus in (1, 2):
                arguments = "--enforce-eager", "--tensor-parallel-size", str(gpus)
                running[side, gpus] = stack.enter_context(serve(scratch, f"{side}-tp{gpus}", K, mode, *arguments))
        wait_ready(running.values(), START_SECONDS)
        yield running


def test_every_worker_decodes_natively_and_agrees_with_deepgemm(servers: dict[tuple[str, int], Server]) -> None:
    server = servers["plugin", 2]
    call_all(server, "mqa_sm90_start_comparing")
    before = call_all(server, "mqa_sm90_report")
    assert len(before) == 2 and all(worker["taken_over"] for worker in before)
    for length in 200, 3000, 12000:
        complete(server, prompt(length), 24)
    for worker, earlier in zip(call_all(server, "mqa_sm90_report"), before, strict=True):
        assert worker["launches"]["3"] > earlier["launches"]["3"]
    for worker in call_all(server, "mqa_sm90_comparison"):
        assert agreeing(worker)["agreements"]["3/above"]["rows"] > 100


@pytest.mark.parametrize("length", [200, 1500, 1990])
def test_tokens_are_those_of_stock_vllm(servers: dict[tuple[str, int], Server], length: int) -> None:
    """On as many GPUs. Between one and two, bf16 sums differ in their last bits, and so may tokens."""
    found = {at: complete(server, prompt(length), 40)[0] for at, server in servers.items()}
    for gpus in (1, 2):
        assert found["plugin", gpus] == found["stock", gpus]
    assert len(set(found["stock", 2])) > 1, "one token, repeated, proves nothing"
    pairs = zip(found["plugin", 1], found["plugin", 2], strict=True)
    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    print(f"\n{length} tokens: TP=2 answers the first {equal} of 40 tokens as TP=1 does")
