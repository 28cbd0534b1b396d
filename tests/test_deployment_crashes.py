"""Keys, certificates and kits after a kill at any write, and on a full disk: whole, or made again without a person."""

import contextlib
import shutil
from pathlib import Path

import pytest
from full_disks import full_disk
from kill_points import AVAILABLE, run_killed
from real_consortium import command, make_consortium

from fedmed.deployment import certificates
from fedmed.deployment.consortium import ServerFolder, read_consortium
from fedmed.deployment.coordinators import admit_coordinator, coordinators, entrance
from fedmed.deployment.kits import read_kit
from fedmed.deployment.provision import server_certificate
from fedmed.deployment.proxy import nginx_configuration
from fedmed.deployment.site_folder import join, joined_kit, read_site_folder
from fedmed.deployment.superlink import require_usable
from fedmed.errors import ConfigError

killed = pytest.mark.skipif(not AVAILABLE, reason="kills are placed by ptrace, on x86-64 Linux")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A consortium of one site that has joined, which means to stand behind nginx; nobody runs."""
    root = tmp_path_factory.mktemp("made")
    make_consortium(root, ["north"])
    path = root / "server" / "consortium.toml"
    path.write_text(path.read_text().replace("loopback-port = 0", "loopback-port = 18999"))
    return root


@pytest.fixture
def folder(made, tmp_path):
    """A copy of its server's folder."""
    return read_consortium(Path(shutil.copytree(made / "server", tmp_path / "server")))


def renew(folder: ServerFolder) -> None:
    certificates.make_server_certificate(folder.tls, folder.consortium.names, 30)


@killed
@pytest.mark.parametrize("there", [False, True], ids=["new", "renewed"])
def test_a_kill_while_certificates_are_made_costs_nothing_but_making_them_again(folder, there):
    act = (lambda: renew(folder)) if there else (lambda: server_certificate(folder))
    kept = folder.tls.with_name("kept")
    if not there:
        shutil.rmtree(folder.tls)
        folder.tls.mkdir(mode=0o700)
    shutil.copytree(folder.tls, kept)
    count = run_killed(act, None)
    assert count > 8
    for at in range(1, count + 1):
        shutil.rmtree(folder.tls)
        shutil.copytree(kept, folder.tls)
        run_killed(act, at)
        server_certificate(folder)
        require_usable(folder)


def test_a_renewal_that_finds_the_disk_full_leaves_what_is_there(folder):
    before = {path.name: path.read_bytes() for path in folder.tls.iterdir()}
    with full_disk(), pytest.raises(OSError, match="large"):
        certificates.make_server_certificate(folder.tls, [f"host-{number}.example.org" for number in range(300)], 30)
    assert {path.name: path.read_bytes() for path in folder.tls.iterdir()} == before


@killed
def test_a_kill_while_a_site_joins_asks_for_a_kit_once_more_and_no_more(made, tmp_path):
    kit = made / "server" / "kits" / "north"
    known = read_kit(kit).fingerprint
    again = tmp_path / "again"
    renewed = read_consortium(Path(shutil.copytree(made / "server", again)))
    shutil.rmtree(renewed.tls)
    command("server", "provision", again)  # another authority, of the same coordinator
    site = read_site_folder(Path(shutil.copytree(made / "north", tmp_path / "north")))
    count = run_killed(lambda: join(site, again / "kits" / "north", None), None)
    for at in range(1, count + 1):
        shutil.rmtree(site.kit)
        shutil.copytree(made / "north" / "consortium", site.kit)
        run_killed(lambda: join(site, again / "kits" / "north", None), at)
        assert (site.kit / "ca.crt").exists()
        with contextlib.suppress(ConfigError):  # a kit that is half of the old one: asked for by telephone again
            join(site, again / "kits" / "north", None)
        join(site, again / "kits" / "north", known)
        assert joined_kit(site).certificate == (again / "tls" / "ca.crt").read_bytes()


@killed
def test_a_kill_while_a_coordinators_certificate_is_renewed_leaves_the_list_readable(folder):
    admit_coordinator(folder, "anna", None)
    count = run_killed(lambda: admit_coordinator(folder, "anna", None), None)
    for at in range(1, count + 1):
        run_killed(lambda: admit_coordinator(folder, "anna", None), at)
        assert "anna" in coordinators(folder)[0]
        nginx_configuration(folder)
        admit_coordinator(folder, "anna", None)
        entrance(folder.coordinators / "anna").tls()


def test_the_certificate_stands_for_the_interface_that_the_server_listens_on(folder):
    path = folder.root / "consortium.toml"
    text = path.read_text()
    for listen, port, named in (("10.1.2.3", 0, True), ("10.1.2.3", 18999, False), ("0.0.0.0", 0, False)):
        lines = text.replace('listen = "127.0.0.1"', f'listen = "{listen}"')
        path.write_text(lines.replace("loopback-port = 18999", f"loopback-port = {port}"))
        found = server_certificate(read_consortium(folder.root))[0]
        assert (listen in certificates.alternative_names(found)) == named
        shutil.rmtree(folder.tls)
