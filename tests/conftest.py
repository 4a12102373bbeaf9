# SPDX-License-Identifier: Apache-2.0
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def has_sm90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=float, default=60, metavar="SECONDS", help="of random whole steps on a GPU (default: 60)")
    parser.addoption("--load", type=float, default=60, metavar="SECONDS", help="of requests to one server (default: 60)")
    parser.addoption("--soak-seed", type=int, metavar="N", help="of the first of them (default: any)")


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


def driver_symbols(library: Path) -> set[str]:
    """Functions that a shared library wants of the CUDA driver."""
    output = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    names = (line.split()[-1] for line in output.splitlines())
    return {name for name in names if name.startswith("cu") and name[2:3].isupper()}


@pytest.fixture(scope="session")
def driver_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for LD_LIBRARY_PATH with a CUDA driver that fails every call, where there is none: vLLM links to one."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return os.environ.get("LD_LIBRARY_PATH", "")
    except OSError:
        pass
    import vllm

    folder = tmp_path_factory.mktemp("driver")
    names = set.union(*(driver_symbols(library) for library in Path(vllm.__file__).parent.glob("*.so")))
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(names)))
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    return str(folder)


@pytest.fixture(scope="session")
def run_script(driver_path: str) -> Callable[..., Any]:
    """Runs a script of this folder, which imports vLLM without a GPU, and reads the JSON of its last line: by name, arguments,
    `given`, its input, and more variables of its environment."""

    def run(name: str, *arguments: object, given: str | None = None, **variables: str) -> Any:
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name(name), *arguments],
            input=given,
            env={**os.environ, "LD_LIBRARY_PATH": driver_path, "HF_HUB_OFFLINE": "1", "MQA_SM90": "off", **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
