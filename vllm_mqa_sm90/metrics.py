# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server's /metrics say, in the names of vLLM 0.26 and 0.33."""

from __future__ import annotations

import re
from collections import Counter

_POSITION = re.compile(r'position="(\d+)"')


def samples(metrics: str, name: str) -> list[tuple[str, float]]:
    """Labels and value of each sample of a counter or gauge; a counter's `_total` is left off `name`."""
    pattern = rf"^{re.escape(name)}(?:_total)?(?:\{{(.*)\}})? (\S+)$"
    return [(match[1] or "", float(match[2])) for match in re.finditer(pattern, metrics, re.MULTILINE)]


def total(metrics: str, name: str) -> float:
    """Sum over all engines; 0 for a name that is not there."""
    return sum(value for _, value in samples(metrics, name))


def acceptance(metrics: str) -> list[float]:
    """Share of drafts accepted at least up to each position, over all engines; empty on a server without drafts."""
    drafts = total(metrics, "vllm:spec_decode_num_drafts")
    accepted: Counter[int] = Counter()
    for labels, value in samples(metrics, "vllm:spec_decode_num_accepted_tokens_per_pos"):
        accepted[int(_POSITION.search(labels)[1])] += value
    return [accepted[position] / drafts for position in sorted(accepted)] if drafts else []
