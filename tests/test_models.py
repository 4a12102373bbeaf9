# SPDX-License-Identifier: Apache-2.0
"""Servers of the models that share the indexer: GLM-5.2 and 5.3, DeepSeek-V4 and V4.1, Hy4, and V4 with adaptive
verification of its drafts.

Those of the chosen tests alone are started, a model's together: `-k glm-`, `-k "[v4-2] or v4-adaptive"`, `-k v41-5`.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from marking import CAPTURED, FLATTEN, PACK, RAGGED_LOGITS, RAGGED_PLAN, UNPACK
from servers import MODEL, call, completion, start, wait_ready, wanted
from test_serving import CHUNK, comparison, complete, prompt

from vllm_mqa_sm90 import seams, support
from vllm_mqa_sm90.architectures import ARCHITECTURES
from vllm_mqa_sm90.checkpoint import make_checkpoint
from vllm_mqa_sm90.server import Server, speculative_config

START_SECONDS = 900  # TileLang compiles V4's kernels at the first start, one after the other
OF_MODEL = {
    "v4": ("--kv-cache-dtype", "fp8", "--block-size", "256"),
    "glm53": ("--attention-backend", "FLASH_ATTN_MLA_SPARSE"),  # FlashInfer's, where it is installed, is compiled for minutes
}
# Speculative tokens of each model's servers.
MODELS = {"glm": (0, 1, 2, 3), "v4": (0, 1, 2, 3), "v41": (0, 5, 7), "glm53": (0, 2, 3), "hyv4": (0, 2)}
# A made V4.1 answers one token again and again, unless those that were there count for less.
PENALTIES = {"v41": {"repetition_penalty": 4.0, "frequency_penalty": 2.0}}
# Of contexts that are kept whole: V4.1 selects 512.
SHORT = {"v41": (60, 200, 400), "glm53": (65, 700, 1990), "hyv4": (65, 700, 1990)}
*_, KPOOL = support.CACHES
ADAPTIVE, MANY = "v4-adaptive", "v4-many"
# A drafter with its own head, on two of the four layers' outputs; vLLM fills in its weights, and all others.
DSPARK = {
    "dspark_block_size": 3,
    "dspark_markov_rank": 64,
    "dspark_noise_token_id": 3,
    "dspark_target_layer_ids": [1, 3],
    "n_mtp_layers": 1,
}


def serve(scratch: Path, name: str, model: str, *arguments: str, tokens: int = 2048, mode: str = "require") -> Server:
    """`tokens`: of a step."""
    return start(
        scratch,
        name,
        model,
        mode,
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


def serve_model(scratch: Path, name: str, arch: str, k: int, *arguments: str, mode: str = "require") -> Server:
    """Of a model with k speculative tokens, eager, with the comparing worker."""
    if not (scratch / arch).exists():
        make_checkpoint(scratch / arch, arch, experts=16)
        if arch == "v41":
            _narrow_candidates(scratch / arch / "config.json")
    worker = "--worker-extension-cls", "comparing_worker.Extension"
    drafts = speculative_config(k, method=ARCHITECTURES[arch].method)
    speculative = ("--speculative-config", json.dumps(drafts)) if k else ()
    of_model = *ARCHITECTURES[arch].arguments, *OF_MODEL.get(arch, ()), *worker, *speculative
    return serve(scratch, name, arch, "--enforce-eager", *of_model, *arguments, mode=mode)


def arch_of(name: str) -> str:
    """Of a server."""
    return name.split("-")[0]


def serve_named(scratch: Path, name: str) -> Server:
    """As the name says: `glm-2` with two speculative tokens; `v41-5-stock` is vLLM's own."""
    if name in (ADAPTIVE, MANY):
        return serve_dspark(scratch, name)
    arch, k, *side = name.split("-")
    return serve_model(scratch, name, arch, int(k), mode="off" if side else "require")


def _narrow_candidates(file: Path) -> None:
    """So that some are left out: the released model's 2048 blocks of 8 are all keys of these servers' contexts."""
    config = json.loads(file.read_text())
    config["text_config"]["candidate_topk_blocks"] = 96
    file.write_text(json.dumps(config))


def serve_dspark(scratch: Path, name: str) -> Server:
    """Of V4 with a drafter of its own: with few requests and adaptive verification, or with 7 drafts of 128 requests."""
    adaptive = name == ADAPTIVE
    speculative = {"method": "dspark", "num_speculative_tokens": 3 if adaptive else 7, "enable_adaptive_verification": adaptive}
    make_checkpoint(scratch / name, "v4", experts=16)
    config = scratch / name / "config.json"
    drafter = DSPARK | {"dspark_block_size": speculative["num_speculative_tokens"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | drafter))
    graphs = ("--cudagraph-capture-sizes", "4", "8", "16", "32") if adaptive else ("--max-num-seqs", "128")
    return serve(
        scratch,
        name,
        name,
        "--load-format", "dummy",
        *graphs,
        # TileLang takes ten seconds for each of its kernels, and the warm-up has it compile dozens.
        "--kernel-config", json.dumps({"enable_jit_warmup": False}),
        "--worker-extension-cls", "marking_worker.Extension",
        "--speculative-config", json.dumps(speculative),
        *OF_MODEL["v4"],
        # Most steps of prefills have as many then, and kernels are compiled for how many.
        tokens=CHUNK if adaptive else 2048,
    )  # fmt: skip


def lacking(name: str) -> bool:
    """Whether the installed vLLM lacks the model or its drafter, or keeps its own path for it."""
    if name in (ADAPTIVE, MANY):  # before, the indexer refuses both on Hopper
        return seams.release() < (0, 29)
    arch = arch_of(name)
    taken = support.CACHES[KPOOL].since if arch == "glm53" else seams.OLDEST
    return seams.release() < max(ARCHITECTURES[arch].since, taken)


def skip_before(name: str) -> None:
    if lacking(name):
        pytest.skip("this vLLM has no such model or drafter, or keeps its own path for it")


class Servers:
    """Servers by name, of one model at a time: all models' have no room on a GPU. Each test waits for its own."""

    def __init__(self, scratch: Path, names: Sequence[str], stack: contextlib.ExitStack) -> None:
        self._scratch, self._names, self._stack = scratch, names, stack
        self._running: dict[str, Server] = {}

    def __getitem__(self, name: str) -> Server:
        if name not in self._running:
            self._stack.close()
            of_model = [each for each in self._names if arch_of(each) == arch_of(name)]
            self._running = {each: self._stack.enter_context(serve_named(self._scratch, each)) for each in of_model}
        return self._running[name]


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    torch.cuda.empty_cache()  # what tests before this file's left
    names = [name for name in (*wanted(request, "name"), *wanted(request, "stock")) if not lacking(name)]
    with tempfile.TemporaryDirectory(prefix="mqa-sm90-") as folder, contextlib.ExitStack() as stack:
        yield Servers(Path(folder), names, stack)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [f"{arch}-{k}" for arch, ks in MODELS.items() for k in ks])
def test_logits_in_a_server_are_those_of_deepgemm(servers: Servers, name: str) -> None:
    """Of uniform and of ragged steps, and the selection from them is torch.topk's. V4's eager steps skip the indexer up to
    2048 tokens: all are kept."""
    skip_before(name)
    server, next_n = servers[name], int(name[-1]) + 1
    wait_ready([server], START_SECONDS)
    print(name, set(re.findall(r"Using .* backend", server.log.read_text())))  # whose attention follows
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
@pytest.mark.parametrize(("name", "stock"), [(f"{arch}-{k}", f"{arch}-{k}-stock") for arch in SHORT for k in MODELS[arch][:2]])
def test_tokens_are_those_of_stock_vllm(servers: Servers, name: str, stock: str) -> None:
    """Contexts that the indexer keeps whole."""
    skip_before(name)
    pair, penalties = (servers[name], servers[stock]), PENALTIES.get(arch_of(name), {})
    wait_ready(pair, START_SECONDS)
    assert not call(pair[1], "mqa_sm90_report")["taken_over"]
    for length in SHORT[arch_of(name)]:
        with ThreadPoolExecutor(2) as pool:
            (plugin,), (theirs,) = pool.map(lambda server: complete(server, prompt(length), 40, **penalties), pair)
        assert plugin == theirs
        assert len(set(theirs)) > 1, "one token, repeated, proves nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [ADAPTIVE])
def test_adaptive_verification_runs_on_ragged_plans(servers: Servers, name: str) -> None:
    skip_before(name)
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


@pytest.mark.gpu
@pytest.mark.parametrize("name", [MANY])
def test_seven_drafts_of_many_requests_are_captured_and_served(servers: Servers, name: str) -> None:
    """Whose captures have requests of one token, none of which is a compressed one."""
    skip_before(name)
    server = servers[name]
    wait_ready([server], START_SECONDS)
    before = call(server, "mqa_sm90_report")
    assert before["taken_over"] and before["num_speculative_tokens"] == 7
    lengths = 1, 3, 200, 2100, 3000
    answers = complete(server, [prompt(length) for length in lengths], 40)
    assert [len(answer) for answer in answers] == [40] * len(lengths)
    assert call(server, "mqa_sm90_report")["launches"]["8"] > before["launches"]["8"]
