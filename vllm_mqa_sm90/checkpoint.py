# SPDX-License-Identifier: Apache-2.0
"""Writes a few-layer DSA checkpoint, so that `vllm serve` runs the real path on one GPU, offline.

The shapes are those of one tensor-parallel rank (of 8) of the released model. Weights are random: the text is
gibberish, the work is real.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import math
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_mqa_sm90 import stopping
from vllm_mqa_sm90.architectures import ARCHITECTURES, Tensor, text

if TYPE_CHECKING:  # seconds that a command's help need not wait
    import torch

_LAYERS, _EXPERTS = "at least 1", "a multiple of 8 from 16 to 256"
_NEEDS = ("safetensors", "tokenizers", "transformers")
_INCOMPLETE = ".incomplete"  # in a directory that is being written, or whose writer was killed
INDEX = "model.safetensors.index.json"
RANDOM = "random"
HEADS = ("lm_head.weight", "head.weight")
# Shares of drafts accepted up to each position, for vLLM's synthetic acceptance: the drafts of random weights mean nothing.
# The first two are those of real models' MTP layers on short prompts; on code completion 0.953, 0.834. The others assume
# that from there on acceptance falls as GLM-5.2's does on code with thinking, for which mean acceptance lengths are quoted:
# 1.84, 2.5, 2.99, 3.33, 3.61, 3.78, 3.91 for 1 to 7 drafts (that for 3 is in
# https://github.com/SemiAnalysisAI/InferenceX/pull/2460). What draft i adds to the length is the share accepted up to i,
# and 0.63 goes on as 0.66, 0.49, 0.34, 0.28, 0.17, 0.13 do.
ACCEPTANCE_RATES = [0.813, 0.63, 0.468, 0.325, 0.267, 0.162, 0.124]
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜></think>' }}{% endif %}"
)


def fill(tensor: Tensor, seed: int) -> torch.Tensor:
    """The values of `tensor`: a function of its name and `seed` alone, whatever is drawn beside it."""
    import torch

    stored = getattr(torch, tensor.dtype)
    if tensor.gain is None:
        return torch.full(tensor.shape, tensor.constant, dtype=stored)
    name = tensor.alike or tensor.name
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if tensor.below is not None:
        rows, columns = tensor.shape
        return torch.rand(rows, tensor.below, generator=generator).topk(columns).indices.to(stored)
    # Uniform: four times as fast to draw as normal, and no heavier in the products.
    bound = tensor.gain * (3.0 / tensor.shape[-1]) ** 0.5
    # FP8 cannot be drawn.
    dtype = torch.bfloat16 if stored.itemsize == 1 else stored
    values = torch.empty(tensor.shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
    if name in HEADS:
        # Tokens of unequal weight keep the best two logits further apart than bf16 rounds.
        values *= torch.empty(tensor.shape[0], 1).normal_(0, 0.7, generator=generator).exp().to(dtype)
    return values.to(stored)


def make_tokenizer(vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of `vocab_size` tokens: bytes, then syllables, then pairs of syllables.

    Any text survives a round trip, and random token ids read as pronounceable words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> str:
        if len(vocab) < vocab_size:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
        return left + right

    syllables = [merge(consonant, vowel) for consonant in "tnsrdlmkpbgvfhwjzcyxq" for vowel in "aeiou"]
    # "Ġ" is the byte-level alphabet's space: tokens that begin a word.
    starts = [merge("Ġ", syllable) for syllable in syllables]
    for left in (*syllables, *starts):
        for right in syllables:
            merge(left, right)
    if len(vocab) != vocab_size:
        raise ValueError(f"vocab_size: expected {len(SPECIAL_TOKENS) + 256} to {len(vocab)}, got {vocab_size}")

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_checkpoint(
    directory: Path,
    arch: str = "v32",
    layers: int = 4,
    experts: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the checkpoint into `directory` and returns the size of its weights in bytes.

    Args:
        directory: created if need be; must be empty, or hold what a killed run left, which is replaced.
        arch: a key of `ARCHITECTURES`.
        layers: at least 1, the MTP layer (or DSpark's layers) comes on top.
        experts: routed experts per layer, a multiple of 8 from 16 to 256.
        progress: called with the bytes done and those of all weights, first before anything is written.

    Raises:
        ValueError: an argument is out of range.
        ImportError: a package that writes is missing.
        OSError: `directory` is a file, or has files in it; its disk has less room than the weights need,
            or cannot be written to. Nothing is left then, nor after a Ctrl-C.
    """
    _check(directory, arch, layers, experts)
    import torch

    config = ARCHITECTURES[arch].config(layers, experts)
    shards = list(ARCHITECTURES[arch].shards(config))
    sizes = {each.name: math.prod(each.shape) * getattr(torch, each.dtype).itemsize for shard in shards for each in shard}
    total = sum(sizes.values())
    with _incomplete(directory):
        free = shutil.disk_usage(directory).free
        if total > free:
            raise OSError(
                f"{directory} needs {total / 1e9:.1f} GB of disk, where {free / 1e9:.1f} GB are free: "
                "name another directory, or fewer layers or experts"
            )
        progress(0, total)
        weight_map = _write_shards(directory, shards, seed, _Count(sizes, progress))
        written = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        make_tokenizer(text(config)["vocab_size"]).save_pretrained(directory)
        _write_json(directory / INDEX, {"metadata": {"total_size": written, "weights": RANDOM}, "weight_map": weight_map})
        # Last: a directory with a config.json is a complete checkpoint.
        _write_json(directory / "config.json", config)
    return written


def _check(directory: Path, arch: str, layers: int, experts: int) -> None:
    """All that can be said against the arguments before PyTorch is there; raises as `make_checkpoint` does."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if layers < 1:
        raise ValueError(f"layers: expected {_LAYERS}, got {layers}")
    # Eight routing groups; each is scored by its best two experts.
    if experts % 8 or not 16 <= experts <= 256:
        raise ValueError(f"experts: expected {_EXPERTS}, got {experts}")
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise ImportError(f"needs {' and '.join(missing)}, which vLLM brings: pip install {' '.join(missing)}")
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: name a new directory")
    if directory.exists() and not (directory / _INCOMPLETE).exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: name a new directory, or remove it first")


@contextmanager
def _incomplete(directory: Path) -> Iterator[None]:
    """Makes the directory, marked as incomplete until the end; what goes wrong empties it again, or removes it."""
    made, marker = not directory.exists(), directory / _INCOMPLETE
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{directory} cannot be made, {error.strerror}: name another directory") from error
    with marker.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{directory} is being written by another make-checkpoint: name a new directory") from None
        except OSError:
            pass  # a file system without locks
        try:
            _empty(directory)
            yield
        except BaseException:
            # After a Ctrl-C a thread may be about to name a file: a moment later there are no more.
            for _ in range(20):
                if not _empty(directory):
                    break
                time.sleep(0.01)
            marker.unlink()
            if made:
                directory.rmdir()
            raise
        marker.unlink()


def _empty(directory: Path) -> int:
    """Removes all but the marker; how many there were."""
    found = [path for path in directory.iterdir() if path.name != _INCOMPLETE]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return len(found)


class _Count:
    """Sums up the sizes of what is done, by threads."""

    def __init__(self, sizes: dict[str, int], progress: Callable[[int, int], None]) -> None:
        self._sizes, self._total, self._progress = sizes, sum(sizes.values()), progress
        self._done, self._lock = 0, threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            self._done += self._sizes[name]
            self._progress(self._done, self._total)


def _write_shards(directory: Path, shards: list[list[Tensor]], seed: int, count: _Count) -> dict[str, str]:
    """Draws and writes all tensors, a file for each shard; the file of each."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stopped = threading.Event()

    def write(index: int) -> dict[str, str]:
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for tensor in shards[index]:
            if stopped.is_set():
                return {}
            tensors[tensor.name] = fill(tensor, seed)
            count.add(tensor.name)
        if stopped.is_set():
            return {}
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{directory / file} cannot be written: {error}") from error
        # safetensors leaves what only its owner can read; the marker has the mode that the umask gives.
        shutil.copymode(directory / _INCOMPLETE, directory / file)
        return dict.fromkeys(tensors, file)

    weight_map: dict[str, str] = {}
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for files in pool.map(write, range(len(shards))):
            weight_map.update(files)
    except BaseException as error:
        stopped.set()
        # After a Ctrl-C nobody waits for a file of gigabytes.
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    pool.shutdown()
    return weight_map


def has_random_weights(model: Path) -> bool:
    """Whether `model` is a checkpoint that `make_checkpoint` wrote, whose drafts mean nothing."""
    try:
        index = json.loads((model / INDEX).read_text(encoding="utf-8"))
    except OSError:
        return False
    return index.get("metadata", {}).get("weights") == RANDOM


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "make-checkpoint",
        help="write a small random DSA checkpoint that vllm serve can run",
        description="Writes config, tokenizer and random weights of a DSA model with few layers and the shapes "
        "of one tensor-parallel rank (of 8), MTP layer or other drafter included. Needs an installed vLLM's libraries, no GPU, no network.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write; created if need be, must be empty")
    released = "; ".join(f"{name}: {architecture.released}" for name, architecture in ARCHITECTURES.items())
    parser.add_argument("--arch", choices=ARCHITECTURES, default="v32", help=f"{released} (default: v32)")
    parser.add_argument("--layers", type=int, default=4, help=f"layers besides the drafter's, {_LAYERS} (default: 4)")
    parser.add_argument("--experts", type=int, default=32, help=f"routed experts a layer, {_EXPERTS} (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    parser.set_defaults(func=_run)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """What `make_checkpoint` calls: a bar with sizes and the time left on stderr; without a terminal, a line."""
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not done and not console.is_terminal:
                console.print(f"writing {total / 1e9:.1f} GB", soft_wrap=True)

        yield show


def _run(args: argparse.Namespace) -> int:
    try:
        _check(args.directory, args.arch, args.layers, args.experts)
        import torch  # noqa: F401: before a Ctrl-C is an exception

        stopping.by_exception()
        with progress_bar() as show:
            total = make_checkpoint(args.directory, args.arch, args.layers, args.experts, args.seed, show)
    except (ValueError, OSError, ImportError) as error:
        print(f"vllm-mqa-sm90 make-checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{args.directory}: {args.arch}, {args.layers} layers and the drafter's, {args.experts} experts, {total / 1e9:.1f} GB")
    return 0
