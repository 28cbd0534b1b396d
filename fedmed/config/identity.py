"""What makes a run the run that it is, to its server and to its sites, and what may change when it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from typing import Any

ROUNDS = "train.rounds"
MAY_CHANGE = {  # how long, how patiently and on what a run goes on; not what it computes
    ROUNDS,
    "train.save-every-s",
    "data.cache-gib",
    "strategy.min-sites",
    "strategy.min-fraction",
    "strategy.required-sites",
    "strategy.round-timeout-s",
    "strategy.retries",
    "strategy.lost-after",
    "strategy.checkpoint-every",
    "strategy.keep-checkpoints",
    "evaluate.patience",
    "evaluate.bootstrap",
    "simulation.workers",
}


def may_change(values: Mapping[str, Any]) -> Set[str]:
    """The keys that a resumed run may change: not `train.rounds` where the noise follows from it and from ε.

    Args:
        values: of a run, nested by section, as `nested` gives them; sections may lack keys.
    """
    privacy = values.get("privacy", {})
    noise_from_rounds = privacy.get("mode", "none") != "none" and not privacy.get("noise-multiplier")
    return MAY_CHANGE - {ROUNDS} if noise_from_rounds else MAY_CHANGE


def run_identity(settings: str) -> str:
    """SHA-256 over all settings that a resumed run keeps, its name among them: two such runs are one to a site.

    Args:
        settings: of a task, as JSON.
    """
    values = json.loads(settings)
    for key in may_change(values):
        section, _, name = key.partition(".")
        values.get(section, {}).pop(name, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
