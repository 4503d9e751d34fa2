"""``kvlode inspect``: looking into a store without changing it, one module a view."""
