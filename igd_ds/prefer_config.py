"""The settings of `igd prefer`."""

import math
from dataclasses import dataclass
from pathlib import Path

from igd_ds.config.model import TuningOptions
from igd_ds.config.options import option, require
from igd_ds.config.training import LoopOptions
from igd_ds.data.negatives import BEAM, NEGATIVES
from igd_ds.errors import UsageError
from igd_ds.objectives.policy import REWARDS
from igd_ds.objectives.preference import PREFERENCES
from igd_ds.train_config import VALIDATION_METRICS

GRPO = "grpo"
OBJECTIVES = (*PREFERENCES, GRPO)
AUTO = "auto"
ADAPTER_OFF = "adapter-off"

OF_PREFERENCE = ("negatives", "num_negatives", "sft_weight")
"""Settings that --objective grpo lacks."""

OF_POLICY = ("group_size", "reward", "token_credit")
"""Settings that only --objective grpo has."""


@dataclass(frozen=True, kw_only=True)
class PreferConfig(TuningOptions, LoopOptions):
    """One preference training of a trained recommender."""

    model: str = option("the trained model to begin with: RUN or RUN/model of igd train")
    objective: str = option("what the training minimises", "s-dpo", OBJECTIVES)
    beta: float | None = option(
        "β: how strongly the model is held to the reference; default: 0.1, of grpo 0.001", None
    )
    negatives: str = option(
        "rejected items: random, by popularity, those that share the longest prefix with the "
        "target (sibling), or the model's own best list without the target, refreshed every "
        "epoch (beam)",
        "random",
        (*NEGATIVES, BEAM),
    )
    num_negatives: int = option("rejected items per row", 3)
    sft_weight: float = option("weight of the chosen item's mean NLL, added to the loss", 0.0)
    group_size: int = option("G of grpo: items that the beam search finds for each row", 16)
    reward: str = option(
        f"reward of grpo: {', '.join(REWARDS)}, or module:function, called as "
        "reward(history, target, item) with the source's ids",
        "rule",
    )
    token_credit: str = option(
        "an item's advantage in grpo goes to its tokens alike (equal), or by their normalised "
        "information gain (gain)",
        "equal",
        ("equal", "gain"),
    )
    softmax: str = option(
        "item probabilities by the softmax over the full vocabulary, or masked: over the trie's "
        "next tokens; auto: as the model was trained",
        "auto",
        ("auto", "full", "masked"),
    )
    reference: str = option(
        "what the log-ratios compare with. adapter-off: the weights below the adapter; RUN or "
        "RUN/model: a trained model of the same catalogue, whose log-probabilities are stored by "
        "row; auto: the model at the start (adapter-off where the adapter is new)",
        AUTO,
    )
    packing: str = option(
        "tree: the rows of a micro-batch share what they begin with; rows: padded side by side; "
        "auto: tree if the model can be trained so",
        "auto",
        ("auto", "tree", "rows"),
    )
    validation_metric: str = option(
        "what early stopping watches: NDCG@10 of lists of ten, or unweighted NLL per item",
        "ndcg@10",
        VALIDATION_METRICS,
    )

    def check(self) -> None:
        """Raise UsageError for values no run can use; checks that need files come later."""
        TuningOptions.check(self)
        LoopOptions.check(self)
        require(self, "beta", lambda value: 0 < value < math.inf, "must be positive and finite")
        require(self, "num_negatives", lambda value: value >= 1, "must be at least 1")
        require(self, "group_size", lambda value: value >= 2, "must be at least 2")
        require(
            self, "sft_weight", lambda value: 0 <= value < math.inf, "must not be negative, finite"
        )
        for name in OF_PREFERENCE if self.objective == GRPO else OF_POLICY:
            if getattr(self, name) != getattr(PreferConfig, name):
                raise UsageError(f"--{name} has no effect with --objective {self.objective}")

    def strength(self) -> float:
        """Return β, or its default for the objective."""
        if self.beta is not None:
            return self.beta
        return 1e-3 if self.objective == GRPO else 0.1


def model_folder(name: str, flag: str) -> Path:
    """Return the folder of a trained model, given RUN or RUN/model.

    Raises:
        UsageError: there is no trained model.
    """
    folder = Path(name)
    if (folder / "model").is_dir():
        folder = folder / "model"
    if not (folder / "igd_ds.json").is_file():
        raise UsageError(
            f"--{flag} {name}: no model of igd train there (no igd_ds.json): give RUN or RUN/model"
        )
    return folder
