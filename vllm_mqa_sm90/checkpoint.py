# SPDX-License-Identifier: Apache-2.0
"""Writes a few-layer DSA checkpoint, so that `vllm serve` runs the real path on one GPU, offline.

The shapes are those of one tensor-parallel rank (of 8) of the released model: what TP splits
(attention heads, MLP widths, vocabulary) is an eighth, what it replicates (the indexer, the
latent projections, the norms) is whole. Weights are random: the text is gibberish, the work is real.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TP_SIZE = 8
INDEX = "model.safetensors.index.json"
RANDOM = "random"
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


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `shape`, and how it is filled.

    gain: standard deviation of `x @ w.T` for unit-variance `x`. None: all ones (a norm's weight).
    alike: draws the numbers of the tensor of this name (the MTP layer shares embedding and head).
    """

    name: str
    shape: tuple[int, ...]
    gain: float | None = 1.0
    dtype: torch.dtype = torch.bfloat16
    alike: str | None = None


def v32_config(layers: int, experts: int) -> dict[str, Any]:
    """DeepSeek-V3.2's config.json as one rank of TP=8 sees it, with `layers` layers and `experts` experts."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "first_k_dense_replace": min(1, layers - 1),
        "hidden_act": "silu",
        "hidden_size": 7168,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 18432 // TP_SIZE,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048 // TP_SIZE,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128 // TP_SIZE,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 128 // TP_SIZE,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 129280 // TP_SIZE,
    }


def v32_shards(config: dict[str, Any]) -> Iterator[list[Tensor]]:
    """The released checkpoint's tensors under its own names, one list per file."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    yield [
        Tensor("model.embed_tokens.weight", (vocab, hidden), gain=hidden**0.5),
        Tensor("model.norm.weight", (hidden,), gain=None),
        Tensor("lm_head.weight", (vocab, hidden)),
    ]
    for layer in range(layers):
        yield list(_v32_layer(config, layer))
    # The MTP layer is stored as one layer more, with its own copy of embedding and head.
    prefix = f"model.layers.{layers}."
    yield [
        *_v32_layer(config, layers),
        Tensor(prefix + "enorm.weight", (hidden,), gain=None),
        Tensor(prefix + "hnorm.weight", (hidden,), gain=None),
        Tensor(prefix + "eh_proj.weight", (hidden, 2 * hidden)),
        Tensor(prefix + "embed_tokens.weight", (vocab, hidden), gain=hidden**0.5, alike="model.embed_tokens.weight"),
        Tensor(prefix + "shared_head.norm.weight", (hidden,), gain=None),
        Tensor(prefix + "shared_head.head.weight", (vocab, hidden), alike="lm_head.weight"),
    ]


def _v32_layer(config: dict[str, Any], layer: int) -> Iterator[Tensor]:
    c, prefix = config, f"model.layers.{layer}."
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    q_rank, kv_rank, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, v_dim = c["qk_nope_head_dim"], c["v_head_dim"]
    index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]

    yield Tensor(prefix + "input_layernorm.weight", (hidden,), gain=None)
    yield Tensor(prefix + "post_attention_layernorm.weight", (hidden,), gain=None)

    attn = prefix + "self_attn."
    yield Tensor(attn + "q_a_proj.weight", (q_rank, hidden))
    yield Tensor(attn + "q_a_layernorm.weight", (q_rank,), gain=None)
    yield Tensor(attn + "q_b_proj.weight", (heads * (nope + rope), q_rank))
    yield Tensor(attn + "kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden))
    yield Tensor(attn + "kv_a_layernorm.weight", (kv_rank,), gain=None)
    yield Tensor(attn + "kv_b_proj.weight", (heads * (nope + v_dim), kv_rank))
    # Averaging over many keys shrinks the values; this keeps the context's part in the residual large.
    yield Tensor(attn + "o_proj.weight", (hidden, heads * v_dim), gain=3.0)

    indexer = attn + "indexer."
    yield Tensor(indexer + "wq_b.weight", (index_heads * index_dim, q_rank))
    yield Tensor(indexer + "wk.weight", (index_dim, hidden))
    yield Tensor(indexer + "k_norm.weight", (index_dim,), gain=None, dtype=torch.float32)
    yield Tensor(indexer + "k_norm.bias", (index_dim,), gain=0.0, dtype=torch.float32)
    yield Tensor(indexer + "weights_proj.weight", (index_heads, hidden))

    mlp = prefix + "mlp."
    if layer < c["first_k_dense_replace"]:
        yield from _mlp(mlp, hidden, c["intermediate_size"])
        return
    experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
    yield Tensor(mlp + "gate.weight", (experts, hidden))
    yield Tensor(mlp + "gate.e_score_correction_bias", (experts,), gain=0.0, dtype=torch.float32)
    yield from _mlp(mlp + "shared_experts.", hidden, width * c["n_shared_experts"])
    for expert in range(experts):
        yield from _mlp(f"{mlp}experts.{expert}.", hidden, width)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield Tensor(prefix + "gate_proj.weight", (width, hidden))
    yield Tensor(prefix + "up_proj.weight", (width, hidden))
    yield Tensor(prefix + "down_proj.weight", (hidden, width))


@dataclass(frozen=True)
class Architecture:
    """How one family of DSA models is laid out on disk."""

    config: Callable[[int, int], dict[str, Any]]
    shards: Callable[[dict[str, Any]], Iterator[list[Tensor]]]


ARCHITECTURES = {"v32": Architecture(v32_config, v32_shards)}


def fill(tensor: Tensor, seed: int) -> torch.Tensor:
    """The values of `tensor`: a function of its name and `seed` alone, whatever is drawn beside it."""
    if tensor.gain is None:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    name = tensor.alike or tensor.name
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    # Uniform: four times as fast to draw as normal, and no heavier in the products.
    bound = tensor.gain * (3.0 / tensor.shape[-1]) ** 0.5
    values = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-bound, bound, generator=generator)
    if name == "lm_head.weight":
        # Tokens of unequal weight keep the best two logits further apart than bf16 rounds.
        values *= torch.empty(tensor.shape[0], 1).normal_(0, 0.7, generator=generator).exp().to(tensor.dtype)
    return values


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

    syllables = [merge(consonant, vowel) for consonant in "tnsrdlmkpbgvfhwjzcy" for vowel in "aeiou"]
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
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="v32", help="v32: DeepSeek-V3.2")
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
