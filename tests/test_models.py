# SPDX-License-Identifier: Apache-2.0
"""Servers of the models that share the indexer: GLM-5.2, DeepSeek-V4, and V4 with adaptive verification of its drafts.

Those of the chosen tests alone are started, together: `-k glm`, `-k "v4-2 or v4-adaptive"`.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from marking import CAPTURED, FLATTEN, PACK, RAGGED_LOGITS, RAGGED_PLAN, UNPACK
from servers import MODEL, call, completion, start, wait_ready, wanted
from test_serving import CHUNK, comparison, complete, prompt

from vllm_mqa_sm90 import seams
from vllm_mqa_sm90.checkpoint import make_checkpoint
from vllm_mqa_sm90.server import Server, speculative_config

START_SECONDS = 500  # V4's kernels are compiled at the first start
V4 = ("--kv-cache-dtype", "fp8", "--block-size", "256")
MODELS = {"glm": (), "v4": V4}
KS = (0, 1, 2, 3)  # speculative tokens
ADAPTIVE = "v4-adaptive"
# A drafter with its own head, on two of the four layers' outputs; vLLM fills in its weights, and all others.
DSPARK = {
    "dspark_block_size": 3,
    "dspark_markov_rank": 64,
    "dspark_noise_token_id": 3,
    "dspark_target_layer_ids": [1, 3],
    "n_mtp_layers": 1,
}


def serve(scratch: Path, name: str, model: str, *arguments: str, tokens: int = 2048) -> Server:
    """`tokens`: of a step."""
    return start(
        scratch,
        name,
        model,
        "require",
        "--served-model-name", MODEL,
        "--max-model-len", "16384",
        "--max-num-seqs", "8",
        "--max-num-batched-tokens", str(tokens),
        "--long-prefill-token-threshold", str(CHUNK),
        "--no-enable-prefix-caching",
        "--gpu-memory-utilization", "0.05",
        "--kv-cache-memory-bytes", str(2 << 30),
        *arguments,
    )  # fmt: skip


def serve_model(scratch: Path, name: str) -> Server:
    """Of a model and with so many speculative tokens as the name says: `glm-2`."""
    arch, k = name.split("-")
    if not (scratch / arch).exists():
        make_checkpoint(scratch / arch, arch, experts=16)
    worker = "--worker-extension-cls", "comparing_worker.Extension"
    speculative = ("--speculative-config", json.dumps(speculative_config(int(k)))) if k != "0" else ()
    return serve(scratch, name, arch, "--enforce-eager", *worker, *speculative, *MODELS[arch])


def serve_adaptive(scratch: Path) -> Server:
    make_checkpoint(scratch / ADAPTIVE, "v4", experts=16)
    config = scratch / ADAPTIVE / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | DSPARK))
    speculative = {"method": "dspark", "num_speculative_tokens": 3, "enable_adaptive_verification": True}
    return serve(
        scratch,
        ADAPTIVE,
        ADAPTIVE,
        "--load-format", "dummy",
        "--cudagraph-capture-sizes", "4", "8", "16", "32",
        # TileLang takes ten seconds for each of its kernels, and the warm-up has it compile dozens.
        "--kernel-config", json.dumps({"enable_jit_warmup": False}),
        "--worker-extension-cls", "marking_worker.Extension",
        "--speculative-config", json.dumps(speculative),
        *V4,
        # Most steps of prefills have as many then, and kernels are compiled for how many.
        tokens=CHUNK,
    )  # fmt: skip


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest) -> Iterator[dict[str, Server]]:
    """Those that the chosen tests ask, started together; each test waits for its own."""
    torch.cuda.empty_cache()  # what tests before this file's left
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mqa-sm90-")))
        running = {}
        for name in wanted(request, "name"):
            server = serve_adaptive(scratch) if name == ADAPTIVE else serve_model(scratch, name)
            running[name] = stack.enter_context(server)
        yield running


@pytest.mark.gpu
@pytest.mark.parametrize("name", [f"{arch}-{k}" for arch in MODELS for k in KS])
def test_logits_in_a_server_are_those_of_deepgemm(servers: dict[str, Server], name: str) -> None:
    """Of uniform and of ragged steps, and the selection from them is torch.topk's. V4's eager steps skip the indexer up to
    2048 tokens: all are kept."""
    server, next_n = servers[name], int(name[-1]) + 1
    wait_ready([server], START_SECONDS)
    call(server, "mqa_sm90_start_comparing")
    before = call(server, "mqa_sm90_report")
    assert before["taken_over"]
    for length in 200, 3000, 12000:
        complete(server, prompt(length), 24)
    decoding = server.stream("/v1/completions", completion(prompt(3000), 80))
    next(decoding)
    complete(server, [prompt(6 * CHUNK + 1), prompt(6 * CHUNK + 2)], 8)
    assert sum(1 for _ in decoding) > 0
    assert call(server, "mqa_sm90_report")["launches"][str(next_n)] > before["launches"][str(next_n)]
    found = comparison(server)
    rows = {key: each["rows"] for key, each in found["agreements"].items()}
    assert sum(count for key, count in rows.items() if key.startswith(f"{next_n}/")) > 100
    if next_n > 1:  # without drafts all requests bring one token
        assert found["ragged"] > 0
        assert sum(count for key, count in rows.items() if key.startswith("ragged/")) > 0
    if seams.hands_over_topk():
        assert found["selections"][str(next_n)]["chosen"] > 100


@pytest.mark.gpu
@pytest.mark.skipif(seams.release() < (0, 29), reason="vLLM's indexer refuses adaptive verification on Hopper")
@pytest.mark.parametrize("name", [ADAPTIVE])
def test_adaptive_verification_runs_on_ragged_plans(servers: dict[str, Server], name: str) -> None:
    server = servers[name]
    wait_ready([server], START_SECONDS)
    before = json.loads(call(server, "mqa_sm90_marks"))
    assert before.get(CAPTURED + RAGGED_LOGITS, 0) > 0
    with ThreadPoolExecutor(6) as pool:
        lengths = 2100, 2200, 2500, 3000, 2400, 2800
        answers = list(pool.map(lambda length: complete(server, prompt(length), 40)[0], lengths))
    assert [len(answer) for answer in answers] == [40] * len(lengths)
    marks = json.loads(call(server, "mqa_sm90_marks"))
    assert marks[RAGGED_PLAN] > before.get(RAGGED_PLAN, 0)
    assert not any(marks.get(prefix + mark, 0) for mark in (PACK, UNPACK, FLATTEN) for prefix in ("", CAPTURED))
    assert call(server, "mqa_sm90_report")["launches"]["4"] > 0
