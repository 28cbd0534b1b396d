"""The folder that a hospital without a registry installs from."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import wheelhouse
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedmed.durable import sha256_of
from fedmed.errors import ConfigError

ROOT = Path(__file__).parent.parent
SMALL = ("tomli-w", "safetensors", "packaging")


def run(*words: object, ok: bool = True, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=240, check=False, **options)
    assert done.returncode == 0 or not ok, done.stdout + done.stderr
    return done


def test_requirements_are_read_without_options_and_for_this_machine():
    text = (
        "--index-url https://registry.example/simple\n# a comment\n"
        "one==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
        "other==2.0 ; sys_platform == 'no-such' \\\n    --hash=sha256:cc\nOne_More==3.0 \\\n    --hash=sha256:dd\n"
    )
    first, more = wheelhouse._requirements(text, ())
    assert first == "one==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
    assert more.startswith("One_More==3.0")
    assert wheelhouse._requirements(text, ("one-more",)) == [more]


def test_without_arguments_it_says_what_it_needs():
    done = run(sys.executable, ROOT / "tools" / "wheelhouse.py", ok=False, cwd=ROOT)
    assert done.returncode == 2 and "required: folder, key" in done.stderr


def test_the_bill_names_exactly_the_wheels_and_no_place(tmp_path):
    wheel = tmp_path / "one_more-3.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    bill = {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [
            {
                "name": "one-more",
                "version": "3.0",
                "bom-ref": "m",
                "externalReferences": [{"url": "https://r.example"}],
            },
            {"name": "other", "version": "2.0", "bom-ref": "o"},
        ],
        "dependencies": [{"ref": "root", "dependsOn": ["m", "o"]}, {"ref": "o", "dependsOn": []}],
    }
    found = wheelhouse.bill_of(bill, [wheel])
    (component,) = found["components"]
    assert component["hashes"] == [{"alg": "SHA-256", "content": sha256_of(wheel)}]
    assert found["dependencies"] == [{"ref": "root", "dependsOn": ["m"]}]
    assert "http" not in json.dumps(found)


def test_the_key_is_its_owners_and_is_kept(tmp_path):
    key = wheelhouse.signing_key(tmp_path / "wheelhouse.key")
    assert (tmp_path / "wheelhouse.key").stat().st_mode & 0o077 == 0
    again = wheelhouse.signing_key(tmp_path / "wheelhouse.key")
    assert again.private_bytes_raw() == key.private_bytes_raw()
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "signer.pem").write_bytes(pem)
    page = (ROOT / "docs" / "offline-install.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("openssl pkey "))
    if shutil.which("openssl"):  # what is said by telephone is what the hospital computes
        assert run("sh", "-c", line, cwd=tmp_path).stdout.split()[0] == wheelhouse.fingerprint(key)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A wheelhouse of a few small packages: all of them are gigabytes."""
    folder = tmp_path_factory.mktemp("wheels") / "wheelhouse"
    try:
        count = wheelhouse.make_wheelhouse(ROOT, folder, Ed25519PrivateKey.generate(), only=SMALL)
    except ConfigError as error:
        if re.search(r"(?i)connect|resolve|network|timed out|dns", str(error)):
            pytest.skip("no package registry can be reached")
        raise
    assert count == len(SMALL) + 1
    return folder


@pytest.mark.slow
def test_a_fresh_environment_installs_from_it_alone(house, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--no-index")
    nowhere = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "PYTHONPATH": ""}
    needed = ("--find-links", house, "--require-hashes", "-r", house / "requirements.txt")
    run(*pip, *needed, env=nowhere)
    run(*pip, "--no-deps", *house.glob("fedmed-*.whl"), env=nowhere)
    run(python, "-c", "import tomli_w, safetensors, packaging, fedmed", env=nowhere, cwd=tmp_path)
    damaged = Path(shutil.copytree(house, tmp_path / "damaged"))
    with next(damaged.glob("tomli_w-*.whl")).open("ab") as file:
        file.write(b"\0")
    done = run(*pip, "--force-reinstall", "--find-links", damaged, *needed[2:], ok=False, env=nowhere)
    assert done.returncode != 0 and "DO NOT MATCH" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_page_s_commands_check_it_and_find_a_change(house, tmp_path):
    page = (ROOT / "docs" / "offline-install.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith(("openssl", "sha256sum"))]
    assert len(commands) == 3
    folder = Path(shutil.copytree(house, tmp_path / "copy"))
    for line in commands:
        run("sh", "-c", line, cwd=folder)
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("requirements.txt", "requirement5.txt"))
    assert run("sh", "-c", commands[1], cwd=folder, ok=False).returncode != 0
    (folder / "requirements.txt").write_text("evil==1.0\n")
    assert run("sh", "-c", commands[2], cwd=house, ok=False).returncode == 0
    assert run("sh", "-c", commands[2], cwd=folder, ok=False).returncode != 0


@pytest.mark.slow
def test_no_file_names_where_a_package_came_from(house):
    for path in house.iterdir():
        if path.suffix != ".whl":
            assert not re.search(rb"https?://(?!cyclonedx)", path.read_bytes()), path.name
    bill = json.loads((house / "sbom.cdx.json").read_text())
    assert {each["name"] for each in bill["components"]} == set(SMALL)
