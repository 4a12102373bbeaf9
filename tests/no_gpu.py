# SPDX-License-Identifier: Apache-2.0
"""The plugin in a real vLLM, without a GPU: its platform says Hopper, and tensors are on the CPU. For tests."""

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import comparing_worker
import pytest
import torch
import vllm.logger
import vllm.platforms
from vllm.config import AttentionConfig, CompilationConfig, KernelConfig, ParallelConfig
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MLAAttentionSpec

import vllm_mqa_sm90
from vllm_mqa_sm90 import backend, ops, plugin, seams, support, wrappers

NUM_SMS = 132
PAGES = 70  # a request's; more than its tokens need, as vLLM's tables are
INSTALLED = tuple(seams.applying(seams.release()))
GATED = seams.release() >= (0, 28)
HANDED_OVER = seams.hands_over_topk()
REPLACED = (
    seams.BUILDER_OF_BACKEND, seams.SCHEDULE, seams.LOGITS,
    *((seams.NATIVE_GATE,) if GATED else ()), *((seams.TOPK,) if HANDED_OVER else ()),
)  # fmt: skip


class NvmlCudaPlatform(Platform):
    """vLLM's CUDA platform, whose module needs the driver, with the answers of an H100."""

    _enum = PlatformEnum.CUDA
    device_type = "cuda"
    capability: DeviceCapability | None = DeviceCapability(9, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability | None:
        return cls.capability

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return NUM_SMS


def stored(path: str) -> Any:
    """What a replaced name holds, without binding it."""
    module, _, name = path.partition(":")
    owner, _, attribute = name.rpartition(".")
    found = seams.resolve(f"{module}:{owner}") if owner else sys.modules[module]
    return vars(found)[attribute]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts and ends with vLLM as it was installed."""
    monkeypatch.delenv("MQA_SM90", raising=False)
    monkeypatch.setattr(backend, "outcome", dict(backend.outcome))
    monkeypatch.setattr(wrappers, "steps", wrappers.Steps())
    backend._builders.clear()
    for name in ("_print_info_once", "_print_warning_once"):
        getattr(vllm.logger, name).cache_clear()
    for seam in INSTALLED:
        seams.resolve(seam.path)
    stock = {path: stored(path) for path in REPLACED}
    yield
    seams.replace(stock)


def use_platform(monkeypatch: pytest.MonkeyPatch, platform: Platform) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and "current_platform" in vars(module):
            monkeypatch.setattr(module, "current_platform", platform)
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform)
    # `from vllm.platforms import current_platform` reads the attribute, which is made on first use.
    monkeypatch.setitem(vars(vllm.platforms), "current_platform", platform)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    use_platform(monkeypatch, NvmlCudaPlatform())
    monkeypatch.setattr(sys.modules[seams.INDEXER], "has_deep_gemm", lambda: True)


@pytest.fixture
def log() -> Iterator[Callable[[int], list[str]]]:
    """The plugin's messages of a level so far."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("vllm.mqa_sm90")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda level: [record.getMessage() for record in records if record.levelno == level]
    logger.removeHandler(handler)


def make_config(
    tokens: int, *, heads: int = 64, adaptive: bool = False, index_topk: int | None = None, topk: str = "auto", **parallel: int
) -> Any:
    """The parts of a VllmConfig that the builder reads; without `index_topk` the top-k is vLLM's."""
    parallel_config = ParallelConfig()
    for name, value in parallel.items():
        setattr(parallel_config, name, value)
    attention_config = AttentionConfig()
    if hasattr(attention_config, "sparse_mla_prefill_workspace_factor"):
        attention_config.sparse_mla_prefill_workspace_factor = 5
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=256, max_num_seqs=64),
        parallel_config=parallel_config,
        attention_config=attention_config,
        compilation_config=CompilationConfig(),
        kernel_config=KernelConfig(sparse_indexer_topk_backend=topk) if HANDED_OVER else None,
        model_config=SimpleNamespace(
            max_model_len=4096, hf_text_config=SimpleNamespace(index_n_heads=heads, index_topk=index_topk)
        ),
        speculative_config=SimpleNamespace(num_speculative_tokens=tokens, enable_adaptive_verification=adaptive)
        if tokens
        else None,
        num_speculative_tokens=tokens,
    )


def make_spec(block_size: int = 64, compression: int = 1, head_size: int = 132) -> MLAAttentionSpec:
    name = "tokens_per_state" if seams.release() >= (0, 29) else "compress_ratio"
    return MLAAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=head_size, dtype=torch.uint8, **{name: compression}
    )


V32, V4, V41, KPOOL = support.CACHES


def add_cache(config: Any, path: str = V32, backend_name: str = "DeepseekV32IndexerBackend") -> str:
    """Registers a stand-in for an indexer cache layer of that class, with its part of the KV cache; its name."""
    module, _, name = path.rpartition(".")
    stock_backend = seams.resolve(f"{seams.INDEXER}:{backend_name}")
    layer = type(name, (), {"__module__": module, "get_attn_backend": lambda self: stock_backend})()
    layer.kv_cache = torch.zeros(2, 64, 132, dtype=torch.uint8)
    config.compilation_config.static_forward_context["model.layers.0.indexer.k_cache"] = layer
    return "model.layers.0.indexer.k_cache"


def spec_and_layer(config: Any, compression: int = 1) -> tuple[MLAAttentionSpec, str]:
    """Of an indexer cache of DeepSeek-V3.2, compressed of V4, which is registered."""
    if compression == 1:
        return make_spec(), add_cache(config)
    layer = add_cache(config, V4, "DeepseekV4IndexerBackend")
    return make_spec(block_size=256, compression=compression), layer


def make_builder(config: Any, spec: MLAAttentionSpec, layer: str) -> Any:
    """As vLLM's worker makes it: the class that the backend answers with now."""
    return construct(seams.resolve(seams.BUILDER_OF_BACKEND)(), config, spec, layer)


def construct(
    builder: type, config: Any, spec: MLAAttentionSpec, layer: str, device: torch.device = torch.device("cpu")
) -> Any:
    width = {"block_table_width": PAGES} if getattr(builder, "requires_block_table_width", False) else {}
    return builder(spec, [layer], config, device, **width)


def make_step(context: list[int], query: list[int], tokens: int | None = None) -> CommonAttentionMetadata:
    """A decode step: per request its tokens, those of this step included, and those of this step; with padding `tokens`."""
    starts = torch.tensor([0, *query]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(context, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(query),
        num_actual_tokens=tokens or sum(query),
        max_query_len=max(query),
        max_seq_len=max(context),
        block_table_tensor=torch.arange(len(query) * PAGES, dtype=torch.int32).view(len(query), PAGES),
        slot_mapping=torch.zeros(tokens or sum(query), dtype=torch.int64),
    )


@pytest.fixture
def schedules(hopper: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, int, int]]:
    """vLLM as taken over, on DeepGEMM stand-ins; what DeepGEMM was asked to schedule."""
    asked = []
    stock = stored(seams.SCHEDULE)

    def schedule(context_lens: torch.Tensor, block_size: int, num_sms: int, **options: Any) -> torch.Tensor:
        asked.append((context_lens, block_size, num_sms))
        return torch.full((num_sms + 1, 2), 7, dtype=torch.int32)

    schedule.__signature__ = inspect.signature(stock)
    seams.replace({seams.SCHEDULE: schedule})
    plugin.register()
    assert backend.outcome["installed"], backend.outcome["reason"]
    return asked


def plan_of(context_lens: torch.Tensor, **options: Any) -> torch.Tensor:
    """As the builder makes it: CUDA graphs may have more rows than its step."""
    return vllm_mqa_sm90.plan(context_lens, **options, padded=True, num_sms=NUM_SMS)


def groups_of(plan: torch.Tensor) -> list[list[int]]:
    """First row, rows and request of each group of a ragged step's plan."""
    assert ops.is_ragged(plan)
    return comparing_worker.groups(plan, NUM_SMS)


def run_op(
    monkeypatch: pytest.MonkeyPatch, layer: str, metadata: Any, rows: int, chosen: torch.Tensor, k: int, **others: Any
) -> None:
    """vLLM's op over a step of so many rows; it chooses `k` tokens of each into `chosen`."""
    op = sys.modules[seams.OP]
    context = SimpleNamespace(attn_metadata={layer: metadata}, cudagraph_runtime_mode=None)
    monkeypatch.setattr(op, "get_forward_context", lambda: context)
    manager = SimpleNamespace(get_simultaneous=lambda *specs: [torch.empty(0)] * len(specs))
    monkeypatch.setattr(op, "current_workspace_manager", lambda: manager)
    given = {
        "hidden_states": torch.empty(rows, 8), "k_cache_prefix": layer, "kv_cache": torch.empty(2, 64, 132),
        "q_quant": torch.empty(rows, 64, 128), "q_scale": None, "k": None, "weights": torch.empty(rows, 64),
        "quant_block_size": 128, "scale_fmt": None, "topk_tokens": k, "head_dim": 128, "max_model_len": 4096,
        "total_seq_lens": 300, "topk_indices_buffer": chosen, "skip_k_cache_insert": True, "use_pcp": False,
        "pcp_shard_decode_requests": False, "dense_mha_metadata_layer_name": "",
    }  # fmt: skip
    parameters = inspect.signature(op.sparse_attn_indexer).parameters
    op.sparse_attn_indexer(**{name: value for name, value in (given | others).items() if name in parameters})


@contextlib.contextmanager
def without_slot_mapping() -> Iterator[None]:
    """Of compressed caches: a Triton kernel, and not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules[seams.INDEXER],
            "get_compressed_slot_mapping",
            lambda num_tokens, *_, out, **__: out[:num_tokens],
        )
        yield


def k_of(plan: torch.Tensor) -> int:
    return int(plan.view(-1, 4)[0, 3]) >> 12 & 0xFFF
