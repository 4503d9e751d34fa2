"""Writes the generated parts of SPEC.md from the code (``python tests/make_spec.py``); a test compares them.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kvlode.format import layout, namespace, seal
from kvlode.format.bytetable import ByteTable
from kvlode.format.dump import annotated, hexdump
from kvlode.format.record import RECORD_TABLE
from kvlode.format.seal import COLUMN_TABLE, TOC_TABLE, TRAILER_TABLE
from kvlode.format.segment import SEGMENT_TABLE
from kvlode.format.stripe import STRIPE_TABLE
from kvlode.format.superblock import SUPERBLOCK_TABLE

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "SPEC.md"
VECTORS = ROOT / "tests" / "vectors"
EXAMPLE = "segment-two-records"

LIMITS = (
    ("page", layout.PAGE_BYTES, "bytes; alignment of everything"),
    ("key", layout.KEY_BYTES_MAX, "bytes, at least 1"),
    ("user metadata", layout.META_BYTES_MAX, "bytes"),
    ("raw bytes of a block", layout.BLOCK_BYTES_MAX, "1 GiB, at least 1"),
    ("stripes of a block", layout.STRIPES_MAX, ""),
    ("stripe", layout.BLOCK_BYTES_MAX, "bytes; a multiple of 4096; 256 KiB where a namespace asks for nothing else"),
    ("namespace descriptor", layout.NAMESPACE_BYTES_MAX, "bytes of JSON"),
    ("text in a descriptor", namespace.TEXT_BYTES_MAX, "bytes of UTF-8"),
    ("entries of `extra`", namespace.EXTRA_ENTRIES_MAX, ""),
    ("segment file", layout.SEGMENT_BYTES_MAX, "bytes, 1 TiB (writers make segments of 64 MiB to 4 GiB)"),
    ("records of a segment", layout.SEGMENT_RECORDS_MAX, ""),
    ("epoch", layout.EPOCH_MAX, "at least 1"),
    ("counter of a sequence number", (1 << layout.SEQUENCE_COUNTER_BITS) - 1, ""),
)

FILES = (
    (
        f"`{layout.SUPERBLOCK_NAME}`",
        "superblock (4.1), one page",
        "made by temporary file, rename and sync of the folder; never changed in place",
    ),
    (f"`{layout.LOCK_NAME}`", "lock of the writer", "content means nothing"),
    (f"`{layout.FOLLOWERS_NAME}`", "shared lock of readers beside a living writer", "content means nothing; may be absent"),
    (
        f"`{layout.SEGMENTS_FOLDER}/<id>.seg`",
        "a segment; `<id>` is 16 lower-case hexadecimal digits",
        "append-only, then sealed; never reused",
    ),
    (f"`{layout.INDEX_FOLDER}/`", "the index (RocksDB)", "derived; may be deleted while no process has the store open"),
    (f"`{layout.HEAT_NAME}`", "counters of hits, shared by the processes", "derived; may be deleted while no process has the store open"),
    (
        f"`{layout.STATS_FOLDER}/`",
        "what the processes that have the store open say of it (JSON)",
        "derived; may be absent or deleted at any time",
    ),
    (f"`{layout.SCRUB_NAME}`", "when each segment was last checked in the background", "derived; may be absent or deleted at any time"),
    (
        f"`{layout.QUARANTINE_FOLDER}/`",
        "damaged files set aside by a repair, each with a JSON note",
        "readers ignore it, but for the ids of segments",
    ),
)

DESCRIPTOR = {
    "model": ("text, not empty", "changes with the model"),
    "revision": ("text, not empty", "changes with the weights"),
    "dtype": ("one of the names below", "type of an element; gives `element_size`"),
    "layout": ("text, not empty", "order of layers, heads, keys and values inside a block"),
    "tokens_per_block": ("1 to 2^32", "tokens of a full block"),
    "block_bytes_max": ("1 to 2^30", "largest block"),
    "layer_bytes": ("1 to `block_bytes_max`, or null", "asks for stripes of this size, rounded up to a page"),
    "group": ("0 to 2^32", "tells apart families of blocks of one model"),
    "tp_rank": ("0 to `tp_size` - 1", "tensor-parallel rank"),
    "tp_size": ("1 to 2^32", "tensor-parallel size"),
    "pp_rank": ("0 to `pp_size` - 1", "pipeline-parallel rank"),
    "pp_size": ("1 to 2^32", "pipeline-parallel size"),
    "extra": ("object of at most 64 texts", "whatever else the bytes depend on"),
}


def markdown(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows)]


def byte_table(table: ByteTable) -> list[str]:
    rows = [(f.offset, f.size_bytes, f"`{f.kind}`", f"`{f.name}`", f.meaning, f.valid) for f in table]
    return markdown(("offset", "size", "type", "name", "meaning", "valid"), rows)


def column_table() -> list[str]:
    rows = [(f.size_bytes, f"`{f.kind}`", f"`{f.name}`", f.meaning, f.valid) for f in COLUMN_TABLE]
    return markdown(("size of a value", "type", "name", "meaning", "valid"), rows)


def descriptor_table() -> list[str]:
    names = sorted(field.name for field in dataclasses.fields(namespace.Namespace))
    by_size: dict[int, list[str]] = {}
    for name, size in namespace.ELEMENT_SIZES.items():
        by_size.setdefault(size, []).append(f"`{name}`")
    sizes = [f"- {size}: {', '.join(dtypes)}" for size, dtypes in sorted(by_size.items())]
    table = markdown(("field", "value", "meaning"), [(f"`{name}`", *DESCRIPTOR[name]) for name in names])
    return [*table, "", "Names of `dtype` by `element_size`:", "", *sizes]


def code(lines: Iterable[str]) -> list[str]:
    return ["```text", *lines, "```"]


def example() -> bytes:
    return (VECTORS / EXAMPLE / "data.bin").read_bytes()


def vector_list() -> list[str]:
    manifest = json.loads((VECTORS / "MANIFEST.json").read_text())
    frames = f"Frames in them were made with zstd {manifest['zstd_version']}."
    return [*markdown(("vector", "what it is"), [(f"`{n}`", text) for n, text in sorted(manifest["vectors"].items())]), "", frames]


def block_fields() -> list[str]:
    return code(annotated(RECORD_TABLE, example()[12288:16384], base=12288))


def stripe_fields() -> list[str]:
    return code(annotated(STRIPE_TABLE, example()[12800:12824], base=12800))


def trailer_fields() -> list[str]:
    data = example()
    start = len(data) - layout.PAGE_BYTES
    assert seal.Trailer.parse(data[start:]).file_bytes == len(data)
    return code(annotated(TRAILER_TABLE, data[start:], base=start))


PARTS: dict[str, Callable[[], list[str]]] = {
    "limits": lambda: markdown(("of", "at most", "unit, remark"), LIMITS),
    "files": lambda: markdown(("name", "what it is", "rule"), FILES),
    "superblock": lambda: byte_table(SUPERBLOCK_TABLE),
    "segment": lambda: byte_table(SEGMENT_TABLE),
    "record": lambda: byte_table(RECORD_TABLE),
    "stripe": lambda: byte_table(STRIPE_TABLE),
    "toc": lambda: byte_table(TOC_TABLE),
    "columns": column_table,
    "trailer": lambda: byte_table(TRAILER_TABLE),
    "namespace": descriptor_table,
    "hexdump": lambda: code(hexdump(example())),
    "fields": block_fields,
    "entry": stripe_fields,
    "trailer-fields": trailer_fields,
    "vectors": vector_list,
}

_PART = re.compile(r"<!-- generated: ([a-z-]+) -->\n.*?<!-- end: \1 -->", re.DOTALL)


def parts_of(text: str) -> dict[str, str]:
    """The generated parts as they stand in the text, by name."""
    return {match.group(1): match.group(0) for match in _PART.finditer(text)}


def generated(name: str) -> str:
    return "\n".join([f"<!-- generated: {name} -->", *PARTS[name](), f"<!-- end: {name} -->"])


def main() -> None:
    SPEC.write_text(_PART.sub(lambda match: generated(match.group(1)), SPEC.read_text()))


if __name__ == "__main__":
    main()
