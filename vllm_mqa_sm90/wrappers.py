# SPDX-License-Identifier: Apache-2.0
"""What goes in the place of vLLM's functions around the logits of a decode step.

Each wraps what it replaces, and calls that wherever a step is not ours. The schedule and its gate go by the builder
that builds now; the logits by the schedule that they are given, which is a plan or DeepGEMM's; the top-k by the logits
that it is given, which say whether they were made for it.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_mqa_sm90 import ops, seams

MARK = "mqa_sm90_selection"
"""Attribute of logits that our top-k may select from: their `seams.Selection`."""

building: ContextVar[Any] = ContextVar("mqa_sm90_building", default=None)
"""The builder (or builder class, where only the configuration is asked for) whose code runs now."""


@dataclass
class Steps:
    """What the steps of all our builders in this process have in common, as the op's calls name no builder.

    Attributes:
        max_rows: most query rows of a group.
        selection: whose the top-k is, and what the plans leave out.
        ops: modules of models' own ops that call our functions by now.
    """

    max_rows: int = 1
    selection: seams.Selection = seams.Selection()
    ops: set[str] = field(default_factory=set)


steps = Steps()


class as_builder:  # one of contextlib takes a microsecond more of each step
    """Schedules that are asked for meanwhile are that builder's; None: DeepGEMM's."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __enter__(self) -> None:
        self._token = building.set(self._builder)

    def __exit__(self, *_: object) -> None:
        building.reset(self._token)


def schedule(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Instead of DeepGEMM's schedule the plan of our builder, while one builds."""

    @functools.wraps(stock)
    def get_paged_mqa_logits_metadata(context_lens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        builder = building.get()
        return stock(context_lens, *args, **kwargs) if builder is None else builder.plan(context_lens)

    return get_paged_mqa_logits_metadata


def native_gate(stock: Callable[[int], bool]) -> Callable[[int], bool]:
    """Which numbers of query rows need no flattening: our kernel's, while our builder builds."""

    @functools.wraps(stock)
    def _supports_native_decode(next_n: int) -> bool:
        return stock(next_n) if building.get() is None else next_n <= ops.MAX_NEXT_N

    return _supports_native_decode


def logits(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Our logits where the schedule is a plan of ours, marked if the plan is for our top-k."""
    plan_columns = ops.UNIFORM_PLAN_COLUMNS, ops.RAGGED_PLAN_COLUMNS  # DeepGEMM's schedule has two

    @functools.wraps(stock)
    def fp8_fp4_paged_mqa_logits(
        q: tuple[torch.Tensor, torch.Tensor | None],
        kv_cache: torch.Tensor,
        weights: torch.Tensor,
        context_lens: torch.Tensor,
        block_tables: torch.Tensor,
        schedule_metadata: torch.Tensor,
        max_model_len: int,
        **options: Any,
    ) -> torch.Tensor:
        if schedule_metadata.shape[1] not in plan_columns:
            return stock(q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len, **options)
        ragged = ops.is_ragged(schedule_metadata)
        selection = steps.selection
        result = ops.paged_mqa_logits(
            q[0],
            kv_cache,
            weights,
            context_lens.view(-1) if ragged else context_lens,
            block_tables,
            schedule_metadata,
            max_context_len=max_model_len,
            max_rows=steps.max_rows if ragged else None,
            k=selection.left_out,
            clean_logits=options.get("clean_logits", False),
        )
        if selection.k:
            setattr(result, MARK, selection)
        return result

    return fp8_fp4_paged_mqa_logits


def topk(stock: Callable[[str], Callable[..., None]]) -> Callable[[str], Callable[..., None]]:
    """Our top-k where the user leaves the choice to vLLM; what the user has named stays."""

    @functools.cache
    @functools.wraps(stock)
    def get_indexer_topk(backend: str) -> Callable[..., None]:
        return _selecting(stock(backend)) if backend == "auto" else stock(backend)

    return get_indexer_topk


def _selecting(stock: Callable[..., None]) -> Callable[..., None]:
    def select(
        logits: torch.Tensor,
        seq_lens: torch.Tensor,
        next_n: int,
        topk_indices: torch.Tensor,
        topk_tokens: int,
        max_seq_len: int,
    ) -> None:
        """Writes the indices of each row's `topk_tokens` largest logits into `topk_indices`, int32 `[T, topk_tokens]`.

        Raises:
            RuntimeError: logits that a row of more than `topk_tokens` tokens needs were not computed.
        """
        made_for = getattr(logits, MARK, seams.Selection())
        if made_for.k == topk_tokens:
            ops.topk_indices(logits, seq_lens, topk_tokens, out=topk_indices)
        elif made_for.left_out <= topk_tokens:  # what was not computed is all kept, by vLLM's kernels too
            stock(logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len)
        else:
            raise RuntimeError(
                f"MQA SM90: topk_tokens: expected {made_for.k}, of the model's configuration, for which the "
                f"logits were computed, given {topk_tokens}: name vLLM's top-k with --sparse-indexer-topk-backend, "
                "or start the server with MQA_SM90=off"
            )

    return select
