"""Rules for keys, metadata and tags, and the prefix-chain keys for hosts that bring no keys of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import InvalidKey
from .layout import DIGEST_BYTES, KEY_BYTES_MAX, META_BYTES_MAX, ZERO_DIGEST

KEY_PERSON = b"kvlode-key"
TAG_PERSON = b"kvlode-tag"
PREFIX_PERSON = b"kvlode-prefix"
PREFIX_KEY_BYTES = 32


def check_key(key: bytes) -> None:
    """Raise ``InvalidKey`` unless the key is 1 to 255 bytes."""
    if not isinstance(key, bytes):
        raise InvalidKey("a key is not bytes", expected="bytes", actual=type(key).__name__, action="Encode it, or use kvlode.prefix_keys.")
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        raise InvalidKey(
            "a key has the wrong length",
            expected=f"1 to {KEY_BYTES_MAX} bytes",
            actual=f"{len(key)} bytes",
            action="Use a digest of the long form." if key else None,
        )


def check_meta(meta: bytes) -> None:
    """Raise ``InvalidKey`` unless the user metadata is at most 512 bytes."""
    if not isinstance(meta, bytes):
        raise InvalidKey("metadata is not bytes", expected="bytes", actual=type(meta).__name__)
    if len(meta) > META_BYTES_MAX:
        raise InvalidKey("metadata is too long", expected=f"at most {META_BYTES_MAX} bytes", actual=f"{len(meta)} bytes")


def key_digest(key: bytes) -> bytes:
    """BLAKE2b-128 of a key: how a record names its parent."""
    return hashlib.blake2b(key, digest_size=DIGEST_BYTES, person=KEY_PERSON).digest()


def tag_digest(tag: str | bytes | None) -> bytes:
    """BLAKE2b-128 of a tag (a tenant or session; text as UTF-8); all zero without a tag."""
    if tag is None:
        return ZERO_DIGEST
    if not isinstance(tag, (str, bytes)):
        raise InvalidKey("a tag is neither text nor bytes", expected="str, bytes or None", actual=type(tag).__name__)
    data = tag.encode("utf-8", "surrogatepass") if isinstance(tag, str) else tag
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, person=TAG_PERSON).digest()


def prefix_keys(tokens: Sequence[int] | Any, block_tokens: int, salt: bytes = b"", *, parent: bytes | None = None) -> list[bytes]:
    """One 32-byte key for each full block of ``block_tokens`` tokens; equal prefixes give equal keys.

    ``key[i] = BLAKE2b-256(key[i - 1] + tokens of block i as little-endian u64)`` and ``key[-1] = BLAKE2b-256(salt)``,
    all personalised with ``kvlode-prefix``. Tokens of an incomplete last block are left out. ``salt`` separates what must not
    be shared (a tenant, an adapter). ``tokens`` is any 1-D sequence of integers, NumPy array or CPU tensor. ``parent`` goes on
    behind the block of that key (whose salt counts), so that a growing sequence need not be hashed again.
    """
    if block_tokens < 1:
        raise InvalidKey("a block must have tokens", expected="block_tokens >= 1", actual=block_tokens)
    ids = _token_array(tokens)
    if parent is None:
        parent = hashlib.blake2b(salt, digest_size=PREFIX_KEY_BYTES, person=PREFIX_PERSON).digest()
    keys: list[bytes] = []
    for start in range(0, len(ids) - block_tokens + 1, block_tokens):
        digest = hashlib.blake2b(parent, digest_size=PREFIX_KEY_BYTES, person=PREFIX_PERSON)
        digest.update(ids[start : start + block_tokens].data)
        parent = digest.digest()
        keys.append(parent)
    return keys


def _token_array(tokens: Sequence[int] | Any) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Tokens as contiguous little-endian u64; raises ``InvalidKey`` for what is no 1-D run of non-negative integers."""
    try:
        ids = np.asarray(tokens)
        if ids.size == 0:
            ids = ids.astype(np.uint64)
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidKey("tokens are no sequence of integers", expected="integers of 0 to 2**64 - 1", actual=str(error)) from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidKey(
            "tokens are no sequence of integers", expected="one dimension of integers", actual=f"{ids.ndim} dimensions of {ids.dtype}"
        )
    if ids.dtype.kind == "i" and ids.size and int(ids.min()) < 0:
        raise InvalidKey("a token is negative", expected=">= 0", actual=int(ids.min()))
    return np.ascontiguousarray(ids, dtype="<u8")
