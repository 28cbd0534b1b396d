"""The virtual hospitals of a run before it starts: a table, and a bar for every label at every hospital."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from fedmed.federated.virtual_hospitals import Hospital

WIDTH = 12  # characters of a full bar
EIGHTHS = " ▏▎▍▌▋▊▉█"
MOST = 40  # hospitals that are listed one by one


def hospital_table(hospitals: Sequence[Hospital], labels: Sequence[str]) -> Table:
    """Patients and images of every hospital, and per label the share of its images that is positive, as a bar."""
    counted = bool(hospitals and hospitals[0].positives)
    table = Table("site", "patients", "images", *(labels if counted else ()))
    most = max((hospital.images for hospital in hospitals), default=1)
    for hospital in hospitals[:MOST]:
        shares = [count / max(hospital.images, 1) for count in hospital.positives]
        table.add_row(
            hospital.name,
            str(hospital.patients),
            f"{hospital.images:>6} {bar_of(hospital.images / most)}",
            *(f"{bar_of(share)} {100 * share:3.0f} %" for share in shares),
        )
    if len(hospitals) > MOST:
        rest = hospitals[MOST:]
        table.add_row(f"and {len(rest)} more", str(sum(h.patients for h in rest)), str(sum(h.images for h in rest)))
    return table


def bar_of(share: float, width: int = WIDTH) -> str:
    """A share in [0, 1] as a bar of text, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[part] if part else "")).ljust(width)
