"""Which number format activations take on the machine at hand."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16", "auto"]


def settled(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The format that "auto" stands for on this device."""
    if precision == "auto":
        return "bfloat16" if multiplies_bfloat16(device.type) else "float32"
    return precision


def in_float32(outputs: Any) -> Any:
    """A network's outputs in float32 at least, as a loss in bfloat16 would round what it sums."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype is torch.bfloat16 else outputs
    if isinstance(outputs, tuple | list):
        return type(outputs)(in_float32(output) for output in outputs)
    return outputs


@lru_cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device has units for bfloat16: an NVIDIA GPU since 2020, an Intel CPU with AMX since 2023.

    Elsewhere torch emulates the format, which is slower than float32.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
