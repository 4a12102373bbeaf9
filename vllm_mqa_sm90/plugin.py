# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in each of its processes, in any number and order, before models load."""

from collections.abc import Iterator

import torch

from vllm_mqa_sm90 import backend, machine, ops, seams


def problems() -> Iterator[str]:
    """Why this process does not take over, cheapest checks first. Leaves CUDA uninitialised.

    Each check presumes those before it: the first answer counts, later ones may not come.
    """
    release = seams.release()
    supported = f"{'.'.join(map(str, seams.OLDEST))} to {'.'.join(map(str, seams.NEWEST))}"
    if release is None or not seams.OLDEST <= release <= seams.NEWEST:
        yield f"vLLM is {seams.vllm_version()}; this version is for {supported}"
    if (problem := seams.hopper_problem()) is not None:
        yield problem
    try:
        ops.plan(torch.zeros(1, 1, dtype=torch.int32), num_sms=1)
    except Exception as error:
        yield f"the compiled library does not load: {error}"
    if release is not None:
        mismatches = [problem for seam in seams.applying(release) if (problem := seam.problem())]
        if mismatches:
            yield "vLLM differs from what this version knows: " + "; ".join(mismatches)


def register() -> None:
    """Takes over, or says why not: see `MQA_SM90` in the README."""
    mode = backend.mode()
    if mode == "off":
        backend.outcome.update(installed=False, reason="MQA_SM90=off")
        return
    if backend.outcome["installed"]:
        return
    try:
        reason = next(problems(), None)
        if reason is None:
            seams.replace(backend.replacements())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    backend.outcome.update(installed=reason is None, reason=reason)
    if reason is None:
        backend.logger().info(
            "MQA SM90 %s: with vLLM %s, the sparse indexers of DeepSeek-V3.2 and V4 type models decode on the "
            "FP8 sm_90a kernel, natively for next_n 1 to %d (num_speculative_tokens 0 to %d)",
            machine.version(),
            seams.vllm_version(),
            ops.MAX_NEXT_N,
            ops.MAX_NEXT_N - 1,
        )
    elif mode == "require":
        raise RuntimeError(f"MQA_SM90=require, but vLLM's own decode path stays in place: {reason}")
    else:
        backend.logger().warning("MQA SM90: vLLM's own decode path stays in place: %s", reason)
