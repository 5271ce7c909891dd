"""What the paper claims, beside what was measured."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Claim(NamedTuple):
    """A sentence, the numbers that speak for or against it, and whether it holds."""

    sentence: str
    measured: str
    holds: bool


class ClaimError(AssertionError):
    """A claim of the paper that does not hold in what was measured; the message says which, and the numbers."""


def check(claims: list[Claim]) -> None:
    """Print the claims. Raises ClaimError where one does not hold."""
    table = Table("", "claim", "measured")
    for claim in claims:
        table.add_row("[green]✓[/]" if claim.holds else "[red]✗[/]", claim.sentence, claim.measured)
    Console().print(table)
    failed = [f"{claim.sentence}: {claim.measured}" for claim in claims if not claim.holds]
    if failed:
        raise ClaimError("not so in this run: " + "; ".join(failed))
