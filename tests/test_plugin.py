# SPDX-License-Identifier: Apache-2.0
"""The plugin in a real vLLM, without a GPU: its platform says Hopper, and tensors are on the CPU."""

import functools
import gc
import inspect
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.logger
import vllm.platforms
from no_gpu import (  # noqa: F401 (fixtures)
    GATED,
    HANDED_OVER,
    INSTALLED,
    NUM_SMS,
    PAGES,
    REPLACED,
    V4,
    V32,
    NvmlCudaPlatform,
    add_cache,
    clean,
    construct,
    groups_of,
    hopper,
    k_of,
    log,
    make_builder,
    make_config,
    make_spec,
    make_step,
    plan_of,
    run_op,
    schedules,
    spec_and_layer,
    stored,
    use_platform,
    without_slot_mapping,
)  # fmt: skip
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum, UnspecifiedPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_mqa_sm90 import backend, ops, plugin, reference, seams, wrappers

# Taking over, or not.


def test_takes_over_on_hopper(hopper: None, log: Callable[[int], list[str]]) -> None:
    stock = {path: stored(path) for path in REPLACED}
    plugin.register()
    assert all(stored(path) is not stock[path] for path in REPLACED)
    assert not log(logging.WARNING)
    (line,) = log(logging.INFO)
    assert f"vLLM {vllm.__version__}" in line
    assert "reads the cache once for each 8 query tokens of a request" in line

    taken = {path: stored(path) for path in REPLACED}
    plugin.register()
    assert {path: stored(path) for path in REPLACED} == taken
    assert len(log(logging.INFO)) == 1


def assert_untouched(reason: str, log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers under auto, then under require."""
    stock = {path: stored(path) for path in REPLACED}
    plugin.register()
    assert {path: stored(path) for path in REPLACED} == stock
    assert not log(logging.INFO)
    (line,) = log(logging.WARNING)
    assert reason in line
    monkeypatch.setenv("MQA_SM90", "require")
    with pytest.raises(RuntimeError, match="MQA_SM90=require, but") as error:
        plugin.register()
    assert reason in str(error.value)
    assert {path: stored(path) for path in REPLACED} == stock
    assert len(log(logging.WARNING)) == 1


@pytest.mark.parametrize("seam", range(len(INSTALLED)), ids=lambda i: INSTALLED[i].path)
def test_any_mismatch_leaves_vllm_untouched(
    hopper: None, log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, seam: int
) -> None:
    changed = list(INSTALLED)
    changed[seam] = replace(changed[seam], path=changed[seam].path + "_gone")
    monkeypatch.setattr(seams, "SEAMS", changed)
    assert_untouched(changed[seam].path, log, monkeypatch)


@pytest.mark.parametrize("version", ["0.23.1", "0.34.0", "1.0.0", "dev"])
def test_other_vllm_versions_are_untouched(
    hopper: None, log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: version)
    assert_untouched(f"vLLM is {version}; this version is for 0.24 to 0.33", log, monkeypatch)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0), None])
def test_other_gpus_are_untouched(
    hopper: None,
    log: Callable[[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
) -> None:
    monkeypatch.setattr(NvmlCudaPlatform, "capability", capability and DeviceCapability(*capability))
    given = ".".join(map(str, capability)) if capability else "unknown"
    assert_untouched(f"compute capability is {given}", log, monkeypatch)


def test_no_cuda_is_untouched(log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    platform = NvmlCudaPlatform()
    platform._enum = PlatformEnum.CPU
    use_platform(monkeypatch, platform)
    assert_untouched("vLLM found no CUDA GPU", log, monkeypatch)


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_front_end_without_a_gpu_runs(log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Its engines are on other machines, where `require` holds."""
    monkeypatch.setenv("MQA_SM90", mode)
    use_platform(monkeypatch, UnspecifiedPlatform())
    stock = {path: stored(path) for path in REPLACED}
    plugin.register()
    assert {path: stored(path) for path in REPLACED} == stock
    assert not log(logging.WARNING)
    (line,) = log(logging.INFO)
    assert line == "MQA SM90: this process has no device to decode on: the engines say whose decode path theirs is"
    assert backend.report()["reason"] == "this process has no device to decode on"


def test_no_nvml_is_untouched_and_not_asked(log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Platform):
        _enum = PlatformEnum.CUDA

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            raise AssertionError("initialises CUDA")

    use_platform(monkeypatch, Asked())
    assert_untouched("NVML does not answer", log, monkeypatch)


def test_unbuilt_library_is_untouched(
    hopper: None, log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no library")

    monkeypatch.setattr(ops, "plan", missing)
    assert_untouched("the compiled library does not load: no library", log, monkeypatch)


def test_no_error_escapes_under_auto(
    hopper: None, log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise OSError("driver")

    monkeypatch.setattr(seams, "hopper_problem", broken)
    assert_untouched("OSError: driver", log, monkeypatch)


def test_off_is_silent(hopper: None, log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQA_SM90", "off")
    stock = {path: stored(path) for path in REPLACED}
    plugin.register()
    assert {path: stored(path) for path in REPLACED} == stock
    assert not log(logging.INFO) and not log(logging.WARNING)
    assert backend.report()["reason"] == "MQA_SM90=off"


def test_unknown_mode_is_an_error(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQA_SM90", "on")
    with pytest.raises(ValueError, match="MQA_SM90: expected one of auto, require, off, given 'on'"):
        plugin.register()


def test_entry_point_is_declared() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]' in project
    assert '"vllm_mqa_sm90.plugin:register"' in project


@pytest.mark.gpu
def test_register_leaves_cuda_uninitialised() -> None:
    code = "import torch; from vllm_mqa_sm90 import plugin; plugin.register(); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "MQA_SM90": "require"}, check=True, timeout=300)


# The metadata builder.


@pytest.mark.parametrize("tokens", range(ops.MAX_NEXT_N))
def test_uniform_step_is_native(schedules: list[Any], log: Callable[[int], list[str]], tokens: int) -> None:
    config = make_config(tokens)
    builder = make_builder(config, make_spec(), add_cache(config))
    next_n = tokens + 1
    context = [4096, 65, next_n, 64]
    step = make_step(context, [next_n] * 4)
    decode = builder.build(0, step).decode

    assert not ops.is_ragged(decode.schedule_metadata)
    assert decode.seq_lens.tolist() == [[length - next_n + 1 + row for row in range(next_n)] for length in context]
    assert decode.seq_lens.is_contiguous() and decode.seq_lens.dtype == torch.int32
    assert decode.block_table.data_ptr() == step.block_table_tensor.data_ptr()
    assert decode.block_table.shape == (4, PAGES)
    assert not decode.requires_padding
    assert decode.schedule_metadata.shape == ops.plan_shape(NUM_SMS)
    assert decode.schedule_metadata.data_ptr() == builder.scheduler_metadata_buffer.data_ptr()
    assert torch.equal(decode.schedule_metadata, plan_of(decode.seq_lens))
    assert decode.schedule_metadata[1:, 2].sum() == 64 + 2 + 1 + 1  # 64-token tiles
    assert not schedules
    assert f"num_speculative_tokens={tokens} decodes natively (next_n={next_n}" in log(logging.INFO)[-1]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_padding_requests_have_length_zero(schedules: list[Any], tokens: int) -> None:
    """As a CUDA graph's batch is padded: requests with no query token, and with no context."""
    config = make_config(tokens)
    builder = make_builder(config, make_spec(), add_cache(config))
    next_n = tokens + 1
    decode = builder.build(0, make_step([100, 70, 0, 0], [next_n, next_n, 0, 0], tokens=4 * next_n)).decode
    assert decode.seq_lens[2:].tolist() == [[0] * next_n] * 2
    assert decode.schedule_metadata[1:, 2].sum() == 4


@pytest.mark.parametrize("query", [1, 2])
def test_step_shorter_than_next_n_is_native(schedules: list[Any], query: int) -> None:
    config = make_config(2)
    builder = make_builder(config, make_spec(), add_cache(config))
    step = make_step([200, 300], [query] * 2)
    decode = builder.build(0, step).decode
    assert decode.seq_lens.tolist() == [[length - query + 1 + row for row in range(query)] for length in (200, 300)]
    assert decode.block_table.data_ptr() == step.block_table_tensor.data_ptr()
    assert decode.schedule_metadata[1:, 2].sum() == 4 + 5


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_ragged_step_keeps_its_requests(schedules: list[Any], tokens: int) -> None:
    """Requests of unequal query lengths: their rows follow each other, their block table is as it was."""
    config = make_config(tokens)
    builder = make_builder(config, make_spec(), add_cache(config))
    step = make_step([200, 300, 64], [2, 1, 2])
    decode = builder.build(0, step).decode
    assert decode.seq_lens.tolist() == [[199], [200], [300], [63], [64]]
    assert decode.decode_lens.tolist() == [1] * 5 and not decode.requires_padding
    assert decode.block_table.data_ptr() == step.block_table_tensor.data_ptr()
    assert decode.block_table.shape == (3, PAGES)
    plan = plan_of(decode.seq_lens.view(-1), query_start_loc=step.query_start_loc, max_rows=tokens + 1)
    assert torch.equal(decode.schedule_metadata, plan)
    assert groups_of(plan) == [[0, 2, 0], [2, 1, 1], [3, 2, 2]]

    uniform = builder.build(0, make_step([200, 300], [2, 2])).decode
    assert uniform.seq_lens.tolist() == [[199, 200], [299, 300]]
    assert torch.equal(uniform.schedule_metadata, plan_of(uniform.seq_lens))
    assert uniform.schedule_metadata.data_ptr() == decode.schedule_metadata.data_ptr()
    assert not schedules


@dataclass(frozen=True)
class Padded:
    """A step whose uniform shape is only nearly so: k=2, and what the plan must say."""

    context: list[int]
    query: list[int]
    tokens: int | None
    lens: list[int]
    groups: list[list[int]]


PADDED = {
    # vLLM's op reads two tokens a request out of 12 over 6.
    "tokens but not requests": Padded(
        [9] * 6, [1] * 6, 12, [9] * 6 + [0] * 6, [[request, 1, request] for request in range(6)]
    ),
    "requests but not tokens": Padded([9, 9, 0, 0], [3, 3, 0, 0], 6, [7, 8, 9] * 2, [[0, 3, 0], [3, 3, 1]]),
    "some of the tokens": Padded([9, 9, 0], [3, 3, 0], 8, [7, 8, 9] * 2 + [0] * 2, [[0, 3, 0], [3, 3, 1]]),
    "a request without tokens first": Padded([9, 9, 9], [0, 3, 3], None, [7, 8, 9] * 2, [[0, 3, 1], [3, 3, 2]]),
    "and before a prefill": Padded([9, 9, 9, 90], [3, 3, 0, 90], None, [7, 8, 9] * 2, [[0, 3, 0], [3, 3, 1]]),
}


@pytest.mark.parametrize("case", PADDED)
def test_what_is_padded_otherwise_than_a_uniform_step_is_ragged(
    schedules: list[Any], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(sys.modules[seams.INDEXER], "build_prefill_chunk_metadata", lambda *_, **__: None)
    step = PADDED[case]
    config = make_config(2)
    builder = make_builder(config, make_spec(), add_cache(config))
    metadata = builder.build(0, make_step(step.context, step.query, step.tokens))
    assert metadata.num_decode_tokens == len(step.lens)
    assert metadata.decode.seq_lens.flatten().tolist() == step.lens
    assert metadata.decode.decode_lens.tolist() == [1] * len(step.lens)
    assert groups_of(metadata.decode.schedule_metadata) == step.groups


@pytest.mark.parametrize("query", [[0], [0, 0], [0, 90, 0], [0, 0, 90, 90]], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
def test_decode_part_without_query_tokens(
    schedules: list[Any], monkeypatch: pytest.MonkeyPatch, tokens: int, adaptive: bool, query: list[int]
) -> None:
    """vLLM's op would score one row for it, the first of the buffer, which is the first prefill's."""
    scored = []
    monkeypatch.setattr(sys.modules[seams.INDEXER], "build_prefill_chunk_metadata", lambda *_, **__: None)
    config = make_config(tokens, adaptive=adaptive)
    layer = add_cache(config)
    builder = make_builder(config, make_spec(), layer)
    rows = max(sum(query), 1)
    metadata = builder.build(0, make_step([300] * len(query), query))
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.num_prefill_tokens) == (0, 0, sum(query))

    monkeypatch.setattr(sys.modules[seams.OP], "fp8_fp4_paged_mqa_logits", lambda *_, **__: scored.append(1))
    chosen = torch.arange(rows * 2048, dtype=torch.int32).view(rows, 2048)
    before = chosen.clone()
    run_op(monkeypatch, layer, metadata, rows, chosen, 2048, hidden_states=torch.empty(0, 8))
    assert not scored and torch.equal(chosen, before)


def test_prefills_follow_a_ragged_steps_decodes(schedules: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding rows of unequal number are one step, whatever prefills come after them."""
    monkeypatch.setattr(sys.modules[seams.INDEXER], "build_prefill_chunk_metadata", lambda *_, **__: None)
    config = make_config(2)
    builder = make_builder(config, make_spec(), add_cache(config))
    metadata = builder.build(0, make_step([200, 300, 90], [3, 1, 90]))
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.num_prefills) == (2, 4, 1)
    assert metadata.decode.seq_lens.tolist() == [[198], [199], [200], [300]]
    assert groups_of(metadata.decode.schedule_metadata) == [[0, 3, 0], [3, 1, 1]]


def test_block_table_wider_than_the_longest_context(schedules: list[Any]) -> None:
    """`max_model_len` just past a page boundary. Before 0.27 vLLM's flattening fails there."""
    config = make_config(2)
    config.model_config.max_model_len = 64 * (PAGES - 1)
    layer = add_cache(config)
    step = make_step([200, 300], [2, 1])
    assert make_builder(config, make_spec(), layer).build(0, step).decode.block_table.shape == (2, PAGES)
    if seams.release() < (0, 27):
        with pytest.raises(RuntimeError, match=f"expanded size of the tensor .{PAGES - 1}. must match .* .{PAGES}."):
            construct(seams.resolve(seams.STOCK_BUILDER), config, make_spec(), layer).build(0, step)


@pytest.mark.parametrize("tokens", [2, 7])
def test_adaptive_verification_makes_every_step_ragged(schedules: list[Any], tokens: int) -> None:
    """The host knows query lengths before they are trimmed, and a CUDA graph's padding."""
    config = make_config(tokens, adaptive=True)
    builder = make_builder(config, make_spec(), add_cache(config))
    assert builder.refusal is None
    assert type(builder).get_cudagraph_support(config, make_spec()) == AttentionCGSupport.ALWAYS
    step = make_step([200, 300, 64, 0], [3, 3, 3, 0])
    step.query_start_loc = torch.tensor([0, 3, 4, 6, 6], dtype=torch.int32)
    decode = builder.build(0, step).decode
    assert decode.seq_lens.flatten().tolist() == [198, 199, 200, 300, 63, 64, 0, 0, 0]
    assert groups_of(decode.schedule_metadata) == [[0, 3, 0], [3, 1, 1], [4, 2, 2]]
    uniform = builder.build(0, make_step([200, 300, 64], [3, 3, 3])).decode
    assert uniform.schedule_metadata.shape == decode.schedule_metadata.shape
    assert groups_of(uniform.schedule_metadata) == [[0, 3, 0], [3, 3, 1], [6, 3, 2]]


def test_a_graph_of_more_rows_may_replay_over_a_step(schedules: list[Any]) -> None:
    """Of the rows that a shorter step leaves in the buffers, none has tokens, and the plan has no tile."""
    config = make_config(2)
    builder = make_builder(config, make_spec(), add_cache(config))
    captured = builder.build(0, make_step([900] * 8, [2] * 8)).decode
    graph = captured.schedule_metadata, captured.seq_lens
    shorter = builder.build(0, make_step([300, 400], [2] * 2)).decode
    assert shorter.schedule_metadata.data_ptr() == graph[0].data_ptr()
    assert graph[1].tolist() == [[299, 300], [399, 400], *[[0, 0]] * 6]
    visits = torch.zeros(5 + 7, 5, dtype=torch.int32)
    torch.ops.vllm_mqa_sm90.walk(graph[0], graph[1], None, 0, visits)
    assert visits[:, 1].unique().tolist() == [0, 2]


def test_an_empty_micro_batch_does_nothing_in_a_graph_of_uniform_steps(schedules: list[Any]) -> None:
    """Its tokens are a CUDA graph's padding, and its requests, as many as there happen to be, have none."""
    config = make_config(0)
    builder = make_builder(config, make_spec(), add_cache(config))
    captured = builder.build(0, make_step([900] * 12, [1] * 12)).decode
    empty = builder.build(0, make_step([300] * 13, [0] * 13, tokens=12)).decode
    as_captured = empty.schedule_metadata.view(-1, 4)[: len(captured.schedule_metadata)]
    assert as_captured.data_ptr() == captured.schedule_metadata.data_ptr()
    torch.ops.vllm_mqa_sm90.walk(as_captured, captured.seq_lens, None, 0, torch.zeros(0, 5, dtype=torch.int32))


@pytest.mark.parametrize("tokens", [0, 2])
def test_plan_follows_the_step(schedules: list[Any], tokens: int) -> None:
    """The plan's address stays, as CUDA graphs need; its contents are the last step's."""
    config = make_config(tokens)
    builder = make_builder(config, make_spec(), add_cache(config))
    first = builder.build(0, make_step([640], [tokens + 1])).decode.schedule_metadata
    second = builder.build(0, make_step([64, 128], [tokens + 1] * 2)).decode.schedule_metadata
    assert first.data_ptr() == second.data_ptr()
    assert second[1:, 2].sum() == 3


def test_lengths_without_speculation_are_not_written(schedules: list[Any]) -> None:
    config = make_config(0)
    builder = make_builder(config, make_spec(), add_cache(config))
    step = make_step([5, 0], [1, 1])
    decode = builder.build(0, step).decode
    assert decode.seq_lens.data_ptr() == step.seq_lens.data_ptr()
    assert step.seq_lens.tolist() == [5, 0]


@pytest.mark.parametrize(
    ("context", "query", "tokens", "lens", "groups"),
    [
        ([400, 80, 8], [1, 0, 1], None, [100, 2], [[0, 1, 0], [1, 1, 2]]),
        ([400, 80, 8], [1, 1, 1], 6, [100, 20, 2, 0, 0, 0], [[0, 1, 0], [1, 1, 1], [2, 1, 2]]),
        ([400, 80, 8], [0, 1, 1], 6, [20, 2, 0, 0, 0, 0], [[0, 1, 1], [1, 1, 2]]),
    ],
    ids=str,
)
def test_ragged_steps_of_v4_whose_longest_query_is_one(
    schedules: list[Any], context: list[int], query: list[int], tokens: int, lens: list[int], groups: list[list[int]]
) -> None:
    config = make_config(2)
    builder = make_builder(config, *spec_and_layer(config, 4))
    with without_slot_mapping():
        decode = builder.build(0, make_step(context, query, tokens)).decode
    assert decode.seq_lens.flatten().tolist() == lens
    assert groups_of(decode.schedule_metadata) == groups
    assert decode.schedule_metadata.view(-1, 4)[0, 2] == len(lens)


def test_compressed_cache_of_v4(schedules: list[Any]) -> None:
    config = make_config(2)
    builder = make_builder(config, *spec_and_layer(config, 4))
    builder_of_v4 = seams.resolve(f"{seams.INDEXER}:DeepseekV4IndexerBackend").get_builder_cls()
    assert type(builder) is builder_of_v4
    with without_slot_mapping():
        decode = builder.build(0, make_step([4096, 258], [3, 3])).decode
        assert decode.seq_lens.tolist() == [[4094 // 4, 4095 // 4, 4096 // 4], [64, 64, 64]]
        assert decode.schedule_metadata[1:, 2].sum() == 16 + 1
        ragged = builder.build(0, make_step([4096, 258], [3, 1])).decode
    assert ragged.seq_lens.tolist() == [[4094 // 4], [4095 // 4], [4096 // 4], [64]]
    shares = ragged.schedule_metadata.view(-1, 4)[1 : ops.plan_shape(NUM_SMS)[0]]
    assert shares[:, 2].sum() == 16 + 1
    assert groups_of(ragged.schedule_metadata) == [[0, 3, 0], [3, 1, 1]]


def fields_of(metadata: Any) -> dict[str, Any]:
    """Of a step's metadata, those of its decode part among them, tensors as lists."""
    found = {**vars(metadata), **{f"decode.{name}": value for name, value in vars(metadata.decode).items()}, "decode": None}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


@pytest.mark.parametrize("compression", [1, 4])
@pytest.mark.parametrize("query", range(1, ops.MAX_NEXT_N + 1))
def test_uniform_steps_are_what_vllms_native_path_makes(
    schedules: list[Any], monkeypatch: pytest.MonkeyPatch, query: int, compression: int
) -> None:
    """Where all requests decode, vLLM is not asked whether they do so uniformly, which takes it longer than our builder."""
    config = make_config(max(2, query - 1))
    builder = make_builder(config, *spec_and_layer(config, compression))
    step = make_step([4000, 258, query, 100], [query] * 4)
    split, asked = seams.resolve(f"{seams.INDEXER}:split_decodes_and_prefills"), []

    def split_decodes_and_prefills(*args: Any, require_uniform: bool, **options: Any) -> Any:
        asked.append(require_uniform)
        return split(*args, require_uniform=require_uniform, **options)

    monkeypatch.setattr(sys.modules[seams.INDEXER], "split_decodes_and_prefills", split_decodes_and_prefills)

    def choose_native(step: Any) -> None:
        builder.use_flattening = builder._ragged = False

    with without_slot_mapping():
        built = fields_of(builder.build(0, step))
        monkeypatch.setattr(builder, "_choose_path", choose_native)
        assert fields_of(builder.build(0, step)) == built
    assert asked == [query == 1, True]


def test_cudagraphs_hold_uniform_batches(schedules: list[Any]) -> None:
    config = make_config(2)
    add_cache(config)
    builder = seams.resolve(seams.BUILDER_OF_BACKEND)()
    assert builder.get_cudagraph_support(config, make_spec()) == AttentionCGSupport.UNIFORM_BATCH


if seams.release() >= (0, 32):

    @pytest.mark.parametrize("k", [None, 128])
    @pytest.mark.parametrize("tokens", [1, 2])
    def test_draft_steps_make_our_plan(schedules: list[Any], tokens: int, k: int | None) -> None:
        config = make_config(tokens, index_topk=k)
        builder = make_builder(config, make_spec(), add_cache(config))
        step = make_step([64, 128], [1, 1])
        metadata = builder.build(0, step)
        metadata.seq_lens += 1
        builder.update_draft_decode_metadata(metadata)
        assert metadata.decode.seq_lens.tolist() == [[65], [129]]
        plan = metadata.decode.schedule_metadata
        assert torch.equal(plan, plan_of(metadata.decode.seq_lens, k=k or 0))
        assert plan[1:, 2].sum() == (3 if k else 2 + 3)
        assert not schedules

    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("newer", [[2, 1, 1], [2, 2], [1, 1, 1]], ids=str)
    def test_draft_steps_are_updated_as_they_were_built(
        schedules: list[Any], newer: list[int], adaptive: bool
    ) -> None:
        """Whatever the same builder has built since; what that step uses is overwritten, as vLLM's own is."""
        config = make_config(1, adaptive=adaptive)
        builder = make_builder(config, make_spec(), add_cache(config))
        metadata = builder.build(0, make_step([64, 128], [1, 1]))
        builder.build(0, make_step([70] * len(newer), newer))
        metadata.seq_lens += 1
        builder.update_draft_decode_metadata(metadata)
        plan = metadata.decode.schedule_metadata
        assert metadata.decode.seq_lens.tolist() == [[65], [129]]
        assert ops.is_ragged(plan) == adaptive
        starts = {"query_start_loc": torch.arange(3, dtype=torch.int32), "max_rows": 2} if adaptive else {}
        lens = metadata.decode.seq_lens.view(-1)
        assert torch.equal(plan, plan_of(lens, **starts))


UNKNOWN_CACHE = "vllm.models.other.attention.OtherIndexerCache"

REFUSED = {
    "heads": ("index_n_heads is 24", lambda: make_config(2, heads=24), make_spec, V32),
    "no heads": ("index_n_heads is None", lambda: make_config(2, heads=None), make_spec, V32),
    "page": ("page holds 128 keys", lambda: make_config(2), lambda: make_spec(block_size=128), V32),
    "FP4": ("key is 68 x torch.uint8", lambda: make_config(2), lambda: make_spec(head_size=68), V32),
    "cache": (UNKNOWN_CACHE, lambda: make_config(2), make_spec, UNKNOWN_CACHE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_builder_is_vllms(
    schedules: list[Any], log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    reason, make, spec, cache = REFUSED[case]
    config = make()
    layer = add_cache(config, cache)
    builder = make_builder(config, spec(), layer)
    stock = seams.resolve(seams.STOCK_BUILDER)
    expected = construct(stock, config, spec(), layer)

    assert builder.use_flattening == expected.use_flattening is True
    assert builder.scheduler_metadata_buffer.shape == expected.scheduler_metadata_buffer.shape == (NUM_SMS + 1, 2)
    step = make_step([200, 300], [2, 1])
    step.block_table_tensor = step.block_table_tensor[:, : builder.expanded_block_table_buffer.shape[1]]
    decode = builder.build(0, step).decode
    assert decode.seq_lens.tolist() == [[199], [200], [300]]
    assert decode.block_table.shape[0] == 3
    assert decode.schedule_metadata.unique().tolist() == [7]
    assert len(schedules) == 1
    (line,) = log(logging.WARNING)
    assert reason in line
    if case not in ("page", "FP4"):  # the class is asked before the cache is known
        support = type(builder).get_cudagraph_support(config, spec())
        assert support == stock.get_cudagraph_support(config, spec())

    monkeypatch.setenv("MQA_SM90", "require")
    with pytest.raises(RuntimeError, match="MQA_SM90=require, but this model's sparse indexer keeps"):
        make_builder(config, spec(), layer)


def cache_of(page_stride: int, offset: int = 0) -> torch.Tensor:
    storage = torch.zeros(4 * page_stride + offset, dtype=torch.uint8)
    return storage[offset:].as_strided((3, 64, 132), (page_stride, 132, 1))


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (cache_of(64 * 132 + 8), "a page stride .* multiple of 16 bytes .*strides .8456, "),
        (cache_of(64 * 132, offset=4), "an address that is a multiple of 16 bytes"),
        (torch.zeros(3, 64, 264, dtype=torch.uint8)[..., ::2], "pages dense inside"),
        ([torch.zeros(3, 64, 132)], "'list' object has no attribute 'unsqueeze'"),
    ],
    ids=["page stride", "address", "tokens apart", "another kind"],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [0, 2])
def test_a_cache_that_the_kernel_cannot_read_is_noticed_before_the_first_launch(
    schedules: list[Any], log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, tokens: int, cache: Any,
    reason: str,
) -> None:  # fmt: skip
    """Builders come before the tensors: the first step that is built after them decides."""
    config = make_config(tokens)
    layer = add_cache(config)
    of_layer = config.compilation_config.static_forward_context[layer]
    of_layer.kv_cache = torch.tensor([])
    query = [tokens + 1, max(tokens, 1)]
    step = make_step([200, 300], query)
    stock = construct(seams.resolve(seams.STOCK_BUILDER), config, make_spec(), layer)
    step.block_table_tensor = step.block_table_tensor[:, : stock.expanded_block_table_buffer.shape[1]]
    builder = make_builder(config, make_spec(), layer)
    builder.build(0, step)
    assert not schedules and not log(logging.WARNING)

    of_layer.kv_cache = cache
    expected = stock.build(0, step).decode
    for _ in range(2):
        decode = builder.build(0, step).decode
        assert decode.schedule_metadata.shape == (NUM_SMS + 1, 2)
        assert torch.equal(decode.schedule_metadata, expected.schedule_metadata)
        assert torch.equal(decode.seq_lens, expected.seq_lens)
        assert torch.equal(decode.block_table, expected.block_table)
    assert builder.use_flattening == stock.use_flattening == (tokens == 2)
    (line,) = log(logging.WARNING)
    assert re.search(f"keeps vLLM's own decode path: the kernel cannot read its cache: .*{reason}", line)
    assert backend.report()["reason"] == builder.refusal

    monkeypatch.setenv("MQA_SM90", "require")
    with pytest.raises(RuntimeError, match="MQA_SM90=require, but this model's sparse indexer keeps"):
        make_builder(config, make_spec(), layer).build(0, step)


def test_configuration_without_caches_is_refused(schedules: list[Any]) -> None:
    builder = seams.resolve(seams.BUILDER_OF_BACKEND)()
    assert "no indexer cache" in backend.refusal(builder, make_config(2), make_spec())
    assert "AttributeError" in backend.refusal(builder, SimpleNamespace(), make_spec())


def test_other_builders_keep_their_schedule(schedules: list[Any]) -> None:
    """What vLLM builds outside our builder's turn is vLLM's, before and after it."""
    config = make_config(2)
    builder = make_builder(config, make_spec(), add_cache(config))
    lengths = torch.tensor([[64]], dtype=torch.int32)
    for _ in range(2):
        assert seams.resolve(seams.SCHEDULE)(lengths, 64, NUM_SMS).shape == (NUM_SMS + 1, 2)
        if GATED:
            assert not seams.resolve(seams.NATIVE_GATE)(3)
        builder.build(0, make_step([64], [3]))
    with pytest.raises(AttributeError):
        builder.build(0, None)
    assert seams.resolve(seams.SCHEDULE)(lengths, 64, NUM_SMS).shape == (NUM_SMS + 1, 2)


# The custom op.


def test_logits_go_by_the_schedule(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def stock(*args: Any, **kwargs: Any) -> Any:
        return "stock", args, kwargs

    def ours(*args: Any, **kwargs: Any) -> Any:
        return "ours", args, kwargs

    stock.__signature__ = inspect.signature(stored(seams.LOGITS))
    seams.replace({seams.LOGITS: stock})
    monkeypatch.setattr(ops, "paged_mqa_logits", ours)
    plugin.register()
    options = {"clean_logits": False} if seams.release() < (0, 33) else {"indices": None}
    call = seams.resolve(seams.LOGITS)

    plan = torch.zeros(ops.plan_shape(NUM_SMS), dtype=torch.int32)
    args = (("q", None), "kv", "weights", "lengths", "table")
    assert call(*args, plan, max_model_len=4096, **options) == (
        "ours",
        ("q", "kv", "weights", "lengths", "table", plan),
        {"max_context_len": 4096, "max_rows": None, "k": 0, "clean_logits": False},
    )
    wrappers.steps.max_rows = 3
    ragged, lengths = torch.zeros(ops.plan_shape(NUM_SMS, 5), dtype=torch.int32), torch.arange(5).view(5, 1)
    name, given, limits = call(("q", None), "kv", "weights", lengths, "table", ragged, max_model_len=4096, **options)
    assert name == "ours" and given[3].tolist() == [0, 1, 2, 3, 4] and given[5] is ragged
    assert limits == {"max_context_len": 4096, "max_rows": 3, "k": 0, "clean_logits": False}
    schedule = torch.zeros(NUM_SMS + 1, 2)
    assert call(*args, schedule, max_model_len=4096, **options) == ("stock", (*args, schedule, 4096), options)


# The top-k.

K = 128  # of the tests' configurations
OURS = K if HANDED_OVER else 0


@pytest.mark.parametrize("query", [[3, 3, 3], [3, 1, 2]], ids=str)
def test_plans_leave_out_what_the_topk_keeps_whole(
    schedules: list[Any], log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, query: list[int]
) -> None:
    monkeypatch.setattr(ops, "launch_counts", dict)
    config = make_config(2, index_topk=K)
    builder = make_builder(config, make_spec(), add_cache(config))
    step = make_step([K, K + 1, 4096], query)
    decode = builder.build(0, step).decode
    ragged = ops.is_ragged(decode.schedule_metadata)
    starts = {"query_start_loc": step.query_start_loc, "max_rows": 3} if ragged else {}
    lens = decode.seq_lens.view(-1) if ragged else decode.seq_lens
    assert ragged == (query != [3, 3, 3])
    assert torch.equal(decode.schedule_metadata, plan_of(lens, **starts, k=OURS))
    shares = decode.schedule_metadata.view(-1, 4)[1 : ops.plan_shape(NUM_SMS)[0]]
    assert shares[:, 2].sum() == (0 if OURS else 2) + 3 + 64
    assert k_of(decode.schedule_metadata) == backend.report()["topk"] == OURS
    whose = "the plugin's, of 128 tokens" if HANDED_OVER else f"vLLM's: vLLM {vllm.__version__} has no place for another"
    assert any(line.startswith(f"MQA SM90: the top-k of decode steps is {whose}") for line in log(logging.INFO))


def test_plans_of_v4_go_by_compressed_lengths(schedules: list[Any]) -> None:
    config = make_config(2, index_topk=64)
    builder = make_builder(config, *spec_and_layer(config, 4))
    with without_slot_mapping():
        plan = builder.build(0, make_step([4096, 258], [3, 3])).decode.schedule_metadata
    assert plan[1:, 2].sum() == 16 + (0 if HANDED_OVER else 1)
    assert k_of(plan) == (64 if HANDED_OVER else 0)


if HANDED_OVER:

    @pytest.fixture
    def called(hopper: None) -> list[tuple[str, tuple[Any, ...]]]:
        """vLLM as taken over, with a stand-in for its top-k: the backend and the arguments of each call."""
        calls: list[tuple[str, tuple[Any, ...]]] = []

        @functools.cache
        def get_indexer_topk(backend: str) -> Callable[..., None]:
            return lambda *args: calls.append((backend, args))

        seams.replace({seams.TOPK: get_indexer_topk})
        plugin.register()
        assert backend.outcome["installed"], backend.outcome["reason"]
        return calls

    def made_for(k: int | None) -> torch.Tensor:
        logits = torch.zeros(2, 64)
        if k is not None:
            setattr(logits, wrappers.MARK, seams.Selection(k, left_out=k))
        return logits

    def test_a_named_topk_is_vllms(called: list[Any]) -> None:
        topk = seams.resolve(seams.TOPK)
        assert topk("persistent") is topk.__wrapped__("persistent")
        args = made_for(K), "lens", 3, "indices", K, 4096
        topk("persistent")(*args)
        assert called == [("persistent", args)]

    @pytest.mark.parametrize("k", [None, 64, K - 1])
    def test_logits_that_were_not_made_for_it_are_left_to_vllms_topk(called: list[Any], k: int | None) -> None:
        """Also where fewer rows are without logits than it needs none of."""
        args = made_for(k), "lens", 3, "indices", K, 4096
        seams.resolve(seams.TOPK)("auto")(*args)
        assert called == [("auto", args)]

    def test_a_topk_of_logits_that_were_not_computed_is_an_error(called: list[Any]) -> None:
        with pytest.raises(RuntimeError, match=r"topk_tokens: expected 129, of the model's configuration, .*, given 128: name vLLM's top-k"):
            seams.resolve(seams.TOPK)("auto")(made_for(K + 1), "lens", 3, "indices", K, 4096)
        assert not called

    def test_logits_made_for_it_are_ours_to_select_from(called: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        ours = []
        monkeypatch.setattr(ops, "topk_indices", lambda *args, **options: ours.append((args, options)))
        logits = made_for(K)
        topk = seams.resolve(seams.TOPK)
        assert topk("auto") is topk("auto")
        topk("auto")(logits, "lens", 3, "indices", K, 4096)
        assert ours == [((logits, "lens", K), {"out": "indices"})] and not called

    STEPS = {
        "k=0": (0, [300, 64, 4000], [1] * 3, None, 1),
        "k=1": (1, [300, 64, 4000], [2] * 3, None, 1),
        "k=2": (2, [300, 64, 4000], [3] * 3, None, 1),
        "k=3": (3, [300, 64, 4000], [4] * 3, None, 1),
        "first drafts": (2, [300, 64, 4000], [1] * 3, None, 1),
        "ragged": (2, [300, 64, 4000], [3, 1, 2], None, 1),
        "padded requests": (2, [300, 64, 0], [3, 3, 0], 9, 1),
        "padded rows": (2, [300, 64, 0], [3, 3, 0], 8, 1),
        "a request without tokens": (2, [300, 64, 4000], [0, 3, 3], None, 1),
        "V4, k=0": (0, [1300, 64, 4000], [1] * 3, None, 4),
        "V4, k=2": (2, [1300, 64, 4000], [3] * 3, None, 4),
        "V4, ragged": (2, [1300, 64, 4000], [3, 1, 2], None, 4),
        "V4, padded rows": (2, [1300, 64, 0], [1, 1, 0], 4, 4),
    }

    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("case", STEPS)
    def test_vllms_op_has_ours_select(
        schedules: list[Any], monkeypatch: pytest.MonkeyPatch, case: str, adaptive: bool
    ) -> None:
        """Its own arguments, through its own code, are what our op takes, as that says where it ends: on the CPU."""
        tokens, context, query, padded, compression = STEPS[case]
        config = make_config(tokens, adaptive=adaptive, index_topk=K)
        spec, layer = spec_and_layer(config, compression)
        builder = make_builder(config, spec, layer)
        with without_slot_mapping():
            metadata = builder.build(0, make_step(context, query, padded))
        rows = padded or sum(query)
        made, select = [], ops.topk_indices

        def logits(q: torch.Tensor, *args: Any, max_context_len: int, k: int, **_: Any) -> torch.Tensor:
            made.append(torch.randn(rows, max_context_len + 64)[:, :max_context_len])
            assert k == k_of(args[4]) == K and q.shape[:-2].numel() == args[2].numel() == rows
            return made[-1]

        def topk_indices(logits: torch.Tensor, context_lens: torch.Tensor, k: int, *, out: torch.Tensor) -> None:
            with pytest.raises(RuntimeError, match="logits: expected tensors on a CUDA device"):
                select(logits, context_lens, k, out=out)
            out.copy_(reference.topk_indices(logits, context_lens, k))

        monkeypatch.setattr(ops, "paged_mqa_logits", logits)
        monkeypatch.setattr(ops, "topk_indices", topk_indices)
        chosen = torch.full((rows + 2, K + 32), -7, dtype=torch.int32)
        run_op(monkeypatch, layer, metadata, rows, chosen, K)
        lens = metadata.decode.seq_lens.view(-1)
        assert torch.equal(chosen[:rows, :K], reference.topk_indices(made[0], lens, K))
        assert (chosen[rows:] == -7).all()
        assert not schedules

    @pytest.mark.parametrize("query", [[3, 1], [1, 1]], ids=str)
    def test_a_step_that_is_all_kept_does_nothing_in_any_graph(schedules: list[Any], query: list[int]) -> None:
        config = make_config(2, index_topk=K)
        builder = make_builder(config, make_spec(), add_cache(config))
        captured = builder.build(0, make_step([900] * 4, [3] * 4)).decode
        short = builder.build(0, make_step([100, 90], query)).decode.schedule_metadata
        as_captured = short.view(-1, 4)[: len(captured.schedule_metadata)]
        assert as_captured.data_ptr() == captured.schedule_metadata.data_ptr()
        torch.ops.vllm_mqa_sm90.walk(as_captured, captured.seq_lens, None, K, torch.zeros(0, 5, dtype=torch.int32))

    @pytest.mark.parametrize("first", [0, K])
    def test_a_model_with_another_topk_is_refused(
        schedules: list[Any], log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, first: int
    ) -> None:
        """Calls of vLLM's op do not say whose step they are of."""
        monkeypatch.setattr(ops, "launch_counts", dict)
        config, other = make_config(2, index_topk=first), make_config(2, index_topk=64)
        kept = make_builder(config, make_spec(), add_cache(config))
        refused = make_builder(other, make_spec(), add_cache(other))
        of_first = f"the plugin's, of {first} tokens" if first else "vLLM's"
        assert refused.refusal == (
            f"its top-k would be the plugin's, of 64 tokens, and is {of_first} for another model in this process"
        )
        assert kept.refusal is None and refused.refusal in log(logging.WARNING)[-1]
        assert wrappers.steps.selection.k == backend.report()["topk"] == first
        assert make_builder(config, make_spec(), add_cache(config)).refusal is None
        del kept, refused
        gc.collect()
        assert make_builder(other, make_spec(), add_cache(other)).refusal is None
        assert wrappers.steps.selection.k == 64

    def test_a_topk_with_other_parameters_leaves_vllm_untouched(
        hopper: None, log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def get_indexer_topk(backend: str, topk_tokens: int) -> None: ...

        monkeypatch.setattr(sys.modules[seams.OP], "get_indexer_topk", get_indexer_topk)
        assert_untouched(f"{seams.TOPK}: expected parameters (backend), found (backend, topk_tokens)", log, monkeypatch)


# The report.


def test_report_of_a_served_model(schedules: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "launch_counts", lambda: {1: 5, 2: 0, 3: 7, 4: 0})
    worker = type("Worker", (backend.WorkerExtension,), {})()
    assert worker.mqa_sm90_report()["taken_over"] is False
    config = make_config(2)
    layer = add_cache(config)
    kept = make_builder(config, make_spec(), layer)
    report = worker.mqa_sm90_report()
    assert report["taken_over"] is True and report["reason"] is None
    assert report["layers"] == [layer] and report["builders"] == 1
    assert report["num_speculative_tokens"] == kept.num_speculative_tokens == 2
    assert report["launches"] == {"1": 5, "2": 0, "3": 7, "4": 0}
    assert report["versions"]["vllm"] == vllm.__version__
    # The way from a worker to the server: vLLM's encoder takes plain types alone, and hangs the server on others.
    sent = b"".join(bytes(part) for part in MsgpackEncoder().encode(report))
    assert MsgpackDecoder().decode(sent) == report


def test_report_of_a_refused_model(schedules: list[Any]) -> None:
    config = make_config(2, heads=24)
    kept = make_builder(config, make_spec(), add_cache(config))
    report = backend.report()
    assert report["taken_over"] is False
    assert report["reason"] == kept.refusal == "index_n_heads is 24; the kernel takes 16, 32, 64"
    assert report["launches"] == {}
