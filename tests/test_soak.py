# SPDX-License-Identifier: Apache-2.0
"""The soak, without a GPU: with the oracles in the kernels' place it finds nothing, and with mistakes in these it does."""

import pytest
import soak
import torch

from vllm_mqa_sm90 import ops, reference

SEEDS = range(12)
LOOKED_AT = range(0, 6 * soak.REFERENCE_EVERY, soak.REFERENCE_EVERY)  # seeds of steps with a look at their logits
FEW = range(6)


@pytest.fixture(autouse=True)
def oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the real functions: what they check and pass on is what they do with a GPU."""
    ops._load()
    monkeypatch.setattr(torch.ops, "vllm_mqa_sm90", Oracles(torch.ops.vllm_mqa_sm90))
    draw_lengths = soak.random.Random.choice
    # Shorter steps: the longest contexts are for a GPU.
    monkeypatch.setattr(soak.random.Random, "choice", lambda self, given: 3000 if 40000 in given else draw_lengths(self, given))


class Oracles:
    """The library's ops, of which those with kernels are the references."""

    def __init__(self, library) -> None:
        self._library, self.grouping = library, {}
        self.spoil_logits = self.spoil_indices = self.leave_logits = self.leave_dirt = False

    def __getattr__(self, name: str):
        return getattr(self._library, name)

    def plan(self, context_lens, *rest) -> None:
        self.grouping = {}
        self._library.plan(context_lens, *rest)

    def plan_ragged(self, context_lens, indices, query_start_loc, *rest) -> None:
        self.grouping = {"indices": indices, "query_start_loc": query_start_loc}
        self._library.plan_ragged(context_lens, indices, query_start_loc, *rest)

    def paged_mqa_logits(self, *arguments) -> None:
        with pytest.raises(RuntimeError, match="q: expected tensors on a CUDA device"):
            self._library.paged_mqa_logits(*arguments)
        *inputs, _, columns, _, _, clean, out = arguments
        made = reference.paged_mqa_logits(*inputs, max_context_len=columns, **self.grouping)
        out.copy_(made if clean and not self.leave_dirt else torch.where(made > -torch.inf, made, out))
        if self.spoil_logits:
            out.mul_(1.01)
        if self.leave_logits:
            out[:, 0] = torch.nan

    def topk_indices(self, logits, context_lens, k, out) -> None:
        with pytest.raises(RuntimeError, match="logits: expected tensors on a CUDA device"):
            self._library.topk_indices(logits, context_lens, k, out)
        out.copy_(reference.topk_indices(logits, context_lens, k))
        if self.spoil_indices:
            out[0, 0] += 1


@pytest.mark.parametrize("seed", SEEDS)
def test_finds_nothing_where_all_is_right(seed: int) -> None:
    assert soak.check(seed, num_sms=7, device="cpu") is None


def found_in(seeds: range, **options) -> list[str]:
    return list(filter(None, (soak.check(seed, num_sms=7, device="cpu", **options) for seed in seeds)))


def test_finds_wrong_logits_unwritten_ones_and_wrong_selections() -> None:
    ops = torch.ops.vllm_mqa_sm90
    ops.spoil_logits = True
    assert sum("logits of rows" in problem for problem in found_in(LOOKED_AT)) >= len(LOOKED_AT) // 2
    ops.spoil_logits, ops.leave_logits = False, True
    assert sum("a logit is not written" in problem for problem in found_in(FEW)) >= len(FEW) // 2
    ops.leave_logits, ops.leave_dirt = False, True
    assert any("clean_logits left a column" in problem for problem in found_in(SEEDS))
    ops.leave_dirt, ops.spoil_indices = False, True
    assert sum("the selection is wrong" in problem for problem in found_in(FEW)) >= len(FEW) // 2


def test_small_steps_and_steps_that_only_run() -> None:
    assert found_in(SEEDS, small=True) == []
    assert soak.draw(2, "cpu", small=True)[0].max_context_len <= 3000
    torch.ops.vllm_mqa_sm90.spoil_indices = True
    assert found_in(SEEDS, small=True, compare=False) == []


@pytest.mark.parametrize("by", ["indices", "query_start_loc"])
def test_a_step_without_rows(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = soak.random_ragged_step([[], []], by=by, max_rows=2)
    monkeypatch.setattr(soak, "draw", lambda *_: (step, 5, ""))
    assert found_in(FEW) == []


def test_a_step_is_its_seeds() -> None:
    one, other = soak.draw(5, "cpu"), soak.draw(5, "cpu")
    assert one[1:] == other[1:]
    assert all(torch.equal(mine, its) for mine, its in zip(one[0].inputs(), other[0].inputs(), strict=True))
