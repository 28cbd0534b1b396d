"""The run configuration: one frozen, validated value behind every command and every Flower app."""

from fedmed.config.files import (
    flatten,
    load,
    nested,
    override,
    resolve_paths,
    said,
    to_toml,
    tuples,
    unflatten,
    validate,
)
from fedmed.config.identity import ROUNDS, may_change, run_identity
from fedmed.config.run import RunConfig
from fedmed.config.sections import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    Name,
    PrivacyConfig,
    Section,
    SimulationConfig,
    StrategyConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "ROUNDS",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "Name",
    "PrivacyConfig",
    "RunConfig",
    "Section",
    "SimulationConfig",
    "StrategyConfig",
    "TaskConfig",
    "TrainConfig",
    "flatten",
    "load",
    "may_change",
    "nested",
    "override",
    "resolve_paths",
    "run_identity",
    "said",
    "to_toml",
    "tuples",
    "unflatten",
    "validate",
]
