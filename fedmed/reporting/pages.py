"""The templates of all pages: one environment, everything escaped, nothing undefined."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from fedmed.durable import write_atomically
from fedmed.errors import DataError
from fedmed.reporting import words
from fedmed.reporting.facts import metric_of


def fill(template: str, **values: object) -> str:
    """A page as text.

    Args:
        template: a file of this package.
        values: what the template names.
    """
    return _environment().get_template(template).render(**values)


def write_page(page: str, target: Path, *, mode: int = 0o644) -> Path:
    """Write a page, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    try:
        write_atomically(target, page.encode(errors="replace"), mode=mode, shared=True)
    except OSError as error:
        raise DataError(f"{target.name} cannot be written: {error.strerror}. Make room or mend permissions.") from None
    return target


@cache
def _environment() -> Environment:
    """Compiled templates are kept: a thousand virtual hospitals have a thousand pages."""
    environment = Environment(
        autoescape=lambda name: name is None or name.endswith(".j2"),
        loader=FunctionLoader(
            lambda name: resources.files("fedmed.reporting").joinpath(name).read_text(encoding="utf-8")
        ),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.globals.update(
        title=words.title,
        number=words.number,
        count=words.count,
        site_count=words.site_count,
        prevalence=words.prevalence,
        scanners=words.scanners,
        interval=words.interval,
        duration=words.duration,
        memory=words.memory,
        plural=words.plural,
        of=metric_of,
    )
    return environment
