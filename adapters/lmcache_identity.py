"""What LMCache's keys are in a store: bytes of a key, and the namespace that follows from model, rank, group and layout.

Facts about ``ObjectKey`` (``lmcache/v1/distributed/api.py``), ``CacheEngineKey`` and ``LayerCacheEngineKey`` (``lmcache/utils.py``)
and about the layout of objects (``lmcache/v1/memory_management.py``) are those of LMCache 0.5.6. Nothing here imports it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..format.errors import InvalidConfig
from ..format.layout import BLOCK_BYTES_MAX
from ..format.namespace import ELEMENT_SIZES, Namespace
from .attached import AttachedStore, QuietSpace
from .identity import hub_commit, weights_revision

logger = logging.getLogger("kvlode")

KEY_BYTES_MAX = 255
SERIALIZED = "lmcache-mp:serialized"
"""Layout of objects that LMCache's own serde made: bytes of any length."""
SPACES_MAX = 4096
"""Namespaces that are remembered. A server of many models, ranks and groups has some dozens."""


# --- keys ---------------------------------------------------------------------------------------------------------------------


def packed_key(kind: bytes, *fields: bytes) -> bytes:
    """Fields as one key of at most 255 bytes: each with its length, or, where that is too long, a digest of exactly this."""
    plain = kind + b"".join(len(data).to_bytes(4, "little") + data for data in fields)
    if len(plain) < KEY_BYTES_MAX:
        return b"p" + plain
    return b"d" + hashlib.blake2b(plain, digest_size=32, person=b"kvlode-lmcache").digest()


def object_key(key: Any) -> bytes:
    """Of an ``ObjectKey``: what its namespace does not say, the hash of the chunk and the salt that keeps users apart."""
    return packed_key(b"o", bytes(key.chunk_hash), str(key.cache_salt).encode())


def engine_key(key: Any) -> bytes:
    """Of a ``CacheEngineKey`` or a ``LayerCacheEngineKey``: hash of the chunk, tags of the request, layer."""
    chunk = key.chunk_hash
    number = chunk if isinstance(chunk, bytes) else int(chunk).to_bytes(int(chunk).bit_length() // 8 + 1, "little", signed=True)
    tags = json.dumps([[str(name), str(value)] for name, value in key.tags or ()], ensure_ascii=False).encode()
    layer = getattr(key, "layer_id", None)
    kind = b"b" if isinstance(chunk, bytes) else b"i"
    return packed_key(kind, number, tags, b"" if layer is None else int(layer).to_bytes(4, "little"))


# --- layouts ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes and element types of the tensors of one object, in their order in memory."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, shapes: Iterable[Sequence[int]], dtypes: Iterable[Any]) -> Layout:
        return cls(tuple(tuple(map(int, shape)) for shape in shapes), tuple(str(dtype).removeprefix("torch.") for dtype in dtypes))

    @classmethod
    def of_object(cls, memory_object: Any) -> Layout:
        """Of a ``MemoryObj``, whose metadata has either lists or, for a single tensor, one shape and one dtype."""
        meta = memory_object.metadata
        if meta.shapes is not None and meta.dtypes is not None:
            return cls.of(meta.shapes, meta.dtypes)
        return cls.of([meta.shape], [meta.dtype])

    @property
    def size_bytes(self) -> int:
        return sum(math.prod(shape) * ELEMENT_SIZES.get(dtype, 0) for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    @property
    def tokens(self) -> int:
        """Tokens of an object: the third dimension of ``[2, layers, tokens, hidden]``; 1 where the shape does not say."""
        return max(1, self.shapes[0][2]) if self.shapes and len(self.shapes[0]) == 4 else 1

    @property
    def is_plain_bytes(self) -> bool:
        """It looks like what LMCache's serde makes: one row of bytes."""
        return self.dtypes == ("uint8",) and len(self.shapes[0]) == 1

    def text(self) -> dict[str, str]:
        """For the ``extra`` of a namespace."""
        return {"shapes": _short(self.shapes), "dtypes": _short(self.dtypes)}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 1024 else "blake2b:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- namespaces ---------------------------------------------------------------------------------------------------------------


def object_namespace(key: Any, layout: Layout | None, revision: str, serialized_bytes_max: int = BLOCK_BYTES_MAX) -> Namespace:
    """Of the objects of one ``ObjectKey``'s model, rank and group. ``layout``: ``None`` for objects that a serde made."""
    world, rank = (key.kv_rank >> 24) & 0xFF, (key.kv_rank >> 16) & 0xFF
    in_world = 0 <= rank < world
    return Namespace(
        model=key.model_name or "unnamed",
        revision=revision,
        dtype=_dtype(layout) if layout else "uint8",
        layout="lmcache-mp:object" if layout else SERIALIZED,
        tokens_per_block=layout.tokens if layout else 1,
        block_bytes_max=max(1, layout.size_bytes) if layout else serialized_bytes_max,
        group=int(key.object_group_id),
        tp_rank=rank if in_world else 0,
        tp_size=world if in_world else 1,
        extra={"kv_rank": f"{key.kv_rank:#x}"} | (layout.text() if layout else {}),
    )


def engine_namespace(key: Any, layout: Layout, memory_format: str, chunk_tokens: int, revision: str) -> Namespace:
    """Of the chunks of one ``CacheEngineKey``'s model, rank and dtype. ``layout``: that of a whole chunk of ``chunk_tokens``."""
    in_world = 0 <= key.worker_id < key.world_size
    return Namespace(
        model=key.model_name or "unnamed",
        revision=revision,
        dtype=_dtype(layout),
        layout=f"lmcache:{memory_format}",
        tokens_per_block=chunk_tokens,
        block_bytes_max=max(1, layout.size_bytes),
        tp_rank=key.worker_id if in_world else 0,
        tp_size=key.world_size if in_world else 1,
        extra={"rank": f"{key.worker_id} of {key.world_size}", "kv_dtype": str(key.dtype)} | layout.text(),
    )


def _dtype(layout: Layout) -> str:
    """The elements' type when all have the same; otherwise they are bytes to the store, and ``extra`` says which."""
    return layout.dtypes[0] if len(set(layout.dtypes)) == 1 and layout.dtypes[0] in ELEMENT_SIZES else "uint8"


class Revisions:
    """Which weights a model's name stands for. Thread-safe.

    ``given`` (the user's text) stands for all models. Without it a name that is a folder here has the revision of its files, as
    they were when the model was first seen (restart LMCache's server with new weights), and a hub's name that of the commit in the cache.
    """

    def __init__(self, given: str | None) -> None:
        self._given = given
        self._found: dict[str, str] = {}
        self._lock = threading.Lock()

    def of(self, model: str) -> str:
        """Raises ``OSError`` when the folder cannot be read: then nobody knows which weights these are."""
        if self._given is not None:
            return self._given
        with self._lock:
            if model not in self._found:
                self._found[model] = weights_revision(model or "unnamed", commit=hub_commit(model) if model else None)
            return self._found[model]


class Spaces:
    """The namespaces of a store that keys led to so far. Thread-safe; the first key of a namespace makes it."""

    def __init__(self, attached: AttachedStore) -> None:
        self._attached = attached
        self._lock = threading.Lock()
        self._spaces: dict[Any, QuietSpace | None] = {}

    def of(self, identity: Any, describe: Callable[[], Namespace]) -> QuietSpace | None:
        """``identity``: everything that ``describe`` depends on. ``None`` where there can be no such namespace; the log says why."""
        with self._lock:
            if identity in self._spaces:
                return self._spaces[identity]
            space = self._make(describe)
            if len(self._spaces) < SPACES_MAX:
                self._spaces[identity] = space
            return space

    def _make(self, describe: Callable[[], Namespace]) -> QuietSpace | None:
        try:
            return self._attached.space(describe())
        except (InvalidConfig, OSError) as error:
            logger.error("LMCache: chunks of this kind are not stored, every lookup is a miss: %s", error)
            return None

    def __len__(self) -> int:
        return len(self._spaces)


def taken(options: Mapping[str, Any], own: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings as (the adapter's, the store's). ``own``: names and defaults; a default's type is that of the setting.

    Raises ``InvalidConfig`` for a setting of the adapter that is of another type.
    """
    mine = {name: options.get(name, default) for name, default in own.items()}
    for name, default in own.items():
        value = mine[name]
        if isinstance(default, bool):
            expected, good = "true or false", isinstance(value, bool)
        elif isinstance(default, int | float):
            expected, kind = ("a positive integer", int) if isinstance(default, int) else ("a positive number of seconds", int | float)
            good = isinstance(value, kind) and not isinstance(value, bool) and value > 0
        else:
            expected, good = "a text", value is None or isinstance(value, str)
        if not good:
            raise InvalidConfig(f"{name} cannot be used", where=where, expected=expected, actual=repr(value))
    return mine, {name: value for name, value in options.items() if name not in own}
