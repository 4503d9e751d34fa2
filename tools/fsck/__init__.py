"""``kvlode fsck``: an offline check of a store's files, and their repair. Reads with ``format`` and ``gds`` alone."""
