"""Secret noise: its distribution, its independence, and that it cannot be repeated."""

import copy
import os
import pickle

import numpy as np
import pytest
from scipy import stats

from fedmed.errors import ConfigError
from fedmed.privacy.grid import grid_of, noised, whole
from fedmed.privacy.noise import InsecureGenerator, SecureGenerator, noise_generator

KINDS = [SecureGenerator, lambda: InsecureGenerator(7)]
both = pytest.mark.parametrize("make", KINDS, ids=["secure", "insecure"])


@both
def test_p05_noise_is_normal(make):
    noise = make().normal(1_000_001)
    assert noise.dtype == np.float32 and noise.shape == (1_000_001,)
    assert stats.kstest(noise, "norm").pvalue > 1e-5
    assert abs(float(noise.mean(dtype=np.float64))) < 0.006
    assert float(noise.var(dtype=np.float64)) == pytest.approx(1, abs=0.01)
    assert float((noise.astype(np.float64) ** 4).mean()) == pytest.approx(3, abs=0.06)


@both
def test_p05_fine_noise_is_normal_and_has_all_bits_of_float64(make):
    noise = make().fine_normal(1_000_001)
    assert noise.dtype == np.float64 and noise.shape == (1_000_001,)
    assert stats.kstest(noise, "norm").pvalue > 1e-5
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 6 / np.sqrt(noise.size)
    low = np.mod(noise * 2.0**40, 1)  # below a millionth of a grid of 2⁻²⁰
    assert stats.kstest(low, "uniform").pvalue > 1e-5


@pytest.mark.parametrize("deviation", [1e-3, 0.7, 1.0, 4.26, 1e6])
def test_p08_noise_on_a_grid_leaves_nothing_of_the_data_below_it(deviation):
    grid = grid_of(deviation)
    assert deviation * 2.0**-27 < grid <= deviation * 2.0**-26
    patients = deviation * np.random.default_rng(0).normal(size=(50, 40))
    near = patients * (1 - 2.0**-50)
    vectors = [whole(each, grid) for each in (patients, near)]
    assert (np.linalg.norm(vectors[0] * grid, axis=1) <= np.linalg.norm(patients, axis=1)).all()
    same = (vectors[0] == vectors[1]).all(axis=0)  # but for those between which a multiple of the grid lies
    found = [noised(each.sum(axis=0), deviation, grid, InsecureGenerator(1)) for each in vectors]
    assert same.mean() > 0.9 and np.array_equal(found[0][same], found[1][same])
    released = noised(vectors[0].sum(axis=0), deviation, grid, SecureGenerator())
    assert (released % grid == 0).all()
    assert np.abs(released - patients.sum(axis=0)).max() < 6 * deviation
    noise = noised(np.zeros(100_000, np.int64), deviation, grid, SecureGenerator()) / deviation
    assert stats.kstest(noise, "norm").pvalue > 1e-5


def test_p05_tails_reach_beyond_five_sigma():
    generator = SecureGenerator()
    count = sum(int((np.abs(generator.normal(10**7)) > 5).sum()) for _ in range(4))
    assert stats.poisson(4e7 * 2 * stats.norm.sf(5)).ppf(1e-7) <= count <= stats.poisson(22.9).isf(1e-7)


def test_p05_the_rarest_words_reach_ten_sigma():
    class Zeros(SecureGenerator):
        def _words(self, count, kind):
            return np.zeros(count, kind)

    assert float(Zeros().normal(2)[0]) == pytest.approx(np.sqrt(2 * 86 * np.log(2)), rel=1e-3)


class Given(SecureGenerator):
    """Words that a test decides: of radii, then of angles; what more bits are asked for are 0."""

    def __init__(self, radii, angles) -> None:
        self.words = np.array([*radii, *angles], np.uint32)

    def _words(self, count, kind):
        return self.words if kind is np.uint32 else np.zeros(count, kind)


def test_p05_no_noise_is_exactly_zero_whatever_the_words():
    words = [0, 1, 2**12, 2**30, 2**31, 3 * 2**30, 2**32 - 2**24, 2**32 - 128, 2**32 - 1]
    radii, angles = (each.ravel() for each in np.meshgrid(words, words))
    noise = Given(radii, angles).normal(2 * len(radii))
    assert np.isfinite(noise).all() and (noise != 0).all()


def test_p05_radii_near_zero_are_as_fine_as_others():
    above = np.array([0, 1, 127, 2**12, 2**23, 2**24 - 1, 2**24, 2**24 + 1, 2**28, 2**31])  # words above a word
    share = (above + np.where(above < 2**24, 2.0**-54, 0.5)) * 2.0**-32
    noise = Given(2**32 - 1 - above, np.zeros(len(above))).normal(2 * len(above))
    assert noise[: len(above)] == pytest.approx(np.sqrt(-2 * np.log1p(-share)), rel=1e-5)


@both
def test_p05_values_of_one_draw_are_independent(make):
    noise = make().normal(2_000_000).astype(np.float64)
    halves = noise.reshape(-1, 2, 50_000)[:, :, :32_768]
    pairs = np.concatenate([noise[:65_536].reshape(2, -1), halves[:, :, :].transpose(1, 0, 2).reshape(2, -1)], axis=1)
    limit = 6 / np.sqrt(pairs.shape[1])
    for shape in (lambda x: x, np.abs, np.square):
        assert abs(np.corrcoef(shape(pairs[0]), shape(pairs[1]))[0, 1]) < limit
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 6 / np.sqrt(noise.size)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 65_535, 65_536, 65_537])
def test_noise_of_any_length_has_that_length(size):
    noise = SecureGenerator().normal(size)
    assert noise.shape == (size,) and np.isfinite(noise).all()


def test_p05_every_generator_and_every_draw_is_a_stream_of_its_own():
    first, second = SecureGenerator(), SecureGenerator()
    draws = [first.normal(1000), first.normal(1000), second.normal(1000)]
    assert all(abs(np.corrcoef(draws[a], draws[b])[0, 1]) < 0.2 for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_p05_a_forked_child_does_not_repeat_its_parent():
    generator = SecureGenerator()
    generator.normal(10)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, generator.normal(64).tobytes())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        theirs = np.frombuffer(pipe.read(), np.float32)
    assert os.waitpid(child, 0)[1] == 0
    assert theirs.shape == (64,) and not np.isin(theirs, generator.normal(64)).any()


def test_p05_secret_noise_cannot_be_seeded_copied_or_saved():
    with pytest.raises(TypeError):
        SecureGenerator(7)
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied, pickled or saved"):
            take(SecureGenerator())


@both
def test_p05_poisson_sampling_meets_its_rate(make):
    generator = make()
    taken = np.array([generator.sample(1000, 0.03).sum() for _ in range(400)])
    assert taken.mean() == pytest.approx(30, abs=6 * np.sqrt(29.1 / 400))
    assert taken.var() == pytest.approx(29.1, rel=0.4)  # sizes vary, which a shuffled batch's would not
    assert not generator.sample(100, 0.0).any() and generator.sample(100, 1.0).all()
    with pytest.raises(ConfigError, match="rate"):
        generator.sample(3, 1.5)


@both
def test_p05_a_draw_takes_everyone_equally_often_and_nobody_twice(make):
    generator = make()
    counts = np.zeros(6)
    for _ in range(3000):
        drawn = generator.choose(6, 2)
        assert len(set(drawn.tolist())) == 2
        counts[drawn] += 1
    assert stats.chisquare(counts).pvalue > 1e-6
    assert sorted(generator.choose(5, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="cannot be drawn"):
        generator.choose(2, 3)


@both
def test_p05_integers_are_uniform(make):
    generator = make()
    drawn = generator.integers(7, 70_000)
    assert drawn.min() == 0 and drawn.max() == 6
    assert stats.chisquare(np.bincount(drawn)).pvalue > 1e-6
    assert generator.integers(1, 3).tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match="bound"):
        generator.integers(0, 1)


def test_test_noise_repeats_and_is_marked():
    first, second = (noise_generator("insecure-test", seed=3) for _ in range(2))
    assert np.array_equal(first.normal(10), second.normal(10))
    assert not first.secret and noise_generator("secure", seed=3).secret
