"""The local page that follows a run."""

from __future__ import annotations

import html
import http.client
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from report_files import Json, estimate

from fedmed.errors import DataError
from fedmed.reporting.live import events_from, live_page, live_server


def event(kind: str, round_: int, **facts: object) -> Json:
    return {"time": f"2026-01-01T00:00:{round_:02}.000Z", "round": round_, "kind": kind, **facts}


EVENTS = [
    event("run_started", 0, name="quickstart"),
    event("round_started", 1, sites=["a", "b"]),
    event("update_received", 1, site="a", images=30, steps=2, seconds=1.0, loss=0.7),
    event("site_failed", 1, site="b", reason="no answer before the round's deadline"),
    event("evaluated", 1, metrics={"auroc": estimate(0.81)}, selection=0.8),
    event("round_finished", 1, seconds=2.0),
    event("round_started", 2, sites=["a", "b"]),
]


def tell(run: Path, *events: Json, end: str = "\n") -> None:
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(each) for each in events) + end)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text('name = "quickstart"\n[train]\nrounds = 3\n[task]\nkind = "classification"\n')
    return tmp_path


@pytest.fixture
def server(run: Path) -> Iterator[ThreadingHTTPServer]:
    with live_server(run) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: ThreadingHTTPServer, path: str, host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_events_come_as_they_are_written_and_each_once(run: Path, server: ThreadingHTTPServer) -> None:
    assert json.loads(get(server, "/events?from=0")[1]) == {"events": [], "next": 0, "report": False}
    tell(run, *EVENTS[:3])
    first = json.loads(get(server, "/events?from=0")[1])
    assert first["events"] == EVENTS[:3]
    tell(run, *EVENTS[3:])
    second = json.loads(get(server, f"/events?from={first['next']}")[1])
    assert second["events"] == EVENTS[3:]
    assert json.loads(get(server, f"/events?from={second['next']}")[1])["events"] == []


def test_a_half_written_line_waits_until_it_is_whole(run: Path) -> None:
    tell(run, EVENTS[0])
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(EVENTS[1])[:20])
    first = events_from(run, 0)
    assert first["events"] == EVENTS[:1]
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(EVENTS[1])[20:] + "\n")
    assert events_from(run, int(str(first["next"])))["events"] == EVENTS[1:2]


def test_a_damaged_line_is_left_out_and_a_shorter_file_is_read_anew(run: Path) -> None:
    (run / "events.jsonl").write_text('{"kind": \n[1]\n' + json.dumps(EVENTS[0]) + "\n")
    assert events_from(run, 0)["events"] == EVENTS[:1]
    assert events_from(run, 10**6)["events"] == EVENTS[:1]


def test_a_long_run_comes_in_several_answers(run: Path) -> None:
    tell(run, *[event("checkpoint_saved", n % 60, note="x" * 400) for n in range(6000)])
    start, seen, answers = 0, 0, 0
    while found := events_from(run, start)["events"]:
        start = int(str(events_from(run, start)["next"]))
        seen, answers = seen + len(found), answers + 1  # type: ignore[arg-type]
    assert seen == 6000 and answers > 1


def test_the_report_is_offered_when_the_run_is_over(run: Path, server: ThreadingHTTPServer) -> None:
    assert get(server, "/report.html")[0] == 404
    tell(run, event("run_finished", 3, status="completed", reason=None))
    (run / "report.html").write_text("<p>done</p>")
    assert json.loads(get(server, "/events")[1])["report"] is True
    assert get(server, "/report.html")[1] == b"<p>done</p>"


def test_only_this_machine_is_answered(run: Path, server: ThreadingHTTPServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_port
    assert get(server, "/", f"127.0.0.1:{port}")[0] == get(server, "/", f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1"):
        assert get(server, "/", host)[0] == 403, "a page that was rebound to this address reads nothing"


def test_no_other_file_is_served(run: Path, server: ThreadingHTTPServer) -> None:
    tell(run, EVENTS[0])
    for path in (
        "/run.toml",
        "/events.jsonl",
        "/../run.toml",
        "/%2e%2e/run.toml",
        "/sites/",
        "/report.html/../run.toml",
    ):
        assert get(server, path)[0] == 404, path
    assert json.loads(get(server, "/events?from=-5")[1])["events"] == EVENTS[:1]
    assert json.loads(get(server, "/events?from=x")[1])["events"] == EVENTS[:1]


def test_the_page_asks_nobody_but_its_own_server(run: Path, server: ThreadingHTTPServer) -> None:
    status, body, headers = get(server, "/")
    page = html.unescape(body.decode())
    assert status == 200 and headers["Cache-Control"] == "no-store"
    assert "default-src 'none'; script-src 'unsafe-inline'; connect-src 'self';" in page
    assert 'src="' not in page.partition("<script>")[0]
    assert '"rounds":3' in page and '"primary":"auroc"' in page


def test_a_name_that_is_markup_is_text_on_the_page(run: Path) -> None:
    (run / "run.toml").write_text('name = "<script>x</script>"\n')
    assert "<script>x</script>" not in live_page(run)


def test_refuses_a_folder_without_a_run_and_a_port_that_is_taken(tmp_path: Path, run: Path) -> None:
    with pytest.raises(DataError, match="no run to follow"):
        live_server(tmp_path / "nowhere")
    with live_server(run) as first, pytest.raises(DataError, match="cannot be listened on"):
        live_server(run, port=first.server_port)
