"""What is wrong with one line of a trace."""

from __future__ import annotations


class LineError(ValueError):
    """This line cannot be used; the message says why in a few words."""
