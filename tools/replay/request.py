"""One request of a trace, as the simulation takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Request:
    """A prompt that an inference engine was given."""

    time_s: float
    """Since the start of the trace; never before that of the request before it."""
    blocks: Sequence[int]
    """The blocks of the prompt, head to tail. Ids are dense from 0, and an id implies its whole prefix: the parent of ``blocks[i]`` is
    ``blocks[i - 1]``, in every request."""
    input_tokens: int
    output_tokens: int
    namespace: int = 0
    """Which model, or tenant, it was for. A block belongs to one of them."""
