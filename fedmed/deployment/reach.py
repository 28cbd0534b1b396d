"""The way from a site to its consortium's server, looked at step by step: proxy, port, certificate, clock, list.

It is the way that Flower's own client takes: through the proxy that `HTTPS_PROXY` names, unless `NO_PROXY` exempts the
server, with the user and password that stand in the proxy's address.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import SplitResult, unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedmed.deployment import certificates
from fedmed.deployment.kits import Kit
from fedmed.deployment.node_keys import flower_bytes
from fedmed.errors import ConfigError

CONNECT_S = 10.0
CLOCK_S = 60.0  # the hours of a site's policy, and the times in its records, are its own clock's
HALF_A_SECOND = timedelta(seconds=0.5)
LONGEST = 4096  # bytes of an answer
NO_HEARTBEAT_S = 0.0  # Flower takes 10 s at least
NO_LOGIN = "407"  # Proxy Authentication Required (RFC 9110, 15.5.8)


def proxy(kit: Kit) -> str:
    """Which proxy leads to the server, and whether it lets this machine through.

    Raises:
        ConfigError: it does not.
    """
    way = _way(kit)
    if way is None:
        return "none: HTTPS_PROXY is not set, or NO_PROXY exempts the server"
    login = "with a user and password" if way.username else "without a password"
    try:
        _connected(kit).close()
    except OSError as error:
        if NO_LOGIN in str(error):
            raise ConfigError(
                f"the proxy {way.hostname}:{way.port} refuses {login}; set "
                "HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT in the environment of fedmed site start"
            ) from None
        raise ConfigError(
            f"the proxy {way.hostname}:{way.port} gives no connection to {kit.address}; it has to allow CONNECT to it"
        ) from None
    return f"{way.hostname}:{way.port}, {login}"


def port(kit: Kit) -> str:
    """Whether the server's port can be reached from here.

    Raises:
        ConfigError: it cannot.
    """
    try:
        _connected(kit).close()
    except OSError as error:
        raise ConfigError(
            f"{kit.address} cannot be reached ({error.strerror or type(error).__name__}); the firewall has to let TCP "
            "out to it, and the server has to run"
        ) from None
    return f"{kit.address} can be reached"


def certificate(kit: Kit) -> str:
    """Whether the server shows a certificate of the consortium, for its name, for long enough.

    Raises:
        ConfigError: it does not; the server may be another than it says, or something stands between.
    """
    try:
        with _secure(kit) as secure:
            shown, protocol = secure.getpeercert(binary_form=True) or b"", secure.version()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(_why_refused(kit, error)) from None
    except OSError as error:
        raise ConfigError(f"no TLS with {kit.address} ({type(error).__name__}); tell the coordinator") from None
    found = x509.load_der_x509_certificate(shown)
    if certificates.ends_soon(found, datetime.now(UTC)):
        raise ConfigError(
            f"the server's certificate ends on {found.not_valid_after_utc:%Y-%m-%d}; tell the coordinator"
        )
    return f"{protocol}, valid until {found.not_valid_after_utc:%Y-%m-%d}"


def clock(kit: Kit) -> str:
    """How far this machine's clock is from the server's.

    Raises:
        ConfigError: more than a minute.
    """
    off_s = clock_ahead_s(kit)
    if abs(off_s) > CLOCK_S:
        raise ConfigError(f"{off_s:+.0f} s from the server's clock; set up time synchronisation (NTP) here or there")
    return f"{abs(off_s):.0f} s from the server's"


def admission(kit: Kit, key: ec.EllipticCurvePrivateKey) -> str:
    """Whether this site is still on the server's list.

    The server is asked to connect it with a heartbeat that cannot be. It looks for the key first, and refuses either
    way, so that nothing changes there, whether the site is connected or not.

    Raises:
        ConfigError: it is not on the list, or the server does not say.
    """
    public, signed_at = flower_bytes(key.public_key()), datetime.now(UTC) - timedelta(seconds=clock_ahead_s(kit))
    headers = {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, signed_at.isoformat().encode())).decode(),
        TIMESTAMP_HEADER: signed_at.isoformat(),
        "content-type": PROTOBUF_MEDIA_TYPE,
        "accept": PROTOBUF_MEDIA_TYPE,
    }
    content = ActivateNodeRequest(public_key=public, heartbeat_interval=NO_HEARTBEAT_S).SerializeToString()
    try:
        with _secure(kit) as secure:
            connection = http.client.HTTPConnection(*_place(kit))
            connection.sock = secure
            connection.request("POST", "/v1/fleet/activate-node", body=content, headers=headers)
            answer = connection.getresponse()
            status, said = answer.status, answer.read(LONGEST)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"the server does not answer a site ({type(error).__name__}); is it being started?") from None
    if f'"code":{ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:d}'.encode() in said:
        raise ConfigError(
            "this site's key is not on the server's list; ask the coordinator whether this card.json was taken in, or "
            "the site taken out"
        )
    if f'"code":{ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:d}'.encode() not in said:
        raise ConfigError(f"the server does not say whether it lets this site in ({status}); tell the coordinator")
    return "the server lets this site in"


def clock_ahead_s(kit: Kit) -> float:
    """Seconds that this machine's clock is before the server's, to one and half of the way there and back.

    Raises:
        ConfigError: the server does not answer.
    """
    try:
        with _secure(kit) as secure:
            connection = http.client.HTTPConnection(*_place(kit))
            connection.sock = secure
            asked = datetime.now(UTC)
            connection.request("GET", "/")
            said = connection.getresponse().getheader("date") or ""
        answered = datetime.now(UTC)
        theirs = email.utils.parsedate_to_datetime(said) + HALF_A_SECOND  # it names whole seconds
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        raise ConfigError("the server does not tell its time; see the lines above") from None
    return (asked + (answered - asked) / 2 - theirs).total_seconds()


def _why_refused(kit: Kit, error: ssl.SSLCertVerificationError) -> str:
    """Who stands between, as far as the certificate that was shown says it."""
    try:
        with _secure(kit, verify=False) as secure:
            shown = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return f"the server's certificate is refused ({error.verify_message}); tell the coordinator"
    if shown.issuer == certificates.parse_certificate(kit.certificate).subject:
        return f"the server's certificate is refused ({error.verify_message}); tell the coordinator"
    return (
        f"a proxy opens TLS here: issuer {shown.issuer.rfc4514_string()}, and not the consortium's authority; ask for "
        f"an exemption for {kit.address}. If nobody opens TLS here, this is not the server: tell the coordinator"
    )


@contextmanager
def _secure(kit: Kit, *, verify: bool = True) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cadata=kit.certificate.decode("ascii"))
    if not verify:  # to read who shows what; nothing is sent
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with _connected(kit) as plain, context.wrap_socket(plain, server_hostname=_place(kit)[0]) as secure:
        yield secure


def _connected(kit: Kit) -> socket.socket:
    """A connection to the server, as far as TCP.

    Raises:
        OSError: there is none; the text names a proxy's status.
    """
    way = _way(kit)
    if way is None:
        return socket.create_connection(_place(kit), timeout=CONNECT_S)
    tunnel = http.client.HTTPConnection(way.hostname or "", way.port or 80, timeout=CONNECT_S)
    headers = {}
    if way.username:
        login = f"{unquote(way.username)}:{unquote(way.password or '')}".encode()
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login).decode()}"
    tunnel.set_tunnel(*_place(kit), headers=headers)
    tunnel.connect()
    return tunnel.sock


def _way(kit: Kit) -> SplitResult | None:
    """The proxy that the environment names for the server."""
    named = urllib.request.getproxies().get("https") or urllib.request.getproxies().get("all")
    if not named or urllib.request.proxy_bypass(_place(kit)[0]):
        return None
    return urlsplit(named if "://" in named else f"http://{named}")


def _place(kit: Kit) -> tuple[str, int]:
    host, _, number = kit.address.rpartition(":")
    return host.strip("[]"), int(number)
