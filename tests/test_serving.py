# SPDX-License-Identifier: Apache-2.0
"""Servers of the installed vLLM, with the plugin and without: what they answer, and whose kernel they ran.

Without a GPU: only that what compares the logits inside the servers notices differences.
"""

import contextlib
import functools
import json
import math
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comparing_worker
import pytest
import steps
import torch
from comparing_worker import TOP_K, Agreement
from servers import MODEL, call, completion, start, wait_ready, wanted
from vllm.utils import deep_gemm

from vllm_mqa_sm90 import ops, reference, seams, wrappers
from vllm_mqa_sm90.checkpoint import make_checkpoint
from vllm_mqa_sm90.server import Server, speculative_config

KS = (0, 1, 2, 3, 5, 9)  # speculative tokens; with five, two consumers share a group; with nine, a request has two
MODES = {"plugin": "require", "stock": "off"}
CHUNK = 512  # tokens of a prompt in one step, where there are other requests
START_SECONDS = 600  # up to fourteen at once
TOLERANCE = 1e-6


def serve(scratch: Path, name: str, k: int, mode: str, *arguments: str) -> Server:
    """A server with `k` speculative tokens, taken from the greedy drafts of the model's own MTP layer; of more than a group
    has rows, from what followed the last token before."""
    if k:
        ngram = {"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
        arguments += "--speculative-config", json.dumps(speculative_config(k) if k < ops.MAX_NEXT_N else ngram)
    return start(
        scratch,
        name,
        "model",
        mode,
        "--served-model-name", MODEL,
        # 257 pages with the plugin: stock flattening may fail at an odd number of them, and has 256.
        "--max-model-len", "16384" if mode == "off" else "16416",
        "--max-num-seqs", "8",
        "--max-num-batched-tokens", "2048",
        "--long-prefill-token-threshold", str(CHUNK),
        "--no-enable-prefix-caching",
        # Several servers share the GPU: none may take a part of it, or measure what others leave.
        "--gpu-memory-utilization", "0.02",
        "--kv-cache-memory-bytes", str(1 << 30),
        "--worker-extension-cls", "comparing_worker.Extension",
        *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest) -> Iterator[dict[str, Server]]:
    """Those that the chosen tests ask, started together: plugin-k, stock-k, and k=2 with CUDA graphs."""
    names = [*wanted(request, "name"), *(f"{kind}-{k}" for k in wanted(request, "k") for kind in MODES)]
    torch.cuda.empty_cache()  # what tests before this file's left
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mqa-sm90-")))
        make_checkpoint(scratch / "model", experts=16)  # with more, not all servers have room at once
        running = {}
        for name in dict.fromkeys(names):
            kind, k = name.split("-")
            eager = () if kind == "graphs" else ("--enforce-eager",)
            running[name] = stack.enter_context(serve(scratch, name, int(k), MODES.get(kind, "require"), *eager))
        wait_ready(running.values(), START_SECONDS)
        yield running


def complete(server: Server, prompts: Any, tokens: int, **options: Any) -> list[list[int]]:
    """The greedy tokens after each prompt; `options`: more of the request's body."""
    return [choice["token_ids"] for choice in server.post("/v1/completions", completion(prompts, tokens) | options)["choices"]]


def prompt(length: int) -> list[int]:
    """Ordinary tokens of every made checkpoint."""
    return torch.randint(300, 15000, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*(f"plugin-{k}" for k in KS), "graphs-2", "graphs-9"])
def test_decodes_natively(servers: dict[str, Server], name: str) -> None:
    server, k = servers[name], int(name[-1])
    before = call(server, "mqa_sm90_report")
    assert before["taken_over"] and before["num_speculative_tokens"] == k
    assert before["topk"] == (TOP_K if seams.hands_over_topk() else 0)
    assert len(before["layers"]) == (5 if 0 < k < ops.MAX_NEXT_N else 4)  # with the MTP layer
    (tokens,) = complete(server, "Native decoding on Hopper:", 24)
    assert len(tokens) == 24
    launches = {n: count - before["launches"][n] for n, count in call(server, "mqa_sm90_report")["launches"].items()}
    # Each step brings 1 to k + 1 tokens, in four layers at least.
    assert launches[str(min(k + 1, ops.MAX_NEXT_N))] >= 4 * (23 // (k + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [200, 1500, 1990])
@pytest.mark.parametrize("k", KS)
def test_tokens_are_those_of_stock_vllm(servers: dict[str, Server], k: int, length: int) -> None:
    """Contexts that the indexer keeps whole, one request at a time.

    Above `TOP_K` stock vLLM does not repeat its own tokens: its top k comes in an order that varies
    from run to run, and the attention sums in that order. There the logits must agree.
    """
    pair = servers[f"stock-{k}"], servers[f"plugin-{k}"]
    assert not call(pair[0], "mqa_sm90_report")["taken_over"]
    with ThreadPoolExecutor(2) as pool:
        (stock,), (plugin,) = pool.map(lambda server: complete(server, prompt(length), 40), pair)
    assert length + len(stock) + k < TOP_K
    assert plugin == stock
    assert len(set(stock)) > 1, "one token, repeated, proves nothing"


def comparison(server: Server) -> dict[str, Any]:
    """What the server found so far."""
    return agreeing(call(server, "mqa_sm90_comparison"))


def agreeing(text: str) -> dict[str, Any]:
    """What a worker found: nothing but DeepGEMM's logits, and of these, where ours selects, torch.topk's."""
    found = json.loads(text)
    for kind, rows in found["agreements"].items():
        assert rows["difference"] <= TOLERANCE and rows["gap"] <= TOLERANCE, kind
    for rows in found["selections"].values():
        assert rows["different"] == rows["stock"] == 0
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", [f"plugin-{k}" for k in KS])
def test_logits_in_a_server_are_those_of_deepgemm(servers: dict[str, Server], name: str) -> None:
    """And the selection from them is torch.topk's, in each layer and step."""
    server, next_n = servers[name], int(name[-1]) + 1
    kind, of_op = (str(next_n), next_n) if next_n <= ops.MAX_NEXT_N else ("ragged", 1)
    call(server, "mqa_sm90_start_comparing")
    for length in 200, 1500, 2040, 3000, 12000:
        complete(server, prompt(length), 24)
    found = comparison(server)
    assert found["agreements"][f"{kind}/above"]["rows"] > 100
    if seams.hands_over_topk():  # of contexts that are kept whole there are no logits
        selected = found["selections"][str(of_op)]
        assert selected["chosen"] > 100 and selected["rows"] - selected["chosen"] > 100
    else:
        assert found["agreements"][f"{kind}/below"]["rows"] > 100 and not found["selections"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plugin-2"])
def test_requests_of_unequal_query_length_meet_in_a_step(servers: dict[str, Server], name: str) -> None:
    """A request decodes with 3 query tokens; the last 1 and 2 tokens of two others' prompts join it."""
    server = servers[name]
    call(server, "mqa_sm90_start_comparing")
    before = json.loads(call(server, "mqa_sm90_comparison"))["ragged"]
    decoding = server.stream("/v1/completions", completion(prompt(TOP_K + 300), 100))
    tokens = next(decoding)["choices"][0]["token_ids"]
    answers = complete(server, [prompt(CHUNK + 1), prompt(CHUNK + 2)], 8)
    tokens += [token for event in decoding for choice in event["choices"] for token in choice["token_ids"]]
    assert [len(tokens), *map(len, answers)] == [100, 8, 8]
    found = comparison(server)
    assert found["ragged"] > before
    assert found["agreements"]["ragged/above"]["rows"] > 0


def test_agreement_notices() -> None:
    theirs = torch.randn(TOP_K + 500, generator=torch.Generator().manual_seed(0))
    order = theirs.argsort(descending=True)
    last, next_one = order[TOP_K - 1], order[TOP_K]

    same = Agreement()
    same.add(theirs, theirs)
    same.add(theirs[:10], theirs[:10])
    assert same == Agreement(rows=2, difference=0.0, gap=0.0)

    few = Agreement()
    few.add(torch.tensor([1e-9, 0.0]), torch.tensor([-1e-9, 0.0]), torch.tensor([3.0, 4.0]))
    assert few == Agreement(rows=1, difference=pytest.approx(4e-10))

    tie = Agreement()
    theirs[next_one] = theirs[last]
    ours = theirs.clone()
    ours[last] -= 1e-7
    ours[next_one] += 1e-7
    tie.add(ours, theirs)
    assert 0 < tie.difference <= TOLERANCE and tie.gap == 0

    swapped = Agreement()
    ours[order[0]], ours[order[-1]] = theirs[order[-1]], theirs[order[0]]
    swapped.add(ours, theirs)
    assert swapped.difference > 0.01 and swapped.gap > 1

    broken = Agreement()
    broken.add(torch.full_like(theirs, math.nan), theirs)
    broken.add(theirs, theirs)
    assert math.isnan(broken.difference)


@pytest.mark.parametrize(("k", "shortest"), [(0, 98), (99, 98), (501, 98), (0, 62), (0, 1)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("error", [0.0, 0.01])
def test_logits_are_compared_row_by_row(
    monkeypatch: pytest.MonkeyPatch, error: float, ragged: bool, k: int, shortest: int
) -> None:
    """Ours and theirs are the reference here; theirs gets a request for each row. Where no row of a request has more than k tokens
    there are none of ours. Of a row of few tokens an error counts over the sum of its parts' magnitudes."""
    last = shortest + 2
    if ragged:
        step = steps.random_ragged_step([[2200, 2201, 2202], [], [500, 501], [last]], by="query_start_loc", padding=3)
        step.context_lens[-3:] = 0
        plan = step.plan(num_sms=132)
    else:
        step = steps.random_step([[2200, 2201, 2202], [0, 0, 0], [shortest, shortest + 1, last]])
        plan = torch.zeros(ops.plan_shape(132), dtype=torch.int32)
    monkeypatch.setattr(wrappers, "steps", wrappers.Steps(selection=seams.Selection(k, left_out=k)))
    lens = step.context_lens.view(-1, 1) if ragged else step.context_lens
    schedules = []

    def schedule(context_lens: torch.Tensor, page: int, num_sms: int) -> torch.Tensor:
        assert (context_lens.shape, page, num_sms) == ((9, 1), 64, 132)
        schedules.append(torch.zeros(133, 2, dtype=torch.int32))
        return schedules[-1]

    def stock(q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len, indices=None):
        assert schedule_metadata is schedules[-1] and q[0].shape[:2] == (9, 1)
        return reference.paged_mqa_logits(
            q[0], kv_cache, weights, context_lens, block_tables, max_context_len=max_model_len
        )

    @functools.wraps(stock)
    def ours(q, kv_cache, weights, context_lens, *arguments, max_model_len, indices=None):
        logits = step.reference()
        logits[lens.flatten().nonzero()[-1]] *= 1 + error
        if k > 99:
            logits[lens.flatten() <= k] = torch.nan
        return logits

    monkeypatch.setattr(deep_gemm, "get_paged_mqa_logits_metadata", schedule)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(comparing_worker, "_agreements", {})
    arguments = (step.kv_cache, step.weights, lens, step.block_table, plan)
    limit = step.max_context_len
    logits = comparing_worker.comparing(ours)((step.q, None), *arguments, max_model_len=limit, indices=None)
    assert logits.shape == (9, limit)
    found = json.loads(comparing_worker.Extension().mqa_sm90_comparison())["agreements"]
    name = "ragged" if ragged else "3"
    below = {} if k > 99 else {f"{name}/below": 3}
    assert {key: rows["rows"] for key, rows in found.items()} == {f"{name}/above": 3} | below
    if last <= comparing_worker.FEW:
        magnitudes = replace(step, weights=step.weights.abs()).reference()
        row = lens.flatten().nonzero()[-1]
        error *= float(step.reference()[row, :last].norm() / magnitudes[row, :last].norm())
        assert error < 0.009 or not error
    assert all(found[key]["difference"] == pytest.approx(error, abs=TOLERANCE) for key in below)
    assert found[f"{name}/above"]["difference"] <= TOLERANCE


@pytest.mark.parametrize("wrong", [False, True])
def test_selections_are_compared_row_by_row(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """Ours is the reference here, and what it leaves to vLLM's is counted."""
    lens = torch.tensor([[4, 5], [6, 0]], dtype=torch.int32)
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.nan
    logits[2] = torch.tensor([1, 2, 1, 2, 1, 1, 9, 9])  # the first two of the ones

    def ours(backend: str) -> Any:
        def select(logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len):
            topk_indices.copy_(reference.topk_indices(logits, seq_lens, topk_tokens))
            if wrong:
                topk_indices[2, 2] = 4

        return select

    monkeypatch.setattr(comparing_worker, "_selections", {})
    checked = comparing_worker.checking(ours)("auto")
    chosen = torch.zeros(4, 6, dtype=torch.int32)[:, :4]
    checked(logits, lens, 2, chosen, 4, 8)
    setattr(logits, wrappers.MARK, seams.Selection(4))
    checked(logits, lens, 2, chosen, 4, 8)
    assert chosen.tolist()[:1] + chosen.tolist()[2:] == [[0, 1, 2, 3], [0, 1, 4 if wrong else 2, 3], [-1] * 4]
    found = json.loads(comparing_worker.Extension().mqa_sm90_comparison())["selections"]
    assert found == {"2": {"rows": 4, "chosen": 2, "different": int(wrong), "stock": 4}}


def test_merged_tokens_are_sorted() -> None:
    def merge(logits: None, topk_indices: torch.Tensor, k: int) -> None:
        topk_indices.copy_(torch.tensor([[5, -1, 2, 9], [-1, -1, -1, 0]]))

    chosen = torch.zeros(2, 4, dtype=torch.int32)
    comparing_worker.ordering(merge)(None, chosen, 4)
    assert chosen.tolist() == [[2, 5, 9, -1], [0, -1, -1, -1]]


@pytest.mark.parametrize(("query_lens", "ragged"), [((3, 3), 0), ((3, 1), 1), ((3, 512), 0), ((3, 2, 512), 1), ((3, 0), 0)])
def test_ragged_steps_are_counted(monkeypatch: pytest.MonkeyPatch, query_lens: tuple[int, ...], ragged: int) -> None:
    monkeypatch.setattr(comparing_worker, "_steps", {"ragged": 0})
    build = comparing_worker.counting_ragged(lambda self, common_prefix_len, common_attn_metadata: "built")
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    metadata = SimpleNamespace(query_start_loc_cpu=starts)
    assert build(SimpleNamespace(num_speculative_tokens=2), 0, common_attn_metadata=metadata) == "built"
    assert json.loads(comparing_worker.Extension().mqa_sm90_comparison())["ragged"] == ragged
