"""Time a secure sum of CheXNet's size: what each site and the server do in a round beyond a plain one.

    .venv/bin/python benchmarks/secure_sum.py           # a minute or two; run nothing beside it

A site rounds its change and adds a mask for every other site; the server adds up, and takes out a mask for every site
that came, and one for each of them for every site that did not. The floor is AES in counter mode over as many bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedmed.privacy import secure_sum as rings

PARAMETERS = 6_968_206  # CheXNet, 14 labels
ZEROS = bytes(8 * rings.CHUNK)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 50])
    options = parser.parse_args()
    change = np.random.default_rng(0).normal(0, 1e-3, PARAMETERS).astype(np.float32)
    floor = timed(key_stream)
    print(f"`python benchmarks/secure_sum.py`, {PARAMETERS:,} parameters; a key stream takes {floor * 1e3:.0f} ms\n")
    print("| sites | a site masks, s | key streams, ratio | server adds one, ms | server opens, s | with one gone, s |")
    print("|---|---|---|---|---|---|")
    for count in options.sites:
        print(row(count, change, floor), flush=True)


def key_stream() -> None:
    """One mask's, thrown away."""
    stream = Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor()
    for _ in range(-(-PARAMETERS // rings.CHUNK)):
        stream.update(ZEROS)


def row(count: int, change: np.ndarray, floor: float) -> str:
    """One line of the table."""
    names = [f"site {number:03}" for number in range(count)]
    keys = {name: X25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"\1")) for name in names}
    public = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    first = names[0]
    pairs = {name: rings.pair_secret(keys[first], public[name], "run") for name in names[1:]}
    total = np.zeros(PARAMETERS, np.uint64)

    def mask() -> None:
        values = rings.to_ring(change, 100.0, rings.PARAMETER_STEP, sites=count)
        for seed, sign in rings.masks_of(first, pairs, "1/1"):
            rings.add_mask_(values, seed, sign)

    def take_out(masks: int) -> None:
        for number in range(masks):
            rings.add_mask_(total, number.to_bytes(32, "big"), -1)

    masked, added = timed(mask), timed(lambda: np.add(total, 1, out=total))
    opened, gone = timed(lambda: take_out(count)), timed(lambda: take_out(2 * (count - 1)))
    ratio = masked / (count * floor)
    return f"| {count} | {masked:.2f} | {ratio:.2f} | {added * 1e3:.0f} | {opened:.2f} | {gone:.2f} |"


def timed(act: Callable[[], object]) -> float:
    """The best of three, in seconds."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        act()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
