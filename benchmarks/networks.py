"""A training step of fedmed's networks beside torchvision's (and MONAI's, if installed) of the same architecture.

    python benchmarks/networks.py [--networks resnet50 …] [--sides 64 224] [--repeats 15]

Both sides hold equal weights, which is checked by their outputs first, and take turns, so that a busy machine slows
both. A step is forward, loss and backward; the optimizer is the same for both and left out. The figures are CPU
seconds of the one thread that works: the median over the turns, and the median of the ratios of neighbouring turns with
the range of its middle half. The verdict is "unclear" where that ratio and the one of the two medians lie on different
sides of the bar: there the machine decides. The last column is our step with `train.channels-last = true`,
as a ratio to our step without. The table is printed, and written to benchmarks/networks.md when all of it is run.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from fedmed.models.chexnet import chexnet
from fedmed.models.resnet50 import resnet50
from fedmed.models.vgg16 import vgg16
from fedmed.training.network import channels_innermost

BAR = 1.05
LABELS = 14
BATCH = {64: 8, 224: 2}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One architecture, written twice."""

    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    peer: str = "torchvision"


PAIRS = {
    "chexnet": Pair(
        ours=lambda: chexnet(outputs=LABELS, norm="batch"),
        theirs=lambda: torchvision.models.densenet121(num_classes=LABELS),
    ),
    "resnet50": Pair(
        ours=lambda: resnet50(outputs=LABELS, norm="batch"),
        theirs=lambda: torchvision.models.resnet50(num_classes=LABELS),
    ),
    "vgg16": Pair(
        ours=lambda: vgg16(outputs=LABELS, norm="none"),
        theirs=lambda: torchvision.models.vgg16(num_classes=LABELS),
    ),
}
if find_spec("monai"):
    PAIRS["chexnet (monai)"] = Pair(
        ours=lambda: chexnet(outputs=LABELS, norm="batch"), theirs=lambda: monai_densenet(), peer="MONAI"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--sides", nargs="+", type=int, default=list(BATCH))
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        f"| network | px | batch | peer | peer ms | fedmed ms | ratio | middle half | ≤ {BAR} | channels last |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name in given.networks:
        for side in given.sides:
            lines.append(row(name, side, given.repeats))
            print(lines[-1], flush=True)
    if given.networks == list(PAIRS) and given.sides == list(BATCH):
        head = (
            "# A training step of single networks\n\n"
            f"`python benchmarks/networks.py` on {time.strftime('%Y-%m-%d')}, one thread of {platform.machine()}, no "
            f"GPU, float32, {given.repeats} turns. CPU milliseconds of forward, loss and backward, "
            "the median over the turns; `ratio` is the median of the ratios of neighbouring turns. "
            '"unclear": the ratio of the two medians lies on the other side of the bar.\n\n'
        )
        Path(__file__).with_suffix(".md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def row(name: str, side: int, repeats: int) -> str:
    """Times one architecture at one size, and returns its line of the table."""
    pair, batch = PAIRS[name], BATCH.get(side, 2)
    ours, theirs = equal_networks(pair)
    images, targets = torch.randn(batch, 3, side, side), (torch.rand(batch, LABELS) < 0.1).float()
    ordered = channels_innermost(images)
    mine: list[float] = []
    other: list[float] = []
    last: list[float] = []
    order = ((ours, images, mine), (theirs, images, other), (ours, ordered, last))
    for network, given, _ in order:  # warm up: memory, and the choice of algorithms
        step(network, given, targets)
    gc.disable()
    for turn in range(repeats):
        for network, given, times in order if turn % 2 else reversed(order):
            times.append(step(network, given, targets))
    gc.enable()
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    theirs_ms, ours_ms = (1000 * statistics.median(times) for times in (other, mine))
    cells = [
        name,
        side,
        batch,
        pair.peer,
        f"{theirs_ms:.1f}",
        f"{ours_ms:.1f}",
        f"{ratio:.3f}",
        f"{low:.3f}-{high:.3f}",
        verdict(theirs_ms, ours_ms, ratio),
        f"{statistics.median(a / b for a, b in zip(last, mine, strict=True)):.2f}",
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def verdict(theirs_ms: float, ours_ms: float, ratio: float) -> str:
    """Whether a ratio, the median of those of neighbouring turns, keeps within the bar; both medians must agree."""
    within = {ratio <= BAR, ours_ms / theirs_ms <= BAR}
    return "unclear" if len(within) > 1 else "yes" if within == {True} else "no"


def step(network: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Returns the CPU seconds of one forward, loss and backward."""
    network.zero_grad(set_to_none=True)
    started = time.process_time()
    nn.functional.binary_cross_entropy_with_logits(network(images), targets).backward()
    return time.process_time() - started


def equal_networks(pair: Pair) -> tuple[nn.Module, nn.Module]:
    """Returns both with the same weights, in training mode; stops if their outputs differ."""
    ours, theirs = pair.ours(), pair.theirs()
    tensors = list(theirs.state_dict().values())  # MONAI has other names in the same order
    ours.load_state_dict(dict(zip(ours.state_dict(), tensors, strict=True)))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-3, atol=1e-4)
    return ours.train(), theirs.train()


def monai_densenet() -> nn.Module:
    from monai.networks.nets import DenseNet121  # seconds of imports

    return DenseNet121(spatial_dims=2, in_channels=3, out_channels=LABELS)


if __name__ == "__main__":
    main()
