"""Norms from products of positions with positions, rounded up: no rounding may hide a gradient from the clipping."""

from __future__ import annotations

import torch
from torch import Tensor

IN_A_ROW = 512  # terms that a matrix product adds one after the other before it begins a new block
BESIDES = 64  # roundings of what follows: the patches of a window, and the sum over pairs of positions


def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (n, …) whose largest number is 1, so that no square of it is lost; and what that was, (n,)."""
    scale = rows.flatten(1).abs().amax(1).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows / scale.view(-1, *[1] * (rows.dim() - 1)), scale


def squares_above(of_inputs: Tensor, of_gradients: Tensor, *, depths: tuple[int, int]) -> Tensor:
    """(n,) upper bounds of ⟨A, B⟩, the squared norm of Σ_t g_t x_tᵀ, for A = X Xᵀ and B = G Gᵀ, each (n, T, T).

    Terms of both signs may cancel, and what is left is then rounding: inputs with a large mean before gradients that
    add up to nothing. Every entry of A is within γ ‖x_t‖ ‖x_s‖ of what it should be (Higham 2002, Accuracy and
    Stability of Numerical Algorithms, section 3.1), so the sum is within γ (Σ_t ‖x_t‖ ‖g_t‖)². That much is added.
    The gradient that is summed later is rounded too, by γ Σ_t ‖x_t‖ ‖g_t‖, which is then at most √γ of the bound.
    Added as well is what squares of small numbers lose by underflow, T² times the terms of a product times the
    smallest float.

    Args:
        of_inputs: A, of inputs up to 1 in size (`scaled`).
        of_gradients: B, likewise.
        depths: numbers of terms of the products in A and in B.
    """
    size, kind = of_inputs[0].numel(), torch.finfo(of_inputs.dtype)
    squares = torch.bmm(of_inputs.reshape(-1, 1, size), of_gradients.reshape(-1, size, 1)).flatten()
    lengths = (of_inputs.diagonal(dim1=1, dim2=2) * of_gradients.diagonal(dim1=1, dim2=2)).clamp(min=0).sqrt().sum(1)
    terms = sum(min(depth, IN_A_ROW) for depth in depths) + BESIDES
    lost = 4.0 * size * depths[0] * depths[1] * kind.tiny
    return squares.clamp(min=0) + terms * kind.eps / 2 * lengths**2 + lost
