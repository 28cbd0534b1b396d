"""A user's own algorithm, by its dotted path. Its code runs on the server alone."""

from __future__ import annotations

import importlib

from fedmed.config import RunConfig
from fedmed.errors import ConfigError
from fedmed.federated.strategies.base import ServerStep


def own_step(reference: str, config: RunConfig) -> ServerStep:
    """The algorithm behind a "module:Class" in `strategy.name`.

    Raises:
        ConfigError: the module or the class does not exist, or it is no algorithm.
    """
    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'strategy.name = "{reference}": expected "module:Class" ({error})') from None
    if not (isinstance(found, type) and issubclass(found, ServerStep)):
        raise ConfigError(f'strategy.name = "{reference}": {name} is no subclass of fedmed\'s ServerStep')
    try:
        return found.from_config(config)
    except TypeError as error:  # Python's own sentence: an abstract method is missing, or the constructor wants more
        raise ConfigError(f'strategy.name = "{reference}": {error}') from None
