"""Putting to a store set: which store gets a block, and what happens when it refuses.

Blocks are spread over the own stores by their keys. A block that another store is known to have is not written again; of the stores
that are followed only their memory is asked, so that a put waits for nobody's drive: a block may be stored twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..format.errors import InvalidConfig, KvlodeError
from ..format.keys import check_key, check_meta, tag_digest
from .blocks import view_block
from .contract import Block, PutJob, PutStatus, Refusal, Status
from .jobs import EXISTS, refused
from .set_jobs import SetWriteJob
from .set_members import Members

logger = logging.getLogger("kvlode")

MOVABLE = (Refusal.STORE_FAILED, Refusal.NO_SPACE, Refusal.READ_ONLY)
"""A block that a store refuses for one of these is offered to the next own store. A full buffer is not one: it asks for less."""


@dataclass(frozen=True, slots=True)
class Puts:
    """The arguments of ``submit_put``."""

    keys: Sequence[bytes]
    blocks: Sequence[Block]
    parent: bytes | None = None
    ttl: float | None = None
    tag: str | bytes | None = None
    metas: Sequence[bytes] | None = None
    own: Literal["copy", "borrow"] = "copy"
    chained: bool = True

    def check(self, members: Members) -> None:
        """What the stores would check, for all blocks before any store has one of them."""
        for name, others in (("blocks", self.blocks), ("metas", self.metas)):
            if others is not None and len(others) != len(self.keys):
                raise InvalidConfig(f"keys and {name} differ in number", expected=len(self.keys), actual=len(others))
        if self.own not in ("copy", "borrow"):
            raise InvalidConfig("own is unknown", expected="'copy' or 'borrow'", actual=repr(self.own))
        descriptor = members.descriptor
        for key, block in zip(self.keys, self.blocks, strict=True):
            check_key(key)
            view_block(block, writable=False, dtype=descriptor.dtype, bytes_max=descriptor.block_bytes_max)
        for meta in self.metas or ():
            check_meta(meta)
        tag_digest(self.tag)
        if self.parent is not None:
            check_key(self.parent)
        if self.ttl is not None and not (self.ttl > 0 and math.isfinite(self.ttl)):
            raise InvalidConfig("ttl cannot be used", expected="a positive number of seconds, or None", actual=self.ttl)

    def part(self, positions: Sequence[int]) -> dict[str, Any]:
        """The arguments for some of the blocks, which follow one another where they are chained."""
        first = positions[0]
        return {
            "keys": [self.keys[p] for p in positions],
            "blocks": [self.blocks[p] for p in positions],
            "parent": self.keys[first - 1] if self.chained and first > 0 else self.parent,
            "ttl": self.ttl,
            "tag": self.tag,
            "metas": None if self.metas is None else [self.metas[p] for p in positions],
            "own": self.own,
            "chained": self.chained,
        }


def put(members: Members, puts: Puts) -> PutStatus:
    """Put the one block of ``puts``."""
    if not members.alone:
        puts.check(members)
        if held_elsewhere(members, puts.keys)[0]:
            return EXISTS
    options = {"parent": puts.parent, "ttl": puts.ttl, "tag": puts.tag, "meta": (puts.metas or [b""])[0]}
    status = refused(Refusal.STORE_FAILED)
    for number in members.own_route(puts.keys[0]):
        status = members.own[number].put(puts.keys[0], puts.blocks[0], **options)  # type: ignore[arg-type]
        if status.reason not in MOVABLE:
            break
        members.set.avoid(number)
    return status


def submit_put(members: Members, puts: Puts, queue: Any | None) -> PutJob:
    """See ``BlockSpace.submit_put``."""
    elsewhere = [False] * len(puts.keys)
    if not members.alone:
        puts.check(members)
        elsewhere = held_elsewhere(members, puts.keys)
    if len(members.own) == 1 and True not in elsewhere:
        everything = {"parent": puts.parent, "ttl": puts.ttl, "tag": puts.tag, "metas": puts.metas}
        return members.own[0].submit_put(puts.keys, puts.blocks, own=puts.own, chained=puts.chained, queue=queue, **everything)  # type: ignore[arg-type]
    job = SetWriteJob(len(puts.keys), queue)
    for position, held in enumerate(elsewhere):
        if held:
            job.decide(position, EXISTS)
    routes = [members.own_route(key) for key in puts.keys]
    waiting = [position for position, held in enumerate(elsewhere) if not held]
    for turn in range(len(members.own)):
        moved: list[int] = []
        for number, positions in _runs(waiting, [routes[p][turn] for p in waiting], chained=puts.chained):
            moved += _put_part(members, job, number, puts, positions)
        waiting = sorted(moved)
    job.complete()
    return job


def _runs(positions: Sequence[int], numbers: Sequence[int], *, chained: bool) -> list[tuple[int, list[int]]]:
    """What goes to which store: for chained blocks in runs of neighbours, as only the first of a put can be told its parent."""
    runs: list[tuple[int, list[int]]] = []
    if not chained:
        for number in sorted(set(numbers)):
            runs.append((number, [p for p, goes_to in zip(positions, numbers, strict=True) if goes_to == number]))
        return runs
    for position, number in zip(positions, numbers, strict=True):
        if runs and runs[-1][0] == number and runs[-1][1][-1] == position - 1:
            runs[-1][1].append(position)
        else:
            runs.append((number, [position]))
    return runs


def _put_part(members: Members, job: SetWriteJob, number: int, puts: Puts, positions: list[int]) -> list[int]:
    """Put some blocks to one store; those that have to be offered to the next one."""
    job.begin_part()
    try:
        part = members.own[number].submit_put(queue=job.ending, **puts.part(positions))
    except KvlodeError as error:  # the arguments are right: the store itself is in trouble
        logger.warning("%d blocks are not stored: %s", len(positions), error)
        for position in positions:
            job.decide(position, refused(Refusal.STORE_FAILED))
        job.complete()
        return positions
    job.add(positions, part)
    moved = [position for position, status in zip(positions, part.statuses, strict=True) if status.reason in MOVABLE]
    if moved:
        members.set.avoid(number)
    return moved


def held_elsewhere(members: Members, keys: Sequence[bytes]) -> list[bool]:
    """Which blocks another store has than the one that would get them, as far as is known; there they are touched."""
    held = [False] * len(keys)
    first = [members.own_route(key)[0] for key in keys]
    for number in members.numbers:
        asked = [p for p in range(len(keys)) if not held[p] and first[p] != number]
        if not asked:
            continue
        names = [keys[p] for p in asked]
        if members.is_own(number):
            found = members.contains(number, names)
        else:
            found = [status is Status.HIT for status in members.lookup_nowait(number, names)]
        here = [position for position, present in zip(asked, found, strict=True) if present]
        for position in here:
            held[position] = True
        if here:
            members.touch(number, [keys[p] for p in here])
    return held
