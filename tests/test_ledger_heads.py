"""What a server keeps of every site's ledger, and how a ledger that was restored to an older state is found by it."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_consortium import command

from fedmed.errors import LedgerUnusable
from fedmed.federated.admission import ledger_head
from fedmed.privacy.chain import Anchor
from fedmed.privacy.keys import read_public
from fedmed.privacy.verification import examine, heads_in

DIGEST, SIGNATURE = "0f" * 32, "0f" * 64


@pytest.fixture(scope="module")
def restored(tmp_path_factory, toy_config):
    """A private run of two sites and two rounds; beside it their records as they were after the first round."""
    from fedmed.federated.run_folder import RunFolder
    from fedmed.federated.simulation import local_grid, run_on

    root = tmp_path_factory.mktemp("heads")
    private = {"mode": "dp-sgd", "epsilon": 3.0, "noise-multiplier": 1.66}
    config = toy_config("a-400", "b-400", privacy=private, train={"batch-size": 32}, strategy={"min-sites": 2})
    folder = RunFolder.create(root / "run", config)

    def watch(event):
        if event["kind"] == "round_finished" and event["round"] == 1:
            shutil.copytree(folder.path / "sites", root / "old")

    with local_grid(config, folder) as grid:
        assert run_on(grid, config, folder, watch)["status"] == "completed"
    return root


@pytest.mark.simulation
def test_every_update_leaves_its_ledgers_head_with_the_server(restored):
    events = [json.loads(line) for line in (restored / "run" / "events.jsonl").read_text().splitlines()]
    heads = {(e["site"], e["round"]): e["ledger"]["sequence"] for e in events if e["kind"] == "update_received"}
    assert set(heads) == {(site, round) for site in ("a-400", "b-400") for round in (1, 2)}
    for site in ("a-400", "b-400"):
        assert 0 < heads[site, 1] < heads[site, 2]


@pytest.mark.simulation
def test_a_ledger_that_was_restored_is_found_by_the_heads_that_the_server_kept(restored, capsys):
    events = restored / "run" / "events.jsonl"
    for site in ("a-400", "b-400"):
        command("ledger", "verify", restored / "run" / "sites" / site, "--heads", events)
        old = restored / "old" / site
        command("ledger", "verify", old)  # whole: by itself it knows nothing of what came later
        capsys.readouterr()
        with pytest.raises(LedgerUnusable, match="faults"):
            command("ledger", "verify", old, "--heads", events)
        assert "records are missing at its end" in capsys.readouterr().out


@pytest.mark.simulation
def test_heads_of_other_sites_and_forged_ones_do_not_count(restored, tmp_path):
    lines = (restored / "run" / "events.jsonl").read_text().splitlines()
    key = read_public(restored / "run" / "sites" / "a-400" / "keys" / "site.pub")
    heads = heads_in(restored / "run" / "events.jsonl", key)
    assert len(heads) == 2  # of four
    forged = tmp_path / "forged.jsonl"
    forged.write_text("\n".join(line.replace('"sequence": ', '"sequence": 9') for line in lines))
    with pytest.raises(LedgerUnusable, match="none that this site signed"):
        heads_in(forged, key)
    for content in ("no json", "", '{"ledger": {"sequence": 1}}', '{"ledger": {"sequence": [], "hash": 1}}', "\xff"):
        forged.write_text(content, encoding="latin-1")
        with pytest.raises(LedgerUnusable, match="file of heads"):
            heads_in(forged, key)
    with pytest.raises(LedgerUnusable, match="file of heads"):
        heads_in(tmp_path / "none", key)
    assert examine(restored / "run" / "sites" / "a-400", key, anchors=heads).faults == ()


def test_a_head_is_kept_as_it_came():
    facts = {"ledger-sequence": 7, "ledger-hash": DIGEST, "ledger-signature": SIGNATURE}
    assert ledger_head(facts) == Anchor(sequence=7, hash=DIGEST, signature=SIGNATURE)


@given(
    number=st.integers() | st.booleans() | st.floats() | st.text(),
    digest=st.text() | st.integers(),
    signature=st.text() | st.just(SIGNATURE),
)
def test_nonsense_in_the_place_of_a_head_is_left_out(number, digest, signature):
    assert ledger_head({"ledger-sequence": number, "ledger-hash": digest, "ledger-signature": signature}) is None
    assert ledger_head({}) is None
