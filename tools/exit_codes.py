"""Exit codes of the command: a sum of these bits, the same for every command that looks at a store."""

from __future__ import annotations

EXIT_FINE = 0
EXIT_DAMAGE = 4
"""Problems are left: damage was found, index and segments differ, or (``doctor``) something stands in the way of a store."""
EXIT_FAILED = 8
"""The request was right and could not be carried out: locked, not permitted, out of space, an I/O error."""
EXIT_USAGE = 16
"""The request cannot work: a wrong path, a folder that is no store, an option out of its range."""
EXIT_INTERRUPTED = 32
