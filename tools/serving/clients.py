"""Clients of an OpenAI-compatible server that note when each token arrives, and prompts for them."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ...format.errors import KvlodeError
from .server import ANSWER_TIMEOUT_S, MODEL, VllmServer

HEAD_TOKENS = 4
"""Random tokens that a fresh prompt begins with: vLLM's keys are of a block and all before it, so nothing of it was ever seen."""
RANDOM_TOKENS = range(1000, 40000)


@dataclass(slots=True)
class Timing:
    """One request: when it was sent and when its tokens came (``time.perf_counter``)."""

    started_s: float
    arrivals_s: list[float] = field(default_factory=list)
    token_count: int = 0

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.started_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between one token and the next."""
        return [later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


def tokens_in(line: bytes) -> int:
    """How many tokens a line of a streamed answer brings."""
    if not line.startswith(b"data: {"):
        return 0
    event: Any = json.loads(line.removeprefix(b"data: "))
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))


def stream(server: VllmServer, prompt: Sequence[int], answer_tokens: int, on_token: Callable[[int], None] | None = None) -> Timing:
    """Ask for exactly ``answer_tokens`` greedy tokens. ``on_token`` hears how many have come. Raises ``KvlodeError`` when fewer come."""
    body = {"model": MODEL, "prompt": list(prompt), "max_tokens": answer_tokens, "temperature": 0.0, "ignore_eos": True}
    request = server.request("/v1/completions", {**body, "stream": True, "return_token_ids": True})
    timing = Timing(time.perf_counter())
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
        for line in answer:
            count = tokens_in(line)
            if count:
                timing.arrivals_s.append(time.perf_counter())
                timing.token_count += count
                if on_token is not None:
                    on_token(timing.token_count)
    if timing.token_count != answer_tokens:
        raise server.failure(f"{timing.token_count} tokens came instead of {answer_tokens}")
    return timing


def each_client(server: VllmServer, prompts: Sequence[Sequence[Sequence[int]]], answer_tokens: int) -> list[Timing]:
    """One client for each element, all at once, each asking its prompts one after the other."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        answered = clients.map(lambda own: [stream(server, prompt, answer_tokens) for prompt in own], prompts)
        return [timing for own in answered for timing in own]


class Texts:
    """Prompts made of the tokens of a real text, so that their KV caches compress like those of real prompts."""

    def __init__(self, tokens: Sequence[int], length_max: int) -> None:
        if len(tokens) <= length_max:
            raise KvlodeError("the text is too short", expected=f"more than {length_max} tokens", actual=len(tokens))
        self._tokens = list(tokens)

    def fresh(self, name: str, count: int) -> list[int]:
        """``count`` tokens that share no prefix with those of another name; the same ones for the same name."""
        numbers = random.Random(name)
        head = [numbers.choice(RANDOM_TOKENS) for _ in range(HEAD_TOKENS)]
        start = numbers.randrange(len(self._tokens) - count)
        return [*head, *self._tokens[start : start + count]][:count]
