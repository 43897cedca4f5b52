"""Sequential recommenders: encoders, scan and losses against loops; counting ones by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from igd_ds.baselines import sequential
from igd_ds.baselines.counted import COUNTED
from igd_ds.baselines.linear_scan import linear_scan
from igd_ds.baselines.losses import LOSSES, Negatives
from igd_ds.baselines.models import HSTU, GRU4Rec, LRURec, SASRec
from igd_ds.baselines.sequential import SEQUENTIAL
from igd_ds.errors import UsageError

NUM_ITEMS, WIDTH, LONGEST = 11, 6, 9


def make(name, **settings):
    torch.manual_seed(0)
    form = SEQUENTIAL[name].form | {"hidden_size": WIDTH, "dropout": 0.3} | settings
    model = SEQUENTIAL[name].model(num_items=NUM_ITEMS, max_history=LONGEST, **form).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases too
    return model.eval()


def norm(module, x):
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + module.eps) * module.weight + module.bias


def looped_gru4rec(model: GRU4Rec, history):
    """Gates written out (Cho et al. 2014), item after item."""
    inputs = [model.items.weight[item] for item in history]
    for layer in range(model.gru.num_layers):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_in, w_hidden, b_in, b_hidden = (getattr(model.gru, f"{name}_l{layer}") for name in names)
        hidden, outputs = torch.zeros(WIDTH).double(), []
        for x in inputs:
            (r, z, n), (hr, hz, hn) = (
                (w_in @ x + b_in).split(WIDTH),
                (w_hidden @ hidden + b_hidden).split(WIDTH),
            )
            reset, update = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
            hidden = (1 - update) * torch.tanh(n + reset * hn) + update * hidden
            outputs.append(hidden)
        inputs = outputs
    return inputs


def looped_sasrec(model: SASRec, history):
    """Each position attends to itself and to the positions before it, head by head."""
    states = [
        model.items.weight[item] * math.sqrt(WIDTH) + model.positions.weight[place]
        for place, item in enumerate(history)
    ]

    for block in model.blocks:
        normalised = [norm(block.norms[0], x) for x in states]
        queries = [block.query(x) for x in normalised]
        keys, values = zip(*(block.key_value(x).split(WIDTH) for x in states), strict=True)
        size, after = WIDTH // block.num_heads, []
        for place, x in enumerate(normalised):
            heads = []
            for h in range(block.num_heads):
                mine = slice(h * size, (h + 1) * size)
                match = torch.stack(
                    [
                        queries[place][mine] @ keys[s][mine] / math.sqrt(size)
                        for s in range(place + 1)
                    ]
                )
                heads.append(sum(w * values[s][mine] for s, w in enumerate(match.softmax(0))))
            x = norm(block.norms[1], x + block.output(torch.cat(heads)))
            first, last = block.feed_forward[0], block.feed_forward[3]
            after.append(x + last(torch.relu(first(x))))
        states = after
    return [norm(model.norm, x) for x in states]


def looped_lrurec(model: LRURec, history):
    """The recurrence of the paper in complex numbers, one item at a time."""
    states = [norm(model.norm, model.items.weight[item]) for item in history]
    for block in model.blocks:
        nu, theta, gamma = block.recurrence.exp()
        decay, hidden, after = (
            torch.exp(torch.complex(-nu, theta)),
            torch.zeros(2 * WIDTH, dtype=torch.cdouble),
            [],
        )
        w_in = torch.complex(block.input.weight[0::2], block.input.weight[1::2])
        b_in = torch.complex(block.input.bias[0::2], block.input.bias[1::2])
        w_out = torch.complex(block.output.weight[:, 0::2], -block.output.weight[:, 1::2])
        for x in states:
            hidden = decay * hidden + gamma * (w_in @ x.to(torch.cdouble) + b_in)
            x = norm(block.norms[0], x + (w_out @ hidden).real + block.output.bias)
            first, last = block.feed_forward[0], block.feed_forward[3]
            after.append(norm(block.norms[1], x + last(F.gelu(first(x)))))
        states = after
    return states


def looped_hstu(model: HSTU, history):
    """Eq. 1 to 3 of the paper, position by position and head by head."""
    states = [
        model.items.weight[item] * math.sqrt(WIDTH) + model.positions.weight[place]
        for place, item in enumerate(history)
    ]

    def standardised(x, eps=1e-6):
        centred = x - x.mean()
        return centred / torch.sqrt((centred**2).mean() + eps)

    def silu(x):
        return x / (1 + torch.exp(-x))

    for block in model.blocks:
        size, after = WIDTH // block.num_heads, []
        parts = [silu(block.inputs.weight @ standardised(x)).split(WIDTH) for x in states]
        for place, x in enumerate(states):
            attended = torch.zeros(WIDTH).double()
            for earlier in range(place + 1):
                bias = block.distance_bias[place - earlier]
                for h in range(block.num_heads):
                    mine = slice(h * size, (h + 1) * size)
                    query, key, value = parts[place][2], parts[earlier][3], parts[earlier][1]
                    weight = silu(query[mine] @ key[mine] + bias) / LONGEST
                    attended[mine] += weight * value[mine]
            after.append(x + block.output(standardised(attended) * parts[place][0]))
        states = after
    return [norm(model.norm, x) for x in states]


@pytest.mark.parametrize(
    ("name", "plain", "settings"),
    [
        ("gru4rec", looped_gru4rec, {}),
        ("gru4rec", looped_gru4rec, {"num_layers": 2}),
        ("sasrec", looped_sasrec, {}),
        ("sasrec", looped_sasrec, {"num_heads": 3, "num_layers": 1}),
        ("lrurec", looped_lrurec, {}),
        ("hstu", looped_hstu, {}),
        ("hstu", looped_hstu, {"num_heads": 3, "num_layers": 1}),
    ],
)
def test_states_and_scores_equal_a_loop_over_items(name, plain, settings):
    """Histories of several lengths are padded on the right with arbitrary items."""
    model, random = make(name, **settings), np.random.default_rng(0)
    histories = [random.integers(NUM_ITEMS, size=length) for length in (1, 4, LONGEST, 2)]
    padded = torch.from_numpy(
        np.stack(
            [np.append(h, random.integers(NUM_ITEMS, size=LONGEST - len(h))) for h in histories]
        )
    )
    tolerance = (
        {"atol": 1e-5} if name == "lrurec" else {"atol": 1e-10}
    )  # its recurrence is complex64

    with torch.no_grad():
        states = model.encode(padded)
        expected = [plain(model, history) for history in histories]
        for found, wanted in zip(states, expected, strict=True):
            assert torch.allclose(found[: len(wanted)], torch.stack(wanted), **tolerance)
        places = torch.tensor(
            [row * LONGEST + len(history) - 1 for row, history in enumerate(histories)]
        )
        scores = model(padded, places)
        for found, wanted in zip(scores, expected, strict=True):
            plain_scores = [float(wanted[-1] @ model.items.weight[i]) for i in range(NUM_ITEMS)]
            bias = np.zeros(NUM_ITEMS) if model.bias is None else model.bias.numpy()
            assert np.allclose(found.numpy(), plain_scores + bias, **tolerance)
        some = torch.tensor([3, 0, 10])
        assert torch.allclose(model(padded, places, some), scores[:, some])
        assert torch.allclose(model.log_probabilities(padded, places).exp().sum(1), torch.ones(4))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_dropout_is_on_only_in_training_and_the_gradient_reaches_every_weight(name):
    model = make(name)
    histories, places = torch.randint(NUM_ITEMS, (4, LONGEST)), torch.arange(3 * LONGEST)
    assert torch.equal(model(histories, places), model(histories, places))
    model.train()
    assert not torch.equal(model(histories, places), model(histories, places))
    model(histories, places).pow(2).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in model.parameters()
    )


@pytest.mark.parametrize("length", range(1, 20))
@pytest.mark.parametrize("dtype", [torch.double, torch.cdouble])
def test_the_scan_is_the_recurrence_and_so_are_its_gradients(length, dtype):
    torch.manual_seed(length)
    inputs = torch.randn(3, length, 5, dtype=dtype, requires_grad=True)
    decay = (torch.randn(5, dtype=dtype) / 2).requires_grad_()
    hidden, states = torch.zeros(3, 5, dtype=dtype), []
    for x in inputs.unbind(1):
        hidden = decay * hidden + x
        states.append(hidden)
    plain, found = torch.stack(states, 1), linear_scan(decay, inputs)
    assert torch.allclose(found, plain)
    gradient = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (decay, inputs), gradient, materialize_grads=True)
    for one, other in zip(
        torch.autograd.grad(found, (decay, inputs), gradient), expected, strict=True
    ):
        assert torch.allclose(one, other)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def elu(x):
    return x if x > 0 else math.exp(x) - 1


class Given(Negatives):
    """Negatives that a test chose."""

    def __init__(self, shared=None, own=None):
        object.__setattr__(self, "given", (shared, own))

    def shared(self):
        return self.given[0]

    def other_than(self, targets):
        return self.given[1]


def test_losses_equal_their_formulas():
    torch.manual_seed(1)
    table, targets = torch.randn(4, NUM_ITEMS), torch.tensor([2, 7, 2, 0])
    shared, own = torch.tensor([5, 7, 1]), torch.tensor([[4, 4], [2, 9], [0, 1], [10, 3]])

    def score(candidates):
        return table if candidates is None else table[:, candidates]

    found = {
        name: loss.function(score, targets, Given(shared, own)) for name, loss in LOSSES.items()
    }
    for row, target in enumerate(targets.tolist()):
        scores = table[row].tolist()
        log_sum = math.log(sum(math.exp(s) for s in scores))
        assert found["cross-entropy"][row].item() == pytest.approx(
            log_sum - scores[target], rel=1e-5
        )
        of_negatives = sum(math.log(1 - sigmoid(scores[item])) for item in own[row]) / 2
        assert found["bce"][row].item() == pytest.approx(
            -math.log(sigmoid(scores[target])) - of_negatives, rel=1e-5
        )
        others = sorted({*targets.tolist(), *shared.tolist()} - {target})
        scores = [elu(s) for s in scores]
        share = {j: math.exp(scores[j]) / sum(math.exp(scores[i]) for i in others) for j in others}
        ahead = sum(share[j] * sigmoid(scores[target] - scores[j]) for j in others)
        expected = -math.log(ahead) + sum(share[j] * scores[j] ** 2 for j in others)
        assert found["bpr-max"][row].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_without_targets_has_no_loss_but_a_graph(loss):
    model, nothing = make("sasrec").train(), torch.empty(0, dtype=torch.int64)
    histories = torch.randint(NUM_ITEMS, (2, 4))
    negatives = Negatives(torch.ones(NUM_ITEMS), 3)
    total = (
        LOSSES[loss]
        .function(lambda candidates: model(histories, nothing, candidates), nothing, negatives)
        .sum()
    )
    total.backward()
    assert total == 0 and all(parameter.grad.abs().sum() == 0 for parameter in model.parameters())


def test_negatives_are_never_the_target_and_follow_their_weights():
    torch.manual_seed(0)
    targets = torch.arange(NUM_ITEMS).repeat(500)
    drawn = Negatives(torch.ones(NUM_ITEMS), 2).other_than(targets)
    assert (drawn != targets[:, None]).all()
    times = Counter(
        zip(targets.repeat_interleave(2).tolist(), drawn.flatten().tolist(), strict=True)
    )
    assert (
        len(times) == NUM_ITEMS * (NUM_ITEMS - 1) and min(times.values()) > 50
    )  # 100 each are expected
    weights = torch.tensor([0.0, 1, 3, 0, 4])
    draws = [Negatives(weights, 1).shared().item() for _ in range(4000)]
    share = np.bincount(draws, minlength=5) / 4000
    assert np.allclose(share, weights / 8, atol=0.03) and share[0] == share[3] == 0
    assert sorted(Negatives(weights, 3).shared().tolist()) == [1, 2, 4]


def test_counting_recommenders_equal_a_count_by_hand():
    last, targets = np.array([0, 0, 0, 1, 4, 4], np.int32), np.array([2, 2, 3, 2, 3, 0], np.int32)
    histories, places = (
        torch.tensor([[9, 0], [4, 7], [5, 0]]),
        torch.tensor([1, 2, 4]),
    )  # last items: 0, 4, 5

    popularity = COUNTED["popularity"].count(last, targets, NUM_ITEMS, seed=0)
    found = popularity.log_probabilities(histories, places).exp().numpy()
    count = np.bincount(targets, minlength=NUM_ITEMS)
    assert (found == found[0]).all() and np.allclose(found.sum(1), 1)
    assert np.allclose(
        found[0] * 7, count + 1 / NUM_ITEMS, atol=0.2 / NUM_ITEMS
    )  # 6 targets and the one spread over all
    other = COUNTED["popularity"].count(last, targets, NUM_ITEMS, seed=1).probability.numpy()
    assert not np.array_equal(np.argsort(other), np.argsort(found[0])), "ties are in random order"
    assert set(np.argsort(-other)[:3]) == {0, 2, 3}

    knn = COUNTED["last-item-knn"].count(last, targets, NUM_ITEMS, seed=0)
    for row, item in zip(
        knn.log_probabilities(histories, places).exp().numpy(), (0, 4, 5), strict=True
    ):
        followers = Counter(targets[last == item].tolist())
        expected = [
            (followers[i] + found[0, i]) / (followers.total() + 1) for i in range(NUM_ITEMS)
        ]
        assert np.allclose(row, expected)


@pytest.mark.parametrize("name", [*SEQUENTIAL, *COUNTED])
def test_a_saved_model_reads_back(tmp_path, name):
    if name in SEQUENTIAL:
        form = SEQUENTIAL[name].form | {"num_items": NUM_ITEMS, "max_history": LONGEST}
        model = SEQUENTIAL[name].model(**form).eval()
    else:
        form, model = {}, COUNTED[name].count(np.array([1, 2]), np.array([3, 3]), NUM_ITEMS, 0)
    with pytest.raises(UsageError, match="no sequential recommender in"):
        sequential.load_model(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        f'{{"recommender": "{name}", "form": {form}}}'.replace("'", '"')
    )
    histories, places = torch.tensor([[1, 2, 3]]), torch.tensor([0, 2])
    loaded = sequential.load_model(tmp_path / "model")
    assert torch.equal(
        loaded.log_probabilities(histories, places), model.log_probabilities(histories, places)
    )

    weights = tmp_path / "model" / "model.safetensors"
    save_file({f"old.{key}": tensor for key, tensor in model.state_dict().items()}, weights)
    with pytest.raises(UsageError, match=f"model does not fit {name} as this version of igd_ds b"):
        sequential.load_model(tmp_path / "model")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UsageError, match="model: its weights are missing, cut off or damaged"):
        sequential.load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_a_width_that_the_heads_do_not_divide_is_refused(name):
    with pytest.raises(UsageError, match="--hidden_size 6 is not divisible by --num_heads 4"):
        make(name, num_heads=4)
