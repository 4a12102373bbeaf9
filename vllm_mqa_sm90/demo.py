# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 demo`: a real `vllm serve` with the plugin, asked over HTTP, and the proof of what ran.

Without an SM90 GPU: the reference and the kernel's own schedule on the CPU, one checked against the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vllm_mqa_sm90
from vllm_mqa_sm90 import checkpoint, machine, stopping
from vllm_mqa_sm90.metrics import acceptance
from vllm_mqa_sm90.server import Server, ServerError, environment, free_port, seconds, speculative_config, vllm_serve
from vllm_mqa_sm90.sizes import HEAD_DIM, TOKEN_BYTES

if TYPE_CHECKING:  # seconds that a command's help need not wait
    import torch

SPECULATIVE_TOKENS = 2
MODEL = "demo"
TILE = 64
H100_SMS = 132


@contextmanager
def waiting(console: Console, what: str) -> Iterator[Callable[[float, str], None]]:
    """Shows a spinner with seconds and a line of detail; without a terminal, a line every 15 s."""
    if console.is_terminal:
        with console.status(what) as status:

            def update(seconds: float, detail: str) -> None:
                room = console.width - len(what) - 14
                status.update(f"{what}, {seconds:.0f} s  [dim]{escape(_shortened(detail, room))}[/]")

            yield update
        return
    console.print(what)
    shown = 0.0

    def show(seconds: float, detail: str) -> None:
        nonlocal shown
        if seconds - shown >= 15:
            shown = seconds
            console.print(f"  {seconds:.0f} s  {escape(_shortened(detail, 120))}".rstrip(), soft_wrap=True)

    yield show


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(0, length - 1)] + "…"


def run_on_gpu(console: Console, directory: Path | None, timeout: float, arguments: list[str]) -> int:
    """Checkpoint, server, requests, proof. Returns 0 if decode steps ran natively on our kernel."""
    with tempfile.TemporaryDirectory(prefix="mqa-sm90-") as folder:
        scratch = Path(folder)
        model = directory or scratch / "model"
        if (model / "config.json").is_file():
            console.print(f"checkpoint: {model}, as it is")
        else:
            start = time.monotonic()
            with checkpoint.progress_bar() as show:
                size = checkpoint.make_checkpoint(model, progress=show)
            console.print(f"checkpoint: {model}, {size / 1e9:.1f} GB in {time.monotonic() - start:.0f} s")

        port = free_port()
        command = vllm_serve(
            model,
            port,
            "--served-model-name", MODEL,
            "--speculative-config", json.dumps(speculative_config(SPECULATIVE_TOKENS, checkpoint.ACCEPTANCE_RATES)),
            "--worker-extension-cls", "vllm_mqa_sm90.backend.WorkerExtension",
            "--max-model-len", "10000",
            "--max-num-seqs", "16",
            "--gpu-memory-utilization", "0.3",
            *arguments,
        )  # fmt: skip
        # VLLM_SERVER_DEV_MODE opens /collective_rpc, over which the workers say what ran.
        env = environment(scratch, MQA_SM90="require", VLLM_SERVER_DEV_MODE="1")
        console.print("MQA_SM90=require vllm serve " + shlex.join(command[4:]), style="dim", markup=False, soft_wrap=True)
        # The threads outside: when the server is stopped, what they ask ends.
        with _kept_on_error() as log, ThreadPoolExecutor(8) as pool, Server(command, port, log, env) as server:
            with waiting(console, "starting vllm serve, which takes minutes") as progress:
                took = server.wait_ready(timeout, progress)
            console.print(f"server ready at {server.url} after {took:.0f} s")
            before = _report(server)
            _ask(console, server, pool)
            complete = _prove(console, before, _report(server), acceptance(server.get("/metrics")))
        console.print("server stopped")
    return 0 if complete else 1


@contextmanager
def _kept_on_error() -> Iterator[Path]:
    """A file for the server's log, outside the temporary folder: it stays if the server fails, whose error names it."""
    handle, name = tempfile.mkstemp(prefix="mqa-sm90-demo-", suffix=".log")
    os.close(handle)
    log = Path(name)
    try:
        yield log
    except ServerError:
        raise
    except BaseException:
        log.unlink()
        raise
    log.unlink()


def _ask(console: Console, server: Server, pool: ThreadPoolExecutor) -> None:
    """The requests: a plain completion, a streamed chat, a long context, and several at once."""
    import torch

    options = {"model": MODEL, "temperature": 0, "ignore_eos": True}

    def complete(prompt: str | list[int], tokens: int) -> dict[str, Any]:
        return server.post("/v1/completions", {**options, "prompt": prompt, "max_tokens": tokens})

    def show(title: str, text: str, tokens: int) -> None:
        console.print(f"[bold]{title}:[/] {escape(text.strip())} ({tokens} tokens)", soft_wrap=True)

    console.print("the answers (random weights speak gibberish):")
    prompt = "Native decoding on Hopper:"
    answer = complete(prompt, 48)
    show(f'after "{prompt}"', answer["choices"][0]["text"], answer["usage"]["completion_tokens"])

    chat = {**options, "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 48}
    console.print("[bold]chat, streamed:[/] ", end="")
    used = 0
    for event in server.stream("/v1/chat/completions", {**chat, "stream_options": {"include_usage": True}}):
        if event["choices"]:
            console.print(escape(event["choices"][0]["delta"].get("content") or ""), end="", soft_wrap=True)
        if event.get("usage"):
            used = event["usage"]["completion_tokens"]
    console.print(f" ({used} tokens)")

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, 16000, (length,), generator=generator).tolist() for length in (6000, *[500] * 8)]
    answer = complete(prompts[0], 32)
    show("after 6000 tokens, of which the indexer keeps 2048", answer["choices"][0]["text"], answer["usage"]["completion_tokens"])
    answers = list(pool.map(lambda prompt: complete(prompt, 64), prompts[1:]))
    console.print(f"[bold]8 requests at once:[/] {sum(each['usage']['completion_tokens'] for each in answers)} tokens")


def _report(server: Server) -> dict[str, Any]:
    return server.post("/collective_rpc", {"method": "mqa_sm90_report"})["results"][0]


def _prove(console: Console, before: dict[str, Any], after: dict[str, Any], accepted: list[float]) -> bool:
    launches = {next_n: count - before["launches"].get(next_n, 0) for next_n, count in after["launches"].items()}
    table = Table(title="what ran", show_header=False, title_justify="left")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in after["versions"].items()))
    table.add_row("layers taken over", f"{len(after['layers'])}: {', '.join(after['layers'])}")
    table.add_row(
        "launches of our kernel", ", ".join(f"{count} at next_n={n}" for n, count in launches.items() if count) or "none"
    )
    table.add_row(
        "accepted draft tokens",
        ", ".join(f"{share:.1%} at position {position + 1}" for position, share in enumerate(accepted)) or "none",
    )
    console.print(table)
    console.print(
        f"Random weights draft at random: acceptance is vLLM's synthetic one, set to {checkpoint.ACCEPTANCE_RATES[:SPECULATIVE_TOKENS]}. "
        "Launches are counted on the GPU, so CUDA-graph replays count too; "
        "those at next_n=1 are the MTP layer's, which drafts its second token alone."
    )
    if after["taken_over"] and launches.get(str(SPECULATIVE_TOKENS + 1), 0) > 0 and accepted:
        console.print(f"decode steps ran natively at next_n={SPECULATIVE_TOKENS + 1}", style="green")
        return True
    console.print(f"decode steps did not run on our kernel: {escape(str(after['reason']))}", style="red")
    return False


def run_on_cpu(console: Console, num_sms: int = H100_SMS) -> int:
    """The kernel's schedule, walked tile by tile on a small paged cache, against the reference. 0: they agree."""
    import torch

    from vllm_mqa_sm90 import reference

    next_n, heads = SPECULATIVE_TOKENS + 1, 64
    q, kv_cache, weights, context_lens, block_table = _random_step(groups=16, next_n=next_n, heads=heads)
    longest = int(context_lens.max())
    expected = reference.paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, max_context_len=longest)

    plan = vllm_mqa_sm90.plan(context_lens, num_sms=num_sms)
    visits = torch.empty((int(plan[1:, 2].sum()), 5), dtype=torch.int32)
    torch.ops.vllm_mqa_sm90.walk(plan, context_lens, None, 0, visits)
    logits = torch.full((len(context_lens) * next_n, -(-longest // TILE) * TILE), float("nan"))
    for _, first_row, count, request, tile in visits.tolist():
        keys, scales = reference.split_pages(kv_cache[block_table[request, tile]].unsqueeze(0))
        rows = slice(first_row, first_row + count)
        scores = torch.relu(torch.einsum("nhd,sd->nhs", q.flatten(0, 1)[rows].float(), keys))
        logits[rows, tile * TILE : (tile + 1) * TILE] = torch.einsum("nhs,nh->ns", scores, weights[rows]) * scales

    valid = expected.isfinite()
    # A tile that no CTA visited stays NaN, and so does the error.
    error = float((logits[:, :longest] - expected)[valid].abs().max() / expected[valid].abs().max())
    share = torch.bincount(visits[:, 0], minlength=num_sms)  # so small a step has no spare shares
    needed = int((-(-context_lens.amax(dim=1) // TILE)).sum())
    agree = error <= 1e-5 and len(visits) == needed and int(share.max() - share.min()) <= 1

    table = Table(title="the kernel's schedule on the CPU", show_header=False, title_justify="left")
    table.add_row("step", f"{len(context_lens)} requests, next_n={next_n}, {heads} heads, contexts {_range(context_lens)}")
    table.add_row("tiles of 64 tokens", f"{len(visits)} visited, {needed} needed")
    table.add_row("CTAs", f"{num_sms} (one on each SM of an H100)")
    table.add_row("tiles a CTA", f"{int(share.min())} to {int(share.max())}")
    table.add_row("KV tiles read", f"{len(visits)}, against {needed * next_n} when each row is a request of its own")
    table.add_row("logits", f"{int(valid.sum())} compared, largest error {error:.1e} of the largest logit")
    console.print(table)
    console.print("schedule and reference agree" if agree else "schedule and reference DISAGREE", style="green" if agree else "red")
    return 0 if agree else 1


def _range(lengths: torch.Tensor) -> str:
    return f"{int(lengths.min())} to {int(lengths.max())}"


def _random_step(groups: int, next_n: int, heads: int) -> tuple[torch.Tensor, ...]:
    """A decode step over shuffled pages of 64 tokens: q, kv_cache, weights, context_lens, block_table."""
    import torch

    generator = torch.Generator().manual_seed(0)
    last = torch.randint(1, 16384, (groups, 1), generator=generator).clamp(min=next_n)
    context_lens = (last - next_n + 1 + torch.arange(next_n)).int()
    max_pages = -(-int(last.max()) // TILE)
    pages = groups * max_pages
    keys = torch.randn(pages, TILE * HEAD_DIM, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(pages, TILE, generator=generator) + 0.5
    kv_cache = torch.cat([keys.view(torch.uint8), scales.view(torch.uint8)], dim=1).view(pages, TILE, 1, TOKEN_BYTES)
    block_table = torch.randperm(pages, generator=generator).int().view(groups, max_pages)
    q = torch.randn(groups, next_n, heads, HEAD_DIM, generator=generator).to(torch.float8_e4m3fn)
    return q, kv_cache, torch.randn(groups * next_n, heads, generator=generator), context_lens, block_table


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="serve a small model with the plugin, ask it, and show what ran",
        usage="%(prog)s [options] [-- VLLM_ARGUMENT ...]",
        description="Makes a checkpoint, starts vllm serve with the plugin and two MTP tokens, sends requests, and shows "
        "what ran on our kernel. Without an SM90 GPU: the kernel's schedule against the reference, on the CPU. What follows "
        "-- goes to vllm serve.",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="use this checkpoint, made there if missing (default: a temporary one)")
    parser.add_argument("--timeout", type=seconds, default=1200, metavar="SECONDS", help="for the server's start (default: 1200)")
    parser.set_defaults(func=_run, vllm_arguments=[])


def _run(args: argparse.Namespace) -> int:
    import torch

    console = Console(highlight=False)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        if unseen := _unseen_gpu():
            console.print(escape(unseen), style="red", soft_wrap=True)
            return 1
        console.print("no GPU of compute capability 9.0 (H100, H200): checking the kernel's schedule on the CPU", soft_wrap=True)
        return run_on_cpu(console)
    stopping.by_exception()
    try:
        return run_on_gpu(console, args.checkpoint, args.timeout, args.vllm_arguments)
    except (ServerError, OSError, ImportError) as error:  # of the server; of the checkpoint
        console.print(escape(str(error)), style="red", soft_wrap=True)
        return 1


def _unseen_gpu() -> str | None:
    """Why PyTorch does not use the GPU that nvidia-smi lists, as far as can be told; None: it lists none for us."""
    import torch

    gpu = next((gpu["name"] for gpu in machine.gpus() if gpu["compute_cap"] == "9.0"), None)
    if gpu is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available():
        why = f"uses {torch.cuda.get_device_name()}: choose with CUDA_VISIBLE_DEVICES"
    elif torch.version.cuda is None:
        why = "does not see it, as it was built without CUDA: install one with it"
    elif visible is not None:
        why = f"does not see it; CUDA_VISIBLE_DEVICES is {visible!r}: name the GPU in it, or unset it"
    else:
        why = f"does not see it; is the driver for CUDA {torch.version.cuda}? python -c 'import torch; torch.zeros(1).cuda()' says more"
    return f"nvidia-smi lists {gpu}, but PyTorch {torch.__version__} {why}"
