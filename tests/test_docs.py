"""What the documents say is true: keys, commands, links and examples."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from small_hospitals import hospital

import fedmed
from fedmed.cli import app
from fedmed.config import RunConfig, flatten, load, nested
from fedmed.reporting.writers import INSTALL

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "simulations/*/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
SMALL_RUN = """
[model]
name = "small-cnn"
[task]
labels = ["a", "b"]
[data]
sites = ["{}", "{}"]
server = "{}"
image-size = 8
"""
EVENT = re.compile(r"""(?:_tell|\.event)\(\s*"([a-z_]+)"(?: if \w+ else "([a-z_]+)")?""")
ROW = re.compile(r"^\| `([a-z-]+(?:\.[a-z-]+)?)` \| `([^`]*)` \|", re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def fedmed_lines() -> Iterator[tuple[str, str]]:
    """Every command line of a code block that starts with `fedmed`, with the document that shows it."""
    for path in DOCUMENTS:
        for _, text in BLOCK.findall(path.read_text(encoding="utf-8")):
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith("fedmed "):
                    yield name(path), line


def parse(words: list[str]) -> None:
    """Parse as `fedmed` would, without running anything. Its groups have no options of their own."""
    command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        first, *words = words or [""]
        if first not in command.commands:
            raise click.UsageError(f"no such command: {first}")
        command = command.commands[first]
    command.make_context(command.name, words)


def test_every_kind_of_event_is_explained():
    section = (ROOT / "docs" / "run-folder.md").read_text().partition("## Events")[2].partition("\n## ")[0]
    sources = [path.read_text() for path in (ROOT / "fedmed").rglob("*.py")]
    told = {kind for source in sources for kinds in EVENT.findall(source) for kind in kinds if kind}
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == told


@pytest.mark.parametrize(("document", "line"), sorted(set(fedmed_lines())))
def test_shown_commands_parse(document, line):
    parse(shlex.split(line, comments=True)[1:])


def test_the_check_of_commands_can_fail():
    parse(shlex.split("simulate run.toml --dry-run"))
    for line in ("simulate run.toml --dri-run", "sweep run.toml", "data sint x", "simulate a.toml b.toml"):
        with pytest.raises(click.UsageError):
            parse(shlex.split(line))


def test_readme_shows_every_command():
    shown = {" ".join(line.split()[:2]) for _, line in fedmed_lines()}
    assert {f"fedmed {command}" for command in typer.main.get_command(app).commands} <= shown


def anchors(path: Path) -> set[str]:
    """What a link to a part of this page may say: its headings in the form that GitHub gives them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading)).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_lead_somewhere(path):
    for _, target in LINK.findall(BLOCK.sub("", path.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            page, _, anchor = target.partition("#")
            there = path.parent / page if page else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A run's *first* day\n```\n# no heading\n```\n## `privacy.mode`, [ε](x.md) & more\n")
    assert anchors(page) == {"a-runs-first-day", "privacymode-ε--more"}


def test_configuration_table_is_the_configuration():
    shown = ROW.findall((ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"))
    assert len(shown) == len(dict(shown)), "a key is there twice"
    assert dict(shown) == {key: written(value) for key, value in defaults().items()}


def defaults() -> dict[str, object]:
    values = nested(RunConfig())

    def listed(key: str) -> bool:
        section, _, name = key.partition(".")
        return bool(name) and isinstance(values[section][name], list)

    return {key: [] if listed(key) else value for key, value in flatten(RunConfig()).items()}


def written(value: object) -> str:
    """A value as the table and a run file write it."""
    return json.dumps(value)


def test_flower_gets_the_same_defaults():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shown = {}
    for key, value in project["tool"]["flwr"]["app"]["config"].items():
        shown |= {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
    assert shown == flatten(RunConfig())


def test_what_is_to_be_installed_is_named_as_in_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {each for extra in project["optional-dependencies"].values() for each in extra}
    texts = [path.read_text(encoding="utf-8") for path in (*DOCUMENTS, *(ROOT / "fedmed").rglob("*.py"))]
    ours = re.compile(r"pip install\s+[\"']?fedmed\b")
    assert not any(map(ours.search, texts)), "fedmed of the registry is another project"
    named = {name for text in texts for name in re.findall(r"pip install\s+'([^'{]+)'", text)}
    assert named | set(INSTALL.values()) == known


def test_shown_run_files_are_valid(tmp_path):
    shown = [text for path in DOCUMENTS for text in blocks(path, "toml")]
    assert shown
    for number, text in enumerate(shown):
        run = tmp_path / f"{number}.toml"
        run.write_text(text, encoding="utf-8")
        load(run)


def test_every_number_of_readmes_first_table_stands_in_the_page_that_its_row_names():
    def numbers(text: str) -> set[str]:
        return set(re.findall(r"[+-]?\d+\.?\d*", text.replace(",", "").replace("−", "-")))

    rows = re.findall(r"^\|[^|]+\|([^|]+)\| \[[a-z-]+\]\(([^)]+)\) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 5
    for shown, page in rows:
        assert numbers(shown.replace("DenseNet-121", "")) <= numbers((ROOT / page).read_text()), page


def test_readme_example_for_python_runs(tmp_path):
    (example,) = blocks(ROOT / "README.md", "python")
    manifests = [
        hospital(tmp_path / name, patients=12, seed=seed) for seed, name in enumerate(("north", "south", "server"))
    ]
    (tmp_path / "run.toml").write_text(SMALL_RUN.format(*manifests), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '"value"' in done.stdout.replace("'", '"')
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


def test_every_public_name_is_there_and_no_other():
    assert {name for name in fedmed.__all__ if callable(getattr(fedmed, name))} == set(fedmed.__all__)
    assert set(dir(fedmed)) == {*fedmed.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        fedmed.simulat  # noqa: B018  # to look it up is the test


def test_own_network_and_data_example_runs(fedmed_process, tmp_path):
    page = ROOT / "docs" / "your-own-network-and-data.md"
    (module,), (run,) = blocks(page, "python"), blocks(page, "toml")
    (tmp_path / "hospital.py").write_text(module, encoding="utf-8")
    (tmp_path / "run.toml").write_text(run, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = fedmed_process("simulate", "run.toml", "--out", "out", "--json", cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "completed"
    assert [site["site"] for site in result["sites"]] == ["east", "west"]
    assert all(site["metrics"]["auroc"]["value"] is not None for site in result["sites"])
    assert result["server"]["metrics"]["auroc"]["value"] > 0.8


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(240)
def test_flower_demo_runs_and_leaves_nothing_running(tmp_path):
    keys = 'model.name="toy:network" task.labels="a,b" data.dataset="toy:dataset" data.sites="a-40,b-20" train.rounds=1'
    script = ROOT / "simulations" / "flower-demo" / "run.py"
    with tempfile.TemporaryDirectory() as temporary:  # not tmp_path, which is too long for Ray's sockets
        done = subprocess.run(
            [sys.executable, str(script), "--supernodes", "2", "-c", keys],
            env={**os.environ, "FEDMED_RUNS": str(tmp_path / "runs"), "TMPDIR": temporary},
            capture_output=True,
            text=True,
            timeout=220,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(Path(temporary).glob("fedmed-flower-*")) == []
        assert processes_with(temporary.encode()) == []
    (folder,) = (tmp_path / "runs").iterdir()
    assert done.stdout.splitlines()[-1] == f"completed: {folder}"
    assert (folder / "report.html").exists()


def processes_with(text: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            content = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
        except OSError:
            continue
        found += [int(folder.name)] if text in content else []
    return found
