"""Settings of the TensorRT-LLM connector, and what its scheduler and its worker share in one process: the store and the memory."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..engine.config import parse_bytes
from ..format.errors import InvalidConfig
from ..format.namespace import Namespace
from .attached import CLOSE_S, AttachedStore, QuietSpace
from .identity import hub_commit, weights_revision
from .tensorrt_llm_memory import Pool, Saver, Staging
from .transfers import LOAD_TIMEOUT_S

OPTIONS_VARIABLE = "TRTLLM_KVLODE"
"""Its beginning is one that TensorRT-LLM hands on to the processes it starts."""
OWN_OPTIONS: Mapping[str, Any] = {
    "revision": None,
    "staging": "256MiB",
    "saving": "256MiB",
    "stage_wait_s": 0.0,
    "load_timeout_s": LOAD_TIMEOUT_S,
}
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")


class Connection:
    """What the two classes of one engine share: the store and, once the worker registered the pool, the memory."""

    _known: ClassVar[dict[int, tuple[Any, Connection]]] = {}
    _known_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, llm_args: Any) -> None:
        _check_one_process(llm_args)
        options = _options()
        self._own = {name: options.pop(name, default) for name, default in OWN_OPTIONS.items()}
        self._revision = self._own["revision"] or _revision(llm_args)
        self._llm_args = llm_args
        self._sizes = {name: parse_bytes(self._own[name], name) for name in ("staging", "saving")}
        self.stage_wait_s = float(self._own["stage_wait_s"])
        self.attached = AttachedStore.open(options, where=OPTIONS_VARIABLE)
        self.space: QuietSpace | None = None
        self.pool: Pool | None = None
        self.staging: Staging | None = None
        self.saver: Saver | None = None

    @classmethod
    def of(cls, llm_args: Any) -> Connection:
        """The connection of the engine with these arguments (the engine gives both classes the same object)."""
        with cls._known_lock:
            if id(llm_args) not in cls._known:
                cls._known[id(llm_args)] = (llm_args, cls(llm_args))  # kept, so that its id is nobody else's
            return cls._known[id(llm_args)][1]

    @property
    def tokens_per_block(self) -> int:
        return int(self._llm_args.kv_cache_config.tokens_per_block)

    def register(self, parts: Sequence[Any], dtype: str, layout: Any) -> None:
        """The pool is there: open the namespace of its blocks and the memory beside it. A later pool takes the place of an earlier one."""
        for memory in (self.staging, self.saver):
            if memory is not None:
                memory.close(CLOSE_S)
        pool = Pool(parts)
        quantization = getattr(self._llm_args, "quant_config", None)
        kv_dtype = getattr(self._llm_args.kv_cache_config, "dtype", None)
        described = json.dumps([layout, str(quantization), str(kv_dtype)], sort_keys=True, default=str)
        descriptor = Namespace(
            model=str(self._llm_args.model),
            revision=self._revision,
            dtype=dtype,
            layout="tensorrt-llm:pool",
            tokens_per_block=self.tokens_per_block,
            block_bytes_max=pool.block_bytes,
            extra={"pool": hashlib.blake2b(described.encode(), digest_size=16).hexdigest()},
        )
        self.space = self.attached.space(descriptor)
        self.staging = Staging(self.space, pool, self._sizes["staging"], float(self._own["load_timeout_s"]))
        self.saver = Saver(self.space, pool, self._sizes["saving"])
        self.pool = pool

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """End what is under way and close the store; False at the deadline. TensorRT-LLM never calls it: stores close at exit."""
        with self._known_lock:
            self._known.pop(id(self._llm_args), None)
        ends = [memory.close(timeout_s) for memory in (self.staging, self.saver) if memory is not None]
        return self.attached.close(timeout_s) and all(ends)


def _options() -> dict[str, Any]:
    """The settings in the environment: a JSON object, or the path of a file with one."""
    text = os.environ.get(OPTIONS_VARIABLE, "")
    try:
        options = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except (OSError, ValueError) as error:
        options = error
    if not isinstance(options, dict):
        raise InvalidConfig(
            "the connector has no settings",
            where=f"the environment variable {OPTIONS_VARIABLE}",
            expected='a JSON object such as {"path": "/nvme/kv", "capacity": "200GiB"}, or the path of a file with one',
            actual=str(options) if text else "nothing",
        )
    return options


def _check_one_process(llm_args: Any) -> None:
    sizes = {name: getattr(llm_args, name, 1) or 1 for name in PARALLEL}
    if any(size > 1 for size in sizes.values()):
        raise InvalidConfig(
            "a model on several GPUs cannot be restored by this connector",
            where=OPTIONS_VARIABLE,
            expected="one process",
            actual=", ".join(f"{name}={size}" for name, size in sizes.items()),
            action="Run it without kv_connector_config.",
        )


def _revision(llm_args: Any) -> str:
    model = str(llm_args.model)
    commit = hub_commit(model, getattr(llm_args, "revision", None))
    if commit is None and not os.path.exists(model):
        raise InvalidConfig(
            "nothing says which weights this model has",
            where=OPTIONS_VARIABLE,
            actual=model,
            action='Set "revision", a text that changes with them.',
        )
    return weights_revision(model, commit=commit)
