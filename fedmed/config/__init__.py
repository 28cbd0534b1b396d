"""The run configuration: one frozen, validated value behind every command and every Flower app.

* The value: `run`, of `sections` on a site's part and those of a `federation`; `identity` is what makes it that run.
* As text: `files` of runs; `toml_files` for those and for every other.
"""

from fedmed.config.federation import (
    LEAST_CLIP,
    MOST_CLIP,
    EvaluateConfig,
    PrivacyConfig,
    SimulationConfig,
    StrategyConfig,
)
from fedmed.config.files import (
    explicit_keys,
    flatten,
    load,
    load_as_written,
    nested,
    override,
    resolve_paths,
    to_toml,
    unflatten,
    validate,
)
from fedmed.config.identity import ROUNDS, may_change, run_identity
from fedmed.config.run import RunConfig
from fedmed.config.sections import (
    DataConfig,
    ModelConfig,
    Name,
    Section,
    TaskConfig,
    TrainConfig,
    checked_name,
)
from fedmed.config.toml_files import checked, read_toml

__all__ = [
    "LEAST_CLIP",
    "MOST_CLIP",
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
    "checked",
    "checked_name",
    "explicit_keys",
    "flatten",
    "load",
    "load_as_written",
    "may_change",
    "nested",
    "override",
    "read_toml",
    "resolve_paths",
    "run_identity",
    "to_toml",
    "unflatten",
    "validate",
]
