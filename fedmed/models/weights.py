"""Loads local weights into a network, strictly by name. Nothing is ever downloaded or unpickled."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmed.errors import ModelError

SHOWN = 3  # mismatches that an error lists


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Copies the tensors of a file into the network of the same names and shapes.

    Args:
        network: Changed in place, and only if everything fits.
        path: A `.safetensors` file, or a `.pth` or `.pt` file that holds a state dict and nothing else.

    Raises:
        ModelError: If the file is missing or unreadable, or a name, a shape or a number does not fit. The message holds
            no path, since it may leave the site.
    """
    state = _read(Path(path))
    mismatches = _mismatches(network.state_dict(), state)
    if mismatches:
        more = f"; and {len(mismatches) - SHOWN} more" if len(mismatches) > SHOWN else ""
        raise ModelError(f"model.weights does not fit the network: {'; '.join(mismatches[:SHOWN])}{more}")
    network.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError("model.weights names no file; expected a local .safetensors or .pth file")
    try:
        match path.suffix:
            case ".safetensors":
                return load_file(path)
            case ".pth" | ".pt":
                state = torch.load(path, map_location="cpu", weights_only=True)
            case other:
                raise ModelError(f"model.weights ends in {other!r}; expected .safetensors, .pth or .pt")
    except ModelError:
        raise
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise ModelError(
            f"model.weights cannot be read as a {path.suffix} file of tensors ({type(error).__name__}); "
            "is it complete, and does it hold a plain state dict?"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError("model.weights holds more than tensors; save network.state_dict() alone")
    return state


def _mismatches(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Returns one phrase per tensor that keeps `found` from being loaded as `expected`, in the network's order."""
    phrases = []
    for name, tensor in expected.items():
        if name not in found:
            phrases.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            phrases.append(f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
        elif found[name].is_floating_point() != tensor.is_floating_point():
            phrases.append(f"{name} is {found[name].dtype}, expected {tensor.dtype}")
        elif not torch.isfinite(found[name]).all():
            phrases.append(f"{name} holds NaN or infinity")
    return phrases + [f"{name} is not in the network" for name in found if name not in expected]
