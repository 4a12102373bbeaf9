# SPDX-License-Identifier: Apache-2.0
"""What is installed, and on which GPUs: for reports. Leaves CUDA uninitialised."""

import importlib.metadata
import os
import subprocess


def version() -> str:
    """Version of this package."""
    try:
        return importlib.metadata.version("vllm-mqa-sm90")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree)"


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
