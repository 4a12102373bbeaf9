# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


def has_sm90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without an SM90 GPU, tests that need one are deselected (and counted so), never passed."""
    if has_sm90():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_report_header() -> str:
    return f"gpu tests: {'run' if has_sm90() else 'deselected, no GPU of compute capability 9.0'}"
