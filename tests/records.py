"""Keys, ledgers and cohorts of hospitals that do not exist."""

from collections.abc import Callable, Iterable
from pathlib import Path

from fedmed.errors import PolicyRefused
from fedmed.privacy.cohort import Cohort, cohort_of
from fedmed.privacy.keys import SiteKeys, make_keys, read_keys
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.policy import PrivacyRules, SitePolicy
from fedmed.types import PrivacyEvent

RUN = "study"


def keys_in(folder: Path) -> SiteKeys:
    return read_keys(folder / "keys") if (folder / "keys").exists() else make_keys(folder / "keys")


def rules(**privacy: object) -> SitePolicy:
    return SitePolicy(privacy=PrivacyRules(**privacy))


def opened(folder: Path, **privacy: object) -> Ledger:
    return Ledger.open(folder / "ledger", keys=keys_in(folder), policy=rules(**privacy))


def patients(numbers: Iterable[int], *, ids: str = "p", pixels: str = "x") -> dict[str, list[bytes]]:
    """Two pictures for each of these people, under ids of one export."""
    return {f"{ids}-{number}": [f"{pixels}-{number}-{k}".encode() for k in range(2)] for number in numbers}


def cohort(keys: SiteKeys, numbers: Iterable[int] = range(40), **names: str) -> Cohort:
    return cohort_of(patients(numbers, **names), keys)


def step(sigma: float = 1.0, rate: float = 0.02, steps: int = 50, **facts: object) -> PrivacyEvent:
    return PrivacyEvent(
        mechanism="sampled-gaussian" if rate < 1 else "gaussian",
        noise_multiplier=sigma,
        sample_rate=rate,
        steps=steps,
        **facts,
    )


def until_refused(ask: Callable[[int], object]) -> tuple[int, PolicyRefused]:
    """How often something is allowed before it is refused, and the refusal."""
    for number in range(100):
        try:
            ask(number)
        except PolicyRefused as refused:
            return number, refused
    raise AssertionError("it was never refused")
