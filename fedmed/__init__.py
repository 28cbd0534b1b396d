"""fedmed: federated learning across hospitals, on Flower and PyTorch.

From Python, for a notebook or an experiment of one's own; the names are imported when they are first used:

    config = fedmed.load("run.toml", ["train.rounds=3"])    # or fedmed.RunConfig(): the demo
    result = fedmed.simulate(config, "runs/first")          # the content of result.json
    fedmed.write_report("runs/first")
    network = fedmed.load_kept("runs/first").network.module # a torch.nn.Module in evaluation mode
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmed.config import RunConfig, load
    from fedmed.experiments.compare import compare
    from fedmed.federated.simulation import simulate
    from fedmed.reporting import write_report
    from fedmed.training.predict.kept import load_kept

__version__ = "0.1.0"
__all__ = ["RunConfig", "compare", "load", "load_kept", "simulate", "write_report"]

_HOMES = {
    "RunConfig": "fedmed.config",
    "compare": "fedmed.experiments.compare",
    "load": "fedmed.config",
    "load_kept": "fedmed.training.predict.kept",
    "simulate": "fedmed.federated.simulation",
    "write_report": "fedmed.reporting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedmed' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
