# SPDX-License-Identifier: Apache-2.0
"""Which models and modes decode with our kernels, release of vLLM by release: the one record of it.

`CACHES` is what the plugin decides by. `TABLE` says of the same how it was checked; it is the README's table.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vllm_mqa_sm90 import seams
from vllm_mqa_sm90.seams import NEWEST, OLDEST, Release, named


@dataclass(frozen=True)
class Cache:
    """A class of indexer caches, whose models have their decode logits from our kernel.

    Attributes:
        since: first release in which they have.
        op: module of the op that runs them.
        dcp: first release in which decode context parallelism works for them on Hopper; None: none, or not proven.
    """

    since: Release = OLDEST
    op: str = seams.OP
    dcp: Release | None = None


CACHES = {
    # FlashMLA's sparse attention returns what ranks are merged by from 0.29 on.
    "vllm.model_executor.models.deepseek_v2.DeepseekV32IndexerCache": Cache(dcp=(0, 29)),
    "vllm.models.deepseek_v4.attention.DeepseekV4IndexerCache": Cache(),
    "vllm.models.deepseek_v41.attention.DeepseekV4IndexerCache": Cache((0, 30)),
    # Before 0.33 its op does not call DeepGEMM by a name of its module.
    "vllm.models.glm5next.common.attention.Glm5NextIndexerCache": Cache((0, 33), seams.KPOOL_OP, dcp=(0, 33)),
}
"""By class path. Others answer with the same backend, but run kernels of other formulas."""


def problem(caches: Iterable[str], *, dcp: bool, pcp: bool) -> str | None:
    """Why a model with these caches keeps vLLM's decode path in the installed release; None: it does not.

    Args:
        caches: class paths.
        dcp, pcp: whether decode and prefill context parallelism are on.
    """
    release = seams.release()
    if pcp:
        return "prefill context parallelism is on, for which the kernel is not proven"
    for path in sorted(caches):
        if (cache := CACHES.get(path)) is None:
            return f"the model's indexer cache is one that this version does not know: {path}"
        if release < cache.since:
            return f"the model is taken over from vLLM {named(cache.since)} on: {path}"
        if dcp and cache.dcp is None:
            return f"decode context parallelism is on, for which the kernel is not proven with this model: {path}"
        if dcp and release < cache.dcp:
            return f"decode context parallelism is on, which the attention cannot on Hopper before vLLM {named(cache.dcp)}"
        if (found := seams.op_problem(cache.op)) is not None:
            return found
    return None


@dataclass(frozen=True)
class Served:
    """A server of a release ran, and was compared with stock vLLM's, on a GPU at a date."""

    release: Release
    gpu: str
    date: str

    def __str__(self) -> str:
        return f"{named(self.release)} ({self.gpu}, {self.date})"


@dataclass(frozen=True)
class Mode:
    """A row of the table.

    Attributes:
        cache: class path of the model's indexer cache; "": of any.
        model, mode: what users call them.
        served: releases in which it ran; the others were built, and the plugin tested in them, without a GPU.
        stock: why the releases before `since` keep vLLM's path, or all.
        first: release in which vLLM has both, if later than the cache.
    """

    cache: str
    model: str
    mode: str
    served: tuple[Served, ...] = ()
    stock: str = ""
    first: Release = OLDEST

    @property
    def since(self) -> Release | None:
        """First release with our logits, all to the newest; None: none."""
        cache = CACHES.get(self.cache)
        since = cache and (cache.dcp if self.mode == _DCP else cache.since)
        return max(since, self.first) if since else None

    def cells(self) -> Iterator[str]:
        """The row: model, mode, served, built, vLLM's own."""
        yield from (self.model, self.mode, ", ".join(map(str, self.served)))
        ran = {served.release for served in self.served}
        releases = [(0, minor) for minor in range(OLDEST[1], NEWEST[1] + 1)]
        ours = [release for release in releases if self.since and release >= self.since]
        yield _ranges([release for release in ours if release not in ran])
        stock = _ranges([release for release in releases if release not in ours])
        yield f"{stock}: {self.stock}" if stock else ""


_V32, _V4, _V41, _KPOOL = CACHES
_DCP = "decode context parallelism"
_NO_MODEL = "vLLM has no such model"
_KPOOL_BEFORE = "no such model, or its op takes DeepGEMM another way"
_ON_H200 = Served((0, 33), "H200", "2026-11-28")

TABLE = (
    Mode(_V32, "DeepSeek-V3.2", "0 to 7 drafts", (
        Served((0, 26), "H100, H200", "2026-11-27"), Served((0, 33), "H100, H200", "2026-11-27"),
    )),
    Mode(_V32, "GLM-5.2", "0 to 7 drafts", (
        Served((0, 26), "H200", "2026-11-27"), Served((0, 33), "H100, H200", "2026-11-27"),
    )),
    Mode(_V32, "DeepSeek-V3.2", "8 drafts or more", (_ON_H200,)),
    Mode(_V32, "GLM-5.2", "8 drafts or more"),
    Mode(_V32, "DeepSeek-V3.2, GLM-5.2", _DCP, (_ON_H200,), stock="FlashMLA's sparse attention cannot"),
    # Its configuration's default of 16 heads would fail in vLLM's prefill; the released model has 32.
    Mode(_V32, "Hy4", "any number of drafts", (_ON_H200,), first=(0, 29), stock=_NO_MODEL),
    Mode(_V32, "dots3-note", "any number of drafts", first=(0, 28), stock=_NO_MODEL),
    Mode(_V4, "DeepSeek-V4", "0 to 7 drafts", (Served((0, 33), "H100", "2026-11-25"), _ON_H200)),
    Mode(_V4, "DeepSeek-V4", "8 drafts or more"),
    Mode(_V4, "DeepSeek-V4", "adaptive verification of drafts", (Served((0, 33), "H100", "2026-11-25"), _ON_H200),
         first=(0, 29), stock="vLLM's indexer refuses it on Hopper"),
    Mode(_V4, "DeepSeek-V4", _DCP, stock="vLLM refuses it"),
    Mode(_V41, "DeepSeek-V4.1", "any number of drafts", (_ON_H200,), stock=_NO_MODEL),
    Mode(_V41, "DeepSeek-V4.1", _DCP, stock="not proven"),
    Mode(_KPOOL, "GLM-5.3", "any number of drafts", (_ON_H200,), stock=_KPOOL_BEFORE),
    Mode(_KPOOL, "GLM-5.3", _DCP, stock=_KPOOL_BEFORE),
    Mode("", "any", "prefill context parallelism", stock="not proven"),
    Mode("", "any", "FP4 caches", stock="another format"),
)  # fmt: skip


def table() -> list[str]:
    """Lines of Markdown."""
    heads = "model", "mode", "served with vLLM", "built and checked without a GPU", "vLLM's own path"
    rows = [heads, ["---"] * len(heads), *(list(mode.cells()) for mode in TABLE)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _ranges(releases: list[Release]) -> str:
    """ "0.24, 0.27 to 0.32" """
    runs: list[list[Release]] = []
    for release in releases:
        if runs and runs[-1][-1][1] + 1 == release[1]:
            runs[-1].append(release)
        else:
            runs.append([release])
    return ", ".join(f"{named(run[0])} to {named(run[-1])}" if len(run) > 2 else ", ".join(map(named, run)) for run in runs)
