"""A store as an engine has it: whatever goes wrong with it, the engine sees misses and refused puts, never an exception.

Only wrong settings raise, and only when the engine starts: nobody reads a log line about a misspelt option.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ..engine.config import StoreConfig
from ..engine.contract import Block, BlockSpace, GetJob, LoadEstimate, PutJob, Refusal, Status, Store
from ..engine.jobs import refused
from ..engine.opening import follow_store, open_store
from ..engine.store_set import open_set
from ..format.errors import InvalidConfig, KvlodeError
from ..format.namespace import Namespace

logger = logging.getLogger("kvlode")

T = TypeVar("T")

OWN_OPTIONS = frozenset({"path", "own"})
DEFAULTS: dict[str, Any] = {"buffer": "256MiB", "on_locked": "follow", "serve_clean": False}
"""The engine has a DRAM tier of its own, so the store's buffer only takes writes; a second process beside the writer reads."""
CLOSE_S = 30.0
POLL_S = 0.0005


class AttachedStore:
    """A store that an adapter opened, or (``store is None``) the absence of one, with the reason. Thread-safe."""

    def __init__(self, store: Store | None, reason: str = "") -> None:
        self.store = store
        self.reason = reason

    @classmethod
    def open(cls, options: Mapping[str, Any], *, where: str, follow: bool = False, sets: bool = False) -> AttachedStore:
        """``options``: ``path`` and whatever ``kvlode.open`` takes; ``where`` names the engine's setting in messages.

        ``follow``: only ever read, so that a process that has nothing to write does not take the lock from the one that has.
        ``sets``: ``path`` may also be a list of folders, with ``own`` as in ``kvlode.open``.

        Raises ``InvalidConfig`` for options that no store has. A store that cannot be opened is reported once and then absent.
        """
        path: Any = options.get("path")
        is_set = sets and isinstance(path, (list, tuple))
        folders: list[Any] = list(path) if is_set else [path]
        if not folders or not all(isinstance(folder, str) and folder for folder in folders):
            expected = "path: a folder" + (", or a list of folders" if sets else "")
            raise InvalidConfig("an adapter needs the folder of its store", where=where, expected=expected, actual=path)
        if not is_set and "own" in options:
            raise InvalidConfig("own is for a list of folders", where=where, expected="a list as path, or no own", actual=path)
        config = StoreConfig.build(**(DEFAULTS | {name: value for name, value in options.items() if name not in OWN_OPTIONS}))
        try:
            if is_set:
                return cls(open_set(folders, config, own=options.get("own", 1)))
            return cls(follow_store(path, config) if follow else open_store(path, config))
        except InvalidConfig:
            raise
        except (KvlodeError, OSError) as error:
            logger.error("%s: the engine runs without its store, every lookup is a miss: %s", where, error)
            return cls(None, str(error))

    def space(self, descriptor: Namespace) -> QuietSpace:
        """The surface of one namespace. Raises ``InvalidConfig`` for blocks that the store has no room for."""
        if self.store is None:
            return QuietSpace(None, descriptor)
        try:
            return QuietSpace(self.store.namespace(descriptor), descriptor)
        except InvalidConfig:
            raise
        except (KvlodeError, OSError) as error:
            logger.error("namespace of %s: every lookup is a miss: %s", descriptor.model, error)
            return QuietSpace(None, descriptor)

    def stats(self) -> Mapping[str, Any]:
        """The store's counters; without a store just the reason."""
        return {"absent": self.reason} if self.store is None else self.store.stats()

    def flush(self, timeout_s: float) -> bool:
        """See ``Store.flush``; True without a store, as nothing was accepted."""
        return self.store is None or _quietly("flush", lambda: self.store.flush(timeout_s) if self.store else True, False)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """See ``Store.close``."""
        return self.store is None or _quietly("close", lambda: self.store.close(timeout_s) if self.store else True, False)


class QuietSpace:
    """The part of ``BlockSpace`` that engines use; errors of the store are logged, and answered as misses and refusals."""

    def __init__(self, space: BlockSpace | None, descriptor: Namespace) -> None:
        self._space = space
        self.descriptor = descriptor

    @property
    def digest(self) -> bytes:
        return self.descriptor.digest

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        return self._try("match_prefix", lambda space: space.match_prefix(keys), 0)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return self._try("contains", lambda space: space.contains(keys), [False] * len(keys))

    def lookup_nowait(self, keys: Sequence[bytes]) -> list[Status]:
        return self._try("lookup", lambda space: space.lookup_nowait(keys), [Status.MISS] * len(keys))

    def stored_prefixes(self, rows: Sequence[Sequence[bytes]], timeout_s: float) -> list[int]:
        """How many leading keys of each row are stored; what the index has not answered for after ``timeout_s`` ends a run.

        For threads that may wait: it asks in the store's memory, and again every half millisecond while the index is being asked.
        """
        deadline_s = time.monotonic() + timeout_s
        pause = threading.Event()
        while True:
            answers = [self.lookup_nowait(row) for row in rows]
            runs = [run_of_hits(row) for row in answers]
            waiting = any(run < len(row) and row[run] is Status.PENDING for row, run in zip(answers, runs, strict=True))
            if not waiting or time.monotonic() >= deadline_s:
                return runs
            pause.wait(POLL_S)

    def submit_put(self, keys: Sequence[bytes], blocks: Sequence[Block], **options: Any) -> PutJob:
        """See ``BlockSpace.submit_put``; a failure is a job that is done and refused."""
        job = self._try("put", lambda space: space.submit_put(keys, blocks, **options), None)
        return _Finished([refused(Refusal.STORE_FAILED)] * len(keys), options.get("queue")) if job is None else job

    def submit_get(self, keys: Sequence[bytes], outs: Sequence[Block], **options: Any) -> GetJob:
        """See ``BlockSpace.submit_get``; a failure is a job that is done and missed."""
        job = self._try("get", lambda space: space.submit_get(keys, outs, **options), None)
        return _Finished([Status.IO_ERROR] * len(keys), options.get("queue")) if job is None else job

    def get_many_into(self, keys: Sequence[bytes], outs: Sequence[Block], *, timeout: float) -> list[Status]:
        """See ``BlockSpace.get_many_into``; here the deadline is a duty."""
        return self._try("get", lambda space: space.get_many_into(keys, outs, timeout=timeout), [Status.IO_ERROR] * len(keys))

    @contextlib.contextmanager
    def pin(self, keys: Sequence[bytes]) -> Iterator[int]:
        """See ``BlockSpace.pin``. After a failure nothing is kept, so that a load inside the ``with`` may be a miss."""
        held = contextlib.ExitStack()
        try:
            yield self._try("pin", lambda space: held.enter_context(space.pin(keys)), 0)
        finally:
            _quietly("unpin", held.close, None)

    def estimate(self, keys: Sequence[bytes]) -> LoadEstimate:
        return self._try("estimate", lambda space: space.estimate(keys), LoadEstimate(0, 0, 0.0))

    def touch(self, keys: Sequence[bytes]) -> None:
        self._try("touch", lambda space: space.touch(keys), None)

    def delete(self, keys: Sequence[bytes]) -> int:
        """See ``BlockSpace.delete``. Should it fail, everything is a miss from now on: what was to go must not be found."""
        return self._forget(lambda space: space.delete(keys))

    def drop(self) -> None:
        """Forget every block of the namespace, durably. Should it fail, everything is a miss from now on."""

        def drop(space: BlockSpace) -> int:
            space.drop()
            return 0

        self._forget(drop)

    def _forget(self, call: Callable[[BlockSpace], int]) -> int:
        space = self._space
        if space is None:
            return 0
        try:
            return call(space)
        except Exception as error:  # as in ``_quietly``
            logger.error("blocks could not be removed, so that nothing stored is used any more: %s", error)
            self._space = None
            return 0

    def _try(self, what: str, call: Callable[[BlockSpace], T], otherwise: T) -> T:
        space = self._space
        return otherwise if space is None else _quietly(what, lambda: call(space), otherwise)


def run_of_hits(statuses: Sequence[Status]) -> int:
    """How many of them are HIT, from the front."""
    return next((position for position, status in enumerate(statuses) if status is not Status.HIT), len(statuses))


def _quietly(what: str, call: Callable[[], T], otherwise: T) -> T:
    try:
        return call()
    except Exception as error:  # whatever it is: an engine must not end because of its cache
        logger.error("%s failed, the engine goes on without the store's answer: %s", what, error)
        return otherwise


class _Finished:
    """A job that was over before it began."""

    def __init__(self, statuses: Sequence[Any], queue: Any) -> None:
        self.statuses = statuses
        self.verified = [False] * len(statuses)
        if queue is not None:
            queue.push(self)

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def cancel(self, timeout: float | None = None) -> bool:
        return True
