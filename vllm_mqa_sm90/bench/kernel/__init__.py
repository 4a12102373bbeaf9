# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 bench kernel`: its arguments, with the shapes of the decode steps to be timed."""

import argparse
import re
from dataclasses import dataclass
from typing import Any

from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.sizes import HEADS, MAX_NEXT_N, PAGE_SIZES

SEED = 0
_RAGGED = (0.3, 1.7)  # shares of the nominal context


@dataclass(frozen=True)
class Shape:
    """Requests of a step, the tokens each sees, and its query rows.

    Attributes:
        ragged: contexts are 0.3 to 1.7 times `context`; else all have that.
        mixed: requests bring 1 to next_n rows, and the step is a ragged one; else all bring next_n.
    """

    batch: int
    context: int
    ragged: bool = False
    mixed: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From `BxL`, and `:ragged` and `:mixed` after it, for argparse."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(:ragged)?(:mixed)?", text, re.ASCII)
        if match is None:
            expected = "BATCHxCONTEXT[:ragged][:mixed], both at least 1"
            raise argparse.ArgumentTypeError(f"expected {expected}, given {text!r}")
        return cls(int(match[1]), int(match[2]), match[3] is not None, match[4] is not None)

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}{':ragged' if self.ragged else ''}{':mixed' if self.mixed else ''}"

    def contexts(self) -> list[int]:
        """Tokens that the last row of each request sees: the same in every run and for every next_n."""
        if not self.ragged:
            return [self.context] * self.batch
        import torch

        low, high = _RAGGED
        shares = torch.rand(self.batch, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        return [max(1, int(self.context * (low + (high - low) * share))) for share in shares.tolist()]

    def rows(self, next_n: int) -> list[int]:
        """Query rows of each request: the same in every run."""
        if not self.mixed:
            return [next_n] * self.batch
        import torch

        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(1, next_n + 1, (self.batch,), generator=generator).tolist()


def add_parser(subparsers: Any) -> None:
    """Adds `kernel` to the benchmarks."""
    parser = subparsers.add_parser(
        "kernel",
        help="the kernels against the memory floor, and against DeepGEMM and vLLM's top-k where vLLM is installed",
        description="Measures the GPU's read bandwidth, then the logits kernel's time over the memory floor, beside "
        "DeepGEMM where the installed vLLM brings it, and then the indexer's whole step, logits and their top-k: ours, "
        "ours with vLLM's top-k, and stock vLLM's. Exit status: 0 done, 1 no GPU of compute capability 9.0 or a wrong "
        "result, 2 wrong usage.",
    )
    shape = "batch x context; ragged: 0.3 to 1.7 times the context; mixed: 1 to N query rows a request"
    shape += "; may be repeated (default: eight shapes)"
    parser.add_argument("--shape", action="append", type=Shape.parse, metavar="BxL[:ragged][:mixed]", help=shape)
    rows = "query rows a request (default: 1 2 3 4)"
    next_ns = range(1, MAX_NEXT_N + 1)
    parser.add_argument("--next-n", nargs="+", type=int, choices=next_ns, metavar="N", help=rows)
    for name, choices, default, note in (
        ("--heads", HEADS, 64, ""),
        ("--page", PAGE_SIZES, 64, ""),
        ("--top-k", (512, 1024, 2048), 2048, "of a whole step; "),
    ):
        parser.add_argument(name, type=int, choices=choices, default=default, help=f"{note}default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="about a minute: two shapes, next_n 1 and 3, few replays")
    written = "write kernel.json, and plots: kernel.png, kernel-steps.png, both as svg, too"
    parser.add_argument("--output", type=output.directory, metavar="DIR", help=written)
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_mqa_sm90.bench.kernel import run  # with PyTorch

    return run.run(args)
