# SPDX-License-Identifier: Apache-2.0
"""Random whole steps on a GPU, for as long as --soak says."""

import random
import time

import pytest
import soak


@pytest.mark.gpu
def test_random_whole_steps(pytestconfig: pytest.Config) -> None:
    """A failure names seeds: `python tests/soak.py --seed N --steps 1` repeats one."""
    given, seconds = pytestconfig.getoption("--soak-seed"), pytestconfig.getoption("--soak")
    seed = first = random.randrange(2**30) if given is None else given
    wrong, start = {}, time.monotonic()
    while seed == first or time.monotonic() - start < seconds:
        if problem := soak.check(seed):
            wrong[seed] = problem
        seed += 1
    print(f"{seed - first} steps from seed {first}")
    assert not wrong
