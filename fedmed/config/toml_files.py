"""TOML files as checked values. Every mistake in one is a `ConfigError` of one line that names the key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedmed.config.sections import Section
from fedmed.errors import ConfigError, plain_reason

ANY = "*"  # in the place of a key that the user names
Checked = TypeVar("Checked", bound=Section)


def read_toml(path: Path, *, missing: str = "no such file") -> dict[str, Any]:
    """The values of a TOML file, as they stand in it.

    Args:
        path: of the file.
        missing: what to say if it is not there.

    Raises:
        ConfigError: it is missing, cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: {missing}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({plain_reason(error)})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8; save it so") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def checked(model: type[Checked], values: Mapping[str, Any], *, source: str, table: Sequence[str] = ()) -> Checked:
    """Values as a section.

    Args:
        model: of the section.
        values: nested, as TOML has them.
        source: whose they are, for the message.
        table: in which they stand there.

    Raises:
        ConfigError: one line for the first thing that is wrong; for an unknown key it names the nearest known one.
    """
    try:
        return model.model_validate(tuples(values))
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {_explain(problems[0], model, table)}{more}") from None


def tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: frozen sections hold no lists."""
    if isinstance(value, Mapping):
        return {key: tuples(entry) for key, entry in value.items()}
    return tuple(tuples(entry) for entry in value) if isinstance(value, list) else value


def known_keys(model: type[BaseModel], table: Sequence[str] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo, bool]]:
    """(key, field, whether it is a section) of a section and of all within it."""
    for name, info in model.model_fields.items():
        key = (*table, info.alias or name)
        inner, named = _section(info.annotation)
        yield key, info, inner is not None
        if inner is not None:
            yield from known_keys(inner, (*key, ANY) if named else key)


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, alone, or None, or by names of the user's; and whether by names."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each, getattr(annotation, "__origin__", None) is dict
    return None, False


def _explain(problem: Mapping[str, Any], model: type[BaseModel], table: Sequence[str]) -> str:
    location = [*table, *map(str, problem["loc"])]
    key, kind = ".".join(location), problem["type"]
    known = {_filled(name, location): section for name, _, section in known_keys(model, table)}
    if kind == "extra_forbidden":
        names = [name for name, section in known.items() if section or not isinstance(problem["input"], Mapping)]
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        near = near or [name for name in names if name.rpartition(".")[2] == location[-1]][:1]
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":  # of a whole section it names the keys itself
        return message if len(location) == len(table) or known.get(key) else f"{key}: {message}"
    if kind == "missing":
        return f"{key} is missing"
    message = message[0].lower() + message[1:]
    return f"{key}: {message.replace('input should', 'should')}, got {problem['input']!r}"


def _filled(name: Sequence[str], location: Sequence[str]) -> str:
    """A known key, with the user's own name where it has one."""
    own = (*location, *name[len(location) :])
    return ".".join(mine if part == ANY else part for part, mine in zip(name, own, strict=False))
