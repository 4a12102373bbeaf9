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

_CALLS, _REHEARSALS = 400, 20


def on_gpu(step: Any) -> Any:
    for name in "query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping":
        setattr(step, name, getattr(step, name).cuda())
    return step


def call_us(call: Callable[[], object]) -> float:
    """Microseconds until the call returns. The GPU has nothing else to do then."""
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def build_us(sides: tuple[dict[str, Any], dict[str, Any]], requests: int, tokens: int, ragged: bool) -> list[float]:
    """Medians of `build()`, vLLM's and ours, each with the functions in place that its server has: `sides`."""
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

    builders, times = (stock_builder, builder), ([], [])
    for turn in range(_REHEARSALS + _CALLS):
        for side in (0, 1) if turn % 2 else (1, 0):
            seams.replace(sides[side])
            times[side].append(call_us(lambda which=builders[side]: which.build(0, step)))
    seams.replace(sides[1])
    return [statistics.median(of_side[_REHEARSALS:]) for of_side in times]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def test_build_is_as_fast_as_vllms() -> None:
    stock_names = {path: stored(path) for path in REPLACED}
    plugin.register()
    assert backend.outcome["installed"], backend.outcome["reason"]
    sides = stock_names, {path: stored(path) for path in REPLACED}
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
                stock, ours = build_us(sides, requests, tokens, ragged)
                cells.append(f"{stock:.1f} / {ours:.1f} ({ours - stock:+.1f})")
                if ours - stock > MOST_US:
                    slower[requests, tokens, ragged] = (stock, ours)
            print(f"| {requests} | " + " | ".join(cells) + " |")
    assert not slower
