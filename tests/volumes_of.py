"""All volumes of a folder, for tests; fedmed reads folders that hold one."""

from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import UnreadableImage
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.volumes.pixels import decoded
from fedmed.imaging.volumes.series import surveyed
from fedmed.imaging.volumes.slices import Group, Refusal
from fedmed.imaging.volumes.volume import Volume


def volumes_in(folder: Path) -> Iterator[Volume | Refusal]:
    """Everything in a folder, the largest group first."""
    for group in surveyed(folder).groups:
        yield group if isinstance(group, Refusal) else _volume(group)


def _volume(group: Group) -> Volume | Refusal:
    try:
        with plain_errors():
            return decoded(group)
    except UnreadableImage as error:
        return Refusal(reason=str(error), slices=len(group.slices))
