# SPDX-License-Identifier: Apache-2.0
"""Where kernels come from, in the events of a trace of vLLM's PyTorch profiler."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_mqa_sm90.bench.serve.trace import FAMILIES, ON_GPU, OTHER, family

CALLS = ("cuda_runtime", "cuda_driver")
SPANS = ("cpu_op", "user_annotation")


@dataclass(frozen=True)
class Launch:
    """A kernel, or a copy, that the GPU ran.

    Attributes:
        name: of the kernel.
        duration: microseconds.
        spans: the ops and marks (`record_function`) that the host was in when it launched the kernel, or the CUDA
            graph with it, outermost first; None where the trace does not have the launch.
    """

    name: str
    duration: float
    spans: tuple[str, ...] | None


def launches(events: Iterable[dict[str, Any]]) -> list[Launch]:
    """All that the GPU ran, and where it came from.

    A kernel's name may not tell: Triton names it after its Python function alone, and vLLM 0.33 has more than a
    hundred that are called "kernel".
    """
    on_host: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    on_gpu = []
    for event in events:
        category = event.get("cat")
        if category in ON_GPU:
            on_gpu.append(event)
        elif category in CALLS or category in SPANS:
            on_host[event["pid"], event["tid"]].append(event)
    launched: dict[Any, tuple[str, ...]] = {}
    for thread in on_host.values():
        # Of those that begin at the same time the longer one is around the other, and a call is in all of them.
        thread.sort(key=lambda event: (event["ts"], event["cat"] in CALLS, -event["dur"]))
        around: list[dict[str, Any]] = []
        for event in thread:
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if event["cat"] in SPANS:
                around.append(event)
            elif (correlation := _correlation(event)) is not None:
                launched[correlation] = tuple(span["name"] for span in around)
    return [Launch(event["name"], event["dur"], launched.get(_correlation(event))) for event in on_gpu]


def _correlation(event: dict[str, Any]) -> int | None:
    """What a launch and all that it made the GPU run have in common."""
    return event.get("args", {}).get("correlation")


def by_family(ran: Iterable[Launch]) -> dict[str, float]:
    """Microseconds by family of kernels. Kernels may overlap."""
    found = dict.fromkeys((*FAMILIES, OTHER), 0.0)
    for launch in ran:
        found[family(launch.name)] += launch.duration
    return found


def marks(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """How often the host set each mark (`record_function`), by name."""
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
