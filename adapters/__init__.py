"""Adapters: one module an engine, each importing its engine lazily, all on the layer that ``attached``, ``transfers`` and ``identity`` are.

No adapter raises into its engine, and none waits without a deadline: what fails is a miss.
"""
