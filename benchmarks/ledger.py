"""Time a hospital's ledger: what reserving and settling one round costs, and opening it again.

    .venv/bin/python benchmarks/ledger.py               # some seconds; run nothing beside it

The bar is 20 ms a round for both together. Most of it is waiting for the disk: two records, each written twice.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from fedmed.privacy.cohort import cohort_of
from fedmed.privacy.keys import make_keys
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.policy import PrivacyRules, SitePolicy
from fedmed.types import PrivacyEvent


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # not in memory, as /tmp may be
        folder = Path(name)
        keys, policy = make_keys(folder / "keys"), SitePolicy(privacy=PrivacyRules(epsilon=1e3))
        cohort = cohort_of({str(n): [f"{n}/{k}".encode() for k in range(4)] for n in range(options.patients)}, keys)
        event = PrivacyEvent(mechanism="sampled-gaussian", noise_multiplier=1.0, sample_rate=0.02, steps=50)
        ledger = Ledger.open(folder / "ledger", keys=keys, policy=policy)

        def one_round(round: int) -> None:
            ledger.settle(ledger.reserve("benchmark", round, [event], cohort), [event])

        one_round(0)  # makes the cohort known and computes the curve
        times = [timed(lambda round=round: one_round(round)) for round in range(1, options.rounds + 1)]
        opening = timed(lambda: Ledger.open(folder / "ledger", keys=keys, policy=policy))
        records = ledger.head.sequence
    print(f"`python benchmarks/ledger.py`, {options.patients} patients, {options.rounds} rounds\n")
    print("| what | wall, ms | CPU, ms |\n|---|---|---|")
    for what, pairs in (("reserve + settle, median round", times), (f"open {records} records", [opening])):
        print(f"| {what} | {1e3 * median(p[0] for p in pairs):.1f} | {1e3 * median(p[1] for p in pairs):.1f} |")


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
