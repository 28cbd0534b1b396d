"""nginx in front of a server over TLS: who gets to what through it. No site runs here."""

import base64
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from flwr.proto.message_pb2 import PushObjectRequest
from over_tls import admitted, let_in, needs_nginx, over_tls, web
from real_consortium import command, wait_for

from fedmed.deployment import certificates, control, node_keys
from fedmed.deployment.consortium import ServerFolder
from fedmed.deployment.coordinators import Entrance, entrance
from fedmed.deployment.proxy import ASKED
from fedmed.errors import RunFailed

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(500), needs_nginx]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    with over_tls(tmp_path_factory.mktemp("c"), sites=()) as (folder, _):
        yield folder


@pytest.fixture(scope="module")
def anna(consortium):
    """The folder of a coordinator at another machine."""
    return admitted(consortium, "anna")


def test_a_site_cannot_submit_a_run_register_a_node_or_stop_one(consortium):
    """It has the authority's certificate and its own node key; that opens the sites' interface and nothing else."""
    from flwr.superlink.routers.control.router import router as for_coordinators

    site = Entrance(address=f"127.0.0.1:{consortium.consortium.port}", authority=consortium.tls / "ca.crt")
    for ask in (control.nodes, control.runs, lambda client: control.stop_run(client, 1)):
        with pytest.raises(RunFailed, match=r"refused \(403\)"), control.control(site) as client:
            ask(client)
    key = node_keys.read_node_key(consortium.root.parent / "a-40" / "keys")
    moment = datetime.now(UTC).isoformat()
    headers = {
        "flwr-timestamp": moment,
        "flwr-public-key": base64.b64encode(node_keys.flower_bytes(key.public_key())).decode(),
        "flwr-signature": base64.b64encode(node_keys.sign(key, moment.encode())).decode(),
        "x-forwarded-for": "127.0.0.1",
        "content-type": "application/protobuf",
    }
    with web(consortium) as client:
        paths = [route.path for route in for_coordinators.routes]
        assert {"/v1/control/start-run", "/v1/control/register-node", "/v1/control/stop-run"} <= set(paths)
        for path in [*paths, "/fedmed/runs", "/fedmed/files/x"]:
            assert client.post(path, headers=headers).status_code == 403, path
            assert client.get(path).status_code == 403, path
        for path in ("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1//control/start-run"):
            request = client.build_request("POST", "/", headers=headers)
            request.url = request.url.copy_with(raw_path=path.encode())
            assert client.send(request).status_code == 403, path
        for path in ("/v1/runtime/push-messages", "/", "/docs", "/openapi.json", "/v1/controlx"):
            assert client.post(path, headers=headers).status_code == 404, path


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_the_sites_interface_takes_posts_only(consortium, method):
    with web(consortium) as client:
        answer = client.request(method, "/v1/fleet/pull-messages")
    assert (answer.status_code, answer.headers["content-type"]) == (405, "text/html")  # Flower itself would say JSON


def test_a_fetch_that_was_cut_off_goes_on_and_one_that_was_damaged_is_found(consortium, anna, tmp_path):
    large = consortium.runs / "20200101T000000-large-1"
    (large / "checkpoints").mkdir(parents=True)
    content = np.random.default_rng(7).bytes(3_000_000)
    (large / "checkpoints" / "round-0001.safetensors").write_bytes(content)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "round-0001.safetensors"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content[:1_000_000])
    fetch = ("server", "fetch", large.name, "--server", anna, "--out", tmp_path)
    command(*fetch)
    assert path.read_bytes() == content and not partial.exists()
    path.unlink()
    partial.write_bytes(b"x" + content[1:1_000_000])
    with pytest.raises(RunFailed, match="fetch again"):
        command(*fetch)
    command(*fetch)
    assert path.read_bytes() == content
    shutil.rmtree(large)
    with pytest.raises(RunFailed, match="no folder"):
        command(*fetch)


def test_a_certificate_that_is_foreign_expired_unlisted_or_the_server_s_opens_nothing(consortium, tmp_path):
    certificates.make_authority(tmp_path, "toys")
    server = (consortium.tls / "server.crt", consortium.tls / "server.key")
    foreign = made(tmp_path, tmp_path, "anna", 1)
    expired, unlisted = made(tmp_path, consortium.tls, "late", 0), made(tmp_path, consortium.tls, "carl", 1)
    for pair, status in ((server, 400), (foreign, 400), (expired, 400), (unlisted, 403)):
        with web(consortium, pair=pair) as client:
            assert client.post("/v1/control/list-runs").status_code == status, pair
            assert client.get("/fedmed/runs").status_code == status, pair


def made(folder: Path, authority: Path, name: str, days: int) -> tuple[Path, Path]:
    """A coordinator's certificate and its key."""
    pair = (folder / f"{name}.crt", folder / f"{name}.key")
    for path, pem in zip(pair, certificates.make_coordinator_certificate(authority, name, days), strict=True):
        path.write_bytes(pem)
    return pair


def test_pieces_of_a_large_network_pass_and_what_no_site_sends_does_not(consortium):
    with web(consortium) as client:
        for mebibytes, status in ((5, 401), (15, 401), (17, 413)):  # 401: the server itself asks for a site's key
            answer = client.post(
                "/v1/fleet/push-object",
                content=PushObjectRequest(object_content=bytes(mebibytes << 20)).SerializeToString(),
                headers={"content-type": "application/protobuf", "accept": "application/protobuf"},
            )
            assert answer.status_code == status, mebibytes


def test_a_damaged_certificate_on_the_list_ends_nothing_and_keeps_nobody_on_it(consortium, anna):
    out = consortium.root.parent / "server.out"
    said = len(out.read_text())
    dora = admitted(consortium, "dora")
    (consortium.coordinators / "damaged.crt").write_text("no certificate")
    wait_for(lambda: "damaged is shut out: the certificate is damaged" in out.read_text()[said:], 60, out.read_text)
    (consortium.coordinators / "dora.crt").unlink()
    wait_for(lambda: answered(consortium, dora) == 403, 60, out.read_text)
    assert let_in(entrance(anna))
    (consortium.coordinators / "damaged.crt").unlink()


def answered(folder: ServerFolder, given: Path) -> int:
    """The status of the answer to a coordinator who asks which runs there are."""
    with web(folder, given) as client:
        return client.post("/v1/control/list-runs").status_code


def test_a_coordinator_elsewhere_may_ask_four_things_and_register_nobody(consortium, anna):
    from flwr.superlink.routers.control.router import router as for_coordinators

    assert set(ASKED) == {"start-run", "stop-run", "list-runs", "list-nodes"}
    with web(consortium, anna) as client:
        for path in [route.path for route in for_coordinators.routes]:
            allowed = path.rpartition("/")[2] in ASKED
            assert (client.post(path).status_code == 403) != allowed, path
