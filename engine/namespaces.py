"""The namespaces of an open store: identity, codec choice and the record that describes each in every segment."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from ..format.checksum import xxh3_64
from ..format.layout import STRIPE_BYTES_DEFAULT, Codec, RecordType, stripe_bytes_for
from ..format.namespace import Namespace
from ..format.record import STRIPE_DTYPE, RecordHeader
from .codec_choice import CodecChoice
from .codec_policy import Resources


class NamespaceState:
    """What the engine keeps of one namespace while the store is open."""

    def __init__(self, descriptor: Namespace, forced_codec: Codec | None, resources: Callable[[], Resources | None] | None = None) -> None:
        self.descriptor = descriptor
        self.digest = descriptor.digest
        self.stripe_bytes = descriptor.layer_bytes or STRIPE_BYTES_DEFAULT
        self.codec_choice = CodecChoice(forced_codec, descriptor.element_size, resources)
        self.record_payload = np.frombuffer(descriptor.canonical_json(), dtype=np.uint8)
        self.record_header = _describe(self.digest, self.record_payload)


def _describe(digest: bytes, payload: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> RecordHeader:
    """The namespace record's header, still without a place (SPEC.md: namespace record)."""
    stripes = np.zeros(1, dtype=STRIPE_DTYPE)
    stripes[0]["stored_length"], stripes[0]["checksum"] = payload.size, xxh3_64(payload)
    return RecordHeader(
        record_type=RecordType.NAMESPACE,
        store_uuid=bytes(16),
        segment_id=0,
        offset=0,
        epoch=0,
        version_seq=0,
        record_seq=0,
        synced_bytes=0,
        namespace=digest,
        stripe_bytes=stripe_bytes_for(payload.size),
        raw_length=payload.size,
        stored_length=payload.size,
        raw_checksum=xxh3_64(payload),
        stripes=stripes,
    )


class NamespaceTable:
    """Namespaces by digest. Thread-safe."""

    def __init__(self, forced_codec: Codec | None, resources: Callable[[], Resources | None] | None = None) -> None:
        self._forced_codec = forced_codec
        self._resources = resources
        self._lock = threading.Lock()
        self._states: dict[bytes, NamespaceState] = {}

    def register(self, descriptor: Namespace) -> NamespaceState:
        with self._lock:
            state = self._states.get(descriptor.digest)
            if state is None:
                state = self._states[descriptor.digest] = NamespaceState(descriptor, self._forced_codec, self._resources)
            return state

    def force_codec(self, codec: Codec | None) -> None:
        """Every namespace encodes with this codec from now on; ``None`` lets sampling decide."""
        with self._lock:
            if codec == self._forced_codec:
                return
            self._forced_codec = codec
            for state in self._states.values():
                state.codec_choice = CodecChoice(codec, state.descriptor.element_size, self._resources)

    def get(self, digest: bytes) -> NamespaceState | None:
        with self._lock:
            return self._states.get(digest)

    def all(self) -> list[NamespaceState]:
        with self._lock:
            return list(self._states.values())
