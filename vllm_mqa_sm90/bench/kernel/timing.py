# SPDX-License-Identifier: Apache-2.0
"""GPU times."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

_READ_FLOATS = 1 << 30  # 4.3 GB: 86 times the 50 MB of L2
# After heavy kernels a GPU at its power limit keeps its clock low for a while: 29.7 instead of 20.6 us were
# seen on an H200 right after DeepGEMM's flattened calls.
_REST_S = 0.5


def replay_us(calls: Sequence[Callable[[], object]], replays: int) -> float:
    """Microseconds that one of `calls` takes on the GPU, back to back with the others.

    The median over replays of one CUDA graph of them all. The replays are queued at once, so the
    GPU does not wait for the host between them. Before, each call runs once (what a library
    compiles or allocates at first use is done then), and the GPU rests half a second.
    """
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        time.sleep(_REST_S)
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        for end in ends:  # the first replay only warms up
            graph.replay()
            end.record()
        torch.cuda.synchronize()
    milliseconds = statistics.median(start.elapsed_time(end) for start, end in pairwise(ends))
    return milliseconds * 1e3 / len(calls)


def read_bandwidth(replays: int) -> float:
    """Bytes a second that this GPU reads from its memory: PyTorch's sum over 4.3 GB of random floats."""
    values = torch.empty(_READ_FLOATS, device="cuda").normal_()
    return values.nbytes / replay_us([values.sum, values.sum], replays) * 1e6
