# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server's /metrics say, in the names of vLLM 0.26 and 0.33."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_POSITION = re.compile(r'position="(\d+)"')


def samples(metrics: str, name: str) -> list[tuple[str, float]]:
    """Labels and value of each sample of a counter or gauge; a counter's `_total` is left off `name`."""
    pattern = rf"^{re.escape(name)}(?:_total)?(?:\{{(.*)\}})? (\S+)$"
    return [(match[1] or "", float(match[2])) for match in re.finditer(pattern, metrics, re.MULTILINE)]


def total(metrics: str, name: str) -> float:
    """Sum over all engines; 0 for a name that is not there."""
    return sum(value for _, value in samples(metrics, name))


@dataclass(frozen=True)
class Drafts:
    """Speculative decoding so far, summed over all engines.

    Attributes:
        count: times that a request drafted.
        tokens: draft tokens proposed.
        accepted: draft tokens accepted, by position.
    """

    count: float
    tokens: float
    accepted: tuple[float, ...]

    @classmethod
    def read(cls, metrics: str) -> Drafts:
        """From the text of /metrics; all zero on a server that does not draft."""
        accepted: Counter[int] = Counter()
        for labels, value in samples(metrics, "vllm:spec_decode_num_accepted_tokens_per_pos"):
            accepted[int(_POSITION.search(labels)[1])] += value
        return cls(
            total(metrics, "vllm:spec_decode_num_drafts"),
            total(metrics, "vllm:spec_decode_num_draft_tokens"),
            tuple(accepted[position] for position in sorted(accepted)),
        )

    def since(self, before: Drafts) -> Drafts:
        """What came after `before`, of the same server."""
        earlier = before.accepted or (0.0,) * len(self.accepted)
        return Drafts(
            self.count - before.count,
            self.tokens - before.tokens,
            tuple(now - then for now, then in zip(self.accepted, earlier, strict=True)),
        )

    @property
    def rates(self) -> list[float]:
        """Share of drafts accepted at least up to each position. Empty: no draft."""
        return [accepted / self.count for accepted in self.accepted] if self.count else []

    @property
    def rate(self) -> float | None:
        """Share of all draft tokens that were accepted; None: no draft."""
        return sum(self.accepted) / self.tokens if self.tokens else None
