"""How the rounds of one run are charged to a site's ledger: the schedule at once, a mark for every round, then more.

The whole schedule of a run is decided before its first round, so it is reserved at once and may be composed
numerically. Every round then leaves a mark in the ledger, a reservation of nothing. A round that is trained again,
because a process was killed or an answer was lost, is a release of its own; when the schedule is used up, every further
round is charged by itself, and the ledger may refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedmed.config import run_identity
from fedmed.privacy.balance import Charge
from fedmed.privacy.cohort import Cohort
from fedmed.privacy.ledger import Ledger, Reservation
from fedmed.types import PrivacyEvent

SCHEDULE = 0  # the round under which a schedule is reserved


def run_of(name: str, settings: str) -> str:
    """Which run this is to a ledger, however often it is resumed: its name, and what it was begun with."""
    return f"{name}-{run_identity(settings)[:12]}"


def charges_of(ledger: Ledger, run: str) -> Mapping[int, Charge]:
    """What a run has reserved so far, whichever process did so."""
    return {number: charge for number, charge in ledger.charges.items() if charge.run == run}


def reserve_round(
    ledger: Ledger, run: str, round: int, releases: Sequence[PrivacyEvent], cohort: Cohort, *, rounds: int
) -> Reservation:
    """Charge the whole schedule before the first round, mark every round, and charge what goes beyond the schedule.

    A mark is written before rounds are counted, so that two processes can never share the last round of a plan.
    Patients who change in the midst of a run, or other releases, have a schedule of their own.

    Args:
        ledger: of the site.
        run: from `run_of`.
        round: about to begin.
        releases: what one round releases.
        cohort: whom it touches.
        rounds: of the whole run.

    Returns:
        The round's mark.

    Raises:
        BudgetExhausted, PolicyRefused, LedgerUnusable: as `Ledger.reserve`.
    """
    if not (planned := _planned(ledger, run, releases[0], cohort)):
        planned = rounds - round + 1  # a site may join late, or come back with other patients
        ledger.reserve(run, SCHEDULE, _repeated(releases, planned), cohort)
    mark = ledger.reserve(run, round, [], cohort)
    used = sum(
        not charge.events and charge.cohort == cohort.name and number <= mark.sequence
        for number, charge in charges_of(ledger, run).items()
    )
    planned = _planned(ledger, run, releases[0], cohort)  # another process may have reserved as well
    if used > planned:
        ledger.reserve(run, SCHEDULE, _repeated(releases, used - planned), cohort)
    return mark


def _planned(ledger: Ledger, run: str, release: PrivacyEvent, cohort: Cohort) -> int:
    """For how many rounds this run has reserved such a release for these patients."""
    events = [event for charge in charges_of(ledger, run).values() for event in charge.events]
    alike = [event for event in events if event == replace(release, steps=event.steps, cohort=cohort.name)]
    return sum(event.steps for event in alike) // release.steps


def _repeated(releases: Sequence[PrivacyEvent], rounds: int) -> list[PrivacyEvent]:
    return [replace(release, steps=rounds * release.steps) for release in releases]
