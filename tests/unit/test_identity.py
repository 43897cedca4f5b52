"""Is this still the same thing? Paths, tokenizers, base weights and the files of a saved model."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from igd_ds import training_inputs
from igd_ds.backbones import CausalLM, read_model_config
from igd_ds.backbones.saved import (
    DESCRIPTION_FILE,
    MANIFEST_FILE,
    base_of,
    base_record,
    check_adapter_options,
    check_model,
    describe,
    origin_of,
    pinned,
    weights_sha256,
    write_manifest,
)
from igd_ds.backbones.tokenizer import added_token_ids, as_saved, load_tokenizer
from igd_ds.commands import prepare
from igd_ds.config.model import ModelOptions, ModelSource
from igd_ds.data import dataset as dataset_module
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.eval_config import EvalConfig
from igd_ds.evaluation.parts import RankingTask, claim_output_folder
from igd_ds.evaluation.recommender import Recommender
from igd_ds.evaluation.results import SCORE
from igd_ds.folders import write_json
from igd_ds.items.catalogue import Catalogue, tokenizer_fingerprint
from igd_ds.items.store import load_catalogue, save_catalogue
from igd_ds.train_config import TrainConfig

CPU = torch.device("cpu")
PATTERNS = ["d[12]", "d?", "*", "x::y", "d[!0]", "**", "simplecache::d1", "hf:::d"]
"""Names of folders that a library may take for a pattern or a protocol; beside them lies `d1`."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    return folder


@pytest.fixture
def inputs(shared, tmp_path):
    """Return a function that makes one case of shared/faults in a folder."""
    spec = importlib.util.spec_from_file_location("inputs", shared / "faults" / "make_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(case: str) -> Path:
        getattr(module, case)(tmp_path / case)
        return tmp_path / case

    return make


def flip(path: Path) -> None:
    """Change one byte in the middle of a file; its size and its times stay."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# ---- a path is a path


def write_data(folder: Path, seed: int) -> list[list[int]]:
    """Write a dataset with random histories; return those of its test rows."""
    random = np.random.default_rng(seed)
    users = range(20)
    histories = random.integers(0, 10, (20, 3)).tolist()
    splits = {name: tiny_run.rows(users, histories, [0] * 20) for name in dataset_module.SPLITS}
    items = dataset_module.item_table(tiny_run.TITLES, None, pa.array(range(10)))
    user_table = dataset_module.user_table(splits, None)
    dataset_module.write_dataset(folder, items, user_table, splits, tiny_run.INFO)
    return histories


@pytest.mark.parametrize("name", PATTERNS)
def test_a_dataset_folder_is_read_whatever_its_name(tmp_path, name):
    write_data(tmp_path / "d1", seed=1)
    expected = write_data(tmp_path / name, seed=2)
    test = InteractionDataset.load(tmp_path / name).splits["test"]
    assert [test.history(row).tolist() for row in range(20)] == expected


def test_the_cache_may_have_such_a_name_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "c[ab]*::"))
    expected = write_data(tmp_path / "d", seed=2)
    test = InteractionDataset.load(tmp_path / "d").splits["test"]
    assert test.history(3).tolist() == expected[3]


def test_datasets_prepared_under_such_names_are_their_own(inputs):
    sources = inputs("dataset_paths_as_patterns")
    for source, name in (("one", "d1"), ("two", "d[12]")):
        flags = ["--source", "sequences", "--input", str(sources / source)]
        loose = ["--protocol", "leave-one-out", "--k_core", "0"]
        assert prepare.main([*flags, *loose, "--output", str(sources / name)]) == 0
    first, second = (InteractionDataset.load(sources / name) for name in ("d1", "d[12]"))
    sequences = [
        json.loads(line)["items"]
        for line in (sources / "two" / "sequences.jsonl").read_text().splitlines()
    ]
    targets = [sequence[-1] for sequence in sequences]
    names = pq.read_table(sources / "d[12]" / "items.parquet")["source_id"]
    found = [int(names[int(item)].as_py()) for item in second.splits["test"].targets]
    assert found == targets
    assert not np.array_equal(first.splits["test"].targets, second.splits["test"].targets)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone", "no checksum"])
def test_a_damaged_cache_is_made_anew(tmp_path, cache, damage):
    expected = write_data(tmp_path / "d", seed=3)
    InteractionDataset.load(tmp_path / "d")
    for path in cache.rglob("rows.arrow"):
        if damage == "flipped":
            flip(path)
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:-40])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "gone":
            path.unlink()
        else:
            path.with_name("rows.arrow.sha256").unlink()
    test = InteractionDataset.load(tmp_path / "d").splits["test"]
    assert [test.history(row).tolist() for row in range(20)] == expected


def test_a_cache_that_cannot_be_written_is_said_in_a_line(tmp_path, monkeypatch):
    write_data(tmp_path / "d", seed=3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot write the cache .*set HF_DATASETS_CACHE"):
        InteractionDataset.load(tmp_path / "d")


# ---- a tokenizer is what it does


def changed(tokenizer: PreTrainedTokenizerFast, normalizer) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer with another normalizer."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def catalogue(tmp_path):
    """Return the folder of a stored catalogue, its dataset and its tokenizer."""
    tiny_run.write_data(tmp_path / "data", tiny_run.TITLES)
    data, tokenizer = InteractionDataset.load(tmp_path / "data"), tiny_run.letter_tokenizer()
    save_catalogue(tmp_path / "catalogue", tiny_run.store(Catalogue.build(data, tokenizer)))
    return tmp_path / "catalogue", data, tokenizer


def test_a_tokenizer_with_the_same_ids_passes_whatever_its_file_says(catalogue):
    folder, data, tokenizer = catalogue
    other = changed(tokenizer, normalizers.NFC())  # has no effect on these titles
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    load_catalogue(folder, other, data)


def test_a_tokenizer_with_other_ids_is_refused_and_the_item_is_named(catalogue):
    folder, data, tokenizer = catalogue
    other = changed(tokenizer, normalizers.Replace("cab", "x"))
    with pytest.raises(UsageError, match=r"another tokenizer.*item 5 was \["):
        load_catalogue(folder, other, data)
    other = changed(tokenizer, None)
    other.eos_token = "a"
    with pytest.raises(UsageError, match="tokenizer's EOS is .*undo the change of eos_token"):
        load_catalogue(folder, other, data)


def test_a_tokenizer_is_taken_as_it_is_after_saving(inputs, tmp_path, capsys):
    folder = inputs("tokenizer_that_changes_when_saved")
    given = load_tokenizer(str(folder / "tokenizer"))
    settled = as_saved(given, read_model_config(str(folder / "llama.json")), ["Blue Mario 1"])
    assert tokenizer_fingerprint(settled) != tokenizer_fingerprint(given)
    assert settled("Blue Mario 1").input_ids == given("Blue Mario 1").input_ids
    assert "warning" not in capsys.readouterr().out

    settled.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(settled)


def test_a_tokenizer_that_never_settles_is_refused(monkeypatch):
    numbers = iter(range(100))
    monkeypatch.setattr(
        "igd_ds.backbones.tokenizer.tokenizer_fingerprint", lambda tokenizer: next(numbers)
    )
    with pytest.raises(UsageError, match="changes whenever it is saved"):
        as_saved(tiny_run.letter_tokenizer(), None)


def test_other_ids_after_saving_are_said(monkeypatch, capsys):
    given = tiny_run.letter_tokenizer()
    upper = changed(given, normalizers.Replace("a", "b"))
    monkeypatch.setattr("igd_ds.backbones.tokenizer.load_tokenizer", lambda *source: upper)
    assert as_saved(given, None, ["bb", "aa"]) is upper
    assert "'aa' was" in capsys.readouterr().out


def test_training_with_a_tokenizer_that_changes_when_saved_can_be_evaluated(inputs, tmp_path):
    folder = inputs("tokenizer_that_changes_when_saved")
    flags = ["--source", "sequences", "--input", str(folder / "source"), "--k_core", "0"]
    loose = ["--protocol", "leave-one-out"]
    assert prepare.main([*flags, *loose, "--output", str(folder / "data")]) == 0
    (folder / "ds.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 0}})
    )

    run = folder / "run"
    command("train", "--ds_config", folder / "ds.json", "--dataset", folder / "data",
            "--model_config", folder / "llama.json", "--tokenizer", folder / "tokenizer",
            "--output_dir", run, "--global_batch_size", 2, "--max_steps", 2, "--max_length", 200,
            "--objective", "uniform")  # fmt: skip
    recommender = Recommender.load(run, device="cpu")
    assert len(recommender.recommend([[0, 1]], k=3, ids="dense")[0]) == 3
    manifest = json.loads((run / "model" / MANIFEST_FILE).read_text())["files"]
    assert {"model.safetensors", DESCRIPTION_FILE, "catalogue/catalogue.json"} <= manifest.keys()


def command(entry: str, *words: object) -> None:
    """Run an entry in a process of its own."""
    root = Path(training_inputs.__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": os.environ["HF_DATASETS_CACHE"],
    }
    program = [sys.executable, str(root / "igd_ds" / f"{entry}.py"), *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# ---- an adapter belongs to its base


def other_weights(base: Path) -> None:
    """Replace a base's weights by others of the same size."""
    config = read_model_config(str(base))
    torch.manual_seed(9)
    CausalLM().build(
        ModelOptions(model_config="given", tokenizer="given"), config, torch.float32, CPU
    ).save_pretrained(base)


def lora_options(base: Path | str, **changes) -> ModelOptions:
    usual = {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    return ModelOptions(model_name_or_path=str(base), **(usual | changes))


def build(options: ModelOptions, added_ids: range = range(0)):
    """Return the model as a training builds it."""
    origin = origin_of(options.model_name_or_path)
    config = read_model_config(origin.name)
    return CausalLM().build(options, config, torch.float32, CPU, added_ids)


def randomised(model):
    """Give the trained parameters random values, as a training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture
def adapter(tmp_path):
    """Return the model folder of a run that trained an adapter on tmp_path/base."""
    run, base = tiny_run.make(tmp_path), tmp_path / "base"
    tiny_run.write_model(base)
    tiny_run.letter_tokenizer().save_pretrained(base)
    folder = run / "model"
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / name).unlink()

    randomised(build(lora_options(base))).save_pretrained(folder, save_embedding_layers=False)
    origin = origin_of(str(base))
    record = base_record(origin, weights_sha256(origin))
    write_json(folder / DESCRIPTION_FILE, describe(folder) | {"base": record})
    write_manifest(folder)
    return folder


def source_of(adapter: Path, base_model: Path | str = "") -> ModelSource:
    data = adapter.parents[1] / "data"
    return ModelSource(
        model=str(adapter), dataset=str(data), base_model=str(base_model), dtype="float32"
    )


def test_the_same_base_is_loaded(adapter):
    sha256 = check_model(source_of(adapter))
    assert sha256 == describe(adapter)["base"]["sha256"]
    assert Recommender.load(adapter, device="cpu").base_weights == sha256


def test_other_weights_at_the_bases_path_are_refused(adapter, tmp_path, capsys):
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    other_weights(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").stat().st_size == size
    with pytest.raises(UsageError, match="not those that the adapter .* --base_model"):
        Recommender(source_of(adapter))
    recommender = Recommender(source_of(adapter, tmp_path / "base"))
    assert "warning: the weights in" in capsys.readouterr().out
    assert recommender.base_weights != describe(adapter)["base"]["sha256"]


def test_one_changed_byte_of_the_base_is_found(adapter, tmp_path):
    flip(tmp_path / "base" / "model.safetensors")
    with pytest.raises(UsageError, match="not those that the adapter"):
        check_model(source_of(adapter))


def test_a_base_that_moved_is_named(adapter, tmp_path, capsys):
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(UsageError, match="which is not there: give --base_model"):
        check_model(source_of(adapter))
    assert check_model(source_of(adapter, tmp_path / "moved"))
    assert capsys.readouterr().out == ""


def test_the_base_is_recorded_by_its_absolute_path(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build(lora_options("base"))
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert origin_of("base").name == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path.parent)
    assert base_of(source_of(adapter)).name == str(tmp_path / "base")


def test_an_adapter_of_an_earlier_version_is_loaded_as_before(adapter, tmp_path):
    description = describe(adapter)
    del description["base"]
    write_json(adapter / DESCRIPTION_FILE, description)
    (adapter / MANIFEST_FILE).unlink()
    other_weights(tmp_path / "base")  # nothing says that these are others
    assert base_of(source_of(adapter)).name == str(tmp_path / "base")
    assert check_model(source_of(adapter)) == weights_sha256(origin_of(str(tmp_path / "base")))


def test_shards_belong_to_the_weights(tmp_path):
    tiny_run.write_model(tmp_path / "whole")
    config = read_model_config(str(tmp_path / "whole"))
    model = CausalLM().build(
        ModelOptions(model_config="given", tokenizer="given"), config, torch.float32, CPU
    )
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    assert len(shards) > 2
    origin = origin_of(str(tmp_path / "base"))
    before = weights_sha256(origin)
    flip(shards[1])
    assert weights_sha256(origin) != before
    shards[1].unlink()
    with pytest.raises(UsageError, match=f"{shards[1].name} is missing"):
        weights_sha256(origin)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no weights at"):
        weights_sha256(origin_of(str(tmp_path / "empty")))


def test_alpha_from_another_base_is_refused(adapter, tmp_path):
    def claim(output: str, base_model: str = "", **more) -> None:
        config = EvalConfig(
            **vars(source_of(adapter, base_model)), output_dir=str(tmp_path / output), **more
        )
        recommender = Recommender(config)
        test = recommender.dataset.splits["test"]
        rows = np.arange(len(test))
        task = RankingTask(recommender, test, rows, None, None, None, "beam", SCORE)
        claim_output_folder(tmp_path / output, config, task)

    claim("valid", split="valid")
    claim("test", alpha_from=str(tmp_path / "valid"))
    other_weights(tmp_path / "base")
    with pytest.raises(UsageError, match="evaluated something else; these differ: base_weights"):
        claim("other", str(tmp_path / "base"), alpha_from=str(tmp_path / "valid"))
    with pytest.raises(UsageError, match="belongs to another evaluation; .* base_weights"):
        claim("valid", str(tmp_path / "base"), split="valid")

    # A request of an earlier version does not say which base it had.
    request = json.loads((tmp_path / "valid" / "request.json").read_text())
    del request["base_weights"]
    write_json(tmp_path / "valid" / "request.json", request)
    claim("old", str(tmp_path / "base"), alpha_from=str(tmp_path / "valid"))


def values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_training_goes_on_with_an_adapter(adapter, tmp_path):
    options = lora_options(adapter)
    origin = origin_of(str(adapter))
    assert (origin.name, origin.adapter) == (str(tmp_path / "base"), adapter)
    check_adapter_options(origin, options)

    expected, model = values(randomised(build(lora_options(tmp_path / "base")))), build(options)
    found = values(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)

    # What it saves is an adapter on the first base, not on the adapter.
    model.save_pretrained(tmp_path / "next", save_embedding_layers=False)
    assert origin_of(str(tmp_path / "next")).name == str(tmp_path / "base")


def test_going_on_needs_the_adapters_options(adapter):
    for changes in ({"lora_r": 4}, {"lora_alpha": 8}, {"lora_r": 0}, {"load_in_4bit": True}):
        name = next(iter(changes))
        with pytest.raises(UsageError, match=f"is a LoRA adapter.* give --{name} "):
            check_adapter_options(
                origin_of(str(adapter)), dataclasses.replace(lora_options(adapter), **changes)
            )
    with pytest.raises(UsageError, match="adapts other modules"):
        build(lora_options(adapter, lora_targets="q_proj"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"peft_type": "IA3"}, "is an adapter of the type IA3 "),
        ({}, "it has no lora_alpha and no r"),
        ({"peft_type": "LORA", "lora_alpha": 16}, "it has no r"),
    ],
)
def test_only_lora_adapters_are_gone_on_with(tmp_path, content, why):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(content | {"base_model_name_or_path": "shop/tiny"})
    )
    with pytest.raises(UsageError, match="only LoRA adapters can be trained further") as caught:
        check_adapter_options(origin_of(str(tmp_path)), ModelOptions())
    assert why in str(caught.value) and str(tmp_path) in str(caught.value)


def test_going_on_keeps_the_rows_of_added_tokens(tmp_path):
    base, codes = tmp_path / "base", ["<a_0>", "<a_1>"]
    tiny_run.write_model(base)
    own = tiny_run.letter_tokenizer()
    own.save_pretrained(base)
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_tokens(codes)
    added = added_token_ids(tokenizer, str(base))

    first = randomised(build(lora_options(base), added))
    first.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = build(lora_options(tmp_path / "adapter"), added)
    ids = torch.tensor([[3, added[0], added[1]]])
    torch.testing.assert_close(again.eval()(ids).logits, first.eval()(ids).logits)
    with pytest.raises(UsageError, match="adapts other modules"):
        build(lora_options(tmp_path / "adapter"))
    with pytest.raises(UsageError, match="adapts other modules"):
        build(lora_options(tmp_path / "adapter"), range(added.start, added.stop + 1))


def test_a_trained_run_is_gone_on_with_from_its_folder(adapter, tmp_path):
    """`load_inputs` finds configuration, tokenizer and base of an adapter."""
    words = {
        "ds_config": "", "dataset": tmp_path / "data", "output_dir": tmp_path / "next",
        "model_name_or_path": adapter, "lora_r": 2, "lora_alpha": 4, "max_length": 160,
    }  # fmt: skip
    config = TrainConfig(**{key: str(v) if isinstance(v, Path) else v for key, v in words.items()})
    found = training_inputs.load_inputs(config)
    assert found.origin.name == str(tmp_path / "base") and found.added_ids == range(0)
    (tmp_path / "next").mkdir()
    training_inputs.record_base(tmp_path / "next" / "base.json", found.origin, is_needed=False)
    record = json.loads((tmp_path / "next" / "base.json").read_text())
    assert record == describe(adapter)["base"]

    # A resumed run needs the weights that it began with.
    other_weights(tmp_path / "base")
    with pytest.raises(UsageError, match="not those that the adapter"):
        training_inputs.record_base(tmp_path / "next" / "base.json", found.origin, is_needed=True)
    plain = origin_of(str(tmp_path / "base"))
    with pytest.raises(UsageError, match="has other weights than when .* began"):
        training_inputs.record_base(tmp_path / "next" / "base.json", plain, is_needed=True)


# ---- models on the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the two commits of a model in a cache of the hub, which cannot be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = cache / "models--shop--tiny"
    commits = ["1" * 40, "2" * 40]
    for commit in commits:
        folder = model / "snapshots" / commit
        tiny_run.write_model(folder)
        tiny_run.letter_tokenizer().save_pretrained(folder)
    other_weights(model / "snapshots" / commits[1])
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commits[1])
    (model / "refs" / "v1").write_text(commits[0])
    return [model / "snapshots" / commit for commit in commits]


def load_hub(revision: str):
    revision = pinned(origin_of("shop/tiny", revision)).revision
    options = ModelOptions(model_name_or_path="shop/tiny", revision=revision)
    config = read_model_config("shop/tiny", revision=revision)
    return CausalLM().build(options, config, torch.float32, CPU)


def test_an_unknown_model_without_the_hub_is_told_why(hub, tmp_path):
    for find in (lambda name: pinned(origin_of(name)), read_model_config, load_tokenizer):
        with pytest.raises(UsageError, match="foo/bar.*HF_HUB_OFFLINE .*is set") as caught:
            find("foo/bar")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError) as caught:
        load_tokenizer(str(tmp_path))
    assert "HF_HUB_OFFLINE (or" not in str(caught.value)


def test_a_revision_chooses_the_weights(hub):
    for revision, folder in (("v1", hub[0]), ("1" * 40, hub[0]), ("", hub[1])):
        expected = build(ModelOptions(model_name_or_path=str(folder)))
        for name, value in load_hub(revision).state_dict().items():
            assert torch.equal(value, expected.state_dict()[name])
        assert load_tokenizer("shop/tiny", revision=revision)


def test_a_revision_is_pinned_to_its_commit(hub, tmp_path):
    origin = pinned(origin_of("shop/tiny"))
    assert origin.revision == "2" * 40
    (hub[0].parents[1] / "refs" / "main").write_text("1" * 40)  # the model changes meanwhile
    assert pinned(origin) == origin
    assert pinned(origin_of("shop/tiny", "v1")).revision == "1" * 40
    folder = origin_of(str(tmp_path))
    assert pinned(folder) is folder
    for name in ("shop/none", "/no/such/folder"):
        with pytest.raises(UsageError, match=f"no model at '{name}'"):
            pinned(origin_of(name))


def test_an_adapter_names_the_commit_of_its_base(hub, adapter, tmp_path):
    origin = dataclasses.replace(origin_of("shop/tiny"), revision="1" * 40)
    record = base_record(origin, weights_sha256(origin))
    assert record["commit"] == "1" * 40
    assert record["sha256"] == weights_sha256(origin_of(str(hub[0])))
    write_json(adapter / DESCRIPTION_FILE, describe(adapter) | {"base": record})
    write_manifest(adapter)

    # The newest commit is another one by now.
    found = base_of(source_of(adapter))
    assert (found.name, found.revision) == ("shop/tiny", "1" * 40)
    assert check_model(source_of(adapter)) == record["sha256"]
    model = CausalLM().load(source_of(adapter), False, CPU)
    expected = build(ModelOptions(model_name_or_path=str(hub[0])))
    assert torch.equal(model.get_output_embeddings().weight, expected.lm_head.weight)
    # The same weights in a folder are the same base, others are not.
    assert check_model(source_of(adapter, hub[0])) == record["sha256"]
    assert check_model(source_of(adapter, hub[1])) != record["sha256"]


def test_a_run_resumes_at_the_commit_it_began_with(hub, tmp_path):
    run, origin = tmp_path / "run", origin_of("shop/tiny")
    (run / "checkpoints").mkdir(parents=True)
    write_json(run / "base.json", base_record(dataclasses.replace(origin, revision="1" * 40), "x"))
    assert training_inputs.as_begun(origin, run).revision == ""  # no step was made yet
    (run / "checkpoints" / "step-00000001").mkdir()
    assert training_inputs.as_begun(origin, run).revision == "1" * 40


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a folder: leave it out"):
        origin_of(str(tmp_path), "v1")
    with pytest.raises(UsageError, match="--revision has no effect with --model_config"):
        ModelOptions(model_config="a.json", tokenizer="t", revision="v1").check()


# ---- files whose bytes changed


@pytest.fixture
def saved(tmp_path):
    """Return the model folder of a run as this version saves it."""
    model = tiny_run.make(tmp_path) / "model"
    write_manifest(model)
    return model


def test_changed_bytes_of_any_file_are_told_and_not_used(saved):
    source = source_of(saved)
    Recommender(source)
    files = [path for path in sorted(saved.rglob("*")) if path.is_file()]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        flip(path)
        with pytest.raises(UsageError, match=path.name.replace("+", r"\+")):
            Recommender(source)
        path.unlink()
        if path.name != MANIFEST_FILE:  # without it, the model is one of an earlier version
            with pytest.raises(UsageError, match=path.name):
                Recommender(source)
        path.write_bytes(content)
    Recommender(source)


def test_a_model_without_a_manifest_is_loaded(saved):
    (saved / MANIFEST_FILE).unlink()
    Recommender(source_of(saved))


@pytest.mark.parametrize("damage", ["permuted", "circle", "flipped"])
def test_links_of_an_old_catalogue_that_are_no_tree_are_refused(catalogue, damage):
    folder, _, _ = catalogue
    description = json.loads((folder / "catalogue.json").read_text())
    del description["sha256"]
    write_json(folder / "catalogue.json", description)
    load_catalogue(folder)

    begin = np.load(folder / "child_begin.npy")
    if damage == "permuted":
        begin = np.random.default_rng(0).permutation(begin)
    elif damage == "circle":
        begin[:] = 0
    else:
        begin[3] ^= 64
    np.save(folder / "child_begin.npy", begin)
    with pytest.raises(UsageError, match="not one tree"):
        load_catalogue(folder)
