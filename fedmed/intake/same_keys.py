"""Which keys made a folder's pseudonyms: noted beside them, since under other keys tables and opt-outs match nobody.

What is noted is a keyed digest of nothing (`Pseudonyms.check`): it tells two keys apart, and nothing of either.
"""

from __future__ import annotations

from pathlib import Path

from fedmed.durable import write_atomically
from fedmed.errors import DataError
from fedmed.intake.journal import JOURNAL, TABLE
from fedmed.intake.pseudonyms import Pseudonyms

CHECK = "keys.check"
FILLED = (CHECK, JOURNAL, TABLE, "imported.csv", "manifest.csv", "opt-out.csv")  # where one is, there are pseudonyms


def holds_pseudonyms(folder: Path) -> bool:
    """Whether a pull or an import has begun to fill a folder."""
    return any((folder / name).exists() for name in FILLED)


def made_with(pseudonyms: Pseudonyms, folder: Path) -> bool:
    """Whether a folder says that these keys made its pseudonyms; False = it says nothing, as older ones do.

    Raises:
        DataError: other keys made them.
    """
    try:
        noted = (folder / CHECK).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"{folder / CHECK}: cannot be read ({error.strerror})") from None
    if noted != pseudonyms.check:
        text = "was filled with other keys, under which these match nobody; give the --site or --keys of that time"
        public = "the pseudonyms of the site's manifest were made with other keys than its own"
        raise DataError(f"{folder}: {text}", public=public)
    return True


def note_keys(pseudonyms: Pseudonyms, folder: Path, source: Path | None = None) -> None:
    """Note in a folder that these keys make its pseudonyms, unless nobody knows of some that it holds already.

    Args:
        pseudonyms: of the site.
        folder: that is filled next.
        source: a folder with pseudonyms that it is filled from; None = these keys make all of them.

    Raises:
        DataError: other keys made those of the folder or of the source, or it cannot be written.
    """
    known = source is None or made_with(pseudonyms, source)
    if made_with(pseudonyms, folder) or holds_pseudonyms(folder) or not known:
        return
    try:
        write_atomically(folder / CHECK, f"{pseudonyms.check}\n".encode("ascii"), mode=0o600, shared=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
