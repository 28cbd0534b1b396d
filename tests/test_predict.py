"""A kept network on new images: probabilities, what counts as an image, and one bad file that stops nothing."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_files import SECRET, cells_of, image_object, picture, written
from kept_runs import FINDING, LUNG, grey_png, kept_run, network_of, pixels
from phantom_series import Acquisition, enhanced_object, phantom_body, write_series
from PIL import Image
from pydicom.uid import UltrasoundMultiFrameImageStorage

from fedmed import config as run_file
from fedmed.cli import main
from fedmed.imaging.dataset import load_dataset
from fedmed.imaging.phantoms.hospitals import synthesize
from fedmed.imaging.reading import read_image, read_mask
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.imaging.volumes.volume import Volume
from fedmed.training.evaluate import predictions


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


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
    run = kept_run(tmp_path / "run", {"name": "kept_runs:outline"}, LUNG, **data)
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


def test_an_image_that_is_not_there_is_one_line_and_no_folder(cxr_run, tmp_path, predict):
    status, _, err, folder = predict(cxr_run, tmp_path / "gone.png")
    assert (status, err) == (1, "error: there is no such file or folder\n") and not folder.exists()


def test_odd_file_names_do_no_harm(cxr_run, tmp_path, predict, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # else the table shortens long paths
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


def test_refuses_heat_maps_of_networks_that_draw_masks(tmp_path, predict):
    image = grey_png(tmp_path / "image.png", np.eye(32) * 255)
    run = kept_run(tmp_path / "unet", {"name": "unet", "width": 2}, LUNG, **{"image-size": 32})
    assert "draws masks" in predict(run, image, "--heat-map")[2]
    gates = kept_run(tmp_path / "gates", {"name": "attention-unet", "width": 2}, LUNG, **{"image-size": 32})
    assert "leave --label out" in predict(gates, image, "--heat-map", "--label", "lung")[2]


def test_never_overwrites_and_finds_nothing_in_an_empty_folder(cxr_run, phantoms, tmp_path, predict):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "file").write_text("keep me")
    status, _, err, _ = predict(cxr_run, phantoms, out=out)
    assert status == 1 and "choose another --out" in err
    assert [path.name for path in out.iterdir()] == ["file"]
    status, _, err, folder = predict(cxr_run, out)
    assert status == 1 and "there is no image" in err and not folder.exists()


def test_a_run_without_a_network_is_one_clear_line(tmp_path, predict):
    image = tmp_path / "image.png"  # is never read
    status, _, err, _ = predict(tmp_path / "nowhere", image)
    assert (
        status == 1
        and err.startswith(f"error: there is no run folder {tmp_path / 'nowhere'}; one holds")
        and "model.json" in err
    )
    (tmp_path / "empty").mkdir()
    status, _, err, _ = predict(tmp_path / "empty", image)
    assert status == 1 and err.startswith("error: the run kept no network") and err.count("\n") == 1


# Where results go


def test_without_out_results_go_into_a_folder_of_their_own(cxr_run, phantoms, tmp_path, monkeypatch, capsys):
    image = next((phantoms / "images").iterdir())
    monkeypatch.setattr(sys, "argv", ["fedmed", "predict", str(cxr_run), str(image), "--heat-map"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    (folder,) = (tmp_path / "predictions").iterdir()
    assert folder.name.endswith("-cxr")
    line = f"1 of 1 image, 1 file drawn: predictions/{folder.name}/predictions.csv"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_help_has_an_example_and_needs_no_torch(fedmed):
    shown = fedmed("predict", "--help").stdout
    assert "Example: fedmed predict" in shown and "a run folder  [required]" in shown
    light = "import sys, fedmed.cli.predict; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], check=False).returncode == 0
