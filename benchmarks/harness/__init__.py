"""The parent's side of the comparison: which stores, in which environments, in which order, and what may be said of the figures."""
