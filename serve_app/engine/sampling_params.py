"""Sampling parameters of a request, and token log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens whose probabilities add up to this.
        top_k: sample from this many of the likeliest tokens; 0: from all of them.
        seed: the same seed, prompt and revision give the same tokens, in any batch.
        logprobs: None: no log-probabilities; else how many alternatives to report for each token.
        forced: (length of the prompt, tokens): generate exactly these tokens, to score a text.
            The temperature is ignored then.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None
    forced: tuple[int, tuple[int, ...]] | None = None

    def forced_at(self, position: int) -> int | None:
        """The token to force at `position` of the sequence, prompt included; None: sample."""
        if self.forced is None:
            return None
        begins, tokens = self.forced
        return tokens[position - begins]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before temperature, top_p and top_k.

    Attributes:
        chosen: of the token that was generated.
        top: the likeliest tokens, best first: (token id, logprob).
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
