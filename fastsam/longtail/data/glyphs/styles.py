"""Which styles a class is drawn in, and how often.

A style is a face and a treatment. Within a class the styles have Zipf frequencies, the same in
training and test, and every class has its own order of them: fifty images do not cover a class, and
a style that is rare in one class is frequent in another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.glyphs.draws import Draws, keys

_ORDER = 201


def style_order(seed: int, label: int, count: int) -> NDArray[np.int64]:
    """The styles of a class from the most to the least frequent.

    Args:
        seed: seed of the data.
        label: the class.
        count: number of styles.

    Returns:
        A permutation of 0 to ``count`` - 1, int64 ``[count]``.
    """
    order = np.argsort(Draws(keys(seed, _ORDER, label)).bits(count)[0], kind="stable")
    return order.astype(np.int64)


def zipf(draws: Draws, count: int) -> NDArray[np.int64]:
    """World 0 to ``count`` - 1, rank r with probability in proportion to 1 / (r + 1).

    Args:
        draws: source of random numbers.
        count: number of ranks.
    """
    limits = np.cumsum((1 << 24) // np.arange(1, count + 1, dtype=np.int64))
    return np.searchsorted(limits, draws.below(int(limits[-1])), side="right").astype(np.int64)
