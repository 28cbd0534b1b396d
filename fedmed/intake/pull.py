"""From an archive to a folder of de-identified images, series by series; killed and started again, it goes on.

Objects are kept as they arrive (`keep`), and a line of a journal says so under keyed names. A series whose last line is
there is not asked for again; of one that was broken off, only the objects that are missing are. An object that cannot
be read may have been torn on its way, so every pull asks for it once more.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedmed.durable import make_private
from fedmed.errors import DataError
from fedmed.intake.archive import ATTEMPTS, Archive, Interrupted, Unsent, Withheld
from fedmed.intake.journal import objects, open_journal, write_table
from fedmed.intake.keep import APART, RELEASED, REMOVED, where_now, write_reasons
from fedmed.intake.one_series import Pace, bring_series
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.query import Query
from fedmed.intake.same_keys import made_with, note_keys
from fedmed.intake.search import search
from fedmed.types import OnProgress

MISSING = "not-found.csv"
LOST_AFTER = 3  # series in a row, until an archive is taken as gone


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What a folder holds now."""

    studies: int
    images: int
    quarantined: Counter[str]  # objects by reason
    left_out: Counter[str]  # objects that are no images, by what they are
    unreadable: int  # objects that could not be parsed
    removed: int  # objects that were kept, and that a person deleted; they do not come again
    why: Counter[str]  # series that the archive did not give in full, by reason; pulling again asks for what is missing
    listed: str = ""  # how much of a list was found, in words

    @property
    def failed(self) -> int:
        """Series that the archive did not give in full."""
        return self.why.total()

    def __str__(self) -> str:
        """One line."""
        parts = [self.listed] if self.listed else []
        parts += [f"{self.studies} stud{'y' if self.studies == 1 else 'ies'}"]
        parts += [f"{self.images} image{'' if self.images == 1 else 's'}"]
        apart = ", ".join(f"{count} × {reason}" for reason, count in self.quarantined.most_common())
        parts.append(f"{self.quarantined.total()} quarantined{f' ({apart})' if apart else ''}")
        parts += [f"{self.left_out.total()} that are no images"] if self.left_out else []
        parts += [f"{self.unreadable} unreadable"] if self.unreadable else []
        parts += [f"{self.removed} removed by hand"] if self.removed else []
        return ", ".join([*parts, f"{self.failed} series failed"])


def pull(
    archive: Archive,
    query: Query,
    folder: Path,
    pseudonyms: Pseudonyms,
    *,
    megabytes_per_s: float = 0.0,
    wait_s: float = 1.0,
    progress: OnProgress | None = None,
    searching: Callable[[int], None] | None = None,
) -> Pulled:
    """Pull what meets a query into `folder/images` and `folder/quarantine`, and write `folder/pulled.csv`.

    Args:
        archive: to ask.
        query: what is wanted.
        folder: made if it is not there; one that an earlier pull left is completed.
        pseudonyms: of the site.
        megabytes_per_s: of pixels, on average at most; 0 = as fast as the archive gives them.
        wait_s: the first wait before an interrupted archive is asked again, seconds.
        progress: called with series done, and all.
        searching: before that, called with series found so far.

    Raises:
        DataError: the archive refuses or is gone, nothing meets the query, or the folder cannot be written or was
            filled with other keys.
    """
    made_with(pseudonyms, folder)  # before a search that may take long
    wanted, missing = search(archive, query, wait_s, searching or (lambda found: None))
    listed = _listed(query, missing)
    if not wanted:
        raise DataError(f"nothing in the archive meets the query{f' ({listed})' if listed else ''}")
    make_private(folder)
    note_keys(pseudonyms, folder)
    if listed:
        _write_missing(folder / MISSING, "accession" if query.accessions else "patient", missing)
    pace = Pace(megabytes_per_s)
    with open_journal(folder) as journal:
        why: Counter[str] = Counter()
        unsent, unanswered = 0, 0  # in a row
        for number, series in enumerate(wanted, 1):
            try:
                attempts = ATTEMPTS if unsent < LOST_AFTER else 1  # what it cannot send, it will not in a minute
                bring_series(archive, series, folder, pseudonyms, journal, pace, wait_s=wait_s, attempts=attempts)
                unsent = unanswered = 0
            except Unsent as error:
                why[str(error)] += 1
                unsent, unanswered = unsent + (not isinstance(error, Withheld)), 0
            except Interrupted as error:
                why[str(error)] += 1
                unanswered += 1
                if unanswered == min(LOST_AFTER, len(wanted)):
                    write_table(folder)
                    raise DataError(f"{error}; what came so far is kept, the same command goes on from there") from None
            if progress:
                progress(number, len(wanted))
        write_table(folder)
        write_reasons(folder)
        return replace(_counted(folder, why), listed=listed)


def _listed(query: Query, missing: list[str]) -> str:
    """How much of a list was found; "" where there is none."""
    many = len(query.accessions) + len(query.patients)
    what = "accessions" if query.accessions else "patients"
    others = f" (the others: {MISSING})" if missing else ""
    return f"{many - len(missing)} of {many} {what} found{others}" if many else ""


def _write_missing(path: Path, column: str, missing: list[str]) -> None:
    """What of a list was not found, in the hospital's own numbers and for the owner alone; no file if all was."""
    path.unlink(missing_ok=True)
    if missing:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([[column], *([value] for value in missing)])


def _counted(folder: Path, why: Counter[str]) -> Pulled:
    studies: set[str] = set()
    counts: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for line in objects(folder):
        studies |= {line["study_uid"]} - {""} if "study_uid" in line else set()
        if line.get("unreadable"):
            counts["unreadable"] += 1
        elif not line["image"]:  # never written
            left_out[line["reason"]] += 1
        elif (now := where_now(folder, line["image"])) == APART:
            quarantined[line["reason"]] += 1
        else:
            counts[now] += 1
    return Pulled(
        studies=len(studies),
        images=counts[RELEASED],
        quarantined=quarantined,
        left_out=left_out,
        unreadable=counts["unreadable"],
        removed=counts[REMOVED],
        why=why,
    )
