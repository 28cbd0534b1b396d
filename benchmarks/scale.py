"""Many virtual hospitals in one round: the peak memory of the whole process tree, and what lies on disk.

    .venv/bin/python benchmarks/scale.py                    # 1,000 hospitals of DenseNet-121, minutes
    .venv/bin/python benchmarks/scale.py --sites 50 --sites 100

Every hospital trains one step of two images of 32 pixels: the point is the number of networks that come back, not the
work. Memory is the sum of proportional set sizes, read five times a second. The table goes to benchmarks/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from engine import memory_mib

from fedmed.config import RunConfig
from fedmed.imaging.dataset import Dataset

HERE = Path(__file__).parent
LIMIT_MIB = 4096


def dataset(reference: Path, config: RunConfig) -> Dataset:
    """Two random images of one hospital."""
    rng = np.random.default_rng(int(reference.name.rpartition("-")[2]))
    images = rng.standard_normal((2, 1, 32, 32), dtype=np.float32)
    return Dataset(images=images, targets=rng.integers(0, 2, (2, 1)).astype(np.float32), patients=("a", "b"))


def measured(sites: int, folder: Path) -> dict[str, float]:
    names = ", ".join(f'"h-{number:04d}"' for number in range(sites))
    (folder / "run.toml").write_text(
        f"""
[model]
name = "work:densenet121"
[task]
labels = ["a"]
[data]
dataset = "scale:dataset"
sites = [{names}]
[train]
rounds = 1
local-steps = 1
batch-size = 2
optimizer = "sgd"
[evaluate]
site-share = 0.0
[simulation]
device = "cpu"
""",
        encoding="utf-8",
    )
    out = folder / f"run-{sites}"
    command = [sys.executable, "-m", "fedmed", "simulate", str(folder / "run.toml"), "--quiet", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "FLWR_TELEMETRY_ENABLED": "0"}
    peak = disk = 0.0
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as child:
        while child.poll() is None:
            peak = max(peak, memory_mib(child.pid))
            if (out / "spool").exists():
                disk = max(disk, spooled_mib(out / "spool"))
            time.sleep(0.2)
    if child.returncode:
        sys.exit(f"{sites} hospitals failed")
    result = json.loads((out / "result.json").read_text())
    joined = len(result["rounds_log"][0]["joined"])
    if joined != sites:
        sys.exit(f"{joined} of {sites} hospitals took part")
    return {"peak": peak, "disk": disk, "wall": time.perf_counter() - started}


def spooled_mib(spool: Path) -> float:
    total = 0
    for entry in os.scandir(spool):
        try:
            total += entry.stat().st_blocks * 512
        except OSError:  # removed at the end of the run, while it is looked at
            continue
    return total / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, action="append", help="default: 50 and 1000")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedmed-scale-") as temporary:
        for sites in given.sites or [50, 1000]:
            figures = measured(sites, Path(temporary))
            rows.append(f"| {sites} | {figures['peak']:.0f} | {figures['disk']:.0f} | {figures['wall']:.0f} |")
            print(rows[-1], file=sys.stderr, flush=True)
            if figures["peak"] > LIMIT_MIB:
                sys.exit(f"{figures['peak']:.0f} MiB, above {LIMIT_MIB}")
    text = (
        "# Many hospitals on one machine\n\n"
        f"`{' '.join(['python benchmarks/scale.py', *sys.argv[1:]])}` on {time.strftime('%Y-%m-%d')}, "
        f"{os.cpu_count()} cores, as many workers, no GPU. DenseNet-121 (28 MB), one round of one step at every "
        f"hospital. The bar is {LIMIT_MIB} MiB.\n\n"
        "| hospitals | peak of the process tree, MiB (PSS) | largest spool on disk, MiB | whole command, s |\n"
        "|---|---|---|---|\n" + "\n".join(rows)
    )
    print(text)
    if given.sites is None:
        (HERE / "scale.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
