"""Everything that fedmed raises on purpose.

::

    FedmedError                 one clear line for the user, exit status 1
    ├── ConfigError             a run file, a --set option or a site.toml says something impossible
    ├── DataError               a manifest or a data set cannot be used
    │   ├── UnreadableImage     one image cannot be decoded; a data set counts these
    │   ├── UnfitRow            one row does not fit the task: its mask, or what stands in a column
    │   └── Interrupted         an archive did not answer, or broke off (intake.archive)
    │       └── Unsent          it answers, and does not send all that it lists
    │           └── Withheld    and says that it will not
    ├── ModelError              a network cannot be built, or its weights do not fit
    ├── UpdateRefused           what a site sent is not a valid update
    │   └── CannotJoin          a node cannot take part in a run (federated.member)
    ├── PolicyRefused           a hospital's policy does not allow what a run asks for
    │   └── BudgetExhausted     its patients' privacy budget does not allow it
    ├── LedgerUnusable          a ledger, a log or a key of a site cannot be read, written or trusted
    └── RunFailed               the federation cannot go on; the run folder keeps what was reached
        ├── TooFewSites         before its first round; one that has a checkpoint pauses
        ├── ServerAway          the consortium's server does not answer; it may come back (deployment.control)
        └── RunInterrupted      its server failed it, and goes on with it when it can

A message says what was expected, what was found, and what to do; it never holds a patient identifier, a UID or a
pixel. It is meant for the person at the machine and may name a file there. What may leave that machine is `public`.
"""

from __future__ import annotations

import errno
import os
from typing import Self

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: the disk, or one's share of it, is full


def plain_reason(error: OSError) -> str:
    """Why the system refused, such as "No space left on device": its own words alone, which name no file."""
    return os.strerror(error.errno) if error.errno else type(error).__name__


def one_line(text: str) -> str:
    """Text that another machine sent, for a terminal or a log: nothing in it ends the line or moves a cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


class FedmedError(Exception):
    """Base of all errors that a user can mend.

    Attributes:
        public: the part of the message that may leave a site: no path, no count below the site's minimum, and nothing
            of a patient. A class-wide sentence unless the raiser gives a better one.
    """

    public = "the site stopped; its own log says why"

    def __init__(self, message: str, *, public: str | None = None) -> None:
        """Keep `message` for the local user and `public` for everybody else."""
        super().__init__(message)
        if public is not None:
            self.public = public

    @classmethod
    def told(cls, text: str) -> Self:
        """An error whose whole message may leave the site; of a class without `rule`, which says it anyway."""
        return cls(text, public=text)


class ConfigError(FedmedError):
    """A configuration is misspelt, of the wrong type, or asks for something impossible."""

    public = "the site's configuration does not allow this task"


class DataError(FedmedError):
    """A manifest or the data that it names cannot be used."""

    public = "the site's data cannot be used for this task"


class UnreadableImage(DataError):
    """One image cannot be decoded. The message names the reason and never the file, the patient or a UID."""


class UnfitRow(DataError):
    """One row of a manifest does not fit the task: no set is made with it, but for a private run without it."""


class ModelError(FedmedError):
    """A network cannot be built, or weights do not fit it."""

    public = "the site cannot build this network, or not use it on its images"


class UpdateRefused(FedmedError):
    """An update from a site is malformed: another layout, a wrong shape, NaN, or an impossible count."""


class PolicyRefused(FedmedError):
    """A hospital's policy does not allow what a run asks for.

    Attributes:
        rule: the key of site.toml, or the law of the ledger, that decided.
    """

    public = "the site's policy does not allow this task"

    def __init__(self, message: str, *, rule: str, public: str | None = None) -> None:
        """Keep the rule's name; `public` defaults to the message, which therefore holds nothing of a patient."""
        super().__init__(message, public=message if public is None else public)
        self.rule = rule


class BudgetExhausted(PolicyRefused):
    """The privacy budget of some patient does not allow it. The message offers the largest plan that fits."""


class LedgerUnusable(FedmedError):
    """A ledger, a log or a key of a site cannot be read, written or trusted. Nothing is trained until it can.

    Attributes:
        rule: what was found wrong.
    """

    public = "the site's ledger cannot be used"

    def __init__(self, message: str, *, rule: str, public: str | None = None) -> None:
        """Keep the name of what was found wrong, which may leave the site beside `public`."""
        super().__init__(message, public=f"{public or self.public} ({rule})")
        self.rule = rule


class RunFailed(FedmedError):
    """A federation cannot go on. `result.json` says why, and the last checkpoint is kept."""


class TooFewSites(RunFailed):
    """Fewer sites are there than a run's quorum asks, before a round has begun."""


class RunInterrupted(RunFailed):
    """The server that a run is on failed it. By the last words of the message the server knows that it is to go on."""

    goes_on = "the server goes on with this run when it can"

    def __init__(self, message: str) -> None:
        """Add these words."""
        super().__init__(f"{message}; {self.goes_on}")
