"""A second reader of the store format, written from SPEC.md alone: struct, zstandard, xxhash, hashlib, and no kvlode.

It is the oracle for the test vectors: where it and kvlode disagree, one of them, or the text, is wrong. Numbers in
brackets are parts of SPEC.md.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import xxhash
import zstandard

PAGE = 4096
RECORD_FORMAT = "<8sHHIBBBBHH16sQQQQQ16s16s16sIIQQQQQQ48sHB5sQQ"
RECORD_NAMES = (
    *("magic", "version", "header_bytes", "record_pages", "type", "checksum_id", "codec", "element_size", "flags", "stripe_count"),
    *("store_uuid", "segment_id", "offset", "epoch", "version_seq", "record_seq", "namespace", "tag", "parent", "depth", "stripe_bytes"),
    *("raw_length", "stored_length", "written_at_ns", "expires_at_ns", "raw_checksum", "payload_checksum", "encryption", "meta_length"),
    *("key_length", "reserved", "synced_bytes", "header_checksum"),
)
COLUMNS = (
    *(("type", "B"), ("codec", "B"), ("element_size", "B"), ("key_length", "B"), ("page", "I"), ("record_pages", "I"), ("depth", "I")),
    *((name, "Q") for name in ("raw_length", "stored_length", "version_seq", "record_seq", "written_at_ns", "expires_at_ns")),
    *(("payload_checksum", "Q"), ("namespace", "16s"), ("tag", "16s"), ("parent", "16s")),
)
BLOCK, TOMBSTONE, NAMESPACE, DROP, SEAL = 1, 2, 3, 4, 5
RAW, ZSTD, PLANES = 0, 1, 2


class Damaged(Exception):
    """The bytes break a rule."""


class Unsupported(Exception):
    """Intact, but of a version or kind that this reader does not know."""


def need(condition: object, rule: str) -> None:
    if not condition:
        raise Damaged(rule)


def xxh(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def check_page(page: bytes, magic: str, checksum_at: int = 4088) -> None:
    """Length, magic, checksum [4, 5], then version [6] and length of a page."""
    need(len(page) == PAGE, "a whole page")
    need(page[:8] == bytes.fromhex(magic), "magic")
    stored = struct.unpack_from("<Q", page, checksum_at)[0]
    need(stored == xxh(page[:checksum_at] + page[checksum_at + 8 :]), "checksum")
    version, header_bytes = struct.unpack_from("<HH", page, 8)
    if version > 1:
        raise Unsupported("newer version")
    need(version == 1 and header_bytes == PAGE, "version and header_bytes")


# --- superblock and segment header [4.1, 4.2] ----------------------------------------------------------------------------


def read_superblock(data: bytes) -> dict[str, Any]:
    if data[:8] != bytes.fromhex("894b564f0d0a1a0a") and any(data):
        raise Unsupported("not a store")
    check_page(data, "894b564f0d0a1a0a")
    write_version, alignment, reserved, compat, ro_compat, incompat = struct.unpack_from("<HBBQQQ", data, 12)
    uuid, created, stripe_bytes = struct.unpack_from("<16sQI", data, 40)
    need(reserved == 0 and not any(data[68:4088]), "reserved")
    if incompat:
        raise Unsupported("incompat")
    need(
        write_version >= 1 and alignment == 12 and any(uuid) and stripe_bytes % PAGE == 0 and PAGE <= stripe_bytes <= 1 << 30,
        "valid fields",
    )
    return {
        "store_uuid": uuid.hex(),
        "created_at_ns": created,
        "stripe_bytes_default": stripe_bytes,
        "compat": compat,
        "ro_compat": ro_compat,
        "incompat": incompat,
        "read_version": 1,
        "write_version": write_version,
        "read_only": bool(ro_compat) or write_version > 1,
    }


def read_segment_header(page: bytes, place: dict[str, Any]) -> dict[str, Any] | None:
    try:
        check_page(page, "894b56470d0a1a0a")
        flags, reserved, uuid, segment_id, epoch, size, first_live, created = struct.unpack_from("<H2s16sQQQQQ", page, 12)
        need(flags == 0 and reserved == bytes(2) and not any(page[72:4088]), "reserved")
        need(uuid.hex() == place["store_uuid"] and segment_id == place["segment_id"], "place")
        need(1 <= epoch < 1 << 24 and size % PAGE == 0 and 3 * PAGE <= size <= 1 << 40 and first_live <= segment_id, "valid fields")
    except Damaged:
        return None
    names = ("store_uuid", "segment_id", "epoch", "segment_bytes", "first_live_segment", "created_at_ns")
    return dict(zip(names, (uuid.hex(), segment_id, epoch, size, first_live, created), strict=True))


# --- records [4.3, 4.4] --------------------------------------------------------------------------------------------------


def read_header(page: bytes, place: dict[str, Any], offset: int) -> dict[str, Any]:
    """A record header of this place; every rule of 4.3 and 4.4 that needs no payload."""
    expected = bytes.fromhex(place["store_uuid"]) + struct.pack("<QQ", place["segment_id"], offset)
    need(len(page) == PAGE and page[24:56] == expected, "place")
    check_page(page, "894b56520d0a1a0a", 248)
    h = dict(zip(RECORD_NAMES, struct.unpack_from(RECORD_FORMAT, page), strict=True))
    need(h["encryption"] == bytes(48) and h["reserved"] == bytes(5) and page[511] == 0, "reserved")
    if h["checksum_id"] != 1 or h["codec"] > 2:
        raise Unsupported("checksum or codec")
    need(h["element_size"] in (1, 2, 4, 8) and h["flags"] < 2 and 1 <= h["epoch"] < 1 << 24, "valid fields")
    need(offset % PAGE == 0 and offset >= PAGE and h["synced_bytes"] <= offset, "offsets")
    need(offset + PAGE * h["record_pages"] <= 1 << 40, "end")
    need(h["meta_length"] <= 512 and h["stripe_count"] <= 128, "lengths")
    h["key"], h["meta"] = page[256 : 256 + h["key_length"]], page[3584 : 3584 + h["meta_length"]]
    table = page[512 : 512 + 24 * h["stripe_count"]]
    padding = page[256 + h["key_length"] : 511] + page[512 + len(table) : 3584] + page[3584 + h["meta_length"] :]
    need(not any(padding), "padding of key, table and metadata")
    need(h["payload_checksum"] == xxh(h["namespace"] + h["key"] + table), "payload checksum")
    need(h["record_pages"] == 1 + up(h["stored_length"], PAGE) // PAGE + (h["type"] == SEAL), "record pages")
    h["stripes"] = list(struct.iter_unpack("<IIBB6sQ", table))
    check_type(h)
    return h


def check_type(h: dict[str, Any]) -> None:
    kind, lengths = h["type"], (h["raw_length"], h["stored_length"], h["stripe_bytes"], h["stripe_count"], h["codec"], h["raw_checksum"])
    if not BLOCK <= kind <= SEAL:
        if not h["flags"] & 1:
            raise Unsupported("type")
        return
    need((kind in (BLOCK, TOMBSTONE)) == (h["key_length"] > 0), "key")
    if kind in (TOMBSTONE, DROP):
        need(not any(lengths), "no payload")
    elif kind == SEAL:
        need(not any(h["namespace"]) and not any(lengths[2:5]) and h["raw_length"] == h["stored_length"] > 0, "seal")
    else:
        need(1 <= h["raw_length"] <= (1 << 30 if kind == BLOCK else 65536), "raw length")
        need(h["stripe_bytes"] % PAGE == 0 and PAGE <= h["stripe_bytes"] <= 1 << 30, "stripe bytes")
        need(h["stripe_count"] == up(h["raw_length"], h["stripe_bytes"]) // h["stripe_bytes"], "stripe count")
        need(kind == BLOCK or (h["codec"] == RAW and h["stripe_count"] == 1), "namespace payload")
        check_stripes(h)


def check_stripes(h: dict[str, Any]) -> None:
    end, element = 0, h["element_size"]
    for (stored, first, codec, flags, reserved, _), (_, raw) in zip(h["stripes"], raw_ranges(h), strict=True):
        need(reserved == bytes(6), "reserved")
        if codec == RAW:
            need(stored == raw and first == flags == 0, "raw stripe")
        elif codec == ZSTD:
            need(h["codec"] in (ZSTD, PLANES) and 0 < stored < raw and first == flags == 0, "zstd stripe")
        else:
            need(codec == PLANES == h["codec"] and element > 1 and raw % element == 0 and 0 < stored < raw and 1 <= flags <= 3, "planes")
            count, rest = raw // element, stored - up(first, 16)
            need(0 < first < count if flags & 1 else first == count, "plane 0")
            need(0 < rest < raw - count if flags & 2 else rest == raw - count, "rest")
        end = up(end, 16) + stored
    need(end == h["stored_length"], "stored length")


def raw_ranges(h: dict[str, Any]) -> list[tuple[int, int]]:
    """(start, length) of each stripe in the raw bytes."""
    starts = range(0, h["raw_length"], h["stripe_bytes"] or 1)
    return [(start, min(h["stripe_bytes"], h["raw_length"] - start)) for start in starts]


def stored_stripes(h: dict[str, Any], payload: bytes) -> list[bytes]:
    """The stripes as stored, checked [5]."""
    stripes, position = [], 0
    for stored, _, _, _, _, checksum in h["stripes"]:
        position = up(position, 16)
        stripes.append(payload[position : position + stored])
        need(len(stripes[-1]) == stored and xxh(stripes[-1]) == checksum, "stripe checksum")
        position += stored
    return stripes


def decode_frame(frame: bytes, size: int) -> bytes:
    """Exactly one frame that says it holds ``size`` bytes [4.4]."""
    try:
        parameters = zstandard.get_frame_parameters(frame)
        need(parameters.content_size == size and not parameters.dict_id and parameters.window_size <= max(size, 1024), "frame header")
        decoder = zstandard.ZstdDecompressor().decompressobj()
        out = decoder.decompress(frame)
        need(decoder.eof and not decoder.unused_data and len(out) == size, "one whole frame")
    except zstandard.ZstdError as error:
        raise Damaged(f"zstd: {error}") from error
    return out


def decode_stripe(element: int, stored: bytes, entry: tuple[Any, ...], size: int) -> bytes:
    """The raw bytes of one stripe whose entry and checksum were checked [4.4]."""
    _, first, codec, flags, _, _ = entry
    if codec == RAW:
        return stored
    if codec == ZSTD:
        return decode_frame(stored, size)
    count = size // element
    plane = decode_frame(stored[:first], count) if flags & 1 else stored[:first]
    rest = stored[up(first, 16) :]
    rest = decode_frame(rest, size - count) if flags & 2 else rest
    planes = [plane, *(rest[i * count : (i + 1) * count] for i in range(element - 1))]
    out = bytearray(size)
    for index, values in enumerate(planes):
        out[element - 1 - index :: element] = values
    return bytes(out)


def decode_record(h: dict[str, Any], payload: bytes) -> bytes:
    if h["type"] == SEAL:
        need(xxh(payload[: h["stored_length"]]) == h["raw_checksum"], "toc checksum")
        return payload[: h["stored_length"]]
    stripes = zip(h["stripes"], stored_stripes(h, payload), raw_ranges(h), strict=True)
    raw = b"".join(decode_stripe(h["element_size"], stored, entry, size) for entry, stored, (_, size) in stripes)
    need(not raw or xxh(raw) == h["raw_checksum"], "raw checksum")
    return raw


def record_values(h: dict[str, Any]) -> dict[str, Any]:
    """As the vectors spell it [13]."""
    left_out = ("magic", "version", "header_bytes", "checksum_id", "stripe_count", "encryption", "meta_length", "key_length", "reserved")
    values = {name: value for name, value in h.items() if name not in (*left_out, "header_checksum")}
    values["stripes"] = [[*entry[:4], f"{entry[5]:016x}"] for entry in h["stripes"]]
    values |= {name: f"{h[name]:016x}" for name in ("raw_checksum", "payload_checksum")}
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}


def read_record(data: bytes, place: dict[str, Any]) -> dict[str, Any]:
    h = read_header(data[:PAGE], place, place["offset"])
    if h["type"] > SEAL:
        return {"skipped_pages": h["record_pages"]}
    return {"record": record_values(h), "raw_sha256": hashlib.sha256(decode_record(h, data[PAGE:])).hexdigest()}


# --- seal [4.5, 4.6] -----------------------------------------------------------------------------------------------------


def read_trailer(data: bytes, place: dict[str, Any]) -> dict[str, Any] | None:
    """The trailer of a sealed file, or None [8]."""
    page = data[-PAGE:]
    try:
        need(len(data) % PAGE == 0, "whole pages")
        check_page(page, "894b56540d0a1a0a")
        reserved, uuid, segment_id, epoch, data_end, toc_offset, toc_bytes, count, checksum, synced = struct.unpack_from(
            "<4s16s8Q", page, 12
        )
        need(not any(reserved) and not any(page[96:4088]), "reserved")
        need(uuid.hex() == place["store_uuid"] and segment_id == place["segment_id"], "place")
        need(
            data_end % PAGE == 0 and data_end >= PAGE and toc_offset == data_end + PAGE and toc_bytes >= 64 and synced <= data_end,
            "offsets",
        )
        need(toc_offset + up(toc_bytes, PAGE) + PAGE == len(data), "size of the file")
    except Damaged:
        return None
    names = ("store_uuid", "segment_id", "epoch", "data_end", "toc_offset", "toc_bytes", "record_count", "toc_checksum", "synced_bytes")
    values = (uuid.hex(), segment_id, epoch, data_end, toc_offset, toc_bytes, count, f"{checksum:016x}", synced)
    return dict(zip(names, values, strict=True))


def read_toc(data: bytes, trailer: dict[str, Any]) -> list[dict[str, Any]]:
    toc = data[trailer["toc_offset"] : trailer["toc_offset"] + trailer["toc_bytes"]]
    need(f"{xxh(toc):016x}" == trailer["toc_checksum"], "toc checksum")
    return parse_toc(toc, trailer["record_count"], trailer["data_end"])


def parse_toc(toc: bytes, record_count: int, data_end: int) -> list[dict[str, Any]]:
    need(len(toc) >= 64, "toc header")
    magic, version, header_bytes, columns, reserved, count, heap_bytes, reserved_1 = struct.unpack_from("<8sHHH2sQQ32s", toc)
    need(magic == bytes.fromhex("894b56430d0a1a0a"), "toc magic")
    if version > 1:
        raise Unsupported("newer version")
    need((version, header_bytes, columns) == (1, 64, 17), "toc header")
    need(not any(reserved + reserved_1) and count == record_count and 120 * count <= len(toc), "toc header")
    position, table = 64, {}
    for name, code in COLUMNS:
        size = struct.calcsize(code)
        end = position + size * count
        need(end <= len(toc), "a whole column")
        table[name] = [value for (value,) in struct.iter_unpack("<" + code, toc[position:end])]
        position = up(end, 8)
        need(not any(toc[end:position]), "gap")
    need(sum(table["key_length"]) == heap_bytes and position + heap_bytes == len(toc), "key heap")
    check_columns(table, data_end)
    rows = []
    for index in range(count):
        row = {name: table[name][index] for name, _ in COLUMNS}
        row["key"] = toc[position : position + row["key_length"]]
        position += row["key_length"]
        row["offset"] = row.pop("page") * PAGE
        rows.append(row)
    return [row_values(row) for row in rows]


def check_columns(table: dict[str, list[Any]], data_end: int) -> None:
    end = 1
    for kind, codec, element, page, pages, raw, stored in zip(
        *(table[name] for name in ("type", "codec", "element_size", "page", "record_pages", "raw_length", "stored_length")), strict=True
    ):
        need(kind not in (0, SEAL) and codec <= 2 and element in (1, 2, 4, 8), "type, codec, element size")
        need(page >= end and pages >= 1, "growing pages")
        need(raw <= 1 << 40 and stored <= 1 << 40 and up(stored, PAGE) == (pages - 1) * PAGE, "lengths")
        end = page + pages
    need(end * PAGE <= data_end, "records before the seal")


def row_values(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of contents, or the same fields of a header, as the vectors spell it."""
    names = [name for name, _ in COLUMNS if name not in ("key_length", "page")] + ["key", "offset"]
    values = {name: row[name] for name in names} | {"payload_checksum": f"{row['payload_checksum']:016x}"}
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}


# --- segments [8] --------------------------------------------------------------------------------------------------------


def walk(data: bytes, place: dict[str, Any], start: int) -> tuple[list[dict[str, Any]], str, int, dict[str, Any] | None]:
    """Headers of one run, how it ended and where, and the seal record if that was it."""
    headers = []
    while True:
        page = data[start : start + PAGE]
        if len(page) < PAGE:
            return headers, "end", start, None
        if not any(page):
            return headers, "zeros", start, None
        try:
            h = read_header(page, place, start)
            if h["type"] == SEAL:
                return headers, "seal", start, h
            need(start + PAGE * h["record_pages"] <= len(data), "inside the file")
        except Damaged:
            return headers, "break", start, None
        headers.append(h)
        start += PAGE * h["record_pages"]


def resynchronise(data: bytes, place: dict[str, Any], start: int) -> int | None:
    for offset in range(start, len(data) - PAGE + 1, PAGE):
        try:
            h = read_header(data[offset : offset + PAGE], place, offset)
        except Damaged:
            continue
        if h["type"] == SEAL or offset + PAGE * h["record_pages"] <= len(data):
            return offset
    return None


def payload_arrived(data: bytes, h: dict[str, Any]) -> bool:
    try:
        stored_stripes(h, data[h["offset"] + PAGE :][: h["stored_length"]])
    except Damaged:
        return False
    return True


def scan(data: bytes, place: dict[str, Any], durable: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The torn-tail table: the records that count, and how the log ended."""
    runs = []
    start: int | None = PAGE
    while start is not None:
        headers, kind, end, seal = walk(data, place, start)
        runs.append((start, headers, kind, end, seal))
        start = resynchronise(data, place, end + PAGE) if kind in ("break", "zeros") else None
    claims = [h["synced_bytes"] for _, headers, _, _, seal in runs for h in (*headers, seal) if h]
    durable = max([durable, *claims])
    kept: list[dict[str, Any]] = []
    damaged: list[list[int]] = []
    kind, end = "", PAGE
    for start, headers, run_kind, run_end, _ in runs:
        if start > PAGE:
            if end >= durable:
                break
            damaged.append([end, start])
        for h in headers:
            if h["offset"] + PAGE * h["record_pages"] > durable and not payload_arrived(data, h):
                return kept, {"kind": "break", "offset": h["offset"], "damaged": damaged}
            kept.append(h)
        kind, end = run_kind, run_end
    if kind != "seal" and end < durable:
        damaged.append([end, durable])
    return kept, {"kind": kind, "offset": end, "damaged": damaged}


def read_segment(data: bytes, place: dict[str, Any]) -> dict[str, Any]:
    trailer = read_trailer(data, place)
    durable, rows = (0 if trailer is None else len(data)), None
    if trailer is not None:
        try:
            rows = read_toc(data, trailer)
            ending = {"kind": "toc", "offset": trailer["data_end"], "damaged": []}
        except Damaged:
            trailer = None
    if rows is None:
        headers, ending = scan(data, place, durable)
        rows = [row_values(h) for h in headers]
    blocks = read_blocks(data, place, rows)
    return {"header": read_segment_header(data[:PAGE], place), "trailer": trailer, "end": ending, "records": rows, "blocks": blocks}


def read_blocks(data: bytes, place: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which record counts, and what is left of each block."""
    kills = [row for row in rows if row["type"] in (TOMBSTONE, DROP)]
    blocks = [row for row in rows if row["type"] == BLOCK]

    def killed(row: dict[str, Any]) -> bool:
        return any(
            kill["namespace"] == row["namespace"]
            and (kill["type"] == DROP or kill["key"] == row["key"])
            and kill["version_seq"] > row["version_seq"]
            for kill in kills
        )

    results = []
    for row in blocks:
        rivals = [r for r in blocks if (r["namespace"], r["key"]) == (row["namespace"], row["key"]) and not killed(r)]
        page = data[row["offset"] : row["offset"] + PAGE]
        result = {"offset": row["offset"], "key": row["key"]}
        if killed(row):
            result["state"] = "deleted" if any(page) else "purged"
        elif row["record_seq"] < max(r["record_seq"] for r in rivals):
            result["state"] = "superseded"
        else:
            try:
                h = read_header(page, place, row["offset"])
                result["raw_sha256"] = hashlib.sha256(decode_record(h, data[row["offset"] + PAGE :])).hexdigest()
                result["state"] = "present"
            except Damaged:
                result["state"] = "damaged"
        results.append(result)
    return results


# --- names [4.7] ---------------------------------------------------------------------------------------------------------


def blake(size: int, person: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=size, person=person).digest()


def prefix_keys(tokens: list[int], block_tokens: int, salt: bytes) -> list[bytes]:
    key = blake(32, b"kvlode-prefix", salt)
    keys = []
    for start in range(0, len(tokens) // block_tokens * block_tokens, block_tokens):
        key = blake(32, b"kvlode-prefix", key + struct.pack(f"<{block_tokens}Q", *tokens[start : start + block_tokens]))
        keys.append(key)
    return keys


def compute_names(given: dict[str, Any]) -> dict[str, Any]:
    """The same document, every digest computed anew from its inputs."""
    descriptor = json.loads(given["namespace_json"])
    canonical = json.dumps(descriptor, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    chain = given["prefix_keys"]
    keys = prefix_keys(chain["tokens"], chain["block_tokens"], bytes.fromhex(chain["salt"]))
    return {
        "namespace_json": canonical,
        "namespace_digest": blake(16, b"kvlode-namespace", canonical.encode()).hex(),
        "key_digest": {key: blake(16, b"kvlode-key", bytes.fromhex(key)).hex() for key in given["key_digest"]},
        "tag_digest": {tag: blake(16, b"kvlode-tag", tag.encode()).hex() for tag in given["tag_digest"]},
        "prefix_keys": chain | {"keys": [key.hex() for key in keys]},
        "xxh3_64": {data: f"{xxh(bytes.fromhex(data)):016x}" for data in given["xxh3_64"]},
    }


def read_vector(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what this reader finds, what the vector expects)."""
    document = json.loads((folder / "expected.json").read_text())
    structure, expected = document["structure"], document["expected"]
    if structure == "names":
        return compute_names(expected), expected
    data = (folder / "data.bin").read_bytes()
    try:
        if structure == "superblock":
            return read_superblock(data), expected
        return (read_record if structure == "record" else read_segment)(data, document["place"]), expected
    except Unsupported:
        return {"refused": "unsupported"}, expected
    except Damaged:
        return {"refused": "damaged"}, expected
