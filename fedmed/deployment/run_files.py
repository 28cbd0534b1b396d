"""Run folders for coordinators: the server lists and serves them, and `fedmed server fetch` brings one over.

Flower's own way to fetch results needs its enterprise edition. `GET /fedmed/runs` names the folders,
`/fedmed/runs/NAME` lists a folder's files with their SHA-256, `/fedmed/files/NAME/PATH` gives one, from any byte on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import quote

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fedmed.deployment.coordinators import Entrance
from fedmed.durable import DIGEST, sha256_of
from fedmed.errors import ConfigError, RunFailed

PLACE = "/fedmed"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
PIECE = 1 << 20  # bytes
TIMEOUT_S = 300.0  # a server takes seconds to hash a large run


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A file of a run folder."""

    path: str  # relative, with slashes
    bytes: int
    sha256: str


def run_files(folder: Path) -> list[RunFile]:
    """The files of a run folder that are whole; links and messages between processes are none."""
    found = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or not _given(place):
            continue
        digest = sha256_of(path)
        found.append(RunFile(path=place.as_posix(), bytes=path.stat().st_size, sha256=digest))
    return found


def run_server(runs: Path) -> Starlette:
    """An ASGI application that gives the run folders below `runs`, and nothing beside or above them.

    Who may ask is decided before.
    """

    def names(request: Request) -> JSONResponse:
        return JSONResponse({"runs": sorted(path.name for path in runs.glob("*") if path.is_dir())})

    def listing(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        folder = runs / name
        if not NAME.fullmatch(name) or folder.is_symlink() or not folder.is_dir():
            return JSONResponse({"error": "there is no such run"}, status_code=404)
        return JSONResponse({"files": [vars(file) for file in run_files(folder)]})

    files = _RunFiles(directory=runs, check_dir=False)
    return Starlette(
        routes=[
            Route(f"{PLACE}/runs", names, methods=["GET"]),
            Route(f"{PLACE}/runs/{{name}}", listing, methods=["GET"]),
            Mount(f"{PLACE}/files", files),
        ]
    )


class _RunFiles(StaticFiles):
    """Gives what `run_files` lists, and refuses links and paths that lead out of the folder."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        return super().lookup_path(path) if _given(PurePath(*PurePath(path).parts[1:])) else ("", None)


def _given(place: PurePath) -> bool:
    """Whether a file at this place in a run folder is a whole file of the run."""
    hidden = any(part.startswith(".") for part in place.parts)
    return bool(place.parts) and not hidden and place.parts[0] != "spool" and place.suffix != ".partial"


def fetch_run(server: Entrance, choose: Callable[[list[str]], str | None], out: Path) -> Iterator[RunFile]:
    """Bring a run folder over; files that are there already are kept, and one that was cut off goes on where it ended.

    Args:
        server: where it lies.
        choose: picks one of the names of run folders.
        out: the folder to write.

    Yields:
        Every file, when it is whole.

    Raises:
        ConfigError: the server names a file that would lie outside the folder.
        RunFailed: there is no such run, the server does not answer or refuses, or a file changed on the way.
    """
    try:
        with run_client(server) as client:
            name = choose(folders(client))
            if name is None:
                raise RunFailed("the server has no folder of that run; fedmed server status lists the runs")
            for values in _asked(client, f"/runs/{quote(name)}")["files"]:
                file = _checked(values)
                _fetch(client, f"/files/{quote(name)}/{quote(file.path)}", file, out)
                yield file
    except httpx.RequestError as error:
        raise RunFailed(f"{server.unanswered} ({type(error).__name__}); then fetch again to go on") from None
    except httpx.HTTPStatusError as error:
        raise RunFailed(server.refused(error.response.status_code)) from None


def run_client(server: Entrance, timeout_s: float = TIMEOUT_S) -> httpx.Client:
    """A connection to the run folders of a server.

    Raises:
        ConfigError: a certificate or a key cannot be used.
    """
    return httpx.Client(
        base_url=f"https://{server.address}{PLACE}",
        verify=server.tls(),
        timeout=timeout_s,
        trust_env=not server.near,
    )


def folders(client: httpx.Client) -> list[str]:
    """The names of the server's run folders."""
    return list(map(str, _asked(client, "/runs")["runs"]))


def of_series(names: Iterable[str], series: int) -> str | None:
    """Which of the names of run folders is that of a Flower series; None if there is none yet."""
    return next((name for name in names if name.endswith(f"-{series}")), None)


def _asked(client: httpx.Client, place: str) -> dict[str, Any]:
    answer = client.get(place)
    answer.raise_for_status()
    return dict(answer.json())


def _checked(values: dict[str, Any]) -> RunFile:
    file = RunFile(path=str(values["path"]), bytes=int(values["bytes"]), sha256=str(values["sha256"]))
    parts = PurePosixPath(file.path)
    if parts.is_absolute() or not parts.parts or {"..", "."} & set(file.path.split("/")) or "\\" in file.path:
        raise ConfigError("the server names a file outside the run's folder; nothing of it was written")
    if not DIGEST.fullmatch(file.sha256):
        raise ConfigError("the server names a file without a checksum; nothing of it was written")
    return file


def _fetch(client: httpx.Client, place: str, file: RunFile, out: Path) -> None:
    path = out / file.path
    if path.exists() and sha256_of(path) == file.sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    there = partial.stat().st_size if partial.exists() else 0
    if there < file.bytes or not there:
        headers = {"Range": f"bytes={there}-"} if there else {}
        with client.stream("GET", place, headers={**headers, "Accept-Encoding": "identity"}) as answer:
            answer.raise_for_status()
            with partial.open("ab" if answer.status_code == httpx.codes.PARTIAL_CONTENT else "wb") as target:
                for piece in answer.iter_bytes(PIECE):
                    target.write(piece)
    if sha256_of(partial) != file.sha256:
        partial.unlink()
        raise RunFailed(f"{file.path} is not what the server listed: it changed meanwhile; fetch again")
    partial.replace(path)
