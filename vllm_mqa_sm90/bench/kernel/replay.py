# SPDX-License-Identifier: Apache-2.0
"""Times of calls in a CUDA graph."""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch


class Replayed:
    """A CUDA graph of calls, whose tensors it keeps.

    Before, each call runs once: what a library compiles or allocates at first use is done then.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], replays: int) -> None:
        self._calls, self._stream = calls, torch.cuda.Stream()
        self._ends = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for call in calls:
                call()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                for call in calls:
                    call()

    def us(self) -> float:
        """Microseconds that one of the calls takes on the GPU, back to back with the others: the median over the replays.

        These are queued at once, so the GPU does not wait for the host between them. The host waits for their stream alone.
        """
        with torch.cuda.stream(self._stream):
            for end in self._ends:  # the first replay only warms up
                self._graph.replay()
                end.record()
        self._stream.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairwise(self._ends)) * 1e3 / len(self._calls)
