"""Keys, cards, certificates and kits: what two sides of a federation exchange before they first connect."""

import asyncio
import hashlib
import ipaddress
import json
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_consortium import RUN, command, make_consortium, make_site

from fedmed import config as run_file
from fedmed.config import RunConfig, validate
from fedmed.deployment import certificates, flower_app, node_keys
from fedmed.deployment.cards import read_card
from fedmed.deployment.checks import check_site
from fedmed.deployment.consortium import read_consortium
from fedmed.deployment.guarded import FOR_SITES, SitesOnly
from fedmed.deployment.kits import KEYS, Kit, coordinator_key, read_kit
from fedmed.deployment.processes import flower_environment
from fedmed.deployment.provision import readable_cards
from fedmed.deployment.site_folder import join, read_site_folder
from fedmed.deployment.submission import deployable
from fedmed.deployment.superlink import ending, ends_within, renewed, require_usable, server_command
from fedmed.errors import ConfigError, LedgerUnusable, PolicyRefused
from fedmed.federated.site_config import SiteConfig
from fedmed.privacy.chain import canonical
from fedmed.privacy.policy import SitePolicy

ROOT = Path(__file__).parent.parent
RENEW = "fedmed server provision renews it"
SECRETS = ("node.key", "signing.key", "linking.key")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a consortium of two sites; nobody runs."""
    root = tmp_path_factory.mktemp("made")
    make_consortium(root, ["north", "south"])
    return root


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def edited(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **{key.replace("_", "-"): value for key, value in values.items()}}))


def keys_of(table: dict[str, object], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in table.items():
        found |= keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


def test_a_new_site_toml_holds_every_key_at_its_default(tmp_path):
    command("site", "init", tmp_path / "north", "--manifest", "m.csv")
    text = (tmp_path / "north" / "site.toml").read_text()
    values = tomllib.loads(text.replace("\n# required = ", "\nrequired = "))
    policy = SitePolicy(privacy={"witness": "witness"})
    model = SiteConfig(name="north", manifest="m.csv", cache_dir="cache", policy=policy)
    read = read_site_folder(tmp_path / "north").config
    assert read == model and "required" not in read.policy.privacy.model_fields_set, "which has a meaning of its own"
    assert keys_of(values) == keys_of(model.model_dump(by_alias=True))
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# ") and "None" not in lines[number - 1], f"{line} has no comment"


def test_nothing_is_overwritten(made):
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="exists"):
        command("site", "init", made / "north")
    with pytest.raises(ConfigError, match="exists"):
        command("server", "init", made / "server")
    command("site", "keygen", made / "north")
    after = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"card.json"}  # ECDSA signatures differ each time


def test_private_keys_are_their_owners_alone_and_never_leave(made):
    secrets = [made / site / "keys" / name for site in ("north", "south") for name in SECRETS]
    secrets += [made / "server" / "tls" / name for name in ("ca.key", "server.key")]
    secrets.append(made / "server" / "coordinator" / "signing.key")
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, path.parent
    sent = [*made.glob("*/card.json"), *(path for path in (made / "server" / "kits").rglob("*") if path.is_file())]
    for path in secrets:
        lines = [line for line in path.read_bytes().splitlines() if len(line) > 40 and b"-----" not in line]
        secret_parts = lines[1:-1] if path.name == "node.key" else lines  # an OpenSSH key begins with its public half
        assert secret_parts
        for other in sent:
            assert not any(line in other.read_bytes() for line in secret_parts), f"{path.name} is in {other.name}"


def test_a_key_that_others_may_read_is_refused(copied):
    (copied / "north" / "keys" / "node.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        command("site", "keygen", copied / "north")
    (copied / "south" / "keys" / "signing.key").chmod(0o604)
    with pytest.raises(LedgerUnusable, match="chmod 600"):
        command("site", "keygen", copied / "south")
    (copied / "server" / "tls" / "server.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        require_usable(read_consortium(copied / "server"))


def test_a_card_holds_names_and_public_keys_only(made):
    values = json.loads((made / "north" / "card.json").read_text())
    assert set(values) == {"schema", "kind", "name", "fedmed", "code", "node-key", "signing-key", "signatures"}
    text = (made / "north" / "card.json").read_text()
    assert str(made) not in text
    assert values["signing-key"] == (made / "north" / "keys" / "site.pub").read_text().strip()
    assert values["node-key"] == (made / "north" / "keys" / "node.pub").read_text().strip()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "south"},
        {"code": "0" * 64},
        {"signing_key": "00" * 32},
        {"node_key": "ssh-ed25519 AAAA"},
        {"signatures": {}},
        {"signatures": None},
        {"more": 1},
        {"schema": 2},
        {"name": "../../etc"},
        {"name": 7},
    ],
    ids=str,
)
def test_a_changed_card_is_refused(copied, change):
    card = copied / "north" / "card.json"
    edited(card, **change)
    with pytest.raises(ConfigError, match="card"):
        read_card(card)
    before = sorted(copied.joinpath("server").rglob("*"))
    with pytest.raises(ConfigError):
        command("server", "provision", copied / "server", card)
    assert sorted(copied.joinpath("server").rglob("*")) == before


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_a_card_or_kit_of_any_bytes_is_refused_in_words(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    for name in ("card.json", "kit.json"):
        (folder / name).write_bytes(data)
    with pytest.raises(ConfigError):
        read_card(folder / "card.json")
    with pytest.raises(ConfigError):
        read_kit(folder)


def test_two_sites_with_one_name_or_one_key_are_refused(copied, tmp_path):
    shutil.copytree(copied / "north", tmp_path / "twin")
    text = (tmp_path / "twin" / "site.toml").read_text().replace('name = "north"', 'name = "twin"')
    (tmp_path / "twin" / "site.toml").write_text(text)
    command("site", "keygen", tmp_path / "twin")
    with pytest.raises(ConfigError, match="same key"):
        command("server", "provision", copied / "server", tmp_path / "twin" / "card.json")
    with pytest.raises(ConfigError, match="same name"):
        command("server", "provision", copied / "server", *[copied / "north" / "card.json"] * 2)


@pytest.mark.parametrize(
    "change",
    [
        {"address": "evil.example:8443"},
        {"apps": []},
        {"site": "south"},
        {"authority": "0" * 64},
        {"coordinator": "00" * 32},
    ],
    ids=str,
)
def test_a_changed_kit_is_refused(copied, change):
    edited(copied / "server" / "kits" / "north" / "kit.json", **change)
    with pytest.raises(ConfigError, match="changed"):
        read_kit(copied / "server" / "kits" / "north")


def test_a_kit_with_another_authority_is_refused(copied, tmp_path):
    certificates.make_authority(tmp_path, "other")
    shutil.copy(tmp_path / "ca.crt", copied / "server" / "kits" / "north" / "ca.crt")
    with pytest.raises(ConfigError, match="changed"):
        read_kit(copied / "server" / "kits" / "north")


def test_a_kit_is_for_one_site_and_one_key(copied):
    kits, north = copied / "server" / "kits", read_site_folder(copied / "north")
    with pytest.raises(ConfigError, match='the site "south"'):
        join(north, kits / "south", None)
    (copied / "north" / "keys" / "node.key").unlink()
    (copied / "north" / "keys" / "node.pub").unlink()
    command("site", "keygen", copied / "north")
    with pytest.raises(ConfigError, match="another key"):
        join(north, kits / "north", None)


def test_a_hospital_finds_the_coordinators_fingerprint_without_fedmed_as_the_page_says(made):
    page = (ROOT / "docs" / "security-for-hospitals.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("python3 -c"))
    kits = made / "server" / "kits"
    done = subprocess.run(shlex.split(line), cwd=kits.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == read_kit(kits / "north").fingerprint.replace("-", "")


def test_a_certificate_is_renewed_when_it_is_asked_for(copied, capsys):
    path = copied / "server" / "tls" / "server.crt"
    before = path.read_bytes()
    command("server", "provision", copied / "server")
    assert path.read_bytes() == before and "(kept: it is renewed in its last 30 days" in capsys.readouterr().out
    command("server", "provision", copied / "server", "--renew")
    assert path.read_bytes() != before and "(new)" in capsys.readouterr().out


def test_the_first_kit_needs_the_coordinators_fingerprint_and_later_ones_the_same_key(copied, tmp_path):
    kit, north = copied / "server" / "kits" / "north", read_site_folder(copied / "north")
    join(north, kit, None)  # joined before
    impostor = make_consortium(tmp_path, ["other"])
    command("server", "provision", impostor, copied / "north" / "card.json")
    with pytest.raises(ConfigError, match="another key than before"):
        join(north, impostor / "kits" / "north", None)
    with pytest.raises(ConfigError, match="do not use it"):
        join(north, impostor / "kits" / "north", read_kit(kit).fingerprint)
    shutil.rmtree(copied / "north" / "consortium")
    with pytest.raises(ConfigError, match="telephone"):
        join(north, kit, None)
    for heard in (read_kit(kit).fingerprint[:-5], "north", ""):
        with pytest.raises(ConfigError, match="a fingerprint has 20 digits"):
            join(north, kit, heard)
    with pytest.raises(ConfigError, match=r"no kit\.json is there; a kit is the folder"):
        join(north, kit.parent, None)
    assert join(north, kit, read_kit(kit).fingerprint.replace("-", "")).site == "north"
    shutil.rmtree(copied / "north" / "consortium")
    assert join(north, kit, read_kit(kit).fingerprint.upper()).consortium == "toys"


def resigned(kit: Path, server: Path, **changes: object) -> None:
    """The kit as the coordinator would have signed it with other values."""
    values = {key: value for key, value in json.loads((kit / "kit.json").read_text()).items() if key in KEYS} | changes
    key = coordinator_key(server / "coordinator")
    signature = key.sign(canonical(values).encode()).hex()
    edited(kit / "kit.json", **changes, signature=signature)


def test_an_older_kit_than_the_one_that_was_joined_is_refused(copied):
    kit, north = copied / "server" / "kits" / "north", read_site_folder(copied / "north")
    join(north, kit, None)  # the same once more
    resigned(kit, copied / "server", made="2026-01-02T03:04:05+00:00")
    for heard in (None, read_kit(kit).fingerprint):
        with pytest.raises(ConfigError, match=r"made on 2026-01-02 03:04, before .* the newest"):
            join(north, kit, heard)
    shutil.rmtree(copied / "north" / "consortium")
    join(north, kit, read_kit(kit).fingerprint)
    resigned(kit, copied / "server", made="soon")
    with pytest.raises(ConfigError, match="damaged"):
        read_kit(kit)


def test_what_is_installed_of_a_kit_is_what_was_checked(copied, monkeypatch):
    kit, north = copied / "server" / "kits" / "north", read_site_folder(copied / "north")
    known = read_kit(kit)

    def exchanged(folder: Path) -> Kit:
        found = read_kit(folder)
        edited(kit / "kit.json", address="evil.example:8443")
        return found

    monkeypatch.setattr("fedmed.deployment.site_folder.read_kit", exchanged)
    assert join(north, kit, known.fingerprint) == known


def test_the_check_finds_a_kit_for_another_fedmed(copied):
    kit, north = copied / "server" / "kits" / "north", copied / "north"

    def found():
        command("site", "join", kit, "--site", north)
        return {each.what: each for each in check_site(north, dry_round=False)}["kit"]

    assert found().ok
    made = datetime.now(UTC).isoformat()
    for change, said in (({"apps": ["0" * 64]}, "another app"), ({"fedmed": "0.0.1"}, "fedmed 0.0.1")):
        resigned(kit, copied / "server", made=made, **change)
        assert not found().ok and f"it is for {said}" in found().said and "install what the server has" in found().said


def test_certificates_are_what_openssl_and_flower_ask_for(made):
    tls = made / "server" / "tls"
    server = certificates.read_certificate(tls / "server.crt")
    assert certificates.alternative_names(server) == {"127.0.0.1", "localhost", "::1"}
    assert server.public_key().curve.name == "secp256r1"
    key = node_keys.read_node_key(made / "north" / "keys")
    assert key.curve.name == "secp384r1"
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca.crt", "server.crt"],
        cwd=tls,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ssl.create_default_context(cafile=str(tls / "ca.crt"))


def test_a_certificate_says_when_it_is_no_good(made, tmp_path):
    server = certificates.read_certificate(made / "server" / "tls" / "server.crt")
    authority = certificates.read_certificate(made / "server" / "tls" / "ca.crt")
    now = datetime.now(UTC)
    assert certificates.problem(server, authority, now) is None
    assert "expired" in certificates.problem(server, authority, now + timedelta(days=366))
    assert "clock" in certificates.problem(server, authority, now - timedelta(days=1))
    certificates.make_authority(tmp_path, "other")
    other = certificates.read_certificate(tmp_path / "ca.crt")
    assert "not signed" in certificates.problem(server, other, now)
    assert not certificates.ends_soon(server, now)
    assert certificates.ends_soon(server, now + timedelta(days=340))


def test_a_server_with_an_expired_certificate_does_not_start_until_it_is_renewed(copied):
    folder = read_consortium(copied / "server")
    certificates.make_server_certificate(folder.tls, ("127.0.0.1",), 0)
    with pytest.raises(ConfigError, match=r"expired.*provision renews"):
        require_usable(folder)
    kit = read_kit(folder.kits / "north")
    command("server", "provision", copied / "server")
    require_usable(folder)
    assert read_kit(folder.kits / "north").certificate == kit.certificate  # sites need no new kit


def test_a_running_server_knows_that_its_certificate_ends_and_that_another_is_there(copied):
    folder = read_consortium(copied / "server")
    used = certificates.make_server_certificate(folder.tls, ("127.0.0.1",), 20)
    assert not renewed(folder, used)
    assert ending(used) == [
        f"the server's certificate ends in 19 days, on {used.not_valid_after_utc:%Y-%m-%d}; {RENEW}"
    ]
    key = (folder.tls / "server.key").read_bytes()
    certificates.make_server_certificate(folder.tls, ("127.0.0.1",), 200)
    assert renewed(folder, used)
    assert ending(require_usable(folder)) == []
    assert [ends_within(folder, used, timedelta(days=days)) for days in (1, 19, 20)] == [False, False, True]
    (folder.tls / "server.key").write_bytes(key)  # of the old one: a kill between the two files
    assert not renewed(folder, used)
    ended = certificates.make_server_certificate(folder.tls, ("127.0.0.1",), 0)
    assert ending(ended) == [f"the server's certificate expired on {ended.not_valid_after_utc:%Y-%m-%d}; {RENEW}"]


def test_other_addresses_get_a_new_certificate_and_the_same_ones_keep_it(copied):
    tls, path = copied / "server" / "tls", copied / "server" / "consortium.toml"
    before = (tls / "server.crt").read_bytes()
    command("server", "provision", path)
    assert (tls / "server.crt").read_bytes() == before
    path.write_text(path.read_text().replace('["127.0.0.1"]', '["fl.example.org", "10.1.2.3", "fd00::1"]'))
    command("server", "provision", path)
    names = certificates.alternative_names(certificates.read_certificate(tls / "server.crt"))
    assert {"fl.example.org", "10.1.2.3", "fd00::1"} <= names
    before = (tls / "server.crt").read_bytes()
    command("server", "provision", path)
    assert (tls / "server.crt").read_bytes() == before
    path.write_text(path.read_text().replace(', "10.1.2.3"', ""))
    command("server", "provision", path)
    assert "10.1.2.3" not in certificates.alternative_names(certificates.read_certificate(tls / "server.crt"))
    assert read_kit(copied / "server" / "kits" / "north").address.startswith("fl.example.org:")


@pytest.mark.parametrize("address", ["https://x.example", "x.example:443", "X.example", "a b", "-x", "", "x..y"])
def test_an_address_that_is_none_is_refused(tmp_path, address):
    with pytest.raises(ConfigError, match="addresses"):
        command("server", "init", tmp_path / "s", "--address", address)
    assert not (tmp_path / "s" / "consortium.toml").exists()


def test_a_damaged_card_that_is_there_holds_up_nobody_else(copied, capsys):
    server = copied / "server"
    card, kits = server / "sites" / "north.json", server / "kits"
    card.write_bytes(card.read_bytes()[:100])
    shutil.rmtree(kits)
    command("server", "provision", server)
    told = capsys.readouterr()
    assert "north.json" in told.err and "site south" in told.out and [kit.name for kit in kits.iterdir()] == ["south"]
    command("server", "provision", server, copied / "north" / "card.json")
    assert not capsys.readouterr().err and sorted(kit.name for kit in kits.iterdir()) == ["north", "south"]


def test_submit_and_flwr_run_and_the_wheel_bring_the_same_app(made, tmp_path):
    from flwr.cli.build import build_fab_from_disk

    app = flower_app.build_app()
    assert app == build_fab_from_disk(ROOT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for source, target in project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, tmp_path / target)
    assert flower_app.build_app(tmp_path / "fedmed" / "_app") == app
    assert read_kit(made / "server" / "kits" / "north").apps == (hashlib.sha256(app).hexdigest(),)


def test_what_names_data_is_not_submitted(made):
    names = [card.name for card in readable_cards(read_consortium(made / "server"))[0]]
    config = run_file.validate({**tomllib.loads(RUN), "data": {"sites": ["/secret/a.csv", "/secret/b.csv"]}})
    submitted = deployable(config, names)
    assert submitted.data.sites == ("north", "south")
    assert submitted.train == config.train
    for key, value, said in (
        ("policy", "site.toml", "simulation.policy"),
        ("partition", "iid", "simulation.partition"),
    ):
        with pytest.raises(ConfigError, match=said):
            deployable(validate({**tomllib.loads(RUN), "simulation": {key: value}}), names)
    with pytest.raises(ConfigError, match=r"task\.labels"):
        deployable(RunConfig(), names)
    with pytest.raises(ConfigError, match=r"min-sites = 3, but 2"):
        deployable(validate({**tomllib.loads(RUN), "strategy": {"min-sites": 3}}), names)
    with pytest.raises(ConfigError, match='no site "nroth" is provisioned; did you mean "north"'):
        deployable(validate({**tomllib.loads(RUN), "strategy": {"required-sites": ["south", "nroth"]}}), names)


@pytest.mark.parametrize(
    ("strategy", "privacy", "said"),
    [
        ({"name": "fedawg"}, {}, 'did you mean "fedavg"'),
        ({"name": "scaffold", "combine": "median"}, {}, 'needs strategy.combine = "mean"'),
        ({"combine": "median"}, {}, "needs 3 sites; there are 2"),
        ({"weight-by": "uniform"}, {"mode": "central", "sites": 1}, "privacy.sites = 1, but 2 sites are provisioned"),
    ],
)
def test_what_the_server_would_refuse_at_its_start_is_not_submitted(strategy, privacy, said):
    refused = validate({**tomllib.loads(RUN), "strategy": strategy, "privacy": privacy})
    with pytest.raises(ConfigError) as why:
        deployable(refused, ["north", "south"])
    assert said in str(why.value)


def test_what_the_server_itself_lacks_is_named_before_sites_wait_for_it(made, tmp_path, fedmed_process):
    (tmp_path / "test.csv").write_text("patient_id,image,noduel\np1,a.png,1\n")
    for line, said in (
        ('[data]\nserver = "test.csv"', 'no column "nodule"; the nearest is "noduel"'),
        ('[model]\nweights = "none.safetensors"', "none.safetensors: no such file"),
    ):
        (tmp_path / "run.toml").write_text(f'[task]\nlabels = ["nodule"]\n{line}\n')
        ended = fedmed_process("server", "submit", tmp_path / "run.toml", "--server", made / "server")
        assert ended.returncode and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        assert said in ended.stderr


def test_an_algorithm_of_ones_own_need_not_be_installed_where_the_run_is_submitted():
    own = validate({**tomllib.loads(RUN), "strategy": {"name": "at_the_server:Own"}})
    assert deployable(own, ["north", "south"]).strategy == own.strategy


def test_an_app_is_only_compared_with_the_kit_and_never_loaded(made):
    import flwr.supernode.runtime.run_clientapp as flower_task

    from fedmed.deployment import warm

    admit = warm.admission(read_site_folder(made / "north"))
    admit(flower_app.build_app(), skip_prompt=True)
    for content in (b"", flower_app.build_app() + b" "):
        with pytest.raises(PolicyRefused, match="kit names"):
            admit(content, skip_prompt=True)
    assert set(warm.REPLACED) <= set(vars(flower_task))  # else `warm` refuses to start
    assert set(warm.REPLACED) <= set(flower_task.run_clientapp.__code__.co_names)  # and Flower does call them
    ours = object()
    assert warm.own_app(ours)(default_app_ref="x")("a", "b", "c") is ours


def test_only_a_supernode_of_this_machine_can_have_tasks_made():
    from fedmed.deployment.warm import from_supernode

    own = ["--runtime-api-address", "127.0.0.1:4000", "--token", "a1-b2_c3", "--insecure", "--parent-pid", "12"]
    assert from_supernode(own)
    for words in (
        ["--runtime-api-address", "192.0.2.1:4000"],
        ["--runtime-api-address=192.0.2.1:4000"],
        ["--runtime", "127.0.0.1:4000"],
        ["--allow-runtime-dependency-installation"],
        ["--token"],
    ):
        assert not from_supernode([*own, *words])


def test_an_app_that_the_hospital_does_not_approve_is_refused_and_no_path_is_said(copied):
    from fedmed.deployment import warm

    path = copied / "north" / "site.toml"
    app = flower_app.app_hash()
    text = path.read_text()
    admit = warm.admission(read_site_folder(copied / "north"))
    path.write_text(text.replace("approved-apps = []", f'approved-apps = ["{"0" * 64}"]'))
    with pytest.raises(PolicyRefused) as refused:  # read anew for every task
        admit(flower_app.build_app())
    assert refused.value.rule == "approved-apps"
    path.write_text(text.replace("approved-apps = []", f'approved-apps = ["{"0" * 64}", "{app}"]'))
    admit(flower_app.build_app())
    path.write_text("nonsense")
    with pytest.raises(PolicyRefused) as refused:
        admit(flower_app.build_app())
    assert str(copied) not in str(refused.value)


def asked(path: str, client: str, server: str = "192.0.2.1") -> int:
    """The status that the server's door gives to a request; run folders are served by nobody here."""
    seen: list[int] = []

    async def inside(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        seen.extend([message["status"]] if "status" in message else [])

    scope = {"type": "http", "path": path, "client": (client, 4000), "server": (server, 8443)}
    asyncio.run(SitesOnly(inside, inside)(scope, None, send))
    return seen[0]


@pytest.mark.parametrize("client", ["198.51.100.7", "10.0.0.1", "2001:db8::1", "testclient", "0.0.0.0", "128.0.0.1"])
def test_other_machines_reach_the_sites_interface_only(client):
    assert asked("/v1/fleet/pull-messages", client) == 200
    closed = ("/v1/control/start-run", "/v1/runtime/push-messages", "/", "/docs", "/v1/fleet", "//v1/fleet/x")
    for path in (*closed, "/fedmed/runs"):
        assert asked(path, client) == 403


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.9.1", "::1", "192.0.2.1"])
def test_this_machine_reaches_everything(client):
    assert asked("/v1/control/start-run", client) == 200


def test_flowers_interfaces_are_where_the_door_expects_them():
    from flwr.superlink.routers.control.router import router as for_coordinators
    from flwr.superlink.routers.fleet.router import router as for_sites

    assert {route.path.startswith(FOR_SITES) for route in for_sites.routes} == {True}
    assert not any(route.path.startswith(FOR_SITES) for route in for_coordinators.routes)


def test_the_server_listens_on_loopback_with_tls_and_registered_keys_unless_told_otherwise(made, tmp_path):
    folder = read_consortium(made / "server")
    words = server_command(folder)
    assert ipaddress.ip_address(words[words.index("--host") + 1]).is_loopback
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation", "--ssl-certfile"} <= set(words)
    assert "--insecure" not in words
    environment = flower_environment(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert (
        environment["FLWR_DISABLE_UPDATE_CHECK"] == environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    )


def test_a_check_says_what_to_do(copied, tmp_path, capsys):
    found = {each.what: each for each in check_site(copied / "north", dry_round=False)}
    assert not found["port"].ok and "firewall" in found["port"].said
    assert "certificate" not in found  # nothing to look at
    (copied / "north" / "keys" / "node.key").chmod(0o644)
    assert "chmod 600" in {each.what: each for each in check_site(copied / "north", dry_round=False)}["keys"].said
    alone = make_site(tmp_path, "alone")
    assert "fedmed site join" in [each for each in check_site(alone, dry_round=False) if not each.ok][-1].said
    text = (alone / "site.toml").read_text().replace('dataset = "toy:dataset"', 'dataset = ""')
    (alone / "site.toml").write_text(text)
    (alone / "alone").write_text("patient,image\n")
    assert "patient_id" in {each.what: each for each in check_site(alone, dry_round=False)}["manifest"].said
    (alone / "alone").write_text("patient_id,image\np-1,x.png\n")
    assert {each.what: each for each in check_site(alone, dry_round=False)}["manifest"].said.startswith("1 rows")
    (alone / "site.toml").write_text("nonsense = 1\n")
    assert [each.ok for each in check_site(alone, dry_round=False)] == [False]
    with pytest.raises(ConfigError, match="1 of 1 checks failed"):
        command("site", "check", alone)
    assert "FAIL  site.toml" in capsys.readouterr().out


RUNNER = """
import os, subprocess, sys
from pathlib import Path
from fedmed.deployment.processes import descendants, runner
from fedmed.errors import ConfigError
with runner(Path(sys.argv[1]), "site") as stop:
    script = "import os, time; print(os.fork() and os.setsid, flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    child.stdout.readline(), child.stdout.readline()
    try:
        with runner(Path(sys.argv[1]), "site"):
            print("two")
    except ConfigError as error:
        print(error)
    print(*descendants(os.getpid()))
"""


def test_one_runner_per_folder_and_no_child_outlives_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    said, pids = done.stdout.splitlines()
    assert said == "this site runs already"
    assert len(pids.split()) == 2
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.split())


def test_a_damaged_certificate_is_named(tmp_path):
    (tmp_path / "server.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"the certificate is damaged: .*server\.crt"):
        certificates.read_certificate(tmp_path / "server.crt")
