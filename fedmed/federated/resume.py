"""Whether a run folder can be continued: not if it is finished, and not as another run than it was."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fedmed.config import ROUNDS, RunConfig, flatten, may_change, nested
from fedmed.durable import write_atomically
from fedmed.errors import ConfigError
from fedmed.federated.run_folder import RunFolder

RECORD = "config.json"  # in checkpoints/: a digest of every key, for run.toml can be edited and may name paths


def record(folder: RunFolder, config: RunConfig) -> None:
    """Keep a digest of every key beside the checkpoints."""
    write_atomically(folder.path / "checkpoints" / RECORD, json.dumps(_digests(config)).encode())


def take_up(folder: RunFolder, config: RunConfig) -> bool:
    """Whether there is anything left to do in a run folder.

    Returns:
        False if the run came to its end and its configuration asks for no more.

    Raises:
        ConfigError: the configuration is not the one that the run was begun with; the first such key is named.
    """
    path = folder.path / "checkpoints" / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    digests = _digests(config)
    changed = sorted(key for key, digest in digests.items() if known.get(key, digest) != digest)
    for key in sorted(set(changed) - may_change(nested(config))):
        why = "and the noise follows from it" if key == ROUNDS else "so it would be another run"
        raise ConfigError(
            f"{folder.path / 'run.toml'}: {key} is not what this run was begun with, {why}; put it back, or start a "
            "new run"
        )
    result = _result(folder)
    if not changed and result.get("status") in ("completed", "degraded"):
        folder.clear_up()
        if folder.last_event().get("kind") != "run_finished":  # killed between the result and its event
            folder.event("run_finished", result["rounds"], status=result["status"], reason=result["reason"])
            folder.close()
        return False
    record(folder, config)
    return True


def _digests(config: RunConfig) -> dict[str, str]:
    return {key: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for key, value in flatten(config).items()}


def _result(folder: RunFolder) -> dict[str, Any]:
    path = folder.path / "result.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
