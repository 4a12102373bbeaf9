# SPDX-License-Identifier: Apache-2.0
"""A worker extension with whose import the marks begin: before a CUDA graph is captured.

`--worker-extension-cls marking_worker.Extension`. vLLM imports it in the worker, after the plugins.
"""

import json

import marking

from vllm_mqa_sm90 import backend

marking.mark()


class Extension(backend.WorkerExtension):
    def mqa_sm90_marks(self) -> str:
        """JSON: how often each mark was made so far."""
        return json.dumps(marking.counts)
