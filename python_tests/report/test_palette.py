"""The colors under simulated color blindness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from fastsam.report.palette import DARK, LIGHT, style

# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
VISION = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
Floats = NDArray[np.float64]


def linear(color: str) -> Floats:
    """Linear RGB of a color ``#rrggbb``."""
    values = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: Floats) -> Floats:
    """CIELAB of linear RGB, for daylight (D65)."""
    ratio = TO_XYZ @ rgb.clip(0, 1) / (TO_XYZ @ np.ones(3))
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(one: Floats, other: Floats) -> float:
    """Euclidean difference in CIELAB (CIE76); 2.3 is just noticeable."""
    return float(np.linalg.norm(one - other))


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_colors_stay_distinct(vision: str, colors: tuple[str, ...]) -> None:
    seen = [lab(VISION[vision] @ linear(color)) for color in colors]
    closest = min(difference(*pair) for pair in itertools.combinations(seen, 2))
    assert closest > 20


def test_the_simulation_confuses_red_and_green() -> None:
    """As a check of the check: colors that are apart in normal vision and alike in the simulation."""
    red, green = "#c04040", "#6f6a2c"
    apart = [
        difference(*(lab(VISION[kind] @ linear(c)) for c in (red, green)))
        for kind in ("normal", "deuteranopia")
    ]
    assert apart[0] > 40
    assert apart[1] < 20


@pytest.mark.parametrize(("colors", "ground"), [(LIGHT, "#ffffff"), (DARK, "#14171c")])
def test_contrast_with_the_page(colors: tuple[str, ...], ground: str) -> None:
    """WCAG 2.2 asks for 3 to 1 in graphics."""
    for color in colors:
        low, high = sorted(float(TO_XYZ[1] @ linear(each)) for each in (color, ground))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_runs_differ_in_color_or_dash() -> None:
    looks = [style(place) for place in range(280)]
    assert [look.dash for look in looks[:8]] == [()] * 7 + [(7, 3)]
    assert len({(look.color, look.dash) for look in looks[:35]}) == 35
    assert len(set(looks)) == 280
