# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-mqa-sm90`. Each sub-command is a module with `add_parser`, which names its function in `func`.

These modules import PyTorch only where a command runs: help and usage errors do not wait for it.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence

from vllm_mqa_sm90 import stopping


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status, 130 after a Ctrl-C."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def command() -> None:
    """`main`, and the end of the process."""
    stopping.at_once()
    status = main()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    # At once: to take PyTorch and vLLM down takes seconds, and after a Ctrl-C threads may be in the middle of a long write.
    os._exit(status)


def _run(argv: Sequence[str]) -> int:
    # Here, so that a Ctrl-C meanwhile has no traceback.
    import argparse

    from vllm_mqa_sm90 import bench, check, checkpoint, demo, machine

    parser = argparse.ArgumentParser(
        prog="vllm-mqa-sm90",
        description="Native decode of DeepSeek Sparse Attention's indexer on Hopper, for vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {machine.version()}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (check, checkpoint, demo, bench):
        module.add_parser(subparsers)
    argv = list(argv)
    # argparse takes words after "--" for a command's last positional only if no option stands between.
    end = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:end])
    passes_on = hasattr(args, "vllm_arguments")
    if unknown:
        hint = f": arguments of vllm serve come last, after --: -- {' '.join([*unknown, *argv[end + 1:]])}" if passes_on else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if passed_on := argv[end + 1 :]:
        if not passes_on:
            parser.error(f"this command passes nothing on to vLLM: expected nothing after --, given {passed_on[0]!r}")
        args.vllm_arguments = passed_on
    args.command = shlex.join(["vllm-mqa-sm90", *argv])  # for reports
    return args.func(args)


if __name__ == "__main__":
    command()
