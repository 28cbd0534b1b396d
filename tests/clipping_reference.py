"""Clipped gradient sums by a loop over single images: what the engine has to equal."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def per_sample_reference(
    module: nn.Module,
    loss: Callable[..., Tensor],
    images: Tensor,
    targets: Tensor,
    patients: Tensor,
    weights: Tensor,
    bounds: Mapping[str, float],
) -> tuple[dict[str, Tensor], Tensor]:
    """(clipped sum of every trainable parameter, norms (P, groups)); `bounds` by the beginning of names."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    norms = []
    for patient in range(int(patients.max()) + 1):
        mine = {name: torch.zeros_like(p) for name, p in trained.items()}
        for row in (patients == patient).nonzero().flatten():
            value = weights[row] * loss(module(images[row, None]), targets[row, None])[0]
            found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, found, strict=True):
                mine[name] += 0 if gradient is None else gradient
        squares = {b: sum(g.square().sum() for n, g in mine.items() if n.startswith(b)) for b in bounds}
        norms.append(torch.stack([torch.as_tensor(s).sqrt().detach() for s in squares.values()]))
        for name in trained:
            beginning = next(b for b in bounds if name.startswith(b))
            norm = float(squares[beginning]) ** 0.5
            total[name] += mine[name] * min(1.0, bounds[beginning] / norm if norm else 1.0)
    return total, torch.stack(norms)


def squares_of(outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """(n,) a loss that every output and the targets enter."""
    several = (outputs,) if isinstance(outputs, Tensor) else outputs
    shift = targets.flatten(1).mean(1)
    return sum(((o.flatten(1) - shift[:, None]).square().mean(1) for o in several), torch.zeros_like(shift))


def assert_clipped(
    module: nn.Module,
    clipped_norms: Tensor,
    expected: tuple[dict[str, Tensor], Tensor],
    *,
    tolerance: float = 1e-12,
) -> None:
    """Relative Euclidean distance of the sums and of the norms."""
    sums, norms = expected
    size = sum(float(g.square().sum()) for g in sums.values()) ** 0.5
    apart = sum(float((module.get_parameter(name).grad - g).square().sum()) for name, g in sums.items()) ** 0.5
    assert size > 0
    assert apart <= tolerance * size
    torch.testing.assert_close(clipped_norms.reshape(norms.shape), norms, rtol=tolerance, atol=tolerance * size)
