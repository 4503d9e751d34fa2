"""Which namespace a block of vLLM belongs to: what must be equal for its bytes to mean the same to two engines.

vLLM's keys (``OffloadKey``: the chained hash of all tokens up to the block's end, then the cache group as four bytes, big-endian)
say which tokens a block is of, and nothing of model, weights, element type, layout or ranks. All of that is in the namespace here.
Names are those of ``OffloadingConfig`` (``vllm/v1/kv_offload/config.py``, vLLM 0.32.0 and 0.33.0); nothing of vLLM is imported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from ..format.errors import InvalidConfig
from ..format.namespace import ELEMENT_SIZES, Namespace
from .identity import hub_commit, hub_folder, weights_revision

logger = logging.getLogger("kvlode")

GROUP_BYTES = 4
"""Of an ``OffloadKey``: the cache group, at its end."""
OPAQUE = "uint8"
"""Element type of a cache that mixes types, or of a type that has no name here; the name that vLLM gives it is kept beside."""

_KV_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_inc": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")


def split_key(key: bytes) -> tuple[int, bytes]:
    """Cache group and block hash of an ``OffloadKey``."""
    return int.from_bytes(key[-GROUP_BYTES:], "big"), bytes(key[:-GROUP_BYTES])


def join_key(group: int, block_hash: bytes) -> bytes:
    """The ``OffloadKey`` of a group and a block hash."""
    return bytes(block_hash) + group.to_bytes(GROUP_BYTES, "big")


def kv_element_type(dtype: object) -> str:
    """The element type (a name of torch) of vLLM's ``cache_dtype``; ``uint8`` for what mixes types."""
    name = str(dtype).removeprefix("torch.")
    name = _KV_DTYPES.get(name, name)
    return name if name in ELEMENT_SIZES else OPAQUE


def vllm_series() -> str:
    """``0.33`` of vLLM 0.33.0: what a layout is called may mean other bytes in another series."""
    version = str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))
    return ".".join(version.split(".")[:2])


def layers_digest(groups: Iterable[Any]) -> str:
    """32 hexadecimal digits that tell which layers lie in which cache group, and how many tokens a block of it has."""
    described = [[int(group.tokens_per_block), [str(name) for name in group.layer_names]] for group in groups]
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()


def hub_commits(model: str) -> list[str]:
    """Commits of a model of the hub that lie in its cache here, sorted; none for what is no such model."""
    try:
        return sorted(name for name in os.listdir(hub_folder(model) / "snapshots") if _COMMIT.match(name))
    except OSError:
        return []


def model_revision(model: str, *, revision: str | None = None, settings: Mapping[str, Any] | None = None) -> str:
    """The ``revision`` of the namespace of a model: see ``weights_revision``.

    ``revision``: what vLLM is told to load (a commit, a branch, a tag), or any name that the user gives these weights; the user
    vouches for it. Without one it follows from the files of a folder, or from the one commit of the hub's cache; with several
    commits nobody here knows which one vLLM loads, so that raises ``InvalidConfig``. Raises ``OSError`` when files cannot be read.
    """
    if revision is not None:
        commit = hub_commit(model, str(revision))
        return weights_revision(f"given:{model}", commit=commit or str(revision), settings=settings)
    if os.path.exists(model):
        return weights_revision(model, settings=settings)
    commits = hub_commits(model)
    if len(commits) > 1:
        raise InvalidConfig(
            "which weights are loaded is not known",
            where=model,
            expected="one commit in the hub's cache, or the setting 'revision'",
            actual=f"{len(commits)} commits",
            action="Set 'revision' beside 'path' to the commit that the engine is started with.",
        )
    if not commits:
        logger.warning("%s: neither a folder nor in the hub's cache: set 'revision', or other weights of this name will be mixed up", model)
    return weights_revision(model, commit="".join(commits), settings=settings)


def tier_namespace(config: Any, group_index: int, *, row_bytes: int, revision: str, epoch: str = "") -> Namespace:
    """The namespace of one cache group in the secondary tier.

    ``config``: vLLM's ``OffloadingConfig``. ``row_bytes``: of one chunk, all workers' bytes and the padding after them; the rank
    is always 0 because a row has the bytes of every rank. Where vLLM says that these bytes do not depend on the number of ranks
    (``is_parallelism_agnostic``, ``replicated_layout``), neither does the namespace. ``epoch`` sets apart what was stored before
    a reset. Raises ``InvalidConfig`` for what no namespace can hold.
    """
    parallel, cache = config.parallel, config.cache
    replicated = bool(getattr(config, "replicated_layout", False))
    portable = bool(parallel.is_parallelism_agnostic) or replicated
    extra = {
        "engine": "vllm",
        "kv_dtype": str(config.model.dtype),
        "layers": layers_digest(config.groups),
        "tokens_per_hash": str(cache.tokens_per_hash),
        "blocks_per_chunk": str(cache.blocks_per_chunk),
        "replicated": str(replicated),
        "portable": str(portable),
        "epoch": epoch,
    }
    if not portable:
        names = ("world_size", "pcp_size", "dcp_size", "rank")
        extra |= {name: str(getattr(parallel, name)) for name in names}
        extra["worker_bytes"] = str(config.worker_kv_bytes_per_block)
    return Namespace(
        model=config.model.name,
        revision=revision,
        dtype=kv_element_type(config.model.dtype),
        layout=_row_layout(config),
        tokens_per_block=_tokens_per_block(config, group_index) * int(cache.blocks_per_chunk),
        block_bytes_max=row_bytes,
        group=group_index,
        tp_size=1 if portable else int(parallel.tp_size),
        pp_size=1 if portable else int(parallel.pp_size),
        extra=extra,
    )


class TierNames:
    """The namespaces of one tier, and when a reset makes them others.

    ``on_reset``: ``"forget"`` never reads again what was stored before, nor does a later process what is stored from then on, as weights
    may have been replaced in memory; ``"keep"`` goes on with what is stored unless the files of the weights have changed.
    Raises ``InvalidConfig``, ``OSError``.
    """

    def __init__(
        self, config: Any, row_bytes: int, revision: str | None, identity: Mapping[str, Any] | None, on_reset: str = "forget"
    ) -> None:
        if on_reset not in ("keep", "forget"):
            raise InvalidConfig("on_reset is unknown", expected="keep or forget", actual=repr(on_reset))
        if identity is not None and not isinstance(identity, Mapping):
            raise InvalidConfig("identity is no mapping", expected="names and values", actual=repr(identity))
        self._config = config
        self._row_bytes = row_bytes
        self._given = revision
        self._identity = dict(identity or {})
        self._forgetting = on_reset == "forget"
        self._epoch = ""
        self._revision = self._read_revision()

    def _read_revision(self) -> str:
        return model_revision(self._config.model.name, revision=self._given, settings=self._identity)

    def namespace(self, group_index: int) -> Namespace:
        """See ``tier_namespace``."""
        return tier_namespace(self._config, group_index, row_bytes=self._row_bytes, revision=self._revision, epoch=self._epoch)

    def renew(self) -> bool:
        """The engine resets its caches; True when the namespaces are others from here on. Reads files."""
        before = (self._revision, self._epoch)
        try:
            self._revision = self._read_revision()
        except (InvalidConfig, OSError) as error:
            logger.error("what weights there are now cannot be told, so that nothing stored is used: %s", error)
            self._epoch = uuid.uuid4().hex
        if self._forgetting:
            self._epoch = uuid.uuid4().hex
        return (self._revision, self._epoch) != before


def _row_layout(config: Any) -> str:
    """Meaning of the bytes of a row. vLLM numbers the versions of its canonical form only in the code that makes it."""
    form = "canonical" if getattr(config, "canonical_layout", False) else "workers"
    return f"vllm-{vllm_series()}-rows:{form}:{getattr(config, 'kv_cache_layout', None)}"


def _tokens_per_block(config: Any, group_index: int) -> int:
    for group in config.groups:
        if group.group_id == group_index:
            return int(group.tokens_per_block)
    return int(config.cache.tokens_per_hash)
