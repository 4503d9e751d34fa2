"""``kvlode scrub``: the check of ``fsck --full``, segment by segment, beside a running writer. Reads with ``format`` and ``gds`` alone."""
