# SPDX-License-Identifier: Apache-2.0
"""What happens to servers that run for long: in an eager server each decode step's logits and selection are compared
with DeepGEMM's and torch.topk's while requests are preempted, caches reset, and the server sleeps."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from servers import MODEL, call, completion, environment_of, start, wait_ready
from test_serving import MODES, START_SECONDS, comparison, complete, prompt

from vllm_mqa_sm90 import metrics, seams
from vllm_mqa_sm90.checkpoint import make_checkpoint
from vllm_mqa_sm90.server import Server, ServerError, free_port, speculative_config

SILENT_SECONDS = 240  # of servers that may hang: the first steps compile kernels
ENDED_SECONDS = 120  # for an engine that lost a rank; vLLM's own limit for a step is 300
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ARGUMENTS = (
    "--served-model-name", MODEL,
    "--max-model-len", "8192",
    "--max-num-seqs", "8",
    "--max-num-batched-tokens", "2048",
    "--gpu-memory-utilization", "0.05",
    "--kv-cache-memory-bytes", str(1 << 30),
    "--speculative-config", json.dumps(speculative_config(2)),
)  # fmt: skip

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mqa-sm90-") as folder:
        make_checkpoint(Path(folder) / "model", experts=16)
        yield Path(folder)


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[Server]:
    """With room for 12,700 tokens, so that of five requests of 3300 some are preempted."""
    torch.cuda.empty_cache()  # what tests before this file's left
    worker = "--worker-extension-cls", "comparing_worker.Extension"
    memory = "--num-gpu-blocks-override", "200", "--enable-prefix-caching", "--enable-sleep-mode"
    with start(scratch, "life", "model", "require", "--enforce-eager", *ARGUMENTS, *memory, *worker) as running:
        wait_ready([running], START_SECONDS)
        call(running, "mqa_sm90_start_comparing")
        yield running


def compared(server: Server) -> int:
    """Rows so far, none of which differs."""
    return sum(rows["rows"] for rows in comparison(server)["agreements"].values())


def preempted(server: Server) -> float:
    return metrics.total(server.get("/metrics"), "vllm:num_preemptions")


def test_preempted_requests_go_on(server: Server) -> None:
    before = compared(server), preempted(server)
    prompts = [prompt(3000 + number) for number in range(5)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda each: complete(server, each, 300)[0], prompts))
    assert [len(answer) for answer in answers] == [300] * len(prompts)
    assert preempted(server) > before[1] and compared(server) > before[0]


def test_prefix_cache_is_reset_under_load(server: Server) -> None:
    before = compared(server)
    decoding = server.stream("/v1/completions", completion(prompt(4000), 200))
    next(decoding)
    for _ in range(3):
        # Takes their tokens from running requests, too, which begin anew.
        server.command("/reset_prefix_cache?reset_running_requests=true")
        assert len(complete(server, prompt(4000), 8)[0]) == 8
    assert sum(1 for _ in decoding) > 0
    assert compared(server) > before


@pytest.mark.skipif(seams.release() < (0, 33), reason="vLLM 0.26 loses its builders' own buffers; others were not looked at")
def test_sleeps_and_wakes_up(server: Server) -> None:
    (first,) = complete(server, prompt(1500), 40)
    before = compared(server)
    for level in 1, 1:
        server.command(f"/sleep?level={level}")
        assert json.loads(server.get("/is_sleeping"))["is_sleeping"]
        server.command("/wake_up")
        server.command("/reset_prefix_cache")
        assert complete(server, prompt(1500), 40) == [first]  # kept whole by the indexer
        assert len(complete(server, prompt(5000), 24)[0]) == 24
    assert compared(server) > before


def test_structured_output(server: Server) -> None:
    before = compared(server)
    body = completion(prompt(3000), 40) | {"structured_outputs": {"regex": "[0-9]{12}"}, "ignore_eos": False}
    text = server.post("/v1/completions", body)["choices"][0]["text"]
    assert len(text) == 12 and text.isdigit()
    assert compared(server) > before


def test_two_engines_in_one_process(scratch: Path) -> None:
    """One after the other; the tokens of both are the same."""
    program = f"""
import gc, json, torch
from vllm import LLM, SamplingParams
from vllm_mqa_sm90 import backend
found = []
for _ in range(2):
    llm = LLM(model={str(scratch / "model")!r}, max_model_len=8192, gpu_memory_utilization=0.2, max_num_seqs=8,
              kv_cache_memory_bytes=1 << 30, speculative_config={speculative_config(2)!r})
    answers = llm.generate([dict(prompt_token_ids={prompt(1500)!r})], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    report = backend.report()
    found.append([list(answers[0].outputs[0].token_ids), report["taken_over"], report["builders"], report["launches"]["3"]])
    llm.llm_engine.engine_core.shutdown()
    del llm, answers
    gc.collect()
    torch.cuda.empty_cache()
print(json.dumps(found))
"""
    env = environment_of(scratch, "require") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # the last line of the output is ours
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first[0] == second[0] and len(set(first[0])) > 1
    assert first[1] and second[1] and first[2] == second[2] and second[3] > first[3] > 0


def prefilled(prefills: Server, decodes: Server, length: int) -> list[int]:
    """40 tokens of one server after a prompt that the other one prefilled."""
    first = completion(prompt(length), 1) | {"kv_transfer_params": {"do_remote_decode": True}}
    params = prefills.post("/v1/completions", first)["kv_transfer_params"]
    body = completion(prompt(length), 40) | {"kv_transfer_params": params}
    return decodes.post("/v1/completions", body)["choices"][0]["token_ids"]


@pytest.mark.skipif(find_spec("nixl") is None, reason="needs nixl, which vLLM does not bring")
def test_prefills_come_from_another_server(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disaggregated prefill, by NIXL, on a second GPU where there is one."""
    transfer = "--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
    worker = "--worker-extension-cls", "comparing_worker.Extension"
    arguments = "--enforce-eager", *ARGUMENTS, *transfer, *worker
    # A prompt that fills its last page would have one more for drafts where it is prefilled, and vLLM pairs the last pages.
    lengths = 200, 650, 1500, 1990
    answers, pairs = {}, {}
    with contextlib.ExitStack() as stack:
        for side, mode in MODES.items():
            pairs[side] = []
            for number, role in enumerate(("prefills", "decodes")):
                monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(number % torch.cuda.device_count()))
                running = start(scratch, f"{side}-{role}", "model", mode, *arguments, timeout=SILENT_SECONDS)
                pairs[side].append(stack.enter_context(running))
        wait_ready([server for pair in pairs.values() for server in pair], START_SECONDS)
        call(pairs["plugin"][1], "mqa_sm90_start_comparing")
        for side, pair in pairs.items():
            answers[side] = [prefilled(*pair, length) for length in lengths]
            assert len(prefilled(*pair, 6000)) == 40
            assert metrics.total(pair[1].get("/metrics"), "vllm:external_prefix_cache_hits") > 9000
        assert compared(pairs["plugin"][1]) > 100
    assert answers["plugin"] == answers["stock"]
    assert all(len(set(answer)) > 1 for answer in answers["stock"])


@TWO_GPUS
def test_idle_data_parallel_ranks_step_along(scratch: Path) -> None:
    """Expert parallelism on two GPUs: one request at a time, so that the other rank has none; tokens as stock vLLM's."""
    answers = {}
    for side, mode in MODES.items():
        spread = "--data-parallel-size", "2", "--enable-expert-parallel", "--api-server-count", "1"
        with start(scratch, f"dp-{side}", "model", mode, *ARGUMENTS, *spread) as running:
            wait_ready([running], START_SECONDS)
            answers[side] = [complete(running, prompt(length), 40)[0] for length in (200, 700, 1500, 1990)]
            assert len(complete(running, prompt(6000), 24)[0]) == 24
    assert answers["plugin"] == answers["stock"]
    assert all(len(set(answer)) > 1 for answer in answers["stock"])


def workers_of(server: Server) -> list[int]:
    """Processes of its session that are vLLM's workers by their titles."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            if os.getsid(int(process.name)) == server.pid and b"VLLM::Worker" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@TWO_GPUS
def test_a_killed_rank_ends_the_engine_and_a_restart_serves(scratch: Path) -> None:
    arguments = *ARGUMENTS, "--tensor-parallel-size", "2"
    with start(scratch, "killed", "model", "require", *arguments, timeout=SILENT_SECONDS) as running:
        wait_ready([running], START_SECONDS)
        decoding = running.stream("/v1/completions", completion(prompt(3000), 2000))
        next(decoding)
        os.kill(max(workers_of(running)), signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises((ServerError, OSError, ValueError, KeyError)):
            for event in decoding:
                if "error" in event:
                    raise ValueError(event["error"])
            complete(running, prompt(100), 8)
        assert time.monotonic() - killed < ENDED_SECONDS, "nobody noticed, but for a timeout"
    with start(scratch, "restarted", "model", "require", *arguments, timeout=SILENT_SECONDS) as running:
        wait_ready([running], START_SECONDS)
        assert len(complete(running, prompt(3000), 24)[0]) == 24
