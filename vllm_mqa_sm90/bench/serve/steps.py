# SPDX-License-Identifier: Apache-2.0
"""Decode steps of a run of `vllm bench serve`, by the messages of its streams."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any


def full_steps_ms(client: dict[str, Any], concurrency: int) -> list[float]:
    """Milliseconds from one message of a stream to the next, in the time in which at least `concurrency` streams are under way.

    Requests come to decode one after the other, as the server tokenizes each, and end like that: the steps before and after
    have fewer rows.

    client: what `vllm bench serve --save-detailed` wrote: of each request `start_times` and `ttfts`, and `itls`, a list, in
        seconds.
    """
    requests = zip(client["start_times"], client["ttfts"], client["itls"], strict=True)
    streams = [list(accumulate(gaps, initial=start + first)) for start, first, gaps in requests]
    # At the same time an end comes before a beginning.
    edges = sorted(edge for times in streams for edge in ((times[0], 1), (times[-1], -1)))
    under_way = accumulate(change for _, change in edges)
    spans = zip(pairwise(time for time, _ in edges), under_way, strict=False)
    full = _joined(span for span, count in spans if count >= concurrency)
    return [
        1e3 * (end - begin)
        for times in streams
        for begin, end in pairwise(times)
        if any(first <= begin and end <= last for first, last in full)
    ]


def _joined(spans: Any) -> Sequence[tuple[float, float]]:
    """Spans in order, each with those that begin where it ends."""
    joined: list[tuple[float, float]] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined
