"""Which number format activations take on the machine at hand."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "auto"]


def in_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether the forward and backward pass run under bfloat16 autocast."""
    return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device.type))


@lru_cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device has units for bfloat16: an NVIDIA GPU since 2020, an Intel CPU with AMX since 2023.

    Elsewhere torch emulates the format, which is slower than float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
