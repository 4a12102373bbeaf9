# SPDX-License-Identifier: Apache-2.0
"""A mixed load on servers of the installed vLLM with CUDA graphs, and what vLLM's profiler sees of it.

Requests come and go, prompts are prefilled in chunks, prefixes are cached, requests are preempted: the decoding
requests of a step bring 1, 2 or 3 query tokens. Stock vLLM makes a request of each of them (it flattens). The plugin
must not: no kernel may pad, unpad or multiply what the indexer reads. `pytest -s` prints the device time of both.

Without a GPU: that the load is mixed in vLLM's own scheduler, and that what must not be there would be found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import marking
import mixed_load
import origins
import pytest
import torch
from marking import CAPTURED, FLATTEN, PACK, RAGGED, RAGGED_LOGITS, RAGGED_PLAN, UNIFORM, UNPACK
from mixed_load import Request
from origins import Launch
from servers import call, start, wait_ready
from weightless import write_weightless

from vllm_mqa_sm90 import metrics, ops, seams
from vllm_mqa_sm90.architectures import v32_config
from vllm_mqa_sm90.bench.serve import trace
from vllm_mqa_sm90.bench.serve.run import profiler_arguments
from vllm_mqa_sm90.checkpoint import make_checkpoint
from vllm_mqa_sm90.server import Server, speculative_config, vllm_serve

SIDES = {"stock": "off", "plugin": "require"}
START_SECONDS = 420
PROFILE_AFTER = 2.0  # seconds of the load
PROFILED_STEPS = 200  # of which one in fourteen is ragged
REHEARSED = 40  # requests

# Kernels with a name of their own: vLLM 0.26's that pad and flatten; and one of another way to flatten.
RESHAPING = re.compile(
    r"_pack_seq_kernel|_unpack_seq_triton_kernel|_prepare_uniform_decode_kernel|_indexer_decode_metadata_kernel"
)
LOGITS = re.compile("paged_mqa_logits")  # with DeepGEMM's schedule of them
OURS = "mqa_sm90::"


def reshaping(ran: Iterable[Launch]) -> Counter[str]:
    """Kernels that change the shape of what the indexer reads in decode steps, and DeepGEMM's that want it so."""
    found: Counter[str] = Counter()
    for launch in ran:
        spans = launch.spans or ()
        what = next((mark for mark in (PACK, UNPACK, FLATTEN) if mark in spans), None)
        if what is None and "aten::repeat_interleave" in spans and not {RAGGED, UNIFORM}.isdisjoint(spans):
            what = "repeat_interleave in the indexer's metadata"
        if what is None and RESHAPING.search(launch.name):
            what = "by name"
        if what is None and LOGITS.search(launch.name) and OURS not in launch.name:
            what = "DeepGEMM"
        if what is not None:
            found[f"{what}: {launch.name}"] += 1
    return found


@dataclasses.dataclass
class Served:
    """What one server did under the load.

    Attributes:
        answers: tokens.
        preemptions, hits: requests preempted, tokens found in the prefix cache.
        marks: how often each was made under the load, profiled or not; those of captured graphs at the start.
        launches: of our kernel under the load, by next_n.
        steps, graphs: in the profile: steps, and CUDA graphs that were launched.
        profiled: marks in the profile.
        ran: what the GPU ran in it.
    """

    answers: list[list[int]]
    preemptions: float
    hits: float
    marks: Counter[str]
    launches: dict[str, int]
    steps: int
    graphs: int
    profiled: Counter[str]
    ran: list[Launch]


def arguments(traces: Path) -> list[str]:
    """Of a server's command, the same for both sides."""
    return [
        *mixed_load.ARGUMENTS,
        *("--speculative-config", json.dumps(speculative_config(2))),
        *profiler_arguments(traces, PROFILED_STEPS),
        # Two servers share the GPU: none may take a part of it, or measure what the other leaves.
        *("--gpu-memory-utilization", "0.02", "--kv-cache-memory-bytes", str(1 << 30)),
        *("--worker-extension-cls", "marking_worker.Extension"),
        *compilation_arguments(),
    ]


def compilation_arguments() -> list[str]:
    """What vLLM 0.26 compiles of this model rounds differently from start to start: two stock servers answer with
    different tokens. So it compiles nothing here, as 0.33 by itself; the decode steps keep their CUDA graphs.
    """
    if seams.release() != (0, 26):
        return []
    return ["--compilation-config", json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})]


def serve(scratch: Path, side: str) -> Server:
    (scratch / side).mkdir()
    return start(scratch, side, "model", SIDES[side], *arguments(scratch / side))


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mqa-sm90-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def servers(scratch: Path) -> Iterator[dict[str, Server]]:
    """Both, started together."""
    torch.cuda.empty_cache()  # what tests before this file's left
    with contextlib.ExitStack() as stack:
        make_checkpoint(scratch / "model")
        running = {side: stack.enter_context(serve(scratch, side)) for side in SIDES}
        wait_ready(running.values(), START_SECONDS)
        yield running


@pytest.fixture(scope="module")
def served(scratch: Path, servers: dict[str, Server]) -> dict[str, Served]:
    """The load on one after the other: the GPU is its own while it is profiled."""
    found = {side: serve_load(server, scratch / side) for side, server in servers.items()}
    print(f"\n{torch.cuda.get_device_name()}, vLLM {seams.vllm_version()}\n{table(found)}")
    return found


def serve_load(server: Server, traces: Path) -> Served:
    def start_profile() -> None:
        time.sleep(PROFILE_AFTER)
        server.command("/start_profile")

    mixed_load.send(server, mixed_load.requests(0)[:REHEARSED])  # what is compiled when it is first used
    text, launches, marks = facts(server)
    with ThreadPoolExecutor(1) as pool:
        profiling = pool.submit(start_profile)
        answers = mixed_load.send(server, mixed_load.requests(1))
        profiling.result()
    server.command("/stop_profile")  # it ended by itself, unless the load had fewer steps
    later_text, later_launches, later_marks = facts(server)
    (file,) = traces.glob("*.pt.trace.json*")
    events = trace.events_of(file)
    profiled = origins.marks(events)
    return Served(
        answers=answers,
        preemptions=metrics.total(later_text, "vllm:num_preemptions") - metrics.total(text, "vllm:num_preemptions"),
        hits=metrics.total(later_text, "vllm:prefix_cache_hits") - metrics.total(text, "vllm:prefix_cache_hits"),
        marks=Counter(
            {
                name: count if name.startswith(CAPTURED) else count - marks.get(name, 0)
                for name, count in later_marks.items()
            }
        ),
        launches={next_n: count - launches[next_n] for next_n, count in later_launches.items()},
        steps=sum(count for name, count in profiled.items() if name.startswith("execute_context_")),
        graphs=sum(event.get("name", "").startswith("cudaGraphLaunch") for event in events),
        profiled=profiled,
        ran=origins.launches(events),
    )


def facts(server: Server) -> tuple[str, dict[str, int], dict[str, int]]:
    """Its metrics, its launches of our kernel, and its marks, so far."""
    launches = call(server, "mqa_sm90_report")["launches"]
    return server.get("/metrics"), launches, json.loads(call(server, "mqa_sm90_marks"))


def table(found: dict[str, Served]) -> str:
    """Device time a step by family of kernels, and its share, side by side; then what the load was like."""
    lines = [f"{'us of GPU time a step':<24}" + "".join(f"{side:>10}{'share':>8}" for side in found)]
    by_family = {side: origins.by_family(each.ran) for side, each in found.items()}
    rows = {family: {side: by_family[side][family] for side in found} for family in (*trace.FAMILIES, trace.OTHER)}
    rows["all"] = {side: sum(by_family[side].values()) for side in found}
    rows["* decode steps' logits"] = {side: _duration(each.ran, _is_decodes) for side, each in found.items()}
    rows["* pad, unpad, flatten"] = {side: _duration(each.ran, _is_reshaping) for side, each in found.items()}
    for name, times in rows.items():
        cells = (
            f"{times[side] / each.steps:>10.1f}{times[side] / rows['all'][side]:>8.1%}" for side, each in found.items()
        )
        lines.append(f"{name:<24}{''.join(cells)}")
    lines.append("* counted above too; the index logits have those of prefills as well")
    for side, each in found.items():
        lines.append(
            f"{side}: {each.steps} steps and {each.graphs} graphs profiled, {each.preemptions:.0f} preemptions, "
            f"{each.hits:.0f} tokens from the prefix cache, "
            f"{each.marks[RAGGED]} ragged and {each.marks[UNIFORM]} other metadata builds "
            f"({each.profiled[RAGGED]} and {each.profiled[UNIFORM]} profiled), launches by next_n {each.launches}"
        )
        lines += (f"  {count:>6} x {name[:150]}" for name, count in reshaping(each.ran).most_common())
    if len(found) == 2:
        stock, plugin = (each.answers for each in found.values())
        same = sum(ours == theirs for ours, theirs in zip(stock, plugin, strict=True))
        lines.append(f"{same} of {len(stock)} answers have the same tokens on both sides")
    return "\n".join(lines)


def _duration(ran: Iterable[Launch], which: Callable[[Launch], bool]) -> float:
    return sum(launch.duration for launch in ran if which(launch))


def _is_decodes(launch: Launch) -> bool:
    return trace.family(launch.name) == "index logits" and LOGITS.search(launch.name) is not None


def _is_reshaping(launch: Launch) -> bool:
    return not {PACK, UNPACK, FLATTEN}.isdisjoint(launch.spans or ())


@pytest.mark.gpu
@pytest.mark.parametrize("side", SIDES)
def test_load_is_mixed(served: dict[str, Served], side: str) -> None:
    found = served[side]
    assert [len(answer) for answer in found.answers] == [request.tokens for request in mixed_load.requests(1)]
    assert found.preemptions > 0 and found.hits > 0
    assert found.marks[RAGGED] > 0
    # In the profile too, which has what each kernel was launched from.
    assert found.profiled[RAGGED] > 0 and found.steps >= PROFILED_STEPS / 2 and found.graphs > 0
    assert any(launch.spans and RAGGED in launch.spans for launch in found.ran)
    assert sum(launch.spans is not None for launch in found.ran) > 0.95 * len(found.ran)


@pytest.mark.gpu
def test_stock_flattens(served: dict[str, Served]) -> None:
    """What the plugin must not do shows where it is done."""
    found = served["stock"]
    assert not found.launches and not found.marks[RAGGED_PLAN]
    assert not any(OURS in launch.name for launch in found.ran)
    assert found.marks[FLATTEN] > 0
    kinds = {name.split(":")[0] for name in reshaping(found.ran)}
    assert kinds >= {"indexer", "DeepGEMM"}
    assert any("aten::repeat_interleave" in (launch.spans or ()) and FLATTEN in launch.spans for launch in found.ran)


@pytest.mark.gpu
def test_plugin_computes_ragged_steps_as_they_are(served: dict[str, Served]) -> None:
    found = served["plugin"]
    assert found.marks[RAGGED_PLAN] > 0 and found.marks[RAGGED_LOGITS] > 0
    assert found.launches["3"] > 0
    names = Counter(launch.name for launch in found.ran if OURS in launch.name)
    assert any("plan_kernel" in name for name in names) and any(LOGITS.search(name) for name in names)
    assert reshaping(found.ran) == Counter()
    # Nor in steps that were not profiled, nor in a graph.
    assert {name: found.marks[name] for mark in (PACK, UNPACK, FLATTEN) for name in (mark, CAPTURED + mark)} == (
        dict.fromkeys((PACK, UNPACK, FLATTEN, CAPTURED + PACK, CAPTURED + UNPACK, CAPTURED + FLATTEN), 0)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("length", [200, 1000, 1900])
def test_tokens_after_the_load_are_those_of_stock_vllm(
    servers: dict[str, Server], served: dict[str, Served], length: int
) -> None:
    """New prompts, one at a time, whose contexts the indexer keeps whole.

    Not the load's own answers: the steps of the two servers are never made of the same requests, so that their
    products are summed in another order; and above 2048 tokens stock vLLM does not repeat its own.
    """
    request = Request(0.0, mixed_load.prompt(length, random.Random(length)), 40)

    def ask() -> list[list[int]]:
        for server in servers.values():
            server.command("/reset_prefix_cache")
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda side: mixed_load.send(servers[side], [request])[0], SIDES))

    stock, plugin = first = ask()
    assert plugin == stock, (
        f"asked again, {tuple(SIDES)} repeat their own: {[one == other for one, other in zip(first, ask(), strict=True)]}"
    )
    assert len(set(stock)) > 1, "one token, repeated, proves nothing"


# Without a GPU.


def test_load_is_mixed_in_vllms_scheduler(tmp_path: Path, run_script: Callable[..., Any]) -> None:
    """The installed vLLM takes the server's words, and its scheduler makes of the load what it is meant for."""
    write_weightless(tmp_path, v32_config(4, experts=32))
    found = run_script("schedule_load.py", *vllm_serve(tmp_path, 8123, *arguments(tmp_path))[3:])
    assert (found["profiler"], found["profiled_steps"]) == ("torch", PROFILED_STEPS)
    assert found["answers"] == len(mixed_load.requests(1))
    assert found["preemptions"] > 10 and found["hits"] > 10_000
    assert found["ragged"] > 0.03 * found["steps"] and found["beside_prefill"] > 0.2 * found["steps"]
    assert found["steps"] > 3 * PROFILED_STEPS


def test_load() -> None:
    load = mixed_load.requests(1)
    assert load == mixed_load.requests(1)
    assert [request.at for request in load] == sorted(request.at for request in load)
    lengths = [len(request.prompt) for request in load]
    assert min(lengths) < 1024 and 2048 < max(lengths) < 4096 - 96
    others = {tuple(request.prompt[:64]) for request in mixed_load.requests(0)}
    assert others.isdisjoint(tuple(request.prompt[:64]) for request in load)


def test_requests_are_sent_when_due(tmp_path: Path) -> None:
    arrived = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            arrived.append((time.monotonic(), body["prompt"]))
            answer = json.dumps({"choices": [{"token_ids": body["prompt"] * body["max_tokens"]}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    idle = [sys.executable, "-c", "import time; time.sleep(60)"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(listener.serve_forever)
        with Server(idle, listener.server_port, tmp_path / "log", grace=0) as server:
            answers = mixed_load.send(server, [Request(0.4, [8], 3), Request(0.0, [7], 2)])
        listener.shutdown()
    assert answers == [[8, 8, 8], [7, 7]]
    (early, first), (late, second) = arrived
    assert (first, second) == ([7], [8]) and late - early > 0.2


def launch(name: str, *spans: str) -> Launch:
    return Launch(name, 1.0, spans)


STEP = "execute_context_1(130)_generation_3(9)"
INDEXER_OP = "vllm::sparse_attn_indexer"
DEEPGEMM = "void deep_gemm::sm90_fp8_paged_mqa_logits<1u, 64u>(unsigned int)"


@pytest.mark.parametrize(
    "wrong",
    [
        launch("kernel", STEP, INDEXER_OP, PACK),
        launch("kernel", STEP, INDEXER_OP, UNPACK),
        launch("kernel", STEP, RAGGED, FLATTEN),
        launch("elementwise", STEP, UNIFORM, FLATTEN, "aten::copy_"),
        launch("indexSelectLargeIndex", STEP, RAGGED, "aten::repeat_interleave", "aten::index_select"),
        launch("_indexer_decode_metadata_kernel", STEP, RAGGED),
        launch("_prepare_uniform_decode_kernel", STEP),
        Launch("_pack_seq_kernel", 1.0, None),
        launch("_unpack_seq_triton_kernel", STEP, INDEXER_OP),
        launch(DEEPGEMM, STEP, INDEXER_OP),
        launch("void deep_gemm::sm90_paged_mqa_logits_metadata<32u>(unsigned int)", STEP, RAGGED),
    ],
)
def test_reshaping_is_found(wrong: Launch) -> None:
    right = [
        launch("mqa_sm90::plan_kernel(StepRows)", STEP, RAGGED, RAGGED_PLAN),
        launch("void mqa_sm90::paged_mqa_logits_kernel<Config<64, 3>>()", STEP, INDEXER_OP, RAGGED_LOGITS),
        Launch("void mqa_sm90::paged_mqa_logits_kernel<Config<64, 3>>()", 1.0, None),
        launch("void deep_gemm::sm90_fp8_mqa_logits<64u>(unsigned int)", STEP, INDEXER_OP),  # of prefills
        launch("kernel", STEP, RAGGED),
        launch("indexSelectLargeIndex", STEP, "aten::repeat_interleave"),  # of the sampler
    ]
    assert reshaping(right) == Counter()
    assert reshaping([*right, wrong]).total() == 1


class Recorder(list):
    """Stands for vLLM's functions and the profiler: what was called, in which marks."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[str] = []

    @contextlib.contextmanager
    def record_function(self, name: str) -> Iterator[None]:
        self.marks.append(name)
        yield
        self.marks.pop()

    def function(self, name: str) -> Any:
        return lambda *_, **__: self.append((name, *self.marks))


@pytest.mark.parametrize("native", [False, True])
def test_what_vllm_and_we_call_is_marked(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """By the names that the installed vLLM has; the functions themselves do nothing here."""
    from vllm.model_executor.layers import sparse_attn_indexer
    from vllm.v1.attention.backends.mla import indexer

    calls = Recorder()
    stock = indexer.DeepseekV32IndexerMetadataBuilder
    builder_class = type("Ours", (stock,), {"build": lambda self, *args: stock.build(self, *args)}) if native else stock
    builder = object.__new__(builder_class)
    builder.num_speculative_tokens = 2
    monkeypatch.setattr(marking, "counts", Counter())
    monkeypatch.setattr(torch.profiler, "record_function", calls.record_function)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: calls[-1:] == [("plan",)])
    monkeypatch.setattr(indexer.DeepseekV32IndexerBackend, "get_builder_cls", staticmethod(lambda: builder_class))
    monkeypatch.setattr(stock, "build", calls.function("build"))
    monkeypatch.setattr(stock, "_prepare_decode_tensors", calls.function("prepare"))
    for owner, name in (
        (sparse_attn_indexer, "pack_seq_triton"),
        (sparse_attn_indexer, "unpack_seq_triton"),
        (ops, "plan"),
        (ops, "paged_mqa_logits"),
    ):
        monkeypatch.setattr(owner, name, calls.function(name))
    marking.mark()

    for query_lens in (3, 1), (3, 3):
        starts = torch.tensor([0, *query_lens]).cumsum(0)
        builder.build(0, SimpleNamespace(query_start_loc_cpu=starts))
    builder._prepare_decode_tensors(use_native=False)
    builder._prepare_decode_tensors(use_native=True)
    sparse_attn_indexer.pack_seq_triton(None, None)
    sparse_attn_indexer.unpack_seq_triton(None, None)
    ops.plan(None, query_start_loc=starts)
    ops.plan(None)
    for rows in 9, None:
        plan = torch.empty(ops.plan_shape(132, rows))
        ops.paged_mqa_logits(None, None, None, None, None, plan, max_context_len=4)
    assert calls == [
        ("build", RAGGED),
        ("build", UNIFORM),
        ("prepare", FLATTEN),
        ("prepare",),
        ("pack_seq_triton", PACK),
        ("unpack_seq_triton", UNPACK),
        ("plan", RAGGED_PLAN),
        ("plan",),
        ("paged_mqa_logits", RAGGED_LOGITS),
        ("paged_mqa_logits",),
    ]
    made = RAGGED, UNIFORM, FLATTEN, PACK, UNPACK, RAGGED_PLAN, RAGGED_LOGITS
    assert +marking.counts == {**dict.fromkeys(made, 1), CAPTURED + RAGGED_LOGITS: 1}


def test_table() -> None:
    ran = [launch("mqa_logits", STEP), launch(DEEPGEMM, STEP), launch("kernel", STEP, FLATTEN), launch("nvjet", STEP)]
    marks, profiled = Counter({RAGGED: 2, UNIFORM: 6}), Counter({RAGGED: 1, UNIFORM: 4})
    stock = Served([[1], [2]], 3, 640, marks, {}, 2, 5, profiled, ran)
    plugin = dataclasses.replace(stock, answers=[[1], [3]], ran=ran[::3], launches={"3": 9})
    text = table({"stock": stock, "plugin": plugin})
    for row in (
        "index logits 1.0 50.0% 0.5 50.0%",
        "all 2.0 100.0% 1.0 100.0%",
        "* decode steps' logits 0.5 25.0% 0.0 0.0%",
        "* pad, unpad, flatten 0.5 25.0% 0.0 0.0%",
    ):
        assert row in [" ".join(line.split()) for line in text.splitlines()]
    assert "1 of 2 answers" in text and "2 ragged and 6 other metadata builds (1 and 4 profiled)" in text
    assert text.count("1 x indexer: flatten: kernel") == text.count("1 x DeepGEMM: void deep_gemm") == 1
