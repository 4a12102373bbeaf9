# SPDX-License-Identifier: Apache-2.0
"""Writes a few-layer DSA checkpoint, so that `vllm serve` runs the real path on one GPU, offline.

The shapes are those of one tensor-parallel rank (of 8) of the released model. Weights are random: the text is
gibberish, the work is real.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vllm_mqa_sm90.architectures import ARCHITECTURES, Tensor

INDEX = "model.safetensors.index.json"
RANDOM = "random"
HEADS = ("lm_head.weight", "head.weight")
# Shares of draft tokens that real models' MTP layers get accepted on short prompts, by position; on code completion
# 0.953, 0.834. For vLLM's synthetic acceptance: the drafts of random weights mean nothing.
ACCEPTANCE_RATES = [0.813, 0.63]
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
    if tensor.gain is None:
        return torch.full(tensor.shape, tensor.constant, dtype=tensor.dtype)
    name = tensor.alike or tensor.name
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if tensor.below is not None:
        rows, columns = tensor.shape
        return torch.rand(rows, tensor.below, generator=generator).topk(columns).indices.to(tensor.dtype)
    # Uniform: four times as fast to draw as normal, and no heavier in the products.
    bound = tensor.gain * (3.0 / tensor.shape[-1]) ** 0.5
    # FP8 cannot be drawn.
    dtype = torch.bfloat16 if tensor.dtype.itemsize == 1 else tensor.dtype
    values = torch.empty(tensor.shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
    if name in HEADS:
        # Tokens of unequal weight keep the best two logits further apart than bf16 rounds.
        values *= torch.empty(tensor.shape[0], 1).normal_(0, 0.7, generator=generator).exp().to(dtype)
    return values.to(tensor.dtype)


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


def make_checkpoint(directory: Path, arch: str = "v32", layers: int = 4, experts: int = 32, seed: int = 0) -> int:
    """Writes the checkpoint into `directory` (created; must be empty) and returns its size in bytes.

    arch: a key of `ARCHITECTURES`. layers: at least 1, the MTP layer comes on top.
    experts: routed experts per layer, a multiple of 8 from 16 to 256.
    Raises ValueError for arguments out of range and FileExistsError for a directory with files in it.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if layers < 1:
        raise ValueError(f"layers: expected at least 1, got {layers}")
    # Eight routing groups; each is scored by its best two experts.
    if experts % 8 or not 16 <= experts <= 256:
        raise ValueError(f"experts: expected a multiple of 8 from 16 to 256, got {experts}")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: name a new directory, or remove it first")
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    config = ARCHITECTURES[arch].config(layers, experts)
    shards = list(ARCHITECTURES[arch].shards(config))

    def write(index: int) -> dict[str, str]:
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {tensor.name: fill(tensor, seed) for tensor in shards[index]}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        return dict.fromkeys(tensors, file)

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for files in pool.map(write, range(len(shards))):
            weight_map.update(files)
    total = sum(file.stat().st_size for file in directory.glob("*.safetensors"))

    make_tokenizer(config["vocab_size"]).save_pretrained(directory)
    metadata = {"total_size": total, "weights": RANDOM}
    _write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map})
    # Last: a directory with a config.json is a complete checkpoint.
    _write_json(directory / "config.json", config)
    return total


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
        "of one tensor-parallel rank (of 8), MTP layer included. Needs an installed vLLM's libraries, no GPU, no network.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write; created, must be empty")
    released = "; ".join(f"{name}: {architecture.released}" for name, architecture in ARCHITECTURES.items())
    parser.add_argument("--arch", choices=ARCHITECTURES, default="v32", help=f"{released} (default: v32)")
    parser.add_argument("--layers", type=int, default=4, help="layers besides the MTP layer (default: 4)")
    parser.add_argument("--experts", type=int, default=32, help="routed experts a layer, 16 to 256 (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        total = make_checkpoint(args.directory, args.arch, args.layers, args.experts, args.seed)
    except (ValueError, OSError, ImportError) as error:
        print(f"make-checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{args.directory}: {args.arch}, {args.layers} layers and an MTP layer, {args.experts} experts, {total / 1e9:.1f} GB")
    return 0
