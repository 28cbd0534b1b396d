"""One site's part in a secure sum: its key for the run, its masked update, and once the seeds that open the sum.

What it has masked and what it has opened stand in one small file, written before either leaves: no server gets two
updates under the same masks, or both a mask and a piece of the same site, however often it asks and whoever is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmed.config import RunConfig
from fedmed.durable import write_json
from fedmed.errors import LedgerUnusable, ModelError, PolicyRefused, UpdateRefused
from fedmed.privacy.chain import canonical
from fedmed.privacy.keys import SiteKeys, make_keys, read_keys, signed_by
from fedmed.privacy.secure_sum import (
    BUFFER_STEP,
    FEWEST,
    PARAMETER_STEP,
    Ring,
    add_mask_,
    mask_seed,
    masking_key,
    masks_of,
    own_piece,
    pair_secret,
    to_ring,
)
from fedmed.training.moments import second_moments
from fedmed.training.site import Site
from fedmed.training.site_state import SiteState
from fedmed.types import Layout, Masking, Scalar, Task, Update, Weights

RECORD, LOCK = "secure-sum.json", "secure-sum.lock"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A site in the secure sums of one run."""

    site: Site
    keys: SiteKeys
    folder: Path  # of what it keeps of this run

    @classmethod
    def of(cls, task: Task, site: Site, config: RunConfig) -> Part:
        """The site's part.

        Raises:
            PolicyRefused: it knows no other site's key, or has none of its own.
            ConfigError: it has no folder for what it keeps.
        """
        state = SiteState.of(site.state_dir, name=config.name, task=task)
        if not site.virtual and not site.peers:
            text = "this site knows no other site's key; fedmed site join with the coordinator's newest kit"
            raise PolicyRefused(text, rule="secure-sum.keys")
        return cls(site=site, keys=_keys(site, state.folder.parent), folder=state.folder)

    @property
    def run(self) -> str:
        """What tells the run from all others at this site and at every other: settings, layout and number."""
        return self.folder.name.rpartition("-")[2]

    @property
    def public(self) -> bytes:
        """The site's public key for this run."""
        return self._private.public_key().public_bytes_raw()

    def card(self) -> dict[str, Scalar]:
        """The public key, and the signature by which other sites know whose it is."""
        signature = self.keys.sign(_signed(self.run, self.site.name, self.public.hex()))
        return {"masking-key": self.public.hex(), "masking-signature": signature.hex()}

    def pairs(self, masking: Masking) -> dict[str, bytes]:
        """What the site has in common with every other one of a sum, by name.

        Raises:
            PolicyRefused: the site is not among them, or one is not who it says.
        """
        if masking.keys.get(self.site.name, ("", ""))[0] != self.public.hex():
            raise PolicyRefused("the sum does not name this site's key", rule="secure-sum.keys")
        others = {name: given for name, given in masking.keys.items() if name != self.site.name}
        known = dict(self.site.peers)
        try:
            for name, (key, signature) in () if self.site.virtual else others.items():
                signed = _signed(self.run, name, key)
                if name not in known or not signed_by(bytes.fromhex(known[name]), signed, bytes.fromhex(signature)):
                    text = f'the key of "{name[:80]}" is of no site that this one knows; join the newest kit'
                    raise PolicyRefused(text, rule="secure-sum.keys")
            keys = {name: bytes.fromhex(key) for name, (key, _) in others.items()}
            if len({self.public, *keys.values()}) <= len(keys):
                raise UpdateRefused("two sites of the sum have one key")
            return {name: pair_secret(self._private, key, self.run) for name, key in keys.items()}
        except (ValueError, UpdateRefused):
            raise PolicyRefused("a site's key for the secure sum is none", rule="secure-sum.keys") from None

    # What was masked, and what was opened.

    def note_masked(self, masking: Masking, attempt: str, values: Ring) -> None:
        """Write down that values are about to leave under the masks of an attempt.

        Raises:
            PolicyRefused: others left under them, or a later attempt has begun.
        """
        new = {"attempt": attempt, "sites": _roster(masking), "values": hashlib.sha256(values.data).hexdigest()}
        with self._record() as last:
            if {name: last.get(name) for name in new} == new:
                return  # asked again, it sends the same bits
            if last and _number(last["attempt"]) >= _number(attempt):
                text = "another update has left under these masks; they are used once"
                raise PolicyRefused(text, rule="secure-sum.once")
            self._write({**new, "joined": None})

    def note_opened(self, masking: Masking, attempt: str, joined: Sequence[str]) -> None:
        """Write down for which sites a sum is about to be opened.

        Raises:
            PolicyRefused: this site has masked nothing for it, or it was opened for other sites.
        """
        with self._record() as last:
            if (last.get("attempt"), last.get("sites")) != (attempt, _roster(masking)):
                raise PolicyRefused("this site has no update in that sum", rule="secure-sum.once")
            if last["joined"] not in (None, list(joined)):
                raise PolicyRefused("the sum was opened for other sites before", rule="secure-sum.once")
            self._write({**last, "joined": list(joined)})

    @contextmanager
    def _record(self) -> Iterator[dict[str, Any]]:
        """What stands on the disk, empty at first; nobody else reads or writes it meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / RECORD
            try:
                last = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                sound = not last or set(last) == {"attempt", "sites", "values", "joined"}
            except (OSError, ValueError):
                sound = False
            if not sound:
                text = f"{path} is damaged; without it masks could be used twice. Take no part in this run any more"
                raise PolicyRefused(text, rule="secure-sum.record", public="the record of its masks is damaged")
            yield last

    def _write(self, values: Mapping[str, Any]) -> None:
        write_json(self.folder / RECORD, values, mode=0o600)

    @property
    def _private(self) -> X25519PrivateKey:
        return masking_key(self.keys.derived(f"secure-sum/{self.run}"))


def key_of_site(task: Task, site: Site, config: RunConfig) -> dict[str, Scalar]:
    """What a site's card says for secure sums; nothing in a run without them.

    Raises:
        PolicyRefused, ConfigError: the site cannot take part in one.
    """
    return Part.of(task, site, config).card() if config.strategy.secure_sum else {}


def masked(update: Update, task: Task, site: Site, config: RunConfig, layout: Layout, *, fewest: int = 0) -> Update:
    """The update with its network under masks: what the server can only add up.

    `strategy.clip-norm` is applied here, as no server can: Δ ← Δ · min(1, C/‖Δ‖₂).

    Args:
        update: that would leave in a run without secure sums.
        task: that it answers.
        site: this one.
        config: the run.
        layout: of the network.
        fewest: sites that the hospital wants in a sum.

    Raises:
        PolicyRefused: the sum is not one that the site takes part in.
        ModelError: the network is not finite.
    """
    if task.masking is None or update.weights is None:
        raise PolicyRefused("the server asks for a network in clear", rule="secure-sum.masks")
    part = Part.of(task, site, config)
    _require_enough(task.masking.keys, fewest)
    pairs, weight = part.pairs(task.masking), _weight(update, config)
    try:
        values = _values(update.weights, task.weights, layout, weight, config.strategy.clip_norm, len(pairs) + 1)
    except UpdateRefused as error:
        raise ModelError(str(error), public=str(error)) from None
    attempt = _attempt(task)
    part.note_masked(task.masking, attempt, values)
    for seed, sign in masks_of(site.name, pairs, attempt):
        add_mask_(values, seed, sign)
    return replace(update, weights=None, masked=values)


def seeds_for(task: Task, site: Site, config: RunConfig, *, fewest: int = 0) -> dict[str, Scalar]:
    """What the site gives to open a sum that its update is in: for every other site a piece or a mask, never both.

    Args:
        task: names the sum, and whose updates are in it.
        site: this one.
        config: the run.
        fewest: sites that the hospital wants in a sum.

    Raises:
        PolicyRefused: it is in no such sum, it is of too few sites, or it was opened otherwise before.
    """
    masking = task.masking
    if masking is None or site.name not in masking.joined or not set(masking.joined) <= set(masking.keys):
        raise PolicyRefused("this site has no update in that sum", rule="secure-sum.once")
    part = Part.of(task, site, config)
    pairs, joined = part.pairs(masking), sorted(set(masking.joined))
    _require_enough(joined, fewest)
    attempt = _attempt(task)
    part.note_opened(masking, attempt, joined)
    gone = pairs.keys() - set(joined)
    seeds = {
        "pieces": {name: own_piece(pairs[name], attempt, name).hex() for name in joined if name != site.name},
        "masks": {name: mask_seed(pairs[name], attempt).hex() for name in gone},
        "own": {name: own_piece(pairs[name], attempt, site.name).hex() for name in gone},
    }
    return {"seeds": json.dumps(seeds, sort_keys=True)}


def _require_enough(sites: Collection[str], fewest: int) -> None:
    fewest = max(FEWEST, fewest)
    if len(sites) < fewest:
        text = f"a secure sum of {len(sites)} sites; at least {fewest} are to hide in it"
        raise PolicyRefused(text, rule="secure-sum.sites")


def _roster(masking: Masking) -> str:
    """SHA-256 over who has masks in common, and by which keys."""
    return hashlib.sha256(canonical({name: list(given) for name, given in masking.keys.items()}).encode()).hexdigest()


def _values(trained: Weights, sent: Weights, layout: Layout, weight: float, clip: float, sites: int) -> Ring:
    """The weighted changes of parameters and of the buffers' moments, in the ring."""
    change = np.subtract(trained.parameters, sent.parameters, dtype=np.float32)
    norm = float(np.linalg.norm(change.astype(np.float64))) if clip else 0.0
    if clip and norm > clip:
        change *= np.float32(clip / norm)
    moments = second_moments(trained.buffers, layout) - second_moments(sent.buffers, layout)
    parts = ((change, PARAMETER_STEP), (moments, BUFFER_STEP))
    return np.concatenate([to_ring(values, weight, step, sites=sites) for values, step in parts])


def _weight(update: Update, config: RunConfig) -> float:
    by = config.strategy.weight_by
    return {"uniform": 1.0, "images": float(update.num_examples), "patients": float(update.facts["patients"])}[by]


def _attempt(task: Task) -> str:
    assert task.masking is not None
    return f"{task.round}/{task.masking.attempt}"


def _number(attempt: str) -> int:
    return int(attempt.partition("/")[2])


def _signed(run: str, site: str, key: str) -> bytes:
    return canonical({"kind": "fedmed masking key", "run": run, "site": site, "key": key}).encode()


def _keys(site: Site, folder: Path) -> SiteKeys:
    """The site's keys; a virtual hospital's are made when it has none."""
    where = site.keys or folder / "keys"
    if site.virtual and not where.exists():
        try:
            return make_keys(where)
        except LedgerUnusable as error:
            if error.rule != "keys.exist":
                raise
    return read_keys(where)
