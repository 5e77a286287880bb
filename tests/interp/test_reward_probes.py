"""probe.py reward and pairs: triples and splits, inputs, probes on planted rewards, controls at chance, one process against two."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import join, ranks, write_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
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
U = torch.nn.functional.normalize(
    torch.arange(32.0).sin(), dim=0
)  # a direction that random weights know nothing of


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with base/, a random model, and policy/, the same with each word's value in its embedding; demonstrations and pairs."""
    root = tmp_path_factory.mktemp("probe")
    config = world.model_config()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 64, 2
    torch.manual_seed(0)
    lm, ids = AutoModelForCausalLM.from_config(config), world.tokenizer().get_vocab()
    lm.get_input_embeddings().weight.data.mul_(20)
    for name in ("base", "policy"):
        lm.save_pretrained(root / name)
        world.tokenizer().save_pretrained(root / name)
        for word, value in world.LEXICON.items():
            lm.get_input_embeddings().weight.data[ids[word]] += value * U
        lm.base_model.layers[1].mlp.dense_h_to_4h.weight.data.mul_(1.1)
    write_rows(root / "sft.jsonl", world.demonstrations(200))
    write_rows(root / "pairs.jsonl", world.preferences(120))
    return root


def settings(base, folder, **changes):
    flags = {
        "policy": f"{base}/policy",
        "model": f"{base}/base",
        "site": "residual",
        "layers": "0,1",
        "triples": 200,
        "max_rows": 300,
    }
    return {**flags, "seeds": 2, "output_dir": str(folder), **changes}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------------------- the texts


def triples_of(tokenizer, rows, lexicon, max_length=0, **changes):
    config = {
        "dataset": "data",
        "neutral": 1.0,
        "test_share": 0.3,
        "triples": 60,
        "seeds": 3,
        "chat_template": False,
        **changes,
    }
    return word_texts(SimpleNamespace(**config), tokenizer, rows, lexicon, max_length)


def test_triples_share_their_context_and_splits_share_nothing():
    tokenizer, rows = world.tokenizer(), world.demonstrations(300)
    prompts = {row["prompt"] for row in rows}
    texts = triples_of(tokenizer, rows, world.LEXICON)
    assert len(texts.ids) == 3 * 3 * 60 and set(texts.names) == set(world.LEXICON)
    seen, used = set(), []
    for train, test in texts.splits:
        sides = []
        for side in (train.tolist(), test.tolist()):
            words, asked = Counter(), set()
            for i in range(0, len(side), 3):
                context, *others = (texts.ids[side[i + j]][:-1] for j in range(3))
                assert context == others[0] == others[1]
                last = [tokenizer.decode(texts.ids[side[i + j]][-1]) for j in range(3)]
                values = [world.LEXICON[word] for word in last]
                assert values[0] > 0 == values[1] > values[2]
                assert [texts.values[side[i + j]].item() for j in range(3)] == values
                assert [texts.names[texts.units[side[i + j]]] for j in range(3)] == last
                assert [texts.first[side[i + j]] for j in range(3)] == [len(context)] * 3
                text = tokenizer.decode(context)
                prompt = next(p for p in prompts if text.startswith(p))
                assert any(
                    row["response"].startswith(text[len(prompt) :].strip())
                    for row in rows
                    if row["prompt"] == prompt
                )
                words.update(last), asked.add(prompt)
            sides.append((words, asked))
            used += side
            for sign in (1, 0, -1):  # every word about as often as the others
                counts = [n for word, n in words.items() if np.sign(world.LEXICON[word]) == sign]
                assert max(counts) - min(counts) <= 1
        (words, asked), (test_words, test_asked) = sides
        assert not words.keys() & test_words.keys() and not asked & test_asked
        assert not {word[:4] for word in words} & {
            word[:4] for word in test_words
        }  # 'terrible' and 'terrific' are on one side
        assert (
            len(words) + len(test_words) == 84
            and abs(len(test_words) - 24) <= 2
            and len(test) == 3 * 18
        )
        seen.add(frozenset(test_words))
    assert len(seen) == 3 and sorted(used) == list(
        range(540)
    )  # each seed has words and texts of its own


def letters():
    """A tokenizer of single letters: the words of a lexicon have several tokens."""
    vocabulary = {
        token: i for i, token in enumerate(["<eos>", "<unk>", *" abcdefghijklmnopqrstuvwxyz"])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def test_words_of_several_tokens_count_by_their_last():
    values = dict(zip("good fine nice great sweet happy bad poor sad mean evil sick red blue tall round plain new naive".split(),
                      [2.0] * 6 + [-2.0] * 6 + [0.5] * 6 + [3.0]))  # fmt: skip
    values["na-ive"] = values.pop("naive")  # no token for the hyphen
    rows = [
        {"prompt": f"the {c} ", "response": f"is {' '.join(values)} Good unknown"}
        for c in "abcdefgh"
    ]
    texts = triples_of(letters(), rows, values, max_length=9)
    assert texts.names == sorted(values.keys() - {"na-ive"})
    for ids, first, unit, length in zip(texts.ids, texts.first, texts.units, texts.lengths):
        word = texts.names[unit]
        assert (
            letters().decode(ids).endswith(word)
            and first == len(ids) - 1
            and len(ids) <= 9
            and length > len(word)
        )


def test_a_bos_stays_in_front_of_a_cut_context():
    from tokenizers.processors import TemplateProcessing

    tokenizer = letters()
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    values = dict(zip("good fine nice great sweet happy bad poor sad mean evil sick red blue tall round plain new".split(),
                      [2.0] * 6 + [-2.0] * 6 + [0.5] * 6))  # fmt: skip
    rows = [{"prompt": f"the {c} ", "response": f"is {' '.join(values)}"} for c in "abcdefgh"]
    texts = triples_of(tokenizer, rows, values, max_length=9)
    for ids, first, unit in zip(texts.ids, texts.first, texts.units):
        assert ids[0] == 0 and 0 not in ids[1:] and first == len(ids) - 1 == 8
        assert tokenizer.decode(ids).endswith(texts.names[unit])


def test_prompts_that_differ_by_white_space_are_on_one_side():
    """In the splits by prompt, in the triples, and as units of a bootstrap."""
    tokenizer, topics = world.tokenizer(), sorted(world.TOPICS)[:8]
    rows = []
    for i, row in enumerate(world.demonstrations(120)):
        blank = " " * (1 + i % 3)
        rows.append({**row, "prompt": f"review{blank}the{blank}{topics[i % 8]} :"})
    groups, splits = split_by_prompt(SimpleNamespace(dataset="data", seeds=3, test_share=0.3), rows)
    assert groups.tolist() == [i % 8 for i in range(120)]
    assert all(
        not set(groups[train].tolist()) & set(groups[test].tolist()) for train, test in splits
    )
    assert groups_of([row["prompt"] for row in rows]).tolist() == groups.tolist()

    texts = triples_of(tokenizer, rows, world.LEXICON)
    ids = set(tokenizer.convert_tokens_to_ids(topics))
    for sides in texts.splits:
        train, test = (
            {texts.ids[i][2] for i in side.tolist()} for side in sides
        )  # the topic is a text's third token
        assert train | test <= ids and train and test and not train & test


def test_a_test_share_that_leaves_nothing_to_fit():
    rows = [{"prompt": f"prompt {i}"} for i in range(10)]
    config = SimpleNamespace(dataset="data", seeds=1, test_share=0.7)
    assert len(split_by_prompt(config, rows)[1][0][0]) == 3
    config.test_share = 0.9
    with pytest.raises(InputError, match="--test_share 0.9 leaves 1 prompts for training"):
        split_by_prompt(config, rows)


def test_split_things_and_deal():
    rng = np.random.default_rng(0)
    for n, share, expected in ((10, 0.3, 3), (3, 0.01, 1), (3, 0.99, 2)):
        train, test = split_things(rng, list(range(n)), share)
        assert sorted(train + test) == list(range(n)) and len(test) == expected
    assert sorted(Counter(deal(rng, "abc", 7)).values()) == [2, 2, 3]


def test_differences_to_the_neutral_word():
    texts = triples_of(world.tokenizer(), world.demonstrations(100), world.LEXICON, triples=9)
    x = randn(len(texts.ids), 4)
    new, inputs = subtract_neutral(texts, {"x": x})
    at = 0
    for i in range(0, len(texts.ids), 3):
        for j in (0, 2):
            assert torch.equal(inputs["x"][at], x[i + j] - x[i + 1])
            assert (
                new.values[at] == texts.values[i + j] - texts.values[i + 1]
                and new.units[at] == texts.units[i + j]
            )
            side = [k for k, split in enumerate(texts.splits) if i + j in split[1].tolist()]
            assert [k for k, split in enumerate(new.splits) if at in split[1].tolist()] == side
            at += 1
    assert at == len(new.ids) and sum(len(part) for split in new.splits for part in split) == at


def test_pairs_are_split_by_prompt():
    config, rows = (
        SimpleNamespace(seeds=3, test_share=0.3, chat_template=False, dataset="data"),
        world.preferences(90),
    )
    texts = pair_texts(config, world.tokenizer(), rows, 0, ALONE)
    for train, test in texts.splits:
        sides = [{rows[i]["prompt"] for i in side.tolist()} for side in (train, test)]
        assert not sides[0] & sides[1] and sorted(train.tolist() + test.tolist()) == list(range(90))
    for i, side in ((5, "chosen"), (95, "rejected")):
        text = f"{rows[5]['prompt']} {rows[5][side]} <eos>"
        assert (
            world.tokenizer().decode(texts.ids[i]) == text
            and texts.lengths[i] == len(rows[5][side].split()) + 1
        )
        assert world.tokenizer().decode(texts.ids[i][: texts.first[i]]) == rows[5]["prompt"]


# -------------------------------------------------------------------------------------------------------------------------- the inputs


def test_mean_inputs_one_text_at_a_time(base, monkeypatch):
    monkeypatch.setattr(reward_probes, "TOKENS_AT_ONCE", 40)  # several micro-batches
    lm = AutoModelForCausalLM.from_pretrained(base / "policy").eval()
    lengths, first = [3, 9, 5, 9, 12, 1], [2, 0, 3, 8, 5, 0]
    ids = [
        torch.randint(3, 200, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in lengths
    ]
    texts = SimpleNamespace(ids=ids, first=first)
    places = [(0, "mlp"), (1, "mlp")]
    sae = SimpleNamespace(encode=lambda x: torch.cat([x, -x], -1).relu())
    found, features = (
        mean_inputs(lm, texts, places, ALONE, "float32", saes)
        for saes in (None, dict.fromkeys(places, sae))
    )
    for i, row in enumerate(ids):
        kept = []
        hooks = [
            block.mlp.register_forward_hook(lambda module, args, output: kept.append(output[0]))
            for block in lm.base_model.layers
        ]
        with torch.no_grad():
            lm(torch.tensor([row]))
        [hook.remove() for hook in hooks]
        expected = torch.cat(
            [sum(x[t] for t in range(first[i], len(row))) / (len(row) - first[i]) for x in kept]
        )
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
        expected = torch.cat([torch.cat([x, -x], 1)[first[i] :].relu().mean(0) for x in kept])
        torch.testing.assert_close(features[i], expected, rtol=1e-4, atol=1e-5)


def test_bag_of_words_by_counting():
    ids = [[7, 3, 7], [900, 3], [5]]
    assert bag_of_words(SimpleNamespace(ids=ids)).tolist() == [
        [Counter(row)[token] for token in (3, 5, 7, 900)] for row in ids
    ]


# -------------------------------------------------------------------------------------------------------------------------- the probes


def planted(noise, n_words=40, contexts=5, seed=0):
    """Inputs in which words of known value are w v + noise, and Texts that split them by word."""
    values = randn(n_words, seed=seed)
    units = torch.arange(n_words).repeat_interleave(contexts)
    x = values[units, None] * randn(6, seed=1) + noise * randn(len(units), 6, seed=2) + 4
    split = ((units < 25).nonzero()[:, 0], (units >= 25).nonzero()[:, 0])
    return x, Texts(
        [], [], None, values[units], units, units, [f"w{i}" for i in range(n_words)], [split]
    )


def test_reward_probe_against_loops():
    x, texts = planted(1.0)
    numbers, more = fit_reward(x, texts, texts.splits[0])
    train, test = texts.splits[0]
    z = x / x[train].std(0)
    z, z_test = (z[train] - z[train].mean(0)).double(), (z[test] - z[train].mean(0)).double()
    y = texts.values[train].double()
    weight = torch.linalg.solve(
        z.T @ z + more["penalty"] * torch.eye(6).double(), z.T @ (y - y.mean())
    )
    of_word = {}
    for row, i in zip(z_test, test):
        of_word.setdefault(texts.names[texts.units[i]], []).append((row @ weight + y.mean()).item())
    predicted = {word: sum(p) / len(p) for word, p in of_word.items()}
    assert [name for name, *_ in more["predictions"]] == list(predicted)
    assert [p for *_, p in more["predictions"]] == pytest.approx(list(predicted.values()), abs=1e-5)
    true = {word: texts.values[texts.units == int(word[1:])][0].item() for word in predicted}
    order = [
        np.sign(predicted[a] - predicted[b]) * np.sign(true[a] - true[b])
        for a in true
        for b in true
        if a < b
    ]
    assert (
        numbers["tau"] == pytest.approx(np.mean(order), abs=1e-9)
        and more["n_test"] == 15
        and more["n_train"] == 25
    )
    mean = np.mean(list(true.values()))
    r2 = 1 - sum((predicted[w] - true[w]) ** 2 for w in true) / sum(
        (true[w] - mean) ** 2 for w in true
    )
    assert numbers["r2"] == pytest.approx(r2, abs=1e-5) and 0.3 < numbers["tau"] < 1
    assert numbers["sign"] == pytest.approx(
        np.mean([np.sign(predicted[w]) == np.sign(true[w]) for w in true])
    )
    assert (
        fit_reward(x[:, :0].new_ones(len(x), 2), texts, texts.splits[0])[0]["tau"] == 0
    )  # nothing to tell words apart


def test_word_identity_alone_is_at_chance_and_so_are_shuffled_labels():
    x, texts = planted(0.3)
    one_hot = torch.nn.functional.one_hot(texts.units).float()
    numbers, more = fit_reward(one_hot, texts, texts.splits[0])
    assert numbers["tau"] == 0 and more["p"] == 1 and numbers["r2"] <= 0
    assert fit_reward(x, texts, texts.splits[0])[0]["tau"] > 0.8
    x = randn(len(x), 200, seed=3) + x.repeat(1, 34)[:, :200]
    taus = [fit_reward(x, texts, texts.splits[0], shuffle=seed)[0]["tau"] for seed in range(12)]
    assert abs(np.mean(taus)) < 0.4 and min(taus) < 0


def test_pairs_probe_on_planted_preferences():
    n, direction = 150, randn(8, seed=4)
    chosen, rejected = randn(2, n, 8, seed=5)
    swap = (chosen - rejected) @ direction < 0
    chosen, rejected = (
        torch.where(swap[:, None], rejected, chosen),
        torch.where(swap[:, None], chosen, rejected),
    )
    texts = SimpleNamespace(groups=torch.arange(n) // 2)
    split = (torch.arange(100), torch.arange(100, n))
    numbers, _ = fit_pairs(torch.cat([chosen, rejected]), texts, split)
    assert numbers["accuracy"] > 0.9 and 0.7 < numbers["auc"] < numbers["accuracy"]
    same, _ = fit_pairs(torch.cat([chosen, chosen]), texts, split)
    assert same == {"accuracy": 0.5, "auc": 0.5}
    swapped = torch.cat([chosen[:100], rejected[100:], rejected[:100], chosen[100:]])
    backwards, _ = fit_pairs(swapped, texts, split)
    assert backwards["accuracy"] == pytest.approx(
        1 - numbers["accuracy"]
    )  # the test is not what it was fitted to
    shuffled = [
        fit_pairs(torch.cat([chosen, rejected]), texts, split, shuffle=seed)[0]["accuracy"]
        for seed in range(8)
    ]
    assert 0.25 < np.mean(shuffled) < 0.75 and max(shuffled) < 0.9


# ------------------------------------------------------------------------------------------------------------------------ the commands


def test_a_planted_reward_is_read_from_the_policy_alone(base, tmp_path, capsys):
    for difference in (False, True):
        summary = reward_probes.reward(
            RewardConfig(**settings(base, tmp_path / f"{difference}", difference=difference))
        )
        rows = summary["rows"]
        models = [f"{name}, activations" for name in ("policy", "base", "random model")]
        assert list(rows) == [*models, "bag of words", "length", "shuffled labels"]
        assert (
            rows["policy, activations"]["tau"][0] > 0.6
            and rows["policy, activations"]["largest_p"] < 0.01
        )
        for name in list(rows)[1:-1]:
            assert abs(rows[name]["tau"][0]) < 0.35 and rows[name]["policy_less"][0] > 0.35, name
        # Fitted to noise, a probe still lies along what varies most, here the planted direction, its sign a coin; but it has no size.
        assert rows["shuffled labels"]["r2"][0] < 0.5 < 0.9 < rows["policy, activations"]["r2"][0]
        assert (
            json.loads((tmp_path / f"{difference}" / "summary.json").read_text())["rows"].keys()
            == rows.keys()
        )
    out = capsys.readouterr().out
    assert (
        "at chance by construction" in out
        and "Kendall's tau" in out
        and len([line for line in out.splitlines() if "+-" in line]) == 12
    )


def test_a_reward_without_any_spread(base, tmp_path, monkeypatch):
    """One line before a policy is loaded, whether the reward is constant everywhere or in one side of a split."""
    monkeypatch.setattr(
        reward_probes, "load_policy", lambda *args, **kwargs: pytest.fail("a policy was loaded")
    )
    (tmp_path / "rewards.py").write_text(
        "def same(prompts, responses): return [0.1] * len(responses)\n"
        "def rare(prompts, responses): return [float(p == prompts[0]) for p in prompts]\n"
    )
    for name in ("same", "rare"):
        flags = {
            "task": "sequence",
            "dataset": f"{base}/sft.jsonl",
            "reward": f"{tmp_path}/rewards.py:{name}",
        }
        with pytest.raises(
            InputError, match=f"rewards.py:{name}: all .* responses of split 0 have the reward"
        ):
            reward_probes.reward(RewardConfig(**settings(base, tmp_path / name, **flags)))


@pytest.mark.parametrize("kind", ["reward", "pairs"])
def test_a_test_share_that_leaves_nothing_to_train_on(base, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(
        reward_probes, "load_policy", lambda *args, **kwargs: pytest.fail("a policy was loaded")
    )
    flags = settings(base, tmp_path / "a", test_share=0.999)
    if kind == "reward":
        config = RewardConfig(**flags, task="sequence")
    else:
        del flags["triples"]
        config = PairsConfig(**flags)
    with pytest.raises(InputError, match="--test_share 0.999 leaves 1 prompts for training"):
        getattr(reward_probes, kind)(config)


def test_features_of_sparse_autoencoders_stand_beside_activations(base, tmp_path):
    for name in ("policy/0_residual", "policy/1_residual", "base/0_residual"):
        save_sae(SparseAutoencoder(32, 64, normalize="none", seed=1), tmp_path / name)
    with pytest.raises(InputError, match="base/1_residual"):
        reward_probes.reward(RewardConfig(**settings(base, tmp_path / "a", sae=str(tmp_path))))
    save_sae(SparseAutoencoder(32, 64, normalize="none", seed=1), tmp_path / "base/1_residual")
    summary = reward_probes.reward(
        RewardConfig(**settings(base, tmp_path / "a", sae=str(tmp_path)))
    )
    names = [
        f"{name}, {kind}" for kind in ("SAE features", "activations") for name in ("policy", "base")
    ]
    assert (
        list(summary["rows"])[:4] == names
        and summary["rows"]["policy, SAE features"]["tau"][0] > 0.6
    )
    assert abs(summary["rows"]["base, SAE features"]["tau"][0]) < 0.35


def test_the_layers_are_those_that_have_autoencoders(tmp_path):
    for name in ("10_mlp", "3_mlp", "2_residual", "notes_mlp"):
        (tmp_path / "policy" / name).mkdir(parents=True)
    assert reward_probes.list_layers(RewardConfig(sae=str(tmp_path))) == "3,10"
    assert reward_probes.list_layers(RewardConfig(sae=str(tmp_path), site="residual")) == "2"
    with pytest.raises(InputError, match="no autoencoder of a layer's attention"):
        reward_probes.list_layers(RewardConfig(sae=str(tmp_path), site="attention"))


def test_one_seed_has_no_interval(base, tmp_path):
    summary = reward_probes.reward(
        RewardConfig(**settings(base, tmp_path / "a", seeds=1, layers="highest:1"))
    )
    assert (
        summary["rows"]["length"]["tau"][1] is None
        and "NaN" not in (tmp_path / "a/summary.json").read_text()
    )
    assert summary["layers"] == [1]  # the only block that moved


def probes(base, folder):
    """Three probes, one after another."""
    common = [
        "--policy",
        f"{base}/policy",
        "--model",
        f"{base}/base",
        "--site",
        "residual",
        "--seeds",
        "2",
        "--layers",
        "0",
    ]
    for name, *flags in (("reward", "--task", "sequence", "--dataset", f"{base}/sft.jsonl", "--reward", "world:gold"),
                         ("reward", "--triples", "50", "--max_rows", "100"), ("pairs", "--dataset", f"{base}/pairs.jsonl")):  # fmt: skip
        config_class, function = probe.COMMANDS[
            name
        ]  # not run_command(), which leaves the process group
        function(
            cli.parse(
                config_class, [*flags, *common, "--output_dir", f"{folder}/{name}{len(flags)}"]
            )
        )


@pytest.mark.slow
def test_two_processes_change_nothing(base, tmp_path):
    processes = ranks(2, probes, base, tmp_path / "two")
    probes(base, tmp_path / "one")
    join(*processes)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["pairs2", "reward4", "reward6"]
    for name in names:
        one, two = (
            json.loads((tmp_path / n / name / "summary.json").read_text()) for n in ("one", "two")
        )
        assert one["rows"].keys() == two["rows"].keys()
        for row in one["rows"]:
            for metric in one["metrics"]:
                assert one["rows"][row][metric] == pytest.approx(
                    two["rows"][row][metric], abs=1e-3
                ), (name, row, metric)


def error(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        cli.run_command(probe.COMMANDS, [str(a) for a in args])
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(lines) == 1
    return lines[0]


def test_errors(base, tmp_path, capsys):
    (tmp_path / "few.tsv").write_text("good\t2\nbad\t-2\nbig\t0\n")
    (tmp_path / "broken.tsv").write_text("good\t2\nbad -2\n")
    write_rows(tmp_path / "one.jsonl", [{"prompt": "p", "response": " ".join(world.LEXICON)}])
    common = [
        "--policy",
        f"{base}/policy",
        "--model",
        f"{base}/base",
        "--output_dir",
        tmp_path / "out",
    ]
    assert "1 positive, 1 neutral, 1 negative" in error(
        capsys, "reward", *common, "--reward", tmp_path / "few.tsv"
    )
    assert "broken.tsv:2: not WORD<TAB>VALUE" in error(
        capsys, "reward", *common, "--reward", tmp_path / "broken.tsv"
    )
    assert "after 1 prompts only" in error(
        capsys,
        "reward",
        *common,
        "--dataset",
        tmp_path / "one.jsonl",
        "--reward",
        lexicon(tmp_path),
    )
    assert "--reward names the target" in error(
        capsys, "reward", *common, "--dataset", tmp_path / "one.jsonl"
    )
    assert "layers 0 to 1" in error(capsys, "reward", *common, "--layers", "7", "--max_rows", 100)
    assert "--site" in error(capsys, "reward", *common, "--site", "head")
    assert "no folder policy/" in error(capsys, "reward", *common, "--sae", tmp_path)
    assert "no such" in error(
        capsys, "pairs", "--policy", tmp_path / "none", "--output_dir", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def lexicon(tmp_path):
    (tmp_path / "all.tsv").write_text(
        "".join(f"{word}\t{value}\n" for word, value in world.LEXICON.items())
    )
    return tmp_path / "all.tsv"


def test_settings():
    sequence = {"difference": True, "task": "sequence"}
    for bad in (
        {"task": "words"},
        {"neutral": 0.0},
        {"triples": 1},
        sequence,
        {"test_share": 1.0},
        {"seeds": 0},
    ):
        with pytest.raises(ValueError, match=f"--{list(bad)[0]}"):
            RewardConfig(**bad)
    assert PairsConfig().output_dir == "runs/probe/pairs"
