# SPDX-License-Identifier: Apache-2.0
"""Rows of logits that are hard to select from, and the selection that must come out, on the device that they are on."""

import torch

KINDS = (
    "normal", "equal", "zeros", "two values", "few values", "one huge bin", "descending", "ascending", "wide", "NaN",
    "mostly NaN", "infinite", "large", "any bits", "masked", "no numbers", "huge", "denormal",
)  # fmt: skip


def rows(kind: str, count: int, columns: int, seed: int = 0, device: str = "cuda") -> torch.Tensor:
    """float32 `[count, columns]`, rows a multiple of 64 columns apart, what is between them larger than all others."""
    generator = torch.Generator(device).manual_seed(seed)
    storage = torch.full((count, -(-columns // 64) * 64), torch.inf, device=device)
    x = torch.randn(count, columns, generator=generator, device=device)
    line = torch.arange(columns, device=device).float().expand(count, -1)
    values = {
        "normal": lambda: x,
        "equal": lambda: torch.full_like(x, -1.5),
        "zeros": lambda: torch.where(x > 0, 0.0, -0.0),
        "two values": lambda: (x > 0.3).float(),
        "few values": lambda: (x * 3).round(),
        "one huge bin": lambda: 1 + x * 1e-6,
        "descending": lambda: -0.01 * line,
        "ascending": lambda: 1e-3 * line,
        "wide": lambda: x * torch.exp(20 * torch.randn(count, columns, generator=generator, device=device)),
        "NaN": lambda: torch.where(x > 2.5, torch.nan, x),
        "mostly NaN": lambda: torch.where(x > -0.5, torch.where(x > 0, torch.nan, -torch.nan), x),
        "infinite": lambda: torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x)),
        "large": lambda: x * 1e8,
        "masked": lambda: torch.where(line % 4000 == 77, x, torch.finfo(torch.float32).min),
        "no numbers": lambda: torch.where(line % 4000 == 77, x, torch.where(x > 0, torch.inf, -torch.inf)),
        "huge": lambda: torch.where(x > 3, -torch.inf, 1e38 + x * 1e31),
        "denormal": lambda: x * 1e-41,
        "any bits": lambda: torch.randint(-(2**31), 2**31, x.shape, generator=generator, device=device).int().view(torch.float32),
    }[kind]()
    storage[:, :columns] = values
    return storage[:, :columns]


def expected(logits: torch.Tensor, context_lens: torch.Tensor, k: int) -> torch.Tensor:
    """As `reference.topk_indices`, by torch.topk over numbers that are all different: of all rows at once.

    A logit and its index make one int64: bits in the order of the logits, then the lower index as the larger number.
    """
    count, columns = logits.shape
    bits = (logits + 0.0).masked_fill(logits.isnan(), torch.nan).contiguous().view(torch.int32).long()  # +0, one NaN
    ordered = torch.where(bits < 0, ~bits, bits + 2**31) & 0xFFFFFFFF
    index = torch.arange(columns, device=logits.device)
    lens = context_lens.reshape(-1, 1).clamp(0, columns)
    numbers = (ordered * 2**31 + (2**31 - 1 - index)).masked_fill_(index >= lens, -1)
    best, chosen = numbers.topk(min(k, columns), dim=1, sorted=False)
    chosen = chosen.masked_fill_(best < 0, columns).int().sort(dim=1).values
    indices = torch.full((count, k), -1, dtype=torch.int32, device=logits.device)
    indices[:, : chosen.shape[1]] = chosen.masked_fill_(chosen == columns, -1)
    return indices
