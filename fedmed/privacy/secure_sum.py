"""Sums of which a server learns the total alone: every site adds masks that cancel when the sites are added up.

The protocol is that of Bonawitz et al. (2017, doi:10.1145/3133956.3133982) for few parties that stay: each pair of
sites derives a secret by X25519 (RFC 7748) and HKDF (RFC 5869), and from it, and from all that they were asked, seeds.

::

    u sends      yᵤ = xᵤ + PRG(ownᵤ) + Σᵥ±PRG(maskᵤᵥ)  mod 2⁶⁴          ownᵤ = SHA-256 over the pieces that u shares
                                                                        with every other site v
    afterwards each site v whose yᵥ came gives, for every other site u, the piece of ownᵤ if yᵤ came,
    and maskᵤᵥ with the piece of its own seed ownᵥ if it did not: never maskᵤᵥ and the piece of ownᵤ.

So whoever is told that u came keeps maskᵤᵥ for good, and it goes only by adding yᵥ. A server that tells sites different
stories opens at most sums of those whom it told that they came together: each of them refuses one of too few sites.
Sites that were sent different networks have no mask in common, and their sum stays noise. No shares of keys are dealt:
if a site goes after its yᵤ came and before it answered, the attempt is lost, and with it time and what it was charged.

Values are whole numbers modulo 2⁶⁴, in which sums are exact and do not depend on their order.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedmed.errors import UpdateRefused
from fedmed.types import FloatVector

Ring = NDArray[np.uint64]
FEWEST = 3  # sites in a sum: of two, each would know the other's part
PARAMETER_STEP, BUFFER_STEP = 2.0**-32, 2.0**-20  # what a 1 of the ring stands for; running variances may be large
ROOM = 2.0**62  # that the sum of all sites keeps to, so that it never wraps around
CHUNK = 65_536  # values of a mask at once

_FORM = "fedmed secure sum 1"


def pair_secret(own: X25519PrivateKey, other: bytes, run: str) -> bytes:
    """What two sites have in common in a run, 32 bytes.

    Args:
        own: the private key of one.
        other: the public key of the other, 32 bytes.
        run: tells the run from all others.

    Raises:
        UpdateRefused: the other's key is none.
    """
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:  # of another length, or of low order
        raise UpdateRefused("a site's key for the secure sum is none") from None
    both = b"".join(sorted([own.public_key().public_bytes_raw(), other]))
    return HKDF(SHA256(), 32, salt=None, info=f"{_FORM}/{run}/".encode() + both).derive(shared)


def mask_seed(pair: bytes, asked: str) -> bytes:
    """The seed of the mask that one of two sites adds and the other subtracts."""
    return _derived(pair, "mask", asked, "")


def own_piece(pair: bytes, asked: str, owner: str) -> bytes:
    """The piece of a site's own seed that both sites of a pair know."""
    return _derived(pair, "own", asked, owner)


def own_seed(pieces: Mapping[str, bytes]) -> bytes:
    """The seed of a site's own mask, from the pieces that it shares with every other site, by the other's name."""
    digest = hashlib.sha256(f"{_FORM}/own".encode())
    for name in sorted(pieces):
        digest.update(len(name).to_bytes(4, "big") + name.encode() + pieces[name])
    return digest.digest()


def masks_of(owner: str, pairs: Mapping[str, bytes], asked: str) -> list[tuple[bytes, int]]:
    """(seed, sign) of every mask that a site adds, from what it has in common with every other site by its name."""
    own = own_seed({name: own_piece(pair, asked, owner) for name, pair in pairs.items()})
    return [(own, 1), *((mask_seed(pair, asked), sign_of(owner, name)) for name, pair in sorted(pairs.items()))]


def sign_of(site: str, other: str) -> int:
    """With which sign a site adds the mask that it has in common with another."""
    return 1 if site < other else -1


def add_mask_(total: Ring, seed: bytes, sign: int) -> None:
    """Add a mask to a vector of the ring, in place: the key stream of AES-256 in counter mode under the seed.

    Args:
        total: (n,), changed.
        seed: 32 bytes, of which every use has its own.
        sign: 1 or -1.
    """
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    zeros = memoryview(bytes(8 * min(CHUNK, total.size)))
    for start in range(0, total.size, CHUNK):
        part = total[start : start + CHUNK]
        words = np.frombuffer(stream.update(zeros[: 8 * part.size]), np.dtype("<u8"))
        np.add(part, words, out=part) if sign > 0 else np.subtract(part, words, out=part)


def to_ring(values: FloatVector, weight: float, step: float, *, sites: int) -> Ring:
    """Weight · values / step, rounded, as numbers modulo 2⁶⁴.

    Args:
        values: (n,).
        weight: what the site counts for.
        step: what a 1 of the ring stands for.
        sites: in the sum, at most: each has its share of the room in which nothing wraps around.

    Raises:
        UpdateRefused: a value is not finite, or too large.
    """
    scaled = np.multiply(values, weight / step, dtype=np.float64)
    largest = float(np.max(np.abs(scaled), initial=0.0))
    if not largest <= ROOM / sites:  # NaN too
        raise UpdateRefused("the trained network is not finite, or too far from the one that was sent")
    return np.rint(scaled, out=scaled).astype(np.int64).view(np.uint64)


def from_ring(total: Ring, weight: float, step: float) -> FloatVector:
    """The mean behind a sum of the ring, (n,).

    Args:
        total: Σ of `to_ring`.
        weight: Σ of the weights.
        step: what a 1 of the ring stands for.
    """
    return (total.view(np.int64) * (step / weight)).astype(np.float32)


def _derived(pair: bytes, kind: str, asked: str, owner: str) -> bytes:
    return hmac.digest(pair, "/".join([_FORM, kind, asked, owner]).encode(), "sha256")
