"""The stores that are compared, each behind ``base.Store``, and what runs in the environment that has it: ``server`` and ``steps``."""
