"""What a request asks of the sampler, and what it says about a token beside its id."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request wants its tokens drawn.

    Attributes:
        temperature: 0 takes the likeliest token, always the same.
        top_p: draw from the smallest set of tokens whose probabilities add up to this.
        top_k: draw from so many of the likeliest tokens; 0: from all of them.
        seed: same seed, same prompt, same revision: same tokens, whatever else runs beside it.
        logprobs: None: no log-probabilities; else how many alternatives to name for each token.
        forced: (length of the prompt, tokens): these tokens, whatever the model would say; for
            whoever wants to know how likely a text is. The temperature does not matter then.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None
    forced: tuple[int, tuple[int, ...]] | None = None

    def forced_at(self, position: int) -> int | None:
        """The token that has to stand at `position` of the sequence, the prompt counted."""
        if self.forced is None:
            return None
        begins, tokens = self.forced
        return tokens[position - begins]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before temperature, top_p and top_k.

    Attributes:
        chosen: of the token that was taken.
        top: the likeliest tokens, best first: (token id, logprob).
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
