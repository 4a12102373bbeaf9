# SPDX-License-Identifier: Apache-2.0
"""GPU time of decode steps by family of kernels, in a trace of vLLM's PyTorch profiler."""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# By the first that is found in a kernel's name: metadata before logits, the experts' top-k before the indexer's.
FAMILIES = {
    "plan": r"mqa_sm90::.*plan_kernel|paged_mqa_logits_metadata",
    "index logits": r"mqa_logits",
    "MoE": r"moe|expert|grouped_topk|topkgating",
    "top-k": r"mqa_sm90::.*selection_kernel|top_?k",
    "sparse attention": r"sparse_attn|sparse_mla|flash_?(fwd|attn|mla)|mla_combine",
    "GEMM": r"gemm|nvjet|cublas|cutlass|splitk",
}
OTHER = "other"
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP = re.compile(r"execute_context_(\d+)\(\d+\)_generation_(\d+)\(")


@dataclass
class Profile:
    """A mean decode step of one GPU, from the start of one to the start of the next.

    Attributes:
        steps: steps that the means are over; none of them prefills.
        step_us: microseconds from start to start.
        busy_us: microseconds of it in which the GPU runs a kernel, or copies.
        families: microseconds of kernels, by family. Kernels may overlap: the sum may exceed `busy_us`.
    """

    steps: int
    step_us: float
    busy_us: float
    families: dict[str, float]


def family(kernel: str) -> str:
    """The family of a kernel, by its name."""
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def events_of(path: Path) -> list[dict[str, Any]]:
    """The events in a trace file, gzipped or not."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        return json.load(file)["traceEvents"]


def profile(events: Iterable[dict[str, Any]], requests: int) -> Profile:
    """The profile of the steps that decode so many requests, in events of Chrome's trace format (microseconds).

    vLLM names each step after the requests in it, "execute_context_0(0)_generation_8(24)", and
    PyTorch repeats the name over the step's kernels as a `gpu_user_annotation`: one on each of its
    streams, all with the step's number as "External id". ValueError without such a step, and one after it.
    """
    steps: dict[Any, tuple[float, bool]] = {}
    kernels: list[tuple[float, float, str]] = []
    for event in events:
        category = event.get("cat")
        if category == "gpu_user_annotation" and (step := _STEP.match(event["name"])):
            mark = event["ts"], (step[1], step[2]) == ("0", str(requests))
            number = event.get("args", {}).get("External id", mark)
            steps[number] = min(steps.get(number, mark), mark)
        elif category in ON_GPU:
            kernels.append((event["ts"], event["dur"], event["name"]))
    marks = sorted(steps.values())
    kernels.sort()
    windows = [(start, end) for (start, decodes), (end, _) in pairwise(marks) if decodes]
    if not windows:
        expected = f"expected two steps in a row of which the first decodes {requests} requests"
        raise ValueError(f"the trace: {expected}, found {len(marks)} steps; see --max-num-seqs")

    starts = [start for start, _ in windows]
    by_kernel: Counter[str] = Counter()
    busy, busy_until = 0.0, float("-inf")
    for start, duration, name in kernels:
        window = bisect_right(starts, start) - 1
        if window < 0 or start >= windows[window][1]:
            continue
        by_kernel[name] += duration
        busy += max(0.0, start + duration - max(start, busy_until))
        busy_until = max(busy_until, start + duration)
    families = dict.fromkeys((*FAMILIES, OTHER), 0.0)
    for name, duration in by_kernel.items():
        families[family(name)] += duration / len(windows)
    return Profile(
        steps=len(windows),
        step_us=sum(end - start for start, end in windows) / len(windows),
        busy_us=busy / len(windows),
        families=families,
    )
