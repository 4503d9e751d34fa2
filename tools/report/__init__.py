"""``kvlode report``: one page about a store for people who would rather look. Collect, advise, draw, write."""
