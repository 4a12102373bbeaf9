# SPDX-License-Identifier: Apache-2.0
"""What `bench serve` has to find out, and what it keeps of it on disk."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vllm_mqa_sm90
from vllm_mqa_sm90 import checkpoint
from vllm_mqa_sm90.bench.serve.report import PLUGIN, Configuration, Measurement, Profiled, Report
from vllm_mqa_sm90.bench.serve.workloads import Workload
from vllm_mqa_sm90.server import speculative_config

# What decides how the plugin's steps run; the rest of the package measures and reports.
_PLUGIN_FILES = ("_C.abi3.so", "backend.py", "ops.py", "plugin.py", "seams.py", "sizes.py")


@dataclass(frozen=True)
class Job:
    """One thing to find out: the figures of a workload, or its profile."""

    at: Configuration
    workload: Workload
    profiled: bool = False

    def __str__(self) -> str:
        return f"{self.workload}, {self.at}{', profile' if self.profiled else ''}"

    @property
    def stem(self) -> str:
        """For file names."""
        workload = str(self.workload).replace(":", "-")
        return f"{self.at.stem}-{workload}{'-profile' if self.profiled else ''}"


def server_arguments(at: Configuration, report: Report) -> list[str]:
    """The arguments of a configuration's `vllm serve`, those of the user last."""
    if not at.k:
        return report.vllm_arguments
    return ["--speculative-config", json.dumps(speculative_config(at.k, report.acceptance)), *report.vllm_arguments]


class Kept:
    """Results on disk, a file each. Its name has a hash of all that the result depends on, its content says what that is."""

    def __init__(self, folder: Path, report: Report) -> None:
        self._folder, self._report = folder, report
        folder.mkdir(exist_ok=True)

    def load(self, job: Job) -> Measurement | Profiled | None:
        """The result of an earlier run; None: there is none."""
        try:
            result = json.loads(self._path(job).read_text())["result"]
        except FileNotFoundError:
            return None
        return Profiled(**result) if job.profiled else Measurement(**result)

    def save(self, job: Job, result: Measurement | Profiled) -> None:
        """Whole or, when killed meanwhile, not at all."""
        path = self._path(job)
        partial = path.with_suffix(".partial")
        content = {"depends_on": self._depends_on(job), "result": asdict(result)}
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        partial.replace(path)

    def _path(self, job: Job) -> Path:
        text = json.dumps(self._depends_on(job), sort_keys=True)
        return self._folder / f"{job.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def _depends_on(self, job: Job) -> dict[str, Any]:
        report, workload = self._report, job.workload
        model, package = Path(report.model), Path(vllm_mqa_sm90.__file__).parent
        return {
            "model": str(model.resolve()) if model.is_dir() else report.model,
            "checkpoint": {name: _digest(model / name) for name in ("config.json", checkpoint.INDEX)},
            "gpus": report.gpus,
            "versions": report.versions,
            # Hashed: VLLM_API_KEY is one of them.
            "environment": {
                name: hashlib.sha256(value.encode()).hexdigest()
                for name, value in os.environ.items()
                if name.startswith("VLLM_")
            },
            "side": job.at.side,
            "plugin": {name: _digest(package / name) for name in _PLUGIN_FILES} if job.at.side == PLUGIN else None,
            "server": server_arguments(job.at, report),
            "workload": [str(workload), workload.requests, workload.output_tokens, workload.runs],
            "profiled": job.profiled,
        }


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
