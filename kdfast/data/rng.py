# SPDX-License-Identifier: Apache-2.0
"""Random generators named by what they are for, so that no draw depends on another draw's order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# One stream per use: the same (seed, epoch, index) never feeds two purposes.
CROP, PHOTOMETRIC, GRIDMASK, ORDER, WORLD, SENSOR, FLIP, NOISE = range(1, 9)
SPLIT, AUGMENT = range(9, 11)

_WORD = 2**32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def generator(stream: int, seed: int, *position: int) -> np.random.Generator:
    """The generator of one purpose at one place of the run.

    Args:
        stream: One of this module's constants.
        seed: Seed of the run, 0 <= seed < 2**64.
        position: Up to four numbers below 2**32, for example epoch and index.

    Returns:
        A PCG64 generator, the same on every platform for the same arguments.

    Raises:
        ValueError: A number is negative or too large, or there are more than four.
    """
    if not 0 <= seed < _WORD**2:
        raise ValueError(f"seed: must hold 0 <= seed < 2**64, got {seed}")
    if len(position) > 4 or any(not 0 <= word < _WORD for word in position):
        raise ValueError(f"position: must be up to four numbers in [0, 2**32), got {position}")
    # SeedSequence takes trailing zeros for absent words: a fixed length keeps positions apart.
    words = [stream, seed % _WORD, seed // _WORD, len(position), *position]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def uniforms(
    stream: int, seed: int, positions: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Numbers of many places of the run at once, where a generator for each would cost too much.

    Args:
        stream: One of this module's constants.
        seed: Seed of the run, 0 <= seed < 2**64.
        positions: (B, P) numbers >= 0, for example index and variant.
        count: Numbers a place.

    Returns:
        (B, count) in [0, 1); a row is the same on every platform and whatever the other rows are.

    Raises:
        ValueError: The seed is negative or too large.

    Source: SplitMix64 (Steele, Lea, Flood 2014), its state hashed from the arguments.
    """
    if not 0 <= seed < _WORD**2:
        raise ValueError(f"seed: must hold 0 <= seed < 2**64, got {seed}")
    # Arrays throughout: they wrap around, whereas numpy warns of scalars that do.
    state = np.full(len(positions), seed, np.uint64)
    for word in (np.full_like(state, stream), *positions.astype(np.uint64).T):
        state = _mix(state + _GOLDEN * (word + np.uint64(1)))
    steps = _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
    bits = _mix(state[:, None] + steps) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
