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


def hospital_table(hospitals: Sequence[Hospital], labels: Sequence[str], width: int) -> Table:
    """Patients and images of every hospital, and per label the share of its images that is positive.

    Args:
        hospitals: all of them.
        labels: of a classification.
        width: of the terminal, in characters; shares are bars if they fit, else words.
    """
    shown = hospitals[:MOST]
    counted = bool(hospitals and hospitals[0].positives)
    most = max((hospital.images for hospital in hospitals), default=1)
    shares = [[count / max(hospital.images, 1) for count in hospital.positives] for hospital in shown]
    columns = max((len(each.name) for each in shown), default=0) + len(" patients ") + WIDTH + 16
    bars = not counted or columns + sum(max(len(label), WIDTH + 6) + 3 for label in labels) <= width
    table = Table("site", "patients", "images", *((labels if bars else ("positive, %",)) if counted else ()))
    for hospital, each in zip(shown, shares, strict=True):
        if bars:
            cells = [f"{100 * share:3.0f} % {bar_of(share)}" for share in each]
        else:
            cells = [", ".join(f"{label} {100 * share:.0f}" for label, share in zip(labels, each, strict=True))]
        images = f"{hospital.images:>6} {bar_of(hospital.images / most)}"
        table.add_row(hospital.name, str(hospital.patients), images, *(cells if counted else ()))
    if len(hospitals) > MOST:
        rest = hospitals[MOST:]
        table.add_row(f"and {len(rest)} more", str(sum(h.patients for h in rest)), str(sum(h.images for h in rest)))
    for column in table.columns[: None if bars else 3]:
        column.no_wrap = True
    return table


def bar_of(share: float, width: int = WIDTH) -> str:
    """A share in [0, 1] as a bar of text, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[part] if part else "")).ljust(width)
