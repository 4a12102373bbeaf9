# SPDX-License-Identifier: Apache-2.0
"""A worker extension that says how much memory its worker has. `--worker-extension-cls memory_worker.Extension`"""

import resource
from pathlib import Path

import torch

from vllm_mqa_sm90.backend import WorkerExtension


class Extension(WorkerExtension):
    def mqa_sm90_memory(self) -> dict[str, int]:
        """Bytes: `reserved` on the GPU by PyTorch, in which the kernels' tensors lie; `resident` on the host."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"reserved": torch.cuda.memory_reserved(), "resident": pages * resource.getpagesize()}
