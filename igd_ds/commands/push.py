"""Upload a trained model to the Hugging Face Hub.

    igd push RUN REPO [--private]

RUN is a run of igd train, REPO a name such as USER/MODEL; a repository that does not exist is made.
All files of RUN/model go up in one commit: weights or adapter, tokenizer, catalogue, and a model
card that is written anew, with the metrics of the evaluations in RUN/eval. They are compared with
the manifest first, and nothing is sent if one is missing or changed.

The token is that of `hf auth login`, or the environment's HF_TOKEN. HF_ENDPOINT names another hub.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from igd_ds import distributed
from igd_ds.backbones.saved import (
    CARD_FILE,
    MANIFEST_FILE,
    check_manifest,
    describe,
    origin_of,
)
from igd_ds.config.options import FlagParser
from igd_ds.errors import UsageError
from igd_ds.evaluation.model_card import model_card
from igd_ds.items.store import load_catalogue


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = FlagParser(
        prog="igd push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of igd train")
    parser.add_argument("repo", metavar="REPO", help="name on the hub, USER/MODEL")
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private (default: public)"
    )
    return parser.parse_args(argv)


def check_run(run: Path) -> None:
    """Check that RUN/model is whole.

    Raises:
        UsageError: there is no model, no manifest to compare with, or a file is missing or changed.
    """
    model = run / "model"
    describe(model)
    if not (model / MANIFEST_FILE).is_file():
        raise UsageError(
            f"{model / MANIFEST_FILE} is missing, so nothing says whether the model is whole; "
            "models of versions without a manifest cannot be pushed: train again"
        )
    check_manifest(model)
    load_catalogue(model / "catalogue")


def push(run: Path, repo: str, private: bool) -> str:
    """Upload a run's model in one commit and return the commit's address.

    Raises:
        UsageError: the model is damaged, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    check_run(run)
    model = run / "model"
    files = [path for path in sorted(model.rglob("*")) if path.is_file()]
    card = model_card(run, model).encode()
    operations = [CommitOperationAdd(CARD_FILE, card)]
    for path in files:
        name = path.relative_to(model).as_posix()
        if name != CARD_FILE:
            operations.append(CommitOperationAdd(name, path))

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=f"Model of {run.name}")
    except (HTTPError, HFValidationError, OSError) as error:
        why = " ".join(str(error).split())
        raise UsageError(
            f"igd push: {repo} was not changed on {api.endpoint} ({why}); log in with "
            "`hf auth login` or set HF_TOKEN, and check the name"
        ) from error
    return str(commit.commit_url)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code.

    Raises:
        UsageError: see `push`.
    """
    args = parse(argv)
    base = origin_of(str(args.run / "model"))
    url = push(args.run, args.repo, args.private)
    if base.adapter and base.is_folder:
        print(
            f"warning: the adapter's base is a folder of this machine ({base.name}); whoever loads "
            "the model has to name the same weights with base_model"
        )
    print(f"pushed to {url}")
    return 0


if __name__ == "__main__":
    distributed.run(main)
