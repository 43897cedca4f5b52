"""Every objective against plain loops over items and prefixes of small catalogues; its flags."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_catalogue import batch_of_tokens, context_of

from igd_ds.config.options import parse
from igd_ds.contracts import Logits, LossTerms
from igd_ds.errors import UsageError
from igd_ds.items import embeddings
from igd_ds.objectives import OBJECTIVES, ObjectiveOptions, options_of, users_of
from igd_ds.objectives.front_greater import dispersion_reductions
from igd_ds.objectives.multi_target import scaled_nll
from igd_ds.train_config import TrainConfig

EOS = 0
# Items that share prefixes; one is cold (5 tokens), two have the same path, one is EOS alone.
TEXT = [[1, 2, 0], [1, 3, 4, 0], [1, 3, 5, 0], [7, 8, 9, 9, 0], [1, 2, 0], [6, 0], [0]]
SETTINGS = {
    "igd_beta": 0.2,
    "position_floor": 0.3,
    "cft_lambda": 0.7,
    "rank_tau": 0.6,
    "frequency_beta": 0.9,
    "msl_tau": "4.5",
}


def small_catalogues():
    """Return paths and counts of three kinds of items.

    Text; three codes of four each, some cold and some with the same codes; random lengths.
    """
    random = np.random.default_rng(0)
    codes = [
        [1 + int(c) + 4 * level for level, c in enumerate(row)] + [EOS]
        for row in random.integers(0, 4, (40, 3))
    ]
    ragged = [[*map(int, random.integers(1, 5, random.integers(0, 6))), EOS] for _ in range(60)]
    assert len(set(map(tuple, codes))) < 40 and len(set(map(tuple, ragged))) < 60
    return {
        "text": (TEXT, np.array([3, 1, 2, 0, 1, 4, 2])),
        "codes": (codes, random.integers(0, 3, 40)),
        "ragged": (ragged, random.integers(0, 3, 60)),
    }


def make(name, total_steps=10, **settings):
    """Return an objective; flags that are not given have the values of SETTINGS."""
    given = {"item_embeddings": "none.npy"} | SETTINGS | settings
    own = {field.name for field in options_of(name)}
    options = OBJECTIVES[name].Options(**{k: v for k, v in given.items() if k in own})
    return OBJECTIVES[name](options, total_steps)


class Brute:
    """The definitions of the papers, item by item and prefix by prefix."""

    def __init__(self, paths, counts, vectors=None, entropy="prior"):
        self.paths = paths
        self.counts = [int(c) for c in counts]
        self.vectors = vectors
        self.kind = entropy

    def under(self, prefix):
        return [i for i, path in enumerate(self.paths) if path[: len(prefix)] == list(prefix)]

    def mass(self, prefix):
        return sum(self.counts[i] for i in self.under(prefix))

    def entropy(self, prefix):
        leaves = {}
        for i in self.under(prefix):
            leaves[tuple(self.paths[i])] = leaves.get(tuple(self.paths[i]), 0) + self.counts[i]
        whole = sum(self.counts) if self.kind == "prior" else max(self.mass(prefix), 1)
        return -sum(c / whole * math.log(c / whole) for c in leaves.values() if c)

    def gain(self, path, t):
        if self.mass(path[: t + 1]) == self.mass(path[:t]):
            return 0.0
        return self.entropy(path[:t]) - self.entropy(path[: t + 1])

    def igd(self):
        return [
            [0.2 if self.mass(p[: t + 1]) == self.mass(p[:t]) else 1.0 for t in range(len(p))]
            for p in self.paths
        ]

    def igd_linear(self):
        trained = [(p, t) for p in self.paths for t in range(len(p)) if self.mass(p[: t + 1]) > 0]
        largest = max(self.gain(p, t) for p, t in trained)
        return [
            [max(0.2 + 0.8 * self.gain(p, t) / largest, 0.0) for t in range(len(p))]
            for p in self.paths
        ]

    def uniform(self):
        return [[1.0] * len(p) for p in self.paths]

    def position(self):
        return [
            [1 - 0.7 * t / (len(p) - 1) if len(p) > 1 else 1.0 for t in range(len(p))]
            for p in self.paths
        ]

    def frequency(self):
        n = {}
        for path, count in zip(self.paths, self.counts, strict=True):
            for token in path:
                n[token] = n.get(token, 0) + count
        raw = [
            [(1 - 0.9) / (1 - 0.9 ** max(n[token], 1)) for token in path[:-1]]
            for path in self.paths
        ]
        return [[w * len(ws) / sum(ws) for w in ws] + [1.0] for ws in raw]

    def dispersion(self, k):
        """Return μ_k: items that share their first k tokens are a group; ended items are alone."""
        total = 0.0
        for i, path in enumerate(self.paths):
            group = self.vectors[self.under(path[:k])] if k < len(path) else self.vectors[[i]]
            total += ((group - group.mean(0)) ** 2).sum(1).mean()
        return total / len(self.paths)

    def reductions(self):
        mu = [self.dispersion(k) for k in range(max(map(len, self.paths)))]
        return [
            max(a - b, 0.0) if abs(a - b) > 1e-9 else 0.0 for a, b in zip(mu, mu[1:], strict=False)
        ]

    def front_greater(self):
        reductions, weights = self.reductions(), []
        for path in self.paths:
            own = reductions[: len(path) - 1]
            weights.append([w * len(own) / sum(own) for w in own] if sum(own) else [1.0] * len(own))
            weights[-1].append(1.0)
        return weights

    def msl(self):
        """Return 0 where only one token is legal, else the weight of igd."""
        weights = []
        for path, of_igd in zip(self.paths, self.igd(), strict=True):
            legal = [{self.paths[i][t] for i in self.under(path[:t])} for t in range(len(path))]
            pairs = zip(legal, of_igd, strict=True)
            weights.append([w if len(tokens) > 1 else 0.0 for tokens, w in pairs])
        return weights


TARGETS = {
    "uniform": ["uniform"],
    "igd": ["igd"],
    "igd-linear": ["igd_linear"],
    "position": ["position"],
    "cft": ["position"],
    "rank": ["uniform"],
    "front-greater": ["front_greater"],
    "frequency": ["frequency"],
    "multi-target": ["front_greater", "frequency", "uniform"],
    "msl": ["msl"],
}


def vectors_of(num_items):
    return np.random.default_rng(1).standard_normal((num_items, 5)).astype(np.float32) + 3


def save_vectors(folder, vectors) -> str:
    np.save(folder / "vectors.npy", vectors)
    return str(folder / "vectors.npy")


def dataset_of(folder, num_items, prefix=""):
    """Write the items.parquet of a dataset folder; source ids are the numbers behind `prefix`."""
    items = pa.table({
        "item_id": range(num_items),
        "source_id": [f"{prefix}{item}" for item in range(num_items)],
        "title": [None] * num_items,
    })  # fmt: skip
    pq.write_table(items, folder / "items.parquet")
    return items


@pytest.mark.parametrize("catalogue", small_catalogues())
@pytest.mark.parametrize("name", OBJECTIVES)
def test_token_weights_match_plain_loops(name, catalogue, tmp_path):
    paths, counts = small_catalogues()[catalogue]
    vectors = vectors_of(len(paths))
    brute = Brute(paths, counts, vectors.astype(np.float64))
    objective = make(name, item_embeddings=save_vectors(tmp_path, vectors))
    assert len(TARGETS[name]) == len(objective.targets)

    dataset_of(tmp_path, len(paths))
    found = objective.weights(context_of(paths, counts, dataset=tmp_path))
    assert found.dtype == np.float32 and found.shape[1] == len(TARGETS[name])
    expected = [np.concatenate(getattr(brute, target)()) for target in TARGETS[name]]
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=2e-6, atol=1e-7)


def test_igd_linear_floors_a_negative_gain():
    """The `conditional` entropy can rise along a path; the weight stays at least 0."""
    for paths, counts in small_catalogues().values():
        found = make("igd-linear").weights(context_of(paths, counts, "conditional"))[:, 0]
        expected = Brute(paths, counts, entropy="conditional").igd_linear()
        np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-6, atol=1e-7)


def test_beta_one_is_uniform():
    assert (make("igd", igd_beta=1.0).weights(context_of(*small_catalogues()["text"])) == 1).all()


def test_a_catalogue_without_any_gain():
    """With one trained item every token is forced and IG_max is 0: the linear weight is β."""
    found = make("igd-linear").weights(context_of([[1, 2, 0]], np.array([5])))
    assert found[:, 0].tolist() == pytest.approx([0.2] * 3)


# ---- front-greater and frequency ----


def test_reductions_do_not_depend_on_the_chunking(monkeypatch):
    paths, counts = small_catalogues()["ragged"]
    trie = context_of(paths, counts).stored.trie
    vectors = vectors_of(len(paths)).astype(np.float16)  # half precision is taken as it is
    whole = dispersion_reductions(trie, vectors)
    monkeypatch.setattr("igd_ds.objectives.front_greater.CHUNK_BYTES", 2 * 8 * len(paths))
    np.testing.assert_allclose(dispersion_reductions(trie, vectors), whole, rtol=1e-12)
    np.testing.assert_allclose(
        whole, Brute(paths, counts, vectors.astype(np.float64)).reductions(), rtol=1e-9, atol=1e-12
    )


def test_a_level_that_splits_nothing_gets_nothing(tmp_path):
    """Forced levels give exactly 0; an item of forced tokens keeps weight 1, no scaled noise."""
    paths = [[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 0]]
    dataset_of(tmp_path, 3)
    context = context_of(paths, np.array([1, 1, 0]), dataset=tmp_path)
    vectors = vectors_of(3) * 1e3 + 1 / 3
    assert dispersion_reductions(context.stored.trie, vectors)[:2].tolist() == [0, 0]
    objective = make("front-greater", item_embeddings=save_vectors(tmp_path, vectors))
    assert objective.weights(context)[:, 0].tolist() == [0, 0, 3, 1, 0, 0, 3, 1, 1, 1, 1]


def test_embeddings_of_a_folder_must_be_the_datasets(tmp_path):
    """A folder of `igd embed` knows its items; another order, or other items, is an error."""
    paths, counts = small_catalogues()["codes"]
    items = dataset_of(tmp_path, 40, "B")
    np.save(tmp_path / "embeddings.npy", vectors_of(40))
    context = context_of(paths, counts, dataset=tmp_path)
    objective = make("front-greater", item_embeddings=str(tmp_path))
    with pytest.raises(UsageError, match="no folder of embeddings"):
        objective.weights(context)

    (tmp_path / "embeddings.json").write_text(
        f'{{"items": "{embeddings.items_fingerprint(items)}"}}'
    )
    of_folder = objective.weights(context)

    # A bare array of the same vectors names no order.
    of_file = make("front-greater", item_embeddings=save_vectors(tmp_path, vectors_of(40)))
    message = "whose order its rows are in, and item 0 of this dataset is the source's 'B0'"
    with pytest.raises(UsageError, match=message):
        of_file.weights(context)
    (tmp_path / "numbered").mkdir()
    dataset_of(tmp_path / "numbered", 40)
    numbered = context_of(paths, counts, dataset=tmp_path / "numbered")
    np.testing.assert_array_equal(of_folder, of_file.weights(numbered))

    pq.write_table(items.take(list(reversed(range(40)))), tmp_path / "items.parquet")
    with pytest.raises(UsageError, match="in another order"):
        objective.weights(context)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v[:-1], "6 rows for 7 items"),
        (lambda v: v[:, 0], "need a float array"),
        (lambda v: np.where(np.arange(7)[:, None] == 4, np.nan, v), "row 4 holds NaN"),
        (lambda v: v * np.inf, "NaN or infinity"),
        (lambda v: np.ones_like(v), "all 7 rows are equal"),
    ],
)
def test_bad_embeddings(tmp_path, spoil, message):
    objective = make("front-greater", item_embeddings=save_vectors(tmp_path, spoil(vectors_of(7))))
    dataset_of(tmp_path, 7)
    with pytest.raises(UsageError, match=message):
        objective.weights(context_of(*small_catalogues()["text"], dataset=tmp_path))


def frequency_ratio(b, counts):
    """Return the first token's weight over the second's, which occur as often as `counts` says."""
    paths = [[1, 2, 0], [1, 3, 0], [4, 2, 0]]
    context = context_of(paths, np.array([0, counts[0], counts[1]]))
    w = make("frequency", frequency_beta=b).weights(context)
    return float(w[0, 0]) / float(w[1, 0])


def test_frequency_at_the_ends_of_its_range():
    assert frequency_ratio(0.0, (7, 3)) == 1
    # b → 1: one over the count.
    assert frequency_ratio(1 - 1e-12, (7, 21)) == pytest.approx(3, rel=1e-6)
    # E_n has saturated.
    assert frequency_ratio(0.99, (500, 10**9)) == pytest.approx(1, abs=0.01)


# ---- losses of one token ----

# All five tokens of the vocabulary may come first, so that msl's softmax runs over all of it.
FIRST_TOKENS = [[0], [1, 0], [2, 0], [3, 0], [4, 0]]


def logits_and_targets(rows=6, vocabulary=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f, f0 = torch.randn(2, rows, vocabulary, generator=generator).double() * 3
    return f, f0, torch.randint(vocabulary, (rows,), generator=generator)


def context_on(device):
    """Return the context of FIRST_TOKENS, its trie on a device."""
    context = context_of(FIRST_TOKENS, np.ones(5, np.int64))
    return dataclasses.replace(context, trie=context.trie.to(device))


def logits_on(device, objective, f, f0):
    """Return what an objective needs of f and f0, on a device."""
    return Logits(f.to(device), f0.to(device) if objective.needs_null else None)


def terms_of(name, f, f0, targets, device="cpu", **settings):
    """Return the LossTerms of tokens that stand at the root of FIRST_TOKENS' trie, on the CPU."""
    objective = make(name, **settings)
    batch = batch_of_tokens(targets, node=1 + targets)
    if len(objective.targets) > 1:
        batch = dataclasses.replace(batch, weights=torch.ones(len(targets), 3))
    logits = logits_on(device, objective, f, f0)
    return on_cpu(objective.loss(batch.to(device), logits, context_on(device)))


def on_cpu(terms):
    """Return LossTerms with all their tensors on the CPU."""
    return LossTerms(
        terms.numerators.cpu(),
        terms.normalisers.cpu(),
        terms.nll.cpu(),
        {name: value.cpu() for name, value in terms.statistics.items()},
    )


def nll(f, y):
    """Return −log softmax(f)[y] of one row, in Python."""
    return math.log(sum(math.exp(v) for v in f)) - f[y]


def row_losses(name, f, f0, y):
    return {
        "rank": nll([v / 0.6 for v in f], y),
        "cft": nll(f, y) + 0.7 * nll([a - b for a, b in zip(f, f0, strict=True)], y),
        "msl": 4.5 * nll([v / 4.5 for v in f], y),
    }.get(name, nll(f, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_token_losses_match_plain_loops(name, dtype, device):
    f, f0, targets = logits_and_targets()
    f, f0 = f.to(dtype), f0.to(dtype)
    terms = terms_of(name, f, f0, targets, device)
    assert terms.numerators.dtype == terms.nll.dtype == torch.float32  # from logits of any type

    rows = list(zip(f.tolist(), f0.tolist(), targets.tolist(), strict=True))
    expected = [row_losses(name, *row) for row in rows]
    if name == "multi-target":  # its weights are 1 for each of the three targets
        expected = [sum(expected)] * 3
    np.testing.assert_allclose(terms.numerators.detach(), expected, rtol=1e-5)

    # What is logged is the NLL without weights, λ and τ; that of msl is of its own softmax.
    scale = 4.5 if name == "msl" else 1.0
    expected = [nll([v / scale for v in row], y) for row, _, y in rows]
    np.testing.assert_allclose(terms.nll, expected, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_multiply_losses_and_sum_to_the_normaliser(name, device):
    """N = Σ w·loss and Ω = Σ w per target, and the step knows Ω before the forward pass."""
    f, f0, targets = logits_and_targets()
    objective = make(name)
    weights = np.random.default_rng(2).random((6, len(objective.targets))).astype(np.float32)
    batch = batch_of_tokens(targets, weights, 1 + targets)
    logits = logits_on(device, objective, f.float(), f0.float())

    terms = on_cpu(objective.loss(batch.to(device), logits, context_on(device)))
    rows = zip(f.tolist(), f0.tolist(), targets.tolist(), strict=True)
    losses = np.array([row_losses(name, *row) for row in rows])
    np.testing.assert_allclose(terms.numerators, losses @ weights, rtol=1e-5)
    np.testing.assert_allclose(terms.normalisers, weights.sum(0), rtol=1e-6)
    omega = objective.normalisers(batch)
    assert omega.dtype == torch.float64
    np.testing.assert_allclose(omega, weights.sum(0, dtype=np.float64), rtol=1e-12)


def test_cft_sends_its_gradient_through_both_passes():
    """∂/∂f₀ = −λ (softmax(f − f₀) − onehot); ∂/∂f is that of the plain loss plus its opposite."""
    f, f0, targets = logits_and_targets()
    f, f0 = f.float().requires_grad_(), f0.float().requires_grad_()
    terms_of("cft", f, f0, targets).numerators.sum().backward()
    onehot = torch.nn.functional.one_hot(targets, f.shape[1])
    with torch.no_grad():
        through_null = -0.7 * ((f - f0).softmax(-1) - onehot)
        torch.testing.assert_close(f0.grad, through_null)
        torch.testing.assert_close(f.grad, f.softmax(-1) - onehot - through_null)


def test_scaled_nll_and_its_slope():
    """CE on α_j·logits by a plain loop; the slope is autograd's by α. α = 0 gives log V."""
    f, _, targets = logits_and_targets()
    f = f.float().requires_grad_()
    alpha = torch.tensor([0.7, 0.3, 0.0])
    losses, slopes = scaled_nll(f, targets, alpha)

    rows = list(zip(f.tolist(), targets.tolist(), strict=True))
    expected = [[nll([a * v for v in row], y) for a in alpha.tolist()] for row, y in rows]
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-5)
    assert losses.requires_grad and not slopes.requires_grad
    for j, a in enumerate(alpha):
        leaf = a.clone().expand(len(f)).clone().requires_grad_()
        torch.nn.functional.cross_entropy(
            leaf[:, None] * f.detach(), targets, reduction="sum"
        ).backward()
        torch.testing.assert_close(slopes[:, j], leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [*OBJECTIVES, "multi-target logits", "msl adaptive"])
def test_an_empty_micro_batch_keeps_its_graph(form):
    """A batch of masked rows has no labelled token; `backward` must still work."""
    name, _, rest = form.partition(" ")
    settings = {"logits": {"mixing_form": "logits"}, "adaptive": {"msl_tau": "adaptive"}}
    objective = make(name, **settings.get(rest, {}))
    objective.coefficients(0)
    f = torch.zeros(0, 5, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = batch_of_tokens(nothing, torch.zeros(0, len(objective.targets)), nothing)

    logits = logits_on("cpu", objective, f, f)
    terms = objective.loss(batch, logits, context_on("cpu"))
    terms.numerators.sum().backward()
    assert terms.numerators.tolist() == terms.normalisers.tolist() == [0] * len(objective.targets)
    assert all(torch.isfinite(value).all() for value in terms.statistics.values())


# ---- flags ----

REQUIRED = ["--ds_config", "c", "--dataset", "d", "--output_dir", "o", "--model_name_or_path", "m"]


def config_of(objective, tmp_path, **options):
    """Return a configuration with the flags that `objective` needs, and `options`; None drops."""
    (tmp_path / "vectors.npy").touch()
    values = SETTINGS | {"item_embeddings": tmp_path / "vectors.npy"}
    required = [f.name for f in options_of(objective) if f.default is dataclasses.MISSING]
    flags = {"objective": objective} | {name: values[name] for name in required} | options
    words = [[f"--{k}", str(v)] for k, v in flags.items() if v is not None]
    return parse(TrainConfig, [*REQUIRED, *sum(words, [])])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_flags_of_each_objective(name, tmp_path):
    options = config_of(name, tmp_path).objective_options()
    assert type(options) is OBJECTIVES[name].Options
    for field in options_of(name):
        if field.default is dataclasses.MISSING:
            with pytest.raises(UsageError, match=f"--objective {name} needs --{field.name}"):
                config_of(name, tmp_path, **{field.name: None})

    own = {field.name for field in options_of(name)}
    for field in dataclasses.fields(ObjectiveOptions):
        if field.name not in own:
            value = (*field.metadata["choices"], 0.5)[0]
            message = f"--{field.name} {value} has no effect with --objective {name}: drop it, or "
            message += f"use {', '.join(users_of(field.name))}"
            with pytest.raises(UsageError, match=message):
                config_of(name, tmp_path, **{field.name: value})


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("igd", {"igd_beta": 1.2}, r"--igd_beta must lie in \[0, 1\], found 1.2"),
        ("position", {"position_floor": -0.1}, "--position_floor must lie in"),
        ("cft", {"cft_lambda": -0.1}, "--cft_lambda must not be negative, and finite, found -0.1"),
        ("cft", {"position_floor": 1.1}, "--position_floor must lie in"),
        ("rank", {"rank_tau": 0.0}, "--rank_tau must be positive and finite"),
        ("frequency", {"frequency_beta": 1.0}, r"--frequency_beta must lie in \[0, 1\), found 1.0"),
        ("frequency", {"frequency_beta": math.nan}, "--frequency_beta must lie"),
        (
            "front-greater",
            {"item_embeddings": "/no/such.npy"},
            "--item_embeddings must name an existing .*, found /no/such.npy",
        ),
        ("multi-target", {"normalization": "per_batch"}, "use --normalization global"),
        ("multi-target", {"curriculum_c": 0.0}, "--curriculum_c must be positive and finite"),
        (
            "multi-target",
            {"curriculum_cT": math.inf},
            "--curriculum_cT must be positive and finite",
        ),
        ("multi-target", {"lambda_lr": -1.0}, "--lambda_lr must be positive and finite"),
        ("multi-target", {"curriculum_c": 1e-5, "curriculum_cT": 1.0}, "not both"),
        (
            "multi-target",
            {"mixing": "fg-ce", "curriculum_cT": 1.0},
            "--curriculum_cT 1.0 has no effect with --mixing fg-ce",
        ),
        (
            "multi-target",
            {"mixing": "fg-ce-fr", "mixing_regularizer": "kendall"},
            "--mixing_regularizer kendall has no effect",
        ),
        (
            "msl",
            {"msl_tau": "adaptiv"},
            "--msl_tau must be a positive, finite number or 'adaptive'",
        ),
        ("msl", {"msl_tau": 0}, "--msl_tau must be .*, found 0"),
        ("msl", {"msl_tau": "inf"}, "--msl_tau must be .*, found inf"),
        ("msl", {"igd_beta": -0.1}, r"--igd_beta must lie in \[0, 1\], found -0.1"),
    ],
)
def test_flags_that_no_run_can_use(objective, options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        config_of(objective, tmp_path, **options)


def test_the_help_of_a_shared_flag_names_all_objectives_that_use_it():
    shared = {field.name: field for field in dataclasses.fields(ObjectiveOptions)}
    assert users_of("igd_beta") == ["igd", "igd-linear", "msl"]
    assert shared["igd_beta"].metadata["help"].endswith("(igd, igd-linear, msl)")
    assert shared["frequency_beta"].metadata["help"].endswith("(frequency, multi-target)")
    assert all(field.default is None for field in shared.values())
