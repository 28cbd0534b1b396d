"""A private training step by fedmed's clipping engine and by Opacus' four, beside a plain step of the same network.

    python benchmarks/dp_step.py                     # all of it, about an hour; run nothing beside it
    python benchmarks/dp_step.py --networks chexnet --sides 64 --repeats 15

A step is forward, loss, backward, clipping, noise and SGD; the plain one has neither clipping nor noise. That of fedmed
is training's own, with losses taken image by image and noise from AES; those of Opacus have PyTorch's noise. Every
engine works in a process of its own on one thread, and they take turns, so that a busy machine slows all of them. The
figures are CPU seconds: medians over the turns, and medians of the ratios to the plain step of the same turn. Memory is
the growth of the process's peak over its first steps. The error is the distance of the clipped sum of four images, in
float64, from that of a loop over single images. The table is printed, and written to benchmarks/dp_step.md when all
works are run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from fedmed.config import TrainConfig
from fedmed.models.attention_unet import attention_unet
from fedmed.models.chexnet import chexnet
from fedmed.models.cnn_lstm import cnn_lstm
from fedmed.models.deepmedic import deepmedic
from fedmed.models.resnet50 import resnet50
from fedmed.models.small_cnn import small_cnn
from fedmed.models.unet import unet
from fedmed.models.vgg16 import vgg16
from fedmed.privacy.noise import SecureGenerator
from fedmed.training.clipping import GradientClipper
from fedmed.training.network import FlatNetwork
from fedmed.training.private import Physical, PrivateGradient
from fedmed.training.terms import Terms

HERE = Path(__file__).parent
BATCH, LABELS, MAX_NORM, NOISE, SLICES = 16, 14, 1.0, 1.0, 8
OURS, GROUPED = "fedmed", "fedmed, 4 images a patient"
ENGINES = ["plain", OURS, GROUPED, "hooks", "functorch", "ghost"]


class Block(BasicBlock):
    """torchvision's, whose addition in place Opacus' hooks do not survive."""

    def forward(self, maps: Tensor) -> Tensor:
        new = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        return F.relu(new + (maps if self.downsample is None else self.downsample(maps)))


def resnet18() -> nn.Module:
    network = ResNet(Block, [2, 2, 2, 2], num_classes=LABELS, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    network.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    network.relu = nn.ReLU()
    return network


@dataclass(frozen=True, kw_only=True)
class Work:
    """A network, and whether it labels pixels or reads series of slices."""

    make: Callable[[], nn.Module]
    pixels: bool = False
    series: bool = False
    bar: float | None = None  # at 64 px, of the ratio with noise


WORKS = {
    "chexnet": Work(make=lambda: chexnet(in_channels=1, norm="group"), bar=1.6),
    "resnet18": Work(make=resnet18, bar=1.75),
    "resnet50": Work(make=lambda: resnet50(in_channels=1, outputs=LABELS, norm="group"), bar=1.75),
    "vgg16, width 16": Work(make=lambda: vgg16(in_channels=1, outputs=LABELS, norm="group", width=16)),
    "unet, width 16": Work(make=lambda: unet(outputs=1, norm="group", width=16), pixels=True, bar=1.25),
    "attention-unet": Work(make=lambda: attention_unet(outputs=1, norm="group"), pixels=True),
    "deepmedic, 2D": Work(make=lambda: deepmedic(outputs=1, norm="group", dimensions=2), pixels=True),
    "small-cnn": Work(make=lambda: small_cnn(outputs=LABELS, norm="group")),
    "cnn-lstm": Work(make=lambda: cnn_lstm(outputs=LABELS, norm="group"), series=True),
}


def per_image(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").flatten(1).mean(1)


class Criterion(nn.Module):
    """The form in which Opacus' ghost mode takes a loss."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = per_image(outputs, targets)
        return losses if self.reduction == "none" else losses.mean()


def prepared(name: str, side: int, rows: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in training mode, drawing nothing; images and targets."""
    torch.manual_seed(0)
    work = WORKS[name]
    network = work.make().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    images = torch.randn(rows, 1, *([SLICES] if work.series else []), side, side)
    targets = (torch.rand(images.shape if work.pixels else (rows, LABELS)) < 0.2).float()
    return network, images, targets


def step_of(engine: str, network: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], None]:
    """One optimizer step of an engine."""
    plain = torch.optim.SGD(network.parameters(), lr=1e-3)
    if engine == "plain":

        def step() -> None:
            plain.zero_grad()
            per_image(network(images), targets).mean().backward()
            plain.step()

    elif engine.startswith(OURS):
        whole = FlatNetwork(network, torch.device("cpu"))
        plain = torch.optim.SGD(network.parameters(), lr=1e-3)
        each = 4 if engine == GROUPED else 1  # images of a patient
        rows, patients = np.arange(len(images)), len(images) // each
        terms = Terms(
            unit="patient", units=10 * patients, expected_batch=patients, steps=1, noise_multiplier=NOISE,
            max_grad_norm=MAX_NORM, images_per_patient=each, augmentations=1, physical_batch=len(images),
        )  # fmt: skip
        sampled = Physical(
            rows=rows, keys=rows, copies=0 * rows, units=rows // each, weights=np.full(len(rows), 1 / each, np.float32)
        )
        gradient_ = PrivateGradient(whole, TrainConfig(precision="float32"), Criterion(), terms, SecureGenerator())

        def step() -> None:
            gradient_([(sampled, images, targets)])
            plain.step()

    else:
        made = PrivacyEngine(accountant="rdp").make_private(
            module=network, optimizer=plain, criterion=Criterion(), noise_multiplier=NOISE, max_grad_norm=MAX_NORM,
            data_loader=DataLoader(TensorDataset(images, targets), batch_size=len(images)), poisson_sampling=False,
            grad_sample_mode=engine,
        )  # fmt: skip
        private, wrapped = made[0], made[1]
        loss = made[2] if engine == "ghost" else Criterion()

        def step() -> None:
            wrapped.zero_grad()
            loss(private(images), targets).backward()
            wrapped.step()

    return step


def serve(name: str, side: int, engine: str) -> None:
    """Be an engine's process: a line in is a step, a line out its CPU seconds and the peak so far in MiB."""
    warnings.simplefilter("ignore")  # Opacus' advice about hooks and secure generators
    torch.set_num_threads(1)
    network, images, targets = prepared(name, side, BATCH)
    step = step_of(engine, network, images, targets)
    before = peak_kib()
    for _ in sys.stdin:
        started = time.process_time()
        step()
        cpu = time.process_time() - started
        print(json.dumps([cpu, (peak_kib() - before) / 1024]), flush=True)


def peak_kib() -> int:
    """The most memory that this process has had; `ru_maxrss` would begin with that of the process that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def error_of(name: str, side: int) -> float:
    """Relative distance of the clipped sum of four images from a loop over them, in float64."""
    network, images, targets = prepared(name, side, 4)
    network, images, targets = network.double(), images.double(), targets.double()
    parameters = list(network.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for row in range(len(images)):
        found = torch.autograd.grad(per_image(network(images[row, None]), targets[row, None]).sum(), parameters)
        norm = float(torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt())
        for all_rows, gradient in zip(total, found, strict=True):
            all_rows += gradient * min(1.0, MAX_NORM / norm)
    GradientClipper(network, max_norm=MAX_NORM).accumulate_(per_image, images, targets, torch.arange(len(images)))
    apart = sum(float((p.grad - t).square().sum()) for p, t in zip(parameters, total, strict=True))
    return (apart / sum(float(t.square().sum()) for t in total)) ** 0.5


class Engine:
    """One engine's process."""

    def __init__(self, name: str, side: int, engine: str) -> None:
        command = [sys.executable, __file__, "--serve", name, str(side), engine]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.seconds: list[float] = []
        self.peak_mib, self.failure = 0.0, ""
        self.warm = self.step() is not None  # the first step takes memory and chooses algorithms
        self.seconds.clear()

    def step(self) -> float | None:
        if self.failure or self.process.stdin is None or self.process.stdout is None:
            return None
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            seconds, self.peak_mib = json.loads(self.process.stdout.readline())
        except (ValueError, BrokenPipeError):
            lines = (self.process.communicate()[1] or "").strip().splitlines()
            self.failure = lines[-1][:90] if lines else f"ended with {self.process.returncode}"
            return None
        self.seconds.append(seconds)
        return float(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.communicate()


def rows(name: str, side: int, repeats: int, engines: list[str]) -> list[str]:
    """The lines of the table for one network and size."""
    running = {engine: Engine(name, side, engine) for engine in engines}
    for _ in range(repeats):
        for engine in running.values():
            engine.step()
    for engine in running.values():
        engine.close()
    plain, found = running["plain"], []
    error = f"{error_of(name, side):.0e}" if OURS in running else "–"
    bar = WORKS[name].bar if side == 64 else None
    for label, engine in running.items():
        start = f"| {name} | {side} | {label} |"
        if engine.failure:
            found.append(f"{start} – | – | – | – | – | {engine.failure.replace('|', '/')} |")
            continue
        ratios = [mine / theirs for mine, theirs in zip(engine.seconds, plain.seconds, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        passed = "" if bar is None or label != OURS else f"≤ {bar}: {'yes' if ratio <= bar else 'no'}"
        found.append(
            f"{start} {statistics.median(engine.seconds):.3f} | {ratio:.2f} ({low:.2f}-{high:.2f}) | "
            f"{engine.peak_mib:.0f} | {times(engine.peak_mib, plain.peak_mib)} | {error if label == OURS else '–'} | "
            f"{passed} |"
        )
    return found


def times(peak_mib: float, plain_mib: float) -> str:
    """A ratio of memory; none where the plain step fits into what the imports had left."""
    return f"{peak_mib / plain_mib:.2f}" if plain_mib >= 1 else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--sides", nargs="+", type=int, default=[64, 224])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--serve", nargs=3, metavar=("NETWORK", "SIDE", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, side, engine = options.serve
        serve(name, int(side), engine)
        return
    torch.set_num_threads(1)
    engines = ["plain", *(engine for engine in options.engines if engine != "plain")]
    head = (
        "| network | px | engine | CPU s a step | of plain (middle half) | peak MiB | of plain | float64 error | |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    print(head, flush=True)
    table = []
    for side in options.sides:
        for name in options.networks:
            for line in rows(name, side, options.repeats, engines):
                print(line, flush=True)
                table.append(line)
    if options.networks == list(WORKS) and options.sides == [64, 224] and engines == ENGINES:
        text = (
            "# A private training step\n\n"
            f"`{' '.join(['python benchmarks/dp_step.py', *sys.argv[1:]])}` on {time.strftime('%Y-%m-%d')}, "
            f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, one thread an engine, "
            f"batch {BATCH}, noise included, {options.repeats} repeats, engines in turn. `hooks`, `functorch` and "
            "`ghost` are Opacus'.\n\n"
        )
        (HERE / "dp_step.md").write_text(text + "\n".join([head, *table]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
