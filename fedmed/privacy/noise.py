"""Randomness that nobody can predict: noise, Poisson sampling and draws, from AES in counter mode.

The ε of a run holds only while its noise and its sampling are secret (docs/privacy-model.md, claim 5). The coordinator
knows the run's seed, so none of this comes from a seed; it is never saved and never restored, because the same noise
under two different sums cancels when they are subtracted.
"""

from __future__ import annotations

import math
import os
from typing import Literal, NoReturn, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedmed.errors import ConfigError

BLOCK = 32_768  # pairs of normals made at once: their words and floats stay in a core's cache
LOW, HIGH = 2**12, 2**24  # so many words next to 0, or to 2³², get 53 bits more: else no normal would pass 6.7σ, and
# radii near 0 would be coarse or 0, as float32 has no number between 1 - 2⁻²⁴ and 1
TINY = 2.0**-53

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class NoiseGenerator(Protocol):
    """What private training and releases draw from."""

    secret: bool  # False voids every ε

    def begin(self, step: int) -> None:
        """Say that a step of a round begins, from 0: what can be predicted follows from the seed and the step alone."""
        ...

    def normal(self, size: int) -> NDArray[np.float32]:
        """Standard normals, (size,)."""
        ...

    def fine_normal(self, size: int) -> NDArray[np.float64]:
        """Standard normals with all bits of float64, for noise that is rounded to a grid, (size,)."""
        ...

    def sample(self, count: int, rate: float) -> NDArray[np.bool_]:
        """Poisson sampling: who takes part, each of `count` on its own with probability `rate`, (count,)."""
        ...

    def choose(self, count: int, size: int) -> NDArray[np.int64]:
        """`size` different numbers below `count`, in random order, (size,)."""
        ...

    def integers(self, high: int, size: int) -> NDArray[np.int64]:
        """Uniform numbers in [0, high), (size,)."""
        ...


class SecureGenerator:
    """A stream of AES-256 in counter mode under a key of the operating system's, which no argument can set.

    It cannot be seeded, copied, pickled or saved. A forked child takes a key of its own, so that it never repeats its
    parent's stream. Not for use by two threads at once.

    The noise is normal out to 10σ and never exactly 0. It has steps: radii lie apart by one part in 10⁵ or less, angles
    by 2⁻²¹ or less. Floating-point noise is not exactly the Gaussian of the proofs (Mironov 2012,
    doi:10.1145/2382196.2382264); docs/privacy-model.md says so.
    """

    __slots__ = ("_owner", "_stream")
    secret = True

    def __init__(self) -> None:
        """Take a key from the operating system."""
        self._rekey()

    def begin(self, step: int) -> None:
        """The stream goes on: nothing that is drawn here is ever drawn again."""

    def normal(self, size: int) -> NDArray[np.float32]:
        """Standard normals by Box and Muller (1958, doi:10.1214/aoms/1177706645), (size,).

        √(-2 ln u)·(cos 2πv, sin 2πv), with u in (0, 1) from 32 bits, or 85 where it is near 0 or 1.
        """
        out = np.empty(size, np.float32)
        for start in range(0, size, 2 * BLOCK):
            part = out[start : start + 2 * BLOCK]
            pairs = (len(part) + 1) // 2
            words = self._words(2 * pairs, np.uint32)
            radius = words[:pairs].astype(np.float32)
            radius += np.float32(0.5)
            radius *= np.float32(2.0**-32)
            np.log(radius, out=radius)
            radius *= np.float32(-2)
            ends = np.flatnonzero(words[:pairs] - np.uint32(LOW) >= 2**32 - LOW - HIGH)  # words below LOW wrap round
            if len(ends):
                radius[ends] = self._finely(words[ends])
            np.sqrt(radius, out=radius)
            angle = words[pairs:].astype(np.float32)
            angle += np.float32(0.5)
            angle *= np.float32(2 * math.pi * 2.0**-32)
            np.multiply(radius, np.cos(angle), out=part[:pairs])
            rest = len(part) - pairs
            np.multiply(radius[:rest], np.sin(angle[:rest]), out=part[pairs:])
        return out

    def fine_normal(self, size: int) -> NDArray[np.float64]:
        """The same in float64 from 106 bits for u and 53 for v, out to 12σ, (size,)."""
        high, low, angle = (self._words(size, np.uint64) >> np.uint64(11) for _ in range(3))
        radius = (high + (low + 0.5) * TINY) * TINY
        normals: NDArray[np.float64] = np.sqrt(-2 * np.log(radius)) * np.cos(angle * (2 * math.pi * TINY))
        return normals

    def sample(self, count: int, rate: float) -> NDArray[np.bool_]:
        """Poisson sampling, (count,). The rate is met from below to 2⁻⁶⁴, so no one is drawn more often than charged.

        Raises:
            ConfigError: the rate is no probability.
        """
        check_rate(rate)
        if rate == 1:
            return np.ones(count, np.bool_)
        below: NDArray[np.bool_] = self._words(count, np.uint64) < np.uint64(int(rate * 2.0**64))
        return below

    def choose(self, count: int, size: int) -> NDArray[np.int64]:
        """A draw without replacement: the order of random 64-bit words, (size,).

        Raises:
            ConfigError: more are wanted than there are.
        """
        check_draw(count, size)
        return np.argsort(self._words(count, np.uint64), kind="stable")[:size].astype(np.int64)

    def integers(self, high: int, size: int) -> NDArray[np.int64]:
        """Uniform numbers in [0, high), (size,): words cut to the bits that matter, those too large drawn again.

        Raises:
            ConfigError: there is no such number, or `high` passes 2⁶³.
        """
        check_high(high)
        mask = np.uint64((1 << (high - 1).bit_length()) - 1)
        out = np.empty(0, np.int64)
        while len(out) < size:
            words = self._words(2 * (size - len(out)) + 16, np.uint64) & mask
            out = np.concatenate([out, words[words < np.uint64(high)].astype(np.int64)])
        return out[:size]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied, pickled or saved: the same noise twice would cancel.

        Raises:
            TypeError: always.
        """
        raise TypeError("secret noise cannot be copied, pickled or saved; make a new SecureGenerator")

    def _rekey(self) -> None:
        self._owner = (os.getpid(), _forks)
        self._stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def _finely(self, words: NDArray[np.unsignedinteger]) -> NDArray[np.float64]:
        """-2 ln u for words next to either end, from 53 bits more; at the upper one from 1 - u, which u rounds away."""
        more = (self._words(len(words), np.uint64) >> np.uint64(11)) * TINY + TINY / 2
        logarithms = np.where(words < LOW, np.log((words + more) * 2.0**-32), np.log1p(-(~words + more) * 2.0**-32))
        return -2 * logarithms

    def _words(self, count: int, kind: type[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        if self._owner != (os.getpid(), _forks):
            self._rekey()
        return np.frombuffer(self._stream.update(bytes(count * np.dtype(kind).itemsize)), kind)


class InsecureGenerator:
    """The same draws from a seed: exact repeats for tests. Every ε of a run that uses it is void."""

    secret = False

    def __init__(self, seed: int) -> None:
        """The same seed gives the same draws."""
        self._seed = seed
        self._source = np.random.Generator(np.random.Philox(seed))

    def begin(self, step: int) -> None:
        """A round that was cut off draws from here on what it would have drawn."""
        self._source = np.random.Generator(np.random.Philox([self._seed, step + 1]))  # [seed, 0] is seed to numpy

    def normal(self, size: int) -> NDArray[np.float32]:
        """Standard normals, (size,)."""
        return self._source.standard_normal(size, np.float32)

    def fine_normal(self, size: int) -> NDArray[np.float64]:
        """The same with all bits of float64, (size,)."""
        return self._source.standard_normal(size)

    def sample(self, count: int, rate: float) -> NDArray[np.bool_]:
        """Poisson sampling, (count,)."""
        check_rate(rate)
        return self._source.random(count) < rate

    def choose(self, count: int, size: int) -> NDArray[np.int64]:
        """A draw without replacement, (size,)."""
        check_draw(count, size)
        return self._source.permutation(count)[:size].astype(np.int64)

    def integers(self, high: int, size: int) -> NDArray[np.int64]:
        """Uniform numbers in [0, high), (size,)."""
        check_high(high)
        return self._source.integers(high, size=size)


def noise_generator(noise: Literal["secure", "insecure-test"], *, seed: int) -> NoiseGenerator:
    """The generator that `privacy.noise` names; only "insecure-test" looks at the seed."""
    return SecureGenerator() if noise == "secure" else InsecureGenerator(seed)


def check_rate(rate: float) -> None:
    """Refuse a sample rate that is no probability.

    Raises:
        ConfigError: always then.
    """
    if not 0 <= rate <= 1:
        raise ConfigError(f"a sample rate is a probability between 0 and 1; got {rate}")


def check_draw(count: int, size: int) -> None:
    """Refuse to draw more than there are.

    Raises:
        ConfigError: always then.
    """
    if not 0 <= size <= count:
        raise ConfigError(f"{size} cannot be drawn from {count} without replacement")


def check_high(high: int) -> None:
    """Refuse an empty range, or one that int64 cannot hold.

    Raises:
        ConfigError: always then.
    """
    if not 1 <= high <= 2**63:
        raise ConfigError(f"numbers are drawn below a bound between 1 and 2^63; got {high}")
