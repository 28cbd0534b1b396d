"""How patients are dealt to virtual hospitals: always whole, always the same way, and as skewed as was asked."""

import csv
import io
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dicom_files import cells_of, image_object, picture, written
from hypothesis import given, settings
from hypothesis import strategies as st
from killed_run import count_calls
from rich.console import Console

from fedmed import config as run_file
from fedmed.cli.hospital_table import bar_of, hospital_table
from fedmed.config import RunConfig
from fedmed.durable import open_to_others
from fedmed.errors import ConfigError, DataError
from fedmed.federated import partition
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.virtual_hospitals import Hospital, planned, with_hospitals

people = st.lists(st.integers(0, 10_000), min_size=20, max_size=120, unique=True).map(
    lambda numbers: [f"P{number}" for number in numbers]
)
some = {"sites": st.integers(1, 8), "alpha": st.sampled_from([0.05, 0.5, 100.0]), "seed": st.integers(0, 2**31)}


@settings(max_examples=60, deadline=None)
@given(patients=people, rows=st.randoms(), **some)
def test_every_patient_is_at_one_hospital_whatever_the_order_of_the_rows(patients, rows, sites, alpha, seed):
    shuffled = patients.copy()
    rows.shuffle(shuffled)
    for scheme in (
        lambda each: partition.iid(each, sites=sites, seed=seed),
        lambda each: partition.quantity(each, sites=sites, alpha=alpha, seed=seed),
        lambda each: partition.dirichlet({p: p[-1] for p in each}, sites=sites, alpha=alpha, seed=seed),
    ):
        dealt = scheme(patients)
        assert sorted(p for part in dealt.values() for p in part) == sorted(patients)
        assert len(dealt) == sites
        assert min(map(len, dealt.values())) >= partition.LEAST
        assert scheme(shuffled) == dealt


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    classes = {f"P{number}": str(number % 4) for number in range(2000)}

    def spread(alpha: float) -> float:
        dealt = partition.dirichlet(classes, sites=5, alpha=alpha, seed=1)
        shares = [np.array(list(Counter(classes[p] for p in part).values())) / len(part) for part in dealt.values()]
        return float(np.mean([share.max() for share in shares]))

    assert spread(0.1) > 0.5
    assert spread(1000.0) < 0.3


def test_quantity_changes_sizes_and_iid_does_not():
    patients = [f"P{number}" for number in range(1000)]
    sizes = [len(part) for part in partition.quantity(patients, sites=5, alpha=0.3, seed=3).values()]
    assert max(sizes) > 2 * min(sizes)
    assert {len(part) for part in partition.iid(patients, sites=5, seed=3).values()} == {200}


def test_a_patient_of_several_labels_counts_for_the_rarest():
    positive = {"A": ["common", "rare"], "B": ["common"], "C": ["common"], "D": []}
    assert partition.class_of(positive) == {"A": "rare", "B": "common", "C": "common", "D": ""}


def test_too_few_patients_are_refused():
    with pytest.raises(ConfigError, match="every hospital needs 2 at least"):
        partition.iid(["A", "B", "C"], sites=2, seed=0)


def run_over(folder: Path, scheme: str, **keys: object) -> RunConfig:
    """Two manifests of twelve patients with two images each, one patient in both; and a run that deals them."""
    for place, name in enumerate(("north", "south")):
        (folder / name).mkdir(parents=True)
        rows = ["patient_id,image,finding,scanner_site"]
        for number in range(12):
            patient = "shared" if number == 0 else f"{name}-{number}"
            site = "centre" if number == 0 else f"h{number % 3}"
            for image in range(2):
                path = folder / name / f"{number}-{image}.dcm"
                maker, model = "Acme" if place and number else "Other", f"M{number % 2}"
                ds = image_object(cells_of(picture((8, 8))), Manufacturer=maker, ManufacturerModelName=model)
                written(ds, path)
                rows.append(f"{patient},{path.name},{number % 2},{site}")
        (folder / name / "manifest.csv").write_text("\n".join(rows) + "\n")
    values = {
        "task": {"labels": ["finding"]},
        "data": {"sites": ["north/manifest.csv", "south/manifest.csv"]},
        "simulation": {"partition": scheme, **keys},
    }
    return run_file.resolve_paths(run_file.validate(values), folder)


def manifests(config: RunConfig) -> dict[str, list[dict[str, str]]]:
    return {
        Path(site).parent.name: list(csv.DictReader(Path(site).read_text().splitlines())) for site in config.data.sites
    }


@pytest.mark.parametrize(
    ("scheme", "keys", "names"),
    [
        ("iid", {"partition-sites": 3}, ["site-1", "site-2", "site-3"]),
        ("dirichlet", {"partition-sites": 3, "partition-alpha": 0.1}, ["site-1", "site-2", "site-3"]),
        ("quantity", {"partition-sites": 3}, ["site-1", "site-2", "site-3"]),
        ("column", {"partition-column": "scanner_site"}, ["centre", "h0", "h1", "h2"]),
        ("scanner", {}, ["scanner-1", "scanner-2", "scanner-3", "scanner-4"]),
    ],
)
def test_written_hospitals_hold_every_row_once_and_are_what_was_planned(tmp_path, scheme, keys, names):
    config = run_over(tmp_path / "data", scheme, **keys)
    plan = planned(config)
    assert [hospital.name for hospital in plan] == names
    (tmp_path / "run").mkdir()
    hospitals = manifests(with_hospitals(config, tmp_path / "run"))
    assert {name: len(rows) for name, rows in hospitals.items()} == {h.name: h.images for h in plan}
    rows = [row for each in hospitals.values() for row in each]
    assert len({row["image"] for row in rows}) == len(rows) == 48
    assert all(Path(row["image"]).is_absolute() and Path(row["image"]).exists() for row in rows)
    assert rows[0].keys() == {"patient_id", "image", "finding", "scanner_site"}
    homes = {(row["patient_id"], name) for name, each in hospitals.items() for row in each}
    assert len(homes) == 23, "a patient of both manifests is one patient at one hospital"
    assert sum(h.positives[0] for h in plan) == sum(row["finding"] == "1" for row in rows)


def test_a_dry_run_shows_the_hospitals_and_the_share_of_every_label(tmp_path, fedmed):
    config = run_over(tmp_path / "data", "dirichlet", **{"partition-sites": 3})
    (tmp_path / "run.toml").write_text(run_file.to_toml(config))
    small = ("--set", "model.name=small-cnn", "--set", "data.image-size=8")
    done = fedmed("simulate", tmp_path / "run.toml", "--dry-run", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split("│") for line in (done.stdout + done.stderr).splitlines() if "site-" in line]
    for hospital, line in zip(planned(config), lines, strict=True):
        name, patients, images, finding = (cell.strip() for cell in line[1:-1])
        assert (name, patients, images.split()[0]) == (hospital.name, str(hospital.patients), str(hospital.images))
        share = hospital.positives[0] / hospital.images
        assert finding == f"{100 * share:3.0f} % {bar_of(share)}".strip()
    assert bar_of(0.0) == " " * 12 and bar_of(1.0) == "█" * 12 and bar_of(0.5).strip() == "█" * 6
    assert bar_of(1 / 16, width=2) == "▏ "


@pytest.mark.parametrize("count", [1, 4, 14])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_every_share_is_shown_however_narrow_the_terminal_is(count, width):
    labels, positives = [f"finding-{place}" for place in range(count)], tuple(range(count))
    hospital = Hospital(name="site-1", patients=30, images=50, positives=positives)
    console = Console(width=width, file=io.StringIO())
    console.print(hospital_table([hospital], labels, width))
    shown = console.file.getvalue()
    said = " ".join(line.split("│")[4].strip() for line in shown.splitlines() if line.startswith("│"))
    for label, positive in zip(labels, positives, strict=True):
        assert f"{2 * positive} % " in shown or f"{label} {2 * positive}" in said
    assert "…" not in shown


def test_hospitals_with_masks_have_no_shares():
    console = Console(width=80, file=io.StringIO())
    console.print(hospital_table([Hospital(name="site-1", patients=30, images=50)], ["a"] * 14, 80))
    assert "positive" not in console.file.getvalue() and "█" * 12 in console.file.getvalue()


def test_a_run_folder_keeps_its_hospitals_and_a_repeated_run_gets_the_same(tmp_path):
    config = run_over(tmp_path / "data", "dirichlet", **{"partition-sites": 3})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = manifests(with_hospitals(config, tmp_path / "one"))
    assert manifests(with_hospitals(config, tmp_path / "two")) == first
    for source in (tmp_path / "data").rglob("manifest.csv"):
        source.unlink()
    assert manifests(with_hospitals(config, tmp_path / "one")) == first
    assert not list((tmp_path / "one").glob(".partition-*"))


def test_a_hospital_may_be_called_order(tmp_path):
    config = run_over(tmp_path / "data", "column", **{"partition-column": "scanner_site"})
    for manifest in map(Path, config.data.sites):
        manifest.write_text(manifest.read_text().replace(",h0", ",order"))
    (tmp_path / "run").mkdir()
    assert list(manifests(with_hospitals(config, tmp_path / "run"))) == ["centre", "h1", "h2", "order"]


def test_a_column_that_tears_a_patient_is_missing_or_empty_is_refused_without_naming_anybody(tmp_path):
    config = run_over(tmp_path / "data", "column", **{"partition-column": "scanner_site"})
    manifest = Path(config.data.sites[0])
    good = manifest.read_text()
    manifest.write_text(good.replace("north-4,4-0.dcm,0,h1", "north-4,4-0.dcm,0,h2"))
    with pytest.raises(DataError, match="1 patients have images at more than one site") as error:
        planned(config)
    assert "north-4" not in str(error.value)
    manifest.write_text(good.replace("north-4,4-0.dcm,0,h1", "north-4,4-0.dcm,0,"))
    with pytest.raises(DataError, match="empty or missing"):
        planned(config)
    absent = config.simulation.model_copy(update={"partition_column": "ward"})
    manifest.write_text(good)
    with pytest.raises(DataError, match="empty or missing"):
        planned(config.model_copy(update={"simulation": absent}))


def test_patients_of_the_server_among_those_that_are_dealt_are_refused_without_naming_anybody(tmp_path):
    config = run_over(tmp_path / "data", "iid", **{"partition-sites": 3})
    server = tmp_path / "server.csv"
    served = config.model_copy(update={"data": config.data.model_copy(update={"server": str(server)})})
    server.write_text("patient_id,image,finding\nnorth-4,a.dcm,0\nshared,b.dcm,1\nshared,c.dcm,1\nother,d.dcm,1\n")
    with pytest.raises(DataError, match=r"data\.server: 2 of its patients are in data.sites too") as error:
        planned(served)
    assert "north-4" not in str(error.value) and "shared" not in str(error.value)
    server.write_text("patient_id,image,finding\nother,d.dcm,1\n")
    assert planned(served) == planned(config)


def test_what_a_kill_leaves_of_dealt_manifests_is_its_owners_alone_and_goes_when_the_run_is_resumed(tmp_path):
    config = run_over(tmp_path / "data", "iid", **{"partition-sites": 3})
    folder = RunFolder.create(tmp_path / "run", config)
    child = os.fork()
    if child == 0:
        try:
            count_calls("rename:2")
            with_hospitals(config, folder.path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = folder.path.glob(".partition-*")
    assert open_to_others(left) is False
    assert [open_to_others(path) for path in left.rglob("manifest.csv")] == [False]
    resumed = RunFolder.resume(folder.path)
    assert not list(folder.path.glob(".partition-*"))
    assert len(manifests(with_hospitals(config, resumed.path))) == 3


def test_what_a_scanner_is_called_is_never_shown(tmp_path):
    config = run_over(tmp_path / "data", "scanner")
    (tmp_path / "run").mkdir()
    plan = planned(config)
    shown = json.dumps([[h.name, h.patients, h.images] for h in plan])
    assert "Acme" not in shown
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"Acme" not in path.read_bytes()


def test_unreadable_headers_are_a_scanner_of_their_own(tmp_path):
    config = run_over(tmp_path / "data", "scanner")
    for path in (tmp_path / "data" / "north").glob("[34]-*.dcm"):
        path.unlink()
    assert len(planned(config)) == 5


def test_masks_have_no_label_skew(tmp_path):
    config = run_over(tmp_path / "data", "dirichlet")
    rows = Path(config.data.sites[0]).read_text().replace("finding", "mask")
    for site in config.data.sites:
        Path(site).write_text(rows)
    with pytest.raises(ConfigError, match='masks have none; try "quantity"'):
        planned(config.model_copy(update={"task": config.task.model_copy(update={"kind": "segmentation"})}))
