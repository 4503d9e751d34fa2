"""Consent to a repair: the plan is shown before anything is touched; a terminal is asked, a script has to say ``--yes``."""

from __future__ import annotations

from collections.abc import Callable

from ...format.errors import InvalidConfig
from .plan import Plan


def agrees(plan: Plan, *, yes: bool, show: Callable[[str], None], ask: Callable[[str], str] | None) -> bool:
    """Show the plan; whether it may be carried out.

    ``ask`` prints a question and returns a line, or raises ``EOFError``; ``None`` where nobody can be asked: ``InvalidConfig``
    without ``yes``, whatever the plan is, so that a script that lacks it fails before the day on which something is damaged.
    """
    show(plan.text)
    if ask is None and not yes:
        raise InvalidConfig(
            "a repair without a terminal needs consent, so nothing was touched",
            expected="--yes, or a terminal to ask on",
            actual="neither",
            action="Look at the plan above, then add --yes to carry it out.",
        )
    if not plan.actions:
        return False
    if yes or ask is None:
        return True
    try:
        return ask("Carry this out? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
