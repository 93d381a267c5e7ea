"""The losses of one sample in float64 NumPy, written from their papers, class by class.

Each takes logits z, the true class y, the training counts n and the features h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Numpy = Callable[[np.ndarray, int, np.ndarray, np.ndarray], float]


def nll(z: np.ndarray, y: int) -> float:
    """Compute -log softmax(z)[y], class by class."""
    top = max(z)
    return float(np.log(sum(np.exp(value - top) for value in z)) + top - z[y])


def smoothed(z: np.ndarray, y: int, smoothing: float) -> float:
    """Cross-entropy with the target (1 - smoothing) onehot(y) + smoothing / C."""
    target = np.full(len(z), smoothing / len(z))
    target[y] += 1 - smoothing
    return sum(target[k] * nll(z, k) for k in range(len(z)))


def ce_smoothed(z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray) -> float:
    return smoothed(z, y, 0.2)


def las(z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray, shape: str = "concave") -> float:
    """Label-aware smoothing from 0.1 (tail) to 0.4 (head), by the branches of the authors' code."""
    t = (n[y] - min(n)) / (max(n) - min(n))
    if shape == "concave":
        smoothing = 0.1 + 0.3 * np.sin(t * np.pi / 2)
    elif shape == "linear":
        smoothing = 0.1 + 0.3 * t
    else:
        smoothing = 0.4 + 0.3 * np.sin(1.5 * np.pi + t * np.pi / 2)
    return smoothed(z, y, smoothing)


def softmax_binary(z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray) -> float:
    """Binary cross-entropy of each softmax probability, mean over classes."""
    p = [np.exp(-nll(z, k)) for k in range(len(z))]
    return float(np.mean([-np.log(p[k] if k == y else 1 - p[k]) for k in range(len(z))]))


def ce(z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray) -> float:
    return nll(z, y)


def focal(z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray) -> float:
    p = np.exp(-nll(z, y))
    return float((1 - p) ** 1.7 * -np.log(p))


def ldam(z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray) -> float:
    """LDAM with largest margin 0.5 and scale 30."""
    margin = n[y] ** -0.25 * (0.5 / max(m**-0.25 for m in n))
    handicapped = z.copy()
    handicapped[y] -= margin
    return nll(30 * handicapped, y)


def vs(
    z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray, gamma: float = 0.3, tau: float = 1.25
) -> float:
    """The vector-scaling loss; with gamma or tau 0 its special cases."""
    scaled = [z[k] / (max(n) / n[k]) ** gamma + tau * np.log(n[k] / sum(n)) for k in range(len(n))]
    return nll(np.array(scaled), y)


def equalization(z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray) -> float:
    # In evaluation mode a rare class is weighted by the probability that it is kept.
    denominator = sum(
        (1 - 0.9 * (n[k] / sum(n) < 0.05) * (k != y)) * np.exp(z[k]) for k in range(len(n))
    )
    return float(-np.log(np.exp(z[y]) / denominator))


def influence(z: np.ndarray, y: int, n: np.ndarray, h: np.ndarray) -> float:
    p = np.exp(z - max(z)) / sum(np.exp(z - max(z)))
    error = sum(abs(p[k] - (k == y)) for k in range(len(p)))
    return float(1000 * nll(z, y) / (error * sum(abs(h)) + 1e-3))


def balanced(n: np.ndarray, beta: float = 0.9999) -> np.ndarray:
    weights = np.array([(1 - beta) / (1 - beta**count) for count in n])
    return weights / weights.sum() * len(n)
