"""Codes of semantic IDs, added to a pretrained causal LM: tokenizer, new rows, LoRA, saving."""

import pyarrow as pa
import pytest
import tokenizers
import torch
import transformers
from label_batch import label_batch
from tiny_run import INFO, rows

from igd_ds.backbones import CausalLM
from igd_ds.backbones.tokenizer import added_token_ids, load_tokenizer
from igd_ds.commands import tokenizer as tokenizer_command
from igd_ds.config.model import ModelOptions, ModelSource
from igd_ds.contracts import IGNORED, Batch
from igd_ds.data.dataset import item_table, user_table, write_dataset
from igd_ds.errors import UsageError
from igd_ds.semantic_ids.code_tokens import add_to_pretrained

CODES = [f"<{letter}_{i}>" for letter in "abc" for i in range(3)]
OWN = 257  # tokens of the base model's tokenizer
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {"qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}
MODELS |= {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}
CPU = torch.device("cpu")


def base(folder, kind: str = "qwen2", tied: bool = True, num_rows: int = OWN) -> str:
    """Save a random model with its tokenizer, as a hub would have them."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    configuration, model = MODELS[kind]
    model(
        configuration(vocab_size=num_rows, tie_word_embeddings=tied, initializer_range=0.2, **SIZES)
    ).save_pretrained(folder)
    return str(folder)


def split_case(case: str) -> tuple[str, bool, int]:
    kind, tied, num_rows = case.split()[:3]
    return kind, tied == "tied", int(num_rows)


def dataset(folder, codes=CODES) -> str:
    items = [[a, b, c] for a in codes[:3] for b in codes[3:6] for c in codes[6:9]]
    splits = {name: rows([1], [[0]], [2]) for name in ("train", "valid", "test")}
    write_dataset(
        folder,
        item_table([None] * len(items), items, pa.array(range(len(items)))),
        user_table(splits, None),
        splits,
        INFO,
    )
    return str(folder)


def with_codes(name: str):
    """The base's tokenizer with the codes, and their ids."""
    tokenizer = load_tokenizer(name)
    add_to_pretrained(tokenizer, CODES, name)
    return tokenizer, added_token_ids(tokenizer, name)


def options_of(name: str, **changes) -> ModelOptions:
    return ModelOptions(model_name_or_path=name, **changes)


def build(options: ModelOptions, added_ids: range, seed: int = 0):
    """The model as a training builds it."""
    model_config = transformers.AutoConfig.from_pretrained(options.model_name_or_path)
    return CausalLM().build(options, model_config, torch.float32, CPU, added_ids, seed)


def vocabulary_rows(model) -> list[torch.Tensor]:
    """Input and output rows as the forward pass sees them."""
    return [
        module.weight.detach().float().clone()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]


def batch() -> Batch:
    """Two prompts that end in codes."""
    ids = torch.randint(0, OWN, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -3:] = torch.tensor([[OWN, OWN + 3, OWN + 6], [OWN + 1, OWN + 3, OWN + 8]])
    labels = ids.clone()
    labels[:, :-3] = IGNORED
    return label_batch(ids, torch.ones_like(ids), labels)


def loss_of(model) -> torch.Tensor:
    logits = CausalLM().label_logits(model, batch())
    return torch.nn.functional.cross_entropy(logits.float(), batch().targets)


def step(model) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    loss_of(model).backward()
    optimizer.step()


def load(folder, load_in_4bit: bool = False):
    source = ModelSource(model=str(folder), dataset="", dtype="float32")
    return CausalLM().load(source, load_in_4bit, CPU)


def test_igd_tokenizer_adds_one_token_per_code(tmp_path, capsys):
    name, data = base(tmp_path / "base"), dataset(tmp_path / "data")
    flags = ["--dataset", data, "--add_codes_to", name, "--output", str(tmp_path / "codes")]
    assert tokenizer_command.main(flags) == 0
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == [
        "codes.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]

    tokenizer = load_tokenizer(str(tmp_path / "codes"))
    assert tokenizer.convert_tokens_to_ids(CODES) == list(range(OWN, OWN + 9))
    text = "ab<a_1><b_0> <c_2>x"
    own = load_tokenizer(name)
    ab, space, x = (own(part)["input_ids"] for part in ("ab", " ", "x"))
    assert tokenizer(text)["input_ids"] == [*ab, OWN + 1, OWN + 3, *space, OWN + 8, *x]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert added_token_ids(tokenizer, name) == range(OWN, OWN + 9)
    assert added_token_ids(own, name) == range(OWN, OWN)

    assert tokenizer_command.main(flags) == 0 and "nothing to do" in capsys.readouterr().out
    again = ["--dataset", data, "--add_codes_to", str(tmp_path / "codes"), "--output"]
    with pytest.raises(UsageError, match=r"these differ: tokenizer\): delete it"):
        tokenizer_command.main([*again, str(tmp_path / "codes")])
    with pytest.raises(UsageError, match="'<a_0>' is token 257"):
        tokenizer_command.main([*again, str(tmp_path / "twice")])


@pytest.mark.parametrize("code", ["a", "<eos>", " ", "Ġ"])
def test_a_code_that_is_a_token_already_is_refused(tmp_path, code):
    name = base(tmp_path)
    with pytest.raises(
        UsageError, match="is token [0-9]+ of the tokenizer .* already: rename the codes"
    ):
        add_to_pretrained(load_tokenizer(name), ["<a_0>", code], name)


def test_refusals(tmp_path):
    name = base(tmp_path / "base")
    tokenizer, added = with_codes(name)
    options, model_config = options_of(name), transformers.AutoConfig.from_pretrained(name)
    fit = CausalLM().fit_model_config
    fit(model_config, options, tokenizer, added)
    with pytest.raises(UsageError, match="266 tokens but the model at .* only 257"):
        fit(model_config, options, tokenizer, range(0))

    vocabulary = load_tokenizer(name).get_vocab() | {"zz": 300}
    gap = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<eos>"))
    )
    with pytest.raises(ValueError, match="not from 257 on without a gap"):
        added_token_ids(gap, name)
    holes = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7}, "a"))
    with pytest.raises(ValueError, match="unused ids below 8"):
        add_to_pretrained(
            transformers.PreTrainedTokenizerFast(tokenizer_object=holes, unk_token="a"),
            CODES,
            "holes",
        )

    options = options_of(name, lora_r=2, lora_targets="q_proj,lm_head")
    with pytest.raises(UsageError, match="--lora_targets q_proj,lm_head: .* leave it out"):
        fit(model_config, options, tokenizer, added)
    # Phi's output layer has a bias, which PEFT would forget.
    biased = transformers.PhiConfig(vocab_size=OWN, **SIZES)
    with pytest.raises(UsageError, match="an output layer with a bias"):
        fit(biased, options_of(name, lora_r=2), tokenizer, added)


@pytest.mark.parametrize(
    "case", ["qwen2 tied 257", "llama untied 257", "llama tied 260", "qwen2 untied 280"]
)
def test_new_rows_start_near_the_mean(tmp_path, case):
    """New rows lie beyond the model's rows (257), partly (260), or all within spare ones (280)."""
    kind, tied, num_rows = split_case(case)
    name = base(tmp_path, kind, tied, num_rows)
    _, added = with_codes(name)
    before = vocabulary_rows(transformers.AutoModelForCausalLM.from_pretrained(name))
    torch.manual_seed(5)  # makes no difference
    model = build(options_of(name), added, seed=3)
    again = build(options_of(name), added, seed=3)
    assert model.config.vocab_size == max(num_rows, OWN + 9)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    for old, new, same in zip(before, vocabulary_rows(model), vocabulary_rows(again), strict=True):
        assert torch.equal(new, same)
        assert torch.equal(new[:OWN], old[:OWN]) and torch.equal(new[OWN + 9 :], old[OWN + 9 :])
        off = (new[OWN : OWN + 9] - old[:OWN].mean(0)) / old[:OWN].std(0)
        assert 0.05 < off.std() < 0.15 and off.abs().max() < 0.5
        assert len(new[OWN : OWN + 9].unique(dim=0)) == 9


@pytest.mark.parametrize(
    "case", ["qwen2 tied 257", "llama untied 260", "qwen2 tied 280 4-bit", "llama untied 257 4-bit"]
)
def test_lora_trains_the_new_rows_and_saves_them(tmp_path, case):
    kind, tied, num_rows, in_4bit = *split_case(case), case.endswith("4-bit")
    name = base(tmp_path / "base", kind, tied, num_rows)
    _, added = with_codes(name)
    config = options_of(name, lora_r=2, lora_dropout=0.0, load_in_4bit=in_4bit)
    model = build(config, added)
    before = vocabulary_rows(model)
    step(model)

    after = vocabulary_rows(model)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:OWN], old[:OWN]) and torch.equal(new[OWN + 9 :], old[OWN + 9 :])
        assert (new[OWN : OWN + 9] != old[OWN : OWN + 9]).any(1).sum() >= 5
    assert torch.equal(*after) is tied

    expected = loss_of(model.eval())
    model.save_pretrained(tmp_path / "model", save_embedding_layers=False)
    saved = sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))
    assert saved < 60_000  # rows of 9 codes and the LoRA matrices, no row of another token
    loaded = load(tmp_path / "model", load_in_4bit=in_4bit)
    for new, restored in zip(after, vocabulary_rows(loaded), strict=True):
        assert torch.equal(new, restored)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(loaded), expected, rtol=1e-5, atol=0)

    without = CausalLM().num_trained_parameters(model.config, config)
    assert CausalLM().num_trained_parameters(model.config, config, added) - without == 9 * 32 * (
        1 if tied else 2
    )


@pytest.mark.parametrize("tied", [True, False])
def test_lora_gives_new_rows_the_gradient_of_full_training(tmp_path, tied):
    name = base(tmp_path, tied=tied)
    _, added = with_codes(name)
    full, lora = (build(options_of(name, lora_r=r), added) for r in (0, 2))
    loss_of(full).backward()
    loss_of(lora.eval()).backward()  # LoRA starts as the base model, without dropout
    trained = [
        parameter for name, parameter in lora.named_parameters() if "trainable_tokens_delta" in name
    ]
    vocabulary = [full.get_input_embeddings().weight] + [full.get_output_embeddings().weight] * (
        not tied
    )
    for delta, weight in zip(trained, vocabulary, strict=True):
        torch.testing.assert_close(delta.grad, weight.grad[OWN:])


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_train_and_load_as_a_plain_model(tmp_path, tied):
    name = base(tmp_path / "base", tied=tied)
    _, added = with_codes(name)
    model = build(options_of(name), added)
    step(model)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert loss_of(load(tmp_path / "model")) == loss_of(model.eval())


def test_weights_without_a_tokenizer_have_none(tmp_path):
    """For such a folder transformers makes an empty tokenizer, which is not the model's."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = transformers.Qwen2Config(vocab_size=40, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "weights")
    with pytest.raises(ValueError, match="there are weights, but no files of a tokenizer"):
        load_tokenizer(str(tmp_path / "weights"))
    own = load_tokenizer(base(tmp_path / "other"))
    assert added_token_ids(own, str(tmp_path / "weights")) == range(0)
