# SPDX-License-Identifier: Apache-2.0
"""One server under a mixed load for as long as --load says. `pytest -s` prints what was counted meanwhile."""

import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import mixed_load
import pytest
import torch
from servers import call, start, wait_ready
from test_serving import START_SECONDS

from vllm_mqa_sm90 import metrics
from vllm_mqa_sm90.checkpoint import make_checkpoint
from vllm_mqa_sm90.server import Server, speculative_config

# Bytes, from a third of the time on. Of the worker's resident memory: logs, statistics. Of the GPU's: PyTorch's cache grows
# whenever a step is larger than all before it, which steps of random requests may be at any time.
MOST_GROWTH = 64 << 20
ARGUMENTS = (
    *mixed_load.ARGUMENTS,
    "--speculative-config", json.dumps(speculative_config(2)),
    "--gpu-memory-utilization", "0.05",
    "--kv-cache-memory-bytes", str(1 << 30),
    "--worker-extension-cls", "memory_worker.Extension",
)  # fmt: skip
COUNTERS = {"requests": "request_success", "tokens": "generation_tokens", "preempted": "num_preemptions"}


def read(server: Server) -> dict[str, Any]:
    text = server.get("/metrics")
    counted = {name: int(metrics.total(text, f"vllm:{metric}")) for name, metric in COUNTERS.items()}
    launches = call(server, "mqa_sm90_report")["launches"]
    return counted | call(server, "mqa_sm90_memory") | {"launches": sum(launches.values())}


@pytest.mark.gpu
def test_nothing_grows_under_a_mixed_load(pytestconfig: pytest.Config) -> None:
    torch.cuda.empty_cache()  # what tests before this file's left
    seconds, readings, requests, tokens = pytestconfig.getoption("--load"), [], 0, 0
    with tempfile.TemporaryDirectory(prefix="mqa-sm90-") as folder:
        make_checkpoint(Path(folder) / "model", experts=16)
        with start(Path(folder), "long", "model", "require", *ARGUMENTS) as server:
            wait_ready([server], START_SECONDS)
            begin = time.monotonic()
            for seed in itertools.count():
                load = mixed_load.requests(seed)
                answers = mixed_load.send(server, load)
                assert [len(answer) for answer in answers] == [request.tokens for request in load]
                requests, tokens = requests + len(load), tokens + sum(map(len, answers))
                readings.append({"seconds": round(time.monotonic() - begin)} | read(server))
                print(readings[-1], flush=True)
                assert (readings[-1]["requests"], readings[-1]["tokens"]) == (requests, tokens)
                if readings[-1]["seconds"] >= seconds and len(readings) >= 3:
                    break
            log = (Path(folder) / "long.log").read_text()
    # vLLM warns, with a traceback, of packages beside it that it cannot import.
    assert not [line for line in log.splitlines() if " ERROR " in line or ("Traceback" in line and " WARNING " not in line)]
    for before, after in itertools.pairwise(readings):
        assert after["launches"] > before["launches"]
    assert readings[-1]["preempted"] > 0
    settled = next(reading for reading in readings if reading["seconds"] >= readings[-1]["seconds"] / 3)
    for memory in "reserved", "resident":
        assert readings[-1][memory] - settled[memory] <= MOST_GROWTH, memory
