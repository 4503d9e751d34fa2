"""Which records count, against a plain reading of SPEC.md part 8; and reading a file with holes, against its bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlode.format.layout import PAGE_BYTES, RecordType
from kvlode.format.record import RecordHeader
from kvlode.format.stripe import STRIPE_DTYPE
from kvlode.gds.posix import PosixDevice
from kvlode.tools.liveness import LogStates, Place, RecordState
from kvlode.tools.segment_reader import SegmentReader, data_ranges
from kvlode.tools.segment_view import table_of

SPACES = [bytes([number]) * 16 for number in (1, 2)]
KEYS = [b"a", b"b", b"c"]
NOW_NS = 1000

RECORDS = st.lists(
    st.tuples(
        st.sampled_from([RecordType.BLOCK, RecordType.BLOCK, RecordType.BLOCK, RecordType.TOMBSTONE, RecordType.NAMESPACE_DROP]),
        st.sampled_from(SPACES),
        st.sampled_from(KEYS),
        st.integers(0, 30),  # version_seq
        st.sampled_from([0, 0, 500, 1000, 1500]),  # expires_at_ns
        st.booleans(),  # begins a new segment
    ),
    max_size=40,
)


def headers_of(records: list[tuple[RecordType, bytes, bytes, int, int, bool]]) -> dict[int, list[RecordHeader]]:
    """The records as headers in segments, laid in their order."""
    segments: dict[int, list[RecordHeader]] = {1: []}
    for number, (kind, space, key, version, expires_at_ns, new_segment) in enumerate(records):
        if new_segment:
            segments[max(segments) + 1] = []
        segment_id = max(segments)
        laid = segments[segment_id]
        is_block = kind is RecordType.BLOCK
        header = RecordHeader(
            record_type=kind,
            store_uuid=b"u" * 16,
            segment_id=segment_id,
            offset=laid[-1].offset + laid[-1].record_bytes if laid else PAGE_BYTES,
            epoch=1,
            version_seq=version,
            record_seq=100 + number,
            synced_bytes=0,
            namespace=space,
            key=b"" if kind is RecordType.NAMESPACE_DROP else key,
            stripe_bytes=PAGE_BYTES if is_block else 0,
            raw_length=10 if is_block else 0,
            stored_length=10 if is_block else 0,
            expires_at_ns=expires_at_ns if is_block else 0,
            stripes=np.zeros(1 if is_block else 0, dtype=STRIPE_DTYPE),
        )
        laid.append(header)
    return segments


def expected_states(segments: dict[int, list[RecordHeader]]) -> dict[tuple[int, int], RecordState]:
    """SPEC.md part 8 word by word, a record at a time."""
    everything = [header for laid in segments.values() for header in laid]
    states = {}
    for header in everything:
        place = (header.segment_id, header.offset)
        if header.record_type is not RecordType.BLOCK:
            states[place] = RecordState.NOTE
            continue
        kills = [other for other in everything if other.namespace == header.namespace and other.version_seq > header.version_seq]
        if any(other.record_type is RecordType.TOMBSTONE and other.key == header.key for other in kills):
            states[place] = RecordState.DELETED
        elif any(other.record_type is RecordType.NAMESPACE_DROP for other in kills):
            states[place] = RecordState.DROPPED
        else:
            states[place] = RecordState.LIVE
    for header in everything:
        place = (header.segment_id, header.offset)
        if states[place] is not RecordState.LIVE:
            continue
        rivals = [
            other
            for other in everything
            if (other.namespace, other.key) == (header.namespace, header.key)
            and states[other.segment_id, other.offset] in (RecordState.LIVE, RecordState.SUPERSEDED, RecordState.EXPIRED)
        ]
        if header.record_seq < max(other.record_seq for other in rivals):
            states[place] = RecordState.SUPERSEDED
        elif header.expires_at_ns and header.expires_at_ns <= NOW_NS:
            states[place] = RecordState.EXPIRED
    return states


@settings(max_examples=200, deadline=None)
@given(RECORDS)
def test_states_are_those_of_the_specification(records: list[tuple[RecordType, bytes, bytes, int, int, bool]]) -> None:
    segments = headers_of(records)
    tables = {segment_id: table_of(laid) for segment_id, laid in segments.items()}
    log = LogStates()
    for segment_id, table in tables.items():
        log.add(segment_id, table)
    log.settle(NOW_NS)
    expected = expected_states(segments)
    for segment_id, table in tables.items():
        found = dict(zip((table.page * PAGE_BYTES).tolist(), log.states_of(segment_id, table).tolist(), strict=True))
        assert found == {offset: state for (owner, offset), state in expected.items() if owner == segment_id}
    counting = {place for place, state in expected.items() if state in (RecordState.LIVE, RecordState.EXPIRED)}
    assert {(log.place(row).segment_id, log.place(row).offset) for row in log.winners().tolist()} == counting
    for space in SPACES:
        for key in KEYS:
            blocks = [h for laid in segments.values() for h in laid if h.key == key and h.namespace == space]
            there = [h for h in blocks if (h.segment_id, h.offset) in counting]
            assert log.find(space + key) == (Place(there[0].segment_id, there[0].offset) if there else None)
            row = int(log.find_rows([space + key])[0])
            assert row >= 0 if there else row == (-2 if blocks else -1)


def test_a_block_written_after_the_look_counts_as_live() -> None:
    """A segment may grow between the two passes of a survey beside a running writer."""
    segments = headers_of([(RecordType.BLOCK, SPACES[0], key, 1, 0, False) for key in KEYS])
    log = LogStates()
    log.add(1, table_of(segments[1][:1]))
    log.settle(NOW_NS)
    assert log.states_of(1, table_of(segments[1])).tolist() == [RecordState.LIVE] * 3
    assert log.states_of(2, table_of(segments[1])).tolist() == [RecordState.LIVE] * 3


READS = st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 60_000)), min_size=1, max_size=20)
PIECES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 4)), max_size=6)


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, tail=st.integers(0, 5000), reads=READS)
def test_a_file_with_holes_reads_as_its_bytes(
    tmp_path_factory: object, pieces: list[tuple[int, int]], tail: int, reads: list[tuple[int, int]]
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "holes"  # type: ignore[attr-defined]
    size_bytes = 64 * PAGE_BYTES + tail
    with path.open("wb") as file:
        for page, count in pieces:
            file.seek(page * PAGE_BYTES)
            file.write(np.random.default_rng(page).bytes(count * PAGE_BYTES))
    os.truncate(path, size_bytes)
    content = path.read_bytes()
    device = PosixDevice(threads=1)
    opened = device.open(str(path), "read")
    try:
        read = SegmentReader(opened, size_bytes, data_ranges(path, size_bytes))
        for offset, length in reads:
            assert bytes(read(offset, length)) == content[offset : offset + length]
    finally:
        opened.close()
        device.close()
