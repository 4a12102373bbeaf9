# SPDX-License-Identifier: Apache-2.0
"""What this package knows of vLLM's internals: the places it replaces, and those it relies on.

A decode step of the sparse indexer goes through three modules. The metadata builder (`INDEXER`)
turns a batch into lengths, a block table and a schedule; the custom op (`OP`) computes the logits
with them, then the top k. Both call DeepGEMM, and from 0.30 on the op its top-k, through functions that they look up by
name in their own module, so that replacing the name there reaches exactly these callers.

Each seam is one record. All are checked against the installed vLLM before any is touched.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mqa_sm90.sizes import MAX_TOPK

Release = tuple[int, int]

OLDEST: Release = (0, 24)
NEWEST: Release = (0, 33)

INDEXER = "vllm.v1.attention.backends.mla.indexer"
OP = "vllm.model_executor.layers.sparse_attn_indexer"
KPOOL_OP = "vllm.models.glm5next.nvidia.sparse_indexer"
"""GLM-5.3's op, of keys that are pools of tokens. To import it takes seconds: only servers of the model do."""

# The names that are replaced.
BUILDER_OF_BACKEND = f"{INDEXER}:DeepseekV32IndexerBackend.get_builder_cls"
SCHEDULE = f"{INDEXER}:get_paged_mqa_logits_metadata"
NATIVE_GATE = f"{INDEXER}:_supports_native_decode"
LOGITS = f"{OP}:fp8_fp4_paged_mqa_logits"
TOPK = f"{OP}:get_indexer_topk"
# Their owners, subclassed.
STOCK_BACKEND = f"{INDEXER}:DeepseekV32IndexerBackend"
STOCK_BUILDER = f"{INDEXER}:DeepseekV32IndexerMetadataBuilder"
# Read.
CUDAGRAPH_SUPPORT = "vllm.v1.attention.backend:AttentionCGSupport"

_TOPK_WHY = "chooses the top-k by the backend's name: chooses ours for logits of ours"
_SCHEDULE_WHY = "makes DeepGEMM's schedule: makes our plan while our builder builds"
_SCHEDULE_PARAMETERS = ("context_lens", "block_size", "num_sms")
_LOGITS_WHY = "runs DeepGEMM's kernel: runs ours where the schedule is our plan"
_LOGITS_PARAMETERS = (
    "q",
    "kv_cache",
    "weights",
    "context_lens",
    "block_tables",
    "schedule_metadata",
    "max_model_len",
)


@dataclass(frozen=True)
class Seam:
    """One place in vLLM.

    Attributes:
        path: `module:qualified.name`.
        why: what this package does with it.
        parameters: the function's parameters in order; None: any, or not a function.
        uses: names that the function's own code refers to (globals, attributes).
        since, until: vLLM releases that the record holds for, both included.
    """

    path: str
    why: str
    parameters: tuple[str, ...] | None = None
    uses: tuple[str, ...] = ()
    since: Release = OLDEST
    until: Release = NEWEST

    def problem(self) -> str | None:
        """How the installed vLLM differs from this record; None: it does not."""
        try:
            found = resolve(self.path)
            if self.parameters is not None:
                parameters = tuple(inspect.signature(found).parameters)
                if parameters != self.parameters:
                    return f"{self.path}: expected parameters {_listed(self.parameters)}, found {_listed(parameters)}"
            if self.uses:
                names = inspect.unwrap(getattr(found, "__func__", found)).__code__.co_names
                if missing := set(self.uses).difference(names):
                    return f"{self.path}: expected to use {_listed(sorted(missing))}, but does not"
        except Exception as error:  # whatever importing or inspecting another release may raise
            return f"{self.path}: expected to exist, but {type(error).__name__}: {error}"
        return None


SEAMS = (
    # Replaced.
    Seam(
        BUILDER_OF_BACKEND,
        "names the metadata builder of V3.2's backend and, by inheritance, of V4's: answers with ours",
        parameters=(),
        uses=("DeepseekV32IndexerMetadataBuilder",),
    ),
    Seam(SCHEDULE, _SCHEDULE_WHY, parameters=_SCHEDULE_PARAMETERS, until=(0, 27)),
    Seam(SCHEDULE, _SCHEDULE_WHY, parameters=(*_SCHEDULE_PARAMETERS, "indices"), since=(0, 28)),
    Seam(
        NATIVE_GATE,
        "allows the query rows per request that DeepGEMM takes: those of our kernel while our builder builds",
        parameters=("next_n",),
        since=(0, 28),
    ),
    Seam(LOGITS, _LOGITS_WHY, parameters=(*_LOGITS_PARAMETERS, "clean_logits"), until=(0, 27)),
    Seam(
        LOGITS,
        _LOGITS_WHY,
        parameters=(*_LOGITS_PARAMETERS, "clean_logits", "indices"),
        since=(0, 28),
        until=(0, 32),
    ),
    Seam(LOGITS, _LOGITS_WHY, parameters=(*_LOGITS_PARAMETERS, "indices"), since=(0, 33)),
    Seam(TOPK, _TOPK_WHY, ("backend",), since=(0, 30)),
    # Relied on.
    Seam(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__",
        "our builder decides by the configuration and the cache that it is constructed with",
        parameters=("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
    ),
    Seam(
        f"{STOCK_BUILDER}.__init__",
        "makes the attributes that our builder reads and changes: the buffers and whether to flatten",
        uses=(
            "num_sms",
            "scheduler_metadata_buffer",
            "decode_seq_lens_buffer",
            "decode_lens_buffer",
            "arange_buffer",
            "use_flattening",
            "num_speculative_tokens",
            "compress_ratio",
        ),
    ),
    Seam(
        f"{STOCK_BUILDER}.build",
        "copies the schedule into its buffer; flattened steps bring lengths [T, 1], native ones [B, next_n]",
        parameters=("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        uses=(
            "get_paged_mqa_logits_metadata",
            "scheduler_metadata_buffer",
            "use_flattening",
            "query_start_loc",
            "query_start_loc_cpu",
            "_prepare_decode_tensors",
        ),
    ),
    Seam(
        f"{STOCK_BUILDER}._prepare_decode_tensors",
        "expands the lengths to rows, and of flattened steps the block table: ours expands the lengths alone",
        parameters=(
            "self",
            "seq_lens",
            "block_table",
            "decode_lens",
            "decode_lens_cpu",
            "query_start_loc",
            "num_decodes",
            "num_decode_tokens",
            "use_native",
            "next_n",
            "max_decode_len",
        ),
        uses=("decode_seq_lens_buffer", "decode_lens_buffer"),
    ),
    Seam(
        f"{STOCK_BUILDER}.build",
        "asks before each step whether its query rows per request may go native",
        uses=("_supports_native_decode",),
        since=(0, 28),
    ),
    Seam(
        f"{STOCK_BUILDER}.get_cudagraph_support",
        "native steps need uniform batches in a CUDA graph, ragged ones do not",
        parameters=("vllm_config", "kv_cache_spec"),
    ),
    Seam(f"{CUDAGRAPH_SUPPORT}.ALWAYS", "a CUDA graph holds any batch: where all steps are ragged ones"),
    Seam(
        f"{STOCK_BUILDER}.update_draft_decode_metadata",
        "makes the schedule again between draft steps, inside a CUDA graph",
        parameters=("self", "metadata"),
        uses=("get_paged_mqa_logits_metadata", "schedule_metadata"),
        since=(0, 32),
    ),
    Seam(
        f"{OP}:sparse_attn_indexer",
        "passes the builder's schedule to the logits",
        uses=("fp8_fp4_paged_mqa_logits", "schedule_metadata"),
    ),
    Seam(
        f"{OP}:sparse_attn_indexer",
        "asks for the top-k of the logits by name, and gives it the lengths that the logits were computed with",
        uses=("get_indexer_topk", "seq_lens"),
        since=(0, 30),
    ),
    Seam(
        "vllm.model_executor.layers.indexer_topk:SparseIndexerTopk.forward",
        "what the op calls the top-k with: ours is called so",
        parameters=("self", "logits", "seq_lens", "next_n", "topk_indices", "topk_tokens", "max_seq_len"),
        since=(0, 30),
    ),
    Seam(
        "vllm.v1.kv_cache_interface:MLAAttentionSpec.storage_block_size",
        "keys per page, after compression",
        until=(0, 28),
    ),
    Seam(
        "vllm.v1.kv_cache_interface:MLAAttentionSpec.num_states",
        "keys per page, after compression",
        since=(0, 29),
    ),
)

OP_SEAMS = {
    KPOOL_OP: (
        Seam(f"{KPOOL_OP}:fp8_fp4_paged_mqa_logits", _LOGITS_WHY, (*_LOGITS_PARAMETERS, "indices")),
        Seam(f"{KPOOL_OP}:get_indexer_topk", _TOPK_WHY, ("backend",)),
        Seam(
            f"{KPOOL_OP}:sparse_attn_indexer_kpool",
            "passes the builder's schedule to the logits, and the lengths of these to the top-k",
            uses=("fp8_fp4_paged_mqa_logits", "schedule_metadata", "get_indexer_topk", "seq_lens", "per_req_decode_lens"),
        ),
    )
}
"""Of ops of their own, which are looked at, and replaced, where a model that runs them is served."""


def vllm_version() -> str:
    """Version of the installed vLLM; ImportError without one."""
    return importlib.import_module("vllm").__version__


def release() -> Release | None:
    """Major and minor version of the installed vLLM; None where the version says neither ("dev")."""
    match = re.match(r"(\d+)\.(\d+)", vllm_version())
    return (int(match[1]), int(match[2])) if match else None


def named(release: Release) -> str:
    """ "0.33" """
    return ".".join(map(str, release))


def _listed(names: Iterable[str]) -> str:
    return f"({', '.join(names)})"


def applying(to: Release) -> Iterator[Seam]:
    """The seams of that release."""
    return (seam for seam in SEAMS if seam.since <= to <= seam.until)


@functools.cache
def op_problem(op: str) -> str | None:
    """How a model's own op differs from what this version knows; None: it does not, or there is nothing to know."""
    return next(filter(None, (seam.problem() for seam in OP_SEAMS.get(op, ()))), None)


def resolve(path: str) -> Any:
    """The object at `module:qualified.name`."""
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def replace(replacements: Mapping[str, Any]) -> None:
    """Puts each object in the place of what its path names."""
    for path, replacement in replacements.items():
        module, _, qualified = path.partition(":")
        owner, _, name = qualified.rpartition(".")
        setattr(resolve(f"{module}:{owner}") if owner else importlib.import_module(module), name, replacement)


def has_no_device() -> bool:
    """Whether vLLM found nothing that an engine could run on, as where a front end is on a machine of its own."""
    from vllm.platforms import current_platform

    return current_platform.is_unspecified()


def hopper_problem() -> str | None:
    """Why vLLM's platform is not a GPU of compute capability 9.0; None: it is. Leaves CUDA uninitialised."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return f"vLLM found no CUDA GPU (platform {type(current_platform).__name__})"
    if not any(cls.__name__ == "NvmlCudaPlatform" for cls in type(current_platform).__mro__):
        return "NVML does not answer, and asking the GPU otherwise would initialise CUDA in every process"
    capability = current_platform.get_device_capability()
    if capability is None or tuple(capability) != (9, 0):
        given = capability.as_version_str() if capability else "unknown"
        return f"the GPU's compute capability is {given}; the kernel is for 9.0 (H100, H200, GH200)"
    return None


def speculative_tokens(vllm_config: Any) -> int:
    """Most draft tokens of a request in a step under this configuration."""
    speculative = vllm_config.speculative_config
    return (speculative.num_speculative_tokens or 0) if speculative else 0


def page_size(kv_cache_spec: Any) -> int:
    """Keys per page of an indexer cache (its block size over the tokens per key)."""
    return kv_cache_spec.num_states if release() >= (0, 29) else kv_cache_spec.storage_block_size


def divides_by_request() -> bool:
    """Whether V4's flattened steps of at most one row a request get as many lengths divided as there are requests."""
    return release() < (0, 28)


def hands_over_topk() -> bool:
    """Whether the installed vLLM's op asks for the top-k of its logits by a name, which can be replaced."""
    return any(seam.path == TOPK for seam in applying(release()))


@dataclass(frozen=True)
class Selection:
    """What becomes of the logits of a decode step.

    Attributes:
        k: tokens of each row that our top-k selects; 0: vLLM's top-k does.
        left_out: rows of groups that all have at most so many tokens have no logits, as the top-k keeps their tokens
            whatever these are; 0: all rows have logits, as something else reads them, too.
    """

    k: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        if not self.k:
            return "vLLM's"
        return f"the plugin's, of {self.k} tokens" + (" with the logits of all rows" if not self.left_out else "")


def stock_topk_reason(vllm_config: Any = None) -> str | None:
    """Why the top-k of our logits stays vLLM's under this configuration; None, or if none is given: it need not."""
    if not hands_over_topk():
        return f"vLLM {vllm_version()} has no place for another, as 0.30 has"
    if vllm_config is None:
        return None
    if (backend := vllm_config.kernel_config.sparse_indexer_topk_backend) != "auto":
        return f"sparse_indexer_topk_backend is {backend}"
    config = vllm_config.model_config.hf_text_config
    if (k := _index_topk(config)) not in range(1, MAX_TOPK + 1):
        return f"index_topk is {k}; the plugin's selects 1 to {MAX_TOPK} tokens"
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    of_draft = _index_topk(getattr(draft, "hf_text_config", None))
    return None if of_draft in (None, k) else f"index_topk is {k}, and {of_draft} in the draft model"


def _index_topk(config: Any) -> int | None:
    """Keys that the indexer of that model selects for each row; of pools of tokens where a key is one of a pool."""
    tokens = getattr(config, "index_topk", None)
    return tokens and tokens // (getattr(config, "index_kpool", None) or 1)


def selection(vllm_config: Any) -> Selection:
    """Whose the top-k is under this configuration, and whether something else reads the logits."""
    if stock_topk_reason(vllm_config):
        return Selection()
    k = _index_topk(vllm_config.model_config.hf_text_config)
    # The merge of decode context parallelism reads the chosen ones of each row; the op's `candidate_blocks`, of
    # DeepSeek-V4.1, all of them, and then it overwrites those outside of its candidates.
    others = vllm_config.parallel_config.decode_context_parallel_size > 1 or bool(
        getattr(vllm_config.model_config.hf_text_config, "candidate_topk_blocks", 0)
    )
    return Selection(k, left_out=0 if others else k)


def kv_caches(vllm_config: Any, layer_names: Iterable[str]) -> list[torch.Tensor]:
    """The layers' parts of the KV cache as the op passes them to the logits; empty while vLLM has not bound them."""
    layers = vllm_config.compilation_config.static_forward_context
    return [layers[name].kv_cache.unsqueeze(-2) for name in layer_names]


def cache_layers(vllm_config: Any, builder: type) -> dict[str, str]:
    """The layers whose metadata `builder` makes: name -> class path."""
    layers = vllm_config.compilation_config.static_forward_context.items()
    return {
        name: f"{type(layer).__module__}.{type(layer).__qualname__}"
        for name, layer in layers
        if hasattr(layer, "get_attn_backend") and layer.get_attn_backend().get_builder_cls() is builder
    }
