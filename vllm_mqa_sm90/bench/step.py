# SPDX-License-Identifier: Apache-2.0
"""The decode steps to be timed: their shapes, the bytes they must move, and their tensors."""

import re
from dataclasses import dataclass

import torch

from vllm_mqa_sm90 import HEAD_DIM, reference
from vllm_mqa_sm90.ops import TOKEN_BYTES

COLD_BYTES = 300_000_000
"""Pages that calls in turn read before any is read again: six times the 50 MB of L2 of an H100 or H200."""

_RAGGED = (0.3, 1.7)  # shares of the nominal context
_SEED = 0
_PAGES_AT_ONCE = 8192  # made at once, so that their float32 values take at most 256 MB
_CHECKED_REQUESTS = 8


@dataclass(frozen=True)
class Shape:
    """Requests of a step, and the tokens each sees: all `context`, or ragged around it."""

    batch: int
    context: int
    ragged: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From `BxL` or `BxL:ragged`; ValueError for anything else."""
        match = re.fullmatch(r"(\d+)x(\d+)(:ragged)?", text, re.ASCII)
        if match is None or not int(match[1]) or not int(match[2]):
            raise ValueError(f"expected BATCHxCONTEXT or BATCHxCONTEXT:ragged, both at least 1, given {text!r}")
        return cls(int(match[1]), int(match[2]), match[3] is not None)

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}{':ragged' if self.ragged else ''}"

    def contexts(self) -> list[int]:
        """Tokens that the last row of each request sees: the same in every run and for every next_n."""
        if not self.ragged:
            return [self.context] * self.batch
        low, high = _RAGGED
        shares = torch.rand(self.batch, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
        return [max(1, int(self.context * (low + (high - low) * share))) for share in shares.tolist()]


def row_lengths(contexts: list[int], next_n: int) -> list[list[int]]:
    """Tokens that each row sees, `[B][next_n]`: a request's rows see one token more each."""
    return [[max(context - next_n + 1 + row, 0) for row in range(next_n)] for context in contexts]


def floor_bytes(shape: Shape, next_n: int, heads: int) -> int:
    """Bytes that a step must move: cached tokens read once, queries and weights read, logits written."""
    contexts = shape.contexts()
    cache = sum(contexts) * TOKEN_BYTES
    queries_and_weights = shape.batch * next_n * heads * (HEAD_DIM + 4)
    logits = sum(map(sum, row_lengths(contexts, next_n))) * 4
    return cache + queries_and_weights + logits


@dataclass(frozen=True)
class Step:
    """One step's arguments, as `vllm_mqa_sm90.paged_mqa_logits` takes them, with several copies of its pages.

    Attributes:
        q: float8_e4m3fn `[B, next_n, H, 128]`.
        kv_cache: uint8 `[pages, page, 1, 132]`.
        weights: float32 `[B * next_n, H]`.
        context_lens: int32 `[B, next_n]`.
        block_tables: int32 `[B, max_pages]` each; each names pages of its own, at least `COLD_BYTES` of them in all.
        max_context_len: the longest context.
    """

    q: torch.Tensor
    kv_cache: torch.Tensor
    weights: torch.Tensor
    context_lens: torch.Tensor
    block_tables: list[torch.Tensor]
    max_context_len: int

    def relative_error(self, logits: torch.Tensor) -> float:
        """Relative error, in norm, of logits `[T, max_context_len or more]` computed with the first block table.

        Against the FP32 reference, on the requests first, last, shortest, longest and some between.
        NaN if a logit within its context is.
        """
        requests = self._checked_requests()
        groups, next_n, heads, _ = self.q.shape
        expected = reference.paged_mqa_logits(
            self.q.view(torch.uint8)[requests].view(self.q.dtype),  # not every PyTorch gathers FP8
            self.kv_cache,
            self.weights.view(groups, next_n, heads)[requests].view(-1, heads),
            self.context_lens[requests],
            self.block_tables[0][requests],
            max_context_len=self.max_context_len,
        )
        given = logits[:, : self.max_context_len].unflatten(0, (groups, next_n))[requests].flatten(0, 1)
        valid = expected > -torch.inf
        expected, given = expected[valid].double(), given[valid].double()
        return float((given - expected).norm() / expected.norm())

    def _checked_requests(self) -> torch.Tensor:
        longest_rows = self.context_lens.amax(dim=1)
        spread = torch.linspace(0, len(longest_rows) - 1, _CHECKED_REQUESTS, device=longest_rows.device).long()
        extremes = torch.stack([longest_rows.argmin(), longest_rows.argmax()])
        return torch.cat([spread, extremes]).unique()


def make_step(shape: Shape, next_n: int, heads: int, page: int, device: torch.device) -> Step:
    """A step of random values on `device`. A shape's contexts, pages and block tables are the same for every next_n."""
    generator = torch.Generator(device).manual_seed(_SEED)
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

    q = torch.randn(shape.batch, next_n, heads, HEAD_DIM, generator=generator, device=device)
    return Step(
        q=q.to(torch.float8_e4m3fn),
        kv_cache=kv_cache.view(-1, page, 1, TOKEN_BYTES),
        weights=torch.randn(shape.batch * next_n, heads, generator=generator, device=device),
        context_lens=torch.tensor(row_lengths(contexts, next_n), dtype=torch.int32, device=device),
        block_tables=block_tables,
        max_context_len=max(contexts),
    )
