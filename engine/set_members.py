"""One namespace in every store of a store set: who may have a block, and what each says of it.

Stores are numbered: first those that this process writes to, then those that it follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..format.errors import StoreClosed
from ..format.namespace import Namespace
from .contract import BlockInfo, BlockSpace, LoadEstimate, Status

if TYPE_CHECKING:
    from .store_set import StoreSet

logger = logging.getLogger("kvlode")
T = TypeVar("T")
NOTHING = LoadEstimate(0, 0, 0.0)


class Members:
    """See the module. Thread-safe. A store that is lost, or is being lost, answers that it has nothing."""

    def __init__(self, owner: StoreSet, descriptor: Namespace, own: Sequence[BlockSpace]) -> None:
        self.set = owner
        self.places = owner.places
        self.own = list(own)
        self.descriptor = descriptor
        self.digest = descriptor.digest

    @property
    def alone(self) -> bool:
        """There is one store: nothing has to be shared out."""
        return len(self.own) == 1 and not self.set.followed

    @property
    def numbers(self) -> range:
        return range(len(self.own) + len(self.set.followed))

    def is_own(self, number: int) -> bool:
        return number < len(self.own)

    def own_route(self, key: bytes) -> list[int]:
        """The own stores in the order in which a block is offered to them."""
        return self.set.own_route(self.digest + key)

    def route(self, key: bytes) -> list[int]:
        """The stores that a block is looked for in, one after the other."""
        ident = self.digest + key
        route = [*self.own_route(key), *self.numbers[len(self.own) :]]
        seen = self.places.where(ident)
        if seen is not None and seen in route:
            route.remove(seen)
            route.insert(0, seen)
        return [number for number in route if not self.places.distrusted(number, ident)]

    def found(self, number: int, keys: Sequence[bytes]) -> None:
        """These keys were found in a store: remember those that would have been looked for elsewhere first."""
        if number == 0 and len(self.own) == 1:
            return
        self.places.note(number, [self.digest + key for key in keys])

    def failed(self, number: int, key: bytes, status: Status) -> None:
        """A store did not deliver a block. A damaged copy is dropped by its own process in time; until then it is not asked for again."""
        ident = self.digest + key
        if self.places.where(ident) == number:
            self.places.forget(ident)
        if status is Status.CORRUPT and not self.is_own(number):
            self.places.distrust(number, ident)

    def space(self, number: int) -> BlockSpace | None:
        """The namespace in one of the stores; ``None`` while the store is lost."""
        own = len(self.own)
        return self.own[number] if number < own else self.set.followed[number - own].space(self.descriptor)

    def ask(self, number: int, call: Callable[[BlockSpace], T], otherwise: T) -> T:
        """What a store says; ``otherwise`` when it is lost. Errors of this process's own stores are raised."""
        if self.is_own(number):
            return call(self.own[number])
        space = self.space(number)
        if space is None:
            return otherwise
        try:
            return call(space)
        except StoreClosed:  # being lost, or opened anew
            return otherwise
        except Exception as error:  # somebody else's store: whatever is wrong with it, its blocks are misses
            logger.debug("store %d of the set does not answer: %s", number, error)
            self.set.followed[number - len(self.own)].suspect(error)
            return otherwise

    def contains(self, number: int, keys: Sequence[bytes]) -> list[bool]:
        if not keys:
            return []
        present = self.ask(number, lambda space: space.contains(keys), [False] * len(keys))
        if not self.places.distrusting:
            return present
        return [here and not self.places.distrusted(number, self.digest + key) for key, here in zip(keys, present, strict=True)]

    def lookup_nowait(self, number: int, keys: Sequence[bytes]) -> list[Status]:
        statuses = self.ask(number, lambda space: space.lookup_nowait(keys), [Status.MISS] * len(keys))
        if not self.places.distrusting:
            return statuses
        pairs = zip(keys, statuses, strict=True)
        return [Status.MISS if self.places.distrusted(number, self.digest + key) else status for key, status in pairs]

    def info(self, number: int, keys: Sequence[bytes]) -> list[BlockInfo | None]:
        return self.ask(number, lambda space: space.info(keys), [None] * len(keys))

    def estimate(self, number: int, keys: Sequence[bytes]) -> LoadEstimate:
        return self.ask(number, lambda space: space.estimate(keys), NOTHING)

    def touch(self, number: int, keys: Sequence[bytes]) -> None:
        self.ask(number, lambda space: space.touch(keys), None)

    def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """The first store that has each key."""
        where: list[int | None] = [None] * len(keys)
        for number in self.numbers:
            asked = [position for position, known in enumerate(where) if known is None]
            present = self.contains(number, [keys[position] for position in asked])
            here = [position for position, present_here in zip(asked, present, strict=True) if present_here]
            for position in here:
                where[position] = number
            if here:
                self.found(number, [keys[position] for position in here])
        return where
