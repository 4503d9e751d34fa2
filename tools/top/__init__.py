"""``kvlode top``: a live view of a store that another process has open. One sample, then pure steps: sample, view, drawing."""
