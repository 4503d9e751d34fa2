"""What the chunks of one LMCache engine look like in memory: shapes, dtypes and memory format, from its configuration and metadata.

Facts about them are those of LMCache 0.5.6 (``lmcache/v1/metadata.py``, ``cache_engine.py``, ``memory_management.py``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from ..format.errors import InvalidConfig
from .lmcache_identity import Layout

logger = logging.getLogger("kvlode")


class Chunks:
    """The chunks of one engine. Thread-safe.

    ``config``: ``LMCacheEngineConfig``; ``metadata``: ``LMCacheMetadata``; ``memory_formats``: members of ``MemoryFormat`` by name.
    Raises ``InvalidConfig`` for settings under which a chunk is more than its bytes.
    """

    def __init__(self, config: Any, metadata: Any, memory_formats: Mapping[str, Any], where: str) -> None:
        if config.enable_blending or (config.use_layerwise and metadata.use_mla):
            raise InvalidConfig(
                "chunks of these settings cannot be stored",
                where=where,
                expected="no enable_blending, and no use_layerwise with a model of latent attention (MLA)",
                actual=f"enable_blending={config.enable_blending}, use_layerwise={config.use_layerwise}, use_mla={metadata.use_mla}",
            )
        self._metadata = metadata
        self._layerwise = bool(config.use_layerwise)
        self._warned = False
        self.tokens = int(metadata.chunk_size)
        """Of a whole chunk. The last one of a prompt may have fewer."""
        self.format_name = "KV_MLA_FMT" if metadata.use_mla else "KV_T2D" if config.use_layerwise else "KV_2LTD"
        self.format = memory_formats[self.format_name]
        _warn_of_hash(config)

    def dtypes(self) -> list[Any]:
        return list(self._metadata.get_dtypes())

    def shapes(self, tokens: int) -> list[Any]:
        """Shapes of a chunk's tensors. LMCache may learn its groups of layers late, so this is asked every time."""
        whole = list(self._metadata.get_shapes(tokens))
        if not self._layerwise:
            return whole
        return [type(whole[0])([tokens, 2, whole[0][-1]])]

    def layout(self, tokens: int) -> Layout:
        return Layout.of(self.shapes(tokens), self.dtypes())

    def token_bytes(self) -> int:
        return max(1, self.layout(self.tokens).size_bytes // self.tokens)

    def fit(self, memory_object: Any) -> bool:
        """Whether a load would make an object like this one: only then can it be stored."""
        try:
            layout = Layout.of_object(memory_object)
            tokens = layout.size_bytes // self.token_bytes()
            good = memory_object.metadata.fmt == self.format and 0 < tokens <= self.tokens and layout == self.layout(tokens)
        except (AttributeError, TypeError) as error:
            layout, good = Layout((), (str(error),)), False
        if not good and not self._warned:
            self._warned = True
            logger.warning("chunks of %s are not stored, expected %s in %s (told once)", layout, self.layout(self.tokens), self.format_name)
        return good


def _warn_of_hash(config: Any) -> None:
    algorithm = getattr(config, "pre_caching_hash_algorithm", "builtin")
    if algorithm == "builtin" and not os.environ.get("PYTHONHASHSEED", "").isdecimal():
        logger.warning(
            "LMCache hashes chunks with Python's hash(), which is another one in every process: nothing stored now will be found later. "
            "Set PYTHONHASHSEED to a number, or pre_caching_hash_algorithm to sha256_cbor."
        )
