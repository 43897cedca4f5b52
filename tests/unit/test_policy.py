"""Policy training: rewards, advantages and loss against formulas, and the live search."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
import transformers
from oracle import tiny_t5

from igd_ds.config.options import parse
from igd_ds.contracts import MASKED_ROW
from igd_ds.errors import UsageError
from igd_ds.items.decisiveness import normalised_gain
from igd_ds.objectives.policy import advantages, has_spread, rank, rule
from igd_ds.prefer_config import PreferConfig
from igd_ds.preference.policy import PolicyTraining
from igd_ds.preference.start import load_start

DS = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {}, "bf16": {"enabled": False}}
ROWS = np.array([0, 3, 9, MASKED_ROW])
CREDITS = ("equal", "gain")


class Engine:
    """What a training uses of a DeepSpeed engine, around a model."""

    def __init__(self, model):
        self.module, self.eval, self.train = model, model.eval, model.train

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def __call__(self, *args, **inputs):
        return self.module(*args, **inputs)

    def zero_optimization_stage(self) -> int:
        return 0


def training_of(folder: Path, *flags: str) -> PolicyTraining:
    """Return a training that goes on from the tiny run, with its test rows as training rows."""
    run = folder / "run"
    if not run.is_dir():
        tiny_run.make(folder)
    words = ["--ds_config", "none.json", "--dataset", str(folder / "data"), "--model", str(run)]
    words += ["--output_dir", str(folder / "new"), "--objective", "grpo", "--group_size", "4"]
    config = parse(PreferConfig, [*words, *flags])
    start = load_start(config)
    start.inputs.dataset.splits["train"] = start.inputs.dataset.splits["test"]
    return PolicyTraining(config, folder / "new", start, DS)


def with_t5(folder: Path) -> None:
    """Make the tiny run with a T5, which drops nothing, so that passes can be compared."""
    model = tiny_run.make(folder) / "model"
    for path in model.glob("model*"):
        path.unlink()
    tiny_t5(tiny_run.EOS + 1, tiny_run.EOS, dropout_rate=0.0).save_pretrained(model)


def logits_behind(model, prompt: list[int], path: tuple[int, ...]) -> torch.Tensor:
    """Return the logits that predict each token of a path (len(path), V), by one plain pass."""
    if model.config.is_encoder_decoder:
        begin = model.config.decoder_start_token_id
        decoded = torch.tensor([[begin, *path[:-1]]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits[0]
    return model(torch.tensor([[*prompt, *path]])).logits[0, len(prompt) - 1 : -1]


def begun(folder: Path, *flags: str) -> tuple[PolicyTraining, tiny_run.Plain]:
    """Return a training whose model is no longer its reference, and the reference."""
    training, plain = training_of(folder, *flags), tiny_run.Plain(folder / "run")
    model = tiny_run.Plain(folder / "run").model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    training.begin(Engine(model), 0)
    return training, plain


def groups_of(training: PolicyTraining):
    leaves = training.live_search.leaves(training.engine, ROWS, training.config.group_size)
    return training._groups(ROWS, leaves), leaves


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def test_rewards_and_advantages_by_hand():
    is_target = np.array([[False, True, False], [False, False, False]])
    assert rule(is_target).tolist() == [[0, 1, 0], [0, 0, 0]]
    discount = [1, 1 / math.log2(3), 0.5]
    first, _, third = (-value / sum(discount) for value in discount)
    assert rank(is_target).tolist() == [pytest.approx([first, 1, third]), [0, 0, 0]]

    rewards = np.array([[1.0, 0, 0, 0], [0.5] * 4])
    found = advantages(rewards)
    assert found[0].tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])
    assert found[1].tolist() == [0] * 4 and has_spread(rewards).tolist() == [True, False]


@pytest.mark.parametrize("backbone", ["decoder", "t5"])
@pytest.mark.parametrize("softmax", ["full", "masked"])
def test_the_search_and_the_training_pass_have_the_same_log_probabilities(
    tmp_path, softmax, backbone
):
    """The groups are the model's own best lists, and their scores are log π of the update."""
    if backbone == "t5":
        with_t5(tmp_path)
    training, _ = begun(tmp_path, "--softmax", softmax)
    real = ROWS[:3]
    found = training.live_search.search(training.engine, real, 4)
    items = training.start.stored.trie.item_order[
        training.start.stored.trie.first_item[found.leaves[0].numpy()]
    ]
    logprobs = training.scorer.logprobs(training.engine, real, items)
    np.testing.assert_allclose(found.scores[0].numpy(), logprobs, rtol=1e-5, atol=1e-5)
    assert training.engine.module.training, "the search leaves the model in training mode"


@pytest.mark.parametrize(
    ("softmax", "credit", "backbone"),
    [
        *((softmax, credit, "decoder") for softmax in ("full", "masked") for credit in CREDITS),
        ("full", "equal", "t5"),
        ("masked", "gain", "t5"),
    ],
)
def test_loss_and_gradient_equal_the_formula(tmp_path, softmax, credit, backbone):
    if backbone == "t5":
        with_t5(tmp_path)
    flags = ["--reward", "rank", "--beta", "0.3", "--softmax", softmax, "--token_credit", credit]
    flags += ["--group_size", "7"]
    training, plain = begun(tmp_path, *flags)
    model, split, trie = training.engine.module, training.collator.split, plain.trie
    groups, leaves = groups_of(training)
    assert groups.holds_target.any()
    assert training.loss.normalisers(groups).tolist() == [21, 21]
    terms = training.loss.terms(training.engine, groups)
    loss = (terms.numerators / 21 * training.loss.coefficients(0)).sum()
    found = gradient(model, loss)

    # The same in float64, with loops. ∇exp(l − stop(l)) = ∇l, so the policy's part is −A·l here.
    model.double()
    plain.model.double()
    gain = normalised_gain(plain.stored.trie, plain.stored.gain)
    surrogate = kl_sum = torch.zeros((), dtype=torch.float64)
    for row, group in zip(ROWS[:3], leaves, strict=False):
        prompt = plain.prompt(split.history(row))
        is_target = group == trie.leaf_of_item[split.targets[row]]
        rewards = rank(is_target[None])[0]
        advantage = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for leaf, a in zip(group, advantage, strict=True):
            path = plain.paths[trie.item_order[trie.first_item[leaf]]]
            item = trie.item_order[trie.first_item[leaf]]
            begin = plain.stored.catalogue.offsets[item]
            own = logits_behind(model, prompt, path)
            other = logits_behind(plain.model, prompt, path).detach()
            policy, kl = 0, 0
            for t, token in enumerate(path):
                legal = plain.siblings(path, t) if softmax == "masked" else list(range(257))
                l = own[t, legal].log_softmax(0)[legal.index(token)]  # noqa: E741
                difference = other[t, legal].log_softmax(0)[legal.index(token)] - l
                share = gain[plain.stored.token_node[begin + t]] if credit == "gain" else 1.0
                policy = policy - a * share * l
                kl = kl + difference.exp() - difference - 1
            surrogate = surrogate + policy / len(path) / 21
            kl_sum = kl_sum + kl / len(path)
    assert terms.numerators[1].item() == pytest.approx(kl_sum.item(), rel=1e-4)
    wanted = gradient(model, surrogate + 0.3 * kl_sum / 21)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_group_knows_its_target_by_its_path(tmp_path):
    """Items 2 and 3 share a path: the target stands for it, and a masked row counts for nothing."""
    training, _ = begun(tmp_path, "--group_size", "9")
    groups, leaves = groups_of(training)
    items = groups.branches.item_ids.view(4, 9).numpy()
    targets = training.collator.split.targets[ROWS[:3]]
    assert groups.holds_target.tolist() == [True, True, True, False]  # 9 paths: the whole catalogue
    assert all(target in row for target, row in zip(targets, items, strict=False))
    assert (items[3] == MASKED_ROW).all() and (groups.advantage[3] == 0).all()
    torch.testing.assert_close(groups.advantage[:3].sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    assert len(set(leaves[0])) == 9


REWARDS = """
import math
def by_name(history, target, item):
    assert all(isinstance(name, str) for name in [*history, target, item])
    return 2.0 if item == target else -float(len(history))
def nan(history, target, item): return math.nan
def text(history, target, item): return "1.0"
def several(history, target, item): return [1.0, 2.0]
def fails(history, target, item): raise RuntimeError("boom")
def ends(history, target, item): raise SystemExit(3)
def few(history, item): return 1
def huge(history, target, item): return 1e300
def late(history, target, item): return None if item == "5" else 1
number = 3
"""


def test_a_function_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    training, _ = begun(tmp_path, "--reward", "my_rewards:by_name")
    split, items = training.collator.split, np.array([[8, 5], [3, 4]])
    rewards = training.reward(split, np.array([0, 10]), items)
    lengths = [len(split.history(row)) for row in (0, 10)]
    expected = [
        [2.0 if item == split.targets[row] else -float(length) for item in group]
        for row, length, group in zip((0, 10), lengths, items.tolist(), strict=True)
    ]
    assert rewards.tolist() == expected

    for name, message in {
        "my_rewards:nan": "returned nan",
        "my_rewards:text": r"returned '1.0' \(str\)",
        "my_rewards:several": r"returned \[1.0, 2.0\] \(list\)",
        "my_rewards:huge": r"returned 1e\+300 .* between −1,000,000 and 1,000,000",
        "my_rewards:fails": r"fails for the target '.*' and the item '.*': RuntimeError: boom \(.*"
        r"my_rewards.py, line 9\)",
        "my_rewards:ends": "SystemExit: 3",
        "my_rewards:few": "TypeError: few() takes 2".replace("(", r"\(").replace(")", r"\)"),
        "broken:f": "cannot be imported: SyntaxError",
        ":f": "unknown",
        "my_rewards:number": "it is a int, not a function",
        "my_rewards:nothing": "no attribute 'nothing'",
        "no_such_module:f": "No module named",
        "rnak": "did you mean 'rank'",
    }.items():
        with pytest.raises(UsageError, match=message):
            training_of(tmp_path, "--reward", name)

    # It is tried on one row before the training; later mistakes are told too.
    late = training_of(tmp_path, "--reward", "my_rewards:late")
    with pytest.raises(UsageError, match="returned None .* and the item '5'"):
        late.reward(split, np.array([0]), np.array([[4, 5]]))


def test_a_run_that_goes_on_has_the_model_and_the_reference_that_it_began_with(tmp_path):
    training = training_of(tmp_path)
    (tmp_path / "new").mkdir()
    training.claim(is_begun=False)
    training.claim(is_begun=True)
    weights = tmp_path / "run" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match=r"began with other weights; .*: model, reference"):
        training.claim(is_begun=True)
    training.claim(is_begun=False)  # nothing was trained yet
    training.claim(is_begun=True)


@pytest.mark.parametrize(("flags", "message"), [
    (["--group_size", "10"], "--group_size 10: the catalogue has 9 items"),
    (["--group_size", "1"], "--group_size must be at least 2"),
    (["--negatives", "sibling"], "--negatives has no effect with --objective grpo"),
    (["--objective", "dpo"], "--group_size has no effect with --objective dpo"),
])  # fmt: skip
def test_flags_that_cannot_work(tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        training_of(tmp_path, *flags)


def test_what_an_encoder_decoder_cannot_do_is_refused_before_its_weights_are_read(tmp_path):
    with_t5(tmp_path)
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"never read")
    for flags, message in (
        (["--lora_r", "4"], "--lora_r adapts causal LMs"),
        (["--packing", "tree"], "--packing tree: models of type t5 cannot be trained on row trees"),
        (["--reference", "adapter-off"], "there is no adapter to switch off"),
    ):
        with pytest.raises(UsageError, match=message):
            training_of(tmp_path, *flags)

    config = transformers.BartConfig(vocab_size=tiny_run.EOS + 1, d_model=8)
    config.save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(
        UsageError, match="model of type bart: the encoder-decoder known here is t5"
    ):
        training_of(tmp_path)


def test_the_log_splits_the_time_of_a_step(tmp_path):
    training, _ = begun(tmp_path, "--global_batch_size", "12")
    assert len(next(training.micro_batches(0))) == 4 and training.rollout_seconds > 0
    sums = SimpleNamespace(
        steps=2,
        objective=0.0,
        numerators=np.zeros(2),
        normalisers=np.full(2, 24.0),
        statistics={name: np.array(6.0) for name in (
            "reward", "rows", "holds_target", "flat", "tokens", "input_tokens")},
    )  # fmt: skip
    training.load_state_dict({"rollout_seconds": 3.0})
    assert training.state_dict() == {"rollout_seconds": 3.0}
    values = training.values(sums, seconds=10.0)
    assert values["speed/rollout_seconds"] == 1.5 and values["speed/update_seconds"] == 3.5
    assert training.rollout_seconds == 0 and values["train/groups_with_target"] == 1.0
