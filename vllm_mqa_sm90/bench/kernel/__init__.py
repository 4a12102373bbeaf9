# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 bench kernel`: its arguments."""

import argparse
from typing import Any

from vllm_mqa_sm90.bench import output
from vllm_mqa_sm90.bench.kernel.shapes import Shape
from vllm_mqa_sm90.sizes import HEADS, MAX_NEXT_N, PAGE_SIZES

DEFAULT_HEADS, DEFAULT_PAGE, DEFAULT_TOP_K = 64, 64, 2048


def add_parser(subparsers: Any) -> None:
    """Adds `kernel` to the benchmarks."""
    parser = subparsers.add_parser(
        "kernel",
        help="the kernels against the memory floor, and against DeepGEMM and vLLM's top-k where vLLM is installed",
        description="Measures the GPU's read bandwidth, then the logits kernel's time over the memory floor, beside DeepGEMM "
        "where the installed vLLM brings it, and then the indexer's whole step, logits and their top-k: ours, ours with "
        "vLLM's top-k, and stock vLLM's. Exit status: 0 done, 1 no GPU of compute capability 9.0 or a "
        "wrong result, 2 wrong usage.",
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="BxL[:ragged][:mixed]",
        help="batch x context; ragged: 0.3 to 1.7 times the context; mixed: 1 to N query rows a request; may be "
        "repeated (default: eight shapes)",
    )
    parser.add_argument(
        "--next-n",
        nargs="+",
        type=int,
        choices=range(1, MAX_NEXT_N + 1),
        metavar="N",
        help="query rows a request (default: 1 2 3 4)",
    )
    parser.add_argument(
        "--heads", type=int, choices=HEADS, default=DEFAULT_HEADS, help="default: %(default)s"
    )
    parser.add_argument(
        "--page", type=int, choices=PAGE_SIZES, default=DEFAULT_PAGE, help="default: %(default)s"
    )
    parser.add_argument(
        "--top-k", type=int, choices=(512, 1024, 2048), default=DEFAULT_TOP_K, help="of a whole step; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="within a minute: two shapes, next_n 1 and 3, few replays")
    parser.add_argument("--output", type=output.directory, metavar="DIR", help="write kernel.json, and plots: kernel.png, kernel-steps.png, both as svg, too")
    parser.set_defaults(func=_run)


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> int:
    from vllm_mqa_sm90.bench.kernel import run  # with PyTorch

    return run.run(args)
