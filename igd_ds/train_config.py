"""The settings of `igd train`."""

from dataclasses import dataclass
from typing import Any

from igd_ds.config.items import ItemOptions
from igd_ds.config.model import ModelOptions
from igd_ds.config.options import option, require
from igd_ds.config.training import LoopOptions
from igd_ds.errors import UsageError
from igd_ds.items.decisiveness import ENTROPIES, INFORMATION_GAIN, MEASURES
from igd_ds.objectives import OBJECTIVES, ObjectiveOptions, check_objective

VALIDATION_METRICS = ("nll", "ndcg@10")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ObjectiveOptions, ItemOptions, ModelOptions, LoopOptions):
    """One training of a generative recommender."""

    prompt: str = option(
        "prompt template: a name in igd_ds/data/templates, chat (the tokenizer's own chat "
        "template) or a YAML file",
        "short",
    )
    max_title_tokens: int = option(
        "cut titles at a word so that they have at most this many tokens, and keep different ones "
        "different; 0: cut none",
        0,
    )
    allow_merged_titles: bool = option(
        "train although the tokenizer cannot tell some different titles apart", False
    )
    objective: str = option(
        f"what the training minimises: {', '.join(OBJECTIVES)}", "igd", former="weighting"
    )
    decisiveness: str = option(
        "measure of how much a token decides, for igd-linear and for α",
        INFORMATION_GAIN,
        tuple(MEASURES),
    )
    entropy: str = option("entropy definition behind the information gain", "prior", ENTROPIES)
    normalization: str = option(
        "Ω over the whole optimizer step, or per micro-batch as the reference code does",
        "global",
        ("global", "per_batch"),
    )
    packing: str = option(
        "tree: the rows of a micro-batch share what they begin with; rows: padded side by side; "
        "auto: tree if the model can be trained so",
        "auto",
        ("auto", "tree", "rows"),
    )
    batching: str = option(
        "chains: rows of a user whose histories extend one another share a batch; rows: each row "
        "for itself; auto: chains with --packing tree",
        "auto",
        ("auto", "chains", "rows"),
    )
    length_grouping: bool = option(
        "with --batching rows: rows of similar length share a step, which saves padding; the loss "
        "is a mean over the step's target tokens, so those of short titles weigh a little more",
        True,
    )
    validation_metric: str = option(
        "what early stopping watches: unweighted NLL per item, or NDCG@10 of lists of ten",
        "nll",
        VALIDATION_METRICS,
    )

    def check(self) -> None:
        """Raise UsageError for values no run can use; checks that need files come later."""
        ModelOptions.check(self)
        LoopOptions.check(self)
        require(self, "max_title_tokens", lambda value: value >= 0, "must not be negative")
        if self.max_title_tokens and self.item_kind == "semantic-id":
            raise UsageError("--max_title_tokens has no effect with --item_kind semantic-id")
        self.objective_options()
        if self.decisiveness != INFORMATION_GAIN and self.entropy != TrainConfig.entropy:
            raise UsageError(
                f"--entropy {self.entropy} has no effect with --decisiveness {self.decisiveness}: "
                "drop one of them"
            )
        if self.packing == "tree" and self.attn_implementation not in ("auto", "sdpa"):
            raise UsageError(
                f"--attn_implementation {self.attn_implementation} cannot read row trees: leave it "
                "out, or give --packing rows"
            )
        if OBJECTIVES[self.objective].needs_global and self.normalization != "global":
            raise UsageError(
                f"--objective {self.objective} learns from losses over the whole step: use "
                "--normalization global"
            )

    def objective_options(self) -> Any:
        """Return the `Options` of the chosen objective.

        Raises:
            UsageError: an unknown objective, a flag that it lacks or does not use, a value out of
                range.
        """
        return check_objective(self.objective, self)
