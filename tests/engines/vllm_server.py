"""vLLM's OpenAI-compatible server with the connector, in processes of its own, and clients of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvlode.tools.serving.server import MODEL, ServerOptions, VllmServer, stopped_at_the_end


class Server(VllmServer):
    """A server whose answers are awaited whole."""

    def complete(self, prompt: Sequence[int], max_tokens: int) -> str:
        body = {"model": MODEL, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
        text: str = self.post("/v1/completions", body)["choices"][0]["text"]
        return text

    def complete_all(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
        """All at once, each by a client of its own."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            return list(clients.map(lambda prompt: self.complete(prompt, max_tokens), prompts))


@contextlib.contextmanager
def serving(store: str, log: Path) -> Iterator[Server]:
    """A server that answers, stopped at the end."""
    server = Server(ServerOptions(store), log)
    with stopped_at_the_end(server):
        yield server
