# SPDX-License-Identifier: Apache-2.0
"""What is installed, and on which GPUs: for reports. Leaves CUDA uninitialised."""

import importlib.metadata
import subprocess


def version() -> str:
    """Version of this package."""
    try:
        return importlib.metadata.version("vllm-mqa-sm90")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree)"


def gpus() -> list[dict[str, str]]:
    """`name`, `compute_cap` and `driver_version` of each GPU that nvidia-smi lists; empty without one."""
    fields = ("name", "compute_cap", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=True)) for line in output.splitlines()]
