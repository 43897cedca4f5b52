"""The model card: README.md of a trained model, with the metadata that the Hugging Face Hub reads.

A card says what the run folder knows at the time: base model, dataset, objective, the best
validation, and the metrics of finished evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from igd_ds.backbones.saved import CARD_FILE, describe
from igd_ds.config.yaml_files import read_yaml_settings
from igd_ds.folders import read_json_object, write_text

METRICS = ("hr@10", "ndcg@10")
"""Metrics that a card shows, item match, by their names in metrics.json."""

USE = """\
## Use

Histories are item ids as the source of the dataset has them. `DATASET` is the dataset folder that
the model was trained on.

```python
import igd_ds

recommender = igd_ds.Recommender.load("FOLDER_OF_THIS_MODEL", dataset="DATASET")
lists = recommender.recommend([["ITEM", "ITEM"]], k=10)
```
"""


@dataclass(frozen=True)
class Evaluated:
    """The metrics of one evaluation at one α."""

    split: str
    rows: int
    alpha: str
    values: Mapping[str, float]
    """By their names in METRICS; those that the evaluation's number of beams allows."""


def write_model_card(run: Path, model: Path) -> None:
    """Write the card of a run's model.

    Args:
        run: RUN.
        model: RUN/model, or the unfinished folder that shall become it. It holds igd_ds.json.
    """
    write_text(model / CARD_FILE, model_card(run, model))


def model_card(run: Path, model: Path) -> str:
    """Return the card of a run's model, see `write_model_card`.

    Raises:
        UsageError: config.yaml, igd_ds.json or another file that the card quotes is damaged.
    """
    settings, description = read_yaml_settings(run / "config.yaml"), describe(model)
    dataset = Path(settings["dataset"]).name
    base = (description.get("base") or {}).get("name", "")
    evaluated = list(_evaluations(run))

    facts = {
        "base model": base or "random weights",
        "dataset": dataset,
        "items are written as": description.get("item_kind", "text"),
        "objective": settings.get("objective") or settings.get("weighting", "unknown"),
        "trained": f"a LoRA adapter of rank {settings['lora_r']}"
        if settings.get("lora_r")
        else "all weights",
        "seed": settings["seed"],
    }
    if (run / "summary.json").is_file():
        summary = read_json_object(run / "summary.json", "resume the run, which writes it again")
        facts["best validation"] = (
            f"{summary['validation_metric']} {summary['best']:.4f} at step {summary['best_step']}"
        )

    lines = [
        "---",
        _metadata(run.resolve().name, base, dataset, evaluated),
        "---",
        f"# {run.resolve().name}",
        "",
        "A recommender that writes the next item token by token, trained with igd_ds.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
    ]
    if evaluated:
        lines += [
            "Ranking of the whole catalogue; a hit on a path of n items counts 1/n.",
            "",
            f"| split | rows | α | {' | '.join(name.upper() for name in METRICS)} |",
            "|---|---|---|" + "---|" * len(METRICS),
            *(_row(each) for each in evaluated),
            "",
        ]
    return "\n".join(lines) + "\n" + USE


def _evaluations(run: Path) -> Iterator[Evaluated]:
    """Yield what the finished evaluations of a run have measured."""
    for path in sorted(run.glob("eval/*/metrics.json")):
        results = read_json_object(path, "delete its folder and evaluate again")
        for alpha, entry in results["alpha"].items():
            found = entry["item_match"]
            values = {name: found[name] for name in METRICS if name in found}
            yield Evaluated(results["split"], results["rows"], alpha, values)


def _row(each: Evaluated) -> str:
    """Return a row of the table of metrics."""
    values = [f"{each.values[name]:.4f}" if name in each.values else "" for name in METRICS]
    return f"| {each.split} | {each.rows} | {each.alpha} | {' | '.join(values)} |"


def _metadata(name: str, base: str, dataset: str, evaluated: list[Evaluated]) -> str:
    """Return the YAML header of a card.

    A base in a local folder is left out: only the hub's names mean something on the hub.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="other",
            task_name="sequential recommendation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=each.split,
            dataset_args={"rows": each.rows, "alpha": float(each.alpha)},
            metric_type=metric,
            metric_value=value,
        )
        for each in evaluated
        for metric, value in each.values.items()
    ]
    data = ModelCardData(
        base_model=base if base and not Path(base).is_absolute() else None,
        library_name="igd_ds",
        tags=["recommendation", "generative-recommendation", "information-gain"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()
