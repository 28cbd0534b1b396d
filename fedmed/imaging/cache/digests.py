"""What files hold, as digests. A file is read once; afterwards its size and times say that it has not changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmed.errors import UnreadableImage
from fedmed.imaging.cache.index import Index
from fedmed.imaging.plain_errors import reason_of

SETTLED_NS = 2_000_000_000  # a file changed later than this before it was hashed may change within one tick of a clock
COMMIT_EVERY = 256  # files


class Digests:
    """Digests of files and folders by content; `keep` commits what was learnt."""

    def __init__(self, index: Index) -> None:
        """Nothing is read yet."""
        self._index = index
        self._fresh: list[tuple[bytes, str, bytes]] = []

    def of(self, path: Path) -> bytes:
        """The digest of a file, or of everything below a folder, where names and order do not count.

        Raises:
            UnreadableImage: it does not exist or cannot be read.
        """
        try:
            if not path.is_dir():
                return self._files([path])[0]
            files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
            return hashlib.blake2b(b"".join(sorted(self._files(files))), digest_size=32, person=b"folder").digest()
        except OSError as error:
            raise UnreadableImage(reason_of(error)) from None

    def keep(self) -> None:
        """Commit the digests that are new."""
        if self._fresh:
            self._index.add_digests(self._fresh)
            self._fresh = []

    def _files(self, files: Sequence[Path]) -> list[bytes]:
        places = [
            hashlib.blake2b(os.fsencode(file.absolute()), key=self._index.secret, digest_size=32).digest()
            for file in files
        ]
        known = self._index.digests(places)
        return list(self._digests(files, places, known))

    def _digests(
        self, files: Sequence[Path], places: Sequence[bytes], known: dict[bytes, tuple[str, bytes]]
    ) -> Iterator[bytes]:
        for file, place in zip(files, places, strict=True):
            facts = _facts(file.stat())
            before, digest = known.get(place, ("", b""))
            if facts == before:
                yield digest
                continue
            started = time.time_ns()
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=32)).digest()
                found = os.fstat(opened.fileno())
            if _facts(found) == facts and found.st_ctime_ns < started - SETTLED_NS:
                self._fresh.append((place, facts, digest))
                if len(self._fresh) >= COMMIT_EVERY:
                    self.keep()
            yield digest


def _facts(found: os.stat_result) -> str:
    """What changes when a file does. The time of change is set by the system: no tool can put it back."""
    return json.dumps([found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
