"""Several modalities of one item: which are there, on whose grid they lie, and what a missing one is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sets import LABELS, everything, load
from kept_runs import LUNG, grey_png, kept_run
from phantom_series import Acquisition, write_series
from PIL import Image

from fedmed import config as run_file
from fedmed.config import TaskConfig
from fedmed.errors import ConfigError, DataError, UnreadableImage
from fedmed.experiments.pooling import pooled_data
from fedmed.federated.virtual_hospitals import with_hospitals
from fedmed.imaging import augment, decoding
from fedmed.imaging.items import item
from fedmed.imaging.manifest import Row, cell_of, images_of, read_manifest
from fedmed.imaging.recipe import Recipe
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.imaging.volumes.volume import Volume
from fedmed.models import MODELS
from fedmed.models.fusion import late_fusion
from fedmed.training.predict.batch import predict_images
from fedmed.training.predict.inputs import decoder
from fedmed.training.predict.kept import load_kept

ONE = TaskConfig(kind="segmentation", labels=("tumour",))
VOLUMES = Recipe.of(
    preset="mr", items="volumes", image_size=0, spacing_mm=(), volume_size=(6, 8, 10), labels=("tumour",)
)
RAMP = np.arange(1, 481, dtype=np.float32).reshape(6, 8, 10)


@pytest.fixture(autouse=True)
def _decoding_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "apart", decoding.here)


def nifti(path: Path, values: np.ndarray, *, spacing: float = 1.0, corner: tuple[float, ...] = (0, 0, 0)) -> str:
    """Values (D, H, W) in canonical orientation; `corner` (x, y, z) mm of the first voxel."""
    affine = np.eye(4)[[2, 1, 0, 3]] * [spacing, spacing, spacing, 1]
    affine[:3, 3] = corner
    write_nifti(Volume(values=values, affine=affine), path)
    return str(path)


def read(modalities: list[str], recipe: Recipe = VOLUMES, mask: str = "") -> np.ndarray:
    arrays = item(image=modalities, mask=mask, recipe=replace(recipe, labels=int(bool(mask))).settings())
    return arrays["images"].astype(np.float32) / np.iinfo(arrays["images"].dtype).max


def table(folder: Path, cells: list[str], columns: str = "a,b", values: str = "1,0") -> Path:
    lines = [f"P{number},{cell},{values}" for number, cell in enumerate(cells)]
    (folder / "manifest.csv").write_text("\n".join([f"patient_id,image,{columns}", *lines]))
    return folder / "manifest.csv"


def pictures(folder: Path, names: str, size: tuple[int, int] = (16, 16)) -> None:
    rng = np.random.default_rng(1)
    for name in names:
        Image.fromarray(rng.integers(1, 256, size, dtype=np.uint8)).save(folder / f"{name}.png")


def test_a_cell_names_modalities_in_order_and_an_empty_place_is_missing(tmp_path: Path) -> None:
    first, second = read_manifest(table(tmp_path, ["a.nii; b.nii ;c.nii", ";d.nii;"]), LABELS).rows
    assert first.modalities == tuple(tmp_path / f"{name}.nii" for name in "abc")
    assert second.modalities == (None, tmp_path / "d.nii", None)
    assert second.images == (tmp_path / "d.nii",) and second.image == tmp_path / "d.nii"


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (["a;b", "c"], r"row 2 names 2 modalities, other rows another number \(row 3\)"),
        (["a;b", ";"], "row 3 has no image"),
        (["a;b", "c;./a"], "rows 2 and 3 name the same image"),
        (["a;sub/../a"], "row 2 names one image twice"),
        (["a;b", "c;b/4.dcm"], "row 2 names the folder in which row 3's image lies"),
    ],
)
def test_rows_whose_places_do_not_fit_are_refused(tmp_path: Path, cells: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read_manifest(table(tmp_path, cells), LABELS)
    assert "\n" not in str(caught.value)


names = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=5)


@given(st.lists(st.none() | names.map(Path), min_size=1, max_size=4))
def test_a_cell_round_trips(modalities: list[Path | None]) -> None:
    assert images_of(cell_of(modalities), Path()) == tuple(modalities)


def test_a_folder_whose_name_would_be_taken_for_two_is_refused() -> None:
    with pytest.raises(DataError, match="separates modalities"):
        cell_of([Path("a;b/c.nii")])


def test_volumes_become_channels_and_a_missing_one_is_zeros(tmp_path: Path) -> None:
    flair, t1c = nifti(tmp_path / "f.nii.gz", RAMP), nifti(tmp_path / "t.nii.gz", RAMP[::-1].copy())
    both, lacking = read([flair, "", t1c]), read(["", "", t1c])
    assert both.shape == (1, 3, 6, 8, 10)
    np.testing.assert_array_equal(both[0, 0], read([flair])[0, 0])
    np.testing.assert_array_equal(both[0, 2], read([t1c])[0, 0])
    assert not both[0, 1].any() and not lacking[0, :2].any()
    np.testing.assert_array_equal(lacking[0, 2], both[0, 2])


def test_every_modality_is_read_by_its_own_preset(tmp_path: Path) -> None:
    pet, ct = nifti(tmp_path / "pet.nii.gz", RAMP), nifti(tmp_path / "ct.nii.gz", RAMP)
    recipe = replace(VOLUMES, preset="pet;ct-soft")
    both, only_ct = read([pet, ct], recipe), read(["", ct], recipe)
    assert np.allclose(both[0, 0], read([pet], replace(VOLUMES, preset="pet"))[0, 0])
    window = np.clip((RAMP - (40 - 200)) / 400, 0, 1)
    assert np.allclose(both[0, 1], window, atol=1e-4) and np.allclose(only_ct[0, 1], window, atol=1e-4)


def test_presets_that_do_not_fit_the_modalities_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "ab")
    manifest = table(tmp_path, ["a.png;b.png"])
    for preset, channels, reason in (("cxr;mr;us", 2, "names 3 modalities"), ("cxr;color", 2, "numbers of channels")):
        with pytest.raises(ConfigError, match=reason):
            load(manifest, preset=preset, in_channels=channels)
    assert load(manifest, preset="cxr;mr", in_channels=2).batch(np.arange(1))[0].shape[1] == 2


def test_another_grid_is_resampled_onto_the_first_one(tmp_path: Path) -> None:
    """A plane in x, of half the spacing and shifted: linear interpolation gives the plane back, and 0 beyond it."""
    x = np.broadcast_to(np.arange(10, dtype=np.float32), (6, 8, 10)) + 1
    fine = np.broadcast_to(np.arange(2, 18, 0.5, dtype=np.float32), (12, 16, 32)) + 1  # from x = 2 mm on
    first, second = nifti(tmp_path / "a.nii.gz", x), nifti(tmp_path / "b.nii.gz", fine, spacing=0.5, corner=(2, 0, 0))
    there = read([first, second])[0, 1]
    assert not there[..., :2].any()
    inner = there[1:-1, 1:-1, 3:9]
    np.testing.assert_allclose(np.diff(inner, axis=-1), np.diff(inner, axis=-1).mean(), atol=2e-3)
    assert np.ptp(inner, axis=(0, 1)).max() < 1e-3


def test_the_mask_lies_on_the_first_modality_that_is_there(tmp_path: Path) -> None:
    t1c, mask = nifti(tmp_path / "t.nii.gz", RAMP), nifti(tmp_path / "m.nii.gz", (RAMP > 240).astype(np.uint8))
    arrays = item(image=["", t1c], mask=mask, recipe=VOLUMES.settings())
    np.testing.assert_array_equal(arrays["masks"][0, 0], RAMP > 240)


def test_what_lies_elsewhere_or_in_another_frame_of_reference_is_refused(tmp_path: Path) -> None:
    far = [nifti(tmp_path / "a.nii.gz", RAMP), nifti(tmp_path / "b.nii.gz", RAMP, corner=(99, 0, 0))]
    with pytest.raises(UnreadableImage, match="lies nowhere on the first"):
        read(far)
    for seed in (0, 1):  # the seed makes the phantom's study and frame of reference
        scan = Acquisition(modality="MR", shape=RAMP.shape, seed=seed)
        write_series(tmp_path / f"series-{seed}", RAMP, scan)
    with pytest.raises(UnreadableImage, match="different frames of reference"):
        read([str(tmp_path / "series-0"), str(tmp_path / "series-1")])


def test_pictures_of_two_sizes_are_no_one_item(tmp_path: Path) -> None:
    pictures(tmp_path, "a"), pictures(tmp_path, "b", (16, 12))
    recipe = Recipe(preset="cxr", image_size=8)
    assert read([str(tmp_path / "a.png"), ""], recipe).shape == (1, 2, 8, 8)
    with pytest.raises(UnreadableImage, match="differ in channels, height or width: 1 by 16 by 12 and 1 by 16 by 16"):
        read([str(tmp_path / "a.png"), str(tmp_path / "b.png")], recipe)


@pytest.mark.parametrize(("items", "shape"), [("slices", (16, 16)), ("volumes", (6, 8, 10)), ("patches", (6, 8, 10))])
@pytest.mark.parametrize("cached", [False, True])
def test_every_kind_of_item_has_a_channel_for_each(
    tmp_path: Path, items: str, shape: tuple[int, ...], cached: bool
) -> None:
    for name in "abc":
        nifti(tmp_path / f"{name}.nii.gz", np.roll(RAMP, ord(name), axis=0))
    nifti(tmp_path / "m.nii.gz", (RAMP > 240).astype(np.uint8))
    path = table(tmp_path, ["a.nii.gz;b.nii.gz", ";c.nii.gz"], "mask", "m.nii.gz")
    options = {"preset": "mr", "in_channels": 2, "volume_size": (6, 8, 10), "items": items}
    dataset = load(path, ONE, **options, cache_dir=tmp_path / "cache" if cached else None)
    images, masks = everything(dataset)
    assert images.shape[1:] == (2, *shape) and masks.shape[1:] == (1, *shape)
    of_second = dataset.rows == 3
    assert not images[of_second, 0].any() and images[of_second, 1].any()
    assert images[~of_second].flatten(2).any(dim=2).all()


def test_what_is_kept_depends_on_the_order_and_on_what_is_missing(tmp_path: Path) -> None:
    pictures(tmp_path, "ab")
    found = []
    for cell in ("a.png;b.png", "b.png;a.png", "a.png;", ";a.png"):
        dataset = load(table(tmp_path, [cell]), in_channels=2, site_share=0.0, cache_dir=tmp_path / "cache")
        found.append(everything(dataset)[0])
    assert torch.equal(found[0], found[1].flip(1)) and torch.equal(found[2], found[3].flip(1))
    assert torch.equal(found[0][:, :1], found[2][:, :1]) and not found[2][:, 1].any()
    Image.new("L", (16, 16), 7).save(tmp_path / "b.png")
    assert not torch.equal(
        everything(load(table(tmp_path, ["a.png;b.png"]), in_channels=2, cache_dir=tmp_path / "cache"))[0], found[0]
    )


def test_a_network_of_another_number_of_channels_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "ab")
    with pytest.raises(ConfigError, match=r"in-channels = 4 does not fit the 2 modalities"):
        load(table(tmp_path, ["a.png;b.png"]), in_channels=4)


def test_augmentation_leaves_a_missing_modality_missing_and_late_fusion_leaves_it_out(tmp_path: Path) -> None:
    pictures(tmp_path, "ab")
    dataset = load(table(tmp_path, ["a.png;", "b.png;"]), in_channels=2)
    images, _ = everything(dataset)
    drawn = augment.sample(("contrast", "noise"), images.shape[1:], len(images), np.random.default_rng(2))
    changed, _ = augment.apply(images, None, drawn)
    assert not torch.equal(changed[:, 0], images[:, 0]) and not changed[:, 1].any()

    def encoder(channels: int) -> torch.nn.Module:
        return MODELS["small-cnn"](in_channels=channels, outputs=2, norm="group", width=2)

    network = late_fusion(encoder, in_channels=2, modalities=2, outputs=2).eval()
    before = network(changed)
    for parameter in network.encoders[1].parameters():
        parameter.data.add_(1.0)
    torch.testing.assert_close(network(changed), before)


def test_a_kept_network_is_given_modalities_as_a_manifest_names_them(tmp_path: Path) -> None:
    left, right = np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint8)
    left[:, :8], right[:, 8:] = 255, 255
    one, two = grey_png(tmp_path / "a.png", left), grey_png(tmp_path / "b.png", right)
    model = {"name": "kept_runs:outline", "in-channels": 2}  # a mask of where the sum of the channels is above one half
    kept = load_kept(kept_run(tmp_path / "run", model, LUNG, **{"image-size": 16}), device="cpu")
    cells = [Path(cell) for cell in (f"{one};{two}", f"{one};", f";{two}", f"{one};{two};", ";")]
    (tmp_path / "out").mkdir()
    with decoder("images") as process:
        found = list(predict_images(kept, cells, tmp_path / "out", process))
    assert [dict(each.voxels) for each in found] == [{"lung": 256}, {"lung": 128}, {"lung": 128}, {}, {}]
    assert '3 modalities, but the network reads 2; name them as in a manifest, "a;b"' in found[3].error
    assert found[4].error == "none of its modalities is there"


@pytest.mark.parametrize(
    ("model", "data", "modalities"),
    [
        ({"name": "kept_runs:outline"}, {"preset": "mr", "items": "volumes", "volume-size": [6, 8, 10]}, 2),
        ({"name": "kept_runs:outline"}, {"preset": "cxr;mr", "image-size": 16}, 0),
        ({"name": "unet", "width": 2, "fusion": "late", "modalities": 2}, {"image-size": 16}, 0),
    ],
)
def test_a_single_file_is_refused_where_the_network_reads_two_modalities(tmp_path, model, data, modalities) -> None:
    run = kept_run(tmp_path / "run", {**model, "in-channels": 2}, LUNG, modalities=modalities, **data)
    scans = [Path(nifti(tmp_path / f"{name}.nii.gz", RAMP)) for name in ("flair", "t1c")]
    pictures(tmp_path, "ab")
    kept = load_kept(run)
    images = scans if kept.recipe.depth else [tmp_path / "a.png", tmp_path / "b.png"]
    (tmp_path / "out").mkdir()
    with decoder(kept.recipe.items) as process:
        *alone, both = predict_images(kept, [*images, Path(";".join(map(str, images)))], tmp_path / "out", process)
    line = (
        '1 modality, but the network reads 2; name them as in a manifest, "a;b", and leave the place of a missing one'
    )
    assert [(each.error, dict(each.voxels)) for each in alone] == [(f"{line} empty", {})] * 2
    assert not both.error and both.voxels


@pytest.mark.parametrize(("server", "expected"), [("two", (2,)), ("", (2,)), ("one", (1, 2))])
def test_a_run_keeps_how_many_modalities_its_manifests_name(tmp_path, simulate, server, expected) -> None:
    for name in ("north", "south", "server"):
        (tmp_path / name).mkdir()
        pictures(tmp_path / name, "abcdefgh")
        two = ["a.png;b.png", "c.png;d.png", "e.png;", "g.png;h.png"]
        table(tmp_path / name, ["a.png", "b.png", "c.png", "d.png"] if (name, server) == ("server", "one") else two)
    data = {"sites": [str(tmp_path / name / "manifest.csv") for name in ("north", "south")], "image-size": 16}
    config = run_file.validate(
        {
            "model": {"name": "small-cnn", "width": 2, "in-channels": 2},
            "task": {"labels": ["a", "b"]},
            "data": {**data, "server": str(tmp_path / "server" / "manifest.csv") if server else ""},
            "train": {"rounds": 1, "local-steps": 1},
            "simulation": {"workers": 1, "device": "cpu"},
        }
    )
    _, folder = simulate(config)
    assert load_kept(folder.path).modalities == expected


def test_what_the_manifests_held_decides_whether_a_file_is_repeated_to_all_channels(tmp_path: Path) -> None:
    pictures(tmp_path, "a")
    for said, errors in ((0, [""]), (1, [""]), (3, ["1 modality, but the network reads 3"])):
        run = kept_run(
            tmp_path / f"run-{said}", {"name": "kept_runs:outline", "in-channels": 3}, LUNG, modalities=said,
            **{"image-size": 16},
        )  # fmt: skip
        (tmp_path / f"out-{said}").mkdir()
        with decoder("images") as process:
            found = list(predict_images(load_kept(run), [tmp_path / "a.png"], tmp_path / f"out-{said}", process))
        assert [each.error.partition(";")[0] for each in found] == errors


def test_dealt_and_pooled_manifests_keep_every_place(tmp_path: Path) -> None:
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
        pictures(tmp_path / name, "abcdef")
        table(tmp_path / name, ["a.png;b.png", "c.png;", ";d.png", "e.png;f.png"])
    (tmp_path / "run").mkdir()
    values = {"task": {"labels": ["a", "b"]}, "data": {"sites": ["north/manifest.csv", "south/manifest.csv"]}}
    config = run_file.resolve_paths(run_file.validate(values), tmp_path)
    wanted = sorted(str(row.modalities) for site in config.data.sites for row in rows_of(site))
    assert sorted(str(row.modalities) for row in rows_of(pooled_data(config, tmp_path / "run")["sites"][0])) == wanted
    for scheme in ("iid", "scanner"):
        dealt = run_file.validate({**values, "simulation": {"partition": scheme, "partition-sites": 2}})
        dealt = with_hospitals(run_file.resolve_paths(dealt, tmp_path), tmp_path / "run")
        assert sorted(str(row.modalities) for site in dealt.data.sites for row in rows_of(site)) == wanted
        (tmp_path / "run").rename(tmp_path / scheme)
        (tmp_path / "run").mkdir()


def rows_of(site: str) -> tuple[Row, ...]:
    return read_manifest(Path(site), LABELS).rows
