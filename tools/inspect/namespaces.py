"""``inspect namespaces``: which of them take how much, how well they compress, how old and how used they are, and what they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from ...format.errors import InvalidConfig, KvlodeError
from ...format.layout import PAGE_BYTES, RecordType, segment_name
from ...format.namespace import Namespace
from ..liveness import RecordState
from ..output import age_text, bytes_text, make_table, print_left_out, print_problems, print_table, printable
from ..segment_view import SegmentView, codec_name
from .survey import HOT_HITS, Survey

_DESCRIPTOR_TRIES = 3
Rows = npt.NDArray[np.intp]


@dataclass(slots=True)
class NamespaceFacts:
    """Figures of one namespace. Lengths of live blocks only; ``dead_bytes`` is what its other blocks take in segments."""

    digest: bytes
    descriptor: Namespace | None = None
    problem: str | None = None
    """Why the descriptor is not known."""
    tries: int = 0
    blocks_live: int = 0
    blocks_dead: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    dead_bytes: int = 0
    depth_max: int = 0
    oldest_written_at_ns: int = 0
    newest_written_at_ns: int = 0
    hits: int = 0
    hot_blocks: int = 0
    codecs: Counter[str] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {name: getattr(self, name) for name in self.__slots__ if name not in ("descriptor", "tries", "problem")}
        values["digest"] = self.digest.hex()
        values["descriptor"] = None if self.descriptor is None else json.loads(self.descriptor.canonical_json())
        values["ratio"] = round(self.raw_bytes / self.stored_bytes, 4) if self.stored_bytes else None
        return values


def collect_namespaces(survey: Survey) -> list[NamespaceFacts]:
    """All namespaces of the log, the one that takes most first."""
    found: dict[bytes, NamespaceFacts] = {}
    for view, states in survey.views():
        digests = np.frombuffer(view.table.namespace.tobytes(), dtype="V16")
        for digest in dict.fromkeys(view.table.namespace.tolist()):
            space = found.setdefault(digest, NamespaceFacts(digest))
            rows = np.flatnonzero(digests == np.void(digest))
            kinds = view.table.type[rows]
            for row in rows[kinds == RecordType.NAMESPACE].tolist():
                _describe(survey, space, view, row)
            _count(survey, space, view, rows[kinds == RecordType.BLOCK], states)
    return sorted(found.values(), key=lambda space: (-space.stored_bytes, -space.dead_bytes, space.digest))


def _describe(survey: Survey, space: NamespaceFacts, view: SegmentView, row: int) -> None:
    if space.descriptor is not None or space.tries >= _DESCRIPTOR_TRIES:
        return
    space.tries += 1
    try:
        descriptor = survey.files.namespace(view.segment_id, view.table, row)
        if descriptor.digest == space.digest:
            space.descriptor = descriptor
        else:
            space.problem = f"{segment_name(view.segment_id)}: the descriptor of {space.digest.hex()} has another digest"
    except (KvlodeError, OSError) as error:
        space.problem = f"{segment_name(view.segment_id)}: {error}"


def _count(survey: Survey, space: NamespaceFacts, view: SegmentView, blocks: Rows, states: npt.NDArray[np.uint8]) -> None:
    """Add the blocks of one namespace in one segment."""
    table = view.table
    is_live = states[blocks] == RecordState.LIVE
    live, dead = blocks[is_live], blocks[~is_live]
    space.blocks_dead += len(dead)
    space.dead_bytes += int(table.record_pages[dead].sum(dtype=np.int64)) * PAGE_BYTES
    if not len(live):
        return
    written = table.written_at_ns[live]
    space.blocks_live += len(live)
    space.raw_bytes += int(table.raw_length[live].sum(dtype=np.int64))
    space.stored_bytes += int(table.stored_length[live].sum(dtype=np.int64))
    space.depth_max = max(space.depth_max, int(table.depth[live].max()))
    space.oldest_written_at_ns = min(space.oldest_written_at_ns or int(written.min()), int(written.min()))
    space.newest_written_at_ns = max(space.newest_written_at_ns, int(written.max()))
    for codec, count in enumerate(np.bincount(table.codec[live]).tolist()):
        if count:
            space.codecs[codec_name(codec)] += count
    hits = survey.hits_of(view, live)
    space.hits += sum(hits)
    space.hot_blocks += sum(count >= HOT_HITS for count in hits)


def namespaces_facts(survey: Survey, limit: int) -> dict[str, Any]:
    """The ``limit`` largest."""
    spaces = collect_namespaces(survey)
    problems = [space.problem for space in spaces if space.descriptor is None and space.problem is not None]
    return {
        "path": str(survey.files.path),
        "rows": [space.facts() for space in spaces[:limit]],
        "rows_left_out": max(0, len(spaces) - limit),
        "heat_known": survey.heat is not None,
        "problems": survey.problems + problems,
    }


def print_namespaces(console: Console, facts: dict[str, Any], now_ns: int) -> None:
    """For people: a table, then each descriptor."""
    columns = ["namespace", "model", "blocks", "stored", "ratio", "dead", "hits"]
    if console.width >= 120:
        columns = [
            "namespace",
            "model",
            "dtype",
            "live",
            "gone",
            "raw",
            "stored",
            "ratio",
            "dead",
            "depth",
            "oldest",
            "newest",
            "hits",
            "hot",
            "codecs",
        ]
    table = make_table(*columns, right=set(columns) - {"namespace", "model", "dtype", "codecs"})
    for row in facts["rows"]:
        descriptor = row["descriptor"] or {"model": "(descriptor lost)", "dtype": "-"}
        cells = {
            "namespace": row["digest"][:12],
            "model": printable(descriptor["model"]),
            "dtype": descriptor["dtype"],
            "blocks": f"{row['blocks_live']:,}",
            "live": f"{row['blocks_live']:,}",
            "gone": f"{row['blocks_dead']:,}",
            "raw": bytes_text(row["raw_bytes"]),
            "stored": bytes_text(row["stored_bytes"]),
            "ratio": f"{row['ratio']:.2f}" if row["ratio"] else "-",
            "dead": bytes_text(row["dead_bytes"]),
            "depth": str(row["depth_max"]),
            "oldest": age_text(row["oldest_written_at_ns"], now_ns),
            "newest": age_text(row["newest_written_at_ns"], now_ns),
            "hits": f"{row['hits']:,}" if facts["heat_known"] else "-",
            "hot": f"{row['hot_blocks']:,}" if facts["heat_known"] else "-",
            "codecs": ", ".join(f"{count:,} {name}" for name, count in sorted(row["codecs"].items())) or "-",
        }
        table.add_row(*(cells[name] for name in columns))
    print_table(console, table)
    for row in facts["rows"]:
        if row["descriptor"] is not None:
            console.print(f"\n{row['digest']}", style="bold")
            console.print(printable(json.dumps(row["descriptor"], ensure_ascii=False, sort_keys=True)), soft_wrap=True)
    print_left_out(console, facts["rows_left_out"], "namespaces")
    print_problems(console, facts["problems"])


def choose_namespace(survey: Survey, text: str | None) -> bytes:
    """The namespace whose digest begins with ``text`` (hex); the only one without it. Raises ``InvalidConfig``."""
    digests = survey.log.namespaces()
    if text is not None and (set(text.lower()) - set("0123456789abcdef")):
        raise InvalidConfig("the namespace cannot be read", expected="its digest, or the beginning of it, in hex", actual=text)
    fits = [digest for digest in digests if text is None or digest.hex().startswith(text.lower())]
    if len(fits) != 1:
        names = ", ".join(sorted(digest.hex()[:12] for digest in digests)[:8])
        raise InvalidConfig(
            "no namespace was named" if text is None else "that names no namespace" if not fits else "that names several namespaces",
            where=survey.files.path,
            expected=f"--namespace with one of {names}" if digests else "a store with blocks",
            actual="none" if text is None else text,
        )
    return fits[0]


def live_rows(survey: Survey, digest: bytes) -> Iterator[tuple[SegmentView, Rows]]:
    """Segments with the rows of the live blocks of one namespace."""
    for view, states in survey.views():
        wanted = np.frombuffer(view.table.namespace.tobytes(), dtype="V16") == np.void(digest)
        rows = np.flatnonzero(wanted & (states == RecordState.LIVE))
        if len(rows):
            yield view, rows
