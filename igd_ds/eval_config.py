"""The settings of `igd eval`."""

import dataclasses
import math
from dataclasses import dataclass

from igd_ds.config.items import RankingOptions
from igd_ds.config.model import ModelSource
from igd_ds.config.options import option, require
from igd_ds.config.processes import ProcessOptions
from igd_ds.config.search import Limits, ScoringOptions
from igd_ds.errors import UsageError
from igd_ds.items.ids import SOURCE, SPACES


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ScoringOptions, RankingOptions, Limits, ModelSource, ProcessOptions):
    """One evaluation: a trained model, how its search scores, what it may cost, and these."""

    output_dir: str = option(
        "folder for metrics.json, timing.json and predictions; one evaluation each"
    )
    split: str = option("rows to evaluate", "test", ("train", "valid", "test"))
    alpha_from: str = option(
        "folder of a finished evaluation: take α = 0 and the best α there, instead of --alpha",
        "",
    )
    search: str = option(
        "beam search, or exact: best-first until the list is proven; auto: exact where scores are "
        "item probabilities (models of the objective msl, α = 0), else beam",
        "auto",
        ("auto", "beam", "exact"),
    )
    guidance: str = option(
        ".npy of floats (rows of the split, items): a second scorer's item probabilities", ""
    )
    guidance_ids: str = option(
        "source ids of the columns of --guidance: .npy, or .parquet with a column source_id; not "
        "needed for scores of igd baseline",
        "",
    )
    guidance_weight: float = option(
        "weight of the second scorer's log-probabilities (with --guidance)", 0.0
    )
    item_filter: str = option(
        "Parquet with row_id and lists of item ids, allow and/or deny; null: no restriction", ""
    )
    ids: str = option(
        "ids in --item_filter: the source's, or dense item ids of the dataset folder",
        SOURCE,
        SPACES,
    )
    seed: int = option("seeds the sample of rows", 0)

    def scoring_options(self) -> ScoringOptions:
        """Return the part that says how a path is scored."""
        names = [field.name for field in dataclasses.fields(ScoringOptions)]
        return ScoringOptions(**{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Raise UsageError for values no evaluation can use."""
        ScoringOptions.check(self)
        ModelSource.check(self)
        ProcessOptions.check(self)
        if self.alpha_from and self.alpha != (0.0,):
            raise UsageError("give --alpha or --alpha_from, not both")

        require(self, "coverage", lambda value: 0 < value <= 1, "must lie in (0, 1]")
        require(self, "num_beams batch_size", lambda value: value >= 1, "must be at least 1")
        require(self, "num_rows seed", lambda value: value >= 0, "must not be negative")
        require(
            self,
            "guidance_weight",
            lambda value: 0 <= value < math.inf,
            "must not be negative, and finite",
        )
        if bool(self.guidance) != (self.guidance_weight > 0):
            raise UsageError(
                "--guidance and --guidance_weight, larger than 0, go together: give both or neither"
            )
        if self.guidance_ids and not self.guidance:
            raise UsageError("--guidance_ids has no effect without --guidance: leave it out")
        if self.ids != SOURCE and not self.item_filter:
            raise UsageError("--ids has no effect without --item_filter: leave it out")
