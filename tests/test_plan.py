# SPDX-License-Identifier: Apache-2.0
"""The schedule: the plan and the kernel's own walk over it, on the host; the device's plan equals it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vllm_mqa_sm90

TILE = 64
lengths = st.one_of(
    st.integers(-3, 200),
    st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]),
    st.integers(-(2**31), 4096),
)


@st.composite
def steps(draw: st.DrawFn) -> torch.Tensor:
    next_n = draw(st.integers(1, 4))
    groups = draw(st.integers(0, 40))
    flat = draw(st.lists(lengths, min_size=groups * next_n, max_size=groups * next_n))
    return torch.tensor(flat, dtype=torch.int32).view(groups, next_n)


def plan_for_ctas(context_lens: torch.Tensor, ctas: int) -> torch.Tensor:
    """A plan for any number of CTAs, odd ones too, poisoned before it is written."""
    out = torch.full(vllm_mqa_sm90.plan_shape(ctas), -7, dtype=torch.int32, device=context_lens.device)
    return vllm_mqa_sm90.plan(context_lens, out=out)


def walk(plan: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
    out = torch.full((int(plan[1:, 2].sum()), 3), -7, dtype=torch.int32)
    torch.ops.vllm_mqa_sm90.walk(plan, context_lens, out)
    return out


def tiles_of(context_lens: torch.Tensor) -> torch.Tensor:
    """Every (group, tile) of a step in group order."""
    per_group = -(-context_lens.long().amax(dim=1).clamp(min=0) // TILE)
    group = torch.repeat_interleave(torch.arange(len(per_group)), per_group)
    first = (per_group.cumsum(0) - per_group)[group]
    return torch.stack([group, torch.arange(len(group)) - first], dim=1).int()


def check(context_lens: torch.Tensor, ctas: int) -> None:
    plan = plan_for_ctas(context_lens, ctas)
    header, shares = plan[0].tolist(), plan[1:]
    visits = walk(plan, context_lens)
    # In group order, every (group, tile) exactly once: so each share is contiguous too.
    assert torch.equal(visits[:, 1:], tiles_of(context_lens))
    assert torch.equal(visits[:, 0], visits[:, 0].sort().values)
    assert torch.equal(torch.bincount(visits[:, 0], minlength=len(shares)), shares[:, 2].long())
    assert not shares[:, 3].any()

    own, spare = shares[:ctas, 2], shares[ctas : ctas + header[1], 2]
    assert header == [0, len(spare), 0, 0] and not shares[ctas + len(spare) :].any()
    assert int(own.max() - own.min()) <= 1
    expected = min(len(visits) // 8 // 4, 4 * ctas) if len(visits) >= 16 * ctas else 0
    assert len(spare) == expected
    if expected:
        assert int(spare.sum()) == len(visits) // 8 and int(spare.max() - spare.min()) <= 1


@settings(max_examples=300, deadline=None)
@given(steps(), st.integers(1, 300))
def test_every_tile_once_and_balanced(context_lens: torch.Tensor, ctas: int) -> None:
    check(context_lens, ctas)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 4), st.integers(1, 3000), st.integers(0, 2**31), st.sampled_from([0, 4000]))
def test_large_batches(groups: int, next_n: int, ctas: int, seed: int, low: int) -> None:
    torch.manual_seed(seed)
    context_lens = torch.randint(-low, 5000, (groups, next_n), dtype=torch.int32)
    check(context_lens, ctas)


def test_very_long_contexts() -> None:
    check(torch.tensor([[2**26 + 1, 5], [131072, 131071]], dtype=torch.int32), 264)
    longest = torch.tensor([[2**31 - 1]], dtype=torch.int32)
    assert int(plan_for_ctas(longest, 264)[1:, 2].sum()) == 2**31 // TILE


def test_empty_steps_have_plans_without_tiles() -> None:
    for context_lens in torch.empty((0, 3), dtype=torch.int32), torch.zeros((7, 2), dtype=torch.int32):
        assert not plan_for_ctas(context_lens, 5).any()


def test_flat_lengths_are_groups_of_one() -> None:
    lens = torch.tensor([100, 0, 65], dtype=torch.int32)
    flat = vllm_mqa_sm90.plan(lens, num_sms=2)
    assert flat.shape == vllm_mqa_sm90.plan_shape(2)
    assert torch.equal(flat, vllm_mqa_sm90.plan(lens.unsqueeze(1), num_sms=2))


@pytest.mark.gpu
@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [0, 1, 2, 31, 256, 1023, 1024, 1025, 4096, 5000])
def test_device_plan_equals_host_plan(groups: int, next_n: int) -> None:
    torch.manual_seed(groups * 8 + next_n)
    for high in 2, 300, 140000:
        context_lens = torch.randint(-high // 2, high, (groups, next_n), dtype=torch.int32)
        for ctas in 1, 2, 132, 1025:
            expected = plan_for_ctas(context_lens, ctas)
            assert torch.equal(plan_for_ctas(context_lens.cuda(), ctas).cpu(), expected), (high, ctas)


@pytest.mark.gpu
def test_default_plan_has_the_devices_sms() -> None:
    plan = vllm_mqa_sm90.plan(torch.ones(3, 2, dtype=torch.int32, device="cuda"))
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert plan.shape == vllm_mqa_sm90.plan_shape(sms) and plan.is_cuda
