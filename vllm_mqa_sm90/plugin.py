# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in each of its processes, in any number and order, before models load."""

import functools
from collections.abc import Callable, Iterator

import torch

from vllm_mqa_sm90 import backend, machine, ops, seams


def problems() -> Iterator[str]:
    """Why this process does not take over, all reasons, cheapest checks first. Leaves CUDA uninitialised."""
    for check in (release_problem, gpu_problem, library_problem, seams_problem):
        if (problem := check()) is not None:
            yield problem


def _check(ask: Callable[[], str | None]) -> Callable[[], str | None]:
    """Whatever asking may raise, of an unknown release of vLLM, is a problem, too."""

    @functools.wraps(ask)
    def problem() -> str | None:
        try:
            return ask()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return problem


@_check
def release_problem() -> str | None:
    """Why the installed vLLM's release is none that this version is for; None: it is."""
    release = seams.release()
    if release is not None and seams.OLDEST <= release <= seams.NEWEST:
        return None
    supported = f"{seams.named(seams.OLDEST)} to {seams.named(seams.NEWEST)}"
    return f"vLLM is {seams.vllm_version()}; this version is for {supported}"


@_check
def gpu_problem() -> str | None:
    """Why the GPU, as vLLM sees it, is none for the kernel; None: it is."""
    return seams.hopper_problem()


def library_problem() -> str | None:
    """Why the compiled library cannot be used; None: it can. Needs no vLLM."""
    try:
        ops.plan(torch.zeros(1, 1, dtype=torch.int32), num_sms=1)
    except Exception as error:
        return f"the compiled library does not load: {error}"
    return None


@_check
def seams_problem() -> str | None:
    """How vLLM differs from what this version knows; None: it does not."""
    release = seams.release()
    found = [seam.problem() for seam in seams.applying(release)] if release else []
    mismatches = list(dict.fromkeys(filter(None, found)))
    return "vLLM differs from what this version knows: " + "; ".join(mismatches) if mismatches else None


def whose_topk() -> str:
    """Whose top-k follows our logits in decode steps of the installed vLLM."""
    reason = seams.stock_topk_reason()
    return f"vLLM's: {reason}" if reason else "the plugin's, unless --sparse-indexer-topk-backend names one of vLLM's"


def register() -> None:
    """Takes over, or says why not: see `MQA_SM90` in the README."""
    mode = backend.mode()
    if mode == "off":
        backend.outcome.update(installed=False, reason="MQA_SM90=off")
        return
    if backend.outcome["installed"]:
        return
    front_end = False
    try:
        front_end = seams.has_no_device()
        reason = "this process has no device to decode on" if front_end else next(problems(), None)
        if reason is None:
            seams.replace(backend.replacements())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    backend.outcome.update(installed=reason is None, reason=reason)
    if front_end:
        # vLLM's engines do not run here, so that `require` asks nothing of it.
        backend.logger().info("MQA SM90: %s: the engines say whose decode path theirs is", reason)
    elif reason is None:
        backend.logger().info(
            "MQA SM90 %s: with vLLM %s, the sparse indexers of DeepSeek-V3.2, V4 and GLM-5 type models decode on the FP8 "
            "sm_90a kernel, which reads the cache once for each %d query tokens of a request",
            machine.version(),
            seams.vllm_version(),
            ops.MAX_NEXT_N,
        )
    elif mode == "require":
        raise RuntimeError(f"MQA_SM90=require, but vLLM's own decode path stays in place: {reason}")
    else:
        backend.logger().warning("MQA SM90: vLLM's own decode path stays in place: %s", reason)
