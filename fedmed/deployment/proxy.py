"""nginx in front of the server: sites reach their interface, coordinators by certificate theirs, nobody anything else.

The SuperLink then listens on loopback alone. nginx runs as a child of `fedmed server start`, as the same user.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from fedmed.deployment.certificates import AUTHORITY, SERVER, SERVER_KEY
from fedmed.deployment.consortium import ServerFolder, joined
from fedmed.deployment.coordinators import coordinators
from fedmed.deployment.files import stamps
from fedmed.deployment.processes import Child, descendants, kill, require_free_port
from fedmed.durable import make_private, write_atomically
from fedmed.errors import ConfigError, FedmedError, RunFailed

SETTLE_S = 1.0  # an nginx that cannot have its port ends within that
LONGEST_WAIT_S = 60.0
PLACES = os.pathsep.join(("/usr/sbin", "/usr/local/sbin"))  # not on the PATH of ordinary users
STAMP = re.compile(r"\S+ \S+ \[\w+\] \d+#\d+: ")  # time, level and process of a line of nginx's
ASKED = ("start-run", "stop-run", "list-runs", "list-nodes")  # of Flower's Control interface, by `control`
TEMPLATE = """\
# Written by fedmed server provision, coordinator and start; what is changed here is lost.
daemon off;
worker_processes auto;
{user}pid nginx.pid;
error_log stderr warn;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}  # one hospital's address may have 200, each with one to the SuperLink
http {{
  server_tokens off;
  access_log off;
  log_format coordinators '$remote_addr $ssl_client_s_dn "$request" $status';

  # Flower sends a network in pieces of 5 MB, and an app of at most 10 MB.
  client_max_body_size 16m;
  client_header_timeout 10s;
  client_body_buffer_size 8m;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  keepalive_requests 1000000;

  # A SuperNode has three or four connections; a hospital or several may have one address.
  limit_conn_zone $binary_remote_addr zone=addresses:4m;
  limit_conn addresses 200;

  # Who may enter as a coordinator: certificates of the authority that are on the list, by serial number.
  map_hash_bucket_size 128;
  map "$ssl_client_verify $ssl_client_serial" $coordinator {{
    default "";
{listed}  }}

  upstream superlink {{
    server {inside};
    keepalive 16;
    keepalive_timeout 4s;  # shorter than the SuperLink's own, so that no request meets a closed connection
  }}

  server {{
    listen {outside} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_client_certificate {authority};
    ssl_verify_client optional;
    ssl_verify_depth 1;

    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $host;
    proxy_max_temp_file_size 0;
    proxy_read_timeout 300s;
    send_timeout 300s;  # a slow line empties the buffer of a connection in more than the minute that nginx gives it
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {authority};
    proxy_ssl_name localhost;

    # Sites. The SuperLink is told where they are, and refuses them everything else once more.
    location /v1/fleet/ {{
      if ($request_method != POST) {{ return 405; }}
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_pass https://superlink;
    }}

    # Coordinators. For the SuperLink they are on its own machine.
    location ~ ^/(v1/control/({asked})$|fedmed/) {{
      if ($coordinator = "") {{ return 403; }}
      access_log /dev/stdout coordinators;
      proxy_set_header X-Forwarded-For "";
      proxy_buffering off;
      proxy_pass https://superlink;
    }}

    # Not theirs: which sites there are is decided by the server's folder alone.
    location /v1/control/ {{ return 403; }}

    location / {{ return 404; }}
  }}
}}
"""


def nginx_configuration(folder: ServerFolder) -> str:
    """The whole of nginx.conf for a server.

    Raises:
        ConfigError: a path cannot be used.
    """
    if set(str(folder.tls)) & set("\"'\\;{}$\n "):
        raise ConfigError("the path of the server's folder holds a character that nginx cannot take, such as a blank")
    listed = []
    for name, certificate in coordinators(folder)[0].items():
        serial = f"{certificate.serial_number:X}"  # as OpenSSL writes it: two digits a byte
        listed.append(f'    "SUCCESS {serial.zfill(len(serial) + len(serial) % 2)}" 1;  # {name}\n')
    consortium = folder.consortium
    return TEMPLATE.format(
        user="user root;\n" if os.geteuid() == 0 else "",  # workers would else lose the right to their own files
        listed="".join(listed),
        asked="|".join(ASKED),
        inside=joined(*consortium.inside),
        outside=joined(consortium.listen, consortium.port),
        certificate=folder.tls / SERVER,
        key=folder.tls / SERVER_KEY,
        authority=folder.tls / AUTHORITY,
    )


def write_nginx(folder: ServerFolder) -> Path | None:
    """Write nginx.conf, if nginx is meant to stand in front.

    Returns:
        Its path, or None.
    """
    if not folder.consortium.loopback_port:
        return None
    path = make_private(folder.nginx) / "nginx.conf"
    write_atomically(path, nginx_configuration(folder).encode())
    return path


def nginx_command(folder: ServerFolder) -> list[str]:
    """The command line of nginx.

    Raises:
        ConfigError: nginx is not installed.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path=PLACES)
    if program is None:
        raise ConfigError("nginx is not installed; install it, or set loopback-port = 0 in consortium.toml")
    return [program, "-e", "stderr", "-p", str(folder.nginx), "-c", str(folder.nginx / "nginx.conf")]


class Proxy:
    """nginx, where it stands in front: started again when it ends, told when its configuration changes."""

    def __init__(self, folder: ServerFolder, environment: Mapping[str, str], log: logging.Logger) -> None:
        """Nothing is started yet."""
        self._folder, self._environment, self._log = folder, environment, log
        self._child: Child | None = None
        self._wait_s, self._again = SETTLE_S, 0.0
        self._read: object = None  # what its list looked like when it was read
        self._against = ""

    @property
    def pids(self) -> set[int]:
        """Its processes."""
        return {self._child.pid} | descendants(self._child.pid) if self._child is not None else set()

    def start(self) -> None:
        """Start nginx, if it is wanted and does not run.

        Raises:
            ConfigError: its first configuration cannot be written so, or nginx is not installed.
            RunFailed: it ended at once.
        """
        if not self._folder.consortium.loopback_port or (self._child is not None and self._child.running):
            return
        there = self._doors()
        try:
            write_nginx(self._folder)
            self._read = there
        except (ConfigError, OSError) as error:
            if self._child is None:
                raise
            self._log.info(f"nginx keeps its configuration: {_text(error)}")
        if self._child is None:  # workers of one that ended may hold it a moment longer, which nginx itself waits for
            require_free_port(self._folder.consortium.listen, self._folder.consortium.port, "port")
        self._child = Child(nginx_command(self._folder), self._environment, self._log)
        if self._child.wait(SETTLE_S):
            raise RunFailed("nginx ended at once; logs/server.log says why")

    def look(self, others: set[int]) -> str:
        """Start nginx again if it ended; what there is to say of it. One that ends at once is left alone for longer.

        Args:
            others: processes of this runner that are not nginx's.
        """
        if self._child is None or self._child.running or time.monotonic() < self._again:
            return ""
        kill(descendants(os.getpid()) - others)  # workers of the old one, which hold the port
        try:
            self.start()
        except (FedmedError, OSError) as error:
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
            self._again = time.monotonic() + self._wait_s
            return f"{_text(error)}; it is started again in {self._wait_s:.0f} s"
        self._wait_s = SETTLE_S
        return "nginx ended by itself and was started again"

    def read_again(self) -> list[str]:
        """Have nginx read its certificates and the list of coordinators again if they changed; connections stay.

        What nginx cannot read, it goes on without, and is given again at every look: whoever was taken off the list is
        let in until then.

        Returns:
            What there is to say that was not said before.
        """
        there = self._doors()
        if self._child is None or not self._child.running or there == self._read:
            return []
        against = self._given()
        news = [f"the list of coordinators stays as it was, and is tried again: {against}"]
        if not against:
            self._read = there
            news = [*coordinators(self._folder)[1], "nginx read its list again"]
        elif against == self._against:
            news = []
        self._against = against
        return news

    def _given(self) -> str:
        """What nginx has against a new configuration; nothing if it took it."""
        try:
            write_nginx(self._folder)
        except (ConfigError, OSError) as error:
            return _text(error)
        tried = subprocess.run([*nginx_command(self._folder), "-t"], capture_output=True, text=True, check=False)
        if tried.returncode:
            return STAMP.sub("", " ".join(tried.stderr.split()))
        if self._child is not None:
            os.kill(self._child.pid, signal.SIGHUP)
        return ""

    def _doors(self) -> object:
        return stamps(self._folder.coordinators, "*.crt"), stamps(self._folder.tls, SERVER)

    def end(self) -> None:
        """End it."""
        if self._child is not None:
            self._child.end()


def _text(error: Exception) -> str:
    return f"nginx.conf cannot be written ({error.strerror})" if isinstance(error, OSError) else str(error)
