"""Secure sums: masks cancel and hide, whoever goes; and no server gets from a site what would unmask it."""

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedmed.errors import ConfigError, UpdateRefused
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import local_grid, run_on
from fedmed.privacy import secure_sum as rings
from fedmed.reporting import write_model_card

SITES = ("a-40", "b-20", "c-30", "d-10")
SECURE = {"secure_sum": True, "min_sites": 3}


def secrets_of(names: list[str]) -> dict[str, dict[str, bytes]]:
    """What every one has in common with every other."""
    keys = {name: X25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"\1")) for name in names}
    public = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    return {
        name: {other: rings.pair_secret(keys[name], public[other], "run") for other in names if other != name}
        for name in names
    }


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(3, 7), size=st.integers(0, 200))
def test_masks_cancel_to_the_bit_whoever_is_gone(data, count, size):
    names = [f"site {number}" for number in range(count)]
    came = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    rng = np.random.default_rng(count)
    values = {name: rng.integers(0, 2**64, size, np.uint64) for name in names}
    pairs = secrets_of(names)
    total = np.zeros(size, np.uint64)
    for name in came:
        masked = values[name].copy()
        for seed, sign in rings.masks_of(name, pairs[name], "1/7"):
            rings.add_mask_(masked, seed, sign)
        total += masked
    for name in came:
        pieces = {other: rings.own_piece(pairs[other][name], "1/7", name) for other in names if other != name}
        rings.add_mask_(total, rings.own_seed(pieces), -1)
        for other in set(names) - set(came):
            rings.add_mask_(total, rings.mask_seed(pairs[name][other], "1/7"), -rings.sign_of(name, other))
    expected = np.zeros(size, np.uint64)
    for name in came:
        expected += values[name]
    np.testing.assert_array_equal(total, expected)


def test_a_mask_is_the_key_stream_of_aes_and_every_seed_has_its_own():
    total = np.zeros(200_000, np.uint64)
    rings.add_mask_(total, bytes(32), 1)
    assert total[0].tobytes() == bytes.fromhex("dc95c078a2408989")  # AES-256 of zeros under a key of zeros (NIST)
    ones = np.unpackbits(total.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(total.size * 64)
    a, b = secrets_of(["a", "b"]).values()
    pair = a["b"]
    assert pair == b["a"]
    seeds = {rings.mask_seed(pair, "1/1"), rings.mask_seed(pair, "2/1"), rings.mask_seed(pair, "1/2")}
    assert len(seeds | {rings.own_piece(pair, "1/1", "a"), rings.own_piece(pair, "1/1", "b")}) == 5


@settings(max_examples=50, deadline=None)
@given(weight=st.floats(1, 1e4), values=st.lists(st.floats(-100, 100, width=32), max_size=20))
def test_the_ring_keeps_what_float32_holds_and_refuses_what_would_wrap(weight, values):
    vector = np.array(values, np.float32)
    back = rings.from_ring(rings.to_ring(vector, weight, rings.PARAMETER_STEP, sites=9), weight, rings.PARAMETER_STEP)
    np.testing.assert_allclose(back, vector, rtol=2e-7, atol=2.0**-32)
    for wrong in (np.nan, np.inf, 1e30):
        with pytest.raises(UpdateRefused, match="not finite, or too far"):
            rings.to_ring(np.array([wrong], np.float32), 1.0, rings.PARAMETER_STEP, sites=3)


def test_a_key_of_low_order_is_refused():
    with pytest.raises(UpdateRefused, match="is none"):
        rings.pair_secret(X25519PrivateKey.from_private_bytes(bytes(31) + b"\1"), bytes(32), "run")


# A run.


def parameters(folder: Path) -> dict[str, np.ndarray]:
    return load_file(max((folder / "checkpoints").glob("round-*.safetensors")))


@pytest.mark.simulation
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("weight_by", ["uniform", "images", "patients"])
def test_a_secure_sum_gives_the_network_of_the_plain_mean(toy_config, simulate, norm, weight_by):
    given_ = {"model": {"norm": norm}, "strategy": {"min_sites": 3, "weight_by": weight_by}}
    plain = simulate(toy_config(*SITES, **given_))[1].path
    given_["strategy"] |= SECURE
    result, folder = simulate(toy_config(*SITES, **given_))
    assert result["status"] == "completed"
    for name, vector in parameters(plain).items():
        np.testing.assert_allclose(parameters(folder.path)[name], vector, rtol=0, atol=1e-6)


@pytest.mark.simulation
def test_a_site_that_goes_in_a_round_is_left_out_of_the_sum(toy_config, simulate):
    given_ = {"strategy": {**SECURE, "name": "fedavgm"}}
    plain = simulate(toy_config(*SITES, strategy={"min_sites": 3, "name": "fedavgm"}))[1].path
    result, folder = simulate(toy_config(*SITES, "nan-20", **given_))
    assert result["status"] == "degraded"
    assert "not finite" in result["reason"]
    expected = parameters(plain)["parameters"]
    np.testing.assert_allclose(parameters(folder.path)["parameters"], expected, rtol=0, atol=1e-6)


@pytest.mark.simulation
def test_a_resumed_run_gives_the_same_bits(toy_config, simulate, tmp_path):
    config = toy_config(*SITES, strategy=SECURE, train={"rounds": 3})
    whole, folder = simulate(config)
    part = RunFolder.create(tmp_path / "part", config)

    def watch(event):
        if event["kind"] == "update_received" and event["round"] == 2:
            raise InterruptedError

    with local_grid(config, part) as grid, pytest.raises(InterruptedError):
        run_on(grid, config, part, watch)
    with local_grid(config, part) as grid:
        resumed = run_on(grid, config, part, lambda event: None)
    assert (folder.path / "model.safetensors").read_bytes() == (part.path / "model.safetensors").read_bytes()
    assert resumed["status"] == whole["status"] == "completed"
    assert "and no single one (secure sums)" in write_model_card(folder.path).read_text()


@pytest.mark.simulation
def test_sites_clip_their_own_changes(toy_config, simulate):
    clipped = {"clip_norm": 0.02, "min_sites": 3}
    plain = simulate(toy_config(*SITES, strategy=clipped))[1].path
    ours = simulate(toy_config(*SITES, strategy={**clipped, **SECURE}))[1].path
    np.testing.assert_allclose(parameters(ours)["parameters"], parameters(plain)["parameters"], rtol=0, atol=1e-6)


@pytest.mark.simulation
def test_p10_under_privacy_what_is_masked_is_noised_and_charged_as_without_masks(toy_config, simulate):
    private = {"mode": "dp-sgd", "noise_multiplier": 1.0, "noise": "insecure-test", "images_per_patient": 2}
    given_ = {"privacy": private, "train": {"local_steps": 2, "batch_size": 8}}
    weighed = {"min_sites": 3, "weight_by": "uniform"}
    sites = ("a-400", "b-400", "c-400")
    plain, clear = simulate(toy_config(*sites, strategy=weighed, **given_))
    ours, hidden = simulate(toy_config(*sites, strategy={**weighed, **SECURE}, **given_))
    expected = parameters(clear.path)["parameters"]
    np.testing.assert_allclose(parameters(hidden.path)["parameters"], expected, rtol=0, atol=1e-6)
    charged = [[site["privacy"]["events"] for site in result["sites"]] for result in (plain, ours)]
    assert charged[0] == charged[1] and all(charged[0])


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ({"combine": "median"}, "compares single changes"),
        ({"max_update_norm": 1.0}, "clip-norm, which the sites apply"),
        ({"name": "scaffold"}, "uses more of a site than a sum"),
        ({"name": "feddg-ga"}, "uses more of a site than a sum"),
        ({"max_weight_share": 0.5}, "weights that the server can lower"),
        ({"min_sites": 2}, "hides nobody"),
    ],
)
def test_p10_what_needs_a_single_change_is_refused(toy_config, strategy, reason):
    with pytest.raises(ConfigError, match=reason):
        toy_config(*SITES, strategy={**SECURE, **strategy})


def test_p10_central_privacy_at_the_server_is_refused(toy_config):
    with pytest.raises(ConfigError, match="clips single changes at the server"):
        toy_config(*SITES, strategy={**SECURE, "weight_by": "uniform"}, privacy={"mode": "central", "sites": 4})
