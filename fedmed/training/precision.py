"""Which number format activations take on the machine at hand."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "auto"]


def settled(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The format that "auto" stands for on this device."""
    if precision == "auto":
        return "bfloat16" if multiplies_bfloat16(device.type) else "float32"
    return precision


@lru_cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device has units for bfloat16: an NVIDIA GPU since 2020, an Intel CPU with AMX since 2023.

    Elsewhere torch emulates the format, which is slower than float32.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
