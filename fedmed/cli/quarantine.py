"""What `fedmed data quarantine` does and prints."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from shlex import quote

from fedmed.cli.display import bar
from fedmed.errors import ConfigError, DataError
from fedmed.intake.keep import APART, REASONS
from fedmed.intake.set_apart import SetApart, chosen, delete, pictures, release, set_apart
from fedmed.reporting.quarantine import write_quarantine

PAGE = "quarantine.html"
MOST = 100  # objects on a page


def judge_quarantine(folder: Path, *, released: str, deleted: str, start: int) -> None:
    """Release and delete what a person chose, then show what is left.

    Args:
        folder: `--out` of the pull or the import.
        released: rows of quarantine.csv, such as "1,4-7", or "all"; "" = none.
        deleted: likewise.
        start: the row that the page begins with.

    Raises:
        ConfigError: a text names no rows that are in quarantine, or both name one.
        DataError: there is no such folder, or it cannot be written.
    """
    objects = set_apart(folder)
    harmless, unwanted = (chosen(text, objects) if text else () for text in (released, deleted))
    if both := {each.row for each in harmless} & {each.row for each in unwanted}:
        raise ConfigError(f"row {min(both)} is to be released and to be deleted; choose one")
    for each in harmless:
        release(each)
    for each in unwanted:
        delete(each)
    if harmless or unwanted:
        print(f"{len(harmless)} released, {len(unwanted)} deleted; next: import, also where that was done before")
    _show(folder, [each for each in set_apart(folder) if each.now == APART], start)


def _show(folder: Path, objects: list[SetApart], start: int) -> None:
    """Write the page and say what it is for; without objects there is none, nor an older one."""
    page, command = folder / PAGE, f"fedmed data quarantine {quote(str(folder))}"
    if not objects:
        try:
            page.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{page}: cannot be deleted ({error.strerror})") from None
        print("nothing is in quarantine")
        return
    shown = list(islice((each for each in objects if each.row >= start), MOST))
    with bar("decoding") as progress:
        found = [(each.row, each.reason, greys) for each, greys in pictures(shown, progress)]
    write_quarantine(found, page, command=command, left=len(objects) - len(shown))
    print(f"{len(objects)} in quarantine; look at {page}, which shows {len(shown)} of them by their rows in {REASONS}")
    if shown and (after := [each.row for each in objects if each.row > shown[-1].row]):
        print(f"further ones: {command} --from {after[0]}")
    print(f"then: {command} --release ROWS --delete ROWS")
