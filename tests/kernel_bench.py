# SPDX-License-Identifier: Apache-2.0
"""What tests of `bench kernel` share: stand-ins for a GPU and for the kernels of vLLM, on the CPU."""

import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing_worker import requests_of_rows

import vllm_mqa_sm90
from vllm_mqa_sm90 import cli, reference
from vllm_mqa_sm90.bench.kernel import vllm_kernels
from vllm_mqa_sm90.bench.kernel import run as kernel_run
from vllm_mqa_sm90.bench.kernel import step as steps
from vllm_mqa_sm90.bench.kernel.step import Step

CPU = torch.device("cpu")
SMS = 132
TWO_SHAPES = ("--shape", "3x300:ragged", "--shape", "2x64")


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of some pages instead of 300 MB."""
    monkeypatch.setattr(steps, "COLD_BYTES", 2_000_000)


def reference_logits(step: Step, copy: int = 0) -> torch.Tensor:
    return reference.paged_mqa_logits(
        step.q,
        step.kv_cache,
        step.weights,
        step.context_lens,
        step.block_tables[copy],
        max_context_len=step.max_context_len,
        query_start_loc=None if step.max_rows is None else step.query_start_loc,
    )


class FakeDeepGemm:
    """The two functions of the `deep_gemm` package, on the CPU; what they were given is kept."""

    def __init__(self) -> None:
        self.metadata_calls: list[tuple[list[list[int]], int, int]] = []
        self.logits_calls: list[dict] = []

    def get_paged_mqa_logits_metadata(self, context_lens: torch.Tensor, block_kv: int, num_sms: int) -> torch.Tensor:
        assert context_lens.dim() == 2 and context_lens.is_contiguous()
        self.metadata_calls.append((context_lens.tolist(), block_kv, num_sms))
        return torch.full((num_sms + 1, 2), len(self.metadata_calls), dtype=torch.int32)

    def fp8_fp4_paged_mqa_logits(
        self, q, kv_cache, weights, context_lens, block_table, schedule, max_context_len, clean_logits=False
    ) -> torch.Tensor:
        values, scale = q
        assert scale is None and values.dim() == 4 and not clean_logits
        assert len(values) == len(context_lens) == len(block_table)
        assert values.shape[1] == context_lens.shape[1]
        assert self.metadata_calls[int(schedule[0, 0]) - 1][0] == context_lens.tolist()
        self.logits_calls.append({"next_n": values.shape[1]})
        return reference.paged_mqa_logits(
            values, kv_cache, weights, context_lens, block_table, max_context_len=max_context_len
        )


def vllm_0_26(fake: FakeDeepGemm) -> types.SimpleNamespace:
    def get_paged_mqa_logits_metadata(context_lens, block_size, num_sms):
        return fake.get_paged_mqa_logits_metadata(context_lens, block_size, num_sms)

    def fp8_fp4_paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len, clean_logits
    ):
        return fake.fp8_fp4_paged_mqa_logits(
            q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len, clean_logits
        )

    return types.SimpleNamespace(**locals())


def vllm_0_33(fake: FakeDeepGemm) -> types.SimpleNamespace:
    def native_next_n_supported(next_n):
        return next_n in (1, 2, 4)

    def get_paged_mqa_logits_metadata(context_lens, block_size, num_sms, indices=None):
        assert indices is None
        slots = num_sms // 2 if context_lens.shape[1] == 4 else num_sms
        return fake.get_paged_mqa_logits_metadata(context_lens, block_size, slots)

    def fp8_fp4_paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len, indices=None
    ):
        assert indices is None
        return fake.fp8_fp4_paged_mqa_logits(
            q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len
        )

    return types.SimpleNamespace(**locals())


class FakeTopK:
    """vLLM's top-k ops on the CPU, with what they ask of their arguments; the names called are kept."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.wrong: set[str] = set()
        self.rows: set[int] = set()

    def _select(self, name: str, logits: torch.Tensor, lengths: torch.Tensor, output: torch.Tensor, k: int) -> None:
        """Best first, of equal ones the last: no order that is ours. Rows with fewer are not filled up."""
        self.calls.append(name)
        self.rows.add(len(logits))
        assert (lengths.dtype, output.dtype, logits.dtype) == (torch.int32, torch.int32, torch.float32)
        assert output.shape == (len(logits), k) and lengths.shape == (len(logits), 1) and logits.stride(1) == 1
        for row, length in enumerate(lengths.flatten().tolist()):
            best = logits[row, :length].flip(0).sort(descending=True, stable=True).indices[:k]
            output[row, : len(best)] = (length - 1 - best).int()
        if name in self.wrong:
            output[-1, 0] = output[-1, 1]

    def cooperative_topk(self, logits, lengths, output, workspace, k, max_seq_len) -> None:
        assert len(logits) <= 32 and logits.stride(0) % 4 == 0
        self._with_workspace("cooperative_topk", logits, lengths, output, workspace, k, max_seq_len)

    def persistent_topk(self, *arguments) -> None:
        self._with_workspace("persistent_topk", *arguments)

    def _with_workspace(self, name, logits, lengths, output, workspace, k, max_seq_len) -> None:
        assert k in (512, 1024, 2048) and max_seq_len == int(lengths.max()) <= logits.shape[1]
        assert workspace.dtype == torch.uint8 and workspace.numel() == 1 << 20
        self._select(name, logits, lengths, output, k)

    def top_k_per_row_decode(self, logits, next_n, seq_lens, indices, num_rows, stride0, stride1, k) -> None:
        assert (next_n, num_rows, stride0, stride1) == (1, len(logits), *logits.stride())
        self._select("top_k_per_row_decode", logits, seq_lens, indices, k)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, small_copies: None) -> types.SimpleNamespace:
    """A machine whose GPU takes 10 us for everything, reads 1 TB/s, and has DeepGEMM and top-k as in vLLM 0.26."""
    machine = types.SimpleNamespace(error=1.0, timed=[], refuses=None, topk=FakeTopK(), spoil=None)

    def replay_us(calls: list[Callable[[], object]], replays: int) -> float:
        machine.timed.append((len(calls), replays))
        calls[0]()
        calls[-1]()
        return 10.0

    def paged_mqa_logits(
        *arguments: torch.Tensor, max_context_len: int, max_rows: int | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if machine.refuses and machine.refuses(arguments[3]):
            raise RuntimeError("q: expected something else\nand so on")
        grouping = {} if max_rows is None else {"indices": requests_of_rows(arguments[5], SMS, arguments[3]).int()}
        logits = reference.paged_mqa_logits(*arguments[:5], max_context_len=max_context_len, **grouping) * machine.error
        return logits if out is None else out.copy_(logits)

    def index_topk(
        *arguments: torch.Tensor, max_context_len: int, max_rows: int | None, logits: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        plan, k = arguments[5:]
        assert int(plan.view(-1)[3]) >> 12 & 0xFFF == k
        paged_mqa_logits(*arguments[:6], max_context_len=max_context_len, max_rows=max_rows, out=logits)
        out.copy_(reference.topk_indices(logits, arguments[3], k))
        if machine.spoil:
            machine.spoil(out)
        return out

    monkeypatch.setattr(kernel_run, "_problem", lambda: None)
    monkeypatch.setattr(kernel_run, "DEVICE", CPU)
    monkeypatch.setattr(kernel_run, "_gpu", lambda: {"name": "Test GPU", "sms": SMS, "driver": "1.2"})
    monkeypatch.setattr(kernel_run, "replay_us", replay_us)
    monkeypatch.setattr(kernel_run, "read_bandwidth", lambda replays: 1e12)
    monkeypatch.setattr(vllm_mqa_sm90, "paged_mqa_logits", paged_mqa_logits)
    monkeypatch.setattr(vllm_mqa_sm90, "index_topk", index_topk)
    peer = vllm_kernels.DeepGemm(vllm_0_26(FakeDeepGemm()), SMS, {"vllm": "0.26.0", "deep_gemm": "2.5.0"})
    monkeypatch.setattr(vllm_kernels, "load_deep_gemm", lambda num_sms: peer)
    monkeypatch.setattr(vllm_kernels, "load_topk", lambda device: vllm_kernels.TopK(machine.topk, device))
    monkeypatch.setenv("COLUMNS", "100")
    return machine


def bench_kernel(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    status = cli.main(["bench", "kernel", "--output", str(tmp_path), "--heads", "16", *arguments])
    return status, json.loads((tmp_path / "kernel.json").read_text())
