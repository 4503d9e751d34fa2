"""The identity of a family of blocks: what must be equal for the bytes of one block to mean the same to two readers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from .errors import CorruptRecord, InvalidConfig, UnsupportedFormat
from .layout import BLOCK_BYTES_MAX, DIGEST_BYTES, NAMESPACE_BYTES_MAX

NAMESPACE_PERSON = b"kvlode-namespace"
TEXT_BYTES_MAX = 4096
EXTRA_ENTRIES_MAX = 64

ELEMENT_SIZES: Mapping[str, int] = MappingProxyType(
    {
        "bool": 1, "uint8": 1, "int8": 1,
        "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1,
        "bfloat16": 2, "float16": 2, "int16": 2, "uint16": 2,
        "float32": 4, "int32": 4, "uint32": 4,
        "float64": 8, "int64": 8, "uint64": 8,
    }
)  # fmt: skip
"""Bytes of one element by dtype name (the names of torch)."""


def _invalid(name: str, expected: str, actual: object) -> InvalidConfig:
    return InvalidConfig(f"namespace field {name} is not usable", expected=expected, actual=repr(actual))


@dataclass(frozen=True)
class Namespace:
    """Descriptor of a namespace; equal descriptors share blocks, and nothing else does.

    ``model`` and ``revision`` must change with the weights, ``layout`` with the meaning of a block's bytes (order of
    layers, heads, K and V). Blocks are at most ``block_bytes_max`` (<= 1 GiB); ``layer_bytes`` asks for stripes of one
    layer each. ``group`` tells apart block families of one model (hybrid attention). ``extra`` holds whatever else the
    bytes depend on (RoPE scaling, quantisation scales). Immutable and hashable. Raises ``InvalidConfig``.
    """

    model: str
    revision: str
    dtype: str
    layout: str
    tokens_per_block: int
    block_bytes_max: int
    layer_bytes: int | None = None
    group: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "revision", "dtype", "layout"):
            _check_text(name, getattr(self, name), bytes_min=1)
        object.__setattr__(self, "dtype", self.dtype.removeprefix("torch."))
        if self.dtype not in ELEMENT_SIZES:
            raise _invalid("dtype", f"one of {', '.join(ELEMENT_SIZES)}", self.dtype)
        _check_int("tokens_per_block", self.tokens_per_block, 1, 1 << 32)
        _check_int("block_bytes_max", self.block_bytes_max, 1, BLOCK_BYTES_MAX)
        if self.layer_bytes is not None:
            _check_int("layer_bytes", self.layer_bytes, 1, self.block_bytes_max)
        _check_int("group", self.group, 0, 1 << 32)
        for axis in ("tp", "pp"):
            _check_int(f"{axis}_size", getattr(self, f"{axis}_size"), 1, 1 << 32)
            _check_int(f"{axis}_rank", getattr(self, f"{axis}_rank"), 0, getattr(self, f"{axis}_size") - 1)
        object.__setattr__(self, "extra", _checked_extra(self.extra))
        if len(self.canonical_json()) > NAMESPACE_BYTES_MAX:
            raise _invalid("extra", f"a descriptor of at most {NAMESPACE_BYTES_MAX} bytes of JSON", len(self.canonical_json()))

    def __hash__(self) -> int:
        return int.from_bytes(self.digest[:8], "little")

    def __reduce__(self) -> tuple[Callable[[bytes], Namespace], tuple[bytes]]:
        return Namespace.parse, (self.canonical_json(),)

    def canonical_json(self) -> bytes:
        """The descriptor as it stands on disk: every field, keys sorted by code point, no white space, UTF-8 without escapes."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["extra"] = dict(self.extra)
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

    @cached_property
    def digest(self) -> bytes:
        """BLAKE2b-128 of the canonical JSON: the namespace in every record."""
        return namespace_digest(self.canonical_json())

    @property
    def element_size(self) -> int:
        """Bytes of one element: 1, 2, 4 or 8."""
        return ELEMENT_SIZES[self.dtype]

    @classmethod
    def parse(cls, data: bytes, *, where: object = None) -> Namespace:
        """The descriptor of canonical JSON.

        Raises ``CorruptRecord`` for bytes that no writer lays, ``UnsupportedFormat`` for a descriptor of a newer version.
        """
        if len(data) > NAMESPACE_BYTES_MAX:
            raise CorruptRecord("namespace-length", where=where, expected=f"at most {NAMESPACE_BYTES_MAX} bytes", actual=len(data))
        try:
            values: Any = json.loads(bytes(data).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CorruptRecord("namespace-json", where=where, expected="JSON", actual=str(error)[:200]) from None
        if not isinstance(values, dict):
            raise CorruptRecord("namespace-json", where=where, expected="a JSON object", actual=type(values).__name__)
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise UnsupportedFormat("a namespace has unknown fields", where=where, actual=str(unknown)[:200], action="Use a newer kvlode.")
        try:
            namespace = cls(**values)
        except (InvalidConfig, TypeError) as error:
            raise CorruptRecord("namespace-fields", where=where, expected="a valid descriptor", actual=str(error)[:200]) from None
        if namespace.canonical_json() != data:
            raise CorruptRecord(
                "namespace-canonical", where=where, expected="canonical JSON", actual="another spelling of the same descriptor"
            )
        return namespace


def namespace_digest(canonical_json: bytes) -> bytes:
    """BLAKE2b-128 of a descriptor's canonical JSON, personalised with ``kvlode-namespace``."""
    return hashlib.blake2b(canonical_json, digest_size=DIGEST_BYTES, person=NAMESPACE_PERSON).digest()


def _check_text(name: str, value: object, *, bytes_min: int) -> None:
    expected = f"text of {bytes_min} to {TEXT_BYTES_MAX} bytes of UTF-8"
    if not isinstance(value, str):
        raise _invalid(name, expected, value)
    try:
        size_bytes = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise _invalid(name, expected, value) from None
    if not bytes_min <= size_bytes <= TEXT_BYTES_MAX:
        raise _invalid(name, expected, f"{size_bytes} bytes")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _invalid(name, f"an integer of {low} to {high}", value)


def _checked_extra(extra: object) -> Mapping[str, str]:
    """A read-only copy of ``extra`` with its keys and values checked."""
    if not isinstance(extra, Mapping) or len(extra) > EXTRA_ENTRIES_MAX:
        raise _invalid("extra", f"a mapping of at most {EXTRA_ENTRIES_MAX} texts", extra)
    for key, value in extra.items():
        _check_text("extra", key, bytes_min=1)
        _check_text(f"extra[{key!r}]", value, bytes_min=0)
    return MappingProxyType({key: extra[key] for key in sorted(extra)})
