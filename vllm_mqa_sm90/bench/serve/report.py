# SPDX-License-Identifier: Apache-2.0
"""What `bench serve` found: kept as JSON, shown as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.table import Table

from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.serve.trace import Profile
from vllm_mqa_sm90.bench.serve.workloads import Workload
from vllm_mqa_sm90.metrics import Drafts

STOCK, PLUGIN = "stock", "plugin"
SIDES = {STOCK: "stock vLLM", PLUGIN: "vllm-mqa-sm90"}

_Found = TypeVar("_Found", "Measurement", "Profiled")


@dataclass(frozen=True)
class Configuration:
    """A server: `side` is STOCK or PLUGIN, `k` the speculative tokens."""

    side: str
    k: int

    def __str__(self) -> str:
        return f"{self.side} k={self.k}"

    @property
    def stem(self) -> str:
        """For file names."""
        return f"{self.side}-k{self.k}"


@dataclass
class Measurement:
    """One workload on one configuration: of several runs, the middle one by tokens a second.

    Attributes:
        ttft_ms: median milliseconds to the first token.
        itl_ms: median milliseconds from one message of a stream to the next: a decode step, of one or more tokens.
        tpot_ms: median milliseconds for each token after the first.
        tokens_per_s: output tokens a second, of all requests together, prefill included.
        accepted: share of draft tokens that were accepted; None without drafts.
        accepted_at: share of drafts accepted at least up to each position.
        date: ISO 8601, UTC.
        client: all that `vllm bench serve` wrote.
        runs: tokens a second of each run.
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
    date: str
    client: dict[str, Any]
    runs: list[float]

    @classmethod
    def of(cls, at: Configuration, workload: Workload, client: dict[str, Any], drafts: Drafts, date: str) -> Measurement:
        """One run, from the JSON of `vllm bench serve` and what the server drafted meanwhile."""
        return cls(
            side=at.side,
            k=at.k,
            workload=str(workload),
            ttft_ms=client["median_ttft_ms"],
            itl_ms=client["median_itl_ms"],
            tpot_ms=client["median_tpot_ms"],
            tokens_per_s=client["output_throughput"],
            accepted=drafts.rate,
            accepted_at=drafts.rates,
            date=date,
            client=client,
            runs=[client["output_throughput"]],
        )

    @classmethod
    def middle(cls, runs: Sequence[Measurement]) -> Measurement:
        """Of an odd number of runs of the same."""
        middle = sorted(runs, key=lambda run: run.tokens_per_s)[len(runs) // 2]
        return replace(middle, runs=[run.tokens_per_s for run in runs])

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

    @property
    def spread(self) -> float:
        """How far apart the runs are, over the middle one."""
        return (max(self.runs) - min(self.runs)) / self.tokens_per_s


@dataclass
class Profiled:
    """The GPU's part in the decode steps of one workload on one configuration."""

    side: str
    k: int
    workload: str
    date: str
    profile: Profile

    def __post_init__(self) -> None:
        if isinstance(self.profile, dict):  # from JSON
            self.profile = Profile(**self.profile)


@dataclass
class Report:
    """A run.

    Attributes:
        model: path or name.
        gpus: as `machine.gpus` lists them.
        versions: by package.
        date: of the report, ISO 8601, UTC; each measurement has its own.
        command: what measures the same.
        vllm_arguments: passed on to `vllm serve`.
        acceptance: the rates that vLLM's synthetic acceptance is set to, up to the last position that is drafted (older
            reports: or beyond); None: drafts are the model's.
        measurements: what was measured.
        profiles: with --profile.
        failures: why something was not measured, by what it was.
    """

    model: str
    gpus: list[dict[str, str]]
    versions: dict[str, str]
    date: str
    command: str
    vllm_arguments: list[str]
    acceptance: list[float] | None
    measurements: list[Measurement] = field(default_factory=list)
    profiles: list[Profiled] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON, each measurement with what follows from it, and the best number of speculative tokens of each workload."""
        content = asdict(self)
        for measurement, entry in zip(self.measurements, content["measurements"], strict=True):
            entry |= {name: getattr(measurement, name) for name in ("tokens_per_step", "request_tokens_per_s")}
            entry |= {"over_no_mtp": self.over_no_mtp(measurement), "over_stock": self.over_stock(measurement)}
        content["best"] = [
            {
                "workload": best.workload,
                "side": best.side,
                "k": best.k,
                "request_tokens_per_s": best.request_tokens_per_s,
                "over_stock": self.over_best_of_stock(best),
            }
            for best in self.best()
        ]
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` wrote, this one or an older one; what follows from the rest is left out."""
        content = output.known(cls, json.loads(path.read_text()))
        measurements = [Measurement(**output.known(Measurement, entry)) for entry in content["measurements"]]
        profiles = [Profiled(**entry) for entry in content["profiles"]]
        return cls(**{**content, "measurements": measurements, "profiles": profiles})

    def best(self) -> list[Measurement]:
        """For each workload and side the number of speculative tokens with which a request decodes fastest, of those measured."""
        found: dict[tuple[str, str], Measurement] = {}
        for each in self.measurements:
            at = each.workload, each.side
            found[at] = max(found.get(at, each), each, key=lambda one: one.request_tokens_per_s)
        return list(found.values())

    def over_best_of_stock(self, best: Measurement) -> float | None:
        """One of `best` over stock vLLM's for the workload, each at its own number; None where this is missing."""
        stock = (each for each in self.best() if (each.workload, each.side) == (best.workload, STOCK))
        return next((best.request_tokens_per_s / each.request_tokens_per_s for each in stock), None)

    def over_no_mtp(self, measurement: Measurement) -> float | None:
        """Tokens a second over the same side's without speculative tokens; None where these are missing."""
        return self._over(measurement, measurement.side, 0)

    def over_stock(self, measurement: Measurement) -> float | None:
        """Tokens a second over stock vLLM's with as many speculative tokens; None where these are missing."""
        return self._over(measurement, STOCK, measurement.k)

    def _over(self, measurement: Measurement, side: str, k: int) -> float | None:
        other = self._measured(side, k, measurement.workload)
        return None if other is None else measurement.tokens_per_s / other.tokens_per_s

    def share_of_step(self, profiled: Profiled, us: float) -> float | None:
        """`us` of GPU time, over the ITL measured without the profiler, which lengthens it; None: that was not measured."""
        measurement = self._measured(profiled.side, profiled.k, profiled.workload)
        return None if measurement is None else us / (1e3 * measurement.itl_ms)

    def _measured(self, side: str, k: int, workload: str) -> Measurement | None:
        found = (each for each in self.measurements if (each.side, each.k, each.workload) == (side, k, workload))
        return next(found, None)

    @property
    def setting(self) -> str:
        """The run in one line."""
        gpu = self.gpus[0]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        count = f" ({len(self.gpus)} visible)" if len(self.gpus) > 1 else ""
        return f"{gpu['name']}{count}, driver {gpu['driver_version']}; {versions}; {self.date[:10]}"

    @property
    def conditions(self) -> str:
        """What the figures mean, in one line."""
        arguments = f" with {' '.join(self.vllm_arguments)}" if self.vllm_arguments else ""
        if self.acceptance is None:
            return f"{self.model}{arguments}; acceptance is that of the model's own drafts"
        if not self.acceptance:
            return f"{self.model}{arguments}; nothing is drafted"
        rates = ", ".join(f"{rate:g}" for rate in self.acceptance)
        return f"{self.model}{arguments}; acceptance is NOT the model's: vLLM's synthetic one, set to {rates}"


def table(report: Report) -> Table:
    """A line for each measurement, workload by workload."""
    # With the longest cells of k=3 just 80 wide.
    columns = "TTFT\nms", "ITL\nms", "TPOT\nms", "output\ntok/s", "acc.\n%", "by position\n%", "x no\nMTP", "x\nstock"
    result = _table(
        columns,
        report.measurements,
        lambda each: (
            f"{each.ttft_ms:.0f}",
            f"{each.itl_ms:.2f}",
            f"{each.tpot_ms:.2f}",
            f"{each.tokens_per_s:.0f}",
            "-" if each.accepted is None else f"{100 * each.accepted:.1f}",
            " ".join(f"{100 * share:.0f}" for share in each.accepted_at) or "-",
            _ratio(report.over_no_mtp(each)),
            _ratio(report.over_stock(each)),
        ),
    )
    result.columns[-3].no_wrap = False  # more positions go on in a second line
    return result


def best_table(report: Report) -> Table:
    """A line for each workload and side: tokens a second of a request with each number of speculative tokens, and the best."""
    ks = sorted({each.k for each in report.measurements})
    figures = {(each.workload, each.side, each.k): each.request_tokens_per_s for each in report.measurements}

    def cells(best: Measurement) -> list[str]:
        found = [figures.get((best.workload, best.side, k)) for k in ks]
        return [*map(_three_digits, found), str(best.k), _ratio(report.over_best_of_stock(best))]

    result = _table([*(f"k={k}" for k in ks), "best k", "x stock"], report.best(), cells, lambda best: best.side)
    result.title = "tok/s of one request while it decodes: tokens of a step over ITL"
    return result


def profile_table(report: Report) -> Table:
    """A line for each profile: GPU time of a decode step, its index logits, its top-k; shares are those of the ITL."""

    def percent(each: Profiled, us: float) -> str:
        share = report.share_of_step(each, us)
        return "-" if share is None else f"{100 * share:.0f}"

    def cells(each: Profiled) -> tuple[str, ...]:
        busy, logits, top_k = each.profile.busy_us, *map(each.profile.families.get, ("index logits", "top-k"))
        times = f"{busy / 1e3:.2f}", f"{logits:.0f}", f"{top_k:.0f}"
        return tuple(cell for time, us in zip(times, (busy, logits, top_k), strict=True) for cell in (time, percent(each, us)))

    of_step = "of step\n%"
    return _table(("GPU time\nms", of_step, "logits\nus", of_step, "top-k\nus", of_step), report.profiles, cells)


def _table(
    columns: Sequence[str],
    found: Sequence[_Found],
    cells: Callable[[_Found], Sequence[str]],
    server: Callable[[_Found], str] = lambda each: str(Configuration(each.side, each.k)),
) -> Table:
    """Workloads in the order in which they first appear; in each, by k, stock first."""
    result = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    result.add_column("workload", no_wrap=True)
    result.add_column("server", no_wrap=True)
    for heading in columns:
        result.add_column(heading, justify="right", no_wrap=True)
    order, sides = list(dict.fromkeys(each.workload for each in found)), list(SIDES)
    previous = ""
    for each in sorted(found, key=lambda each: (order.index(each.workload), each.k, sides.index(each.side))):
        if each.workload != previous and previous:
            result.add_section()
        workload = each.workload if each.workload != previous else ""
        result.add_row(workload, server(each), *cells(each))
        previous = each.workload
    return result


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _three_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.{1 if value < 100 else 0}f}"


def notes(report: Report) -> list[str]:
    """How far apart the runs were, and the failures, a line each: the ends of the logs were shown when they came."""
    found = []
    if repeated := [each for each in report.measurements if len(each.runs) > 1]:
        widest = max(repeated, key=lambda each: each.spread)
        at = f"{widest.workload}, {Configuration(widest.side, widest.k)}"
        found.append(f"cached prompts: the middle of {len(widest.runs)} runs, at most {widest.spread:.1%} apart ({at})")
    return found + [f"{what} failed: {why.splitlines()[0]}" for what, why in report.failures.items()]
