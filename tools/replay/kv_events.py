"""KV event logs of inference engines as JSON lines: which blocks an engine computed, and when.

One line is one ``KVEventBatch`` as msgspec writes it as JSON, either as an object or as an array: vLLM's
``vllm/distributed/kv_events.py`` has had both (arrays until 2025), SGLang's ``srt/disaggregation/kv_events.py`` writes arrays::

    {"ts": 12.5, "events": [{"type": "BlockStored", "block_hashes": [7, 8], "parent_block_hash": 6, "token_ids": [...], "block_size": 16}]}
    [12.5, [["BlockStored", [7, 8], 6, [...], 16, null]]]

A request is the chain of blocks that an event completes, from the head of the prompt. One that the engine served wholly from its own
cache leaves no event. ``BlockRemoved`` and ``AllBlocksCleared`` concern the engine's own cache and change nothing below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .line import LineError
from .request import Request

JOIN_S = 30.0
"""Blocks that continue a chain so soon are of the same request: prompts are computed in chunks, answers block by block."""
EVENTS = ("BlockStored", "BlockRemoved", "AllBlocksCleared")
_STORED_FIELDS = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")


@dataclass(slots=True, eq=False)
class _Open:
    """A request that may go on."""

    time_s: float
    last_s: float
    tip: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class _Stored:
    hashes: list[int | str]
    parent: int | str | None
    block_tokens: int


def looks_like_events(value: Any) -> bool:
    """Whether a line is a batch of KV events. A batch without events is one too."""
    batch = _batch(value)
    return batch is not None and all(_name(event) in EVENTS for event in batch[1])


class KvEvents:
    """A parser (see ``formats.Parser``) that joins the events of a request."""

    name = "kv-events"

    def __init__(self) -> None:
        self.block_tokens = 0
        self._numbers: dict[int | str, int] = {}
        self._parents: list[int] = []
        """By number, -1 for the head of a chain: as a block was seen first, so that it is the same in every request."""
        self._open: list[_Open] = []
        """From the earliest begin to the latest."""
        self._tips: dict[int, _Open] = {}
        self._last_s = 0.0
        self._other_media = self._forgotten = 0

    def requests(self, value: Any) -> Iterator[Request]:
        """See ``formats.Parser``. The batch is checked as a whole before any of it counts."""
        batch = _batch(value)
        if batch is None:
            raise LineError("no batch of KV events")
        time_s, events = max(self._last_s, batch[0]), batch[1]
        found = [(_name(event), self._stored(event)) for event in events]
        if unknown := [name for name, _ in found if name not in EVENTS]:
            raise LineError(f"no KV event: {str(unknown[0])[:40]!r}")
        self._last_s = time_s
        for name, stored in found:
            if stored is not None:
                self._add(time_s, stored)
            else:
                self._forgotten += name != "BlockStored"
                self._other_media += name == "BlockStored"
        return self._finished()

    def _stored(self, event: Any) -> _Stored | None:
        """A checked BlockStored of the GPU's cache; ``None`` for every other event."""
        if _name(event) != "BlockStored":
            return None
        fields = event if isinstance(event, dict) else dict(zip(_STORED_FIELDS, event[1:], strict=False))
        hashes, parent, block_tokens = fields.get("block_hashes"), fields.get("parent_block_hash"), fields.get("block_size")
        if not isinstance(hashes, list) or not all(_is_hash(one) for one in hashes):
            raise LineError("block_hashes is not a list of numbers or texts")
        if parent is not None and not _is_hash(parent):
            raise LineError("parent_block_hash is no number and no text")
        if type(block_tokens) is not int or not 0 < block_tokens < 1 << 32:
            raise LineError("block_size is not a number of tokens")
        medium, group = fields.get("medium"), fields.get("group_idx")
        if (isinstance(medium, str) and medium.upper() != "GPU") or group not in (None, 0):
            return None  # an offload tier's copy, or a further group of a hybrid model: the same tokens again
        return _Stored(hashes, parent, block_tokens)

    def _add(self, time_s: float, stored: _Stored) -> None:
        if not stored.hashes:
            return
        tip = -1 if stored.parent is None else self._number(stored.parent, -1)
        request = self._tips.pop(tip, None)
        for one in stored.hashes:
            tip = self._number(one, tip)
        if request is None or request.last_s + JOIN_S < time_s:
            request = _Open(time_s, time_s, tip, stored.block_tokens)
            self._open.append(request)
        request.tip, request.last_s = tip, time_s
        self._tips[tip] = request
        self.block_tokens = self.block_tokens or stored.block_tokens

    def _number(self, one: int | str, parent: int) -> int:
        number = self._numbers.setdefault(one, len(self._numbers))
        if number == len(self._parents):
            self._parents.append(parent)
        return number

    def _chain(self, tip: int) -> tuple[int, ...]:
        blocks = []
        while tip >= 0:
            blocks.append(tip)
            tip = self._parents[tip]
        return tuple(reversed(blocks))

    def _finished(self, everything: bool = False) -> Iterator[Request]:
        """Requests that nothing will be added to, in the order in which they began."""
        done = 0
        while done < len(self._open) and (everything or self._open[done].last_s + JOIN_S < self._last_s):
            request = self._open[done]
            if self._tips.get(request.tip) is request:
                del self._tips[request.tip]
            blocks = self._chain(request.tip)
            yield Request(request.time_s, blocks, len(blocks) * request.block_tokens, 0)
            done += 1
        del self._open[:done]

    def rest(self) -> Iterable[Request]:
        """See ``formats.Parser``."""
        return self._finished(everything=True)

    def notes(self) -> list[str]:
        """See ``formats.Parser``."""
        notes = ["requests that the engine served wholly from its own cache leave no events, and are not part of this trace"]
        if self._forgotten:
            notes.append(f"{self._forgotten:,} events of blocks that left the engine's cache change nothing below it")
        if self._other_media:
            notes.append(f"{self._other_media:,} stored events of other media or groups were left out")
        return notes


def _batch(value: Any) -> tuple[float, list[Any]] | None:
    if isinstance(value, dict):
        time_s, events = value.get("ts"), value.get("events")
    elif isinstance(value, list) and len(value) in (2, 3):
        time_s, events = value[0], value[1]
    else:
        return None
    if isinstance(time_s, bool) or not isinstance(time_s, (int, float)) or not 0 <= time_s < 1e15 or not isinstance(events, list):
        return None
    return float(time_s), events


def _name(event: Any) -> object:
    if isinstance(event, dict):
        return event.get("type")
    return event[0] if isinstance(event, list) and event else None


def _is_hash(value: Any) -> bool:
    return type(value) in (int, str)
