# SPDX-License-Identifier: Apache-2.0
"""What a Ctrl-C does, and a stop from outside (SIGTERM), which is the same."""

import os
import signal
import sys
from types import FrameType


def at_once() -> None:
    """The process ends, with 130: where nothing is to be cleaned up.

    An exception would not do: what is imported in the meantime is partly C++, which aborts at one.
    """
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, _end)


def by_exception() -> None:
    """KeyboardInterrupt from now on: for what has servers or files to clean up."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)
