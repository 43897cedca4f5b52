"""Settings of items and of ranked rows that several commands share."""

from dataclasses import dataclass

from igd_ds.config.options import option

ITEM_KINDS = ("text", "semantic-id")
EXCLUDE_SEEN = ("auto", "yes", "no")
ITEM_KIND_HELP = "what items are written as: titles (text) or codes (semantic-id)"


@dataclass(frozen=True, kw_only=True)
class ItemOptions:
    """What an item is written as."""

    item_kind: str = option(
        f"{ITEM_KIND_HELP}; auto: titles where the dataset has them", "auto", ("auto", *ITEM_KINDS)
    )


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    """How many rows are ranked, and how long their lists are."""

    num_beams: int = option("length of each ranked list; of a beam search, its beams too", 10)
    num_rows: int = option("rows of a split to evaluate, a seeded sample; 0: all", 0)
    batch_size: int = option("rows that are ranked at once", 16)
    exclude_seen: str = option(
        "leave the items that the user has met before out of the lists; auto: if they are rare "
        "among the training targets (DATASET/README.md says how rare)",
        "auto",
        EXCLUDE_SEEN,
    )
