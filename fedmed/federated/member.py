"""The card by which a site joins a run, read as what it is: text from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from flwr.app import ConfigRecord, RecordDict

import fedmed
from fedmed.errors import UpdateRefused, one_line
from fedmed.federated.identity import package_hash
from fedmed.types import Scalar

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,79}")
LONGEST_TEXT = 500  # characters of a problem, or of reasons
MOST = 10**9  # patients, or images, that a site can have
NOWHERE = 0  # the node of a site that is not connected; no grid gives a node this number
MASKING = re.compile(r"([0-9a-f]{64}/([0-9a-f]{128})?|/)")  # public key, signature


@dataclass(frozen=True, kw_only=True)
class Member:
    """A site as the server knows it."""

    name: str
    node: int
    patients: int
    images: int
    holds_out: bool  # patients whom it does not train on
    unreadable: int | None  # images that were left out; None = the site does not tell, as they are few of a kind
    reasons: str  # why, and how many for each reason
    modalities: int = 0  # in a row of its manifest; 0 = it has none
    masking: tuple[str, str] = ("", "")  # its key for secure sums and its signature of it, which other sites check


class CannotJoin(UpdateRefused):
    """A node that cannot take part."""

    def __init__(self, reason: str, *, site: str = "") -> None:
        super().__init__(reason)
        self.site = site


def member_of(answer: RecordDict | str, node: int, *, registered: str = "") -> Member:
    """The member behind a node's card.

    Args:
        answer: the card, or why there is none.
        node: that sent it.
        registered: the site that the node's key is registered for, where keys are.

    Raises:
        UpdateRefused: there is no card, it is malformed or another site's, or the site cannot take part: it runs
            another version of fedmed, or its data cannot be used.
    """
    if isinstance(answer, str):
        raise CannotJoin(answer)
    try:
        card = cast(Mapping[str, Scalar], cast(ConfigRecord, answer["card"]))
        name, version, code = str(card["site"]), one_line(str(card["version"])[:40]), str(card["code"])
        problem = one_line(str(card["problem"])[:LONGEST_TEXT])
        if not NAME.fullmatch(name):
            raise CannotJoin("its name is none that a site can have")
        if registered and name != registered:
            text = "calls itself by another name than its key is registered for (site.toml: name)"
            raise CannotJoin(text, site=registered)
        if (version, code) != (fedmed.__version__, package_hash()):
            raise CannotJoin(f"runs fedmed {version} with other code than the server's {fedmed.__version__}", site=name)
        if problem:  # of the same code: another would have others
            raise CannotJoin(problem, site=name)
        counts = {key: int(card[key]) for key in ("patients", "images", "modalities")}
        unreadable = None if card["unreadable"] == "" else int(card["unreadable"])
        if not all(0 <= count <= MOST for count in (*counts.values(), unreadable or 0)):
            raise ValueError
        return Member(
            name=name,
            node=node,
            patients=counts["patients"],
            images=counts["images"],
            holds_out=bool(card["holds-out"]),
            unreadable=unreadable,
            modalities=counts["modalities"],
            reasons=one_line(str(card["reasons"])[:LONGEST_TEXT]),
            masking=_masking(str(card.get("masking-key", "")), str(card.get("masking-signature", ""))),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CannotJoin("its answer to the greeting is malformed") from None


def _masking(key: str, signature: str) -> tuple[str, str]:
    """A key for secure sums and its signature; both empty where there is none.

    Raises:
        ValueError: they are malformed.
    """
    if not MASKING.fullmatch(f"{key}/{signature}"):
        raise ValueError
    return key, signature
