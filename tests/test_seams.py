# SPDX-License-Identifier: Apache-2.0
"""The records of vLLM's internals against the vLLM that is installed."""

import sys
import types
from dataclasses import replace

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
