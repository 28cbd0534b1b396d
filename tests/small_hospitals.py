"""Hospitals of tiny pictures with a real manifest: for experiments on images that take no time."""

from pathlib import Path

import numpy as np
from PIL import Image


def hospital(folder: Path, patients: int, seed: int, header: str = "patient_id,image,a,b,sex,age") -> Path:
    """A manifest of two pictures a patient; every hospital calls its patients p0, p1, …"""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = [header]
    for number in range(2 * patients):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{number}.png")
        labels = ",".join(str(rng.integers(2)) for _ in "ab")
        lines.append(f"p{number // 2},{number}.png,{labels},{'FM'[number // 2 % 2]},{20 + number}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def lungs(folder: Path, patients: int, seed: int) -> Path:
    """A manifest of one picture and its mask a patient: what is bright."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = ["patient_id,image,mask"]
    for number in range(patients):
        pixels = rng.integers(0, 255, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(np.where(pixels > 100, 255, 0).astype(np.uint8)).save(folder / f"{number}-mask.png")
        lines.append(f"p{number},{number}.png,{number}-mask.png")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"
