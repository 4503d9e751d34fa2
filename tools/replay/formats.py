"""The formats of public traces: what a parsed line of each means.

* ``mooncake``: https://github.com/kvcache-ai/Mooncake (``FAST25-release/traces``): times in milliseconds, 512 tokens a block;
  an id stands for the block and everything before it.
* ``bailian``: https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon: times in seconds, 16 tokens a block.
* ``kv-events`` (also ``vllm``, ``sglang``): see ``kv_events``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from .kv_events import KvEvents, looks_like_events
from .line import LineError
from .request import Request

__all__ = ["PARSERS", "LineError", "Parser", "detect"]

MOONCAKE_BLOCK_TOKENS = 512
BAILIAN_BLOCK_TOKENS = 16
_ID_MAX = 1 << 63


class Parser(Protocol):
    """Turns the values of a trace's lines into requests; keeps what spans lines."""

    name: str
    block_tokens: int

    def requests(self, value: Any) -> Iterable[Request]:
        """The requests that this line completes. Raises ``LineError``; the line then has no effect."""
        ...

    def rest(self) -> Iterable[Request]:
        """What is complete now that the trace has ended."""
        ...

    def notes(self) -> list[str]:
        """What a reader of the report should know of how the trace was understood."""
        ...


class _Requests:
    """A format with one request a line.

    The KV of a block depends on everything before it, so that a block of a request is the chain of ids that leads to it. Where the ids
    of a trace stand for chains already, that changes nothing; Bailian's publisher describes them as hashes of a block's own tokens.
    """

    name = ""
    block_tokens = 0
    seconds_per_unit = 1.0

    def __init__(self) -> None:
        self._chains: dict[tuple[int, int], int] = {}

    def requests(self, value: Any) -> list[Request]:
        if not isinstance(value, dict):
            raise LineError("not an object")
        time_s = _number(value, "timestamp") * self.seconds_per_unit
        ids = value.get("hash_ids")
        if not isinstance(ids, list) or any(type(block) is not int or not -_ID_MAX <= block < _ID_MAX for block in ids):
            raise LineError("hash_ids is not a list of 64-bit numbers")
        input_tokens, output_tokens = _count(value, "input_length"), _count(value, "output_length")
        return [Request(time_s, self._numbered(ids), input_tokens, output_tokens)]

    def _numbered(self, ids: list[int]) -> tuple[int, ...]:
        chains, parent, blocks = self._chains, -1, []
        for block in ids:
            parent = chains.setdefault((parent, block), len(chains))
            blocks.append(parent)
        return tuple(blocks)

    def rest(self) -> list[Request]:
        return []

    def notes(self) -> list[str]:
        return []


class Mooncake(_Requests):
    name = "mooncake"
    block_tokens = MOONCAKE_BLOCK_TOKENS
    seconds_per_unit = 1e-3


class Bailian(_Requests):
    name = "bailian"
    block_tokens = BAILIAN_BLOCK_TOKENS


PARSERS: Mapping[str, Callable[[], Parser]] = {
    "mooncake": Mooncake,
    "bailian": Bailian,
    "kv-events": KvEvents,
    "vllm": KvEvents,
    "sglang": KvEvents,
}


def detect(value: Any) -> str | None:
    """The format that a line is of; ``None`` for no known one."""
    if isinstance(value, dict) and "hash_ids" in value:
        return "bailian" if "chat_id" in value else "mooncake"
    return "kv-events" if looks_like_events(value) else None


def _number(value: Mapping[str, Any], name: str) -> float:
    number = value.get(name)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise LineError(f"{name} is not a number")
    if not 0 <= number < 1e15:
        raise LineError(f"{name} is out of range")
    return float(number)


def _count(value: Mapping[str, Any], name: str) -> int:
    count = value.get(name)
    if type(count) is not int or not 0 <= count < 1 << 40:
        raise LineError(f"{name} is not a number of tokens")
    return count
