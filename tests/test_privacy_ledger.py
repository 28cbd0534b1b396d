"""The ledger's laws: what is spent is counted, whoever asks, in whatever order, under whatever name."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from records import RUN, cohort, keys_in, opened, patients, rules, step

from fedmed.errors import BudgetExhausted, LedgerUnusable, PolicyRefused
from fedmed.privacy.accounting import Spent, rdp_curve, rdp_epsilon, spent
from fedmed.privacy.balance import Balance, within
from fedmed.privacy.cohort import Cohort, cohort_of, everyone, persons
from fedmed.privacy.keys import make_keys, read_keys, read_public, signed_by
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.rdp_filter import Filter, curve_of, orders_for
from fedmed.privacy.refusals import Offer
from fedmed.training.account import Account
from fedmed.training.terms import Terms

FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def keys(tmp_path):
    return keys_in(tmp_path)


# Keys and cohorts.


def test_keys_are_their_owners_alone_and_are_made_once(tmp_path):
    made = make_keys(tmp_path / "keys")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()}
    assert modes == {"signing.key": 0o600, "linking.key": 0o600, "site.pub": 0o644}
    assert signed_by(read_public(tmp_path / "keys" / "site.pub"), b"text", made.sign(b"text"))
    assert not signed_by(made.public, b"other", made.sign(b"text"))
    assert "_signing" not in repr(made)
    with pytest.raises(LedgerUnusable, match="keys already"):
        make_keys(tmp_path / "keys")
    (tmp_path / "keys" / "linking.key").chmod(0o640)
    with pytest.raises(LedgerUnusable, match="chmod 600"):
        read_keys(tmp_path / "keys")


def test_keys_do_not_lie_in_the_ledgers_folder(tmp_path):
    keys = make_keys(tmp_path / "ledger" / "keys")
    with pytest.raises(LedgerUnusable) as refused:
        Ledger.open(tmp_path / "ledger", keys=keys, policy=rules())
    assert refused.value.rule == "keys.folder"


def test_p12_no_id_and_no_fingerprint_is_in_any_file_in_clear(tmp_path, keys):
    ledger = opened(tmp_path)
    ledger.reserve(RUN, 1, [step()], cohort_of({"HOSPITAL-4711": [b"FINGERPRINT" * 3]}, keys))
    ledger.close()
    for path in (tmp_path / "ledger").iterdir():
        content = path.read_bytes()
        assert b"HOSPITAL" not in content and b"FINGERPRINT" not in content
    assert cohort_of({"HOSPITAL-4711": [b"a"]}, keys) != cohort_of(
        {"HOSPITAL-4711": [b"a"]}, make_keys(tmp_path / "other")
    )


def test_p12_without_a_stable_link_the_whole_site_is_charged(keys):
    assert cohort_of({"a": []}, keys).is_everyone
    assert cohort_of({"a": [b"pixels"], "b": []}, keys).is_everyone
    assert cohort_of({}, keys).is_everyone
    assert cohort_of({"a": [], "b": []}, keys, stable_ids=True).patients == 2


@given(groups=some.lists(some.sets(some.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=6))
@FEW
def test_persons_are_those_that_share_a_digest(tmp_path_factory, groups):
    keys = keys_in(tmp_path_factory.mktemp("site"))
    named = [cohort_of({f"id-{k}": [b"%d" % n for n in sorted(group)]}, keys) for k, group in enumerate(groups)]
    merged: list[tuple[set[int], set[int]]] = []  # by hand: (numbers, cohorts)
    for k, group in enumerate(groups):
        mine = (set(group), {k})
        for other in [each for each in merged if each[0] & mine[0]]:
            merged.remove(other)
            mine = (mine[0] | other[0], mine[1] | other[1])
        merged.append(mine)
    expected = {tuple(int(k in cohorts) for k in range(len(groups))) for _, cohorts in merged}
    assert {tuple(row) for row in persons(named).tolist()} == expected


def test_a_damaged_cohort_is_refused(keys):
    whole = cohort(keys).members
    for broken in (whole[:-1], whole[:3], b"\0\0\0\0" + whole):
        with pytest.raises(LedgerUnusable):
            Cohort.of_members(broken).digests  # noqa: B018  # reading it is the test


# The gate.


@given(epsilon=some.floats(0.5, 20), log_delta=some.floats(-9, -4), sigma=some.floats(2, 50))
@settings(max_examples=25, deadline=None)
def test_p04_what_the_gate_allows_rdp_allows_as_well(epsilon, log_delta, sigma):
    delta = 10**log_delta
    gate = Filter(epsilon=epsilon, delta=delta, orders=orders_for(epsilon, delta))
    one = curve_of([step(sigma, 1.0, 1)])
    most = max((n for n in range(1, 4000, 7) if gate.allows(n * one)), default=0)
    if most:
        orders, _ = rdp_curve([step(sigma, 1.0, 1)])
        assert rdp_epsilon(orders, most * one, delta=delta) <= epsilon
    assert gate.epsilon_of(np.zeros_like(one)) == 0


def test_p04_the_gate_is_the_formula_of_its_docstring():
    gate = Filter(epsilon=6.0, delta=1e-6, orders=(3.0,))
    orders = np.array(rdp_curve([step(5.0, 1.0, 1)])[0])
    rho = 3.0 / (2 * 5.0**2)  # ρ(α) = α / 2σ² (Mironov 2017)
    bound = 6.0 - np.log(2 / 3) + (np.log(1e-6) + np.log(3)) / 2
    most = int(bound / rho)
    one = curve_of([step(5.0, 1.0, 1)])
    assert 3.0 in orders
    assert gate.allows(most * one) and not gate.allows((most + 1) * one)


def test_who_is_in_a_cohort_twice_is_charged_for_a_group_of_two(tmp_path, keys):
    ledger = opened(tmp_path, epsilon=50.0)
    twice = cohort_of({"a": [b"one"], "b": [b"one", b"two"], "c": [b"three"]}, keys)
    ledger.reserve(RUN, 1, [step(8.0, 1.0, 1)], twice)
    expected = spent([step(4.0, 1.0, 1)], delta=1e-6)  # one Gaussian of twice the sensitivity
    assert ledger.spent().epsilon == pytest.approx(expected.epsilon, rel=1e-6)


@pytest.mark.parametrize("lost", [True, False])
def test_p14_who_is_in_a_cohort_twice_is_charged_so_without_its_members_and_in_the_whole_site(lost, tmp_path, keys):
    ledger, plan = opened(tmp_path, epsilon=50.0), step(8.0, 1.0, 1)
    twice = cohort_of({"a": [b"one"], "b": [b"one", b"two"], "c": [b"three"]}, keys)
    ledger.reserve(RUN, 1, [plan], twice)
    before = ledger.spent().epsilon
    if lost:  # and made anew from the witness, which holds no members
        ledger.close()
        for path in (tmp_path / "ledger").glob("ledger.sqlite*"):
            path.unlink()
        ledger = opened(tmp_path, epsilon=50.0)
        assert ledger.spent().epsilon == before and ledger.most_often(twice.name) == 2
    else:
        ledger.reserve(RUN, 2, [plan], everyone())
        expected = by_filter([step(4.0, 1.0, 2)], 50.0)  # twice for a group of two
        assert ledger.spent().epsilon == pytest.approx(expected, rel=1e-3)
    assert ledger.most_often("everyone") == 2


def test_p03_what_a_run_says_counts_such_a_person_as_the_ledger_does(tmp_path, keys):
    ledger = opened(tmp_path, epsilon=50.0)
    twice = cohort_of({"a": [b"one"], "b": [b"one", b"two"], "c": [b"three"]}, keys)
    ledger.reserve(RUN, 1, [step(8.0, 1.0, 1)], twice)
    terms = Terms(unit="patient", units=3, expected_batch=1.0, steps=5, noise_multiplier=2.0, max_grad_norm=1.0,
                  images_per_patient=1, augmentations=1, physical_batch=8)  # fmt: skip
    account = Account(run=RUN, delta=1e-6, terms=terms, units=[], source=SecureGenerator(), ledger=ledger,
                      cohort=twice.name)  # fmt: skip
    said = json.loads(account.facts()["privacy"])
    assert said["epsilon"] == said["epsilon_total"] == pytest.approx(ledger.spent().epsilon, abs=1e-3)
    (event,) = said["events"]
    assert (event["steps"], event["images_per_patient"], event["unit"]) == (1, 2, "image")


def test_p02_a_delta_that_is_none_among_its_patients_is_refused_when_the_whole_site_is_charged(tmp_path, keys):
    ledger = opened(tmp_path, epsilon=50.0, delta=0.02)
    with pytest.raises(PolicyRefused, match="below 1/N"):
        ledger.reserve(RUN, 1, [step()], cohort_of({f"p{number}": [] for number in range(100)}, keys))


# Reserving and settling.


def test_what_is_reserved_is_charged_and_what_did_not_run_is_given_back(tmp_path, keys):
    ledger = opened(tmp_path)
    held = ledger.reserve(RUN, 1, [step(steps=50)], cohort(keys))
    full = ledger.epsilon_rdp
    assert ledger.spent().epsilon == spent([step(steps=50)], delta=1e-6).epsilon
    ledger.settle(held, [step(steps=20)])
    assert ledger.spent().epsilon == spent([step(steps=20)], delta=1e-6).epsilon
    assert 0 < ledger.epsilon_rdp < full
    assert opened(tmp_path).spent() == ledger.spent()


def test_a_reservation_is_settled_once_by_who_holds_it_and_never_beyond_it(tmp_path, keys):
    ledger = opened(tmp_path)
    held = ledger.reserve(RUN, 1, [step(steps=50), step(5.0, 1.0, 1, release="metrics")], cohort(keys))
    for done in ([step(steps=51), held.events[1]], [step(1.5), held.events[1]], [held.events[0]], [*held.events] * 2):
        with pytest.raises(PolicyRefused) as refused:
            ledger.settle(held, done)
        assert refused.value.rule == "ledger.done-within-reserved"
    with pytest.raises(PolicyRefused, match="another process"):
        opened(tmp_path).settle(replace(held, token="0" * 64), held.events)
    ledger.settle(held, [replace(held.events[0], steps=0), held.events[1]])
    with pytest.raises(PolicyRefused) as refused:
        ledger.settle(held, held.events)
    assert refused.value.rule == "ledger.settled-once"


def test_a_refusal_names_the_rule_and_offers_plans_that_fit(tmp_path, keys):
    ledger = opened(tmp_path, epsilon=3.0)
    ledger.reserve(RUN, 1, [step(2.0)], cohort(keys))
    with pytest.raises(BudgetExhausted) as refused:
        ledger.reserve(RUN, 2, [step(1.0, steps=2000)], cohort(keys))
    text = str(refused.value)
    assert refused.value.rule == "policy.privacy.epsilon"

    def plans(said: str) -> tuple[int, float]:
        return int(said.split(" of its ")[0].split()[-1]), float(said.rsplit(maxsplit=1)[-1])

    steps, noise = plans(text)
    said, (fewer, louder) = refused.value.public, plans(refused.value.public)
    assert "ε" not in said and "3.0" not in said and "(policy.privacy.epsilon)" in said
    assert (fewer, louder) == (steps, pytest.approx(np.ceil(noise * 10) / 10))
    assert Offer(steps=2345, wanted=9000, noise=1.234).rounded() == Offer(steps=2300, wanted=9000, noise=1.3)
    for plan in (step(1.0, steps=steps + 1), step(noise * 0.95, steps=2000)):
        with pytest.raises(BudgetExhausted):
            ledger.reserve(RUN, 2, [plan], cohort(keys))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copy"))
    ledger.reserve(RUN, 2, [step(1.0, steps=steps)], cohort(keys))
    opened(copy, epsilon=3.0).reserve(RUN, 2, [step(noise, steps=2000)], cohort(keys))


def test_p04_a_first_schedule_is_judged_as_one_and_nothing_follows_it(tmp_path, keys):
    plan = [step(1.0, 0.02, 2500)]
    cap = spent(plan, delta=1e-6).epsilon + 0.01
    ledger = opened(tmp_path, epsilon=cap)
    gate = Filter(epsilon=cap, delta=1e-6, orders=orders_for(cap, 1e-6))
    assert not gate.allows(curve_of(plan))  # PRV knows better than the filter's orders
    held = ledger.reserve(RUN, 1, plan, cohort(keys))
    ledger.settle(held, [replace(plan[0], steps=1)])  # stopped after a look at the results: nothing comes back
    with pytest.raises(BudgetExhausted):
        ledger.reserve(RUN, 2, [step(20.0, steps=1)], cohort(keys, [3]))
    assert ledger.spent().epsilon == spent(plan, delta=1e-6).epsilon <= cap < ledger.spent().epsilon_rdp
    ledger.reserve(RUN, 2, plan, cohort(keys, range(100, 110)))  # other patients have a budget of their own


def test_p04_of_one_schedule_epsilon_is_prvs_and_of_more_the_filters(tmp_path, keys):
    ledger = opened(tmp_path)
    ledger.reserve(RUN, 1, [step(steps=400)], cohort(keys))
    ledger.reserve(RUN, 1, [], cohort(keys))  # the mark of a round
    alone = spent([step(steps=400)], delta=1e-6)
    assert alone.accountant == "prv"
    found = Spent(epsilon=alone.epsilon, accountant="prv", epsilon_rdp=by_filter([step(steps=400)], 8.0))
    assert ledger.spent() == found
    ledger.reserve("later", 1, [step(2.0, steps=300)], cohort(keys, range(3)))
    total = by_filter([step(steps=400), step(2.0, steps=300)], 8.0)
    assert ledger.spent() == Spent(epsilon=total, accountant="rdp", epsilon_rdp=total)
    assert spent([step(steps=400), step(2.0, steps=300)], delta=1e-6).epsilon < total <= 8.0


def test_p04_one_long_schedule_may_cost_more_than_two_short_ones_of_others(tmp_path, keys):
    ledger, long = opened(tmp_path, epsilon=50.0), [step(1.0, 0.02, 4000)]
    ledger.reserve(RUN, 1, long, cohort(keys, range(10)))
    for round in (2, 3):
        ledger.reserve(RUN, round, [step(9.0)], cohort(keys, range(10, 20)))
    assert (ledger.spent().epsilon, ledger.spent().accountant) == (spent(long, delta=1e-6).epsilon, "prv")


def test_p03_disjoint_cohorts_compose_in_parallel_and_shared_patients_in_sequence(tmp_path, keys):
    ledger = opened(tmp_path, epsilon=50.0)
    ledger.reserve(RUN, 1, [step()], cohort(keys, range(10)))
    once = ledger.spent()
    ledger.reserve(RUN, 2, [step()], cohort(keys, range(10, 20)))
    assert ledger.spent() == once
    ledger.reserve(RUN, 3, [step()], cohort(keys, range(9, 11)))
    assert ledger.spent().epsilon == pytest.approx(by_filter([step(), step()], 50.0))


def test_p03_mechanisms_of_all_kinds_add_up(tmp_path, keys):
    events = [step(1.1), step(30.0, 1.0, 1, release="metrics"), step(25.0, 1.0, 1, release="count")]
    central = step(40.0, 1.0, 3, unit="site", release="update")
    ledger = opened(tmp_path)
    ledger.reserve(RUN, 1, events, cohort(keys))
    ledger.reserve("other", 1, [central], cohort(keys))
    of_a_patient = step(20.0, 1.0, 3)  # whose hospital's clipped change is another one: as far away as two clips
    assert ledger.spent().epsilon_rdp == pytest.approx(by_filter([*events, of_a_patient], 8.0))


def test_everyone_is_charged_together_with_each_patient_and_with_who_comes_later(tmp_path, keys):
    ledger = opened(tmp_path, epsilon=50.0)
    ledger.reserve(RUN, 1, [step()], everyone())
    ledger.reserve(RUN, 2, [step()], cohort(keys))
    assert ledger.spent().epsilon == pytest.approx(by_filter([step(), step()], 50.0))


def test_a_link_that_a_refused_plan_showed_is_kept(tmp_path, keys):
    ledger = opened(tmp_path, epsilon=4.5)
    ledger.reserve(RUN, 1, [step(0.9, 0.02, 100)], cohort_of({"a": [b"1"]}, keys))
    ledger.reserve(RUN, 2, [step(0.9, 0.02, 100)], cohort_of({"b": [b"2"]}, keys))
    apart = ledger.epsilon_rdp
    with pytest.raises(BudgetExhausted):
        ledger.reserve(RUN, 3, [step(0.9, 0.02, 900)], cohort_of({"c": [b"1", b"2"]}, keys))
    assert ledger.epsilon_rdp > apart
    assert opened(tmp_path, epsilon=4.5).epsilon_rdp == ledger.epsilon_rdp


def test_p02_delta_is_fixed_for_ever_and_below_one_in_the_patients(tmp_path, keys):
    assert opened(tmp_path, delta=1e-3).reserve(RUN, 1, [step(9.0)], cohort(keys, range(99))).warning == ""
    assert opened(tmp_path, delta=1e-3).reserve(RUN, 1, [step(9.0)], cohort(keys, range(101))).warning != ""
    with pytest.raises(PolicyRefused) as refused:
        opened(tmp_path, delta=1e-3).reserve(RUN, 1, [step(9.0)], cohort(keys, range(1000)))
    assert refused.value.rule == "policy.privacy.delta"
    with pytest.raises(PolicyRefused, match="for ever") as refused:
        opened(tmp_path, delta=1e-6)
    assert refused.value.rule == "policy.privacy.delta"


def test_impossible_events_are_refused(tmp_path, keys):
    ledger = opened(tmp_path)
    for event in (step(0.0), step(-1.0), step(steps=0), step(rate=0.0), step(float("nan"))):
        with pytest.raises(PolicyRefused) as refused:
            ledger.reserve(RUN, 1, [event], cohort(keys))
        assert refused.value.rule == "ledger.event"


class Actions:
    """What hypothesis may do to a ledger."""

    plans = some.builds(step, some.sampled_from([0.8, 1.0, 2.0]), some.sampled_from([0.01, 0.05]), some.integers(1, 60))
    groups = some.sets(some.integers(0, 6), min_size=1, max_size=4)
    all = some.lists(some.tuples(plans, groups, some.none() | some.floats(0, 1)), min_size=1, max_size=7)


@given(actions=Actions.all)
@FEW
def test_recorded_spending_is_the_sum_by_hand_and_never_falls_below_what_ran(tmp_path_factory, actions):
    folder = tmp_path_factory.mktemp("site")
    ledger, keys = opened(folder, epsilon=6.0), keys_in(folder)
    ran: dict[int, list] = {}
    for number, (plan, group, share) in enumerate(actions):
        before = ledger.epsilon_rdp
        try:
            held = ledger.reserve(RUN, number, [plan], cohort(keys, group, ids=f"export{number}"))
        except BudgetExhausted:
            assert ledger.epsilon_rdp >= before
            continue
        assert ledger.epsilon_rdp >= before
        done = plan
        if share is not None:
            done = replace(plan, steps=int(share * plan.steps))
            ledger.settle(held, [done])
        charge = ledger.charges[held.sequence]
        assert charge.events[0].steps >= done.steps
        done = replace(done, steps=charge.events[0].steps)  # a first schedule stays charged in full
        for patient in group:
            ran.setdefault(patient, []).append(done)
    worst = max((by_filter(events, 6.0) for events in ran.values()), default=0.0)
    assert ledger.epsilon_rdp == pytest.approx(worst, abs=1e-9)
    assert worst <= 6.0 or ledger.spent().epsilon <= 6.0
    again = opened(folder, epsilon=6.0)
    assert again.epsilon_rdp == ledger.epsilon_rdp and again.head == ledger.head


@given(order=some.permutations(range(5)))
@FEW
def test_the_order_of_reservations_does_not_matter(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("site")
    ledger, keys = opened(folder, epsilon=60.0), keys_in(folder)
    groups = [range(4), range(2, 8), [0], range(6, 9), [2, 7]]
    for number in order:
        ledger.reserve(RUN, number, [step(1.0 + number / 4)], cohort(keys, groups[number], ids=f"e{number}"))
    expected = [step(1.0), step(1.25), step(2.0)]  # of patient 2
    assert ledger.epsilon_rdp == pytest.approx(by_filter(expected, 60.0), abs=1e-9)


def by_filter(events, epsilon):
    """The smallest budget with which a ledger that was opened for another one would have allowed these events."""
    return Filter(epsilon=epsilon, delta=1e-6, orders=orders_for(epsilon, 1e-6)).epsilon_of(curve_of(events))


def test_records_that_say_something_impossible_are_refused():
    for body in ({}, {"kind": "settled", "reservation": 3, "events": []}, {"kind": "reserved", "run": "x"}):
        with pytest.raises(LedgerUnusable):
            Balance().apply(1, body)
    assert within([], []) and not within([], [step()])
    assert patients([1]) != patients([2])
