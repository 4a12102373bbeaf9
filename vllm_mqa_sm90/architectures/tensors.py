# SPDX-License-Identifier: Apache-2.0
"""What the tensors of all families are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TP_SIZE = 8
FP8_BLOCK = 128
# Of every FP8 block. Weights are about 1 / sqrt(inputs): divided by this, in the middle of e4m3's range.
FP8_SCALE = 2.0**-8


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `shape`, `dtype` (PyTorch's name), and how it is filled.

    gain: standard deviation of `x @ w.T` for unit-variance `x`. None: all `constant` (a norm's weight).
    alike: draws the numbers of the tensor of this name (the MTP layer shares embedding and head).
    below: instead of all that, each row holds different integers less than this (experts).
    """

    name: str
    shape: tuple[int, ...]
    gain: float | None = 1.0
    dtype: str = "bfloat16"
    alike: str | None = None
    constant: float = 1.0
    below: int | None = None


def ends(config: dict[str, Any], embedding: str, norm: str, head: str) -> Iterator[Tensor]:
    """What is before the layers and after them."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Tensor(embedding + ".weight", (vocab, hidden), gain=hidden**0.5)
    yield Tensor(norm + ".weight", (hidden,), gain=None)
    yield Tensor(head + ".weight", (vocab, hidden))


def mlp(prefix: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield Tensor(prefix + "gate_proj.weight", (width, hidden))
    yield Tensor(prefix + "up_proj.weight", (width, hidden))
    yield Tensor(prefix + "down_proj.weight", (hidden, width))


def fp8_mlp(prefix: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield from fp8(prefix + "w1", (width, hidden))
    yield from fp8(prefix + "w2", (hidden, width))
    yield from fp8(prefix + "w3", (width, hidden))


def fp8(name: str, shape: tuple[int, int], gain: float = 1.0) -> Iterator[Tensor]:
    """An FP8 matrix and the float32 scales of its blocks."""
    rows, columns = shape
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    yield Tensor(name + ".weight", shape, gain / FP8_SCALE, "float8_e4m3fn")
    yield Tensor(name + ".scale", blocks, None, "float32", constant=FP8_SCALE)


def hyper_connection(prefix: str, config: dict[str, Any], mixes: int, scales: int) -> Iterator[Tensor]:
    """What mixes the `hc_mult` residual streams: a product with all of them makes the `mixes` factors."""
    yield Tensor(prefix + "_fn", (mixes, config["hc_mult"] * config["hidden_size"]), dtype="float32")
    yield Tensor(prefix + "_base", (mixes,), gain=0.0, dtype="float32")
    yield Tensor(prefix + "_scale", (scales,), gain=None, dtype="float32")


def streams(prefix: str, config: dict[str, Any]) -> Iterator[Tensor]:
    """What joins a layer's two parts to the residual streams."""
    # For each stream: how much of it goes in, of the result comes back, and of every stream stays.
    mixes = (2 + config["hc_mult"]) * config["hc_mult"]
    for part in "attn", "ffn":
        yield from hyper_connection(f"{prefix}hc_{part}", config, mixes, scales=3)
