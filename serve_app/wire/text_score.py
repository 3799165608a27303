"""The log-likelihood of a text."""

from __future__ import annotations

from typing import NamedTuple


class TextScore(NamedTuple):
    """The sum of the natural logarithms of the probabilities of `tokens` tokens."""

    logprob: float
    tokens: int
