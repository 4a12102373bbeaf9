# SPDX-License-Identifier: Apache-2.0
"""Stands in for `vllm serve MODEL`, `vllm bench serve` and what draws its prompts, with their arguments and without a model.

The server of k speculative tokens gets position p of 200 drafts accepted 160 - 40 p times a request, or not at all,
on each of two engines. It runs as many requests at once as its client says, or --max-num-seqs lets it.
With a profiler its clients take a while.
The client says 100 (k + 1) tok/s, and 10 more with MQA_SM90=require; its requests begin one second after the other, and
a step takes 13 ms until all run, then 12.

Environment: FAKE_LOG, a file that gets a line for each process; FAKE_TROUBLE, "WHAT: PATTERN" makes what has
PATTERN in its line fail to start (`start`), fail (`fail`), draw no prompts (`undrawn`), leave a request out (`lose`),
hang (`hang`), take the server with it (`kill`), answer one request after the other (`one`), or write no trace (`untraced`).
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TEXTS = ["kale", "mo", " tisu"]


def trouble(kind: str, line: str) -> bool:
    what, _, pattern = os.environ.get("FAKE_TROUBLE", "").partition(": ")
    return what == kind and re.search(pattern, line) is not None


def note(line: str) -> None:
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"{line} pid={os.getpid()}\n")


def events(k: int, requests: int) -> list[dict]:
    """Three decode steps and a prefill; of a step, 80 of 100 us are kernels."""
    found = []
    for step, context in enumerate((0, 0, 1, 0)):
        start = 1000.0 + 100 * step
        name = f"execute_context_{context}({7 * context})_generation_{requests}({requests * (k + 1)})"
        found.append({"ph": "X", "cat": "gpu_user_annotation", "name": name, "ts": start, "dur": 80.0})
        found.append({"ph": "X", "cat": "kernel", "name": "mqa_sm90::paged_mqa_logits_kernel<3>", "ts": start, "dur": 30.0})
        found.append({"ph": "X", "cat": "kernel", "name": "nvjet_tst_64x8", "ts": start + 30, "dur": 50.0})
    return found


def accepted_at(k: int) -> list[float]:
    return [max(0, 8 - 2 * position) / 10 for position in range(k)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    k = 0
    requests = 0
    running = profiled = 0
    most = 0
    profiler = None

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(self.metrics())
        else:
            self.answer({"/health": "", "/k": str(self.k), "/profiler": str(self.profiler)}.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if self.path == "/requests":
            Handler.requests += body["requests"]
            Handler.running = min(body["running"], self.most)
            self.answer("")
        elif self.path == "/kill":
            print("out of memory", flush=True)
            os._exit(1)
        elif self.path == "/tokenize":
            self.answer(json.dumps({"tokens": list(body["prompt"].encode())}))
        elif self.path == "/detokenize":
            self.answer(json.dumps({"prompt": bytes(body["tokens"]).decode(errors="replace")}))
        elif self.path == "/start_profile" and self.profiler:
            Handler.profiled = self.running
            self.answer("")
        elif self.path == "/stop_profile" and self.profiler:
            if not trouble("untraced", self.path):
                trace = Path(self.profiler["torch_profiler_dir"], f"rank-0.{time.monotonic_ns()}.pt.trace.json.gz")
                with gzip.open(trace, "wt") as file:
                    json.dump({"traceEvents": events(self.k, self.profiled)}, file)
            self.answer("")
        elif body.get("stream"):
            Handler.requests += 1
            chat = "chat" in self.path
            choices = [[{"delta": {"content": text}} if chat else {"text": text}] for text in TEXTS]
            usage = {"prompt_tokens": 5, "completion_tokens": len(TEXTS), "total_tokens": 8}
            lines = [*({"choices": choice} for choice in choices), {"choices": [], "usage": usage}]
            self.answer("".join(f"data: {line}\n\n" for line in (*map(json.dumps, lines), "[DONE]")))
        else:
            self.answer(None)

    def metrics(self) -> str:
        lines = [f'vllm:num_requests_running{{engine="0"}} {float(self.running)}']
        for engine in (0, 1) if self.k else ():
            lines.append(f'vllm:spec_decode_num_drafts_total{{engine="{engine}"}} {200.0 * self.requests}')
            lines.append(f'vllm:spec_decode_num_draft_tokens_total{{engine="{engine}"}} {200.0 * self.k * self.requests}')
            accepted = [200.0 * rate * self.requests for rate in accepted_at(self.k)]
            lines.append(f'vllm:spec_decode_num_accepted_tokens_total{{engine="{engine}"}} {sum(accepted)}')
            for position, count in enumerate(accepted):
                labels = f'engine="{engine}",position="{position}"'
                lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}} {count}")
        return "\n".join(lines) + "\n"

    def answer(self, text: str | None) -> None:
        content = (text if text is not None else "no such path").encode()
        self.send_response(404 if text is None else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--speculative-config", type=json.loads, default={})
    parser.add_argument("--profiler-config", type=json.loads)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    args, _ = parser.parse_known_args(words)
    Handler.k, Handler.profiler = args.speculative_config.get("num_speculative_tokens", 0), args.profiler_config
    Handler.most = args.max_num_seqs
    line = f"serve {os.environ['MQA_SM90']} k={Handler.k}"
    note(line)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"child pid={child.pid}\n")
    if trouble("start", line):
        raise SystemExit("the pages are too few")
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


def random_prompts(model: str, seed: int, requests: int, tokens: int) -> list[str]:
    line = f"draw {requests}x{tokens}"
    note(line)
    if trouble("undrawn", line):
        raise OSError(f"{model} has no tokenizer")
    return [f"{tokens} tokens of seed {seed}"] * requests


def bench(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--host", "--result-filename", "--dataset-name", "--dataset-path"):
        parser.add_argument(name)
    for name in ("--port", "--num-prompts", "--max-concurrency", "--custom-output-len"):
        parser.add_argument(name, type=int)
    args, _ = parser.parse_known_args(words)

    def call(path: str, body: dict | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(f"http://127.0.0.1:{args.port}{path}", data).read().decode()

    k = int(call("/k"))
    prompts = [json.loads(line)["prompt"] for line in Path(args.dataset_path).read_text().splitlines()]
    assert len(prompts) == args.num_prompts
    random = re.fullmatch(r"(\d+) tokens of seed (\d+)", prompts[0])
    what, seed = random.groups() if random else (len(prompts), None)
    line = f"bench {os.environ['MQA_SM90']} k={k} {args.max_concurrency}x{what} n={args.num_prompts}"
    note(f"{line} seed={seed} tokens={args.custom_output_len}")
    if trouble("hang", line):
        time.sleep(600)
    if trouble("fail", line):
        raise SystemExit("the client is ill")
    if trouble("kill", line):
        call("/kill", {})
    call("/requests", {"requests": args.num_prompts, "running": args.max_concurrency})
    if call("/profiler") != "None":
        time.sleep(0.6)
    call("/requests", {"requests": 0, "running": 0})
    apart = 100.0 if trouble("one", line) else 1.0
    alone = [round((args.max_concurrency - 1 - i) * 1000 / 13) for i in range(args.max_concurrency)] * args.num_prompts
    starts = [100.0 * (i // args.max_concurrency) + apart * (i % args.max_concurrency) for i in range(args.num_prompts)]
    result = {
        "start_times": starts,
        "ttfts": [0.02] * args.num_prompts,
        "itls": [[0.013] * alone[i] + [0.012] * 20 for i in range(args.num_prompts)],
        "generated_texts": ["a" * 100] * args.num_prompts,
        "num_prompts": args.num_prompts,
        "completed": args.num_prompts - trouble("lose", line),
        "median_ttft_ms": 20.0,
        "median_itl_ms": 13.0,
        "median_tpot_ms": 5.0,
        "output_throughput": 100.0 * (k + 1) + 10 * (os.environ["MQA_SM90"] == "require"),
    }
    if k:
        rates = accepted_at(k)
        result["spec_decode_acceptance_rate"] = 100 * sum(rates) / k
        result["spec_decode_per_position_acceptance_rates"] = rates
    Path(args.result_filename).write_text(json.dumps(result))


def main() -> None:
    """What vLLM's command does with sys.argv."""
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        bench(sys.argv[3:])


if __name__ == "__main__":
    main()
