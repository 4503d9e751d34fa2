"""The put/get surface of one namespace of a store set (``contract.BlockSpace``).

A block is looked for in all stores, and read from the one that it was last seen in, or would have been written to; what is not found
there, or is damaged, is tried in the others before it is reported. Looking up before getting (``match_prefix``, ``contains``,
``lookup_nowait``) tells where blocks are, so that all stores are read from at once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..format.errors import InvalidConfig, KvlodeError
from ..format.keys import check_key
from ..format.namespace import Namespace
from .blocks import check_start, view_block
from .contract import Block, BlockInfo, BlockSpace, GetJob, LoadEstimate, PutJob, PutStatus, Status
from .lookups import prefix_run
from .set_jobs import Leg, Plan, SetReadJob
from .set_members import Members
from .set_puts import Puts, put, submit_put
from .side_by_side import side_by_side

if TYPE_CHECKING:
    from .store_set import StoreSet

logger = logging.getLogger("kvlode")


class SetSpace:
    """See the module. Made by ``StoreSet.namespace``; thread-safe."""

    def __init__(self, owner: StoreSet, descriptor: Namespace, own: Sequence[BlockSpace]) -> None:
        self._members = Members(owner, descriptor, own)
        self._check_usable = owner.check_usable
        self.descriptor = descriptor
        self.digest: bytes = descriptor.digest

    # --- putting ----------------------------------------------------------------------------------------------

    def put(
        self,
        key: bytes,
        block: Block,
        *,
        parent: bytes | None = None,
        ttl: float | None = None,
        tag: str | bytes | None = None,
        meta: bytes = b"",
    ) -> PutStatus:
        self._check_usable()
        return put(self._members, Puts([key], [block], parent, ttl, tag, [meta]))

    def submit_put(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[Block],
        *,
        parent: bytes | None = None,
        ttl: float | None = None,
        tag: str | bytes | None = None,
        metas: Sequence[bytes] | None = None,
        own: Literal["copy", "borrow"] = "copy",
        chained: bool = True,
        queue: Any | None = None,
    ) -> PutJob:
        self._check_usable()
        return submit_put(self._members, Puts(keys, blocks, parent, ttl, tag, metas, own, chained), queue)

    # --- looking up -------------------------------------------------------------------------------------------

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        self._check_usable()
        return prefix_run(keys, self._present)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._check_usable()
        return self._present(keys)

    def _present(self, keys: Sequence[bytes]) -> list[bool]:
        return [number is not None for number in self._members.find(keys)]

    def lookup_nowait(self, keys: Sequence[bytes]) -> list[Status]:
        """See ``BlockSpace.lookup_nowait``. HIT when any store says so, else PENDING when any does, else MISS."""
        self._check_usable()
        answers = list(self._members.lookup_nowait(0, keys))
        for number in self._members.numbers[1:]:
            asked = [position for position, answer in enumerate(answers) if answer is not Status.HIT]
            if not asked:
                break
            here = []
            for position, status in zip(asked, self._members.lookup_nowait(number, [keys[p] for p in asked]), strict=True):
                if status is Status.HIT:
                    here.append(keys[position])
                if status is not Status.MISS:
                    answers[position] = status
            self._members.found(number, here)
        return answers

    # --- getting ----------------------------------------------------------------------------------------------

    def submit_get(self, keys: Sequence[bytes], outs: Sequence[Block], *, stream: Any | None = None, queue: Any | None = None) -> GetJob:
        return self._submit_get(keys, outs, None, stream, queue)

    def submit_get_range(
        self, keys: Sequence[bytes], outs: Sequence[Block], start_bytes: int, *, stream: Any | None = None, queue: Any | None = None
    ) -> GetJob:
        check_start(start_bytes)
        return self._submit_get(keys, outs, start_bytes, stream, queue)

    def _submit_get(self, keys: Sequence[bytes], outs: Sequence[Block], start_bytes: int | None, stream: Any, queue: Any) -> GetJob:
        self._check_usable()
        self._check_destinations(keys, outs)

        def submit(leg: Leg, ending: Any) -> GetJob | None:
            wanted, targets = [keys[p] for p in leg.positions], [outs[p] for p in leg.positions]
            space = self._members.space(leg.number)
            try:
                if space is None:
                    return None
                if start_bytes is None:
                    return space.submit_get(wanted, targets, stream=stream, queue=ending)
                return space.submit_get_range(wanted, targets, start_bytes, stream=stream, queue=ending)
            except Exception as error:  # closed meanwhile: a miss; and this may run on a thread of another store
                logger.debug("store %d of the set does not answer: %s", leg.number, error)
                return None

        job = SetReadJob(self._plan(keys), submit, queue)
        job.start()
        return job

    def _check_destinations(self, keys: Sequence[bytes], outs: Sequence[Block]) -> None:
        if len(keys) != len(outs):
            raise InvalidConfig("keys and destinations differ in number", expected=len(keys), actual=len(outs))
        for key in keys:
            check_key(key)
        for out in outs:
            view_block(out, writable=True, dtype=self.descriptor.dtype)

    def _plan(self, keys: Sequence[bytes]) -> Plan:
        members = self._members
        return Plan([members.route(key) for key in keys], lambda number, p, status: members.failed(number, keys[p], status))

    def get_into(self, key: bytes, out: Block, *, timeout: float | None = None) -> Status:
        return self.get_many_into([key], [out], timeout=timeout)[0]

    def get_many_into(self, keys: Sequence[bytes], outs: Sequence[Block], *, timeout: float | None = None) -> list[Status]:
        if timeout is not None:
            return self._get_in_time(keys, outs, time.monotonic() + timeout)
        job = self.submit_get(keys, outs)
        try:
            job.wait()
        except BaseException:
            job.cancel()  # the destinations are the caller's again only when no I/O targets them
            raise
        return list(job.statuses)

    def _get_in_time(self, keys: Sequence[bytes], outs: Sequence[Block], deadline_s: float) -> list[Status]:
        """Each store gets the time that is left: only it can let go of destinations at once when that has passed."""
        self._check_usable()
        self._check_destinations(keys, outs)

        def read(leg: Leg) -> list[Status]:
            wanted, targets = [keys[p] for p in leg.positions], [outs[p] for p in leg.positions]
            left_s = max(0.0, deadline_s - time.monotonic())
            otherwise = [Status.MISS] * len(wanted)
            return self._members.ask(leg.number, lambda space: space.get_many_into(wanted, targets, timeout=left_s), otherwise)

        plan, positions = self._plan(keys), list(range(len(keys)))
        while legs := plan.legs(positions):
            answers = side_by_side([functools.partial(read, leg) for leg in legs])
            positions = [p for leg, said in zip(legs, answers, strict=True) for p in plan.answer(leg, said, [True] * len(said))]
        return plan.statuses

    def info(self, keys: Sequence[bytes]) -> list[BlockInfo | None]:
        self._check_usable()
        found: list[BlockInfo | None] = [None] * len(keys)
        for number in self._members.numbers:
            asked = [position for position, info in enumerate(found) if info is None]
            if not asked:
                break
            for position, info in zip(asked, self._members.info(number, [keys[p] for p in asked]), strict=True):
                found[position] = info
        return found

    def estimate(self, keys: Sequence[bytes]) -> LoadEstimate:
        """See ``BlockSpace.estimate``. Stores on one drive take turns, drives work side by side."""
        self._check_usable()
        raw_bytes, stored_bytes, seconds = 0, 0, dict[object, float]()
        for number, group in self._groups(keys).items():
            part = self._members.estimate(number, group)
            raw_bytes, stored_bytes = raw_bytes + part.raw_bytes, stored_bytes + part.stored_bytes
            drive = self._members.set.drive(number)
            seconds[drive] = seconds.get(drive, 0.0) + part.seconds
        return LoadEstimate(raw_bytes, stored_bytes, max(seconds.values(), default=0.0))

    def _groups(self, keys: Sequence[bytes]) -> dict[int, list[bytes]]:
        """The keys that are there, by the store that has them."""
        groups: dict[int, list[bytes]] = {}
        for key, number in zip(keys, self._members.find(keys), strict=True):
            if number is not None:
                groups.setdefault(number, []).append(key)
        return groups

    # --- keeping and removing -----------------------------------------------------------------------------------

    def touch(self, keys: Sequence[bytes]) -> None:
        self._check_usable()
        for number in self._members.numbers if keys else ():  # counting a use of what a store has not got does no harm
            self._members.touch(number, keys)

    @contextlib.contextmanager
    def pin(self, keys: Sequence[bytes]) -> Iterator[int]:
        """See ``BlockSpace.pin``. Only blocks in stores that this process writes to can be kept; the others do not count."""
        self._check_usable()
        with contextlib.ExitStack() as held:
            count = 0
            for number, group in self._groups(keys).items():
                if self._members.is_own(number):
                    count += held.enter_context(self._members.own[number].pin(group))
            yield count

    def delete(self, keys: Sequence[bytes]) -> int:
        """See ``BlockSpace.delete``: from the stores that this process writes to. A copy in another process's store stays."""
        self._check_usable()
        for key in keys:
            check_key(key)
        own = self._members.own
        if len(own) == 1:
            return own[0].delete(keys)
        present: set[bytes] = set()
        for space in own:
            present.update(key for key, here in zip(keys, space.contains(keys), strict=True) if here)
        self._in_all_own(lambda space: space.delete(keys))
        return len(present)

    def drop(self) -> None:
        """See ``BlockSpace.drop``: in the stores that this process writes to."""
        self._check_usable()
        self._in_all_own(lambda space: space.drop())

    def _in_all_own(self, call: Callable[[BlockSpace], object]) -> None:
        """In every own store, also after one that cannot; its error is raised in the end."""
        errors: list[KvlodeError] = []
        for space in self._members.own:
            try:
                call(space)
            except KvlodeError as error:
                errors.append(error)
        if errors:
            raise errors[0]
