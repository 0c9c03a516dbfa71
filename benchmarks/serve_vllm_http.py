"""vLLM's server, asked over HTTP as users ask it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection

STARTS_WITHIN, ANSWERS_WITHIN = 600, 300  # seconds
DRAFTS = re.compile(r"^vllm:spec_decode_num_drafts_total\{.*\} (\S+)$", re.MULTILINE)
ACCEPTED = re.compile(
    r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)".*\} (\S+)$', re.MULTILINE
)


def ask_server(
    python: str, environment: dict[str, str], folder: str, prompts: list[list[int]], new_tokens: int, most_tokens: int
) -> dict:
    """What vLLM's server of `folder` answers to `prompts`, greedily, one after the other: new tokens as "texts", and
    its counters, as `serve_vllm_worker` has them.

    Raises:
        RuntimeError: the server ended, or did not come up; what it printed is above.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    host, port = address.split(":")
    # what `vllm serve` starts, which itself asks for the version of a package that the CPU build is not called
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", host, "--port", port]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(most_tokens), "--max-num-seqs", "1"]
    command += ["--no-enable-prefix-caching"]
    server = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, **environment})
    try:
        wait_for(server, address)
        asked = dict(model=folder, max_tokens=new_tokens, temperature=0, ignore_eos=True, return_token_ids=True)
        texts = [
            json.loads(fetch(address, "/v1/completions", {**asked, "prompt": prompt}))["choices"][0]
            for prompt in prompts
        ]
        counted = fetch(address, "/metrics")
    finally:
        server.terminate()
        server.wait()
    accepted = {int(slot): int(float(count)) for slot, count in ACCEPTED.findall(counted)}
    return {
        "texts": [text["token_ids"] for text in texts],
        "num_drafts": sum(int(float(count)) for count in DRAFTS.findall(counted)),
        "accepted_per_slot": [accepted[slot] for slot in sorted(accepted)],
    }


def wait_for(server: subprocess.Popen, address: str) -> None:
    """Until it says that it is there."""
    began = time.monotonic()
    while time.monotonic() - began < STARTS_WITHIN:
        if server.poll() is not None:
            raise RuntimeError(f"vLLM's server ended with status {server.returncode}; see what it printed above.")
        try:
            fetch(address, "/health")
        except (OSError, RuntimeError):  # not there, or not ready yet
            time.sleep(1)
        else:
            return
    raise RuntimeError(f"vLLM's server did not answer within {STARTS_WITHIN} seconds.")


def fetch(address: str, path: str, asked: dict | None = None) -> str:
    """What is at `path` of the server, or its answer to `asked`.

    Raises:
        OSError: nobody answers, or not within the time.
        RuntimeError: an answer that is none.
    """
    connection = HTTPConnection(address, timeout=ANSWERS_WITHIN)
    try:
        if asked is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode("utf-8")
    finally:
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"vLLM's server answered {answer.status} to {path}: {text}")
    return text
