# SPDX-License-Identifier: Apache-2.0
"""A worker extension that runs DeepGEMM beside our kernel, on the same inputs, in each decode step of a server, and
torch.topk beside our top-k, on the logits that it selects from.

`--worker-extension-cls comparing_worker.Extension`; for eager servers, as nothing here may run in a CUDA graph.
"""

import dataclasses
import functools
import json
from typing import Any

import selections
import torch

from vllm_mqa_sm90 import ops, seams, wrappers
from vllm_mqa_sm90.backend import WorkerExtension

TOP_K = 2048
"""Tokens that the indexer keeps: index_topk of the checkpoint."""
FEW = 64
"""Tokens of a row, at most, whose logits are compared by their parts' magnitudes."""


@dataclasses.dataclass
class Agreement:
    """Of rows of logits with theirs. A NaN anywhere stays one.

    Attributes:
        rows: compared.
        difference: largest |ours - theirs| / |theirs| (2-norms) of a row; where it has few tokens, over what theirs would be
            if no head's part were negative: of a few logits all may be next to nothing.
        gap: of the tokens that only one side keeps, the farthest from the last that they keep, in
            standard deviations of the row's logits; 0 where both keep the same.
    """

    rows: int = 0
    difference: float = 0.0
    gap: float = 0.0

    def add(self, ours: torch.Tensor, theirs: torch.Tensor, magnitudes: torch.Tensor | None = None) -> None:
        """One row, cut to its context's length; `magnitudes`: of few tokens, their logits by weights that are not negative."""
        ours, theirs = ours.double(), theirs.double()
        self.rows += 1
        scale = (theirs if magnitudes is None else magnitudes.double()).norm()
        self.difference = _larger(self.difference, (ours - theirs).norm() / scale)
        if len(theirs) > TOP_K:
            last = theirs.topk(TOP_K).values[-1]
            kept_once = _kept(ours) ^ _kept(theirs)
            gaps = (theirs[kept_once] - last).abs() / theirs.std()
            self.gap = _larger(self.gap, gaps.max() if len(gaps) else torch.tensor(0.0))


def _larger(value: float, other: torch.Tensor) -> float:
    return torch.maximum(torch.tensor(value, dtype=torch.float64), other.double().cpu()).item()  # keeps NaN


def _kept(row: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(row, dtype=torch.bool).index_fill_(0, row.topk(TOP_K).indices, True)


@dataclasses.dataclass
class Selections:
    """Of rows of indices, in each layer and step, with those of torch.topk, ties to the lower index.

    Attributes:
        rows: compared.
        chosen: of them, those with more tokens than are selected.
        different: of them, those whose indices, in ascending order, are not torch.topk's.
        stock: rows that were left to vLLM's top-k.
    """

    rows: int = 0
    chosen: int = 0
    different: int = 0
    stock: int = 0

    def add(self, logits: torch.Tensor, lens: torch.Tensor, k: int, indices: torch.Tensor) -> None:
        """float32 `[T, W]`, int32 with T elements, and `[T, k]`."""
        self.rows += len(indices)
        self.chosen += int((lens > k).sum())
        self.different += int((indices != selections.expected(logits, lens, k)).any(dim=1).sum())


_agreements: dict[str, Agreement] = {}
_selections: dict[str, Selections] = {}
_steps = {"ragged": 0}


class Extension(WorkerExtension):
    def mqa_sm90_start_comparing(self) -> None:
        """From the next step on."""
        start_comparing()

    def mqa_sm90_comparison(self) -> str:
        """JSON: `ragged`, the batches whose decoding requests had unequal numbers of query tokens; `agreements`, of
        the rows by `next_n/above` and `next_n/below`: contexts longer than `TOP_K`, and others; in place of next_n,
        "ragged" where the plan is. `selections`: of the rows by the op's next_n, which is 1 where the plan is ragged."""
        found = {"agreements": _agreements, "selections": _selections}
        return json.dumps(_steps | {name: {key: dataclasses.asdict(rows) for key, rows in by.items()} for name, by in found.items()})

    def mqa_sm90_order_merged(self) -> None:
        """Under decode context parallelism: attention sums over a row's tokens in ascending order. vLLM's merge of what the
        ranks choose leaves the order to chance, and a server, stock or not, need not repeat its own tokens."""
        merge = f"{seams.OP}:_merge_dcp_topk_global"
        seams.replace({merge: ordering(seams.resolve(merge))})


@functools.cache  # once
def start_comparing() -> None:
    for op in wrappers.steps.ops:
        logits, topk = f"{op}:fp8_fp4_paged_mqa_logits", f"{op}:get_indexer_topk"
        seams.replace({logits: comparing(seams.resolve(logits))})
        if seams.hands_over_topk():
            seams.replace({topk: checking(seams.resolve(topk))})
    builder = seams.resolve(seams.STOCK_BUILDER)
    builder.build = counting_ragged(builder.build)


def comparing(ours: Any) -> Any:
    """Our function in the place of DeepGEMM's, which also calls what it replaced, a request for each row."""
    from vllm.utils import deep_gemm

    @functools.wraps(ours)
    def both(q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len, **options):
        assert schedule_metadata.shape[1] in (ops.UNIFORM_PLAN_COLUMNS, ops.RAGGED_PLAN_COLUMNS), "this step is not for our kernel"
        arguments = (kv_cache, weights, context_lens, block_tables, schedule_metadata)
        result = ours(q, *arguments, max_model_len=max_model_len, **options)
        next_n = "ragged" if ops.is_ragged(schedule_metadata) else context_lens.shape[1]
        lengths = context_lens.view(-1, 1)
        num_sms = torch.cuda.get_device_properties(kv_cache.device).multi_processor_count
        requests = requests_of_rows(schedule_metadata, num_sms, context_lens)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, kv_cache.shape[1], num_sms)

        def theirs(weights: torch.Tensor) -> torch.Tensor:
            rows = (q[0].reshape(len(lengths), 1, *q[0].shape[-2:]), None), kv_cache, weights, lengths, block_tables[requests]
            return ours.__wrapped__(*rows, schedule, max_model_len=max_model_len, **options)

        expected, magnitudes = theirs(weights), None
        of_rows = lengths.flatten().tolist()
        for first, count, _ in groups(schedule_metadata, num_sms, context_lens):
            if max(of_rows[first : first + count]) <= wrappers.steps.selection.left_out:
                continue
            for row in range(first, first + count):
                if (length := of_rows[row]) > 0:
                    key = f"{next_n}/{'above' if length > TOP_K else 'below'}"
                    if length <= FEW and magnitudes is None:
                        magnitudes = theirs(weights.abs())
                    scale = magnitudes[row, :length] if length <= FEW else None
                    _agreements.setdefault(key, Agreement()).add(result[row, :length], expected[row, :length], scale)
        return result

    return both


def groups(plan: torch.Tensor, num_sms: int, context_lens: torch.Tensor | None = None) -> list[list[int]]:
    """First row, number of rows, and row of the block table of each of a step's groups; of a uniform one by its lengths."""
    if not ops.is_ragged(plan):
        requests, next_n = context_lens.shape
        return [[request * next_n, next_n, request] for request in range(requests)]
    table = plan.view(-1, 4)[ops.plan_shape(num_sms)[0] :].tolist()
    return [group[:3] for group in table if group[1]]


def requests_of_rows(plan: torch.Tensor, num_sms: int, context_lens: torch.Tensor) -> torch.Tensor:
    """Row of the block table for each of a step's rows; padding rows have the first."""
    requests = torch.zeros(context_lens.numel(), dtype=torch.int64, device=plan.device)
    for first, count, request in groups(plan, num_sms, context_lens):
        requests[first : first + count] = request
    return requests


def checking(ours: Any) -> Any:
    """Our `get_indexer_topk`, each of whose selections is held against that of torch.topk."""

    @functools.wraps(ours)
    def get_indexer_topk(backend: str) -> Any:
        select = ours(backend)

        def both(logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len):
            found = _selections.setdefault(str(next_n), Selections())
            select(logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len)
            if getattr(logits, wrappers.MARK, seams.Selection()).k == topk_tokens:
                found.add(logits, seq_lens.view(-1), topk_tokens, topk_indices)
            else:
                found.stock += len(logits)

        return both

    return get_indexer_topk


def ordering(merge: Any) -> Any:
    """A function that writes tokens and -1 into its second argument, with the tokens of each row sorted, before the -1."""

    @functools.wraps(merge)
    def ordered(logits, topk_indices, *arguments, **options):
        merge(logits, topk_indices, *arguments, **options)
        none = torch.iinfo(topk_indices.dtype).max
        tokens = topk_indices.masked_fill(topk_indices < 0, none).sort(dim=1).values
        topk_indices.copy_(tokens.masked_fill(tokens == none, -1))

    return ordered


def counting_ragged(stock: Any) -> Any:
    @functools.wraps(stock)
    def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        _steps["ragged"] += brings_unequal(self, common_attn_metadata)
        return stock(self, common_prefix_len, common_attn_metadata, *args, **kwargs)

    return build


def brings_unequal(builder: Any, common_attn_metadata: Any) -> bool:
    """Whether a step's decoding requests have unequal numbers of query tokens."""
    query_lens = common_attn_metadata.query_start_loc_cpu.diff()
    decoding = query_lens[(query_lens > 0) & (query_lens <= builder.num_speculative_tokens + 1)]
    return len(decoding.unique()) > 1
