"""A store set: several stores that a host sees as one (``contract.Store``).

One folder has one writing process. Engines that write from several processes use one folder each, and read them all: each process opens
the set of all folders with its own first, writes to that, and reads the others beside their writers. A process that has several drives
writes to several folders at once, and its blocks are spread over them. A store that is missing, lost or broken costs what it holds, and
nothing else; it is tried again after a while, for the process that writes it may start later.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import xxhash

from ..format.errors import InvalidConfig, KvlodeError, StoreClosed
from ..format.namespace import Namespace
from .config import StoreConfig
from .contract import PurgeReport, Store
from .events import EventBatch
from .opening import Environment, follow_beside, open_store
from .purge import sum_of_reports
from .set_followed import FollowedStore, drive_of
from .set_places import Places
from .set_space import SetSpace
from .side_by_side import side_by_side
from .store import DiskStore

OPEN_S = 5.0
"""How long opening a set waits for the stores that it follows; one that takes longer joins when it is there."""
AVOID_S = 30.0
"""How long blocks go elsewhere after a store has refused one for good reason."""
EXIT_S = 5.0


class StoreSet:
    """See the module. Made by ``kvlode.open`` with a list of folders; thread-safe.

    ``own``: the stores that this process writes to, all open; ``followed``: the others, not started yet. Both belong to the set.
    Deleting and dropping concern the own stores alone: what another process has written is that process's to delete.
    """

    def __init__(self, own: Sequence[Store], followed: Sequence[FollowedStore] = (), *, drives: Sequence[Hashable] | None = None) -> None:
        if not own:
            raise InvalidConfig("a store set needs a store to write to", expected="at least one", actual="none")
        self.own = list(own)
        self.followed = list(followed)
        self.places = Places()
        self._drives = list(drives) if drives is not None else list(range(len(self.own)))
        self._avoided: dict[int, float] = {}
        self._closed = False
        for each in self.followed:
            each.start()
        atexit.register(self._stop_following, EXIT_S)  # runs before the own stores are closed: nothing is opened any more then

    # --- what the namespaces of the set ask -----------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raise ``StoreClosed`` after ``close``."""
        if self._closed:
            raise StoreClosed("this store set is closed", action="Open the stores again.")

    def own_route(self, ident: bytes) -> list[int]:
        """Numbers of the own stores in the order in which a block is offered to them: its own drive first, refusing ones last."""
        count = len(self.own)
        if count == 1:
            return [0]
        first = xxhash.xxh3_64_intdigest(ident) % count
        route = [(first + turn) % count for turn in range(count)]
        if self._avoided:
            now_s = time.monotonic()
            route.sort(key=lambda number: self._avoided.get(number, 0.0) > now_s)
        return route

    def avoid(self, number: int) -> None:
        """An own store has refused a block, and will refuse more."""
        if len(self.own) > 1:
            self._avoided[number] = time.monotonic() + AVOID_S

    def drive(self, number: int) -> Hashable:
        """Equal for stores on one drive."""
        return self._drives[number] if number < len(self.own) else self.followed[number - len(self.own)].drive

    # --- the contract -----------------------------------------------------------------------------------------------

    def namespace(self, descriptor: Namespace) -> SetSpace:
        """See ``contract.Store.namespace``. Raises ``InvalidConfig`` when an own store is too small for one such block."""
        self.check_usable()
        return SetSpace(self, descriptor, [store.namespace(descriptor) for store in self.own])

    def flush(self, timeout: float | None = None) -> bool:
        """See ``contract.Store.flush``: all own stores, at once."""
        self.check_usable()
        return all(side_by_side([functools.partial(store.flush, timeout) for store in self.own]))

    def purge(self, tag: str | bytes, *, physical: bool = False, timeout: float | None = None) -> PurgeReport:
        """See ``contract.Store.purge``: in all own stores, at once. Other processes' stores are theirs to purge; sums of what was done."""
        self.check_usable()
        calls = [functools.partial(store.purge, tag, physical=physical, timeout=timeout) for store in self.own]
        return sum_of_reports(side_by_side(calls))

    def stats(self) -> Mapping[str, Any]:
        """Sums over the own stores and all counters, and under ``stores`` what each store says of itself, in the order of the folders.

        ``lost`` is empty for a store that is open, else it says why its blocks are missed.
        """
        self.check_usable()
        own = [dict(store.stats()) | {"own": True, "lost": ""} for store in self.own]
        others = [_stats_of(each) for each in self.followed]
        counters: dict[str, int] = {}
        for stats in [*own, *others]:
            for name, value in stats.get("counters", {}).items():
                counters[name] = counters.get(name, 0) + value
        sums = {name: sum(stats[name] for stats in own) for name in ("capacity_bytes", "used_bytes")}
        return {"role": "set", **sums, "counters": counters, "stores": [*own, *others]}

    def events(self, since: object = None) -> EventBatch:
        """See ``contract.Store.events``: what became of blocks in the own stores. Those of each store come in order."""
        self.check_usable()
        places = (None,) * len(self.own) if since is None else since
        if not isinstance(places, tuple) or len(places) != len(self.own):
            raise InvalidConfig("events cannot be told from there", expected="None, or the next of an earlier answer", actual=repr(since))
        batches = [cast(DiskStore, store).events(place) for store, place in zip(self.own, places, strict=True)]
        told = [event for batch in batches for event in batch.events]
        return EventBatch(told, tuple(batch.next for batch in batches), any(batch.missed for batch in batches))

    def close(self, timeout: float | None = 30.0) -> bool:
        """See ``contract.Store.close``: the own stores are flushed and closed, the others are left, all at once."""
        self._closed = True
        atexit.unregister(self._stop_following)
        closing = [functools.partial(store.close, timeout) for store in self.own]
        return all(side_by_side([*closing, functools.partial(self._stop_following, timeout)]))

    def _stop_following(self, timeout_s: float | None) -> bool:
        """Close what is followed; False when that did not end in time."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for each in self.followed:
            each.begin_stop(timeout_s)
        return all(each.wait_stopped(None if deadline_s is None else max(0.0, deadline_s - time.monotonic())) for each in self.followed)

    def __enter__(self) -> StoreSet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_set(
    paths: Sequence[str | os.PathLike[str]], config: StoreConfig, *, own: int = 1, environment: Environment | None = None
) -> StoreSet:
    """Open the first ``own`` folders for writing and follow the others. Raises what ``open_store`` raises, for the own folders alone."""
    folders = [os.path.abspath(os.fspath(path)) for path in paths]
    if not isinstance(own, int) or not 1 <= own <= len(folders):
        raise InvalidConfig("own is not a number of the folders", expected=f"1 to {len(folders)}", actual=repr(own))
    if len(set(folders)) < len(folders):
        raise InvalidConfig("a folder is named twice in a store set", expected="each once", actual=", ".join(folders))
    with contextlib.ExitStack() as undo:
        stores: list[DiskStore] = []
        for folder in folders[:own]:
            stores.append(open_store(folder, config, environment))
            undo.callback(stores[-1].close)
        followed = [FollowedStore(folder, functools.partial(follow_beside, folder, config, environment)) for folder in folders[own:]]
        opened = StoreSet(stores, followed, drives=[drive_of(folder) for folder in folders[:own]])
        undo.pop_all()
    deadline_s = time.monotonic() + OPEN_S
    for each in followed:
        each.wait_tried(max(0.0, deadline_s - time.monotonic()))
    return opened


def _stats_of(followed: FollowedStore) -> dict[str, Any]:
    store, reason = followed.store, followed.reason
    if store is not None:
        with contextlib.suppress(KvlodeError):  # lost at this moment
            return dict(store.stats()) | {"own": False, "lost": ""}
        reason = followed.reason
    return {"path": followed.path, "own": False, "lost": reason or "it is being closed"}
