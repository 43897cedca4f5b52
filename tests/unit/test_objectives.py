"""Every weighting against plain loops over the items and prefixes of small catalogues of both kinds, and its flags."""

import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from igd_ds.items import decisiveness, embeddings
from igd_ds.items.trie import TokenTrie
from igd_ds.objectives import WEIGHTINGS, check_flags
from igd_ds.objectives import mixing as mixing_module
from igd_ds.objectives.front_greater import dispersion_reductions
from igd_ds.objectives.losses import scaled_nll

EOS = 0
# items share prefixes, one is cold (5 tokens), two share a path, one is EOS alone
TEXT = [[1, 2, 0], [1, 3, 4, 0], [1, 3, 5, 0], [7, 8, 9, 9, 0], [1, 2, 0], [6, 0], [0]]
SETTINGS = {
    "igd_beta": 0.2,
    "position_floor": 0.3,
    "cft_lambda": 0.7,
    "rank_tau": 0.6,
    "frequency_beta": 0.9,
}
OPTIONS = dict.fromkeys((*SETTINGS, "item_embeddings", *WEIGHTINGS["multi-target"].optional))


def small_catalogues():
    """Paths and counts: text items; three codes of four each, some items cold and some with the same codes; random lengths."""
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


def store(paths, counts, entropy="prior"):
    token_ids = np.concatenate(paths).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in paths])])
    trie = TokenTrie.build(token_ids, offsets, counts)
    gain = decisiveness.information_gain(trie, entropy).astype(np.float32)
    return SimpleNamespace(
        catalogue=SimpleNamespace(token_ids=token_ids, offsets=offsets), trie=trie, gain=gain
    )


class Brute:
    """The definitions of METHOD 1 and 2, item by item and prefix by prefix."""

    def __init__(self, paths, counts, vectors=None, entropy="prior"):
        self.paths, self.counts, self.vectors, self.kind = (
            paths,
            [int(c) for c in counts],
            vectors,
            entropy,
        )

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
        """μ_k: items that share their first k tokens are a group, and one that has ended is alone."""
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


TARGETS = {"uniform": ["uniform"], "igd": ["igd"], "igd-linear": ["igd_linear"], "position": ["position"], "cft": ["position"],
           "rank": ["uniform"], "front-greater": ["front_greater"], "frequency": ["frequency"],
           "multi-target": ["front_greater", "frequency", "uniform"]}  # fmt: skip


def vectors_of(num_items):
    return np.random.default_rng(1).standard_normal((num_items, 5)).astype(np.float32) + 3


def save_vectors(folder, vectors):
    np.save(folder / "vectors.npy", vectors)
    return SimpleNamespace(**SETTINGS, item_embeddings=str(folder / "vectors.npy"))


@pytest.mark.parametrize("catalogue", small_catalogues())
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_token_weights_match_plain_loops(name, catalogue, tmp_path):
    paths, counts = small_catalogues()[catalogue]
    vectors = vectors_of(len(paths))
    config, brute = (
        save_vectors(tmp_path, vectors),
        Brute(paths, counts, vectors.astype(np.float64)),
    )
    assert len(TARGETS[name]) == len(WEIGHTINGS[name].targets)
    for target, expected in zip(WEIGHTINGS[name].targets, TARGETS[name], strict=True):
        found = target(store(paths, counts), config)
        assert found.dtype == np.float32
        np.testing.assert_allclose(
            found, np.concatenate(getattr(brute, expected)()), rtol=2e-6, atol=1e-7
        )


def test_igd_linear_floors_a_negative_gain():
    """The `conditional` entropy can rise along a path; the weight stays at least 0."""
    config = SimpleNamespace(**SETTINGS)
    for paths, counts in small_catalogues().values():
        found = WEIGHTINGS["igd-linear"].targets[0](store(paths, counts, "conditional"), config)
        expected = Brute(paths, counts, entropy="conditional").igd_linear()
        np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-6, atol=1e-7)


def test_beta_one_is_uniform():
    config = SimpleNamespace(igd_beta=1.0)
    assert (WEIGHTINGS["igd"].targets[0](store(*small_catalogues()["text"]), config) == 1).all()


def test_a_catalogue_without_any_gain():
    """One trained item: every token is forced, IG_max is 0, and the linear weight is β everywhere."""
    found = WEIGHTINGS["igd-linear"].targets[0](
        store([[1, 2, 0]], np.array([5])), SimpleNamespace(igd_beta=0.2)
    )
    assert found.tolist() == pytest.approx([0.2] * 3)


# ---- front-greater and frequency ----


def test_reductions_do_not_depend_on_the_chunking(monkeypatch):
    paths, counts = small_catalogues()["ragged"]
    trie, vectors = (
        store(paths, counts).trie,
        vectors_of(len(paths)).astype(np.float16),
    )  # half precision comes as it is
    whole = dispersion_reductions(trie, vectors)
    monkeypatch.setattr("igd_ds.objectives.front_greater.CHUNK_BYTES", 2 * 8 * len(paths))
    np.testing.assert_allclose(dispersion_reductions(trie, vectors), whole, rtol=1e-12)
    np.testing.assert_allclose(
        whole, Brute(paths, counts, vectors.astype(np.float64)).reductions(), rtol=1e-9, atol=1e-12
    )


def test_a_level_that_splits_nothing_gets_nothing(tmp_path):
    """Forced levels give exactly 0; an item with forced tokens alone keeps weight 1, not rounding noise scaled up."""
    paths = [[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 0]]
    data, vectors = store(paths, np.array([1, 1, 0])), vectors_of(3) * 1e3 + 1 / 3
    assert dispersion_reductions(data.trie, vectors)[:2].tolist() == [0, 0]
    found = WEIGHTINGS["front-greater"].targets[0](data, save_vectors(tmp_path, vectors))
    assert found.tolist() == [0, 0, 3, 1, 0, 0, 3, 1, 1, 1, 1]


def test_embeddings_of_a_folder_must_be_the_datasets(tmp_path):
    """A folder of igd_ds/commands/embed.py knows its items; another order, or other items, is an error."""
    paths, counts = small_catalogues()["codes"]
    items = pa.table(
        {"item_id": range(40), "source_id": [f"B{i}" for i in range(40)], "title": [None] * 40}
    )
    pq.write_table(items, tmp_path / "items.parquet")
    np.save(tmp_path / "embeddings.npy", vectors_of(40))
    config = SimpleNamespace(item_embeddings=str(tmp_path), dataset=str(tmp_path))
    target, data = WEIGHTINGS["front-greater"].targets[0], store(paths, counts)
    with pytest.raises(ValueError, match="no folder of embeddings"):
        target(data, config)
    (tmp_path / "embeddings.json").write_text(
        f'{{"items": "{embeddings.items_fingerprint(items)}"}}'
    )
    np.testing.assert_array_equal(
        target(data, config), target(data, save_vectors(tmp_path, vectors_of(40)))
    )
    pq.write_table(items.take(list(reversed(range(40)))), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match="in another order"):
        target(data, config)


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
    config = save_vectors(tmp_path, spoil(vectors_of(7)))
    with pytest.raises(ValueError, match=message):
        WEIGHTINGS["front-greater"].targets[0](store(*small_catalogues()["text"]), config)


def frequency_ratio(b, counts):
    """Weight of the first token over the second's, which occur as often as `counts` says."""
    paths = [[1, 2, 0], [1, 3, 0], [4, 2, 0]]
    config = SimpleNamespace(frequency_beta=b)
    w = WEIGHTINGS["frequency"].targets[0](
        store(paths, np.array([0, counts[0], counts[1]])), config
    )
    return float(w[0]) / float(w[1])


def test_frequency_at_the_ends_of_its_range():
    assert frequency_ratio(0.0, (7, 3)) == 1
    assert frequency_ratio(1 - 1e-12, (7, 21)) == pytest.approx(
        3, rel=1e-6
    )  # β → 1: one over the count
    assert frequency_ratio(0.99, (500, 10**9)) == pytest.approx(1, abs=0.01)  # E_n has saturated


# ---- losses of one token ----


def logits_and_targets(rows=6, vocabulary=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f, f0 = torch.randn(2, rows, vocabulary, generator=generator).double() * 3
    return f, f0, torch.randint(vocabulary, (rows,), generator=generator)


def nll(f, y):
    """−log softmax(f)[y] of one row, in Python."""
    return math.log(sum(math.exp(v) for v in f)) - f[y]


def row_losses(name, f, f0, y):
    return {
        "rank": nll([v / 0.6 for v in f], y),
        "cft": nll(f, y) + 0.7 * nll([a - b for a, b in zip(f, f0, strict=True)], y),
    }.get(name, nll(f, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_token_losses_match_plain_loops(name, dtype):
    f, f0, targets = logits_and_targets()
    f, f0 = f.to(dtype), f0.to(dtype)
    found = WEIGHTINGS[name].token_loss(
        f, targets, f0 if WEIGHTINGS[name].needs_null else None, SimpleNamespace(**SETTINGS)
    )
    assert found.dtype == torch.float32  # from logits of any type
    rows = zip(f.tolist(), f0.tolist(), targets.tolist(), strict=True)
    np.testing.assert_allclose(found, [row_losses(name, *row) for row in rows], rtol=1e-5)


def test_cft_sends_its_gradient_through_both_passes():
    """∂/∂f₀ = −λ (softmax(f − f₀) − onehot), and ∂/∂f is that of the plain loss plus its opposite."""
    f, f0, targets = (
        x.float().requires_grad_() if x.is_floating_point() else x for x in logits_and_targets()
    )
    WEIGHTINGS["cft"].token_loss(f, targets, f0, SimpleNamespace(**SETTINGS)).sum().backward()
    onehot = torch.nn.functional.one_hot(targets, f.shape[1])
    with torch.no_grad():
        through_null = -0.7 * ((f - f0).softmax(-1) - onehot)
        torch.testing.assert_close(f0.grad, through_null)
        torch.testing.assert_close(f.grad, f.softmax(-1) - onehot - through_null)


def test_scaled_nll_and_its_slope():
    """CE on α_j·logits by a plain loop; the slope is autograd's by α. At α = 0 the loss is log V."""
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


def test_an_empty_micro_batch_keeps_its_graph():
    """A batch of masked rows has no labelled token; `backward` must still work."""
    f = torch.zeros(0, 5, requires_grad=True)
    no_targets = torch.zeros(0, dtype=torch.int64)
    for weighting in WEIGHTINGS.values():
        weighting.token_loss(f, no_targets, f, SimpleNamespace(**SETTINGS)).sum().backward()
    scaled_nll(f, no_targets, torch.ones(3))[0].sum().backward()


# ---- flags ----


def config_of(weighting, tmp_path, **options):
    """The flags that `weighting` needs, and `options`."""
    (tmp_path / "vectors.npy").touch()
    needed = {
        name: (SETTINGS | {"item_embeddings": str(tmp_path / "vectors.npy")})[name]
        for name in WEIGHTINGS[weighting].flags
    }
    return SimpleNamespace(
        **{"weighting": weighting, "normalization": "global"} | OPTIONS | needed | options
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_flags_of_each_weighting(name, tmp_path):
    check_flags(config_of(name, tmp_path))
    for flag in WEIGHTINGS[name].flags:
        with pytest.raises(ValueError, match=f"--weighting {name} needs --{flag}"):
            check_flags(config_of(name, tmp_path, **{flag: None}))
    for flag in OPTIONS.keys() - {*WEIGHTINGS[name].flags, *WEIGHTINGS[name].optional}:
        with pytest.raises(
            ValueError,
            match=f"--{flag} 0.5 has no effect with --weighting {name}: drop it, or use ",
        ):
            check_flags(config_of(name, tmp_path, **{flag: 0.5}))


@pytest.mark.parametrize(
    ("weighting", "options", "message"),
    [
        ("igd", {"igd_beta": 1.2}, r"--igd_beta must lie in \[0, 1\], found 1.2"),
        ("position", {"position_floor": -0.1}, "--position_floor must lie in"),
        ("cft", {"cft_lambda": -0.1}, "--cft_lambda must not be negative, and finite, found -0.1"),
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
    ],
)
def test_flags_that_no_run_can_use(weighting, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_flags(config_of(weighting, tmp_path, **options))


def test_the_mixture_names_the_targets_of_multi_target():
    assert len(mixing_module.TARGETS) == len(WEIGHTINGS["multi-target"].targets)
    mixture = WEIGHTINGS["multi-target"].mixing(SimpleNamespace(**OPTIONS), 10)
    assert mixture.names == ("fg", "fr", "or") and len(mixture.coefficients(0)) == 3
