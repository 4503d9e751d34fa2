"""Consent to a repair: the plan is shown before anything is touched; a terminal is asked, a script has to say ``--yes``."""

from __future__ import annotations

from collections.abc import Callable

from ...format.errors import InvalidConfig
from .plan import Plan


def check_consent_possible(*, yes: bool, interactive: bool) -> None:
    """Raises ``InvalidConfig`` where a repair is asked for and nobody could agree to its plan: before anything is read."""
    if not yes and not interactive:
        raise InvalidConfig(
            "a repair without a terminal needs consent",
            expected="--yes, or a terminal to ask on",
            actual="neither",
            action="Look at the plan in a terminal first, or add --yes.",
        )


def agrees(plan: Plan, *, yes: bool, show: Callable[[str], None], ask: Callable[[str], str]) -> bool:
    """Show the plan; whether it may be carried out. ``ask`` prints a question and returns a line, or raises ``EOFError``."""
    show(plan.text)
    if not plan.actions:
        return False
    if yes:
        return True
    try:
        return ask("Carry this out? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
