# SPDX-License-Identifier: Apache-2.0
"""Random decode steps for tests, built on the device that they run on."""

import dataclasses
from collections.abc import Sequence

import torch

import vllm_mqa_sm90
from vllm_mqa_sm90 import HEAD_DIM, reference
from vllm_mqa_sm90.ops import TOKEN_BYTES

NAN_BYTE = 0xFF  # NaN as FP8 E4M3, and four of them as FP32
TILE = 64  # tokens
POISON = float("nan")
TOLERANCE = 2e-4  # relative, in norm: the tensor core's own FP8 accumulation takes 1.3e-4 to 1.7e-4 of it
STALE_IDS = (-1, -(2**31), 2**31 - 1)  # never to be dereferenced


@dataclasses.dataclass
class Step:
    """The arguments of one call, but the plan."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    weights: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    max_context_len: int
    # Of a ragged step.
    indices: torch.Tensor | None = None
    query_start_loc: torch.Tensor | None = None
    max_rows: int | None = None

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.kv_cache, self.weights, self.context_lens, self.block_table

    def grouping(self) -> dict[str, torch.Tensor | None]:
        return {"indices": self.indices, "query_start_loc": self.query_start_loc}

    def take(self, other: "Step") -> None:
        """Copies the values of `other` into this step's tensors; the cache stays, and -1 fills up the block table."""
        for name in "q", "weights", "context_lens", "indices", "query_start_loc":
            if (mine := getattr(self, name)) is not None:
                mine.copy_(getattr(other, name))
        self.block_table.fill_(-1)
        self.block_table[:, : other.block_table.shape[1]] = other.block_table

    def plan(self, **options) -> torch.Tensor:
        return vllm_mqa_sm90.plan(self.context_lens, **self.grouping(), max_rows=self.max_rows, **options)

    def logits(self, plan: torch.Tensor, **options) -> torch.Tensor:
        return vllm_mqa_sm90.paged_mqa_logits(
            *self.inputs(), plan, max_context_len=self.max_context_len, max_rows=self.max_rows, **options
        )

    def run(self, *, num_sms: int | None = None, **options) -> torch.Tensor:
        return self.logits(self.plan(num_sms=num_sms), **options)

    def reference(self) -> torch.Tensor:
        return reference.paged_mqa_logits(*self.inputs(), max_context_len=self.max_context_len, **self.grouping())


def random_pages(num_pages: int, page: int, *, gap: int = 0, device: str = "cpu") -> torch.Tensor:
    """A cache `[num_pages, page, 1, 132]` whose pages lie `gap` bytes of NaN further apart than dense."""
    page_bytes = page * TOKEN_BYTES
    storage = torch.full((num_pages, page_bytes + gap), NAN_BYTE, dtype=torch.uint8, device=device)
    keys = torch.randn(num_pages, page * HEAD_DIM, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(num_pages, page, device=device) + 0.5
    storage[:, : page * HEAD_DIM] = keys.view(torch.uint8)
    storage[:, page * HEAD_DIM : page_bytes] = scales.view(torch.uint8)
    return storage[:, :page_bytes].unflatten(1, (page, 1, TOKEN_BYTES))


def random_step(
    context_lens: Sequence[Sequence[int]],
    *,
    heads: int = 64,
    page: int = 64,
    num_pages: int | None = None,
    gap: int = 0,
    device: str = "cpu",
    seed: int = 0,
) -> Step:
    """A step with the given lengths, one inner sequence for each request.

    Every request has pages of its own in shuffled order, and what follows its context in its last
    page is NaN; with `num_pages` requests draw from that many shared pages instead. The block
    table's entries past each context are stale ids.
    """
    torch.manual_seed(seed)
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    groups, next_n = lens.shape
    longest = lens.amax(dim=1).clamp(min=0).long()
    needed = -(-longest // page)
    width = max(int(needed.max()), 1) + 1
    columns = torch.arange(width, device=device)
    used = columns < needed.unsqueeze(1)
    stale = torch.tensor(STALE_IDS, dtype=torch.int32, device=device)
    block_table = stale[torch.randint(len(STALE_IDS), (groups, width), device=device)]
    if num_pages is None:
        total = int(needed.sum())
        kv_cache = random_pages(total + 1, page, gap=gap, device=device)
        block_table[used] = torch.randperm(total + 1, device=device)[:total].int()
        for group in torch.nonzero(longest % page).flatten().tolist():
            tail = int(longest[group]) % page
            last = kv_cache[block_table[group, needed[group] - 1].long()].view(-1)
            last[tail * HEAD_DIM : page * HEAD_DIM] = NAN_BYTE
            last[page * HEAD_DIM + tail * 4 :] = NAN_BYTE
    else:
        kv_cache = random_pages(num_pages, page, gap=gap, device=device)
        block_table[used] = torch.randint(num_pages, (int(used.sum()),), dtype=torch.int32, device=device)
    return Step(
        q=torch.randn(groups, next_n, heads, HEAD_DIM, device=device).to(torch.float8_e4m3fn),
        kv_cache=kv_cache,
        weights=torch.randn(groups * next_n, heads, device=device),
        context_lens=lens,
        block_table=block_table,
        max_context_len=max(int(longest.max()), 1),
    )


def random_ragged_step(
    requests: Sequence[Sequence[int]],
    *,
    by: str = "indices",
    max_rows: int | None = None,
    padding: int = 0,
    heads: int = 64,
    device: str = "cpu",
    seed: int = 0,
    **options,
) -> Step:
    """A ragged step with the given lengths, one inner sequence for each request, of any number of rows.

    By `indices` the requests have rows of the block table in shuffled order, and `padding` rows at the
    end have no length and stale indices. By `query_start_loc` padding rows have lengths that must not count.
    """
    whole = random_step([[max(lens, default=0)] for lens in requests], device=device, seed=seed, **options)
    lens = [length for of_request in requests for length in of_request]
    counts = torch.tensor([len(of_request) for of_request in requests])
    grouping, block_table = {}, whole.block_table
    if by == "indices":
        order = torch.randperm(len(requests))
        block_table = torch.empty_like(block_table)
        block_table[order.to(device)] = whole.block_table
        stale = torch.tensor(STALE_IDS, dtype=torch.int64)[torch.arange(padding) % len(STALE_IDS)]
        indices = torch.cat([order.repeat_interleave(counts), stale])
        grouping["indices"] = indices.to(device, torch.int32)
        lens += [0] * padding
    else:
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        grouping["query_start_loc"] = bounds.to(device, torch.int32)
        lens += [100] * padding
    rows = len(lens)
    return Step(
        q=torch.randn(rows, heads, HEAD_DIM, device=device).to(torch.float8_e4m3fn),
        kv_cache=whole.kv_cache,
        weights=torch.randn(rows, heads, device=device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_table=block_table,
        max_context_len=whole.max_context_len,
        max_rows=max_rows,
        **grouping,
    )


def entries(plan: torch.Tensor) -> torch.Tensor:
    """The plan as what it is in memory: entries of four int32."""
    return plan.view(-1, 4)


def group_table(plan: torch.Tensor, num_sms: int, rows: int) -> torch.Tensor:
    """A ragged plan's: an entry (first row, rows, request, 0) for each row of the step."""
    start = vllm_mqa_sm90.plan_shape(num_sms)[0]
    return entries(plan)[start : start + rows]


def poisoned(step: Step) -> torch.Tensor:
    return torch.full((step.context_lens.numel(), step.max_context_len), POISON, device=step.q.device)


def assert_accurate(given: torch.Tensor, step: Step) -> None:
    """Every logit within a context is right; one wrong logit in 10^7 fails the second bound."""
    expected = step.reference()
    valid = expected > -torch.inf
    expected, given = expected[valid].double(), given[valid].double()
    if not len(expected):
        return
    error = (given - expected).abs()
    norm, tolerance = float(expected.norm()), TOLERANCE
    if len(expected) < 1000:
        # They may happen to be small sums of large terms: what they are on average counts, with these random values.
        norm, tolerance = max(norm, (len(expected) * step.q.shape[-2] * 64) ** 0.5), 5 * TOLERANCE
    assert float(error.norm()) <= tolerance * norm
    assert float(error.max()) <= 1e-2 * norm / len(expected) ** 0.5
