# SPDX-License-Identifier: Apache-2.0
"""Decode steps of a run of `vllm bench serve`, by the messages of its streams."""

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
    edges = [edge for times in streams for edge in ((times[0], 1), (times[-1], -1))]
    under_way, full = 0, []
    # At the same time beginnings come first: no step is cut where a stream follows another.
    for time, change in sorted(edges, key=lambda edge: (edge[0], -edge[1])):
        under_way += change
        if change > 0 and under_way == concurrency:
            begin = time
        elif change < 0 and under_way == concurrency - 1:
            full.append((begin, time))
    return [
        1e3 * (end - begin)
        for times in streams
        for begin, end in pairwise(times)
        if any(first <= begin and end <= last for first, last in full)
    ]
