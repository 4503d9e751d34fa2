"""vLLM's OpenAI-compatible server with the connector, in processes of its own, and clients of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvlode.tools.demo_model import model_folder

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 600.0
POLL_S = 0.5
HITS = re.compile(r"^vllm:external_prefix_cache_hits_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)


class Server:
    """A running server; ``log`` is where its output goes."""

    def __init__(self, store: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        transfer = {
            "kv_connector": "KvlodeConnector",
            "kv_connector_module_path": "kvlode.adapters.vllm_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"path": store, "capacity": "2GiB"},
        }
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model_folder()[0]),
            "--served-model-name",
            "m",
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
        command += ["--kv-transfer-config", json.dumps(transfer)]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    def wait_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        waiting = threading.Event()
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline_s, "the server does not start: " + self.log.read_text()[-4000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.get("/health")
                return
            waiting.wait(POLL_S)

    def complete(self, prompt: Sequence[int], max_tokens: int) -> str:
        body = {"model": "m", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            result: Any = json.loads(answer.read())
        text: str = result["choices"][0]["text"]
        return text

    def complete_all(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
        """All at once, each by a client of its own."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            return list(clients.map(lambda prompt: self.complete(prompt, max_tokens), prompts))

    def hit_tokens(self) -> int:
        """Tokens that came from the store, by vLLM's own count."""
        return sum(int(float(found)) for found in HITS.findall(self.get("/metrics")))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(store: str, log: Path) -> Iterator[Server]:
    """A server that answers, stopped at the end."""
    server = Server(store, log)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
