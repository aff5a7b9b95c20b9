# SPDX-License-Identifier: Apache-2.0
"""Random generators named by what they are for, so that no draw depends on another draw's order."""

from __future__ import annotations

import numpy as np

# One stream per use: the same (seed, epoch, index) never feeds two purposes.
CROP, PHOTOMETRIC, GRIDMASK, ORDER, WORLD, SENSOR, FLIP, NOISE = range(1, 9)
SPLIT, AUGMENT = range(9, 11)

_WORD = 2**32


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
