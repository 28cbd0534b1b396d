"""What an archive has of what is wanted: studies by study-level questions, then the series of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

from fedmed.errors import DataError
from fedmed.intake.archive import Answer, Archive, Facts, Patience, Unreached, Unsent, Withheld, patiently
from fedmed.intake.query import Query, Series, meets, questions

LOST_AFTER = 3  # studies in a row of which nothing usable is told, until an archive is taken as gone


def search(
    archive: Archive, query: Query, wait_s: float, searching: Callable[[int], None]
) -> tuple[list[Series], list[str]]:
    """The series that meet a query, each once, and what of its list has none.

    Args:
        archive: to ask. Each question is asked with patience, so that one without an answer does not end them all.
        query: what is wanted.
        wait_s: the first wait before a question is asked again, seconds.
        searching: called with series found so far.

    Raises:
        DataError: nobody answers, the archive refuses the first search, or `LOST_AFTER` studies in a row are listed
            and nothing usable is told of them.
    """
    single = replace(query, accessions=(), patients=())
    asked = [(one, replace(single, accessions=(one,))) for one in query.accessions]
    asked += [(one, replace(single, patients=(one,))) for one in query.patients]
    wanted: dict[tuple[str, str], Series] = {}
    missing = []
    patience = _Patience(wait_s)
    untold = 0  # studies in a row of which it was asked many times what they hold
    for value, question in asked or [("", query)]:
        found = False
        for series in _quietly(_offered(archive, question, patience)):
            untold = untold + 1 if series.may_pass else 0
            if untold == LOST_AFTER:
                raise DataError(
                    f"{series.refused}, at {LOST_AFTER} studies in a row; give the same command again later"
                )
            if meets(question, series):
                found |= bool(series.study)
                wanted.setdefault((series.study or value, series.series), series)
                searching(len(wanted))
        if value and not found:
            missing.append(value)
    return list(wanted.values()), missing


class _Patience:
    """Asks a question again while it may help, but not one that nobody answers who never answered."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._reached = False

    def __call__(self, ask: Callable[[int], Answer]) -> Answer:
        def once(attempt: int) -> Answer:
            try:
                answer = ask(attempt)
            except Unreached as error:
                raise error if self._reached else DataError(str(error)) from None
            self._reached = True
            return answer

        return patiently(once, wait_s=self._wait_s)


def _offered(archive: Archive, query: Query, patience: Patience) -> Iterator[Series]:
    """The series of all studies that the archive finds, each study once; see `Series.refused`."""
    seen: set[str] = set()
    for question in questions(query):
        try:
            for study in archive.studies(question, patience):
                uid = study["StudyInstanceUID"]
                if uid and uid not in seen:
                    seen.add(uid)
                    yield from _told(archive, study, patience)
        except Unsent as error:
            yield _untold("", error)


def _told(archive: Archive, study: Facts, patience: Patience) -> Iterator[Series]:
    uid = study["StudyInstanceUID"]
    try:
        told = archive.series_of(uid, patience)
    except Unsent as error:
        yield _untold(uid, error)
        return
    for series in told:
        count = series["NumberOfSeriesRelatedInstances"]
        yield Series(
            study=uid,
            series=series["SeriesInstanceUID"],
            modality=series["Modality"].upper(),
            body_part=series["BodyPartExamined"].upper(),
            description=f"{study['StudyDescription']} {series['SeriesDescription']}",
            accession=study["AccessionNumber"],
            patient=study["PatientID"],
            date=study["StudyDate"],
            objects=int(count) if count.isdecimal() else 0,
        )


def _untold(study: str, error: Unsent) -> Series:
    """A study of which an archive does not tell the series; "" = it refuses the search, so nobody knows which study."""
    may_pass = not isinstance(error, Withheld)
    return Series(study=study, series="", modality="", description="", refused=str(error), may_pass=may_pass)


def _quietly(offered: Iterator[Series]) -> Iterator[Series]:
    """The same; a warning of pydicom could quote a value."""
    while True:
        with warnings.catch_warnings(action="ignore"):
            if (series := next(offered, None)) is None:
                return
        yield series
