"""S3-FIFO, as far as one log can be it: new blocks have to prove themselves soon, or leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...format.errors import InvalidConfig
from .fifo import SegmentFifo
from .interface import Candidate, SegmentFacts
from .reinsertion import WRITE_AMPLIFICATION_MAX
from .write_allowance import WriteAllowance, closed_choice

SMALL_SHARE = 0.1


class SegmentS3Fifo(SegmentFifo):
    """Segments of mostly new blocks are the small queue, the others the main queue. While the small ones take more than ``small_share``
    of the log the oldest of them goes, else the oldest main one. What was used since it was written last goes forward.

    After Yang and others: FIFO Queues are All You Need for Cache Eviction, SOSP '23. What differs, because one log has one open segment:

    - Blocks that go forward share a segment with new ones. While few go forward nearly all segments are small, and this is FIFO with a
      threshold of one use.
    - The paper's main queue puts a used block back until its count is 0; here its uses are halved each time, as everywhere.
    - A block that returns after it left the small queue goes to the main one in the paper. Here it is new; the admission policy
      ``second-sighting`` is what remembers it.
    - Write amplification has a maximum, which raises the threshold of a victim.
    """

    name = "s3-fifo"

    def __init__(self, small_share: float = SMALL_SHARE, write_amplification_max: float = WRITE_AMPLIFICATION_MAX) -> None:
        if not 0 < small_share < 1:
            raise InvalidConfig("small_share cannot be used", expected="above 0, below 1", actual=small_share)
        self._small_share = small_share
        self._allowance = WriteAllowance(write_amplification_max)

    def victim(self, segments: Sequence[SegmentFacts]) -> int:
        small = [position for position, segment in enumerate(segments) if 2 * segment.fresh_bytes > segment.size_bytes]
        small_bytes = sum(segments[position].size_bytes for position in small)
        if len(small) == len(segments) or (small and small_bytes > self._small_share * sum(s.size_bytes for s in segments)):
            return small[0]
        return min(set(range(len(segments))) - set(small))

    def choose(self, candidates: Sequence[Candidate], segment_bytes: int) -> list[Candidate]:
        bytes_max = self._allowance.earn(segment_bytes)
        kept, _ = closed_choice(candidates, lambda candidate: candidate.hits, 1, bytes_max)
        self._allowance.spend(sum(candidate.stored_bytes for candidate in kept))
        return kept

    def facts(self) -> Mapping[str, float]:
        return {"threshold": 1.0}
