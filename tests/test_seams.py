# SPDX-License-Identifier: Apache-2.0
"""The records of vLLM's internals against the vLLM that is installed."""

import sys
import types
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_mqa_sm90 import seams

INSTALLED = tuple(seams.applying(seams.release()))
RELEASES = [(0, minor) for minor in range(seams.OLDEST[1], seams.NEWEST[1] + 1)]


def test_installed_vllm_is_a_supported_one() -> None:
    assert seams.OLDEST <= seams.release() <= seams.NEWEST


@pytest.mark.parametrize("seam", INSTALLED, ids=lambda seam: seam.path)
def test_seam_matches_installed_vllm(seam: seams.Seam) -> None:
    assert seam.problem() is None


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: ".".join(map(str, release)))
def test_each_release_has_one_record_of_each_replaced_name(release: seams.Release) -> None:
    paths = [seam.path for seam in seams.applying(release)]
    for path in (seams.BUILDER_OF_BACKEND, seams.SCHEDULE, seams.LOGITS):
        assert paths.count(path) == 1
    assert paths.count(seams.NATIVE_GATE) == (release >= (0, 28))
    assert paths.count(seams.TOPK) == (release >= (0, 30))


@pytest.mark.parametrize("seam", INSTALLED, ids=lambda seam: seam.path)
def test_difference_is_named(seam: seams.Seam) -> None:
    gone = replace(seam, path=seam.path + "_gone").problem()
    assert f"{seam.path}_gone: expected to exist, but AttributeError" in gone
    if seam.parameters is not None:
        problem = replace(seam, parameters=("other",)).problem()
        assert problem == f"{seam.path}: expected parameters (other), found ({', '.join(seam.parameters)})"
    if seam.uses:
        problem = replace(seam, uses=(*seam.uses, "other")).problem()
        assert problem == f"{seam.path}: expected to use (other), but does not"


def test_missing_module_is_a_problem_not_an_error() -> None:
    problem = seams.Seam("vllm.no_such_module:function", why="").problem()
    assert "expected to exist, but ModuleNotFoundError" in problem


@pytest.mark.parametrize(
    ("version", "release"),
    [("0.26.0", (0, 26)), ("0.33.1.dev5+gabc", (0, 33)), ("0.34.0rc1", (0, 34)), ("1.0", (1, 0)), ("dev", None)],
)
def test_release_of_a_version(monkeypatch: pytest.MonkeyPatch, version: str, release: seams.Release | None) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: version)
    assert seams.release() == release


def test_replace_reaches_modules_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("replaced_module")
    module.function = lambda: "stock"
    module.Owner = type("Owner", (), {"method": staticmethod(lambda: "stock")})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    seams.replace(
        {"replaced_module:function": lambda: "ours", "replaced_module:Owner.method": staticmethod(lambda: "ours")}
    )
    assert (module.function(), module.Owner.method()) == ("ours", "ours")


def config(index_topk: int | None = 2048, backend: str = "auto", dcp: int = 1, draft: int | None = None, **others: int) -> Any:
    of_draft = SimpleNamespace(hf_text_config=SimpleNamespace(index_topk=draft, **others))
    return SimpleNamespace(
        kernel_config=SimpleNamespace(sparse_indexer_topk_backend=backend),
        parallel_config=SimpleNamespace(decode_context_parallel_size=dcp),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(**({"index_topk": index_topk} if index_topk else {}), **others)
        ),
        speculative_config=SimpleNamespace(draft_model_config=of_draft) if draft else None,
    )


@pytest.mark.parametrize(
    ("given", "selection", "reason"),
    [
        (config(), (2048, 2048), None),
        (config(512, draft=512), (512, 512), None),
        (config(512, draft=1024), (0, 0), "index_topk is 512, and 1024 in the draft model"),
        (config(2049), (0, 0), "index_topk is 2049; the plugin's selects 1 to 2048 tokens"),
        (config(None), (0, 0), "index_topk is None; the plugin's selects 1 to 2048 tokens"),
        (config(backend="persistent"), (0, 0), "sparse_indexer_topk_backend is persistent"),
        # What else reads the logits finds those of all rows.
        (config(dcp=2), (2048, 0), None),
        (config(512, candidate_topk_blocks=256), (512, 0), None),
        # Pools of tokens are selected.
        (config(2048, draft=2048, index_kpool=4), (512, 512), None),
        (config(2048, index_kpool=4, dcp=4), (512, 0), None),
    ],
)  # fmt: skip
def test_selection(monkeypatch: pytest.MonkeyPatch, given: Any, selection: tuple[int, int], reason: str | None) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: "0.30.1")
    assert (seams.selection(given), seams.stock_topk_reason(given)) == (seams.Selection(*selection), reason)
    assert seams.hands_over_topk() and seams.stock_topk_reason() is None
    monkeypatch.setattr(seams, "vllm_version", lambda: "0.29.0")
    for any_config in given, None:
        assert seams.stock_topk_reason(any_config) == "vLLM 0.29.0 has no place for another, as 0.30 has"
    assert seams.selection(given) == seams.Selection() and not seams.hands_over_topk()


@pytest.mark.skipif(not seams.hands_over_topk(), reason="vLLM has no such setting before 0.30")
def test_the_users_choice_of_a_topk_is_where_it_is_looked_for() -> None:
    from vllm.config import KernelConfig

    assert KernelConfig().sparse_indexer_topk_backend == "auto"
    assert KernelConfig(sparse_indexer_topk_backend="per_row").sparse_indexer_topk_backend == "per_row"
