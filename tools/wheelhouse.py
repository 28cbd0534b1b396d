"""Everything that a hospital without a way to a package registry needs to install fedmed, in one signed folder.

`make wheelhouse` runs this where there is a registry. The folder holds every wheel, `requirements.txt` with their
hashes, `sbom.cdx.json` (CycloneDX), and `SHA256SUMS` with an Ed25519 signature that openssl can check. No file names
the place that a wheel came from. It fits machines of the kind that it was made on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from fedmed.deployment.files import SECRET, write_new
from fedmed.durable import sha256_of
from fedmed.errors import ConfigError

SUMS, SIGNATURE, PUBLIC = "SHA256SUMS", "SHA256SUMS.sig", "signer.pem"
REQUIREMENTS, SBOM = "requirements.txt", "sbom.cdx.json"
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


def make_wheelhouse(source: Path, folder: Path, key: Ed25519PrivateKey, *, only: Sequence[str] = ()) -> int:
    """Fill a new folder; gives the number of wheels.

    Args:
        source: a checkout of fedmed.
        folder: to make.
        key: that signs the sums.
        only: names of packages, if not all are wanted; fedmed's own wheel is always there.

    Raises:
        ConfigError: the folder exists, or a package cannot be had.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{folder} exists; remove the old folder first, or choose another name") from None
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        shutil.copy(source / "pyproject.toml", scratch)
        for name in ("README.md", "LICENSE"):
            shutil.copy(source / name, scratch)
        wanted = _requirements(_exported(scratch, "requirements.txt"), only)
        (scratch / REQUIREMENTS).write_text("".join(wanted), encoding="utf-8")
        _run(sys.executable, *PIP, "wheel", "--no-deps", "--require-hashes", "--wheel-dir", folder,
             "--requirement", scratch / REQUIREMENTS)  # fmt: skip
        bill = json.loads(_exported(scratch, "cyclonedx1.5"))
    wheels = sorted(folder.glob("*.whl"))
    (folder / REQUIREMENTS).write_text("".join(map(_pinned, wheels)), encoding="utf-8")
    _run(_uv(), "build", "--quiet", "--wheel", "--out-dir", folder, source)
    (folder / ".gitignore").unlink(missing_ok=True)  # uv's
    wheels = sorted(folder.glob("*.whl"))
    (folder / SBOM).write_text(json.dumps(bill_of(bill, wheels), indent=1) + "\n", encoding="utf-8")
    public = key.public_key()
    text = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_new(folder / PUBLIC, text)
    sums = "".join(f"{sha256_of(path)}  {path.name}\n" for path in sorted(folder.iterdir())).encode()
    write_new(folder / SUMS, sums)
    write_new(folder / SIGNATURE, key.sign(sums))
    return len(wheels)


def signing_key(path: Path) -> Ed25519PrivateKey:
    """The key of whoever makes wheelhouses, made when it is first needed: PEM, for its owner only."""
    if not path.exists():
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        write_new(path, Ed25519PrivateKey.generate().private_bytes(*form), SECRET)
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: this is no Ed25519 key")
    return key


def fingerprint(key: Ed25519PrivateKey) -> str:
    """Of the public key, as openssl and sha256sum make it from `signer.pem` at the hospital."""
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key.public_key().public_bytes(*form)).hexdigest()


def bill_of(bill: dict[str, Any], wheels: Sequence[Path]) -> dict[str, Any]:
    """A CycloneDX bill of exactly these wheels, with their hashes and without addresses."""
    hashes = {_identity(path): sha256_of(path) for path in wheels}
    components = []
    for component in bill["components"]:
        name = (canonicalize_name(component["name"]), component["version"])
        if name in hashes:
            plain = {key: value for key, value in component.items() if key != "externalReferences"}
            components.append(plain | {"hashes": [{"alg": "SHA-256", "content": hashes[name]}]})
    known = {component["bom-ref"] for component in [*components, bill["metadata"].get("component", {})] if component}
    depends = [
        {**entry, "dependsOn": [ref for ref in entry.get("dependsOn", ()) if ref in known]}
        for entry in bill.get("dependencies", ())
        if entry["ref"] in known
    ]
    return {**bill, "components": components, "dependencies": depends}


def _exported(project: Path, form: str) -> str:
    return _run(
        _uv(), "export", "--quiet", "--project", project, "--format", form,
        "--no-dev", "--no-emit-project", "--no-annotate", "--no-header",
    )  # fmt: skip


def _requirements(text: str, only: Sequence[str]) -> list[str]:
    """The blocks of a requirements file, one per package, that apply here; options such as an index are dropped."""
    names = set(map(canonicalize_name, only))
    blocks: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith(" "):
            blocks[-1] += line
        elif line.strip() and not line.startswith(("-", "#")):
            blocks.append(line)
    found = []
    for block in blocks:
        need = Requirement(block.splitlines()[0].rstrip(" \\"))
        here = need.marker is None or need.marker.evaluate()
        if here and (not names or canonicalize_name(need.name) in names):
            found.append(block)
    return found


def _pinned(wheel: Path) -> str:
    name, version = _identity(wheel)
    return f"{name}=={version} --hash=sha256:{sha256_of(wheel)}\n"


def _identity(wheel: Path) -> tuple[str, str]:
    name, version, _, _ = parse_wheel_filename(wheel.name)
    return canonicalize_name(name), str(version)


def _uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise ConfigError("uv is not installed; make install brings it")
    return found


def _run(*command: str | os.PathLike[str]) -> str:
    """What a program printed.

    Raises:
        ConfigError: it failed.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{Path(command[0]).name} failed: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    return done.stdout


def main() -> None:
    """Make a wheelhouse of the checkout in the working folder."""
    parser = argparse.ArgumentParser(description="Fill a folder with all that fedmed needs to be installed, signed.")
    parser.add_argument("folder", type=Path, help="to make; it must not be there")
    parser.add_argument("key", type=Path, help="that signs; made if it is not there")
    asked = parser.parse_args()
    signer = signing_key(asked.key)
    count = make_wheelhouse(Path(), asked.folder, signer)
    print(f"{count} wheels in {asked.folder}, signed with {asked.key}; see docs/offline-install.md")
    print(f"fingerprint of the signer's key, to say by telephone: {fingerprint(signer)}")


if __name__ == "__main__":
    main()
