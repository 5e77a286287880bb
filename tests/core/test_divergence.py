"""nanorlhf.divergence against loops in plain Python and all permutations.

    L blocks, N tokens, D hidden, M features
"""

import copy
import itertools
import math
import time

import pytest
import torch
from support import FAMILIES, tiny_family
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


def distance(x, y):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist())))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_layer_divergence(architecture):
    base, policy = tiny_family(architecture), tiny_family(architecture)
    torch.manual_seed(1)
    for i, block in enumerate(blocks(policy)):
        for p in block.parameters():
            p.data += (1, 0, 0.1)[i] * torch.randn_like(p)
    policy.get_output_embeddings().weight.data += 1  # belongs to no block
    pairs = [list(zip(a.parameters(), b.parameters())) for a, b in zip(blocks(base), blocks(policy))]
    sums = [sum(distance(p, q) for p, q in block) for block in pairs]
    assert layer_divergence(base, policy) == pytest.approx(sums, rel=1e-6) and sums[1] == 0 < sums[2] < sums[0]
    assert layer_divergence(blocks(base), list(blocks(policy))) == layer_divergence(base, policy)
    dicts = [[dict(block.named_parameters()) for block in blocks(lm)] for lm in (base, policy)]
    assert layer_divergence(*dicts) == layer_divergence(base, policy)
    zeros = torch.zeros(1)
    shares = [sum(distance(p, q) / (distance(p, zeros.expand_as(p)) or 1e-300) for p, q in block) for block in pairs]
    got = layer_divergence(base, policy, kind="relative")
    assert got[1] == 0
    assert [x for x in got if math.isfinite(x)] == pytest.approx([x for x in shares if x < 1e100], rel=1e-6)
    assert [math.isinf(x) for x in got] == [x > 1e100 for x in shares]  # biases start at zero in some architectures
    table = parameter_divergence(base, policy)
    assert list(table[0]) == [name for name, _ in blocks(base)[0].named_parameters()]
    name, p = next(iter(blocks(base)[2].named_parameters()))
    assert table[2][name] == pytest.approx({"frobenius": distance(p, dict(blocks(policy)[2].named_parameters())[name]),
                                            "base": distance(p, torch.zeros_like(p))}, rel=1e-6)  # fmt: skip


def test_by_hand():
    base = [{"w": torch.tensor([[3.0, 4.0]]), "b": torch.zeros(2)}, {"w": torch.tensor([[1.0, 0.0]]), "b": torch.ones(1)}]
    policy = [{"w": torch.tensor([[0.0, 0.0]]), "b": torch.zeros(2)}, {"w": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(1)}]
    assert layer_divergence(base, policy) == [5, 3]
    assert layer_divergence(base, policy, kind="relative") == [1, 3]
    assert layer_divergence(policy, base, kind="relative")[0] == math.inf


def test_the_blocks_of_a_model_are_found_whatever_it_calls_them():
    """The list that holds most parameters: not the experts inside a block, though they are more."""

    def block(n):
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(n)), "norm": nn.LayerNorm(4)})

    model = nn.ModuleDict({"heads": nn.ModuleList(nn.Linear(1, 1) for _ in range(9)), "rungs": nn.ModuleList([block(5), block(5)])})
    other = copy.deepcopy(model)
    other["rungs"][1]["norm"].bias.data += 1
    assert layer_divergence(model, other) == [0, 2]
    with pytest.raises(ValueError, match="Linear: found no list of blocks"):
        layer_divergence(nn.Linear(2, 2), nn.Linear(2, 2))


def test_models_that_cannot_be_compared():
    base = tiny_family("llama")
    with pytest.raises(ValueError, match="have 3 and 2 blocks"):
        layer_divergence(blocks(base), blocks(base)[:2])
    with pytest.raises(ValueError, match="only one of the models has"):
        layer_divergence(base, tiny_family("gpt2"))
    wide = copy.deepcopy(base)
    blocks(wide)[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(50, 32))
    with pytest.raises(ValueError, match=r"block 1, mlp.up_proj.weight: the shapes \[48, 32\] and \[50, 32\] differ"):
        layer_divergence(base, wide)
    adapted = copy.deepcopy(base)
    add_lora(adapted)
    with pytest.raises(ValueError, match="adapters must be merged first"):
        layer_divergence(base, adapted)
    with pytest.raises(ValueError, match="frobenius, relative, not 'cosine'"):
        layer_divergence(base, base, kind="cosine")


def test_small_changes_of_half_precision_weights_are_not_lost():
    base = [{"w": torch.full((1000,), 100.0, dtype=torch.float16)}]
    policy = [{"w": torch.full((1000,), 100.0, dtype=torch.float16)}]
    policy[0]["w"][0] += 0.0625
    assert layer_divergence(base, policy) == [0.0625]
    assert parameter_divergence(base, policy)[0]["w"]["base"] == pytest.approx(100 * math.sqrt(1000))


def test_select_layers():
    d = [0.5, 3.0, 1.0, 2.0, 0.1, 2.5, 0.2]
    assert select_layers(d) == [0, 1, 2, 3, 5] and select_layers(d, "highest:2") == [1, 5]
    assert select_layers(d, "lowest:3") == [0, 1, 2] and select_layers(d, "3, 1") == [1, 3] and select_layers(d, "6") == [6]
    assert select_layers(d[:2]) == [0, 1]
    for choice in ("highest", "highest:0", "highest:x", "lowest:-1", "", "1,,2", "-1", "most:3"):
        with pytest.raises(ValueError, match="it must be highest:K, lowest:K, or numbers"):
            select_layers(d, choice)
    with pytest.raises(ValueError, match="layers 0 to 6"):
        select_layers(d, "1,7")


def test_activation_divergence():
    torch.manual_seed(0)
    x = torch.randn(50, 8) + 3
    y = x + 0.3 * torch.randn(50, 8)
    xs, ys, mean = x.double().tolist(), y.double().tolist(), x.double().mean(0).tolist()
    cosine, gap, spread = 0.0, 0.0, 0.0
    for a, b in zip(xs, ys):
        dot = sum(p * q for p, q in zip(a, b))
        cosine += 1 - dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
        gap += sum((p - q) ** 2 for p, q in zip(a, b))
        spread += sum((p - m) ** 2 for p, m in zip(a, mean))
    got = activation_divergence(x, y)
    assert got == pytest.approx({"cosine": cosine / 50, "squared": gap / spread}, rel=1e-9)
    assert activation_divergence(x, x) == pytest.approx({"cosine": 0, "squared": 0}, abs=1e-12)
    assert activation_divergence(x, 2 * x)["cosine"] == pytest.approx(0, abs=1e-12)
    away = activation_divergence(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    assert away["cosine"] == pytest.approx((2 + 0 + 1) / 3)
    parts = divergence_sums(x[:7], y[:7]) + divergence_sums(x[7:7], y[7:7]) + divergence_sums(x[7:], y[7:])
    assert from_sums(parts) == pytest.approx(got, rel=1e-12)
    for a, b in ((x, y[1:]), (x[0], y[0])):
        with pytest.raises(ValueError, match="of the same tokens"):
            activation_divergence(a, b)
    for a, b in ((torch.full((3, 2), 0.1), torch.zeros(3, 2)), (x[:1], y[:1]), (x[:0], y[:0])):
        with pytest.raises(ValueError, match=f"of {len(a)} tokens do not vary"):
            activation_divergence(a, b)


# ------------------------------------------------------------------------------------------------------------------------ features


def all_permutations(cost):
    """The least sum over all ways of pairing the shorter side with the longer one."""
    rows = cost.tolist() if cost.shape[0] <= cost.shape[1] else cost.T.tolist()
    return min(sum(row[j] for row, j in zip(rows, choice)) for choice in itertools.permutations(range(len(rows[0])), len(rows)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 3), (5, 5), (6, 6), (3, 7), (7, 3), (5, 6)])
@pytest.mark.parametrize("kind", ["normal", "few values", "cosines"])
def test_assignment(shape, kind):
    for seed in range(20):
        torch.manual_seed(seed)
        cost = torch.randn(shape, dtype=torch.float64)
        if kind == "few values":
            cost = (2 * cost).round()  # many ties
        if kind == "cosines":
            cost = -torch.cosine_similarity(torch.randn(shape[0], 1, 3), torch.randn(1, shape[1], 3), dim=2).double()
        rows, columns = assignment(cost)
        assert len(rows) == min(shape) and rows.tolist() == sorted(set(rows.tolist())) and len(set(columns.tolist())) == min(shape)
        assert cost[rows, columns].sum().item() == pytest.approx(all_permutations(cost), abs=1e-9)


def test_assignment_of_hidden_pairs():
    """Too large for permutations: a shuffled diagonal below all else is the only best answer."""
    torch.manual_seed(0)
    order, cost = torch.randperm(300)[:200], torch.rand(200, 300)
    cost[torch.arange(200), order] -= 1
    rows, columns = assignment(cost)
    assert torch.equal(columns, order) and torch.equal(rows, torch.arange(200))
    rows, columns = assignment(cost.T)
    assert torch.equal(order[columns], rows) and torch.equal(rows, order.sort().values)


def cosine(p, q):
    norm = math.sqrt(sum(x * x for x in p) * sum(x * x for x in q))
    return sum(x * y for x, y in zip(p, q)) / norm if norm else 0.0


@pytest.mark.parametrize("Ma, Mb", [(5, 5), (3, 6), (6, 3)])
def test_mmcs(Ma, Mb):
    torch.manual_seed(Ma)
    a, b = 3 * torch.randn(Ma, 4), torch.randn(Mb, 4)
    a[0] = 0
    table = [[cosine(p, q) for q in b.tolist()] for p in a.tolist()]
    assert mmcs(a, b) == pytest.approx(sum(map(max, table)) / Ma, abs=1e-6)
    assert mmcs(a, b, one_to_one=True) == pytest.approx(-all_permutations(-torch.tensor(table)) / min(Ma, Mb), abs=1e-6)


def test_mmcs_of_the_same_features():
    torch.manual_seed(0)
    a = torch.randn(300, 16)
    b = (a * torch.rand(300, 1).add(0.5))[torch.randperm(300)]
    assert mmcs(a, b) == pytest.approx(1, abs=1e-6) and mmcs(a, b, one_to_one=True) == pytest.approx(1, abs=1e-6)
    assert mmcs(a[:100], b) == pytest.approx(1, abs=1e-6) and mmcs(a, b[:100]) < 0.9
    twice = torch.cat([a[:1], a[:1]])  # two features of A that share one of B
    assert mmcs(twice, torch.stack([a[0], -a[0]])) == pytest.approx(1, abs=1e-6)
    assert mmcs(twice, torch.stack([a[0], -a[0]]), one_to_one=True) == pytest.approx(0, abs=1e-6)


def test_mmcs_refuses():
    a = torch.randn(2049, 2)
    with pytest.raises(ValueError, match="at most 2048 features a side, not 2049 and 3"):
        mmcs(a, a[:3], one_to_one=True)
    assert mmcs(a, a[:3]) < 1
    for b in (torch.randn(3, 4), torch.randn(3), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="features must be"):
            mmcs(a, b)
    with pytest.raises(ValueError, match="not finite"):
        mmcs(a, torch.full((1, 2), torch.nan))


def test_assignment_is_fast_enough():
    torch.manual_seed(0)
    a, b = torch.randn(300, 64), torch.randn(400, 64)
    start = time.process_time()
    mmcs(a, b, one_to_one=True)
    assert time.process_time() - start < 5  # 0.1 s on a laptop
