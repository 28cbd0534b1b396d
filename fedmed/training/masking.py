"""One site's part in a secure sum: its key for the run, its masked update, and once the seeds that open the sum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedmed.config import RunConfig
from fedmed.errors import ModelError, PolicyRefused, UpdateRefused
from fedmed.privacy.chain import canonical
from fedmed.privacy.keys import read_keys, signed_by
from fedmed.privacy.secure_sum import (
    BUFFER_STEP,
    FEWEST,
    PARAMETER_STEP,
    Ring,
    add_mask_,
    mask_seed,
    masks_of,
    own_piece,
    pair_secret,
    to_ring,
)
from fedmed.training.mask_record import MaskRecord
from fedmed.training.moments import second_moments
from fedmed.training.site import Site
from fedmed.training.site_state import SiteState
from fedmed.types import Layout, Masking, Scalar, Task, Update, Weights


@dataclass(frozen=True, kw_only=True)
class Part:
    """A site in one secure sum, with others that it knows."""

    name: str
    record: MaskRecord
    masking: Masking
    pairs: Mapping[str, bytes] = field(repr=False)  # what it has in common with every other one, by name

    @property
    def sites(self) -> str:
        """SHA-256 over who has masks in common, and by which keys."""
        rows = {name: list(given) for name, given in self.masking.keys.items()}
        return hashlib.sha256(canonical(rows).encode()).hexdigest()


def key_of_site(task: Task, site: Site, config: RunConfig) -> dict[str, Scalar]:
    """What a site's card says for secure sums, its public key and its signature of it; nothing in a run without them.

    Raises:
        PolicyRefused: the site knows no other one, or its record is damaged.
        ConfigError: it has no folder for what it keeps.
    """
    if not config.strategy.secure_sum:
        return {}
    if not site.virtual and not site.peers:
        text = "this site knows no other site's key; fedmed site join with the coordinator's newest kit"
        raise PolicyRefused(text, rule="secure-sum.keys")
    state = SiteState.of(site.state_dir, name=config.name, task=task)
    key = MaskRecord(folder=state.folder).key().public_key().public_bytes_raw().hex()
    signed = read_keys(site.keys).sign(_signed(state.run, site.name, key)) if site.keys else b""
    return {"masking-key": key, "masking-signature": signed.hex()}


def part_in_sum(task: Task, site: Site, config: RunConfig, *, fewest: int = 0) -> Part:
    """The site's part in the sum that a task names, agreed to before anything is trained or charged for it.

    Args:
        task: names the sum.
        site: this one.
        config: the run.
        fewest: sites that the hospital wants in a sum.

    Raises:
        PolicyRefused: it is none that the site takes part in: of too few, with one that it does not know, under masks
            that were used, or it asks for the network in clear.
        ConfigError: the site has no folder for what it keeps.
    """
    if task.masking is None:
        raise PolicyRefused("the server asks for a network in clear", rule="secure-sum.masks")
    state = SiteState.of(site.state_dir, name=config.name, task=task)
    record, keys = MaskRecord(folder=state.folder), task.masking.keys
    _require_enough(keys, fewest)
    private = record.key()
    if keys.get(site.name, ("", ""))[0] != private.public_key().public_bytes_raw().hex():
        text = (
            "the sum names another key for this site than it has since its record was lost; resume the run to greet it"
        )
        raise PolicyRefused(text, rule="secure-sum.keys")
    known = dict(site.peers)
    others = {name: given for name, given in keys.items() if name != site.name}
    for name, (key, signature) in () if site.virtual else others.items():
        if name not in known or not _signed_by(known[name], _signed(state.run, name, key), signature):
            text = f'the key of "{name[:80]}" is of no site that this one knows; join the newest kit'
            raise PolicyRefused(text, rule="secure-sum.keys")
    try:
        pairs = {name: pair_secret(private, bytes.fromhex(key), state.run) for name, (key, _) in others.items()}
    except (ValueError, UpdateRefused):
        raise PolicyRefused("a site's key for the secure sum is none", rule="secure-sum.keys") from None
    if task.kind == "train":
        record.require_new(task.masking.attempt, again=config.privacy.mode == "none")
    return Part(name=site.name, record=record, masking=task.masking, pairs=pairs)


def masked(update: Update, task: Task, part: Part, config: RunConfig, layout: Layout) -> Update:
    """The update with its network under masks: what the server can only add up.

    The masks follow from all that the site was asked, so that sites which were asked different things share none.
    `strategy.clip-norm` is applied here, as no server can: Δ ← Δ · min(1, C/‖Δ‖₂).

    Args:
        update: that would leave in a run without secure sums.
        task: that it answers.
        part: of the site in the sum.
        config: the run.
        layout: of the network.

    Raises:
        PolicyRefused: something else left under these masks.
        ModelError: the network is not finite, or there is none.
    """
    if update.weights is None:
        raise ModelError("strategy.secure-sum hides a network, and there is none", public="there is no network to hide")
    weight = _weight(update, config)
    try:
        values = _values(
            update.weights, task.weights, layout, weight, config.strategy.clip_norm, len(part.masking.keys)
        )
    except UpdateRefused as error:
        raise ModelError.told(str(error)) from None
    asked = _asked(task, part)
    left = hashlib.sha256(values.data).hexdigest()
    part.record.note_masked(part.masking.attempt, sites=part.sites, asked=asked, values=left)
    for seed, sign in masks_of(part.name, part.pairs, asked):
        add_mask_(values, seed, sign)
    return replace(update, weights=None, masked=values)


def seeds_for(part: Part, *, fewest: int = 0) -> dict[str, Scalar]:
    """What a site gives to open a sum that its update is in: for every other site a piece or a mask, never both.

    Of a site that is gone it also gives the piece of its own seed that only these two know.

    Args:
        part: of the site in the sum, whose `masking.joined` says who came.
        fewest: sites that the hospital wants in a sum.

    Raises:
        PolicyRefused: it is in no such sum, it is of too few sites, or it was opened otherwise before.
    """
    joined, pairs = sorted(set(part.masking.joined)), part.pairs
    if part.name not in joined or not set(joined) <= set(part.masking.keys):
        raise PolicyRefused("this site has no update in that sum", rule="secure-sum.once")
    _require_enough(joined, fewest)
    asked = part.record.note_opened(part.masking.attempt, part.sites, joined)
    gone = pairs.keys() - set(joined)
    seeds = {
        "pieces": {name: own_piece(pairs[name], asked, name).hex() for name in joined if name != part.name},
        "masks": {name: mask_seed(pairs[name], asked).hex() for name in gone},
        "own": {name: own_piece(pairs[name], asked, part.name).hex() for name in gone},
    }
    return {"seeds": json.dumps(seeds, sort_keys=True)}


def _require_enough(sites: Collection[str], fewest: int) -> None:
    fewest = max(FEWEST, fewest)
    if len(sites) < fewest:
        text = f"a secure sum of {len(sites)} sites; at least {fewest} are to hide in it (policy.training.min-sites)"
        raise PolicyRefused(text, rule="secure-sum.sites")


def _asked(task: Task, part: Part) -> str:
    """SHA-256 over all that a task asks, network included, and who else is asked."""
    facts = {
        "round": task.round,
        "attempt": part.masking.attempt,
        "sites": part.sites,
        "settings": task.settings,
        "layout": task.layout,
        "run": task.run,
        "learning-rate-factor": task.learning_rate_factor,
        "centres": list(task.centres),
        "evaluate": task.evaluate,
        "vectors": sorted(task.vectors),
        "counted": dict(task.counted),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    vectors = (task.vectors[name] for name in sorted(task.vectors))
    for vector in (task.weights.parameters, task.weights.buffers, *vectors):
        digest.update(vector.size.to_bytes(8, "big"))
        digest.update(np.ascontiguousarray(vector).data)
    return digest.hexdigest()


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


def _signed(run: str, site: str, key: str) -> bytes:
    return canonical({"kind": "fedmed masking key", "run": run, "site": site, "key": key}).encode()


def _signed_by(public: str, message: bytes, signature: str) -> bool:
    try:
        return signed_by(bytes.fromhex(public), message, bytes.fromhex(signature))
    except ValueError:
        return False
