# SPDX-License-Identifier: Apache-2.0
"""What `bench serve` found: kept as JSON, shown as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.output import figure
from vllm_mqa_sm90.bench.serve.trace import Profile
from vllm_mqa_sm90.bench.serve.workloads import RANDOM_CONTEXTS, Workload

STOCK, PLUGIN = "stock", "plugin"
SIDES = {STOCK: "stock vLLM", PLUGIN: "vllm-mqa-sm90"}


@dataclass(frozen=True)
class Job:
    """One thing to find out: the figures of a workload, or its profile, on the server of a side with k drafts."""

    side: str
    k: int
    workload: Workload
    profiled: bool = False

    def __str__(self) -> str:
        return f"{self.workload}, {self.server}{', profile' if self.profiled else ''}"

    @property
    def server(self) -> str:
        return f"{self.side} k={self.k}"

    @property
    def stem(self) -> str:
        """For names of files."""
        return stem(f"{self.server}-{self.workload}{'-profile' if self.profiled else ''}")


def stem(server: str) -> str:
    """For names of files of a server."""
    return server.replace(" k=", "-k").replace(":", "-")


@dataclass
class Measurement:
    """One workload on one server: of several runs, the middle one by ITL.

    Attributes:
        ttft_ms: median milliseconds to the first token.
        itl_ms: median milliseconds from one message of a stream to the next: a decode step, of one or more tokens; of
            cached prompts, while all requests are under way.
        tpot_ms: median milliseconds for each token after the first.
        tokens_per_s: output tokens a second, of all requests together, prefill included.
        accepted: share of draft tokens that were accepted; None without drafts.
        accepted_at: share of drafts accepted at least up to each position.
        client: all that `vllm bench serve` wrote.
        runs: ITL of each run.
    """

    side: str
    k: int
    workload: str
    ttft_ms: float
    itl_ms: float
    tpot_ms: float
    tokens_per_s: float
    accepted: float | None
    accepted_at: list[float]
    client: dict[str, Any]
    runs: list[float]

    @classmethod
    def of(cls, job: Job, runs: Sequence[dict[str, Any]]) -> Measurement:
        """From an odd number of runs of the same: what `vllm bench serve` wrote, and `itl_ms`."""
        client = sorted(runs, key=lambda run: run["itl_ms"])[len(runs) // 2]
        figures = client["median_ttft_ms"], client["itl_ms"], client["median_tpot_ms"]
        percent = client.get("spec_decode_acceptance_rate")
        accepted = None if percent is None else percent / 100
        accepted_at = client.get("spec_decode_per_position_acceptance_rates", [])
        itls = [run["itl_ms"] for run in runs]
        given = *figures, client["output_throughput"], accepted, accepted_at, client, itls
        return cls(job.side, job.k, str(job.workload), *given)

    def __str__(self) -> str:
        return f"{self.tokens_per_s:.0f} tok/s"

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decode step gives a request: its own and the accepted drafts."""
        return 1 + sum(self.accepted_at)

    @property
    def request_tokens_per_s(self) -> float:
        """Tokens a second of one request while it decodes, by ITL and acceptance.

        `tokens_per_s` counts prefill and the ends of a run too, and scatters with them.
        """
        return 1e3 * self.tokens_per_step / self.itl_ms


@dataclass
class Profiled:
    """The GPU's part in the decode steps of one workload on one server."""

    side: str
    k: int
    workload: str
    profile: Profile

    def __str__(self) -> str:
        return f"{self.profile.steps} steps profiled"


@dataclass
class Report:
    """A run: what was asked for and where, what was measured, and with --profile profiled.

    Attributes:
        gpus: as `machine.gpus` lists them.
        date: ISO 8601, UTC.
        acceptance: the rates that vLLM's synthetic acceptance is set to, up to the last position that is drafted; None:
            drafts are the model's.
        method: who drafts, in vLLM's --speculative-config.
        failures: why something was not measured, by what it was.
    """

    model: str
    gpus: list[dict[str, str]]
    versions: dict[str, str]
    date: str
    command: str
    vllm_arguments: list[str]
    acceptance: list[float] | None
    method: str = "mtp"
    measurements: list[Measurement] = field(default_factory=list)
    profiles: list[Profiled] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def skips_prefill(self) -> bool:
        """Whether a connector of the servers says that contexts are there from the start."""
        return set(RANDOM_CONTEXTS) <= set(self.vllm_arguments)

    def write(self, path: Path) -> None:
        """As JSON, each measurement with what follows from it, and the best k of each workload."""
        content = asdict(self)
        for each, entry in zip(self.measurements, content["measurements"], strict=True):
            entry |= {"tokens_per_step": each.tokens_per_step, "request_tokens_per_s": each.request_tokens_per_s}
            entry |= {"over_no_mtp": self.over(each, each.side, 0), "over_stock": self.over(each, STOCK, each.k)}
        named = "workload", "side", "k", "request_tokens_per_s"
        content["best"] = [
            {**{name: getattr(each, name) for name in named}, "over_stock": over}
            for each, over in self.best()
        ]
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")

    def measured(self, side: str, k: int, workload: str) -> Measurement | None:
        """What was measured there; None: nothing."""
        found = (each for each in self.measurements if (each.side, each.k, each.workload) == (side, k, workload))
        return next(found, None)

    def over(self, each: Measurement, side: str, k: int) -> float | None:
        """How fast over another server for the same workload; None where its figures are missing.

        By tokens a second; of cached prompts, for which there is nothing but decode steps, by what a request has of these,
        and with the same k by their time alone, as acceptance is not the server's.
        """
        other = self.measured(side, k, each.workload)
        if other is None:
            return None
        if not Workload.parse(each.workload).cached:
            return each.tokens_per_s / other.tokens_per_s
        if each.k == other.k:
            return other.itl_ms / each.itl_ms
        return each.request_tokens_per_s / other.request_tokens_per_s

    def best(self) -> list[tuple[Measurement, float | None]]:
        """For each workload and side what has the fastest k for a request, and how fast over stock's fastest."""
        found: dict[tuple[str, str], Measurement] = {}
        for each in self.measurements:
            at = each.workload, each.side
            found[at] = max(found.get(at, each), each, key=lambda one: one.request_tokens_per_s)
        stock = {workload: each.request_tokens_per_s for (workload, side), each in found.items() if side == STOCK}
        return [
            (each, each.request_tokens_per_s / stock[each.workload] if each.workload in stock else None)
            for each in found.values()
        ]

    def share_of_step(self, profiled: Profiled, us: float) -> float | None:
        """`us` of GPU time over the ITL without the profiler, which lengthens it; None: that was not measured."""
        found = self.measured(profiled.side, profiled.k, profiled.workload)
        return us / (1e3 * found.itl_ms) if found else None

    @property
    def setting(self) -> str:
        """The run in one line."""
        gpu = self.gpus[0]
        count = f" ({len(self.gpus)} visible)" if len(self.gpus) > 1 else ""
        return output.setting(gpu["name"] + count, gpu["driver_version"], self.versions, self.date)

    @property
    def conditions(self) -> str:
        """What the figures mean, in one line."""
        model = " with ".join(filter(None, (self.model, " ".join(self.vllm_arguments))))
        if self.acceptance is None:
            return f"{model}; acceptance is that of the model's own drafts"
        if not self.acceptance:
            return f"{model}; nothing is drafted"
        rates = ", ".join(f"{rate:g}" for rate in self.acceptance)
        return f"{model}; acceptance is NOT the model's: vLLM's synthetic one, set to {rates}"


def tables(report: Report) -> list[Table]:
    """Of the measurements, of the best k where there are several, and of the profiles where there are any."""
    found = [table(report)]
    if len({each.k for each in report.measurements}) > 1:
        found.append(best_table(report))
    if report.profiles:
        found.append(profile_table(report))
    return found


def table(report: Report) -> Table:
    """A line for each measurement, workload by workload."""

    def cells(each: Measurement) -> list[str]:
        times = f"{each.ttft_ms:.0f}", f"{each.itl_ms:.2f}", f"{each.tpot_ms:.2f}", f"{each.tokens_per_s:.0f}"
        by_position = " ".join(f"{100 * share:.0f}" for share in each.accepted_at) or "-"
        ratios = figure(report.over(each, each.side, 0)), figure(report.over(each, STOCK, each.k))
        return [*times, figure(each.accepted, 1, 100), by_position, *ratios]

    # With the longest cells of k=3 just 80 wide.
    columns = "TTFT\nms", "ITL\nms", "TPOT\nms", "output\ntok/s", "acc.\n%", "by position\n%", "x no\nMTP", "x\nstock"
    result = _table(columns, report.measurements, cells)
    result.columns[-3].no_wrap = False  # more positions go on in a second line
    return result


def best_table(report: Report) -> Table:
    """A line for each workload and side: tokens a second of a request with each k, and the best."""
    ks = sorted({each.k for each in report.measurements})
    over_stock = {(each.workload, each.side): over for each, over in report.best()}

    def cells(best: Measurement) -> list[str]:
        found = [report.measured(best.side, k, best.workload) for k in ks]
        speeds = [each.request_tokens_per_s if each else None for each in found]
        shown = [figure(speed, 1 if speed and speed < 100 else 0) for speed in speeds]
        return [*shown, str(best.k), figure(over_stock[best.workload, best.side])]

    best = [each for each, _ in report.best()]
    result = _table([*(f"k={k}" for k in ks), "best k", "x stock"], best, cells, lambda best: best.side)
    result.title = "tok/s of one request while it decodes: tokens of a step over ITL"
    return result


def profile_table(report: Report) -> Table:
    """A line for each profile: GPU time of a decode step, its index logits, its top-k; shares are those of the ITL."""

    def cells(each: Profiled) -> list[str]:
        busy, families = each.profile.busy_us, each.profile.families
        found = [f"{busy / 1e3:.2f}", figure(report.share_of_step(each, busy), 0, 100)]
        for us in families["index logits"], families["top-k"]:
            found += [f"{us:.0f}", figure(report.share_of_step(each, us), 0, 100)]
        return found

    of_step = "of step\n%"
    return _table(("GPU time\nms", of_step, "logits\nus", of_step, "top-k\nus", of_step), report.profiles, cells)


def _table(
    columns: Sequence[str],
    found: Sequence[Any],
    cells: Callable[[Any], list[str]],
    server: Callable[[Any], str] = lambda each: f"{each.side} k={each.k}",
) -> Table:
    """Workloads in the order in which they first appear; in each, by k, stock first."""
    order, sides = list(dict.fromkeys(each.workload for each in found)), list(SIDES)
    found = sorted(found, key=lambda each: (order.index(each.workload), each.k, sides.index(each.side)))
    lines = [(each.workload, server(each), *cells(each)) for each in found]
    return output.table(("workload", "server", *columns), lines, left=2)


def notes(report: Report) -> list[str]:
    """How far apart the runs were, and the failures, a line each: the ends of the logs were shown when they came."""
    found = []
    if repeated := [each for each in report.measurements if len(each.runs) > 1]:
        spreads = [(max(each.runs) - min(each.runs)) / each.itl_ms for each in repeated]
        widest = repeated[spreads.index(max(spreads))]
        apart = f"whose ITL is at most {max(spreads):.1%} apart ({widest.workload}, {widest.side} k={widest.k})"
        found.append(f"cached prompts: the middle of {len(widest.runs)} runs, {apart}")
    return found + [f"{what} failed: {why.splitlines()[0]}" for what, why in report.failures.items()]
