"""nanorlhf.divergence against loops in plain Python and all permutations.

L blocks, N tokens, D hidden, M features
"""

import copy
import itertools
import math
import time

import pytest
import torch
from checks import refuses
from tiny_models import FAMILIES, tiny_family
from torch import nn

from nanorlhf.divergence import (
    activation_divergence,
    assignment,
    divergence_sums,
    from_sums,
    layer_divergence,
    mmcs,
    parameter_divergence,
    select_layers,
)
from nanorlhf.hf.blocks import blocks
from nanorlhf.hf.lora import add_lora

# ---------------------------------------------------------------------------------------- weights


def distance(x, y):
    """The Frobenius norm of x - y, number by number."""
    squares = 0.0
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist()):
        squares += (a - b) ** 2
    return math.sqrt(squares)


def size(x):
    return distance(x, torch.zeros_like(x))


@pytest.fixture(params=FAMILIES)
def models(request):
    """A model, and the same with block 0 changed much, block 1 not at all, block 2 a little."""
    base = tiny_family(request.param)
    policy = tiny_family(request.param)
    torch.manual_seed(1)
    for block, change in zip(blocks(policy), (1, 0, 0.1)):
        for parameter in block.parameters():
            parameter.data += change * torch.randn_like(parameter)
    policy.get_output_embeddings().weight.data += 1  # belongs to no block
    return base, policy


def parameter_pairs(base, policy):
    """For each block its parameters in both models: [[(of base, of policy), ...], ...]."""
    pairs = []
    for base_block, policy_block in zip(blocks(base), blocks(policy)):
        pairs.append(list(zip(base_block.parameters(), policy_block.parameters())))
    return pairs


def test_layer_divergence_is_the_sum_of_distances(models):
    base, policy = models
    expected = []
    for block in parameter_pairs(base, policy):
        expected.append(sum(distance(p, q) for p, q in block))
    assert expected[1] == 0
    assert 0 < expected[2] < expected[0]
    assert layer_divergence(base, policy) == pytest.approx(expected, rel=1e-6)


def test_blocks_and_dictionaries_of_parameters_will_do(models):
    base, policy = models
    expected = layer_divergence(base, policy)
    assert layer_divergence(blocks(base), list(blocks(policy))) == expected
    base_dicts = [dict(block.named_parameters()) for block in blocks(base)]
    policy_dicts = [dict(block.named_parameters()) for block in blocks(policy)]
    assert layer_divergence(base_dicts, policy_dicts) == expected


def test_relative_divergence_is_in_units_of_the_weights(models):
    """Biases start at zero in some architectures: where they moved, that is infinitely far."""
    base, policy = models
    expected = []
    for block in parameter_pairs(base, policy):
        share = 0.0
        for p, q in block:
            if size(p) > 0:
                share += distance(p, q) / size(p)
            elif distance(p, q) > 0:
                share = math.inf
        expected.append(share)
    found = layer_divergence(base, policy, kind="relative")
    assert found[1] == 0
    assert found == pytest.approx(expected, rel=1e-6)


def test_parameter_divergence_has_a_row_for_each_parameter(models):
    base, policy = models
    table = parameter_divergence(base, policy)
    names = [name for name, _ in blocks(base)[0].named_parameters()]
    assert list(table[0]) == names

    name, p = next(iter(blocks(base)[2].named_parameters()))
    q = blocks(policy)[2].get_parameter(name)
    expected = {"frobenius": distance(p, q), "base": size(p)}
    assert table[2][name] == pytest.approx(expected, rel=1e-6)


def test_layer_divergence_by_hand():
    base = [
        {"w": torch.tensor([[3.0, 4.0]]), "b": torch.zeros(2)},
        {"w": torch.tensor([[1.0, 0.0]]), "b": torch.ones(1)},
    ]
    policy = [
        {"w": torch.tensor([[0.0, 0.0]]), "b": torch.zeros(2)},
        {"w": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(1)},
    ]
    # Block 0: |(3, 4)| + 0. Block 1: |(0, 2)| + |1|.
    assert layer_divergence(base, policy) == [5, 3]
    # Block 0: 5/5 + 0. Block 1: 2/1 + 1/1.
    assert layer_divergence(base, policy, kind="relative") == [1, 3]
    # The other way round block 0's w starts at 0.
    assert layer_divergence(policy, base, kind="relative")[0] == math.inf


def mixture_block(n_experts):
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(n_experts))
    return nn.ModuleDict({"experts": experts, "norm": nn.LayerNorm(4)})


def test_the_blocks_of_a_model_are_found_whatever_it_calls_them():
    """The list that holds most parameters: not the experts inside a block, though they are more."""
    heads = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))
    rungs = nn.ModuleList([mixture_block(5), mixture_block(5)])
    model = nn.ModuleDict({"heads": heads, "rungs": rungs})
    other = copy.deepcopy(model)
    other["rungs"][1]["norm"].bias.data += 1
    assert layer_divergence(model, other) == [0, 2]


def test_a_model_without_a_list_of_blocks():
    with refuses("Linear: found no list of blocks"):
        layer_divergence(nn.Linear(2, 2), nn.Linear(2, 2))


def test_models_that_cannot_be_compared():
    base = tiny_family("llama")
    with refuses("have 3 and 2 blocks"):
        layer_divergence(blocks(base), blocks(base)[:2])
    with refuses("only one of the models has"):
        layer_divergence(base, tiny_family("gpt2"))

    wide = copy.deepcopy(base)
    blocks(wide)[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(50, 32))
    with refuses(r"block 1, mlp.up_proj.weight: the shapes \[48, 32\] and \[50, 32\] differ"):
        layer_divergence(base, wide)

    adapted = copy.deepcopy(base)
    add_lora(adapted)
    with refuses("adapters must be merged first"):
        layer_divergence(base, adapted)


def test_kinds_of_divergence():
    base = tiny_family("llama")
    with refuses("frobenius, relative, not 'cosine'"):
        layer_divergence(base, base, kind="cosine")


def test_small_changes_of_half_precision_weights_are_not_lost():
    base = [{"w": torch.full((1000,), 100.0, dtype=torch.float16)}]
    policy = copy.deepcopy(base)
    policy[0]["w"][0] += 0.0625
    assert layer_divergence(base, policy) == [0.0625]
    row = parameter_divergence(base, policy)[0]["w"]
    assert row["base"] == pytest.approx(100 * math.sqrt(1000))


# ------------------------------------------------------------------------------ a choice of layers

DIVERGENCES = [0.5, 3.0, 1.0, 2.0, 0.1, 2.5, 0.2]
CHOICES = {"highest:2": [1, 5], "lowest:3": [0, 1, 2], "3, 1": [1, 3], "6": [6]}


def test_five_layers_are_selected_by_default():
    assert select_layers(DIVERGENCES) == [0, 1, 2, 3, 5]
    assert select_layers(DIVERGENCES[:2]) == [0, 1]  # or all


@pytest.mark.parametrize("choice", CHOICES)
def test_select_layers(choice):
    """highest: by divergence; lowest: by depth; numbers: those layers, in order."""
    assert select_layers(DIVERGENCES, choice) == CHOICES[choice]


NO_CHOICES = ["highest", "highest:0", "highest:x", "lowest:-1", "", "1,,2", "-1", "most:3"]


@pytest.mark.parametrize("choice", NO_CHOICES)
def test_choices_that_are_none(choice):
    with refuses("it must be highest:K, lowest:K, or numbers"):
        select_layers(DIVERGENCES, choice)


def test_named_layers_come_in_ascending_order():
    assert select_layers([0.0] * 10, "9,8,1") == [1, 8, 9]


def test_layers_that_are_not_there():
    with refuses("layers 0 to 6"):
        select_layers(DIVERGENCES, "1,7")


# ------------------------------------------------------------------------------------ activations


def dot(x, y):
    """The sum of products of two lists."""
    total = 0.0
    for a, b in zip(x, y, strict=True):
        total += a * b
    return total


def cosine(x, y):
    """The cosine of two lists, 0 where one of them has no direction."""
    norm = math.sqrt(dot(x, x) * dot(y, y))
    if norm == 0:
        return 0.0
    return dot(x, y) / norm


def two_activations():
    """The activations of 50 tokens in two models: x [50, 8], y [50, 8]."""
    torch.manual_seed(0)
    x = torch.randn(50, 8) + 3
    y = x + 0.3 * torch.randn(50, 8)
    return x, y


def activation_divergence_by_a_loop(x, y):
    """The mean of 1 - cosine, and sum |x - y|^2 / sum |x - mean x|^2, token by token."""
    mean = x.double().mean(0).tolist()
    turned = 0.0
    moved = 0.0
    spread = 0.0
    for a, b in zip(x.double().tolist(), y.double().tolist()):
        turned += 1 - cosine(a, b)
        moved += math.dist(a, b) ** 2
        spread += math.dist(a, mean) ** 2
    return {"cosine": turned / len(x), "squared": moved / spread}


def test_activation_divergence_by_a_loop():
    x, y = two_activations()
    expected = activation_divergence_by_a_loop(x, y)
    assert activation_divergence(x, y) == pytest.approx(expected, rel=1e-9)


def test_activations_do_not_diverge_from_themselves():
    x, _ = two_activations()
    nothing = {"cosine": 0, "squared": 0}
    assert activation_divergence(x, x) == pytest.approx(nothing, abs=1e-12)
    # Twice as large is not another direction.
    assert activation_divergence(x, 2 * x)["cosine"] == pytest.approx(0, abs=1e-12)


def test_cosines_of_activations_without_a_direction():
    """The opposite is 2 away, 0 from 0 nothing, and 0 from anything else 1."""
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    y = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert activation_divergence(x, y)["cosine"] == pytest.approx((2 + 0 + 1) / 3)


def test_sums_of_parts_make_the_divergence_of_the_whole():
    x, y = two_activations()
    first = divergence_sums(x[:7], y[:7])
    empty = divergence_sums(x[7:7], y[7:7])
    rest = divergence_sums(x[7:], y[7:])
    whole = activation_divergence(x, y)
    assert from_sums(first + empty + rest) == pytest.approx(whole, rel=1e-12)


def test_activations_of_other_tokens():
    x, y = two_activations()
    with refuses("of the same tokens"):
        activation_divergence(x, y[1:])
    with refuses("of the same tokens"):
        activation_divergence(x[0], y[0])


def test_activations_that_do_not_vary():
    x, y = two_activations()
    with refuses("of 3 tokens do not vary"):
        activation_divergence(torch.full((3, 2), 0.1), torch.zeros(3, 2))
    with refuses("of 1 tokens do not vary"):
        activation_divergence(x[:1], y[:1])
    with refuses("of 0 tokens do not vary"):
        activation_divergence(x[:0], y[:0])


# --------------------------------------------------------------------------------------- features


def least_cost_of_all_permutations(cost):
    """The least sum over all ways of pairing the shorter side with the longer one."""
    if cost.shape[0] > cost.shape[1]:
        cost = cost.T
    n_rows, n_columns = cost.shape
    table = cost.tolist()
    least = math.inf
    for columns in itertools.permutations(range(n_columns), n_rows):
        total = 0.0
        for i in range(n_rows):
            total += table[i][columns[i]]
        least = min(least, total)
    return least


def random_cost(kind, shape):
    cost = torch.randn(shape, dtype=torch.float64)
    if kind == "few values":
        return (2 * cost).round()  # many ties
    if kind == "cosines":
        a = torch.randn(shape[0], 1, 3)
        b = torch.randn(1, shape[1], 3)
        return -torch.cosine_similarity(a, b, dim=2).double()
    return cost


SHAPES = [(1, 1), (1, 4), (4, 1), (3, 3), (5, 5), (6, 6), (3, 7), (7, 3), (5, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "few values", "cosines"])
def test_assignment_is_the_best_of_all_permutations(shape, kind):
    for seed in range(20):
        torch.manual_seed(seed)
        cost = random_cost(kind, shape)
        rows, columns = assignment(cost)
        # Every row or column of the shorter side once, the rows in order.
        assert len(rows) == min(shape)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(set(columns.tolist())) == min(shape)
        total = cost[rows, columns].sum().item()
        assert total == pytest.approx(least_cost_of_all_permutations(cost), abs=1e-9)


def test_assignment_of_hidden_pairs():
    """Too large for permutations: a shuffled diagonal below all else is the only best answer."""
    torch.manual_seed(0)
    order = torch.randperm(300)[:200]
    cost = torch.rand(200, 300)
    cost[torch.arange(200), order] -= 1
    rows, columns = assignment(cost)
    assert torch.equal(columns, order)
    assert torch.equal(rows, torch.arange(200))

    rows, columns = assignment(cost.T)
    assert torch.equal(order[columns], rows)
    assert torch.equal(rows, order.sort().values)


@pytest.mark.parametrize("Ma, Mb", [(5, 5), (3, 6), (6, 3)])
def test_mmcs(Ma, Mb):
    """The mean over the features of A of their largest cosine; or over pairs, each used once."""
    torch.manual_seed(Ma)
    a = 3 * torch.randn(Ma, 4)
    b = torch.randn(Mb, 4)
    a[0] = 0
    table = [[cosine(p, q) for q in b.tolist()] for p in a.tolist()]
    mean_of_largest = sum(max(row) for row in table) / Ma
    assert mmcs(a, b) == pytest.approx(mean_of_largest, abs=1e-6)
    largest_sum = -least_cost_of_all_permutations(-torch.tensor(table))
    mean_of_pairs = largest_sum / min(Ma, Mb)
    assert mmcs(a, b, one_to_one=True) == pytest.approx(mean_of_pairs, abs=1e-6)


def test_mmcs_of_the_same_features_in_another_order_is_1():
    torch.manual_seed(0)
    a = torch.randn(300, 16)
    scaled = a * torch.rand(300, 1).add(0.5)
    b = scaled[torch.randperm(300)]
    assert mmcs(a, b) == pytest.approx(1, abs=1e-6)
    assert mmcs(a, b, one_to_one=True) == pytest.approx(1, abs=1e-6)
    # It asks where A's features are, not where B's are.
    assert mmcs(a[:100], b) == pytest.approx(1, abs=1e-6)
    assert mmcs(a, b[:100]) < 0.9


def test_two_features_may_share_a_partner_but_not_one_to_one():
    torch.manual_seed(0)
    feature = torch.randn(300, 16)[0]
    a = torch.stack([feature, feature])
    b = torch.stack([feature, -feature])
    assert mmcs(a, b) == pytest.approx(1, abs=1e-6)
    # One of the two is left with the opposite: (1 - 1) / 2.
    assert mmcs(a, b, one_to_one=True) == pytest.approx(0, abs=1e-6)


def test_one_to_one_has_a_limit():
    a = torch.randn(2049, 2)
    with refuses("at most 2048 features a side, not 2049 and 3"):
        mmcs(a, a[:3], one_to_one=True)
    assert mmcs(a, a[:3]) < 1


OTHER_SHAPES = {"width": (3, 4), "no matrix": (3,), "no feature": (0, 2)}


@pytest.mark.parametrize("shape", OTHER_SHAPES.values(), ids=OTHER_SHAPES.keys())
def test_mmcs_needs_features_of_one_width(shape):
    with refuses("features must be"):
        mmcs(torch.randn(2049, 2), torch.randn(shape))


def test_mmcs_needs_finite_features():
    features = torch.randn(2049, 2)
    one_bad = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    with refuses("not finite"):
        mmcs(features, one_bad)
    with refuses("not finite"):
        mmcs(one_bad, features)


def test_assignment_is_fast_enough():
    torch.manual_seed(0)
    a = torch.randn(300, 64)
    b = torch.randn(400, 64)
    start = time.process_time()
    mmcs(a, b, one_to_one=True)
    assert time.process_time() - start < 5  # 0.1 s on a laptop
