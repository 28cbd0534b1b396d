"""What dropping out costs: every site misses each round with some chance, from none to one half.

    .venv/bin/python benchmarks/dropout.py                  # minutes

The built-in phantom hospitals train a small network; only the chance differs between rows. A site drops out by a failed
answer, in the same rounds whenever the command is repeated; one site always answers. The table goes to
benchmarks/dropout.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedmed.config import RunConfig, validate
from fedmed.federated.local_grid import LocalGrid
from fedmed.federated.phantoms import with_phantoms
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import local_grid, run_on

HERE = Path(__file__).parent
CHANCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def run_of(rounds: int) -> RunConfig:
    return with_phantoms(
        validate(
            {
                "model": {"name": "small-cnn", "norm": "batch"},
                "task": {"labels": ["nodule", "cavity", "reticulation", "consolidation"]},
                "train": {"rounds": rounds, "local-epochs": 2},
                "strategy": {"min-sites": 1, "lost-after": 0},
                "evaluate": {"keep": "last", "bootstrap": 200},
                "simulation": {"device": "cpu"},
            }
        )
    )


def drops(chance: float, round: str, node: int) -> bool:
    digest = hashlib.sha256(f"{round}/{node}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < chance


def with_dropouts(grid: LocalGrid, chance: float) -> None:
    """Send some training messages to an app that is not there."""
    push = grid.push_messages

    def losing(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        trains = [message.metadata for message in messages if message.metadata.message_type == "train"]
        lost = [each for each in trains if drops(chance, each.group_id, each.dst_node_id)]
        for metadata in lost[: len(trains) - 1]:  # a round that nobody answers would pause the run
            metadata.__dict__["_message_type"] = "train.nobody"
        return push(messages)

    grid.push_messages = losing  # type: ignore[method-assign]


def row(chance: float, result: dict[str, Any]) -> str:
    metric = result["server"]["metrics"]["auroc"]
    joined = sum(len(entry["joined"]) for entry in result["rounds_log"])
    asked = joined + sum(len(entry["failed"]) for entry in result["rounds_log"])
    interval = f"{metric['value']:.3f} ({metric['low']:.3f}-{metric['high']:.3f})"
    return f"| {100 * chance:.0f} % | {joined} of {asked} | {result['rounds']} | {result['status']} | {interval} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    config, rows = run_of(given.rounds), []
    with tempfile.TemporaryDirectory(prefix="fedmed-dropout-") as temporary:
        for chance in CHANCES:
            folder = RunFolder.create(Path(temporary) / str(chance), config)
            child = os.fork()  # a process for each run: workers are forked from one without threads
            if child == 0:
                with local_grid(config, folder) as grid:
                    with_dropouts(grid, chance)
                    result = run_on(grid, config, folder, lambda event: None)
                (folder.path / "row").write_text(row(chance, result), encoding="utf-8")
                os._exit(0)
            os.waitpid(child, 0)
            rows.append((folder.path / "row").read_text(encoding="utf-8"))
            print(rows[-1], file=sys.stderr, flush=True)
    text = (
        "# Sites that drop out\n\n"
        f"`{' '.join(['python benchmarks/dropout.py', *sys.argv[1:]])}` on {time.strftime('%Y-%m-%d')}: four phantom "
        f"hospitals, small-cnn, {given.rounds} rounds, `lost-after = 0`, the last network on the server's patients.\n\n"
        "| chance to miss a round | updates used | rounds | status | AUROC (95 %) |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows)
    )
    print(text)
    if given.rounds == 10:
        (HERE / "dropout.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
