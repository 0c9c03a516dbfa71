"""A real vLLM, which drafts with an exported drafter what is drafted here. It takes an environment of its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import serve_vllm
from benchmarks.serve_vllm_http import ask_server

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("SPECFORMER_VLLM", ROOT / ".venv-vllm"))


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

METRICS = '''# HELP vllm:spec_decode_num_drafts_total of all
vllm:spec_decode_num_drafts_total{engine="0",model_name="a } b"} 12.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a",position="1"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a",position="0"} 9.0
'''

class Handler(BaseHTTPRequestHandler):
    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.answer(METRICS if self.path == "/metrics" else "")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == sys.argv[sys.argv.index("--model") + 1] and asked["temperature"] == 0
        self.answer(json.dumps({"choices": [{"token_ids": asked["prompt"][: asked["max_tokens"]]}]}))

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("ends", [False, True])
def test_a_server_is_asked_and_told_to_end(ends: bool, tmp_path: Path):
    command = tmp_path / "python"
    command.write_text(f"#!{sys.executable}\n{'raise SystemExit(3)' if ends else SERVER}", encoding="utf-8")
    command.chmod(0o755)
    asked = dict(prompts=[[5, 6, 7], [8]], new_tokens=2, most_tokens=16)
    if ends:
        with pytest.raises(RuntimeError, match="ended with status 3"):
            ask_server(str(command), {}, "a folder", **asked)
        return
    found = ask_server(str(command), {}, "a folder", **asked)
    assert found == {"texts": [[5, 6], [8]], "num_drafts": 12, "accepted_per_slot": [9, 4]}


@pytest.mark.slow
@pytest.mark.parametrize("http", [False, True])
@pytest.mark.skipif(
    not (VENV / serve_vllm.READY).exists(),
    reason="no environment with vLLM: python -m benchmarks.serve_vllm makes one, SPECFORMER_VLLM names its folder",
)
def test_vllm_drafts_the_same_and_writes_the_same(http: bool, tmp_path: Path):
    asked = dict(venv=VENV, output=tmp_path / "result.json", http=http, drafter=None, target=None, max_new_tokens=40)
    assert serve_vllm.main(argparse.Namespace(**asked)) == 0
    drafters = json.loads(asked["output"].read_text(encoding="utf-8"))["drafters"]
    assert len(drafters) == 8
    for figures in drafters.values():
        assert figures["texts_are_those_without_drafter"] and figures["texts_are_those_of_specformer"]
        assert figures["vllm_num_drafts"] == figures["specformer_num_drafts"]
        assert figures["vllm_accepted_per_slot"] == figures["specformer_accepted_per_slot"]
        assert 0 < figures["vllm_accepted_per_slot"][0] < figures["vllm_num_drafts"]  # they could differ


def test_an_environment_is_made_nowhere_else(tmp_path: Path):
    (tmp_path / "mine").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError, match="exists and is no environment"):
        serve_vllm.vllm_python(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
