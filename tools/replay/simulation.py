"""A store of equal blocks, simulated: what a trace of requests hits, writes and gives up under the policies of the engine.

One log of segments: one is open, the others are sealed. A block that is used and absent is offered to the admission policy and
written once. When the open segment is full and the log has as many segments as it may have, the reclaim policy chooses a victim and
which of its blocks go forward; those come first in the new open segment. A use counts for the block and its ancestors, once a
request, as ``engine.heat`` does. The policies are the objects that a store asks; pins, quotas, deletes and lifetimes are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...engine.policies.interface import AdmissionPolicy, ReclaimPolicy
from ...format.errors import InvalidConfig
from .log import SimulatedLog
from .request import Request
from .tiers import Tiers, TierSize

SEGMENTS_MIN = 2
TIMELINE_STEP_S = 60.0
PROGRESS_REQUESTS = 256


@dataclass(slots=True)
class TimelineStep:
    """The blocks that were asked for in one step of the trace, and which of them hit, with all of their ancestors, where."""

    start_s: float
    asked_blocks: int = 0
    prefix_hit_blocks: int = 0
    tier_hit_blocks: int = 0
    """Of the prefix hits, those that a memory in front of the store served."""


@dataclass(frozen=True, slots=True)
class AfterRestart:
    """What was hit from a restart to the end of the trace."""

    restart_at_s: float
    asked_blocks: int
    prefix_hit_blocks: int
    prefix_hit_tokens: int
    store_hit_blocks: int
    """Of the prefix hits, those that the store served; the memories in front of it began empty."""

    @property
    def prefix_hit_ratio(self) -> float:
        return self.prefix_hit_blocks / max(1, self.asked_blocks)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run came to. Ratios are of all blocks that were asked for.

    A *prefix hit* is a hit whose ancestors hit in the same request.
    """

    block_hit_ratio: float
    prefix_hit_ratio: float
    write_amplification: float
    """Blocks written by blocks admitted (new ones); 1.0 where nothing was copied forward."""
    fresh_blocks: int
    """New blocks that were admitted, and so written once."""
    reinserted_blocks: int
    rejected_blocks: int
    """Times that a new block was not admitted."""
    unique_blocks: int
    capacity_blocks: int
    """What the log holds: the capacity that was asked for, rounded down to whole segments."""
    requests: int
    events: int
    """Blocks that were asked for, each time they were."""
    events_per_s: float
    input_tokens: int
    prefix_hit_tokens: int
    tier_hit_ratios: Mapping[str, float]
    """Prefix hits of the memories in front of the store, by name; the rest of ``prefix_hit_ratio`` came from the store."""
    eviction_age_s: Mapping[float, float]
    """Quantile -> seconds since a block that was given up had been put; empty when none was."""
    threshold: float | None
    """The reclaim policy's threshold at the end, where it has one."""
    policy_facts: Mapping[str, float]
    """What the reclaim policy goes by, at the end."""
    after_restart: AfterRestart | None
    timeline: Sequence[TimelineStep]

    @property
    def written_blocks(self) -> int:
        return self.fresh_blocks + self.reinserted_blocks

    @property
    def writes_per_offer(self) -> float:
        """Blocks written by new blocks offered, admitted or not: below ``write_amplification`` where admission leaves some out."""
        return self.written_blocks / max(1, self.fresh_blocks + self.rejected_blocks)


@dataclass(slots=True)
class _Sums:
    asked: int = 0
    block_hits: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    tokens: int = 0
    requests: int = 0
    tier_hits: list[int] = field(default_factory=list)


def simulate(
    requests: Iterable[Request],
    *,
    capacity_blocks: int,
    reclaim: ReclaimPolicy,
    admission: AdmissionPolicy,
    segments: int = 64,
    tiers: Sequence[TierSize] = (),
    restart_at: float | None = None,
    progress: Callable[[int], None] | None = None,
    block_tokens: int | None = None,
    block_bytes: int = 1,
    store_survives: bool = True,
) -> Outcome:
    """Play a trace. The same trace and new policy objects give the same outcome, but for ``events_per_s``.

    ``capacity_blocks``: of the log, 0 for no store at all. ``restart_at``: seconds of the trace; the tiers are emptied then, and the
    store too unless ``store_survives``. ``block_tokens``: of a full block; where it is not known, hit tokens are in proportion to hit
    blocks. ``block_bytes``: what policies are told of the size of a block. ``progress`` is told the requests that are done, every
    few hundred.

    Memory is proportional to the unique blocks. Raises ``InvalidConfig`` for sizes that cannot be used.
    """
    if capacity_blocks < 0 or 0 < capacity_blocks < segments or segments < SEGMENTS_MIN:
        raise InvalidConfig(
            "the simulated store has no room for its segments",
            expected=f"at least {SEGMENTS_MIN} segments and as many blocks as segments, or 0 blocks for no store",
            actual=f"capacity_blocks={capacity_blocks}, segments={segments}",
        )
    log = SimulatedLog(capacity_blocks // segments, segments, reclaim, admission, block_bytes)
    front = Tiers(tiers)
    run = _Run(log, front, block_tokens, restart_at, store_survives)
    began_s = time.perf_counter()
    for request in requests:
        run.play(request)
        if progress is not None and run.sums.requests % PROGRESS_REQUESTS == 0:
            progress(run.sums.requests)
    return run.outcome(time.perf_counter() - began_s)


class _Run:
    """The walk over the trace: looks up, counts, and hands what is missing to the log."""

    def __init__(self, log: SimulatedLog, front: Tiers, block_tokens: int | None, restart_at_s: float | None, store_survives: bool) -> None:
        self.log, self.front = log, front
        self.sums = _Sums(tier_hits=[0] * len(front.levels))
        self.timeline: list[TimelineStep] = []
        self._block_tokens = block_tokens
        self._restart_at_s = restart_at_s
        self._store_survives = store_survives
        self._before_restart: tuple[int, int, int, int] | None = None

    def play(self, request: Request) -> None:
        blocks, log, front, sums = request.blocks, self.log, self.front, self.sums
        if self._restart_at_s is not None and self._before_restart is None and request.time_s >= self._restart_at_s:
            self._restart()
        if blocks:
            log.make_place_for(max(blocks))
        if front.levels:
            levels = [front.find(block) for block in blocks]
            in_store = log.read(blocks, request.time_s, levels)
            found = [level >= 0 or stored for level, stored in zip(levels, in_store, strict=True)]
            front.use(blocks)
        else:
            levels, found = [], log.read(blocks, request.time_s, None)
        prefix = found.index(False) if False in found else len(found)
        for level in levels[:prefix]:
            if level >= 0:
                sums.tier_hits[level] += 1
        if prefix < len(blocks):
            log.write_missing(blocks, found, request.time_s, request.namespace)
        self._count(request, found, prefix, levels)

    def _count(self, request: Request, found: Sequence[bool], prefix: int, levels: Sequence[int]) -> None:
        sums, asked = self.sums, len(request.blocks)
        sums.requests += 1
        sums.asked += asked
        sums.block_hits += sum(found)
        sums.prefix_hits += prefix
        sums.tokens += request.input_tokens
        if self._block_tokens is not None:
            sums.prefix_tokens += min(prefix * self._block_tokens, request.input_tokens)
        elif asked:
            sums.prefix_tokens += request.input_tokens * prefix // asked
        start_s = request.time_s // TIMELINE_STEP_S * TIMELINE_STEP_S
        if not self.timeline or self.timeline[-1].start_s < start_s:
            self.timeline.append(TimelineStep(start_s))
        step = self.timeline[-1]
        step.asked_blocks += asked
        step.prefix_hit_blocks += prefix
        step.tier_hit_blocks += sum(level >= 0 for level in levels[:prefix])

    def _restart(self) -> None:
        sums = self.sums
        self._before_restart = sums.asked, sums.prefix_hits, sums.prefix_tokens, sum(sums.tier_hits)
        self.front.clear()
        if not self._store_survives:
            self.log.clear()

    def _after_restart(self) -> AfterRestart | None:
        if self._before_restart is None or self._restart_at_s is None:
            return None
        asked, hits, tokens, tier_hits = self._before_restart
        hits = self.sums.prefix_hits - hits
        return AfterRestart(
            self._restart_at_s,
            self.sums.asked - asked,
            hits,
            self.sums.prefix_tokens - tokens,
            hits - (sum(self.sums.tier_hits) - tier_hits),
        )

    def outcome(self, elapsed_s: float) -> Outcome:
        sums, log = self.sums, self.log
        asked = max(1, sums.asked)
        facts = log.reclaim.facts()
        return Outcome(
            block_hit_ratio=sums.block_hits / asked,
            prefix_hit_ratio=sums.prefix_hits / asked,
            write_amplification=1 + log.reinserted / max(1, log.fresh),
            fresh_blocks=log.fresh,
            reinserted_blocks=log.reinserted,
            rejected_blocks=log.rejected,
            unique_blocks=log.unique_blocks(),
            capacity_blocks=log.segments * log.segment_blocks,
            requests=sums.requests,
            events=sums.asked,
            events_per_s=sums.asked / max(elapsed_s, 1e-9),
            input_tokens=sums.tokens,
            prefix_hit_tokens=sums.prefix_tokens,
            tier_hit_ratios={level.name: hits / asked for level, hits in zip(self.front.levels, sums.tier_hits, strict=True)},
            eviction_age_s=log.ages.quantiles(),
            threshold=facts.get("threshold"),
            policy_facts=facts,
            after_restart=self._after_restart(),
            timeline=self.timeline,
        )
