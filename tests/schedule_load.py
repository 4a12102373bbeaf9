# SPDX-License-Identifier: Apache-2.0
"""Puts the mixed load through the installed vLLM's own scheduler, as if on an H100, with a model that drafts badly.

`schedule_load.py WORD...`: the words of `vllm serve` from "serve" on. Prints a JSON line of what the steps were like.
"""

import json
import random
import sys
from collections import deque

import load_on_meta
import mixed_load
import torch
import vllm.platforms

STEP_SECONDS, TOKEN_SECONDS = (0.008, 10e-6)  # of a step, and for each of its tokens; about what an H100 takes
ACCEPTED = 0.05  # share of first drafts


def main(words: list[str]) -> None:
    vllm.platforms._current_platform = load_on_meta.Hopper()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli import serve
    from vllm.sampling_params import SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    parser = FlexibleArgumentParser()
    serve.cmd_init()[0].subparser_init(parser.add_subparsers(dest="command", required=True))
    args = parser.parse_args(words)
    args.model = args.model_tag
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    profiler, drafted = (config.profiler_config, config.speculative_config.num_speculative_tokens)
    # The same order of steps, one after the other.
    config.scheduler_config.async_scheduling = False
    config.cache_config.num_gpu_blocks = pages = config.cache_config.num_gpu_blocks_override
    page = mixed_load.CHUNK // 2
    cache = MLAAttentionSpec(block_size=page, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    cache_config = KVCacheConfig(
        num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], cache)]
    )
    scheduler = Scheduler(config, cache_config, StructuredOutputManager(config), block_size=page, log_stats=True)
    init_none_hash(sha256)
    ahead = getattr(config, "num_hash_lookahead_tokens", 0)  # since 0.33
    hasher = get_request_block_hasher(page, sha256, *([ahead] if ahead else []))

    draw, now, due = random.Random(0), 0.0, deque(enumerate(mixed_load.requests(1)))
    found = dict.fromkeys(("steps", "ragged", "beside_prefill", "preemptions", "hits", "answers"), 0)
    while due or scheduler.has_unfinished_requests():
        while due and due[0][1].at <= now:
            index, request = due.popleft()
            params = SamplingParams(max_tokens=request.tokens, ignore_eos=True)
            scheduler.add_request(Request(str(index), request.prompt, params, None, block_hasher=hasher))
        step = scheduler.schedule()
        lengths = step.num_scheduled_tokens
        if not lengths:
            now = due[0][1].at
            continue
        decoding = [length for length in lengths.values() if length <= drafted + 1]
        found["steps"] += 1
        found["ragged"] += len(set(decoding)) > 1
        found["beside_prefill"] += 0 < len(decoding) < len(lengths)
        found["preemptions"] += len(step.preempted_req_ids or ())

        sampled = []
        for name in lengths:
            request, drafts = (scheduler.requests[name], step.scheduled_spec_decode_tokens.get(name, []))
            if not drafts and request.num_computed_tokens < request.num_tokens:
                sampled.append([])  # in the middle of its prompt
            else:
                accepted = drafts[:1] if draw.random() < ACCEPTED else []
                sampled.append([*accepted, *mixed_load.prompt(1, draw)])
        names = list(lengths)
        output = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled_token_ids=sampled)
        for engine in scheduler.update_from_output(step, output).values():
            found["answers"] += sum(each.finish_reason is not None for each in engine.outputs)
            if engine.scheduler_stats:
                found["hits"] += engine.scheduler_stats.prefix_cache_stats.hits
        going_on = [name for name, tokens in zip(names, sampled, strict=True) if tokens]
        scheduler.update_draft_token_ids(DraftTokenIds(going_on, [mixed_load.prompt(drafted, draw) for _ in going_on]))
        now += STEP_SECONDS + sum(lengths.values()) * TOKEN_SECONDS
    print(json.dumps({**found, "profiler": profiler.profiler, "profiled_steps": profiler.max_iterations}))


if __name__ == "__main__":
    main(sys.argv[1:])
