"""The federation: the one way in behind `fedmed simulate`, `flwr run` and a real deployment."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedmed.config import RunConfig
from fedmed.errors import FedmedError, RunFailed, plain_reason
from fedmed.federated.progress import Progress
from fedmed.federated.result import Status, build_result, peak_memory_mib
from fedmed.federated.rounds import Rounds, Watch
from fedmed.federated.run_folder import RunFolder
from fedmed.models.low_rank import require_trunk


def run_federation(
    grid: Grid,
    config: RunConfig,
    folder: RunFolder,
    *,
    watch: Watch = lambda event: None,
    cache_dir: Path | None = None,
    processes: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Run a federation over any Flower `Grid` and write its run folder.

    A folder that holds a checkpoint of the same run is continued after it; its result then counts the whole run.

    Args:
        grid: how sites are reached.
        config: the run, with every path absolute.
        folder: where everything is written.
        watch: called with every event.
        cache_dir: where the server keeps its decoded images.
        processes: workers whose memory counts as this run's.

    Returns:
        The content of `result.json`. Its status is `paused` when a quorum was missed.

    Raises:
        FedmedError: the run cannot go on; `result.json` says `failed` and why.
        KeyboardInterrupt, SystemExit: the user or the server stopped it; `result.json` says `failed`.
        OSError: the disk is full or gone.
    """
    started = time.perf_counter()
    status: Status = "failed"
    reason: str | None = None
    rounds: Rounds | None = None
    folder.event("run_started", 0, name=config.name)
    try:
        require_trunk(config.model)
        rounds = Rounds(grid, config, folder, watch, cache_dir)
        status, reason = rounds.run()
    except KeyboardInterrupt:
        reason = "interrupted by the user"
        raise
    except SystemExit:  # Flower's answer to a signal
        reason = "its process was ended from outside: the run was stopped, or the server ended"
        raise
    except FedmedError as error:
        reason = str(error) if isinstance(error, RunFailed) else _servers_own(error)
        raise
    except OSError as error:
        reason = plain_reason(error)
        raise
    finally:
        result = build_result(
            config,
            rounds.progress if rounds else Progress(),
            rounds.members if rounds else [],
            run_id=folder.path.name,
            status=status,
            reason=reason or (None if status != "failed" else "an unexpected error; see the terminal"),
            server_metrics=rounds.server_metrics if rounds else {},
            site_metrics=rounds.site_metrics if rounds else {},
            total_s=rounds.total_s if rounds else time.perf_counter() - started,
            peak_mib=peak_memory_mib(processes),
            central=_central_privacy(rounds),
        )
        result["sites"] = _with_earlier(result["sites"], folder)
        with suppress(OSError):  # on a full disk the first error is the one to tell
            folder.write_json("result.json", result)
            watch(folder.event("run_finished", result["rounds"], status=status, reason=result["reason"]))
        folder.close()
    return result


def _servers_own(error: FedmedError) -> str:
    """What the raiser lets everybody know; not the sentence of the error's class, which is about a site."""
    unknown = f"the server could not go on ({type(error).__name__}); its terminal or log says why"
    return str(vars(error).get("public", unknown))


def _with_earlier(sites: list[dict[str, Any]], folder: RunFolder) -> list[dict[str, Any]]:
    """The sites of a result, and those of the same run's earlier processes that have not come back, with their ε.

    An ε only rises: where a checkpoint is older than what a site said, the site's word stays.
    """
    found: dict[str, dict[str, Any]] = {}
    with suppress(OSError, ValueError, KeyError):  # the first process of the run
        told = json.loads((folder.path / "result.json").read_text(encoding="utf-8"))["sites"]
        found = {site["site"]: site for site in told}
    for site in sites:
        said = [site["privacy"], found.get(site["site"], {}).get("privacy")]
        found[site["site"]] = {**site, "privacy": max(said, key=_epsilon)}
    return [found[name] for name in sorted(found)]


def _epsilon(privacy: dict[str, Any] | None) -> float:
    if privacy is None:
        return -1.0
    return math.inf if privacy["epsilon"] is None else float(privacy["epsilon"])


def _central_privacy(rounds: Rounds | None) -> dict[str, Any] | None:
    """What the server's noise has cost every site, from the record of all processes of the run; None without any."""
    if rounds is None or rounds.noise is None:
        return None
    with suppress(FedmedError):  # a damaged record, which the run's own error tells
        return rounds.noise.facts()
    return None
