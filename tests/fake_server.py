# SPDX-License-Identifier: Apache-2.0
"""Answers like `vllm serve`, without a model: `fake_server.py PORT [LAUNCHES]`. Starts a child, as vLLM does."""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="demo"} 200.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="demo"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="demo"} 400.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="demo"} 280.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="demo",position="0"} 160.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="demo",position="1"} 120.0
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",model_name="demo",position="0"} 1.7e+09
"""
TEXTS = ["kale", "mo", " tisu"]


class Handler(BaseHTTPRequestHandler):
    reports = 0

    def do_GET(self) -> None:
        if self.path == "/slow":
            print("slow", flush=True)
            time.sleep(60)
        self.answer({"/health": "", "/metrics": METRICS}.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        usage = {"completion_tokens": body.get("max_tokens")}
        if self.path == "/collective_rpc":
            launches = {"1": 10, "3": 5 + LAUNCHES * Handler.reports}
            Handler.reports += 1
            report = {"taken_over": True, "reason": None, "layers": ["model.layers.0"], "launches": launches}
            self.answer(json.dumps({"results": [{**report, "versions": {"vllm": "0.0"}}]}))
        elif body.get("stream"):
            events = [{"choices": [{"delta": {"content": text}}]} for text in TEXTS] + [{"choices": [], "usage": usage}]
            lines = [*map(json.dumps, events), "[DONE]"]
            self.answer("".join(f"data: {line}\n\n" for line in lines))
        elif self.path == "/v1/completions":
            self.answer(json.dumps({"choices": [{"text": "".join(TEXTS)}], "usage": usage}))
        else:
            self.answer(None)

    def answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "no such path").encode())


if __name__ == "__main__":
    LAUNCHES = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"child {child.pid}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
