# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-mqa-sm90`. Each sub-command is a module with `add_parser`, which names its function in `func`."""

import argparse
import sys
from collections.abc import Sequence

from vllm_mqa_sm90 import bench, check, checkpoint, demo


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-mqa-sm90",
        description="Native decode of DeepSeek Sparse Attention's indexer on Hopper, for vLLM.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (check, checkpoint, demo, bench):
        module.add_parser(subparsers)
    argv = list(sys.argv[1:] if argv is None else argv)
    # argparse takes words after "--" for a command's last positional only if no option stands between.
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    if passed_on := argv[end + 1 :]:
        if not hasattr(args, "vllm_arguments"):
            parser.error(f"this command passes nothing on to vLLM: expected nothing after --, given {passed_on[0]!r}")
        args.vllm_arguments = passed_on
    return args.func(args)


if __name__ == "__main__":
    sys.exit(main())
