"""One series on its way from an archive into a folder: what is here, what came torn, and what is still missing."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pydicom.dataset import Dataset

from fedmed.errors import UnreadableImage
from fedmed.intake.archive import Archive, Interrupted, Unsent, Withheld, patiently
from fedmed.intake.journal import Journal
from fedmed.intake.keep import keep
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.query import Series

LOST_AFTER = 3  # objects that do not come, of none that did, until all of a series is taken as lost


class Pace:
    """Waits so that bytes come at no more than a rate on average."""

    def __init__(self, megabytes_per_s: float) -> None:
        """Nothing has come yet; 0 = as fast as they come."""
        self._rate = megabytes_per_s * 1e6
        self._free = time.monotonic()

    def __call__(self, size: int) -> None:
        """Wait after bytes that came."""
        if self._rate:
            now = time.monotonic()
            self._free = max(self._free, now) + size / self._rate
            time.sleep(self._free - now)


def bring_series(
    archive: Archive,
    series: Series,
    folder: Path,
    pseudonyms: Pseudonyms,
    journal: Journal,
    pace: Pace,
    *,
    wait_s: float,
    attempts: int,
) -> None:
    """Ask for a series until all of it is here, or known to be unreadable; not at all if an earlier pull brought it.

    Args:
        archive: to ask.
        series: that is wanted.
        folder: of the pull.
        pseudonyms: of the site.
        journal: of the folder.
        pace: told of the bytes of pixels that came.
        wait_s: the first wait before an interrupted archive is asked again, seconds.
        attempts: at most.

    Raises:
        DataError: the archive refuses.
        Interrupted: it is gone, withholds the series, or does not send all of it.
    """
    if series.refused:
        raise Withheld(series.refused)
    key = pseudonyms.uid(series.series)
    if key in journal.done and series.objects <= journal.done[key] and key not in journal.unreadable:
        return
    coming = _Coming(archive, series, folder, pseudonyms, journal, pace)
    with warnings.catch_warnings(action="ignore"):
        patiently(coming.ask, wait_s=wait_s, attempts=attempts)
    journal.end(key)


class _Coming:
    """The objects of a series that are not all here yet, under their keyed names."""

    def __init__(
        self, archive: Archive, series: Series, folder: Path, pseudonyms: Pseudonyms, journal: Journal, pace: Pace
    ) -> None:
        self._archive, self._series, self._folder = archive, series, folder
        self._pseudonyms, self._journal, self._pace = pseudonyms, journal, pace
        self._key = pseudonyms.uid(series.series)
        self._here = journal.open(self._key)
        self._known = journal.unreadable.get(self._key, set())  # to be unreadable, by an earlier pull
        self._torn: set[str] = set()
        self._unreadable: set[str] = set()

    def ask(self, attempt: int) -> None:
        """Ask for the series, and for each object that it did not bring."""
        if not attempt and not self._here:
            with suppress(Interrupted):  # at which object, only asking for each tells
                self._archive.fetch(self._series, self._take)
        names = {self._pseudonyms.uid(uid): uid for uid in self._archive.objects(self._series)}
        asked, lost, withheld = 0, False, None
        for name, uid in names.items():  # an archive may say that it sent everything, and have sent nothing
            if name in self._here | self._unreadable:
                continue
            try:
                self._ask_for(name, uid)
            except Withheld as error:
                withheld = error
            except Interrupted:
                lost = True
                self._archive.objects(self._series)  # raises, if it is the archive that is gone and not this object
            if name in self._torn - self._here:  # also when it was asked for alone
                self._journal.add(series=self._key, object=name, unreadable=True)
                self._unreadable.add(name)
            asked += 1
            if asked >= LOST_AFTER and not self._here | self._unreadable:
                break
        if names.keys() - self._here - self._unreadable:
            raise withheld if withheld and not lost else Unsent("the archive does not send all objects of a series")

    def _ask_for(self, name: str, uid: str) -> None:
        """Ask for one object, and once more if it came torn for the first time."""
        for _ in range(1 if name in self._torn | self._known else 2):
            try:
                self._archive.fetch_object(self._series, uid, self._take)
            except UnreadableImage:
                self._torn.add(name)
            if name not in self._torn - self._here:
                return

    def _take(self, dataset: Dataset) -> None:
        """Keep an object that came."""
        name = self._pseudonyms.uid(str(dataset.get("SOPInstanceUID") or ""))
        if name in self._here:
            return
        try:
            facts = asdict(keep(dataset, self._folder, self._pseudonyms))
            del facts["path"]
            self._journal.add(series=self._key, object=name, **facts)
            self._here.add(name)
        except UnreadableImage:
            self._torn.add(name)
        self._pace(len(dataset.get("PixelData") or b""))
