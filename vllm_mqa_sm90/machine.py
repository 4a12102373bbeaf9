# SPDX-License-Identifier: Apache-2.0
"""What is installed, and on which GPUs: for reports. Leaves CUDA uninitialised."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path


def version() -> str:
    """Version of this package."""
    try:
        return importlib.metadata.version("vllm-mqa-sm90")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree)"


def environment() -> dict[str, str | None]:
    """What a bug report should say besides versions and GPUs; None: not there, or not set."""
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = "unknown"
    return {
        "python": f"{platform.python_version()}, {sys.executable}",
        "os": f"{system}, {platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()) or None,
        "nvcc": _nvcc(),
        "CUDA_HOME": os.environ.get("CUDA_HOME"),
        "MQA_SM90": os.environ.get("MQA_SM90"),
    }


def wheels_toolkit() -> Path | None:
    """The CUDA toolkit of the `nvidia` wheels, where they bring an nvcc."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(folder, "cu13") for folder in (wheels.submodule_search_locations if wheels else None) or ()]
    return next((folder for folder in folders if (folder / "bin" / "nvcc").is_file()), None)


def _nvcc() -> str | None:
    """Path and release of the first nvcc of CUDA_HOME, of PATH, of the wheels."""
    home, toolkit = os.environ.get("CUDA_HOME"), wheels_toolkit()
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc") or (str(toolkit / "bin" / "nvcc") if toolkit else None)
    if found is None:
        return None
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{found}, which does not run: {error}"
    release = re.search(r"release ([\d.]+)", said)
    return f"{found}, release {release[1] if release else 'unknown'}"


def gpus() -> list[dict[str, str]]:
    """`name`, `compute_cap` and `driver_version` of each GPU that this process may use; empty without one.

    As nvidia-smi lists them, of those in CUDA_VISIBLE_DEVICES. Where it has names that nvidia-smi does not know, as of
    MIG's parts: all.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (_listed(f"--id={visible}") if visible else []) or _listed()


def _listed(*options: str) -> list[dict[str, str]]:
    fields = ("name", "compute_cap", "driver_version")
    command = ["nvidia-smi", *options, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=True)) for line in output.splitlines()]
