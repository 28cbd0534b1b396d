"""What a site gives in a secure sum and to whom, and what a server can try with all of them."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from private_sites import network_of, site_in, task_of
from rounds_by_hand import terms_of

from fedmed.errors import ModelError, PolicyRefused, UpdateRefused
from fedmed.federated.combiners.masked_sum import MaskedSum, seeds_in
from fedmed.federated.unmasking import open_sum
from fedmed.federated.wire import decode_task, decode_update, encode_task, encode_update
from fedmed.privacy.egress import contents
from fedmed.privacy.keys import make_keys
from fedmed.privacy.policy import read_policy
from fedmed.training.mask_record import FILE, MaskRecord
from fedmed.training.masking import masked, part_in_sum
from fedmed.training.oversight import Oversight, open_ledger
from fedmed.training.site import Site
from fedmed.training.site_round import site_card, train_round, unmask_round
from fedmed.types import Masking, Task, Update

SITES = ("a-40", "b-20", "c-30", "d-10")
SECURE = {"secure_sum": True, "min_sites": 3}


# What a site gives, and to whom.


class Consortium:
    """Three real sites that know each other by their kits, and a server that may ask anything."""

    def __init__(self, folder: Path, config, names=SITES[:3]) -> None:
        self.config, self.folder, self.names = config, folder, names
        keys = {name: make_keys(folder / name / "keys") for name in names}
        peers = tuple((name, each.public.hex()) for name, each in keys.items())
        self.sites = {
            name: Site(
                name=name, manifest=Path(name), dataset="toy:dataset", state_dir=folder / name / "state",
                keys=folder / name / "keys", peers=peers,
            )
            for name in names
        }  # fmt: skip
        hello = task_of(config, "evaluate", 0)
        cards = {name: site_card(hello, site) for name, site in self.sites.items()}
        self.keys = {name: (card["masking-key"], card["masking-signature"]) for name, card in cards.items()}

    def task(self, attempt: int = 1, **changes) -> Task:
        keys = changes.pop("keys", self.keys)
        return task_of(self.config, "train", 1, masking=Masking(attempt=attempt, keys=keys), **changes)

    def train(self, name: str, attempt: int = 1, **changes) -> Update:
        """Over the wire and back, as a server gets it."""
        task = decode_task(encode_task(self.task(attempt, **changes)))
        return decode_update(encode_update(train_round(task, self.sites[name])))

    def open(self, name: str, *joined: str, attempt: int = 1) -> dict:
        task = self.task(attempt)
        masking = replace(task.masking, joined=joined)
        update = unmask_round(replace(task, kind="unmask", masking=masking), self.sites[name])
        return json.loads(update.facts["seeds"])


@pytest.fixture
def hospitals(tmp_path, toy_config):
    return Consortium(tmp_path, toy_config(*SITES[:3], strategy=SECURE))


def test_a_masked_update_says_nothing_and_the_sum_of_all_is_that_of_the_changes(hospitals):
    config = hospitals.config
    updates = {name: hospitals.train(name) for name in hospitals.names}
    clear = {
        name: train_round(
            task_of(config.model_copy(update={"strategy": config.strategy.model_copy(update={"secure_sum": False})}),
                    "train", 1),
            hospitals.sites[name],
        )
        for name in hospitals.names
    }  # fmt: skip
    sent = network_of(config).weights()
    for name, update in updates.items():
        assert update.weights is None and update.encoding == "ring64"
        assert {row["name"] for row in contents(update) if row["kind"] == "vector"} == {"masked"}
        words = update.masked
        assert abs(np.unpackbits(words.view(np.uint8)).mean() - 0.5) < 5 * 0.5 / np.sqrt(words.size * 64)
        change = clear[name].weights.parameters - sent.parameters
        said = np.corrcoef(words[: change.size].view(np.int64).astype(float), change)[0, 1]
        assert abs(said) < 6 / np.sqrt(change.size)
    combined = MaskedSum(terms_of(config, network_of(config).layout, sent))
    for name, update in updates.items():
        combined.add(name, update, sent)

    def ask(question: Task):
        for name in hospitals.names:
            yield name, encode_update(unmask_round(decode_task(encode_task(question)), hospitals.sites[name]))

    assert open_sum(combined, hospitals.task(), hospitals.task().masking, ask) is None
    weights = {name: update.num_examples for name, update in clear.items()}
    total = sum(
        weights[name] * (update.weights.parameters.astype(np.float64) - sent.parameters)
        for name, update in clear.items()
    )
    np.testing.assert_allclose(combined.result().change, total / sum(weights.values()), rtol=0, atol=1e-8)


def test_the_same_update_may_be_sent_again_and_no_other_one_under_the_same_masks(hospitals):
    first = hospitals.train("a-40")
    again = hospitals.train("a-40")
    np.testing.assert_array_equal(first.masked, again.masked)
    moved = network_of(hospitals.config).weights()
    moved = replace(moved, parameters=moved.parameters + np.float32(0.01))
    with pytest.raises(PolicyRefused, match="has left under these masks"):
        hospitals.train("a-40", weights=moved)
    later = hospitals.train("a-40", attempt=2)
    assert not np.array_equal(later.masked, first.masked)
    with pytest.raises(PolicyRefused, match="older than another"):
        hospitals.train("a-40", attempt=1)


def test_no_server_gets_both_the_mask_and_the_piece_of_one_site(hospitals):
    four = Consortium(hospitals.folder / "four", hospitals.config, names=SITES)
    for name in SITES:
        four.train(name)
    given_ = four.open("a-40", "a-40", "b-20", "c-30")
    assert set(given_["pieces"]) == {"b-20", "c-30"} and set(given_["masks"]) == set(given_["own"]) == {"d-10"}
    assert four.open("a-40", "a-40", "b-20", "c-30") == given_, "asked again, it says the same"
    for others in (("a-40", "b-20", "d-10"), SITES):
        with pytest.raises(PolicyRefused, match="opened for other sites before"):
            four.open("a-40", *others)


@pytest.mark.parametrize(
    ("joined", "attempt", "reason"),
    [
        (("b-20", "c-30"), 1, "no update in that sum"),
        (("a-40", "b-20"), 1, "a secure sum of 2 sites; at least 3"),
        (("a-40", "a-40", "b-20"), 1, "a secure sum of 2 sites; at least 3"),
        (("a-40", "b-20", "x"), 1, "no update in that sum"),
        (("a-40", "b-20", "c-30"), 2, "no update in that sum"),
    ],
)
def test_p10_a_sum_is_opened_only_by_who_is_in_it_and_only_if_it_hides(hospitals, joined, attempt, reason):
    hospitals.train("a-40")
    with pytest.raises(PolicyRefused, match=reason):
        hospitals.open("a-40", *joined, attempt=attempt)


def test_a_site_sums_with_sites_that_it_knows_alone(hospitals, tmp_path):
    stranger = make_keys(tmp_path / "stranger")
    signature = stranger.sign(b"anything").hex()
    forged = {
        "of no kit": {**hospitals.keys, "x": ("ab" * 32, signature)},
        "another's signature": {**hospitals.keys, "b-20": (hospitals.keys["b-20"][0], hospitals.keys["c-30"][1])},
        "the server's own key": {**hospitals.keys, "b-20": ("09" + "00" * 31, hospitals.keys["b-20"][1])},
    }
    for keys in forged.values():
        with pytest.raises(PolicyRefused, match="of no site that this one knows"):
            hospitals.train("a-40", keys=keys)
    with pytest.raises(PolicyRefused, match="another key for this site"):
        hospitals.train("a-40", keys={**hospitals.keys, "a-40": hospitals.keys["b-20"]})
    with pytest.raises(PolicyRefused, match="2 sites; at least 3"):
        hospitals.train("a-40", keys={name: hospitals.keys[name] for name in ("a-40", "b-20")})
    (record,) = (hospitals.folder / "a-40" / "state").rglob(FILE)
    assert json.loads(record.read_text())["asked"] == "", "nothing was masked"


def test_a_sum_is_opened_for_those_who_were_asked_for_it(hospitals):
    four = Consortium(hospitals.folder / "four", hospitals.config, names=SITES)
    asked = {name: four.keys[name] for name in SITES[:3]}
    four.train("a-40", keys=asked)
    with pytest.raises(PolicyRefused, match="no update in that sum"):
        four.open("a-40", "a-40", "b-20", "c-30")


def test_two_tasks_at_once_do_not_share_masks(tmp_path):
    record, said = MaskRecord(folder=tmp_path / "run"), []

    def note(number: int) -> None:
        with contextlib.suppress(PolicyRefused):
            record.note_masked(1, sites="s", asked="a", values=str(number))
            said.append(number)

    threads = [Thread(target=note, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1


def test_a_hospital_sets_how_many_hide_with_it_and_may_ask_for_nothing_less(tmp_path, toy_config):
    config = toy_config(*SITES, strategy={**SECURE, "min_sites": 4})
    four = Consortium(tmp_path, config, names=SITES)
    rules = tmp_path / "site.toml"
    rules.write_text("[policy.training]\nmin-sites = 4\nsecure-sum = true\n")
    for name, site in four.sites.items():
        oversight = Oversight(policy=rules, folder=site.state_dir, keys=site.keys)
        four.sites[name] = replace(site, oversight=oversight)
    for name in SITES:
        four.train(name)
    with pytest.raises(PolicyRefused, match="3 sites; at least 4"):
        four.open("a-40", *SITES[:3])
    assert set(four.open("a-40", *SITES)["pieces"]) == set(SITES[1:])
    departures = [json.loads(line)["body"] for line in (tmp_path / "a-40/state/egress.jsonl").read_text().splitlines()]
    assert [each["task"] for each in departures] == ["train", "unmask"]
    assert any("under masks" in control for control in departures[0]["controls"])
    clear = toy_config(*SITES, strategy={"min_sites": 4})
    with pytest.raises(PolicyRefused, match="in a secure sum alone"):
        train_round(task_of(clear, "train", 1), four.sites["a-40"])


def test_a_key_is_for_one_run(hospitals, toy_config):
    other = toy_config(*SITES[:3], strategy=SECURE, train={"learning_rate": 0.2})
    card = site_card(task_of(other, "evaluate", 0), hospitals.sites["b-20"])
    assert card["masking-key"] != hospitals.keys["b-20"][0]
    mixed = {**hospitals.keys, "b-20": (card["masking-key"], card["masking-signature"])}
    with pytest.raises(PolicyRefused, match="of no site that this one knows"):
        hospitals.train("a-40", keys=mixed)


def test_a_server_that_asks_for_a_network_in_clear_gets_none(hospitals):
    task = replace(hospitals.task(), masking=None)
    with pytest.raises(PolicyRefused, match="asks for a network in clear"):
        train_round(task, hospitals.sites["a-40"])


def test_a_site_without_a_kit_takes_no_part(hospitals):
    with pytest.raises(PolicyRefused, match="knows no other site's key"):
        site_card(task_of(hospitals.config, "evaluate", 0), replace(hospitals.sites["a-40"], peers=()))


@pytest.mark.parametrize("content", ["{", "{}", "null", "[]", '{"secret": "ab", "attempt": 0, "joined": []}'])
def test_a_damaged_record_ends_the_site_s_part_and_a_lost_one_begins_with_another_key(hospitals, content):
    hospitals.train("a-40")
    (record,) = (hospitals.folder / "a-40" / "state").rglob(FILE)
    assert record.stat().st_mode & 0o077 == 0
    record.write_text(content)
    with pytest.raises(PolicyRefused, match="is damaged; remove it"):
        hospitals.train("a-40", attempt=2)
    record.unlink()
    with pytest.raises(PolicyRefused, match="another key for this site"):
        hospitals.train("a-40", attempt=1)
    card = site_card(task_of(hospitals.config, "evaluate", 0), hospitals.sites["a-40"])
    keys = {**hospitals.keys, "a-40": (card["masking-key"], card["masking-signature"])}
    assert keys != hospitals.keys
    hospitals.train("a-40", attempt=3, keys=keys)


def test_a_network_that_is_not_finite_is_no_part_of_a_sum(hospitals):
    network, config = network_of(hospitals.config), hospitals.config
    weights = network.weights()
    broken = replace(weights, parameters=np.full_like(weights.parameters, np.nan))
    update = Update(weights=broken, layout=network.layout.hash, num_examples=5, facts={"patients": 5})
    part = part_in_sum(hospitals.task(), hospitals.sites["a-40"], config)
    with pytest.raises(ModelError, match="not finite"):
        masked(update, hospitals.task(), part, config, network.layout)


def test_a_sum_is_agreed_to_before_anything_is_charged_and_a_refusal_stands_in_the_audit_log(tmp_path, toy_config):
    private = {"mode": "dp-sgd", "noise_multiplier": 1.0, "images_per_patient": 2}
    config = toy_config("a-400", *SITES, strategy=SECURE, privacy=private)
    site = site_in(tmp_path / "site", '[policy.privacy]\nunit = "image"\nstable-ids = true\n')
    keys = dict.fromkeys(("a-400", "b-20", "c-30"), ("ab" * 32, ""))
    with pytest.raises(PolicyRefused, match="another key for this site"):
        train_round(task_of(config, "train", 1, masking=Masking(attempt=1, keys=keys)), site)
    lines = (site.oversight.folder / "audit.jsonl").read_text().splitlines()
    said = [json.loads(line)["body"] for line in lines]
    assert [(each["task"], each["allowed"], each["rule"]) for each in said] == [
        ("train", True, "policy"),
        ("sum", False, "secure-sum.keys"),
    ]
    assert not open_ledger(site.oversight, read_policy(site.oversight.policy)).has_noised_gradients


def test_private_noise_is_not_drawn_twice_for_one_attempt(tmp_path):
    record = MaskRecord(folder=tmp_path)
    record.note_masked(5, sites="s", asked="a", values="v")
    record.require_new(5, again=True)
    record.require_new(6, again=False)
    for attempt, again, reason in ((5, False, "under these masks"), (4, True, "server's clock")):
        with pytest.raises(PolicyRefused, match=reason):
            record.require_new(attempt, again=again)


# What a server can try with all of them.


def opened(hospitals: Consortium, tasks: dict[str, Task]) -> str | None:
    """Why a server that sends each site a task of its own gets no sum, or None."""
    sent = network_of(hospitals.config).weights()
    combined = MaskedSum(terms_of(hospitals.config, network_of(hospitals.config).layout, sent))
    for name, task in tasks.items():
        combined.add(name, train_round(task, hospitals.sites[name]), sent)

    def ask(asked: Task):
        for name in tasks:
            yield name, encode_update(unmask_round(asked, hospitals.sites[name]))

    return open_sum(combined, next(iter(tasks.values())), next(iter(tasks.values())).masking, ask)


def test_sites_that_were_sent_different_networks_have_a_sum_that_nobody_opens(hospitals):
    still = network_of(hospitals.config).weights()
    still = replace(still, parameters=np.zeros_like(still.parameters))
    tasks = {name: hospitals.task(weights=still) for name in hospitals.names} | {"a-40": hospitals.task()}
    assert "does not open it" in opened(hospitals, tasks)
    faster = {name: hospitals.task(2, learning_rate_factor=0.0) for name in hospitals.names}
    assert "does not open it" in opened(hospitals, faster | {"a-40": hospitals.task(2)})
    assert opened(hospitals, {name: hospitals.task(3) for name in hospitals.names}) is None


def test_a_server_that_names_others_when_it_opens_than_when_it_asked_gets_nothing(tmp_path, toy_config):
    five = Consortium(tmp_path, toy_config(*SITES, strategy=SECURE), names=(*SITES, "e-10"))
    asked = Masking(attempt=1, keys={name: five.keys[name] for name in SITES[:3]})
    train_round(replace(five.task(), masking=asked), five.sites["a-40"])
    all_five = Masking(attempt=1, keys=five.keys, joined=("a-40", "d-10", "e-10"))
    with pytest.raises(PolicyRefused, match="no update in that sum"):
        unmask_round(replace(five.task(), kind="unmask", masking=all_five), five.sites["a-40"])


def test_wrong_seeds_open_no_sum(hospitals):
    sent = network_of(hospitals.config).weights()
    combined = MaskedSum(terms_of(hospitals.config, network_of(hospitals.config).layout, sent))
    for name in hospitals.names:
        combined.add(name, hospitals.train(name), sent)

    def ask(asked: Task):
        for name in hospitals.names:
            update = unmask_round(asked, hospitals.sites[name])
            if name == "b-20":
                seeds = json.loads(update.facts["seeds"])
                seeds["pieces"]["a-40"] = "00" * 32
                update = replace(update, facts={"seeds": json.dumps(seeds)})
            yield name, encode_update(update)

    assert "does not open it" in open_sum(combined, hospitals.task(), hospitals.task().masking, ask)


@pytest.mark.parametrize("change", [{"pieces": {}}, {"masks": {"x": "00" * 32}}, {"own": 3}, {"pieces": {"b": "zz"}}])
def test_an_answer_that_opens_nothing_is_refused_and_the_sum_stays_closed(change):
    good = {"pieces": {"b": "00" * 32}, "masks": {"d": "00" * 32}, "own": {"d": "00" * 32}}
    seeds_in({"seeds": json.dumps(good)}, "a", joined=("a", "b"), asked=("a", "b", "d"))
    with pytest.raises(UpdateRefused, match="does not open the sum"):
        seeds_in({"seeds": json.dumps({**good, **change})}, "a", joined=("a", "b"), asked=("a", "b", "d"))


def test_a_sum_stays_closed_when_a_site_is_gone_before_it_opens(hospitals):
    combined = MaskedSum(terms_of(hospitals.config, network_of(hospitals.config).layout))
    sent = network_of(hospitals.config).weights()
    for name in hospitals.names:
        combined.add(name, hospitals.train(name), sent)
    answers = [(name, "no answer before the round's deadline") for name in hospitals.names]
    assert "the secure sum stays closed: a-40: no answer" in open_sum(
        combined, hospitals.task(), hospitals.task().masking, lambda task: answers
    )
