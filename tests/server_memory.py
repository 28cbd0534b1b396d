"""By how much a round of heavy networks raises the server's peak of memory, in a process that has done nothing else.

python tests/server_memory.py RUN SITES     # one JSON object: who joined, and how many MiB
"""

import json
import sys
from pathlib import Path

from conftest import toy_run

from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import local_grid, run_on


def peak_mib() -> int:
    """Of this program alone: `ru_maxrss` would count what the process was before it became this program."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def main(path: str, sites: str) -> None:
    config = toy_run(
        *(f"s{number:02d}-4" for number in range(int(sites))),
        model={"name": "toy:heavy", "width": 2000},
        train={"rounds": 1, "optimizer": "sgd"},
    )
    folder = RunFolder.create(Path(path), config)
    with local_grid(config, folder) as grid:
        before = peak_mib()
        result = run_on(grid, config, folder, lambda event: None)
    print(json.dumps({"joined": len(result["rounds_log"][0]["joined"]), "mib": peak_mib() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
