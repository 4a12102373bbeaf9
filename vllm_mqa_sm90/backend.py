# SPDX-License-Identifier: Apache-2.0
"""vLLM's indexer backend with this package's kernel in its decode step.

The builder stays vLLM's own: ours is a subclass that puts our plan where DeepGEMM's schedule goes.
Steps whose requests bring equally many query rows, at most a group's, take vLLM's native path. Others
take the one on which vLLM makes a request of each row, of which ours keeps the shapes alone: the plan
says which rows share a request, and so a block table and the keys. The plan's shape then tells the custom op,
layer by layer, whose kernel the step is for, and whether it is ragged (`wrappers`). Under decode context
parallelism vLLM turns the rows' lengths into those of the rank's own tokens before the plan is made.
"""

import functools
import os
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from vllm_mqa_sm90 import machine, ops, seams, support, wrappers

MODES = ("auto", "require", "off")

_builders: "weakref.WeakSet[Any]" = weakref.WeakSet()

outcome: dict[str, Any] = {"installed": False, "reason": "vLLM has not called the plugin in this process"}
"""What the plugin did in this process: `installed`, and if not, the `reason`."""


def mode() -> str:
    """`MQA_SM90`: auto (default), require or off; ValueError for anything else."""
    given = os.environ.get("MQA_SM90", "auto")
    if given not in MODES:
        raise ValueError(f"MQA_SM90: expected one of {', '.join(MODES)}, given {given!r}")
    return given


@functools.cache
def logger() -> Any:
    """vLLM's logger. Only children of "vllm" reach the server's log."""
    from vllm.logger import init_logger

    return init_logger("vllm.mqa_sm90")


def refusal(builder: type, vllm_config: Any, kv_cache_spec: Any = None) -> str | None:
    """Why decode steps stay vLLM's own under this configuration and with this cache; None: they do not.

    Args:
        builder: our builder class, whose layers are looked up.
        kv_cache_spec: the cache as the kernel sees it; None: not known yet.
    """
    try:
        return _config_refusal(builder, vllm_config) or (kv_cache_spec and _cache_refusal(kv_cache_spec))
    except Exception as error:  # a configuration unlike those of known releases must not stop vLLM
        return f"the configuration cannot be read, {type(error).__name__}: {error}"


def _config_refusal(builder: type, vllm_config: Any) -> str | None:
    heads = getattr(vllm_config.model_config.hf_text_config, "index_n_heads", None)
    if heads not in ops.HEADS:
        return f"index_n_heads is {heads}; the kernel takes {', '.join(map(str, ops.HEADS))}"
    caches = set(seams.cache_layers(vllm_config, builder).values())
    if not caches:
        return "vLLM's configuration lists no indexer cache"
    parallel = vllm_config.parallel_config
    dcp, pcp = parallel.decode_context_parallel_size > 1, parallel.prefill_context_parallel_size > 1
    if problem := support.problem(caches, dcp=dcp, pcp=pcp):
        return problem
    selection = seams.selection(vllm_config)
    in_use = wrappers.steps.selection if any(builder.refusal is None for builder in _builders) else selection
    if in_use != selection:
        return f"its top-k would be {selection}, and is {in_use} for another model in this process"
    return None


def _cache_refusal(kv_cache_spec: Any) -> str | None:
    page = seams.page_size(kv_cache_spec)
    if page not in ops.PAGE_SIZES:
        return f"a cache page holds {page} keys; the kernel takes {', '.join(map(str, ops.PAGE_SIZES))}"
    if (kv_cache_spec.head_size, kv_cache_spec.dtype) != (ops.TOKEN_BYTES, torch.uint8):
        return (
            f"a cached key is {kv_cache_spec.head_size} x {kv_cache_spec.dtype}; "
            f"the kernel takes {ops.TOKEN_BYTES} x {torch.uint8}: FP8 values and their scale"
        )
    return None


def make_backend() -> type:
    """`MqaSm90IndexerBackend`, a subclass of the installed vLLM's backend (so is its builder)."""
    stock_backend = seams.resolve(seams.STOCK_BACKEND)
    stock_builder = seams.resolve(seams.STOCK_BUILDER)
    divides_by_request = seams.divides_by_request()

    class MqaSm90IndexerMetadataBuilder(stock_builder):
        """vLLM's builder. With a `refusal` it is just that; without one its metadata are for our kernel."""

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            # The spec's pages may yet be split for the kernel: the configuration alone decides here.
            taken = refusal(cls, vllm_config) is None
            if taken and _adapts(vllm_config):
                return seams.resolve(seams.CUDAGRAPH_SUPPORT).ALWAYS
            # More would have vLLM capture prefills, too, whose metadata have no decode part.
            with wrappers.as_builder(cls if taken else None):
                return super().get_cudagraph_support(vllm_config, kv_cache_spec)

        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any, **kwargs: Any
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
            self.refusal = refusal(type(self), vllm_config, kv_cache_spec)
            _builders.add(self)
            if self.refusal is not None:
                _refuse(self.refusal)
                return
            next_n = self.num_speculative_tokens + 1
            self._max_rows = min(next_n, ops.MAX_NEXT_N)
            steps = wrappers.steps
            steps.max_rows = max(steps.max_rows, self._max_rows)
            steps.selection = seams.selection(vllm_config)
            for cache in set(seams.cache_layers(vllm_config, type(self)).values()):
                _replace_in(support.CACHES[cache].op)
            # What it takes to be vLLM's own again: its tensors are bound to the layers later.
            self._caches_seen = False
            self._stock = {name: getattr(self, name) for name in ("use_flattening", "scheduler_metadata_buffer")}
            self._always_ragged = _always_ragged(vllm_config)
            # Plans for any step: what a step uses is the beginning.
            rows, columns = ops.plan_shape(self.num_sms, len(self.decode_seq_lens_buffer))
            self._ragged_plans = torch.zeros(rows, columns, dtype=torch.int32, device=self.device)
            rows, columns = ops.plan_shape(self.num_sms)
            self._uniform_plan = self._ragged_plans.view(-1, columns)[:rows]
            why = seams.stock_topk_reason(vllm_config)
            logger().info_once("MQA SM90: the top-k of decode steps is %s%s", steps.selection, f": {why}" if why else "")
            cut = f", in groups of {self._max_rows} rows" if next_n > self._max_rows else ""
            logger().info_once(
                "MQA SM90: num_speculative_tokens=%d decodes natively (next_n=%d, no flattening)%s", next_n - 1, next_n, cut
            )

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            if self.refusal is None and not self._caches_seen:
                self._look_at_caches()
            if self.refusal is not None:
                return super().build(common_prefix_len, common_attn_metadata, fast_build)
            self._choose_path(common_attn_metadata)
            self._query_start_loc = common_attn_metadata.query_start_loc
            with wrappers.as_builder(self):
                metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            if metadata.num_decode_tokens == 0:
                # Requests without query tokens alone: for them vLLM's op would score, and overwrite the choice
                # of, the first row of the buffer, which is a prefill's.
                metadata.num_decodes, metadata.decode = 0, None
            return metadata

        def _look_at_caches(self) -> None:
            """Before the first launch: leaves the steps to vLLM if the kernel cannot read the layers' caches."""
            try:
                caches = seams.kv_caches(self.vllm_config, self.layer_names)
                if not all(cache.numel() for cache in caches):
                    return  # a build before vLLM has bound them
                for cache in caches:
                    ops.check_kv_cache(cache)
            except Exception as error:  # layers unlike those of known releases must not stop vLLM
                self.refusal = f"the kernel cannot read its cache: {error}"
                for name, value in self._stock.items():
                    setattr(self, name, value)
                _refuse(self.refusal)
            self._caches_seen = True

        def _choose_path(self, step: Any) -> None:
            """Whether a step is ragged, and which of vLLM's paths leads to it.

            The native one is for uniform steps: of others, all requests after the first ones of equal length go through
            the prefill logits, which gather their whole contexts. So ragged steps take the flattening one, which asks
            nothing of a step; and, to be done sooner, those whose requests all decode equally many tokens.
            """
            starts, each = step.query_start_loc_cpu.numpy(), step.max_query_len
            if starts[-1] == step.num_actual_tokens == step.num_reqs * each:  # all bring the most that any does
                self._ragged = self._always_ragged
                self.use_flattening = self._ragged or 1 < each <= self.num_speculative_tokens + 1
            else:
                self.use_flattening = self._ragged = self._always_ragged or self._is_ragged(step, starts)

        def _is_ragged(self, step: Any, starts: np.ndarray) -> bool:
            """Whether a step's decode requests, which come first, bring unequal numbers of query tokens.

            Requests without any after the last one with some are a CUDA graph's padding: in a uniform step
            they have rows like the others, and in one whose rows are padded otherwise, which is ragged, none.
            """
            counts = starts[1:] - starts[:-1]
            longer = counts > self.num_speculative_tokens + 1
            decodes, tokens = len(counts), step.num_actual_tokens
            first_prefill = int(longer.argmax())
            if longer[first_prefill]:
                decodes, tokens = first_prefill, int(starts[first_prefill])
            if tokens == 0:
                return False
            each, own = int(counts[0]), int(starts[decodes])
            if decodes * each != tokens or own % each:
                return True
            return not np.all(counts[: own // each] == each)

        def _prepare_decode_tensors(
            self,
            seq_lens: torch.Tensor,
            block_table: torch.Tensor,
            decode_lens: torch.Tensor,
            decode_lens_cpu: torch.Tensor,
            query_start_loc: torch.Tensor,
            num_decodes: int,
            num_decode_tokens: int,
            use_native: bool,
            next_n: int,
            max_decode_len: int,
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, bool]:
            """Lengths by row, in one launch, and the block table by request, as it is.

            Of a uniform step `[B, max_decode_len]`, as vLLM makes them in several launches. Of a ragged one `[T]`: what
            says which rows are a request's is on the device, and a CUDA graph's steps may differ in it. No length is
            negative, as the top-k kernels after ours read them as unsigned.
            """
            if self.refusal is None:
                use_native = not self._ragged
            if self.refusal is not None or (use_native and next_n == 1):
                return super()._prepare_decode_tensors(
                    seq_lens=seq_lens,
                    block_table=block_table,
                    decode_lens=decode_lens,
                    decode_lens_cpu=decode_lens_cpu,
                    query_start_loc=query_start_loc,
                    num_decodes=num_decodes,
                    num_decode_tokens=num_decode_tokens,
                    use_native=use_native,
                    next_n=next_n,
                    max_decode_len=max_decode_len,
                )
            self._query_start_loc = self._query_start_loc[: num_decodes + 1]
            # All of the buffer: a CUDA graph may have more rows than this step, and these must have no tokens.
            ops.row_context_lens(seq_lens, self._query_start_loc, out=self.decode_seq_lens_buffer)
            if use_native:
                row_lens = self.decode_seq_lens_buffer[: num_decodes * max_decode_len]
                return row_lens.view(num_decodes, max_decode_len), block_table, decode_lens, num_decodes, False
            row_lens = self.decode_seq_lens_buffer[:num_decode_tokens]
            if divides_by_request and self.compress_ratio > 1 and max_decode_len <= 1:
                # As many as there are requests are divided, into a buffer that has 0 for the rest: a row each, if that.
                row_lens = self.decode_seq_lens_buffer[:num_decodes]
            one_each = self.decode_lens_buffer[:num_decode_tokens].fill_(1)
            return row_lens, block_table, one_each, num_decode_tokens, False

        def update_draft_decode_metadata(self, metadata: Any) -> None:
            decode = metadata.decode
            if self.refusal is not None or decode is None:
                return super().update_draft_decode_metadata(metadata)
            # Whatever was built since: this step's kind, and a row for each request.
            self._ragged = ops.is_ragged(decode.schedule_metadata)
            self._query_start_loc = self.arange_buffer[: metadata.num_decode_tokens + 1]
            with wrappers.as_builder(self):
                return super().update_draft_decode_metadata(metadata)

        def plan(self, context_lens: torch.Tensor) -> torch.Tensor:
            """The plan for lengths `[B, next_n]`, of a ragged step `[T, 1]`.

            It becomes vLLM's schedule buffer, so that vLLM's copy into that has nothing to do. And it is a padded one:
            vLLM may replay a CUDA graph that was captured for more rows (drafts of varying number, from 0.29 on), or
            for a uniform step that has no token now (an empty micro-batch, from 0.30 on).
            """
            k = wrappers.steps.selection.left_out
            if self._ragged:
                rows = ops.plan_shape(self.num_sms, len(context_lens))[0]
                self.scheduler_metadata_buffer = plan = self._ragged_plans[:rows]
                grouping = {"query_start_loc": self._query_start_loc, "max_rows": self._max_rows}
                return ops.plan(context_lens.view(-1), padded=True, k=k, **grouping, out=plan)
            self.scheduler_metadata_buffer = plan = self._uniform_plan
            if context_lens.shape[1] == 0:  # requests without query tokens alone
                context_lens = context_lens.view(0, 1)
            return ops.plan_anew(context_lens, plan, k)

    class MqaSm90IndexerBackend(stock_backend):
        """vLLM's backend with our builder. It keeps vLLM's name, by which vLLM picks warm-ups."""

        @staticmethod
        def get_builder_cls() -> type:
            return MqaSm90IndexerMetadataBuilder

    return MqaSm90IndexerBackend


def _adapts(vllm_config: Any) -> bool:
    """Whether vLLM trims the requests' query lengths on the device, and captures CUDA graphs for any of them."""
    return getattr(vllm_config.speculative_config, "enable_adaptive_verification", False)


def _always_ragged(vllm_config: Any) -> bool:
    """Whether every step is a ragged one: also where a uniform step's groups would be wider than the kernel's."""
    return _adapts(vllm_config) or seams.speculative_tokens(vllm_config) + 1 > ops.MAX_NEXT_N


def _refuse(reason: str) -> None:
    message = "this model's sparse indexer keeps vLLM's own decode path: " + reason
    if mode() == "require":
        raise RuntimeError(f"MQA_SM90=require, but {message}")
    logger().warning_once("MQA SM90: %s", message)


_WRAPPERS = {
    "get_paged_mqa_logits_metadata": wrappers.schedule,
    "_supports_native_decode": wrappers.native_gate,
    "fp8_fp4_paged_mqa_logits": wrappers.logits,
    "get_indexer_topk": wrappers.topk,
}
"""By the name that is replaced, in whichever module."""


def replacements() -> dict[str, Any]:
    """What goes in the place of each replaced seam."""
    made: dict[str, Any] = {seams.BUILDER_OF_BACKEND: staticmethod(make_backend().get_builder_cls)}
    return made | _wrapped(seams.applying(seams.release()))


def _replace_in(op: str) -> None:
    """In the module of a model's own op, once; `seams.OP` is replaced when the plugin is registered."""
    if op not in wrappers.steps.ops:
        seams.replace(_wrapped(seams.OP_SEAMS.get(op, ())))
        wrappers.steps.ops.add(op)


def _wrapped(found: Iterable[seams.Seam]) -> dict[str, Any]:
    named = {seam.path: _WRAPPERS.get(seam.path.partition(":")[2]) for seam in found}
    return {path: wrapper(seams.resolve(path)) for path, wrapper in named.items() if wrapper}


def report() -> dict[str, Any]:
    """What runs on our kernel in this process; JSON-able. Reading `launches` synchronises with the GPU.

    `taken_over`, else the `reason`; `layers`: names of the indexer caches with native builders;
    `builders`: how many; `num_speculative_tokens`; `topk`: tokens that our top-k selects, 0 where vLLM's does; `launches`:
    of the logits kernel, by next_n; `versions`.
    """
    native = [builder for builder in _builders if builder.refusal is None]
    refusals = [builder.refusal for builder in _builders if builder.refusal is not None]
    reason = None
    if not native:
        reason = outcome["reason"] or next(iter(refusals), "vLLM has built no metadata builder of a sparse indexer")
    return {
        "taken_over": bool(native),
        "reason": reason,
        "layers": sorted({name for builder in native for name in builder.layer_names}),
        "builders": len(native),
        "num_speculative_tokens": max((builder.num_speculative_tokens for builder in native), default=None),
        "topk": wrappers.steps.selection.k if native else 0,
        "launches": {str(next_n): count for next_n, count in ops.launch_counts().items()} if native else {},
        "versions": {"vllm_mqa_sm90": machine.version(), "vllm": seams.vllm_version(), "torch": str(torch.__version__)},
    }


class WorkerExtension:
    """For `--worker-extension-cls vllm_mqa_sm90.backend.WorkerExtension`: asks each worker over `collective_rpc`."""

    def mqa_sm90_report(self) -> dict[str, Any]:
        """`report()` of this worker's process."""
        return report()
