"""probe.py reward and pairs: triples and splits, inputs, probes on planted rewards, controls at
chance, one process against two.

    N texts, D hidden, F inputs of a probe
"""

from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import flags, join, probe_refused, ranks, summary, write_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import probe
from nanorlhf import world
from nanorlhf.control.feature_texts import groups_of
from nanorlhf.errors import InputError
from nanorlhf.interp import reward_probes
from nanorlhf.interp.reward_probe_fits import fit_pairs, fit_reward
from nanorlhf.interp.reward_probe_texts import (
    Texts,
    deal,
    pair_texts,
    split_by_prompt,
    split_things,
    subtract_neutral,
    word_texts,
)
from nanorlhf.interp.reward_probes import PairsConfig, RewardConfig, bag_of_words, mean_inputs
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.runtime import cli
from nanorlhf.runtime.distributed import Dist
from nanorlhf.sae import SparseAutoencoder

ALONE = Dist(0, 1, torch.device("cpu"))
D = 32
# A direction that random weights know nothing of.
DIRECTION = torch.nn.functional.normalize(torch.arange(float(D)).sin(), dim=0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with base/, a random model, and policy/, the same with each word's value in its
    embedding, along DIRECTION; demonstrations in sft.jsonl, pairs in pairs.jsonl."""
    root = tmp_path_factory.mktemp("probe")
    config = world.model_config()
    config.hidden_size = D
    config.intermediate_size = 64
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    embeddings = lm.get_input_embeddings().weight.data
    embeddings.mul_(20)
    lm.save_pretrained(root / "base")
    world.tokenizer().save_pretrained(root / "base")

    ids = world.tokenizer().get_vocab()
    for word, value in world.LEXICON.items():
        embeddings[ids[word]] += value * DIRECTION
    # Of the blocks only the second one moves.
    lm.base_model.layers[1].mlp.dense_h_to_4h.weight.data.mul_(1.1)
    lm.save_pretrained(root / "policy")
    world.tokenizer().save_pretrained(root / "policy")

    write_rows(root / "sft.jsonl", world.demonstrations(200))
    write_rows(root / "pairs.jsonl", world.preferences(120))
    return root


def probe_settings(material, folder, **changes):
    """The settings of a small probe of both layers."""
    settings = {
        "policy": f"{material}/policy",
        "model": f"{material}/base",
        "site": "residual",
        "layers": "0,1",
        "triples": 200,
        "max_rows": 300,
        "seeds": 2,
        "output_dir": str(folder),
    }
    return settings | changes


def probe_reward(material, folder, **changes):
    """Run the body of `probe.py reward` -> its summary."""
    config = RewardConfig(**probe_settings(material, folder, **changes))
    return reward_probes.reward(config)


# ----------------------------------------------------------------------------- the texts: words


def make_triples(tokenizer, rows, lexicon, max_length=0, triples=60):
    """Texts of three splits with triples of words, as `probe.py reward` makes them."""
    config = SimpleNamespace(
        dataset="data", neutral=1.0, test_share=0.3, triples=triples, seeds=3, chat_template=False
    )
    return word_texts(config, tokenizer, rows, lexicon, max_length)


@pytest.fixture(scope="module")
def demonstrations():
    return world.demonstrations(300)


@pytest.fixture(scope="module")
def texts(demonstrations):
    """60 triples for each of three seeds, of the embedded world's words."""
    return make_triples(world.tokenizer(), demonstrations, world.LEXICON)


def all_triples(texts):
    """The rows of all splits, three by three: [(positive, neutral, negative)]."""
    triples = []
    for split in texts.splits:
        for side in split:
            triples += side.view(-1, 3).tolist()
    return triples


def last_words(texts):
    """The word that each text ends with: [N]."""
    return world.tokenizer().batch_decode([ids[-1:] for ids in texts.ids])


def contexts_of(texts):
    """What each text has before its word: [N]."""
    return world.tokenizer().batch_decode([ids[:-1] for ids in texts.ids])


def prompts_of(contexts, demonstrations):
    """The prompt that each context begins with: [N]."""
    known = {row["prompt"] for row in demonstrations}
    prompts = []
    for context in contexts:
        (prompt,) = (p for p in known if context.startswith(p))
        prompts.append(prompt)
    return prompts


def on_side(values, side):
    """The values [N] of the rows of one side."""
    return [values[row] for row in side.tolist()]


def share_nothing(values, split):
    """Whether no value [N] is on both sides of a split."""
    train, test = split
    return set(on_side(values, train)).isdisjoint(on_side(values, test))


def test_a_triple_is_a_positive_a_neutral_and_a_negative_word_in_one_context(texts):
    words = last_words(texts)
    for triple in all_triples(texts):
        positive, neutral, negative = texts.values[triple].tolist()
        assert positive > 0
        assert neutral == 0
        assert negative < 0

        context = texts.ids[triple[0]][:-1]
        for row in triple:
            assert texts.ids[row][:-1] == context
            # The word that counts is the last token.
            assert texts.first[row] == len(context)
            assert texts.names[texts.units[row]] == words[row]
            assert texts.values[row] == world.LEXICON[words[row]]


def test_a_context_is_a_prompt_and_the_beginning_of_a_response_to_it(texts, demonstrations):
    contexts = contexts_of(texts)
    prompts = prompts_of(contexts, demonstrations)
    for context, prompt in zip(contexts, prompts):
        beginning = context[len(prompt) :].strip()
        responses = [row["response"] for row in demonstrations if row["prompt"] == prompt]
        assert any(response.startswith(beginning) for response in responses)


def test_each_seed_has_triples_and_words_of_its_own(texts):
    assert len(texts.ids) == 3 * 3 * 60
    assert set(texts.names) == set(world.LEXICON)
    words = last_words(texts)
    used = []
    test_words = set()
    for train, test in texts.splits:
        used += train.tolist() + test.tolist()
        test_words.add(frozenset(on_side(words, test)))
    assert sorted(used) == list(range(540))
    assert len(test_words) == 3


@pytest.mark.parametrize("seed", range(3))
def test_splits_share_no_word_no_family_and_no_prompt(texts, demonstrations, seed):
    split = texts.splits[seed]
    words = last_words(texts)
    assert share_nothing(words, split)
    # 'terrible' and 'terrific' are on one side.
    families = [word[:4] for word in words]
    assert share_nothing(families, split)
    prompts = prompts_of(contexts_of(texts), demonstrations)
    assert share_nothing(prompts, split)


@pytest.mark.parametrize("seed", range(3))
def test_the_test_has_its_share_of_words_and_of_triples(texts, seed):
    train, test = texts.splits[seed]
    words = last_words(texts)
    n_train_words = len(set(on_side(words, train)))
    n_test_words = len(set(on_side(words, test)))
    assert n_train_words + n_test_words == 84
    # 30% of 84, give or take: families of words stay together.
    assert abs(n_test_words - 24) <= 2
    assert len(test) == 3 * 18


@pytest.mark.parametrize("seed", range(3))
def test_words_of_one_sign_come_about_equally_often(texts, seed):
    for side in texts.splits[seed]:
        n_times = {1: [], 0: [], -1: []}  # {sign: how often each of its words comes}
        for word, n in Counter(on_side(last_words(texts), side)).items():
            n_times[np.sign(world.LEXICON[word])].append(n)
        for counts in n_times.values():
            assert max(counts) - min(counts) <= 1


def letter_tokenizer():
    """A tokenizer of single letters: the words of a lexicon have several tokens."""
    tokens = ["<eos>", "<unk>", *" abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def short_lexicon():
    """Six words of each sign."""
    lexicon = dict.fromkeys(["good", "fine", "nice", "great", "sweet", "happy"], 2.0)
    lexicon |= dict.fromkeys(["bad", "poor", "sad", "mean", "evil", "sick"], -2.0)
    lexicon |= dict.fromkeys(["red", "blue", "tall", "round", "plain", "new"], 0.5)
    return lexicon


def rows_with_all_words(words, more=""):
    """Eight demonstrations, each with all these words in its response."""
    response = f"is {' '.join(words)}{more}"
    return [{"prompt": f"the {letter} ", "response": response} for letter in "abcdefgh"]


def test_words_of_several_tokens_count_by_their_last():
    lexicon = short_lexicon()
    # The tokenizer has no hyphen, so this word cannot be written.
    lexicon["na-ive"] = 3.0
    rows = rows_with_all_words(lexicon, " Good unknown")
    tokenizer = letter_tokenizer()
    texts = make_triples(tokenizer, rows, lexicon, max_length=9)

    assert texts.names == sorted(lexicon.keys() - {"na-ive"})
    for ids, first, unit, length in zip(texts.ids, texts.first, texts.units, texts.lengths):
        word = texts.names[unit]
        assert tokenizer.decode(ids).endswith(word)
        assert first == len(ids) - 1
        assert len(ids) <= 9
        # The length is that of the response, of which a part was cut away.
        assert length > len(word)


def test_a_bos_stays_in_front_of_a_cut_context():
    tokenizer = letter_tokenizer()
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    rows = rows_with_all_words(short_lexicon())
    texts = make_triples(tokenizer, rows, short_lexicon(), max_length=9)

    for ids, first, unit in zip(texts.ids, texts.first, texts.units):
        assert ids[0] == 0
        assert 0 not in ids[1:]
        assert len(ids) == 9
        assert first == 8
        assert tokenizer.decode(ids).endswith(texts.names[unit])


def prompts_with_blanks(topics):
    """120 demonstrations, each prompt written with one, two or three blanks between its words."""
    rows = []
    for i, row in enumerate(world.demonstrations(120)):
        blank = " " * (1 + i % 3)
        prompt = f"review{blank}the{blank}{topics[i % 8]} :"
        rows.append({**row, "prompt": prompt})
    return rows


EIGHT_TOPICS = sorted(world.TOPICS)[:8]


def test_prompts_that_differ_by_white_space_are_one_prompt_of_a_split():
    rows = prompts_with_blanks(EIGHT_TOPICS)
    config = SimpleNamespace(dataset="data", seeds=3, test_share=0.3)
    groups, splits = split_by_prompt(config, rows)
    assert groups.tolist() == [i % 8 for i in range(120)]
    for split in splits:
        assert share_nothing(groups.tolist(), split)
    # A bootstrap over prompts has the same units.
    units = groups_of([row["prompt"] for row in rows])
    assert units.tolist() == groups.tolist()


def test_prompts_that_differ_by_white_space_are_on_one_side_of_the_triples():
    tokenizer = world.tokenizer()
    texts = make_triples(tokenizer, prompts_with_blanks(EIGHT_TOPICS), world.LEXICON)
    # The topic is the third token of a text.
    topics = [ids[2] for ids in texts.ids]
    assert set(topics) <= set(tokenizer.convert_tokens_to_ids(EIGHT_TOPICS))
    for split in texts.splits:
        train, test = split
        assert len(train) > 0
        assert len(test) > 0
        assert share_nothing(topics, split)


def test_a_test_share_may_not_leave_too_little_to_fit():
    rows = [{"prompt": f"prompt {i}"} for i in range(10)]
    config = SimpleNamespace(dataset="data", seeds=1, test_share=0.7)
    _, splits = split_by_prompt(config, rows)
    train, _ = splits[0]
    assert len(train) == 3

    config.test_share = 0.9
    with pytest.raises(InputError, match="--test_share 0.9 leaves 1 prompts for training"):
        split_by_prompt(config, rows)


@pytest.mark.parametrize("n, share, n_test", [(10, 0.3, 3), (3, 0.01, 1), (3, 0.99, 2)])
def test_neither_side_of_a_split_is_empty(n, share, n_test):
    rng = np.random.default_rng(0)
    train, test = split_things(rng, list(range(n)), share)
    assert sorted(train + test) == list(range(n))
    assert len(test) == n_test


def test_things_are_dealt_about_equally_often():
    rng = np.random.default_rng(0)
    dealt = Counter(deal(rng, "abc", 7))
    assert sorted(dealt.values()) == [2, 2, 3]


def seeds_that_test(texts, row):
    """The seeds that have a row in their test."""
    seeds = []
    for seed, (_, test) in enumerate(texts.splits):
        if row in test.tolist():
            seeds.append(seed)
    return seeds


def test_differences_to_the_neutral_word():
    demonstrations = world.demonstrations(100)
    texts = make_triples(world.tokenizer(), demonstrations, world.LEXICON, triples=9)
    x = randn(len(texts.ids), 4)
    new, inputs = subtract_neutral(texts, {"x": x})

    # Two rows of three remain: the positive and the negative word of each triple.
    place = 0
    for neutral in range(1, len(texts.ids), 3):
        for row in (neutral - 1, neutral + 1):
            assert torch.equal(inputs["x"][place], x[row] - x[neutral])
            assert new.values[place] == texts.values[row] - texts.values[neutral]
            assert new.units[place] == texts.units[row]
            assert seeds_that_test(new, place) == seeds_that_test(texts, row)
            place += 1
    assert len(new.ids) == place
    # Each of them is in one split.
    n_in_splits = 0
    for train, test in new.splits:
        n_in_splits += len(train) + len(test)
    assert n_in_splits == place


# ----------------------------------------------------------------------------- the texts: pairs


@pytest.fixture(scope="module")
def preferences():
    return world.preferences(90)


@pytest.fixture(scope="module")
def pairs(preferences):
    config = SimpleNamespace(seeds=3, test_share=0.3, chat_template=False, dataset="data")
    return pair_texts(config, world.tokenizer(), preferences, 0, ALONE)


def test_pairs_are_split_by_prompt(pairs, preferences):
    prompts = [row["prompt"] for row in preferences]
    for split in pairs.splits:
        train, test = split
        assert sorted(train.tolist() + test.tolist()) == list(range(90))
        assert share_nothing(prompts, split)


@pytest.mark.parametrize("row, side", [(5, "chosen"), (95, "rejected")])
def test_all_chosen_responses_come_before_all_rejected_ones(pairs, preferences, row, side):
    tokenizer = world.tokenizer()
    prompt = preferences[5]["prompt"]
    response = preferences[5][side]
    ids = pairs.ids[row]
    assert tokenizer.decode(ids) == f"{prompt} {response} <eos>"
    assert pairs.lengths[row] == len(response.split()) + 1
    # What counts begins behind the prompt.
    assert tokenizer.decode(ids[: pairs.first[row]]) == prompt


# ------------------------------------------------------------------------------------ the inputs


def mlp_outputs(lm, ids):
    """What the MLPs of all blocks put out for one text, by hooks of our own: [[T, D]]."""
    kept = []
    hooks = []
    for block in lm.base_model.layers:
        hook = block.mlp.register_forward_hook(lambda module, args, out: kept.append(out[0]))
        hooks.append(hook)
    with torch.no_grad():
        lm(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return kept


def mean_by_a_loop(x, first):
    """The mean of the rows of x [T, F] from the first one that counts on: [F]."""
    total = torch.zeros(x.shape[1])
    for t in range(first, len(x)):
        total += x[t]
    return total / (len(x) - first)


def encode_signs(x):
    """Two features for each coordinate: how far it is above 0, and how far below."""
    return torch.cat([x, -x], -1).relu()


def test_mean_inputs_are_those_of_one_text_at_a_time(material, monkeypatch):
    monkeypatch.setattr(reward_probes, "TOKENS_AT_ONCE", 40)  # several micro-batches
    lm = AutoModelForCausalLM.from_pretrained(material / "policy").eval()
    ids = []
    for n in (3, 9, 5, 9, 12, 1):
        ids.append(torch.randint(3, 200, (n,), generator=seeded(n)).tolist())
    texts = SimpleNamespace(ids=ids, first=[2, 0, 3, 8, 5, 0])
    places = [(0, "mlp"), (1, "mlp")]
    sae = SimpleNamespace(encode=encode_signs)

    found = mean_inputs(lm, texts, places, ALONE, "float32")
    found_features = mean_inputs(
        lm, texts, places, ALONE, "float32", saes=dict.fromkeys(places, sae)
    )
    for i, first in enumerate(texts.first):
        means = []
        means_of_features = []
        for x in mlp_outputs(lm, ids[i]):
            means.append(mean_by_a_loop(x, first))
            means_of_features.append(mean_by_a_loop(encode_signs(x), first))
        expected = torch.cat(means)
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
        expected = torch.cat(means_of_features)
        torch.testing.assert_close(found_features[i], expected, rtol=1e-4, atol=1e-5)


def test_every_process_needs_a_text():
    texts = SimpleNamespace(ids=[[5, 6], [7]], first=[0, 0])
    first_of_three = Dist(0, 3, torch.device("cpu"))
    with pytest.raises(InputError, match="2 texts are too few for 3 processes"):
        mean_inputs(None, texts, [(0, "mlp")], first_of_three, "float32")


def test_a_bag_of_words_counts_the_tokens_that_occur():
    ids = [[7, 3, 7], [900, 3], [5]]
    # The columns are those of the tokens 3, 5, 7 and 900.
    expected = [[1, 0, 2, 0], [1, 0, 0, 1], [0, 1, 0, 0]]
    assert bag_of_words(SimpleNamespace(ids=ids)).tolist() == expected


# ------------------------------------------------------------------------------------ the probes


def plant_values(noise, n_words=40, n_contexts=5):
    """Words of known values, in contexts: inputs [N, 6] along one direction, with noise, and Texts
    that are split by word."""
    value_of_word = randn(n_words)
    units = torch.arange(n_words).repeat_interleave(n_contexts)  # [N]
    values = value_of_word[units]
    direction = randn(6, seed=1)
    x = values[:, None] * direction + noise * randn(len(units), 6, seed=2) + 4

    (train,) = (units < 25).nonzero(as_tuple=True)
    (test,) = (units >= 25).nonzero(as_tuple=True)
    texts = Texts(
        ids=[],
        first=[],
        lengths=None,
        values=values,
        groups=units,
        units=units,
        names=[f"w{i}" for i in range(n_words)],
        splits=[(train, test)],
    )
    return x, texts


def ridge_by_hand(x, y, penalty):
    """The weight and the bias of centred inputs: w = (X'X + penalty)^-1 X' (y - mean of y)."""
    bias = y.mean()
    penalties = penalty * torch.eye(x.shape[1]).double()
    weight = torch.linalg.solve(x.T @ x + penalties, x.T @ (y - bias))
    return weight, bias


def predict_words_by_hand(x, texts, penalty):
    """{word of the test: the mean of its predictions in all its contexts}."""
    train, test = texts.splits[0]
    z = x / x[train].std(0)
    centre = z[train].mean(0)
    z_train = (z[train] - centre).double()
    z_test = (z[test] - centre).double()
    weight, bias = ridge_by_hand(z_train, texts.values[train].double(), penalty)

    predictions = {}
    for row, i in zip(z_test, test):
        word = texts.names[texts.units[i]]
        prediction = (row @ weight + bias).item()
        predictions.setdefault(word, []).append(prediction)
    return {word: sum(own) / len(own) for word, own in predictions.items()}


def test_reward_probe_against_loops():
    x, texts = plant_values(noise=1.0)
    numbers, more = fit_reward(x, texts, texts.splits[0])

    predicted = predict_words_by_hand(x, texts, more["penalty"])
    assert [name for name, _, _ in more["predictions"]] == list(predicted)
    found = [prediction for _, _, prediction in more["predictions"]]
    assert found == pytest.approx(list(predicted.values()), abs=1e-5)
    assert more["n_train"] == 25
    assert more["n_test"] == 15

    # Each word has five rows of the same value.
    _, test = texts.splits[0]
    true = texts.values[test][::5].numpy()
    predicted = np.array(list(predicted.values()))
    # Kendall's tau: over all pairs of words, 1 where both put them in the same order, else -1.
    orders = []
    for a, b in combinations(range(15), 2):
        order = np.sign(predicted[a] - predicted[b]) * np.sign(true[a] - true[b])
        orders.append(order)
    assert numbers["tau"] == pytest.approx(np.mean(orders), abs=1e-9)
    assert 0.3 < numbers["tau"] < 1

    # R^2 = 1 - squared errors / squared deviations from the mean.
    errors = ((predicted - true) ** 2).sum()
    deviations = ((true - true.mean()) ** 2).sum()
    assert numbers["r2"] == pytest.approx(1 - errors / deviations, abs=1e-5)
    is_right = np.sign(predicted) == np.sign(true)
    assert numbers["sign"] == pytest.approx(is_right.mean())


def test_inputs_that_tell_no_words_apart_have_a_tau_of_0():
    x, texts = plant_values(noise=1.0)
    constant = torch.ones(len(x), 2)
    numbers, _ = fit_reward(constant, texts, texts.splits[0])
    assert numbers["tau"] == 0


def test_word_identity_alone_is_at_chance():
    x, texts = plant_values(noise=0.3)
    one_hot = torch.nn.functional.one_hot(texts.units).float()
    numbers, more = fit_reward(one_hot, texts, texts.splits[0])
    assert numbers["tau"] == 0
    assert more["p"] == 1
    assert numbers["r2"] <= 0
    # The same words can be told apart by what was planted.
    numbers, _ = fit_reward(x, texts, texts.splits[0])
    assert numbers["tau"] > 0.8


def test_shuffled_labels_are_at_chance():
    x, texts = plant_values(noise=0.3)
    many = randn(len(x), 200, seed=3) + x.repeat(1, 34)[:, :200]
    taus = []
    for seed in range(12):
        numbers, _ = fit_reward(many, texts, texts.splits[0], shuffle=seed)
        taus.append(numbers["tau"])
    assert abs(np.mean(taus)) < 0.4
    assert min(taus) < 0


N_PAIRS = 150
PAIRS_SPLIT = (torch.arange(100), torch.arange(100, N_PAIRS))
# Each prompt has two pairs.
PAIRED = SimpleNamespace(groups=torch.arange(N_PAIRS) // 2)


def plant_preferences():
    """Inputs of chosen and of rejected responses [150, 8]; what is chosen lies further along one
    direction."""
    direction = randn(8, seed=4)
    a, b = randn(2, N_PAIRS, 8, seed=5)
    b_is_better = ((a - b) @ direction < 0)[:, None]
    chosen = torch.where(b_is_better, b, a)
    rejected = torch.where(b_is_better, a, b)
    return chosen, rejected


def fit_planted(chosen, rejected, shuffle=None):
    """The numbers of a probe of pairs."""
    x = torch.cat([chosen, rejected])
    numbers, _ = fit_pairs(x, PAIRED, PAIRS_SPLIT, shuffle=shuffle)
    return numbers


def test_the_pairs_probe_finds_planted_preferences():
    numbers = fit_planted(*plant_preferences())
    assert numbers["accuracy"] > 0.9
    # Single responses, to whatever prompt, are harder to tell than pairs.
    assert 0.7 < numbers["auc"] < numbers["accuracy"]


def test_the_pairs_probe_on_equal_responses_is_half_right():
    chosen, _ = plant_preferences()
    assert fit_planted(chosen, chosen) == {"accuracy": 0.5, "auc": 0.5}


def test_responses_that_differ_by_rounding_alone_are_half_right():
    chosen, rejected = plant_preferences()
    rejected[100:] = chosen[100:] + 1e-13 * randn(50, 8, seed=6)
    assert fit_planted(chosen, rejected)["accuracy"] == 0.5


def test_the_pairs_probe_is_not_fitted_to_the_test():
    """With the pairs of the test the other way round it is right where it was wrong."""
    chosen, rejected = plant_preferences()
    numbers = fit_planted(chosen, rejected)
    swapped_chosen = torch.cat([chosen[:100], rejected[100:]])
    swapped_rejected = torch.cat([rejected[:100], chosen[100:]])
    backwards = fit_planted(swapped_chosen, swapped_rejected)
    assert backwards["accuracy"] == pytest.approx(1 - numbers["accuracy"])


def test_the_pairs_probe_with_shuffled_labels_is_at_chance():
    chosen, rejected = plant_preferences()
    accuracies = []
    for seed in range(8):
        accuracies.append(fit_planted(chosen, rejected, shuffle=seed)["accuracy"])
    assert 0.25 < np.mean(accuracies) < 0.75
    assert max(accuracies) < 0.9


# ---------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("difference", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_planted_reward_is_read_from_the_policy_alone(material, tmp_path, capsys, difference):
    rows = probe_reward(material, tmp_path / "out", difference=difference)["rows"]
    names = ["policy, activations", "base, activations", "random model, activations"]
    names += ["bag of words", "length", "shuffled labels"]
    assert list(rows) == names
    assert summary(tmp_path / "out")["rows"].keys() == rows.keys()

    policy = rows["policy, activations"]
    assert policy["tau"][0] > 0.6
    assert policy["largest_p"] < 0.01
    for name in names[1:-1]:
        assert abs(rows[name]["tau"][0]) < 0.35, name
        assert rows[name]["policy_less"][0] > 0.35, name
    # Fitted to noise, a probe still lies along what varies most, here the planted direction, its
    # sign a coin; but it has no size.
    assert rows["shuffled labels"]["r2"][0] < 0.5
    assert policy["r2"][0] > 0.9

    printed = capsys.readouterr().out
    assert "at chance by construction" in printed
    assert "Kendall's tau" in printed
    lines_of_rows = [line for line in printed.splitlines() if "+-" in line]
    assert len(lines_of_rows) == 6


REWARDS = """
def same(prompts, responses):
    return [0.1] * len(responses)

def rare(prompts, responses):
    return [float(prompt == prompts[0]) for prompt in prompts]
"""


@pytest.fixture
def no_policy(monkeypatch):
    """A test that takes this fixture fails where a policy is loaded."""

    def load_policy(*args, **kwargs):
        pytest.fail("a policy was loaded")

    monkeypatch.setattr(reward_probes, "load_policy", load_policy)


@pytest.mark.parametrize("name", ["same", "rare"])
def test_a_reward_without_any_spread_is_refused(material, tmp_path, no_policy, name):
    """Before a policy is loaded, whether the reward is constant everywhere or in one side of a
    split."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    settings = {
        "task": "sequence",
        "dataset": f"{material}/sft.jsonl",
        "reward": f"{tmp_path}/rewards.py:{name}",
    }
    words = f"rewards.py:{name}: all .* responses of split 0 have the reward"
    with pytest.raises(InputError, match=words):
        probe_reward(material, tmp_path / "out", **settings)


NOTHING_TO_TRAIN_ON = "--test_share 0.999 leaves 1 prompts for training"


@pytest.mark.slow
def test_a_test_share_leaves_prompts_to_train_on_for_rewards(material, tmp_path, no_policy):
    with pytest.raises(InputError, match=NOTHING_TO_TRAIN_ON):
        probe_reward(material, tmp_path / "out", task="sequence", test_share=0.999)


def test_a_test_share_leaves_prompts_to_train_on_for_pairs(material, tmp_path, no_policy):
    settings = probe_settings(material, tmp_path / "out", test_share=0.999)
    del settings["triples"]
    with pytest.raises(InputError, match=NOTHING_TO_TRAIN_ON):
        reward_probes.pairs(PairsConfig(**settings))


@pytest.mark.slow
def test_features_of_sparse_autoencoders_stand_beside_activations(material, tmp_path):
    sae = SparseAutoencoder(D, 64, normalize="none", seed=1)
    for name in ("policy/0_residual", "policy/1_residual", "base/0_residual"):
        save_sae(sae, tmp_path / name)
    with pytest.raises(InputError, match="base/1_residual"):
        probe_reward(material, tmp_path / "out", sae=str(tmp_path))

    save_sae(sae, tmp_path / "base/1_residual")
    rows = probe_reward(material, tmp_path / "out", sae=str(tmp_path))["rows"]
    features = ["policy, SAE features", "base, SAE features"]
    activations = ["policy, activations", "base, activations"]
    assert list(rows)[:4] == features + activations
    assert rows["policy, SAE features"]["tau"][0] > 0.6
    assert abs(rows["base, SAE features"]["tau"][0]) < 0.35


def test_the_layers_are_those_that_have_autoencoders(tmp_path):
    for name in ("10_mlp", "3_mlp", "2_residual", "notes_mlp"):
        (tmp_path / "policy" / name).mkdir(parents=True)
    folder = str(tmp_path)
    assert reward_probes.list_sae_layers(RewardConfig(sae=folder)) == "3,10"
    assert reward_probes.list_sae_layers(RewardConfig(sae=folder, site="residual")) == "2"
    with pytest.raises(InputError, match="no autoencoder of a layer's attention"):
        reward_probes.list_sae_layers(RewardConfig(sae=folder, site="attention"))


@pytest.mark.slow
def test_one_seed_has_no_interval(material, tmp_path):
    found = probe_reward(material, tmp_path / "out", seeds=1, layers="highest:1")
    _, half_width = found["rows"]["length"]["tau"]
    assert half_width is None
    assert "NaN" not in (tmp_path / "out" / "summary.json").read_text()
    # The only block that moved.
    assert found["layers"] == [1]


def run_command(name, settings):
    """One command of probe.py; unlike cli.run_command() it does not leave the process group."""
    config_class, function = probe.COMMANDS[name]
    function(cli.parse(config_class, flags(settings)))


def run_three_probes(material, folder):
    """A probe of answers, one of words and one of pairs, one after another."""
    common = {
        "policy": f"{material}/policy",
        "model": f"{material}/base",
        "site": "residual",
        "seeds": 2,
        "layers": "0",
    }
    answers = {"task": "sequence", "dataset": f"{material}/sft.jsonl", "reward": "world:gold"}
    words = {"triples": 50, "max_rows": 100}
    pairs = {"dataset": f"{material}/pairs.jsonl"}
    run_command("reward", common | answers | {"output_dir": f"{folder}/answers"})
    run_command("reward", common | words | {"output_dir": f"{folder}/words"})
    run_command("pairs", common | pairs | {"output_dir": f"{folder}/pairs"})


@pytest.mark.slow
def test_two_processes_change_nothing(material, tmp_path):
    # The one is a new process as well: here the embedded world is small (conftest.py), there whole.
    join(*ranks(2, run_three_probes, material, tmp_path / "two"))
    join(*ranks(1, run_three_probes, material, tmp_path / "one"))

    for name in ("answers", "words", "pairs"):
        one = summary(tmp_path / "one" / name)
        two = summary(tmp_path / "two" / name)
        assert one["rows"].keys() == two["rows"].keys()
        for row, numbers in one["rows"].items():
            for metric in one["metrics"]:
                expected = pytest.approx(two["rows"][row][metric], abs=1e-3)
                assert numbers[metric] == expected, (name, row, metric)


@pytest.fixture
def files(material, tmp_path, monkeypatch):
    """The working directory: two bad lexicons and a good one, and a file of one demonstration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.tsv").write_text("good\t2\nbad\t-2\nbig\t0\n")
    (tmp_path / "broken.tsv").write_text("good\t2\nbad -2\n")
    lines = [f"{word}\t{value}" for word, value in world.LEXICON.items()]
    (tmp_path / "all.tsv").write_text("\n".join(lines) + "\n")
    write_rows(tmp_path / "one.jsonl", [{"prompt": "p", "response": " ".join(world.LEXICON)}])
    return tmp_path


@pytest.mark.parametrize(
    "command, changes, words",
    [
        ("reward", "--reward few.tsv", "1 positive, 1 neutral, 1 negative"),
        ("reward", "--reward broken.tsv", "broken.tsv:2: not WORD<TAB>VALUE"),
        ("reward", "--dataset one.jsonl --reward all.tsv", "after 1 prompts only"),
        ("reward", "--dataset one.jsonl", "--reward names the target"),
        pytest.param(
            "reward", "--layers 7 --max_rows 100", "layers 0 to 1", marks=pytest.mark.slow
        ),
        ("reward", "--site head", "--site"),
        ("reward", "--sae .", "no folder policy/"),
        ("pairs", "--policy ./none", "no such"),
    ],
)
def test_wrong_input_is_one_line(material, files, capsys, command, changes, words):
    # Where a flag comes twice, the last one counts.
    usual = f"--policy {material}/policy --model {material}/base --output_dir out"
    error = probe_refused(capsys, command, *usual.split(), *changes.split())
    assert words in error
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "flag, settings",
    [
        ("--task", {"task": "words"}),
        ("--neutral", {"neutral": 0.0}),
        ("--triples", {"triples": 1}),
        ("--difference", {"difference": True, "task": "sequence"}),
        ("--test_share", {"test_share": 1.0}),
        ("--seeds", {"seeds": 0}),
    ],
)
def test_wrong_settings_name_their_flag(flag, settings):
    with pytest.raises(ValueError, match=flag):
        RewardConfig(**settings)


def test_pairs_have_a_default_folder():
    assert PairsConfig().output_dir == "runs/probe/pairs"
