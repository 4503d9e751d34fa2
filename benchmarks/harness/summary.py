"""From records to figures: medians of ratios kvlode / peer of the same round, when they are void, and which bars they reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvlode.tools.bench.figures import Bar, Item, skipped_item, value_item

from .data import INCOMPRESSIBLE, KINDS, REAL_KV
from .peers import KVLODE, PEERS
from .rounds import Record

Figure = Callable[[Record], float]


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is measured of every store."""

    name: str
    title: str
    unit: str
    higher_is_better: bool
    figure: Figure
    void: Callable[[Record], str | None] = lambda record: None

    def better(self, ratio: float) -> bool:
        return ratio >= 1 if self.higher_is_better else ratio <= 1


def wrong_blocks(part: str) -> Callable[[Record], str | None]:
    """A get that did not deliver every block as it was put voids its figure."""

    def check(record: Record) -> str | None:
        got = record[part]
        return None if got["correct"] == got["expected"] else f"{got['correct']} of {got['expected']} blocks came back as they were put"

    return check


COLD_SHARE = 0.9


def not_cold(record: Record) -> str | None:
    """All bytes must come from the drive, and all but a tenth after the open: a store with a log reads what lies there when it opens."""
    needed, got = record["stored_bytes"], record["cold"]
    if got["read_bytes_with_open"] >= needed and got["read_bytes"] >= COLD_SHARE * needed:
        return wrong_blocks("cold")(record)
    return f"not cold: {got['read_bytes_with_open']} bytes came from the drive for {needed} bytes of blocks, {got['read_bytes']} by the get"


def lookups_wrong(record: Record) -> str | None:
    return None if record["lookups_right"] else "a lookup gave a wrong answer"


def gb(record: Record) -> float:
    return float(record["raw_bytes"]) / 1e9


ROWS = (
    Row("write", "durable write", "GB/s", True, lambda r: gb(r) / r["write_s"]),
    Row("cold_read", "cold read", "GB/s", True, lambda r: gb(r) / r["cold"]["seconds"], not_cold),
    Row("warm_read", "warm read", "GB/s", True, lambda r: gb(r) / r["warm"]["seconds"], wrong_blocks("warm")),
    Row("lookup_present", "lookup, present", "us/key", False, lambda r: r["lookup_present_us"], lookups_wrong),
    Row("lookup_absent", "lookup, absent", "us/key", False, lambda r: r["lookup_absent_us"], lookups_wrong),
    Row("open_killed", "open after kill", "s", False, lambda r: r["open_s"]),
    Row("disk", "bytes on disk / raw", "ratio", False, lambda r: r["disk_bytes"] / r["raw_bytes"]),
    Row("write_cpu", "CPU, write", "s/GB", False, lambda r: r["write_cpu_s"] / gb(r)),
    Row("read_cpu", "CPU, cold read", "s/GB", False, lambda r: r["cold"]["cpu_s"] / gb(r), not_cold),
)
ROW_OF = {row.name: row for row in ROWS}


@dataclass(frozen=True, slots=True)
class Expectation:
    """A bar for the ratio to the best of some peers."""

    name: str
    data: str
    row: str
    bar: Bar
    file_per_block: bool = False
    """Only against these; else against all."""


EXPECTATIONS = (
    Expectation("expected.write_raw", INCOMPRESSIBLE, "write", Bar(1.0, "at least")),
    Expectation("expected.read_raw", INCOMPRESSIBLE, "cold_read", Bar(1.0, "at least")),
    Expectation("expected.read_kv", REAL_KV, "cold_read", Bar(1.25, "at least")),
    Expectation("expected.disk_kv", REAL_KV, "disk", Bar(0.70, "at most")),
    Expectation("expected.write_raw_files", INCOMPRESSIBLE, "write", Bar(3.0, "at least"), file_per_block=True),
    Expectation("expected.write_kv_files", REAL_KV, "write", Bar(3.0, "at least"), file_per_block=True),
)


class Results:
    """The records of all rounds by kind of blocks and peer."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = [record for record in records if "peer" in record]
        self.missing: dict[str, str] = {}
        for record in records:
            self.missing |= record.get("missing", {})

    def of(self, data: str, peer: str) -> dict[int, Record]:
        return {record["round"]: record for record in self.records if (record["data"], record["peer"]) == (data, peer)}

    def figures(self, row: Row, data: str, peer: str) -> dict[int, float]:
        """Of the rounds in which it ran."""
        found = {}
        for number, record in self.of(data, peer).items():
            try:
                found[number] = row.figure(record)
            except KeyError:
                continue  # the step failed
        return found

    def problem(self, row: Row, data: str, peer: str) -> str | None:
        """The first reason of all rounds why the row's figures of this store must not be used."""
        for record in self.of(data, peer).values():
            errors = [record[name] for name in ("error", "read_error", "kill_error") if name in record]
            try:
                row.figure(record)
                reason = row.void(record)
            except KeyError:
                reason = errors[0] if errors else "not measured"
            if reason:
                return str(reason)
        return None


def summarise(records: Sequence[Record]) -> list[Item]:
    """One item for each row of each peer, what each served after the kill, and the expectations."""
    results = Results(records)
    peers = [peer.name for peer in PEERS]
    items: list[Item] = []
    kinds = [kind for kind in KINDS if any(record["data"] == kind for record in results.records)]
    for data in kinds:
        for row in ROWS:
            items += [compared(results, row, data, name) for name in peers if name != KVLODE]
        items += [served(results, data, name) for name in peers]
    return items + [expected(results, expectation) for expectation in EXPECTATIONS if expectation.data in kinds]


def kvlode_void(items: Sequence[Item]) -> list[str]:
    """What is void because of kvlode itself."""
    return [item.name for item in items if "kvlode_void" in item.absolute]


def compared(results: Results, row: Row, data: str, peer: str, *, name: str = "", bar: Bar | None = None) -> Item:
    """kvlode / peer, round by round."""
    name = name or f"{data}.{row.name}.{peer}"
    ours, theirs = results.figures(row, data, KVLODE), results.figures(row, data, peer)
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds:
        return skipped_item(name, results.missing.get(peer) or results.problem(row, data, peer) or "not measured")
    ratios = [ours[number] / theirs[number] for number in rounds]
    facts = {
        "peer": peer,
        "kvlode": statistics.median(ours[number] for number in rounds),
        "theirs": statistics.median(theirs[number] for number in rounds),
        "unit": row.unit,
        "faster": row.better(statistics.median(ratios)),
    }
    own = results.problem(row, data, KVLODE)
    facts |= {"kvlode_void": own} if own else {}
    void = own or results.problem(row, data, peer)
    return value_item(name, ratios, unit="ratio", bar=bar, facts=facts, void=void)


def served(results: Results, data: str, peer: str) -> Item:
    """The share of the durable blocks that came back right after the kill, in the worst round."""
    name = f"{data}.served_after_kill.{peer}"
    records = [record for record in results.of(data, peer).values() if "served" in record]
    if not records:
        return skipped_item(name, results.missing.get(peer) or results.problem(ROW_OF["open_killed"], data, peer) or "not measured")
    worst = min(records, key=lambda record: record["served"])
    wrong = sum(record["wrong"] for record in records)
    facts = {"peer": peer, "served": worst["served"], "of": worst["served_of"], "wrong_blocks": wrong, "unit": "share"}
    void = f"{wrong} blocks came back wrong" if wrong and peer == KVLODE else None
    facts |= {"kvlode_void": void} if void else {}
    bar = Bar(1.0, "at least") if peer == KVLODE else None
    return value_item(name, [min(r["served"] / r["served_of"] for r in records)], unit="share", bar=bar, facts=facts, void=void)


def expected(results: Results, expectation: Expectation) -> Item:
    """Against the best of the peers in this row, by the median of its own figures."""
    row, data = ROW_OF[expectation.row], expectation.data
    candidates = [peer.name for peer in PEERS if peer.name != KVLODE and (peer.file_per_block or not expectation.file_per_block)]
    medians = {}
    for peer in candidates:
        figures = results.figures(row, data, peer)
        if figures and results.problem(row, data, peer) is None:
            medians[peer] = statistics.median(figures.values())
    if not medians:
        return skipped_item(expectation.name, "none of these peers ran")
    best = (max if row.higher_is_better else min)(medians, key=lambda peer: medians[peer])
    return compared(results, row, data, best, name=expectation.name, bar=expectation.bar)
