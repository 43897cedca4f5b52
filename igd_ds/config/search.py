"""Settings of a search: how a path is scored, and what one batch may cost."""

import math
from dataclasses import dataclass

from igd_ds.config.options import option, require
from igd_ds.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """What a path of tokens scores."""

    alpha: tuple[float, ...] = option(
        "α: strength of the decisiveness weights (IGD Eq. 9), each in [0, 1]; 0: plain beam search",
        (0.0,),
    )
    decoding_rule: str = option(
        "how gains are normalised among siblings, see igd_ds/search/scoring.py", "per-node"
    )
    length_penalty: float = option("p in score / length^p: 0 as D3, 1 as BIGRec", 0.0)
    softmax: str = option(
        "log p over the full vocabulary, or masked: over the trie's next tokens; auto: as trained",
        "auto",
        ("auto", "full", "masked"),
    )
    temperature: float | None = option(
        "T in log softmax(logits / T); default: as trained, which is 1 for most objectives", None
    )
    renormalise: bool = option(
        "with an item filter under the masked softmax: spread the probability of the items left "
        "out over the others",
        False,
    )
    popularity_prior: float = option(
        "γ: weight of the items' training popularity, added to the scores", 0.0
    )

    def check(self) -> None:
        """Raise UsageError for values out of their range."""
        for value in self.alpha:
            if not 0 <= value <= 1:
                raise UsageError(f"--alpha must lie in [0, 1], found {value}")
        if not self.alpha or len(set(self.alpha)) != len(self.alpha):
            raise UsageError(
                f"--alpha needs at least one value and none twice, found {list(self.alpha)}"
            )
        require(
            self,
            "length_penalty popularity_prior",
            lambda value: 0 <= value < math.inf,
            "must not be negative, and finite",
        )
        if self.renormalise and self.softmax == "full":
            raise UsageError("--renormalise is for the masked softmax: leave it out")
        require(
            self, "temperature", lambda value: 0 < value < math.inf, "must be positive and finite"
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a search may send through the model."""

    pass_positions: int = option(
        "tokens sent through the model at once while searching, which bounds its memory", 512
    )
    row_positions: int = option(
        "tokens the exact search may send through the model per row, all α together; then it "
        "returns the ranks proven so far",
        4096,
    )
    coverage: float = option(
        "the exact search of a model with item probabilities stops when the list holds this much "
        "probability; 1: when the list is proven",
        1.0,
    )
