"""The run configuration: one frozen, validated value behind every command and every Flower app.

A run file is TOML with kebab-case keys. `load` reads one, `flatten` and `unflatten` translate to and from Flower's
flat run config, `to_toml` writes every default out.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedmed.errors import ConfigError

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$")]


class Section(BaseModel):
    """Base of all sections: frozen, kebab-case, and no unknown key."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        allow_inf_nan=False,
    )


class ModelConfig(Section):
    """Which network, and how it is built."""

    name: Annotated[str, Field(description='a built-in network, or "module:function"')] = "chexnet"
    norm: Literal["batch", "group", "instance"] = "group"
    width: Annotated[Count, Field(description="base channels; 0 = the paper's")] = 0
    in_channels: Positive = 1
    weights: Annotated[str, Field(description="a local file of weights; never a download")] = ""


class TaskConfig(Section):
    """What the network learns."""

    kind: Literal["classification", "segmentation"] = "classification"
    labels: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> TaskConfig:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        return self


class DataConfig(Section):
    """Where simulated hospitals and the server find their data, and how images become tensors."""

    sites: tuple[str, ...] = ()
    server: str = ""
    dataset: Annotated[str, Field(description='"module:function" for data that are no images')] = ""
    preset: str = "cxr"
    image_size: Annotated[int, Field(ge=8, le=4096)] = 64
    max_unreadable: Annotated[Fraction, Field(description="share of unreadable images above which a run refuses")] = (
        0.05
    )


class TrainConfig(Section):
    """What a site does in one round."""

    rounds: Positive = 5
    local_epochs: Positive = 1
    local_steps: Annotated[Count, Field(description="optimizer steps per round; 0 = local-epochs decides")] = 0
    batch_size: Positive = 16
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    threads: Positive = 1


class StrategyConfig(Section):
    """How the server turns updates into the next global network."""

    name: str = "fedavg"
    weight_by: Literal["images", "patients", "uniform"] = "images"
    min_sites: Positive = 2
    min_fraction: Fraction = 0.0
    required_sites: tuple[Name, ...] = ()
    round_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    checkpoint_every: Annotated[Positive, Field(description="rounds between checkpoints")] = 1
    server_learning_rate: Annotated[float, Field(gt=0, description="fedavgm")] = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1, description="fedavgm")] = 0.9


class PrivacyConfig(Section):
    """Differential privacy of the training."""

    mode: Literal["none", "dp-sgd", "central"] = "none"
    unit: Literal["patient", "image"] = "patient"
    epsilon: Annotated[float, Field(gt=0)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    images_per_patient: Positive = 8
    noise: Literal["secure", "insecure-test"] = "secure"


class EvaluateConfig(Section):
    """How networks are judged and which one is kept."""

    every: Positive = 1
    primary: Annotated[str, Field(description='the metric that selects; "" = auroc or dice by task')] = ""
    keep: Literal["best", "last"] = "best"
    patience: Annotated[Count, Field(description="evaluations without improvement before stopping; 0 = never")] = 0
    selection_share: Annotated[Share, Field(description="share of the server's patients that select the network")] = 0.3
    site_share: Annotated[Share, Field(description="share of each site's patients held out for evaluation")] = 0.2
    sites: Annotated[
        Literal["final", "every"], Field(description="when sites evaluate on their own held-out patients")
    ] = "final"
    bootstrap: Annotated[Count, Field(description="patient-bootstrap replicates behind each interval")] = 1000


class SimulationConfig(Section):
    """How many virtual hospitals run at once on this machine."""

    workers: Annotated[Count, Field(description="worker processes; 0 = as many as cores")] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    partition: Literal["as-given"] = "as-given"
    policy: str = ""


class RunConfig(Section):
    """One federation, completely described. No `data.sites` means the built-in phantom hospitals."""

    name: Name = "quickstart"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 7
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    strategy: StrategyConfig = StrategyConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    simulation: SimulationConfig = SimulationConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if any("," in site for site in self.data.sites):
            raise ValueError("data.sites: a path must not hold a comma, which separates sites in Flower's run config")
        if self.data.sites and not self.task.labels:
            raise ValueError("task.labels is empty: name the label columns of the manifests")
        metric, slash, label = self.primary.partition("/")
        known = {"classification": ("auroc", "auprc"), "segmentation": ("dice", "micro-dice", "iou")}[self.task.kind]
        if metric not in known or (slash and label not in self.task.labels):
            raise ValueError(f'evaluate.primary = "{self.primary}": expected {", ".join(known)}, or one with /LABEL')
        if self.privacy.mode != "none":
            raise ValueError(f'privacy.mode = "{self.privacy.mode}" is not available in this version; use "none"')
        return self

    @property
    def primary(self) -> str:
        """The metric that selects a network."""
        return self.evaluate.primary or ("auroc" if self.task.kind == "classification" else "dice")


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `KEY=VALUE` overrides, and make its paths absolute.

    Raises:
        ConfigError: the file is missing, is no TOML, or holds a value that cannot work. The message names the key,
            and for an unknown key the nearest known one.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return resolve_paths(validate(override(values, overrides), source=str(path)), path.absolute().parent)


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return `values` with `section.key=VALUE` assignments applied.

    VALUE is TOML, a bare string, or `a,b` where a list is expected.
    """
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as train.rounds=3")
        target = result
        *sections, key = dotted.strip().split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {assignment}: {section} is a value, not a section")
        target[key] = _parse(text.strip(), listed=_is_list(dotted.strip()))
    return result


def validate(values: Mapping[str, Any], *, source: str = "run configuration") -> RunConfig:
    """Build a `RunConfig` from nested values.

    Raises:
        ConfigError: one line for the first thing that is wrong.
    """
    try:
        return RunConfig.model_validate(tuples(values))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {_explain(problems[0])}{more}") from None


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Return `config` with every path absolute, taken relative to `folder`."""

    def absolute(path: str) -> str:
        return str((folder / Path(path).expanduser()).absolute()) if path else ""

    data = config.data.model_copy(
        update={"sites": tuple(map(absolute, config.data.sites)), "server": absolute(config.data.server)}
    )
    return config.model_copy(
        update={
            "data": data,
            "model": config.model.model_copy(update={"weights": absolute(config.model.weights)}),
            "simulation": config.simulation.model_copy(update={"policy": absolute(config.simulation.policy)}),
        }
    )


def nested(config: RunConfig) -> dict[str, Any]:
    """Every key and value, nested by section, in the spelling of the run file."""
    return config.model_dump(mode="json", by_alias=True)


def to_toml(config: RunConfig) -> str:
    """The configuration as a run file with every default written out."""
    return tomli_w.dumps(nested(config))


def flatten(config: RunConfig) -> dict[str, str | int | float | bool]:
    """Flower's flat run config: `section.key` to a scalar, lists comma-joined."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in nested(config).items():
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        flat |= {name: ",".join(entry) if isinstance(entry, list) else entry for name, entry in entries.items()}
    return flat


def unflatten(flat: Mapping[str, str | int | float | bool], *, source: str = "run config") -> RunConfig:
    """The inverse of `flatten`; keys that Flower did not get keep their defaults."""
    values: dict[str, Any] = {}
    for dotted, value in flat.items():
        section, _, key = dotted.rpartition(".")
        entry = _split(value) if _is_list(dotted) and isinstance(value, str) else value
        (values.setdefault(section, {}) if section else values)[key] = entry
    return validate(values, source=source)


def _known_keys() -> Iterator[tuple[str, FieldInfo]]:
    for name, info in RunConfig.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            for key, entry in info.annotation.model_fields.items():
                yield f"{name}.{entry.alias or key}", entry
        else:
            yield name, info


def _is_list(dotted: str) -> bool:
    return any(key == dotted and isinstance(info.default, tuple) for key, info in _known_keys())


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parse(text: str, *, listed: bool) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return _split(text) if listed else text


def tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: frozen sections hold no lists."""
    if isinstance(value, Mapping):
        return {key: tuples(entry) for key, entry in value.items()}
    return tuple(tuples(entry) for entry in value) if isinstance(value, list) else value


def _explain(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key, kind = ".".join(location), problem["type"]
    if kind == "extra_forbidden":
        known = [name for name, _ in _known_keys()] + list(RunConfig.model_fields)
        known = list(RunConfig.model_fields) if isinstance(problem["input"], Mapping) else known
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [name for name in known if name.rpartition(".")[2] == location[-1]][:1]
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return message
    message = message[0].lower() + message[1:]
    return f"{key}: {message.replace('input should', 'should')}, got {problem['input']!r}"
