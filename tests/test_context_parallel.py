# SPDX-License-Identifier: Apache-2.0
"""Servers on two GPUs with --decode-context-parallel-size 2: each rank scores, and selects from, the tokens that it has.

Named `model-drafts-interleave`; those of the chosen tests alone are started, each side's together: `-k v32-2-1`.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from servers import call_all, completion, wait_ready, wanted
from test_models import START_SECONDS, serve_model
from test_serving import MODES, agreeing, complete, prompt

from vllm_mqa_sm90 import seams
from vllm_mqa_sm90.server import Server

NAMES = "v32-0-1", "v32-0-64", "v32-2-1", "v32-2-64", "glm-2-1"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(seams.release() < (0, 29), reason="FlashMLA's sparse attention cannot"),
]


def serve(scratch: Path, name: str, side: str) -> Server:
    arch, drafts, interleave = name.split("-")
    # Of an argument that is given twice vLLM takes the last. FlashMLA's sparse attention wants an FP8 cache to be spread. Without
    # the other: with turns of more than one token vLLM verifies drafts of short contexts with more tokens than these have.
    others = "--max-model-len", "32768", "--kv-cache-dtype", "fp8", "--attention-config", '{"sparse_mla_force_mqa": true}'
    spread = "--tensor-parallel-size", "2", "--decode-context-parallel-size", "2", "--cp-kv-cache-interleave-size", interleave
    return serve_model(scratch, f"{name}-{side}", arch, int(drafts), *spread, *others, mode=MODES[side])


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Server]]:
    torch.cuda.empty_cache()  # what tests before this file's left
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mqa-sm90-")))
        running = {}
        for name in wanted(request, "name"):
            for side in MODES:
                running[name, side] = stack.enter_context(serve(scratch, name, side))
        wait_ready(running.values(), START_SECONDS)
        for server in running.values():
            call_all(server, "mqa_sm90_order_merged")
        yield running


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_stock_vllm(servers: dict[tuple[str, str], Server], name: str) -> None:
    """With the same parallelism; contexts that the indexer keeps whole, from one token on."""
    assert not any(worker["taken_over"] for worker in call_all(servers[name, "stock"], "mqa_sm90_report"))
    pair, answers = [servers[name, side] for side in MODES], []
    for length in 1, 65, 700, 1990:
        with ThreadPoolExecutor(2) as pool:
            (plugin,), (stock,) = pool.map(lambda server: complete(server, prompt(length), 40), pair)
        assert plugin == stock
        answers.append(stock)
    # After some prompts a made model repeats itself.
    assert any(len(set(answer)) > 1 for answer in answers), "one token, repeated, proves nothing"


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_scores_and_selects_as_deepgemm_and_torch_would(servers: dict[tuple[str, str], Server], name: str) -> None:
    """Lengths from 1 to 30,000 tokens in one batch, so that a rank has no token of some requests; ragged steps."""
    server, drafts = servers[name, "plugin"], int(name.split("-")[1])
    before = call_all(server, "mqa_sm90_report")
    assert len(before) == 2 and all(worker["taken_over"] for worker in before)
    call_all(server, "mqa_sm90_start_comparing")
    lengths = 1, 2, 40, 300, 3000, 12000, 30000  # the 2 are a step's unequal tokens
    decoding = server.stream("/v1/completions", completion(prompt(5000), 100))
    next(decoding)
    answers = complete(server, [prompt(length) for length in lengths], 24)
    assert [len(answer) for answer in answers] == [24] * len(lengths)
    assert sum(1 for _ in decoding) > 0
    for worker, earlier in zip(call_all(server, "mqa_sm90_report"), before, strict=True):
        assert worker["launches"][str(drafts + 1)] > earlier["launches"][str(drafts + 1)]
    for worker in call_all(server, "mqa_sm90_comparison"):
        found = agreeing(worker)
        rows = {key: each["rows"] for key, each in found["agreements"].items()}
        # All rows have logits, as the ranks' merge reads those that are chosen.
        assert rows[f"{drafts + 1}/above"] > 100 and rows[f"{drafts + 1}/below"] > 100
        if drafts:
            assert found["ragged"] > 0 and sum(count for key, count in rows.items() if key.startswith("ragged/")) > 0
        if seams.hands_over_topk():
            assert found["selections"][str(drafts + 1)]["chosen"] > 100
