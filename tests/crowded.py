# SPDX-License-Identifier: Apache-2.0
"""What launches take while another kernel holds some SMs, as NCCL's do: `python tests/crowded.py`, on a GPU, with nvcc.

A CTA with all shared memory of an SM, so that nothing else fits beside it, waits on each of them until it is released, while
a CUDA graph of launches runs on another stream. Keys are cold in L2; a selection's logits are not, as after their launch.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # so that no stream waits behind the holder's

import torch

import vllm_mqa_sm90
from vllm_mqa_sm90.bench.kernel import Shape
from vllm_mqa_sm90.bench.kernel.replay import Replayed
from vllm_mqa_sm90.bench.kernel.step import make_step

CASES = ("256x8192", 1), ("256x8192", 3), ("8x65536", 3), ("64x8192", 3)
HELD = 0, 1, 4, 16, 64
HEADS, PAGE, K = 64, 64, 2048
CALLS, REPLAYS, REST_S = 40, 12, 0.2
LIMIT_S = 2.0  # a holder that nobody releases leaves by itself

HOLDER = r"""
#include <cuda_runtime.h>

__device__ unsigned long long now_ns() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// Of each CTA found[0]: its SM, plus 1; found[1]: 1 if it was released, 2 if its time was over.
__global__ void __launch_bounds__(32) holder(const int* released, int* found, unsigned long long limit_ns) {
  if (threadIdx.x != 0) return;
  unsigned sm;
  asm volatile("mov.u32 %0, %smid;" : "=r"(sm));
  volatile int* mine = found + 2 * blockIdx.x;
  mine[0] = static_cast<int>(sm) + 1;
  __threadfence();
  const unsigned long long start = now_ns();
  int is_released = 0;
  while (!is_released && now_ns() - start < limit_ns) {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(is_released) : "l"(released) : "memory");
    __nanosleep(1000);
  }
  mine[1] = is_released ? 1 : 2;
}

extern "C" int hold(int ctas, const int* released, int* found, unsigned long long limit_ns, cudaStream_t stream) {
  constexpr int kAllSharedBytes = 227 * 1024;
  const cudaError_t status = cudaFuncSetAttribute(holder, cudaFuncAttributeMaxDynamicSharedMemorySize, kAllSharedBytes);
  if (status == cudaSuccess) holder<<<ctas, 32, kAllSharedBytes, stream>>>(released, found, limit_ns);
  return status == cudaSuccess ? cudaGetLastError() : status;
}
"""


def nvcc() -> str | None:
    """Where it is; None: nowhere."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), f"{toolkit}/bin"]))


class Holder:
    """Holds SMs. Nothing may wait for all streams meanwhile."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "holder.cu"), Path(folder, "holder.so")
            source.write_text(HOLDER)
            subprocess.run([nvcc(), "-shared", "-Xcompiler", "-fPIC", "-arch=sm_90", "-o", library, source], check=True)
            self._hold = ctypes.CDLL(str(library)).hold
        self._hold.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_void_p]
        self._stream, self._side = torch.cuda.Stream(), torch.cuda.Stream()
        self._released = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._found = torch.zeros(max(HELD), 2, dtype=torch.int32, device="cuda")
        self._read = torch.zeros(max(HELD), 2, dtype=torch.int32, pin_memory=True)
        # Once before anything runs beside it: what is loaded at first use waits for running kernels.
        for held in 1, max(HELD):
            with self.holding(held):
                pass

    def _set(self, released: bool) -> None:
        with torch.cuda.stream(self._side):
            self._released.fill_(released)
            if not released:
                self._found.zero_()
        self._side.synchronize()

    def _of_ctas(self, held: int) -> torch.Tensor:
        with torch.cuda.stream(self._side):
            self._read.copy_(self._found, non_blocking=True)
        self._side.synchronize()
        return self._read[:held].clone()

    @contextmanager
    def holding(self, held: int) -> Iterator[None]:
        """So many SMs. Raises if they were not held all the time: what was measured meanwhile is worth nothing."""
        if not held:
            yield
            return
        self._set(released=False)
        status = self._hold(held, self._released.data_ptr(), self._found.data_ptr(), int(LIMIT_S * 1e9), self._stream.cuda_stream)
        assert status == 0, f"launch of the holder: error {status}"
        last = time.monotonic() + LIMIT_S / 2
        while len(set(self._of_ctas(held)[:, 0].tolist()) - {0}) < held:
            assert time.monotonic() < last, f"{held} SMs are not held: {self._of_ctas(held)[:, 0].tolist()}"
        try:
            yield
        finally:
            self._set(released=True)
            self._stream.synchronize()
        assert self._of_ctas(held)[:, 1].tolist() == [1] * held, "a holder was gone before it was released"


def replayed(calls: Sequence[Callable[[], object]]) -> Replayed:
    """Replayed once: what the first replay loads waits for running kernels."""
    found = Replayed(calls, REPLAYS)
    found.us()
    return found


def kernels(shape: str, next_n: int) -> dict[str, tuple[Replayed, torch.Tensor]]:
    """Of a step, what is launched and what that writes."""
    step = make_step(Shape.parse(shape), next_n, HEADS, PAGE, torch.device("cuda"))
    plan, inputs = step.plan(k=K), (step.q, step.kv_cache, step.weights, step.context_lens)
    options = {"max_context_len": step.max_context_len, "k": K}
    logits = vllm_mqa_sm90.paged_mqa_logits(*inputs, step.block_tables[0], plan, **options)
    indices = vllm_mqa_sm90.topk_indices(logits, step.context_lens, K)
    score = [partial(vllm_mqa_sm90.paged_mqa_logits, *inputs, table, plan, **options, out=logits) for table in step.block_tables]
    select = partial(vllm_mqa_sm90.topk_indices, logits.clone(), step.context_lens, K, out=indices)
    return {"logits": (replayed(score * -(-CALLS // len(score))), logits), "selection": (replayed([select] * CALLS), indices)}


def measure(holder: Holder, graph: Replayed, out: torch.Tensor, held: int) -> float:
    """Microseconds of a launch. Raises if it writes something else than it did before."""
    expected = out.clone()
    torch.cuda.synchronize()
    time.sleep(REST_S)
    with holder.holding(held):
        us = graph.us()
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32)), f"with {held} SMs held the result differs"
    return us


def main() -> int:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    holder = Holder()
    print(f"us of a launch (x none held) with SMs held, {torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    print("| requests x context | next_n | kernel | " + " | ".join(f"{held} held" for held in HELD) + " |")
    for shape, next_n in CASES:
        for name, (graph, out) in kernels(shape, next_n).items():
            times = [measure(holder, graph, out, held) for held in HELD]
            cells = " | ".join(f"{us:.1f} ({us / times[0]:.2f})" for us in times)
            print(f"| {shape} | {next_n} | {name} | {cells} |", flush=True)
    print(f"| at best | | | {' | '.join(f'({sms / (sms - held):.2f})' for held in HELD)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
