"""``kvlode bench``: this machine's store against this machine's drive and memory, in the same run."""

from .run import ITEMS, run_bench

__all__ = ["ITEMS", "run_bench"]
