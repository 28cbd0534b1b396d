"""A kept network on new images: what comes out lies where it belongs, and one bad file stops nothing."""

import csv
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_files import SECRET, cells_of, image_object, picture, written
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import UltrasoundMultiFrameImageStorage
from safetensors.torch import load_file, save_file
from torch import nn

from fedmed import config as run_file
from fedmed.cli import main
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.federated.result import model_facts
from fedmed.federated.run_folder import RunFolder
from fedmed.imaging.dataset import load_dataset
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.phantoms.hospitals import synthesize
from fedmed.imaging.phantoms.series import Acquisition, enhanced_object, phantom_body, write_series
from fedmed.imaging.reading import read_image, read_mask
from fedmed.imaging.resize import letterbox
from fedmed.imaging.volumes.nifti import read_nifti, write_nifti
from fedmed.imaging.volumes.volume import Volume
from fedmed.models import build
from fedmed.training.evaluate import predictions
from fedmed.training.network import FlatNetwork
from fedmed.training.predict.batch import Drawn, Prediction, predict_images
from fedmed.training.predict.geometry import without_letterbox
from fedmed.training.predict.inputs import decoder, find_images
from fedmed.training.predict.kept import load_kept
from fedmed.training.predict.pictures import LONGEST, heat_colours, heat_overlay, region_overlay

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
FINDING = {"labels": ["bright", "dark"]}
LUNG = {"kind": "segmentation", "labels": ["lung"]}


def outline(*, in_channels: int, outputs: int, norm: str, width: int, dimensions: int = 2) -> nn.Module:
    """A mask of what is brighter than one half for the first label, and than 7/8 for the second."""
    convolution = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(in_channels, outputs, 1)
    with torch.no_grad():
        convolution.weight[:] = torch.tensor([20.0, 160.0])[:outputs].view(-1, *[1] * (dimensions + 1))
        convolution.bias[:] = torch.tensor([-10.0, -140.0])[:outputs]
    return convolution


def spot(*, in_channels: int, outputs: int, norm: str, width: int, dimensions: int = 2) -> nn.Module:
    """The mean of bright pixels speaks for the first label, and that of dark ones for the second."""
    convolution = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(in_channels, outputs, 1)
    with torch.no_grad():
        convolution.weight[:] = torch.tensor([1.0, -1.0]).view(-1, *[1] * (dimensions + 1))
        convolution.bias[:] = torch.tensor([0.0, 1.0])
    pool = nn.AdaptiveAvgPool2d(1) if dimensions == 2 else nn.AdaptiveAvgPool3d(1)
    return nn.Sequential(convolution, pool, nn.Flatten())


def kept_run(path: Path, model: dict, task: dict, **data: object) -> Path:
    """A run folder with an untrained network."""
    config = run_file.validate({"model": model, "task": task, "data": data})
    network = network_of(config)
    folder = RunFolder.create(path, config)
    folder.save_model(network.weights(), network.layout, model_facts(config, 3, network.layout.hash))
    folder.close()
    return path


def network_of(config: RunConfig) -> FlatNetwork:
    module = build(config.model, outputs=len(config.task.labels), seed=5, dimensions=config.dimensions)
    with torch.no_grad():
        for name, buffer in module.named_buffers():  # as if it had been trained
            buffer += 1 if name.endswith("num_batches_tracked") else 0.5
    return FlatNetwork(module.eval(), torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are faster so, the more where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function: run the command in this process and give (status, stdout, stderr, folder of results)."""
    count = 0

    def run(*arguments: object, out: Path | None = None) -> tuple[int, str, str, Path]:
        nonlocal count
        count += 1
        folder = out or tmp_path / f"out-{count}"
        monkeypatch.setattr(sys, "argv", ["fedmed", "predict", *map(str, arguments), "--out", str(folder)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err, folder

    return run


@pytest.fixture(scope="module")
def process():
    with decoder("slices") as process:
        yield process


@pytest.fixture
def drawn(tmp_path: Path, process: DecodingProcess):
    """A function: what a new network says of some images, and the folder of results; no row may have an error."""

    def run(
        model: str | dict, task: dict, *images: Path, heat_maps: Sequence[str] | None = None, **data: object
    ) -> tuple[list[Prediction], Path]:
        folder = tmp_path / f"drawn-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        settings = model if isinstance(model, dict) else {"name": f"test_predict:{model}"}
        options = {} if heat_maps is None else {"heat_maps": True, "labels": heat_maps}
        kept = load_kept(kept_run(folder.with_name(f"{folder.name}-run"), settings, task, **data))
        found = find_images(images, kept.recipe.items, process).images
        done = list(predict_images(kept, found, folder, process, **options))
        assert [prediction.error for prediction in done] == [""] * len(done)
        return done, folder

    return run


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def grey_png(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def colourfulness(overlay: np.ndarray) -> np.ndarray:
    """(H, W) 0 where the overlay shows the grey image alone."""
    return np.ptp(overlay.astype(int), axis=-1)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cxr")
    synthesize(out, task="cxr", sites=2, patients=2, seed=7)
    return out / "site-1"


@pytest.fixture(scope="module")
def cxr_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = ["nodule", "cavity", "reticulation", "consolidation"]
    model = {"name": "small-cnn", "width": 4}
    return kept_run(tmp_path_factory.mktemp("run") / "cxr", model, {"labels": labels}, **{"image-size": 64})


# Probabilities


def test_probabilities_are_those_of_the_evaluation(cxr_run, phantoms, predict):
    config = run_file.load(cxr_run / "run.toml")
    with (phantoms / "manifest.csv").open() as file:
        images = [phantoms / row["image"] for row in csv.DictReader(file)]
    data = load_dataset(
        phantoms / "manifest.csv", task=config.task, preset="cxr", image_size=64, in_channels=1, max_unreadable=0.0,
        site_share=0.2, seed=7, name="site-1", cache_dir=None,
    )  # fmt: skip
    _, logits, _ = next(predictions(network_of(config), data, np.arange(len(data))))
    expected = 1 / (1 + np.exp(-logits.astype(np.float64)))
    status, out, err, folder = predict(cxr_run, *images, "--quiet")
    assert (status, err) == (0, "")
    table = rows(folder)
    assert list(table[0]) == ["number", "image", *config.task.labels, "error"]
    found = [[float(row[label]) for label in config.task.labels] for row in table]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert [row["image"] for row in table] == [str(path) for path in images]
    assert f"{expected[0, 0]:.3f}" in out and "nodule" in out
    assert np.ptp(expected, axis=0).max() > 1e-3, "the images are told apart"


def test_a_folder_is_searched_and_json_says_what_the_csv_says(cxr_run, phantoms, predict):
    status, out, err, folder = predict(cxr_run, phantoms, "--json", "--heat-map")
    assert (status, err) == (0, "1 files in the folders are no images and were passed over\n")  # the manifest
    said = json.loads(out)
    table = rows(folder)
    assert said["out"] == str(folder)
    assert [image["image"] for image in said["images"]] == sorted(str(path) for path in (phantoms / "images").iterdir())
    for image, row in zip(said["images"], table, strict=True):
        assert (str(image["number"]), image["error"]) == (row["number"], None)
        best = max(image["probabilities"], key=image["probabilities"].get)
        assert all(abs(float(row[label]) - value) < 1e-6 for label, value in image["probabilities"].items())
        name = f"image-{image['number']:04d}-heat-map-{best}.png"
        assert image["files"] == [{"what": best, "file": name, "slice": None}]
        assert {key: value for key, value in row.items() if key.startswith("heat_map") and value} == {
            f"heat_map/{best}": name
        }
        original = read_image(Path(image["image"]))
        overlay = pixels(folder / name)
        assert overlay.shape == (*original.shape[1:], 3)


def test_the_network_is_loaded_tensor_by_tensor(tmp_path):
    path = kept_run(tmp_path / "run", {"name": "resnet50", "width": 4, "norm": "batch"}, FINDING, **{"image-size": 40})
    mine = network_of(run_file.load(path / "run.toml")).module.state_dict()
    kept = load_kept(path)
    assert kept.round == 3 and not kept.network.module.training
    found = kept.network.module.state_dict()
    assert mine.keys() == found.keys() and all(torch.equal(tensor, found[name]) for name, tensor in mine.items())


# Heat maps


@pytest.fixture
def corner(tmp_path: Path) -> Path:
    """A dark image, wider than high, with its lower left corner bright."""
    values = np.full((48, 96), 10)
    values[36:, :18] = 250
    return grey_png(tmp_path / "corner.png", values)


def test_heat_lies_on_what_speaks_for_the_label(corner, drawn):
    (found,), folder = drawn("spot", FINDING, corner, heat_maps=("bright", "dark"), **{"image-size": 32})
    assert [each.what for each in found.drawn] == ["bright", "dark"]
    bright, dark = (pixels(folder / each.file) for each in found.drawn)
    assert bright.shape == dark.shape == (48, 96, 3)
    inside, outside = np.zeros((48, 96), bool), np.ones((48, 96), bool)
    inside[40:, :14], outside[32:, :22] = True, False
    assert (colourfulness(bright)[inside] > 30).all() and (colourfulness(bright)[outside] == 0).all()
    assert (colourfulness(dark)[outside] > 30).all() and (colourfulness(dark)[inside] == 0).all()
    assert np.unique(bright[outside]).tolist() == [10], "the image shows through"


@pytest.mark.parametrize(
    "data",
    [
        {"items": "volumes", "volume-size": [8, 12, 12]},
        {"items": "patches", "volume-size": [4, 5, 4]},
        {"items": "slices", "image-size": 12},
    ],
    ids=lambda data: data["items"],
)
def test_in_3d_the_heat_map_is_of_the_hottest_slice_and_says_which(tmp_path, drawn, data):
    values = np.full((7, 10, 12), 5, np.float32)
    values[4, 2:5, 6:10] = 200
    write_nifti(Volume(values=values, affine=affine_of((2.0, 1.0, 1.0))), tmp_path / "scan.nii.gz")
    network = {"name": "test_predict:spot"}
    (found,), folder = drawn(network, FINDING, tmp_path / "scan.nii.gz", heat_maps=("bright",), **data)
    assert found.drawn == (Drawn(what="bright", file="image-0001-heat-map-bright-slice-005.png", slice=5),)
    heat = colourfulness(pixels(folder / found.drawn[0].file))
    expected = np.zeros((10, 12), bool)
    expected[2:5, 6:10] = True
    assert np.array_equal(heat > 0, expected[::-1, ::-1])  # the front up, and the patient's right on the left


def test_attention_gates_are_three_overlays(corner, drawn):
    network = {"name": "attention-unet", "width": 2}
    (found,), folder = drawn(network, LUNG, corner, heat_maps=(), **{"image-size": 32})
    assert [each.what for each in found.drawn] == ["mask", "overlay", "gate-1", "gate-2", "gate-3"]
    for each in found.drawn[1:]:
        assert each.file == f"image-0001-{each.what}.png"
        assert pixels(folder / each.file).shape == (48, 96, 3)


def affine_of(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Of a volume in canonical order: d to the head, h to the front, w to the right."""
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], range(4)] = (*spacing_mm, 1.0)
    return affine


# Masks, in the geometry of the image


def test_a_mask_is_exactly_the_image_it_was_made_of(tmp_path, drawn):
    """Upright and lying, reduced, enlarged, and as it is."""
    for shape, size in (((96, 48), 48), ((48, 96), 48), ((24, 16), 48), ((64, 64), 64), ((64, 32), 32)):
        values = np.zeros(shape)
        values[-shape[0] // 4 :, : shape[1] // 2] = 255  # one corner, and a block that touches no edge
        values[8:16, 4:12] = 255
        image = grey_png(tmp_path / f"{shape}-{size}.png", values)
        (found,), folder = drawn("outline", LUNG, image, **{"image-size": size})
        mask, overlay = found.drawn
        assert np.array_equal(read_mask(folder / mask.file), values > 127)
        assert found.voxels == {"lung": int((values > 127).sum())}
        assert np.array_equal(colourfulness(pixels(folder / overlay.file)) > 0, values > 127)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(8, 40), st.integers(0, 3))
def test_undoing_the_letterbox_brings_every_corner_home(height, width, size, which):
    """Whatever the shape: a gradient that rises away from one corner has its lowest value there again."""
    rise = np.add.outer(np.arange(height) / height, np.arange(width) / width).astype(np.float32) + 1
    image = np.rot90(rise, 2 * (which // 2))[:, :: 1 - 2 * (which % 2)]
    found = without_letterbox(letterbox(image[None].copy(), size), (height, width))[0]
    assert found.shape == image.shape
    assert found.argmin() == image.argmin() or found.min() == found.flat[image.argmin()]
    assert found.min() >= 1 - 1e-5, "no padding is left"


TURNS = {
    "canonical": affine_of((2.0, 1.0, 1.5)),
    "turned": affine_of((2.0, 1.0, 1.5)) @ np.array([[0, 1, 0, 0], [-1, 0, 0, 7], [0, 0, -1, 3], [0, 0, 0, 1.0]]),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(
    "data",
    [
        {"items": "volumes", "volume-size": [16, 16, 16]},
        {"items": "patches", "volume-size": [6, 6, 6]},
        {"items": "slices", "image-size": 12},
    ],
    ids=lambda data: data["items"],
)
def test_the_mask_of_a_volume_has_its_affine_and_its_very_voxels(tmp_path, drawn, turn, data):
    values = np.zeros((9, 12, 12), np.float32)
    values[0, 0, :3] = values[5:8, 9:, 2:7] = 300
    write_nifti(Volume(values=values, affine=TURNS[turn]), tmp_path / "scan.nii")
    (found,), folder = drawn("outline", LUNG, tmp_path / "scan.nii", **data)
    mask, overlay = found.drawn
    result = read_nifti(folder / mask.file, labels=True)
    np.testing.assert_allclose(result.affine, TURNS[turn], atol=1e-6)
    assert np.array_equal(result.values, values > 0)
    assert found.voxels["lung"] * found.voxel_ml == pytest.approx((values > 0).sum() * 3 / 1000)
    assert overlay.slice is not None


def test_what_a_volume_network_did_not_see_is_not_in_the_mask(tmp_path, drawn):
    values = np.full((8, 8, 8), 255, np.float32)
    values[0, 0, 0] = 0  # so that there is a range
    write_nifti(Volume(values=values, affine=affine_of((1.0, 1.0, 1.0))), tmp_path / "scan.nii")
    _, folder = drawn("outline", LUNG, tmp_path / "scan.nii", **{"items": "volumes", "volume-size": [4, 4, 4]})
    seen = np.zeros((8, 8, 8), bool)
    seen[2:6, 2:6, 2:6] = True
    assert np.array_equal(read_nifti(folder / "image-0001-mask.nii.gz", labels=True).values, seen)


@pytest.mark.parametrize(
    "data", [{"items": "patches", "volume-size": [8, 8, 8]}, {"items": "slices", "image-size": 32}]
)
def test_a_resampled_volume_comes_back_within_a_voxel(tmp_path, drawn, data):
    values = np.zeros((12, 24, 20), np.float32)
    values[3:8, 10:20, 4:14] = 100
    write_nifti(Volume(values=values, affine=affine_of((2.0, 1.0, 1.0))), tmp_path / "scan.nii")
    _, folder = drawn("outline", LUNG, tmp_path / "scan.nii", **{"spacing-mm": [1.5, 1.5, 1.5], **data})
    mask = read_nifti(folder / "image-0001-mask.nii.gz", labels=True).values
    assert mask.shape == values.shape
    edges = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3)]
    assert np.abs(np.array(edges) - [(3, 7), (10, 19), (4, 13)]).max() <= 1


def test_the_more_probable_label_has_the_pixel_and_labels_are_counted_by_themselves(tmp_path, drawn):
    values = np.zeros((32, 32))
    values[4:12, 4:12], values[20:28, 20:28] = 160, 255
    image = grey_png(tmp_path / "image.png", values)
    task = {"kind": "segmentation", "labels": ["tissue", "bone"]}
    (found,), folder = drawn("outline", task, image, **{"image-size": 32})
    expected = np.select([values > 200, values > 100], [2, 1])
    assert np.array_equal(read_mask(folder / found.drawn[0].file), expected)
    assert found.voxels == {"tissue": 128, "bone": 64}


# What an image is


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series with a note beside each, an enhanced object, and a folder of cines."""
    top = tmp_path_factory.mktemp("scans")
    body, _ = phantom_body((6, 16, 14))
    scan = Acquisition(shape=(6, 16, 14))
    for number in (1, 2):
        write_series(top / f"series-{number}", body, replace(scan, seed=number))
        (top / f"series-{number}" / "README.txt").write_text("not an image")
    (top / "others").mkdir()
    enhanced_object(body, scan).save_as(top / "others" / "enhanced", enforce_file_format=True)
    write_nifti(Volume(values=body, affine=scan.affine), top / "others" / "body.nii.gz")
    return top


def test_a_series_folder_is_one_image_and_other_files_are_one_each(tmp_path, scans, predict):
    data = {"items": "volumes", "volume-size": [8, 16, 16], "preset": "ct-soft"}
    run = kept_run(tmp_path / "run", {"name": "small-cnn", "width": 2}, FINDING, **data)
    status, _, err, folder = predict(run, scans)
    assert status == 0, err
    table = rows(folder)
    assert [row["image"] for row in table] == [
        str(scans / name) for name in ("others/body.nii.gz", "others/enhanced", "series-1", "series-2")
    ]
    assert [row["error"] for row in table] == [""] * 4
    assert "2 files" in err
    assert len({row["bright"] for row in table}) == 1, "the same body, however it is stored"


def test_a_cine_has_a_mask_for_every_frame(tmp_path, predict):
    frames = np.zeros((3, 16, 16), np.uint8)
    frames[1, 4:8, 4:8] = frames[2, :, 8:] = 255
    cine = image_object(frames, bits=8, SOPClassUID=UltrasoundMultiFrameImageStorage)
    written(cine, tmp_path / "cine.dcm")
    data = {"items": "slices", "image-size": 16, "preset": "us"}
    run = kept_run(tmp_path / "run", {"name": "test_predict:outline"}, LUNG, **data)
    status, out, err, folder = predict(run, tmp_path / "cine.dcm")
    assert status == 0, err
    for number in (1, 2, 3):
        mask = read_mask(folder / f"image-0001-mask-slice-{number:03d}.png")
        assert np.array_equal(mask, frames[number - 1] > 0)
    (row,) = rows(folder)
    assert list(row) == ["number", "image", "pixels/lung", "ml/lung", "mask", "overlay", "overlay/slice", "error"]
    assert (row["mask"], row["overlay/slice"]) == ("image-0001-mask-slice-001.png", "3")
    assert (row["pixels/lung"], row["ml/lung"]) == ("144", "")
    assert "lung" in out and "144" in out


def test_the_probability_of_a_volume_is_the_mean_over_its_slices(tmp_path, drawn):
    values = np.zeros((2, 8, 8), np.float32)
    values[1] = 255
    write_nifti(Volume(values=values, affine=affine_of((1.0, 1.0, 1.0))), tmp_path / "scan.nii")
    (found,), _ = drawn("spot", FINDING, tmp_path / "scan.nii", **{"items": "slices", "image-size": 8})
    assert found.probabilities["bright"] == pytest.approx((0.5 + 1 / (1 + np.exp(-1))) / 2, abs=1e-6)


# What goes wrong


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A good DICOM file and a good JPEG among bad ones."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    written(image_object(cells_of(picture())), folder / f"b-{SECRET}.dcm")
    (folder / "a.dcm").write_bytes((folder / f"b-{SECRET}.dcm").read_bytes()[:3000])
    (folder / "c.png").write_text("not a picture")
    grey_png(folder / "d.jpg", np.arange(64 * 64).reshape(64, 64) % 251)
    return folder


def test_bad_files_are_rows_with_a_reason_and_stop_nothing(cxr_run, mixed, predict):
    status, out, err, folder = predict(cxr_run, mixed, mixed / "gone.png", "--heat-map")
    assert status == 0
    table = rows(folder)
    assert [bool(row["error"]) for row in table] == [True, False, True, False, True]
    assert all(row["nodule"] == "" for row in table if row["error"])
    assert (table[2]["error"], table[4]["error"]) == ("neither DICOM, PNG nor JPEG", "no such file")
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"image {number} of 5" for number in (1, 3, 5)]
    assert "2 of 5 images" in out
    assert SECRET not in err and "mixed" not in err and ".png" not in err
    assert sorted(path.name[:10] for path in folder.glob("*.png")) == ["image-0002", "image-0004"]
    for path in folder.glob("*.png"):
        assert SECRET.encode() not in path.read_bytes()
        with Image.open(path) as image:
            assert image.info == {}, "nothing of a header is in a picture"


def test_only_when_every_file_failed_is_it_an_error(cxr_run, mixed, predict):
    status, out, err, folder = predict(cxr_run, mixed / "c.png", mixed / "gone.png", "--json")
    assert status == 1
    assert [image["probabilities"] for image in json.loads(out)["images"]] == [None, None]
    assert err.splitlines()[-1] == "error: none of the 2 images can be used; predictions.csv says why of each"
    assert len(rows(folder)) == 2


def test_odd_file_names_do_no_harm(cxr_run, tmp_path, predict):
    good = grey_png(tmp_path / "good.png", np.arange(64 * 64).reshape(64, 64) % 251)
    names = [b"[red]name.png", b"latin-\xe4.png", b"new\nline.png", b"esc\x1b[31m.png", b'comma,"quote".png']
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(good.read_bytes())
    status, out, err, folder = predict(cxr_run, *(tmp_path / os.fsdecode(name) for name in names))
    assert status == 0, err
    table = rows(folder)
    assert [row["error"] for row in table] == [""] * 5
    assert [Path(row["image"]).name for row in table][2:] == [name.decode() for name in names[2:]]
    assert "\x1b" not in out
    assert "[red]name" in out.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--heat-map", "--label", "nodul"], 'the network knows no label "nodul"; there are nodule, cavity,'),
        (["--label", "nodule"], "add --heat-map"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_folder(cxr_run, phantoms, predict, options, line):
    status, _, err, folder = predict(cxr_run, phantoms, *options)
    assert status == 1 and line in err and err.count("\n") == 1
    assert not folder.exists()


def test_refuses_heat_maps_of_networks_that_draw_masks(tmp_path, corner, predict):
    run = kept_run(tmp_path / "unet", {"name": "unet", "width": 2}, LUNG, **{"image-size": 32})
    assert "draws masks" in predict(run, corner, "--heat-map")[2]
    gates = kept_run(tmp_path / "gates", {"name": "attention-unet", "width": 2}, LUNG, **{"image-size": 32})
    assert "leave --label out" in predict(gates, corner, "--heat-map", "--label", "lung")[2]


def test_never_overwrites_and_finds_nothing_in_an_empty_folder(cxr_run, phantoms, tmp_path, predict):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "file").write_text("keep me")
    status, _, err, _ = predict(cxr_run, phantoms, out=out)
    assert status == 1 and "choose another --out" in err
    assert [path.name for path in out.iterdir()] == ["file"]
    status, _, err, folder = predict(cxr_run, out)
    assert status == 1 and "there is no image" in err and not folder.exists()


def test_a_run_without_a_usable_network_is_one_clear_line(tmp_path, predict, corner):
    status, _, err, _ = predict(tmp_path / "nowhere", corner)
    assert (status, err) == (1, "error: there is no such run folder\n")
    (tmp_path / "empty").mkdir()
    status, _, err, _ = predict(tmp_path / "empty", corner)
    assert status == 1 and err.startswith("error: the run kept no network") and err.count("\n") == 1
    run = kept_run(tmp_path / "run", {"name": "small-cnn", "width": 2}, FINDING, **{"image-size": 32})
    good, facts = load_file(run / "model.safetensors"), json.loads((run / "model.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises((ModelError, ConfigError), match=match):
            load_kept(run)

    save_file({**good, "classifier.bias": torch.tensor([0.0, float("nan")])}, run / "model.safetensors")
    refused("NaN")
    save_file({**good, "classifier.bias": torch.zeros(3)}, run / "model.safetensors")
    refused("another shape")
    save_file({name: tensor for name, tensor in good.items() if name != "classifier.bias"}, run / "model.safetensors")
    refused("other tensors")
    (run / "model.safetensors").write_bytes(b"damaged")
    refused("cannot be read")
    (run / "model.safetensors").unlink()
    refused("no model.safetensors")
    save_file(good, run / "model.safetensors")
    load_kept(run)
    for change, match in (
        ({"layout": "0" * 64}, "builds another network"),
        ({"schema": 2}, "schema 2"),
        ({"preprocessing": None}, "damaged"),
        ({"preprocessing": {**facts["preprocessing"], "preset": "cxx"}}, "unknown"),
        ({"preprocessing": {**facts["preprocessing"], "dataset": "own:data"}}, "function of its own"),
        ({"model": {**facts["model"], "name": "smal-cnn"}}, "small-cnn"),
    ):
        (run / "model.json").write_text(json.dumps({**facts, **change}))
        refused(match)
    (run / "model.json").write_text("{")
    refused("cannot be read")


def test_an_image_that_the_network_cannot_take_is_a_row(tmp_path, process):
    volume = np.random.default_rng(0).random((4, 8, 8), np.float32)
    for name, values in (("a", np.zeros((4, 8, 8), np.float32)), ("b", volume)):
        write_nifti(Volume(values=values, affine=affine_of((1.0, 1.0, 1.0))), tmp_path / f"{name}.nii")
    data = {"items": "volumes", "volume-size": [2, 8, 8]}
    kept = load_kept(kept_run(tmp_path / "run", {"name": "test_predict:Picky"}, FINDING, **data))
    first, second = predict_images(kept, [tmp_path / "a.nii", tmp_path / "b.nii"], tmp_path, process)
    assert first.error == "the network fails on it (ValueError)"
    assert set(second.probabilities) == {"bright", "dark"}


class Picky(nn.Module):
    """Fails on images without any structure."""

    def __init__(self, *, in_channels: int, outputs: int, norm: str, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.std() == 0:
            raise ValueError("secret")
        return self.head(images.flatten(2).mean(dim=2))


# Pictures


def test_the_heat_colours_rise_evenly_in_lightness():
    """CIE L* of sRGB (IEC 61966-2-1), which they were not made with."""
    encoded = heat_colours() / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    assert (np.diff(lightness) > 0).all()
    steps = np.diff(lightness[::16])
    assert steps.min() > 0.7 * steps.mean() and steps.max() < 1.3 * steps.mean()


def test_an_overlay_has_square_pixels_and_no_side_above_the_longest():
    grey = np.zeros((100, 3000), np.uint8)
    assert heat_overlay(grey, grey.astype(np.float32)).shape == (round(100 * LONGEST / 3000), LONGEST, 3)
    assert region_overlay(grey[:, :50], grey[:, :50], (5.0, 1.0)).shape == (500, 50, 3)
    assert region_overlay(grey[:, :50], grey[:, :50], (1.0, 2.5)).shape == (100, 125, 3)


def test_heat_below_the_threshold_is_transparent():
    grey = np.full((4, 4), 90, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0], heat[3, 3] = 0.1, 1.0
    overlay = heat_overlay(grey, heat)
    assert overlay[0, 0].tolist() == [90, 90, 90]
    mixed = 0.4 * 90 + 0.6 * heat_colours()[255].astype(float)
    assert np.abs(overlay[3, 3] - mixed).max() <= 0.5


# The whole command


def test_as_a_user_types_it_without_out(fedmed, cxr_run, phantoms, tmp_path):
    image = next((phantoms / "images").iterdir())
    done = fedmed("predict", cxr_run, image, "--heat-map", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "predictions").iterdir()
    assert folder.name.endswith("-cxr")
    assert f"1 of 1 images, 1 pictures and masks: predictions/{folder.name}/predictions.csv" in done.stdout


@pytest.mark.skipif(not (DATA / "vol3d").is_dir(), reason="the real images are not beside the repository")
def test_real_volumes_have_masks_on_their_own_grid(drawn):
    scans = sorted((DATA / "vol3d" / "dev").rglob("*.nii.gz"))[:2]
    data = {"items": "volumes", "volume-size": [48, 48, 48], "preset": "mr"}
    _, folder = drawn({"name": "attention-unet", "width": 2}, LUNG, *scans, heat_maps=(), **data)
    for number, scan in enumerate(scans, start=1):
        mask, image = read_nifti(folder / f"image-{number:04d}-mask.nii.gz", labels=True), read_nifti(scan)
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
