"""Names that a site makes for its own patients, studies and pictures: the same ones again, and only with its key."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from pydicom.uid import UID

from fedmed.privacy.keys import SiteKeys

STANDARD = re.compile(r"1\.2\.840\.10008(\.\d{1,3}){1,8}")
YEAR = 364  # days back at most: more would move a study into another year's equipment and another age


@dataclass(frozen=True, kw_only=True)
class Pseudonyms:
    """Keyed names: HMAC-SHA-256 under the site's linking key, so that nobody without it can try hospital numbers.

    The issuer of a patient id is not asked: label sheets and lists of patients who withdrew do not know it, and some
    scanners leave it out. Two issuers that gave one number to two people would make them one patient here, who is
    then kept in one split and withdrawn together.
    """

    keys: SiteKeys

    def patient(self, patient_id: str) -> str:
        """`P` and 16 letters or digits (80 bits), for an id in any case and with any blanks around it."""
        return "P" + self._letters("pseudonym", _plain(patient_id), 16)

    def uid(self, uid: str) -> str:
        """A UID of the root for UUIDs (PS3.5 B.2): `2.25.` and 128 bits as a whole number."""
        digest = self.keys.link("uid", uid.strip(" \0").encode())
        return f"2.25.{int.from_bytes(digest)}"

    def accession(self, number: str) -> str:
        """`A` and 15 letters or digits, which fit into Accession Number (0008,0050); "" for none."""
        return "A" + self._letters("accession", plain, 15) if (plain := _plain(number)) else ""

    def days(self, patient_id: str) -> int:
        """By how many days all dates of a patient move back: 1 to 364, so that intervals survive and dates do not."""
        return 1 + int.from_bytes(self.keys.link("days", _plain(patient_id).encode())) % YEAR

    @property
    def check(self) -> str:
        """13 letters or digits (65 bits) by which keys are told apart; see `same_keys`."""
        return self._letters("check", "", 13)

    def _letters(self, kind: str, text: str, count: int) -> str:
        return base64.b32encode(self.keys.link(kind, text.encode())).decode()[:count]


def registered(uid: str) -> bool:
    """Whether a UID is one of the standard's own (PS3.6 A), which says what something is and not whose.

    Those of its last editions are known by their root, and by being as short as all others are.
    """
    return UID(uid).name != uid or STANDARD.fullmatch(uid) is not None


def _plain(text: str) -> str:
    return " ".join(text.replace("\0", " ").split()).upper()
