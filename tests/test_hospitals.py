"""How the record of a run is compared with what the sites recorded, since proofs rest on it."""

import json
from pathlib import Path

import pytest
from hospitals import SITES, checked


def written(root: Path, *, came: list[tuple[str, int]], sent: list[str]) -> Path:
    """The folder of a run of one round that says that all joined: events, by site and try, and who sent an update."""
    entry = {"round": 1, "joined": list(SITES), "failed": []}
    (root / "result.json").write_text(json.dumps({"name": "x", "status": "completed", "rounds_log": [entry]}))
    events = []
    for attempt in range(1, 1 + max(number for _, number in came)):
        events.append({"kind": "round_started", "round": 1})
        events += [{"kind": "update_received", "round": 1, "site": site} for site, at in came if at == attempt]
    (root / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    for site in SITES:
        (root / site / "state").mkdir(parents=True)
        body = {"run": "x", "round": 1 if site in sent else 2, "task": "train"}
        (root / site / "state" / "egress.jsonl").write_text(json.dumps({"body": body}))
    return root


def test_a_round_that_was_begun_again_counts_as_it_ended(tmp_path):
    again = written(tmp_path, came=[("a-40", 1), *((site, 2) for site in SITES)], sent=list(SITES))
    assert checked(again, tmp_path.joinpath)["status"] == "completed"


@pytest.mark.parametrize(
    ("came", "sent"),
    [
        ([(site, 1) for site in SITES], ["a-40", "b-20"]),
        ([("a-40", 1), ("b-20", 2), ("c-20", 2)], list(SITES)),
    ],
    ids=["one site's manifest does not say so", "an update of the first try"],
)
def test_a_record_that_is_not_true_is_found(tmp_path, came, sent):
    with pytest.raises(AssertionError):
        checked(written(tmp_path, came=came, sent=sent), tmp_path.joinpath)
