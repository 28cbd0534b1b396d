"""Whatever is wrong with the bytes of a volume or of its mask, it ends as one clean error."""

import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from phantom_series import enhanced_object, slice_objects
from test_imaging_segmentation_objects import BODY, LESION, OBLIQUE, box, outline, segmentation, structure_set

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes import read_mask_volume, read_volume
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.imaging.volumes.volume import Volume

KINDS = ("series", "enhanced", "nifti", "segmentation", "structures")
SECRETS = ("Phantom", "P-000", "2.25.", "lesion", "private-folder")


def subject(kind: str, folder: Path) -> tuple[Path, Callable[[Path], object]]:
    """A sound file of that kind, and how it is read."""
    objects = slice_objects(BODY, OBLIQUE)
    (folder / "series").mkdir()
    for number, ds in enumerate(objects):
        ds.save_as(folder / "series" / str(number), enforce_file_format=True)
    volume = read_volume(folder / "series")
    file = folder / "file"
    match kind:
        case "series":
            return folder / "series" / "4", lambda path: read_volume(path.parent)
        case "enhanced":
            enhanced_object(BODY, OBLIQUE).save_as(file, enforce_file_format=True)
        case "nifti":
            write_nifti(volume, folder / "file.nii")
            (folder / "file.nii").rename(file)
        case "segmentation":
            segmentation(objects, LESION[..., None]).save_as(file)
        case "structures":
            shapes = [outline(volume, depth, box(2, 2, 8, 8)) for depth in (2, 3)]
            structure_set({"lesion": shapes}, volume.frame_of_reference).save_as(file, enforce_file_format=True)
    masks = kind in ("segmentation", "structures")
    return file, (lambda path: read_mask_volume(path, volume)) if masks else read_volume


def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, most of them in the header, or the end cut off."""
    changed = bytearray(raw)
    if rng.random() < 0.3:
        return bytes(changed[: rng.integers(len(raw))])
    end = min(len(raw), 2000 if rng.random() < 0.8 else len(raw))
    for place in rng.integers(0, end, rng.integers(1, 8)):
        changed[place] = rng.integers(256)
    return bytes(changed)


def assert_clean(kind: str, folder: Path, *, times: int, seed: int) -> None:
    folder = folder / "private-folder"
    folder.mkdir()
    file, read = subject(kind, folder)
    raw, rng, refused = file.read_bytes(), np.random.default_rng(seed), 0
    read(file)
    for _ in range(times):
        file.write_bytes(mutated(raw, rng))
        try:
            found = read(file)
        except UnreadableImage as refusal:
            refused += 1
            said = [*str(refusal).splitlines(), *traceback.format_exception(refusal)]
        else:
            said = []
            assert np.isfinite(found.values if isinstance(found, Volume) else found).all()
        assert not any(secret in line for secret in SECRETS for line in said)
    assert 0 < refused < times


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_one_clean_error(kind: str, tmp_path: Path):
    assert_clean(kind, tmp_path, times=50, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files_are_clean_errors(kind: str, tmp_path: Path):
    assert_clean(kind, tmp_path, times=2000, seed=2)
