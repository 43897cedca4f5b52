"""Which weights these are: the folder of a trained model, and the base that an adapter belongs to.

A model is recognised by its bytes. RUN/model has a manifest with the sha256 of every file. An
adapter names its base by absolute path, or by hub name and commit, and by the base's own sha256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igd_ds.contracts import Likelihood
from igd_ds.distributed import say
from igd_ds.errors import UsageError
from igd_ds.folders import read_json_object, sha256_of, write_json

if TYPE_CHECKING:
    import torch

    from igd_ds.config.model import ModelOptions, ModelSource

DESCRIPTION_FILE = "igd_ds.json"
"""What a saved model needs beyond transformers' own files: prompt, max_length, quantisation."""

MANIFEST_FILE = "manifest.json"
"""In RUN/model: the sha256 of every file."""

CARD_FILE = "README.md"
"""In RUN/model: the model card. It may be written anew, so the manifest does not have it."""

ADAPTER_FILE = "adapter_config.json"
"""PEFT's file, by which an adapter's folder is recognised."""

BASE_FILE = "base.json"
"""In RUN: the pretrained weights that the training began with, see `base_record`."""

ALWAYS_DESCRIBED = ("prompt", "max_length", "load_in_4bit")
"""What every saved model's description has, whichever version wrote it."""

WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""File names of weights that are whole, and the index of those in shards; transformers' order."""


def describe(folder: str | Path) -> dict[str, Any]:
    """Read a saved model's `igd_ds.json`, which a training writes.

    Raises:
        UsageError: the folder has no such file, or it is damaged.
    """
    path = Path(folder) / DESCRIPTION_FILE
    if not path.is_file():
        raise UsageError(
            f"--model {folder}: no {DESCRIPTION_FILE} there; give the model/ folder of a run of "
            "train.py"
        )
    repair = "it is damaged; train again, or restore it"
    description = read_json_object(path, repair)
    if missing := [name for name in ALWAYS_DESCRIBED if name not in description]:
        raise UsageError(f"{path} lacks {', '.join(missing)}: {repair}")
    return description


def likelihood_of(description: Mapping[str, Any]) -> Likelihood:
    """Return how a model was trained; models saved before this was recorded have the plain one."""
    return Likelihood(**description.get("likelihood", {}))


def trained_likelihood(model: Path) -> Likelihood | None:
    """Return how the model in a folder was trained; None if there is no description of it.

    Raises:
        UsageError: the description is damaged.
    """
    is_described = (model / DESCRIPTION_FILE).is_file()
    return likelihood_of(describe(model)) if is_described else None


# ---- the files of a saved model


def write_manifest(folder: Path) -> None:
    """Write the sha256 of every file in a model's folder.

    The catalogue's arrays are left out: catalogue.json, which is in, has their sha256.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    no_weights = (MANIFEST_FILE, CARD_FILE)
    kept = [path for path in files if path.suffix != ".npy" and path.name not in no_weights]
    hashes = {str(path.relative_to(folder)): sha256_of(path) for path in kept}
    write_json(folder / MANIFEST_FILE, {"files": hashes})


def check_manifest(folder: Path) -> None:
    """Check that a trained model's files are the ones that were saved, about a second per GB.

    Models saved by earlier versions have no manifest; nothing can be said of them.

    Raises:
        UsageError: names the file that is missing or changed.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return
    files = read_json_object(path, "it is damaged; restore it, or delete it to go unchecked")
    for name, expected in files.get("files", {}).items():
        file = folder / name
        if not file.is_file():
            raise UsageError(f"{file} is missing; {path} names it: restore it, or train again")
        if sha256_of(file) != expected:
            raise UsageError(
                f"{file} is not the file that was saved (its sha256 differs from {path}): it is "
                f"damaged or was changed; restore it, or delete {MANIFEST_FILE} to use it as it is"
            )


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a trained model but its card, by its path in the folder.

    Those in the manifest are taken from there: `check_manifest` has compared them.
    """
    path = folder / MANIFEST_FILE
    known = read_json_object(path, "it is damaged")["files"] if path.is_file() else {}
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    files = [name for name in files if name != CARD_FILE or name in known]
    return {name: known.get(name) or sha256_of(folder / name) for name in sorted(files)}


# ---- where pretrained weights come from


@dataclass(frozen=True)
class Origin:
    """Pretrained weights: a folder or a hub name, and perhaps an adapter on them.

    Example:
        >>> origin_of("Qwen/Qwen2.5-0.5B", "v1.0")
        Origin(name='Qwen/Qwen2.5-0.5B', revision='v1.0', adapter=None, record=None)
        >>> origin_of("runs/lora/model").name
        'Qwen/Qwen2.5-0.5B'
    """

    name: str
    """Absolute path of a folder, or a hub name."""
    revision: str = ""
    """Branch, tag or commit on the hub; "" for a folder, or for the hub's newest."""
    adapter: Path | None = None
    """Folder of a LoRA adapter on these weights."""
    record: Mapping[str, Any] | None = None
    """The adapter's own `base_record`; None where it has none, or there is no adapter."""

    @property
    def is_folder(self) -> bool:
        """Whether the weights lie in a local folder."""
        return Path(self.name).is_dir()


def origin_of(name: str, revision: str = "", base_model: str = "") -> Origin:
    """Return where the weights called `name` come from; of an adapter, where its base does.

    Args:
        name: folder or hub name of a model, or the folder of an adapter.
        revision: of a hub model.
        base_model: the base of an adapter, instead of the one that the adapter names.

    Raises:
        UsageError: `revision` is given for a folder.
    """
    adapter = Path(name)
    if revision and adapter.is_dir():
        raise UsageError(
            f"--revision chooses a version of a model on the hub, and {name} is a folder: leave it "
            "out"
        )
    if not (adapter / ADAPTER_FILE).is_file():
        return Origin(_absolute(name), revision)

    advice = "the adapter is damaged; restore it, or train again"
    settings = read_json_object(adapter / ADAPTER_FILE, advice)
    record = None
    if (adapter / DESCRIPTION_FILE).is_file():
        record = describe(adapter).get("base")
    if record is not None:
        named, commit = str(record["name"]), str(record["commit"])
    else:
        named = str(settings.get("base_model_name_or_path") or "")
        commit = str(settings.get("revision") or "")

    if base_model and _absolute(base_model) != _absolute(named):
        named, commit = base_model, ""
    if not named:
        raise UsageError(f"{adapter / ADAPTER_FILE} names no base model: give --base_model")
    return Origin(_absolute(named), commit, adapter, record)


def pinned(origin: Origin) -> Origin:
    """Return an origin on the hub at the commit that its revision means now; a folder as it is.

    So a model that changes on the hub meanwhile is not mixed from two versions.

    Raises:
        UsageError: there is no such model.
    """
    if origin.is_folder:
        return origin
    config = _file_of(origin, "config.json")
    if config is None:
        hint = offline_hint(origin.name)
        raise UsageError(f"no model at '{origin.name}': it has no config.json{hint}")
    commit = config.parent.name  # …/snapshots/COMMIT/config.json
    return dataclasses.replace(origin, revision=commit)


def base_of(source: ModelSource) -> Origin | None:
    """Return the base of the adapter that `source` names; None if it names full weights."""
    origin = origin_of(source.model, base_model=source.base_model)
    return origin if origin.adapter else None


def base_record(origin: Origin, sha256: str) -> dict[str, str]:
    """Return what pretrained weights are recognised by: name, commit, and `weights_sha256`."""
    commit = "" if origin.is_folder else origin.revision
    return {"name": origin.name, "commit": commit, "sha256": sha256}


def check_base(origin: Origin, is_named: bool) -> str:
    """Check that an adapter's base is the one it was trained on; return the base's sha256.

    Hub weights at the recorded commit are not read again. For an adapter without a record (saved by
    an earlier version) there is nothing to compare with.

    Args:
        origin: of an adapter.
        is_named: whether --base_model names the base. Other weights then give a warning only.

    Raises:
        UsageError: the base is not there, or its weights are others.
    """
    record = origin.record
    is_recorded = record is not None and record["name"] == origin.name
    if os.path.isabs(origin.name) and not origin.is_folder:
        raise UsageError(
            f"the adapter in {origin.adapter} was trained on {origin.name}, which is not there: "
            "give --base_model with its present folder"
        )
    if record is not None and is_recorded and not origin.is_folder:
        return str(record["sha256"])

    found = weights_sha256(origin)
    if record is not None and found != record["sha256"]:
        message = (
            f"the weights in {origin.name} are not those that the adapter in {origin.adapter} was "
            f"trained on ({record['name']}, sha256 {record['sha256'][:12]}…, found {found[:12]}…)"
        )
        if not is_named:
            raise UsageError(
                f"{message}: give their folder in --base_model, or name {origin.name} there to use "
                "it all the same"
            )
        say(f"warning: {message}; --base_model says to use them", always=True)
    return found


def check_model(source: ModelSource) -> str:
    """Check the files of a trained model, and its base; return the base's sha256. Rank 0 only.

    Returns:
        The sha256 of an adapter's base weights; "" for full weights.

    Raises:
        UsageError: as `check_manifest` and `check_base`.
    """
    check_manifest(Path(source.model))
    base = base_of(source)
    return "" if base is None else check_base(base, bool(source.base_model))


def check_adapter_options(origin: Origin, options: ModelOptions) -> None:
    """Check that a training that starts from an adapter goes on with that very adapter.

    Raises:
        UsageError: the adapter is none of LoRA's, or a LoRA option differs from the adapter's;
            the message says what to give.
    """
    if origin.adapter is None:
        return
    path = origin.adapter / ADAPTER_FILE
    settings = read_json_object(path, "the adapter is damaged")
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise UsageError(
            f"--model_name_or_path {origin.adapter} is an adapter of the type {kind} ({path}); "
            "only LoRA adapters can be trained further: give one, or the base model"
        )
    if missing := {"r", "lora_alpha"} - settings.keys():
        raise UsageError(
            f"{path} is no LoRA adapter's (it has no {' and no '.join(sorted(missing))}); only "
            "LoRA adapters can be trained further: give one, or the base model"
        )
    there: dict[str, Any] = {"lora_r": settings["r"], "lora_alpha": settings["lora_alpha"]}
    if (origin.adapter / DESCRIPTION_FILE).is_file():
        there["load_in_4bit"] = describe(origin.adapter)["load_in_4bit"]

    different = {name: value for name, value in there.items() if getattr(options, name) != value}
    if different:
        flags = " ".join(f"--{name} {value}" for name, value in different.items())
        raise UsageError(
            f"--model_name_or_path {origin.adapter} is a LoRA adapter, and a training goes on with "
            f"it as it is: give {flags}"
        )


def _absolute(name: str) -> str:
    """Return the absolute path of a folder; other names as they are."""
    return os.path.abspath(name) if Path(name).is_dir() else name


def weights_sha256(origin: Origin) -> str:
    """Return the sha256 (hex) over the configuration and the weight files of a model.

    All bytes are read, about a second per GB; from the hub they are downloaded first.

    Raises:
        UsageError: there are no weights.
    """
    digest = hashlib.sha256()
    for path in _weight_files(origin):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _weight_files(origin: Origin) -> Iterator[Path]:
    """Yield config.json and the files that transformers reads a model's weights from.

    Raises:
        UsageError: there are no weights.
    """
    config = _file_of(origin, "config.json")
    if config is not None:
        yield config
    for whole, index in WEIGHTS:
        path = _file_of(origin, whole)
        if path is not None:
            yield path
            return
        path = _file_of(origin, index)
        if path is not None:
            shards = read_json_object(path, "the model is damaged; restore it")["weight_map"]
            for name in sorted(set(shards.values())):
                shard = _file_of(origin, name)
                if shard is None:
                    raise UsageError(f"{origin.name}: {name} is missing, {index} names it")
                yield shard
            return
    raise UsageError(
        f"no weights at '{origin.name}': need {WEIGHTS[0][0]} or {WEIGHTS[1][0]}"
        f"{offline_hint(origin.name)}"
    )


def _file_of(origin: Origin, name: str) -> Path | None:
    """Return the path of one of a model's files, downloaded if need be; None if it has no such."""
    from transformers.utils import cached_file

    if origin.is_folder:
        path = Path(origin.name) / name
        return path if path.is_file() else None
    try:
        found = cached_file(
            origin.name,
            name,
            revision=origin.revision or None,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UsageError(
            f"no model at '{origin.name}'{offline_hint(origin.name)} ({why})"
        ) from error
    return None if found is None else Path(found)


def offline_hint(name: str) -> str:
    """Return the words of a message that say why a hub name is not looked up, else ""."""
    from huggingface_hub import is_offline_mode

    if not is_offline_mode() or Path(name).exists():
        return ""
    return (
        "; HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so only what was downloaded before is "
        "found: unset it, or give a folder"
    )


@contextmanager
def reading_weights(name: str) -> Iterator[None]:
    """Turn what libraries raise for missing or damaged weights into one line.

    Args:
        name: the folder of the weights, or their name on the hub.

    Raises:
        UsageError: a file of weights is missing, cut off or damaged.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        missing = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is None
        if isinstance(error, OSError) and not missing:
            raise  # the system refuses, for example because the disk is full
        why = " ".join(str(error).split())
        raise UsageError(
            f"{name}: its weights are missing, cut off or damaged ({why}); copy or download them "
            "again"
        ) from error


def refuse_random_weights(name: str, model: torch.nn.Module, missing: Collection[str]) -> None:
    """Refuse weights that are not those of the whole model.

    transformers fills what it does not find with random numbers and goes on.

    Args:
        name: the folder of the weights, or their name on the hub.
        model: the loaded model.
        missing: what transformers did not find in the folder, and the model needs. Buffers are
            ignored: they have fixed values, not random ones.

    Raises:
        UsageError: weights are missing.
    """
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if lacking := weights & set(missing):
        raise UsageError(
            f"{name}: its weights lack {min(lacking)} ({len(lacking)} missing in all), which would "
            "be random: name a checkpoint of the whole model; of a multimodal one, save the text "
            "model alone"
        )
