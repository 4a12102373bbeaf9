# SPDX-License-Identifier: Apache-2.0
"""Host time of a step's metadata: our builder beside vLLM's, the two alternating in one process.

`pytest -s -m gpu tests/test_build_time.py` shows the table.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plugin import REPLACED, add_cache, clean, construct, make_config, make_spec, make_step, stored

from vllm_mqa_sm90 import backend, plugin, seams

__all__ = ["clean"]  # the fixture that puts vLLM back

pytestmark = pytest.mark.gpu

REQUESTS = (1, 64, 256, 512)
TOKENS = (0, 1, 2, 3)
MOST_US = 10.0
"""What our builder may take more than vLLM's."""

_TURNS, _CALLS = 12, 25


def on_gpu(step: Any) -> Any:
    for name in "query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping":
        setattr(step, name, getattr(step, name).cuda())
    return step


def call_us(call: Callable[[], object]) -> list[float]:
    """Microseconds until the call returns, of each of a few: the GPU has nothing else to do then."""
    times = []
    for _ in range(_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    torch.cuda.synchronize()
    return times


def build_us(requests: int, tokens: int, ragged: bool) -> tuple[float, float]:
    """Median of `build()`, vLLM's and ours, each with the functions in place that its server has."""
    ours = {path: stored(path) for path in REPLACED}
    config = make_config(tokens)
    config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs = 8192, 512
    layer = add_cache(config)
    config.compilation_config.static_forward_context[layer].kv_cache = torch.zeros(2, 64, 132, dtype=torch.uint8).cuda()
    device = torch.device("cuda", 0)
    builder = construct(seams.resolve(seams.BUILDER_OF_BACKEND)(), config, make_spec(), layer, device)
    assert builder.refusal is None
    stock_builder = construct(seams.resolve(seams.STOCK_BUILDER), config, make_spec(), layer, device)
    query = [tokens + 1] * requests
    if ragged:
        query[0] = 1
    step = on_gpu(make_step([3000] * requests, query))
    step.block_table_tensor = step.block_table_tensor[:, : stock_builder.expanded_block_table_buffer.shape[1]]

    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for turn in range(_TURNS + 1):
        for side, names, which in ("stock", STOCK, stock_builder), ("ours", ours, builder):
            seams.replace(names)
            given = call_us(lambda which=which: which.build(0, step))
            if turn:  # the first compiles and warms up
                times[side] += given
    seams.replace(ours)
    return statistics.median(times["stock"]), statistics.median(times["ours"])


STOCK = {path: stored(path) for path in REPLACED if seams.resolve(path)}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def test_build_is_as_fast_as_vllms() -> None:
    plugin.register()
    assert backend.outcome["installed"], backend.outcome["reason"]
    print(f"\nbuild() in us, vLLM {seams.vllm_version()} / ours, {cpu_name()}, {torch.cuda.get_device_name()}")
    slower = {}
    for ragged in False, True:
        print("| requests | " + " | ".join(f"k={tokens}{', one row less' if ragged else ''}" for tokens in TOKENS) + " |")
        for requests in REQUESTS:
            cells = []
            for tokens in TOKENS:
                if ragged and (tokens == 0 or requests == 1):
                    cells.append("-")
                    continue
                stock, ours = build_us(requests, tokens, ragged)
                cells.append(f"{stock:.1f} / {ours:.1f} ({ours - stock:+.1f})")
                if ours - stock > MOST_US:
                    slower[requests, tokens, ragged] = (stock, ours)
            print(f"| {requests} | " + " | ".join(cells) + " |")
    assert not slower
