# SPDX-License-Identifier: Apache-2.0
"""The decode steps to be timed: the bytes they must move, and their tensors."""

import itertools
from dataclasses import dataclass

import torch

import vllm_mqa_sm90
from vllm_mqa_sm90 import HEAD_DIM, reference
from vllm_mqa_sm90.bench.kernel import SEED, Shape
from vllm_mqa_sm90.sizes import TOKEN_BYTES

COLD_BYTES = 300_000_000
"""Pages that calls in turn read before any is read again: six times the 50 MB of L2 of an H100 or H200."""

_PAGES_AT_ONCE = 8192  # made at once, so that their float32 values take at most 256 MB


def row_lengths(contexts: list[int], rows: list[int]) -> list[list[int]]:
    """Tokens that each row of each request sees: one more than the row before."""
    return [
        [max(context - count + 1 + row, 0) for row in range(count)]
        for context, count in zip(contexts, rows, strict=True)
    ]


def floor_bytes(shape: Shape, next_n: int, heads: int) -> int:
    """Bytes that a step must move: cached tokens read once, queries and weights read, logits written."""
    contexts, rows = shape.contexts(), shape.rows(next_n)
    cache = sum(contexts) * TOKEN_BYTES
    queries_and_weights = sum(rows) * heads * (HEAD_DIM + 4)
    logits = sum(map(sum, row_lengths(contexts, rows))) * 4
    return cache + queries_and_weights + logits


@dataclass(frozen=True)
class Step:
    """One step's arguments, as `vllm_mqa_sm90.paged_mqa_logits` takes them, with several copies of its pages.

    Attributes:
        q: float8_e4m3fn `[B, next_n, H, 128]`, of a mixed shape `[T, H, 128]`.
        kv_cache: uint8 `[pages, page, 1, 132]`.
        weights: float32 `[T, H]`.
        context_lens: int32 `[B, next_n]`, of a mixed shape `[T]`.
        block_tables: int32 `[B, max_pages]` each; each names pages of its own, at least `COLD_BYTES` of them in all.
        max_context_len: the longest context.
        query_start_loc: int32 `[B + 1]`: first row of each request, and the last one's end.
        max_rows: of a mixed shape's requests, at most; else None.
    """

    q: torch.Tensor
    kv_cache: torch.Tensor
    weights: torch.Tensor
    context_lens: torch.Tensor
    block_tables: list[torch.Tensor]
    max_context_len: int
    query_start_loc: torch.Tensor
    max_rows: int | None

    @property
    def row_counts(self) -> torch.Tensor:
        """Query rows of each request, `[B]`."""
        return self.query_start_loc.diff()

    @property
    def grouping(self) -> dict[str, torch.Tensor]:
        """What groups the rows of a mixed step."""
        return {} if self.max_rows is None else {"query_start_loc": self.query_start_loc}

    def plan(self, **options: object) -> torch.Tensor:
        """`vllm_mqa_sm90.plan` for this step."""
        limit = {} if self.max_rows is None else {"max_rows": self.max_rows}
        return vllm_mqa_sm90.plan(self.context_lens, **self.grouping, **limit, **options)

    def relative_error(self, logits: torch.Tensor) -> float:
        """Relative error, in norm, of logits `[T, max_context_len or more]` computed with the first block table.

        Against the FP32 reference. NaN if a logit within its context is.
        """
        inputs = self.q, self.kv_cache, self.weights, self.context_lens, self.block_tables[0]
        limit = self.max_context_len
        expected = reference.paged_mqa_logits(*inputs, max_context_len=limit, **self.grouping)
        valid = expected > -torch.inf
        expected, given = expected[valid].double(), logits[:, :limit][valid].double()
        return float((given - expected).norm() / expected.norm())


def make_step(shape: Shape, next_n: int, heads: int, page: int, device: torch.device) -> Step:
    """A step of random values on `device`. A shape's contexts, pages and block tables are the same for every next_n."""
    generator = torch.Generator(device).manual_seed(SEED)
    contexts = shape.contexts()
    needed = [-(-context // page) for context in contexts]
    pages = sum(needed)
    copies = -(-COLD_BYTES // (pages * page * TOKEN_BYTES))
    kv_cache = torch.empty(copies * pages, page * TOKEN_BYTES, dtype=torch.uint8, device=device)
    for some in kv_cache.split(_PAGES_AT_ONCE):
        keys = torch.randn(len(some), page * HEAD_DIM, generator=generator, device=device)
        scales = torch.rand(len(some), page, generator=generator, device=device) * 0.02 + 0.01
        some[:, : page * HEAD_DIM] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
        some[:, page * HEAD_DIM :] = scales.view(torch.uint8)

    # Columns past a context name page 0. DeepGEMM may look at those of its last 256 tokens.
    columns = torch.arange(-(-max(needed) * page // 256) * 256 // page, device=device)
    used = columns < torch.tensor(needed, device=device).unsqueeze(1)
    block_tables = []
    for copy in range(copies):
        shuffled = torch.randperm(pages, generator=generator, device=device) + copy * pages
        block_table = torch.zeros(used.shape, dtype=torch.int32, device=device)
        block_table[used] = shuffled.int()
        block_tables.append(block_table)

    rows = shape.rows(next_n)
    starts = [0, *itertools.accumulate(rows)]
    lens = torch.tensor(sum(row_lengths(contexts, rows), []), dtype=torch.int32, device=device)
    q = torch.randn(starts[-1], heads, HEAD_DIM, generator=generator, device=device).to(torch.float8_e4m3fn)
    return Step(
        q=q if shape.mixed else q.view(shape.batch, next_n, heads, HEAD_DIM),
        kv_cache=kv_cache.view(-1, page, 1, TOKEN_BYTES),
        weights=torch.randn(starts[-1], heads, generator=generator, device=device),
        context_lens=lens if shape.mixed else lens.view(shape.batch, next_n),
        block_tables=block_tables,
        max_context_len=max(contexts),
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        max_rows=next_n if shape.mixed else None,
    )
