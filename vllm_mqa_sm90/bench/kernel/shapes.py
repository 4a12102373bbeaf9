# SPDX-License-Identifier: Apache-2.0
"""Shapes of the decode steps to be timed."""

import re
from dataclasses import dataclass

SEED = 0
_RAGGED = (0.3, 1.7)  # shares of the nominal context


@dataclass(frozen=True)
class Shape:
    """Requests of a step, the tokens each sees, and its query rows.

    Attributes:
        ragged: contexts are 0.3 to 1.7 times `context`; else all have that.
        mixed: requests bring 1 to next_n rows, and the step is a ragged one; else all bring next_n.
    """

    batch: int
    context: int
    ragged: bool = False
    mixed: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From `BxL`, and `:ragged` and `:mixed` after it; ValueError for anything else."""
        match = re.fullmatch(r"(\d+)x(\d+)(:ragged)?(:mixed)?", text, re.ASCII)
        if match is None or not int(match[1]) or not int(match[2]):
            raise ValueError(f"expected BATCHxCONTEXT[:ragged][:mixed], both at least 1, given {text!r}")
        return cls(int(match[1]), int(match[2]), match[3] is not None, match[4] is not None)

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}{':ragged' if self.ragged else ''}{':mixed' if self.mixed else ''}"

    def contexts(self) -> list[int]:
        """Tokens that the last row of each request sees: the same in every run and for every next_n."""
        if not self.ragged:
            return [self.context] * self.batch
        import torch

        low, high = _RAGGED
        shares = torch.rand(self.batch, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        return [max(1, int(self.context * (low + (high - low) * share))) for share in shares.tolist()]

    def rows(self, next_n: int) -> list[int]:
        """Query rows of each request: the same in every run."""
        if not self.mixed:
            return [next_n] * self.batch
        import torch

        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(1, next_n + 1, (self.batch,), generator=generator).tolist()
