# SPDX-License-Identifier: Apache-2.0
"""Reads commands of `vllm` with the parsers of the installed vLLM, as if on an H100, and configures its engine.

`parse_commands.py < COMMANDS`: a JSON list of lists of words, each from after "vllm" on. Prints a JSON line: for each
`serve` what the engine would do, for each `bench serve` what the client would send, with the prompts where it draws them or
has their file. `draw FILE MODEL WORKLOAD` writes that of a workload, and gives null. Wrong words end it.
"""

import json
import sys
from pathlib import Path

import load_on_meta
import vllm.platforms

from vllm_mqa_sm90.bench.serve import clients
from vllm_mqa_sm90.bench.serve.workloads import Workload

PARALLEL = "tensor", "data", "decode_context"


def main() -> None:
    vllm.platforms._current_platform = load_on_meta.Hopper()
    from vllm.benchmarks.serve import get_samples, get_tokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.cli.benchmark import main as benchmark
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = []
    for words in json.load(sys.stdin):
        if words[0] == "draw":
            _, file, model, workload = words
            clients.write_prompts(Path(file), Workload.parse(workload).prompts(model, rehearsal=False))
            found.append(None)
            continue
        sys.argv[1:] = words  # where `bench` looks for its name
        parser = FlexibleArgumentParser()
        subparsers = parser.add_subparsers(dest="command", required=True)
        (serve if words[0] == "serve" else benchmark).cmd_init()[0].subparser_init(subparsers)
        args = parser.parse_args(words)
        if args.command == "bench":
            found.append({name: value for name, value in vars(args).items() if isinstance(value, (str, int, float))})
            if args.dataset_name == "random" or Path(args.dataset_path).exists():
                mode = {"tokenizer_mode": args.tokenizer_mode, "trust_remote_code": args.trust_remote_code}
                samples = get_samples(args, get_tokenizer(args.model, **mode))
                found[-1]["prompts"] = [sample.prompt for sample in samples]
            continue
        args.model = args.model_tag
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        speculative, transfer = config.speculative_config, config.kv_transfer_config
        found.append(
            {
                "port": args.port,
                "k": speculative.num_speculative_tokens if speculative else 0,
                "rates": speculative.synthetic_acceptance_rates if speculative else None,
                "prefix_caching": config.cache_config.enable_prefix_caching,
                "max_num_seqs": config.scheduler_config.max_num_seqs,
                "profiler": config.profiler_config.profiler,
                "profiled_steps": config.profiler_config.max_iterations,
                "connector": transfer.kv_connector if transfer else None,
                "parallel": [getattr(config.parallel_config, f"{kind}_parallel_size") for kind in PARALLEL],
            }
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
