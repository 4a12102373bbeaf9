# SPDX-License-Identifier: Apache-2.0
"""`vllm-mqa-sm90 bench`: what it measures is a sub-command, a module with `add_parser` each."""

from typing import Any

from vllm_mqa_sm90.bench import kernel, serve


def add_parser(subparsers: Any) -> None:
    """Adds the `bench` command."""
    parser = subparsers.add_parser("bench", help="measure on this machine", description="Benchmarks.")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    kernel.add_parser(benchmarks)
    serve.add_parser(benchmarks)
