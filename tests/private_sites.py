"""A virtual hospital with a policy and records of its own, what it is asked, and ε by another accountant."""

from pathlib import Path

import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from fedmed.models import build
from fedmed.privacy.verification import examine
from fedmed.training.network import FlatNetwork
from fedmed.training.oversight import Oversight
from fedmed.training.site import Site, settings_for_sites
from fedmed.types import Task


def site_in(folder: Path, policy: str | None = None, *, name: str = "a-400", **changes) -> Site:
    """The toy hospital `name`, whose keys, records and state lie in `folder`, under the rules of a `site.toml`."""
    folder.mkdir(exist_ok=True)
    rules = None
    if policy is not None:
        rules = folder / "site.toml"
        rules.write_text(policy)
    oversight = Oversight(policy=rules, folder=folder, keys=folder / "keys")
    values = {
        "name": name,
        "manifest": Path(name),
        "dataset": "toy:dataset",
        "state_dir": folder,
        "oversight": oversight,
    }
    return Site(**{**values, "virtual": True, **changes})


def network_of(config) -> FlatNetwork:
    return FlatNetwork(build(config.model, outputs=2, seed=config.seed), torch.device("cpu"))


def task_of(config, kind: str, round: int, **changes) -> Task:
    network = network_of(config)
    values = {"settings": settings_for_sites(config), "layout": network.layout.hash, "weights": network.weights()}
    return Task(**{**values, "kind": kind, "round": round, **changes})


def records_of(site: Site):
    folder = site.oversight.folder
    return examine(folder, bytes.fromhex((folder / "keys" / "site.pub").read_text()))


def pld(events, delta: float) -> float:
    """ε by dp-accounting's privacy loss distributions."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        step = PoissonSampledDpEvent(event["sample_rate"], GaussianDpEvent(event["noise_multiplier"]))
        accountant.compose(SelfComposedDpEvent(step, event["steps"]))
    return accountant.get_epsilon(delta)
