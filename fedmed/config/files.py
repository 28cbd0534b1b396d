"""Run files: read, override, check, write; and their flat form, which is Flower's run config.

A run file is TOML with kebab-case keys. Every mistake in one is a `ConfigError` of one line that names the key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel

from fedmed.config.run import RunConfig
from fedmed.config.toml_files import checked, known_keys, read_toml
from fedmed.errors import ConfigError


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `KEY=VALUE` overrides, and make its paths absolute.

    Raises:
        ConfigError: the file is missing, is no TOML, or holds a value that cannot work. The message names the key,
            and for an unknown key the nearest known one.
    """
    return resolve_paths(load_as_written(path, overrides), Path(path).absolute().parent)


def load_as_written(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply overrides, and leave its paths alone: they may be those of another machine.

    Raises:
        ConfigError: as from `load`.
    """
    values = read_toml(Path(path), missing="no such run file")
    return validate(override(values, overrides), source=str(path))


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
    return checked(RunConfig, values, source=source)


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
        flat |= {
            name: ",".join(map(str, entry)) if isinstance(entry, list) else entry for name, entry in entries.items()
        }
    return flat


def explicit_keys(config: RunConfig) -> frozenset[str]:
    """The keys, as `flatten` names them, that a run file or an override gave, whether or not they are defaults."""
    names = set()
    for name in config.model_fields_set:
        part = getattr(config, name)
        inner = part.model_fields_set if isinstance(part, BaseModel) else None
        names |= {name} if inner is None else {f"{name}.{key}" for key in inner}
    return frozenset(name.replace("_", "-") for name in names)


def unflatten(flat: Mapping[str, str | int | float | bool], *, source: str = "run config") -> RunConfig:
    """The inverse of `flatten`; keys that Flower did not get keep their defaults."""
    values: dict[str, Any] = {}
    for dotted, value in flat.items():
        section, _, key = dotted.rpartition(".")
        entry = _split(value) if _is_list(dotted) and isinstance(value, str) else value
        (values.setdefault(section, {}) if section else values)[key] = entry
    return validate(values, source=source)


def _is_list(dotted: str) -> bool:
    return any(".".join(key) == dotted and isinstance(info.default, tuple) for key, info, _ in known_keys(RunConfig))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parse(text: str, *, listed: bool) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return _split(text) if listed else text
