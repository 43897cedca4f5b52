"""Checkpoints that are whole or not used, and how a run resumes from them.

DeepSpeed writes its own files; a manifest written last makes the checkpoint count, and says what
bytes the files have. DeepSpeed's `latest` file is not used, because it can name a torn checkpoint:
no barrier comes before it.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igd_ds import distributed
from igd_ds.engine.universal import load_on_other_ranks, plain_path
from igd_ds.errors import UsageError
from igd_ds.folders import flush_files, remove_temporaries, sha256_of, write_json

MANIFEST = "manifest.json"

STATE_BYTES_PER_PARAMETER = 16
"""AdamW's two moments and the master copy in fp32, plus weights in at most fp32."""

READERS = 8
"""Files that are hashed at the same time; hashlib does not hold Python's lock."""


class DamagedError(Exception):
    """A checkpoint that cannot be used; the message goes on behind "checkpoint NAME"."""


@dataclass(frozen=True)
class Manifest:
    """What makes a folder of DeepSpeed's files a checkpoint."""

    world_size: int
    """Number of ranks that saved it."""
    trained: list[str]
    """Names of the trained parameters, in order."""
    files: dict[str, int]
    """Size in bytes of each file, by its path in the folder."""
    state: dict[str, Any]
    """The loop's own state as JSON values, with its `step`."""
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file. Manifests of earlier versions have none."""

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """Read the manifest of a checkpoint.

        Raises:
            DamagedError: there is none, or its bytes have changed.
        """
        path = checkpoint / MANIFEST
        if not path.is_file():
            raise DamagedError(
                "is not complete (the process was probably stopped while writing it)"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            digest = content.pop("digest", None)
            manifest = cls(**content)
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedError(f"is damaged ({MANIFEST} cannot be read: {error})") from error
        if digest not in (None, manifest.digest()):
            raise DamagedError(f"is damaged ({MANIFEST} has changed since it was written)")
        return manifest

    def write(self, checkpoint: Path) -> None:
        """Write the manifest; from now on the checkpoint counts."""
        content = dataclasses.asdict(self) | {"digest": self.digest()}
        write_json(checkpoint / MANIFEST, content)

    def digest(self) -> str:
        """Return the SHA-256 of the content, which detects a changed byte in the manifest."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def check_disk_space(run: Path, trained_parameters: int, keep_checkpoints: int) -> None:
    """Raise UsageError if the disk of `run` cannot hold the checkpoints and the model."""
    needed = STATE_BYTES_PER_PARAMETER * trained_parameters * (keep_checkpoints + 1)
    needed += 4 * trained_parameters * 2

    folders = [run / "checkpoints", run / "model"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    there = sum(path.stat().st_size for path in files)

    free = shutil.disk_usage(run).free
    if free < needed - there:
        raise UsageError(
            f"--output_dir {run}: {free / 2**20:,.0f} MiB free, but {keep_checkpoints} checkpoints "
            f"and the model need about {(needed - there) / 2**20:,.0f} MiB more; free space or "
            "lower --keep_checkpoints"
        )


def save_checkpoint(
    engine: Any,
    folder: Path,
    state: dict[str, Any],
    keep_checkpoints: int,
    without_frozen: bool,
) -> None:
    """Save `folder/step-N` and remove all but the newest checkpoints. Every rank must call it.

    Args:
        engine: DeepSpeed engine.
        folder: RUN/checkpoints.
        state: the loop's own state as JSON values, with its `step`; it goes into the manifest.
        keep_checkpoints: how many to keep.
        without_frozen: leave out parameters that are not trained (the base of an adapter).
    """
    checkpoint = folder / tag_of(state["step"])
    # An interrupted save may have left something there.
    distributed.on_main(lambda: shutil.rmtree(checkpoint, ignore_errors=True))
    engine.save_checkpoint(
        str(folder),
        tag=checkpoint.name,
        save_latest=False,
        exclude_frozen_parameters=without_frozen,
    )
    distributed.barrier()

    def finish() -> None:
        flush_files(checkpoint)
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        names = [str(path.relative_to(checkpoint)) for path in files]
        manifest = Manifest(
            world_size=distributed.world_size(),
            trained=trained_names(engine),
            files={name: (checkpoint / name).stat().st_size for name in names},
            state=state,
            sha256=_digests(checkpoint, names),
        )
        manifest.write(checkpoint)
        for old in sorted(folder.glob("step-*"))[:-keep_checkpoints]:
            shutil.rmtree(old)

    distributed.on_main(finish)


def update_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the loop's state in the checkpoint of that step; DeepSpeed's files stay.

    Every rank must call it.
    """
    checkpoint = folder / tag_of(state["step"])

    def update() -> None:
        dataclasses.replace(Manifest.read(checkpoint), state=state).write(checkpoint)

    distributed.on_main(update)


def tag_of(step: int) -> str:
    """Return the folder name of the checkpoint at a step."""
    return f"step-{step:08d}"


def trained_names(engine: Any) -> list[str]:
    """Return the names of the parameters that training changes, in order."""
    named = engine.module.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad]


def _digests(checkpoint: Path, names: list[str]) -> dict[str, str]:
    """Return the SHA-256 of files of a checkpoint by name."""
    with ThreadPoolExecutor(READERS) as readers:
        digests = readers.map(sha256_of, [checkpoint / name for name in names])
        return dict(zip(names, digests, strict=True))


def newest_checkpoint(folder: Path, trust: bool = False) -> str | None:
    """Return the tag of the newest whole checkpoint, or None. Rank 0 only.

    Newer checkpoints that are not whole are removed with a warning.

    Args:
        folder: RUN/checkpoints.
        trust: use checkpoints of other users too (--trust_checkpoint).

    Raises:
        UsageError: the checkpoint belongs to another user, and `trust` is false.
    """
    remove_temporaries(folder)  # killed conversions
    removed = False
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        if not trust:
            _check_owner(checkpoint)
        try:
            _check_bytes(checkpoint)
            return checkpoint.name
        except DamagedError as reason:
            print(f"warning: checkpoint {checkpoint.name} {reason} and is removed", flush=True)
            shutil.rmtree(checkpoint)
            removed = True

    if removed:
        print(f"warning: {folder} has no whole checkpoint left: the run begins anew", flush=True)
    return None


def _check_owner(checkpoint: Path) -> None:
    """Raise UsageError if part of a checkpoint belongs to another user.

    DeepSpeed's files are pickles: whoever wrote them chooses what code runs when they are loaded.
    """
    # Some network file systems give all files to one user: ask which one gets ours.
    with tempfile.TemporaryFile(dir=checkpoint.parent) as file:
        own = {os.geteuid(), os.fstat(file.fileno()).st_uid}
    for path in [checkpoint, *checkpoint.rglob("*")]:
        owner = path.lstat().st_uid
        if owner not in own:
            raise UsageError(
                f"{path} belongs to another user (id {owner}), and loading DeepSpeed's checkpoints "
                "runs code that they contain: if you trust that user, add --trust_checkpoint"
            )


def _check_bytes(checkpoint: Path) -> None:
    """Raise DamagedError unless all files are there with the bytes that the manifest says."""
    manifest = Manifest.read(checkpoint)
    for name, size in manifest.files.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise DamagedError(f"is not complete ({name} has {found} of {size} bytes)")

    found_digests = _digests(checkpoint, list(manifest.sha256))
    for name, expected in manifest.sha256.items():
        if found_digests[name] != expected:
            raise DamagedError(
                f"is damaged (the SHA-256 of {name} is not the one it was saved with)"
            )


def load_checkpoint(engine: Any, folder: Path, tag: str, without_frozen: bool) -> dict[str, Any]:
    """Load a whole checkpoint (weights, optimizer, schedule) into the engine.

    Another number of ranks than saved it can load it too. Every rank must call it.

    Returns:
        The loop's state at that step.

    Raises:
        UsageError: the checkpoint holds other trained parameters than the engine, or cannot be
            converted for this number of ranks.
    """
    manifest = Manifest.read(folder / tag)
    if manifest.trained != trained_names(engine):
        raise UsageError(
            f"{folder / tag} holds other trained parameters than this model has; start a new run"
        )

    # At stage 0 every rank saves and loads everything.
    as_saved = manifest.world_size == distributed.world_size()
    if not as_saved and engine.zero_optimization_stage() > 0:
        load_on_other_ranks(engine, folder / tag)
        return manifest.state

    # Frozen weights are not in it and quantised ones never load strictly, hence the check above.
    strict = not without_frozen
    with plain_path(folder) as place:
        loaded, _ = engine.load_checkpoint(str(place), tag=tag, load_module_strict=strict)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load {folder / tag}")
    return manifest.state
