# SPDX-License-Identifier: Apache-2.0
"""Requests as a busy server gets them, and arguments under which they make a server's steps mixed.

They arrive over time, half of them begin with a prefix that others had, prompts are prefilled in chunks beside the
decoding requests, and the KV cache is too small for all that run: some are preempted. Most prompts end 1 to 3 tokens
after a whole chunk. With two speculative tokens a step with these brings unequal numbers of query tokens: it is ragged.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from servers import MODEL, completion

from vllm_mqa_sm90.server import Server

CHUNK = 128  # tokens of one prompt in one step, two pages
ARGUMENTS = (
    "--served-model-name", MODEL,
    "--max-model-len", "4096",
    "--max-num-seqs", "16",
    "--max-num-batched-tokens", "1024",
    "--long-prefill-token-threshold", str(CHUNK),
    "--enable-prefix-caching",
    "--num-gpu-blocks-override", "160",  # the longest request needs 44
    # Whole requests of three query tokens: nobody pads them otherwise.
    "--cudagraph-capture-sizes", "3", "6", "12", "24", "48",
)  # fmt: skip

_PREFIXES = (4, 10, 18)  # whole chunks; the indexer keeps 16
_COUNT = 160
_SECONDS = 8.0  # in which they arrive


@dataclass(frozen=True)
class Request:
    """One of the requests.

    Attributes:
        at: seconds from the start to its arrival.
        prompt: token ids.
        tokens: of the answer.
    """

    at: float
    prompt: list[int]
    tokens: int

    @property
    def body(self) -> dict[str, object]:
        """For /v1/completions."""
        return completion(self.prompt, self.tokens)


def prompt(length: int, draw: random.Random) -> list[int]:
    """Random ordinary tokens of a made checkpoint."""
    return [draw.randrange(300, 16000) for _ in range(length)]


def requests(seed: int) -> list[Request]:
    """The whole load; another seed has no prompt in common with it."""
    draw = random.Random(seed)
    # vLLM computes a prefix's last page again, as a draft looks past it: with half a chunk more, whole ones are kept.
    half = CHUNK // 2
    prefixes = [prompt(chunks * CHUNK + half, draw) for chunks in _PREFIXES]
    arrivals = itertools.accumulate(draw.expovariate(_COUNT / _SECONDS) for _ in range(_COUNT))
    made = []
    for index, at in enumerate(arrivals):
        begin = draw.choice(prefixes) + prompt(half, draw) if index % 2 else []
        chunks = draw.randint(0, 2) if begin else draw.randint(1, 12)
        rest = draw.randint(1, 3) if index % 6 else draw.randint(4, CHUNK)
        made.append(Request(at, begin + prompt(chunks * CHUNK + rest, draw), draw.randint(32, 96)))
    return made


def send(server: Server, load: Sequence[Request]) -> list[list[int]]:
    """Sends each request when it is due; the tokens of the answers."""
    start = time.monotonic()

    def ask(request: Request) -> list[int]:
        time.sleep(max(0.0, request.at - (time.monotonic() - start)))
        return server.post("/v1/completions", request.body)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(load)) as pool:
        return list(pool.map(ask, load))
