"""probe.py features and ablate: on tiny models, against loops and against what is planted; explainers on a loopback server.

N tokens, M features, C concepts, D hidden
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from support import GOOD_REPLY, Endpoint, chat, probe_refused, run_probe
from transformers import AutoModelForCausalLM

from nanorlhf import world
from nanorlhf.hf.activations import captured, replaced
from nanorlhf.interp import ablation, activation_store, explainer, feature_scores, world_concepts
from nanorlhf.interp.activation_store import Tokens, hold_out, token_rows
from nanorlhf.interp.features import FeaturesConfig, top_contexts, top_features
from nanorlhf.interp.sae_files import load_sae, save_sae
from nanorlhf.models import Policy, load_policy, save_policy
from nanorlhf.rollout import generate
from nanorlhf.sae import SparseAutoencoder, TopKSAE

M, K = 64, 8


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """model/ (2 random blocks, embedded world's words), sae/ and vanilla/ (fitted to nothing), texts.jsonl, reward.py."""
    root = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    config = world.model_config()
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 32, 64
    save_policy(
        Policy(AutoModelForCausalLM.from_config(config), value_head=False),
        world.tokenizer(),
        str(root / "model"),
    )
    notes = {"model": str(root / "model"), "layer": 1, "site": "mlp"}
    x = torch.randn(500, 32)
    save_sae(TopKSAE(32, M, K, seed=1).fit(0.02 * x), str(root / "sae"), **notes)
    save_sae(SparseAutoencoder(32, M, seed=2).fit(0.02 * x), str(root / "vanilla"), **notes)
    save_sae(TopKSAE(32, M, K), str(root / "unnamed"))
    save_sae(TopKSAE(16, M, K), str(root / "narrow"), **notes)
    rows = world.demonstrations(200)
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": row["prompt"]} for row in world.prompts("train")[:40]]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (root / "reward.py").write_text(
        "def words(prompts, responses):\n    return [len(set(r.split())) for r in responses]\n"
    )
    return root


def flags(command, material, out, **changes):
    defaults = {
        "features": {"sae": material / "sae", "dataset": material / "texts.jsonl", "eval_size": 40, "top": 3},
        "ablate": {"sae": material / "sae", "dataset": material / "prompts.jsonl", "reward": f"{material / 'reward.py'}:words",
                   "features": "1,2", "draws": 2, "n_answers": 2, "max_new_tokens": 12, "eval_size": 8},
    }  # fmt: skip
    values = defaults[command] | {"output_dir": out} | changes
    return [
        command,
        *(
            str(x)
            for name, value in values.items()
            for x in (f"--{name}", *(value if isinstance(value, list) else [value]))
        ),
    ]


def summary(path):
    return json.loads((path / "summary.json").read_text())


# ------------------------------------------------------------------------------------------------------------------------ concepts


def random_features(n=200, seed=0):
    """Sparse, dense, tied, negative and silent features [N, 7], labels [N, 3]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 7, generator=g).relu() * (torch.rand(n, 7, generator=g) < 0.5)
    x[:, 2], x[:, 3] = -x[:, 2], torch.randn(n, generator=g).round()
    x[:, 4], x[:, 5] = 0, torch.randn(n, generator=g)
    return x, torch.rand(n, 3, generator=g) < torch.tensor([0.1, 0.5, 0.02])


def test_aucs_of_all_pairs_are_the_loops():
    x, y = random_features()
    found = feature_scores.feature_aucs(feature_scores.sparse(x), y)
    for j in range(x.shape[1]):
        for c in range(y.shape[1]):
            wins = [
                1.0 if p > q else 0.5 if p == q else 0.0
                for p in x[y[:, c], j]
                for q in x[~y[:, c], j]
            ]
            assert found[j, c].item() == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert (found[4] == 0.5).all()


def test_correlations_are_numpys():
    x, y = random_features()
    found = feature_scores.feature_correlations(feature_scores.sparse(x), y)
    for j in (0, 1, 2, 3, 5, 6):
        for c in range(y.shape[1]):
            assert found[j, c].item() == pytest.approx(
                np.corrcoef(x[:, j], y[:, c])[0, 1], abs=1e-6
            )
    assert (found[4] == 0).all()


def test_a_part_of_the_tokens():
    x, y = random_features()
    assert torch.equal(
        feature_scores.on_tokens(feature_scores.sparse(x), y[:, 1]).to_dense(), x[y[:, 1]].T
    )


def test_chosen_on_one_half_measured_on_the_other():
    ids, scores = feature_scores.best_features(
        torch.tensor([[0.9, 0.1], [0.5, 0.8]]), torch.tensor([[0.6, 1.0], [1.0, 0.7]])
    )
    assert ids.tolist() == [0, 1] and scores.tolist() == pytest.approx([0.6, 0.7])


def test_planted_concepts_are_found_and_noise_is_not():
    """Feature 3 fires on adjectives, feature 5 before them; all others are noise, and so are the coordinates."""
    tokenizer, rows = world.tokenizer(), world.demonstrations(200)
    tokens = Tokens([tokenizer(row["response"]).input_ids for row in rows])
    names, table = world_concepts.concept_table(tokenizer)
    text_of, ids = activation_store.where(tokens)
    assert (
        ids.tolist() == [i for row in tokens.rows for i in row] and "value=+0" not in names
    )  # the same words as 'neutral'
    adjective = table[ids, names.index("adjective")]
    words = [tokenizer.decode([i]) in world.LEXICON for i in ids.tolist()]
    assert adjective.tolist() == words
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(tokens.total, 16, generator=g).relu()
    f = noise.clone()
    f[:, 3] = adjective * (1 + noise[:, 3])
    f[:-1, 5] = adjective[1:] & (text_of[1:] == text_of[:-1])
    x = torch.randn(tokens.total, 8, generator=g)
    found = world_concepts.measure_concepts(
        TopKSAE(8, 16, 2), x, feature_scores.sparse(f), tokens, tokenizer
    )
    row = found["concepts"]["adjective"]
    assert row["words"] == len({i for i, w in zip(ids.tolist(), words) if w}) and row[
        "tokens"
    ] == sum(words)
    assert (
        row["auc"]["feature"] == row["correlation"]["feature"] == 3 and row["auc"]["features"] == 1
    )
    assert all(
        row["auc"][control] < 0.7 and row["correlation"][control] < 0.3
        for control in world_concepts.CONTROLS
    )
    assert found["concepts"]["topic"]["auc"]["features"] < 0.7
    count = {"features": 1, "coordinates": 0, "untrained": 0}
    assert (
        found["found"]["concept"]["correlation"]
        == found["found"]["next"]["correlation"]
        == count | {"shuffled": 0}
    )
    assert found["found"]["word"]["correlation"] == count | {"features": 0}
    # A feature of all adjectives has a large AUC for some of them, too; never above 1 - (adjectives that are not) / 2 of the others.
    share = (sum(words) - row["tokens"] / 9) / tokens.total
    assert abs(found["concepts"]["value=+3"]["auc"]["features"] - (1 - share / 2)) < 0.05


# ------------------------------------------------------------------------------------------------------------------------ features


def test_descriptions_hold_what_the_model_does(material, tmp_path, capsys):
    run_probe(
        *flags(
            "features",
            material,
            tmp_path / "out",
            sae=[material / "sae", material / "vanilla"],
            features="7,2,40",
        )
    )
    printed, found = capsys.readouterr().out, summary(tmp_path / "out")["saes"]
    assert "single words" in printed and list(found) == [
        str(material / "sae"),
        str(material / "vanilla"),
    ]
    result = found[str(material / "sae")]
    assert [f["id"] for f in result["features"]] == [7, 2, 40] and result["m"] == M

    # By hand: one text at a time through the model, its MLP's output caught by a hook of our own.
    policy, tokenizer = load_policy(str(material / "model"), value_head=False), world.tokenizer()
    sae, rows = (
        load_sae(str(material / "sae")),
        [json.loads(line) for line in (material / "texts.jsonl").read_text().splitlines()],
    )
    texts = hold_out(token_rows(tokenizer, rows, 128)[0], 40, tokenizer)[1]
    codes, caught = [], []
    hook = policy.lm.gpt_neox.layers[1].mlp.register_forward_hook(
        lambda module, args, out: caught.append(out)
    )
    for text in texts:
        policy.lm(torch.tensor([text]))
        codes.append(sae.encode(caught.pop()[0]).detach())
    hook.remove()
    f, ids = torch.cat(codes), [i for text in texts for i in text]  # [N, M]
    assert result["tokens"] == len(ids)
    for described in result["features"]:
        j = described["id"]
        fired = f[:, j] != 0
        assert described["rate"] == pytest.approx(fired.double().mean().item())
        assert described["max"] == pytest.approx(f[:, j].max().item(), rel=1e-4)
        assert described["mean"] == pytest.approx(
            f[fired, j].mean().item() if fired.any() else 0, rel=1e-4
        )
        effect = policy.lm.lm_head.weight @ sae.W_dec[j] / sae.W_dec[j].norm()
        effect = effect - effect.mean()
        assert described["up"][0] == [
            tokenizer.decode([effect.argmax().item()]),
            pytest.approx(effect.max().item(), rel=1e-4),
        ]
        assert described["down"][0][1] == pytest.approx(effect.min().item(), rel=1e-4)
        for token, share, often in described["tokens"]:
            here = torch.tensor([tokenizer.decode([i]) == token for i in ids])
            assert share == pytest.approx((f[here, j].sum() / f[:, j].sum()).item(), rel=1e-3)
            assert often == pytest.approx(fired[here].double().mean().item())
        peaks = [code[:, j].max().item() for code in codes]
        best = described["contexts"][0]
        assert peaks[best["text"]] == max(peaks) and max(best["values"]) == 1
        assert best["values"] == pytest.approx(
            (codes[best["text"]][:, j] / max(peaks)).tolist(), abs=1e-3
        )
        assert best["tokens"] == [tokenizer.decode([i]) for i in texts[best["text"]]]


def test_a_model_of_unknown_words(material, tmp_path, capsys, pictures):
    """No truth is known: descriptions alone, and a picture of them; an ablation needs its features named."""
    other = tmp_path / "other"
    shutil.copytree(material / "model", other)
    tokenizer = world.tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(other)
    run_probe(*flags("features", material, tmp_path / "out", model=other))
    found = summary(tmp_path / "out")["saes"][str(material / "sae")]
    assert (
        len(found["features"]) == 3
        and "concepts" not in found
        and "concepts" not in capsys.readouterr().out
    )
    assert (tmp_path / "out" / "picture.png").exists()
    error = probe_refused(
        capsys, *flags("ablate", material, tmp_path / "abl", model=other, features="")
    )
    assert "does not speak the embedded world's words: name --features" in error


def test_top_features_are_those_of_largest_mean():
    x, _ = random_features()
    assert (
        top_features(feature_scores.sparse(x.relu()), 3)
        == x.relu().mean(0).argsort(descending=True)[:3].tolist()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sae": "nowhere"}, "nowhere: no sparse autoencoder here"),
        ({"sae": "narrow"}, "for activations of width 16, not 32"),
        ({"sae": "unnamed"}, "name --model, --layer and --site"),
        ({"layer": 2}, "the layers 0 to 1"),
        ({"features": "3,64"}, "has the features 0 to 63"),
        ({"features": "3,x"}, "--features 3,x: it must be numbers"),
        ({"features": "\u00b2"}, "it must be numbers"),
        ({"explainer": "http://localhost:1/v1"}, "name its model with --explainer_model"),
        ({"explainer": "runs/none"}, "no such run yet"),
    ],
)
def test_wrong_input_is_one_line(material, tmp_path, capfd, changes, words):
    changes = {k: material / v if k == "sae" else v for k, v in changes.items()}
    assert words in probe_refused(capfd, *flags("features", material, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------- explainer


def explained(material, out, endpoint, **changes):
    options = {
        "explainer": endpoint.url,
        "explainer_model": "tiny",
        "features": "1,2,3",
        "pause": 0.01,
        "timeout": 0.3,
        "eval_size": 8,
    }
    return flags("features", material, out, **options | changes)


def test_an_endpoint_is_asked_once_for_each_feature(material, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint(
        (429, ""), (500, "busy"), chat(f"Sure:\n```json\n{GOOD_REPLY}\n```"), chat(GOOD_REPLY)
    ) as endpoint:
        run_probe(*explained(material, tmp_path / "out", endpoint))
        assert len(endpoint.asked) == 5  # 2 tries in vain, 3 features
        path, headers, body = endpoint.asked[0]
        assert (
            path == "/v1/chat/completions"
            and headers["Authorization"] == "Bearer secret"
            and body["model"] == "tiny"
        )
        result = summary(tmp_path / "out")["saes"][str(material / "sae")]["features"]
        assert [f["description"] for f in result] == ["Fires on adjectives."] * 3 and all(
            f["related"] is True for f in result
        )
        prompt, context = body["messages"][0]["content"], result[0]["contexts"][0]
        assert all(token.strip() in prompt for token in context["tokens"]) and "[[10]]" in prompt
        run_probe(*explained(material, tmp_path / "out", endpoint))  # all there
        assert len(endpoint.asked) == 5
        run_probe(*explained(material, tmp_path / "out", endpoint, features="1,2,3,4"))
        assert len(endpoint.asked) == 6


@pytest.mark.parametrize(
    ("bad", "words", "asked"),
    [
        (chat("I cannot say."), "not the JSON that was asked for: 'I cannot say.'", 3),
        (chat(None, refusal="No."), "a refusal: 'No.'", 3),
        (chat('{"description": "x", "related": "maybe"}'), "neither true nor false", 3),
        (chat('{"description": "", "related": true}'), "not a sentence", 3),
        ((200, "<html>"), "not a chat completion: '<html>'", 3),
        ((200, '{"choices": []}'), "not a chat completion", 3),
        ((401, "no key"), "HTTP 401", 2),  # nobody else will be let in either
        ((503, ""), "HTTP 503 Service Unavailable, 4 times", 5),
        (0.6, "timed out, 4 times", 5),
    ],
)
def test_what_an_endpoint_has_said_is_kept(material, tmp_path, capfd, bad, words, asked):
    out = tmp_path / "out"
    with Endpoint(chat(GOOD_REPLY), bad) as endpoint:
        error = probe_refused(capfd, *explained(material, out, endpoint))
        assert (
            words in error
            and "1 of 3 descriptions are kept" in error
            and "the other 2 again" in error
        )
        assert len(endpoint.asked) == asked
        assert (
            len((out / explainer.FILE).read_text().splitlines()) == 1
            and "tokens" in summary(out)["saes"][str(material / "sae")]
        )
        endpoint.replies, endpoint.asked[:] = [chat(GOOD_REPLY)], []
        with open(out / explainer.FILE, "a") as f:
            f.write('{"key": "cut off by a ki')
        run_probe(*explained(material, out, endpoint))
        assert (
            len(endpoint.asked) == 2 and len((out / explainer.FILE).read_text().splitlines()) == 3
        )


@pytest.mark.parametrize("line", [
    "[", "5", "{}", '{"key": "a", "description": "b"}',
    '{"key": "a", "description": 5, "related": true}',
    '{"key": [], "description": "b", "related": true}',
])  # fmt: skip
def test_a_damaged_file_of_explanations(material, tmp_path, capfd, line):
    """The line is named, and without it nothing else is asked again."""
    path = tmp_path / "out" / explainer.FILE
    with Endpoint(chat(GOOD_REPLY)) as endpoint:
        run_probe(*explained(material, tmp_path / "out", endpoint))
        first, second, third = path.read_text().splitlines(keepends=True)
        path.write_text(first + line + "\n" + third)
        error = probe_refused(capfd, *explained(material, tmp_path / "out", endpoint))
        assert f"{path}:2: " in error
        assert "; delete this line, its feature is asked about again" in error
        path.write_text(first + third)
        endpoint.asked.clear()
        run_probe(*explained(material, tmp_path / "out", endpoint))
        assert len(endpoint.asked) == 1
        assert path.read_text() == first + third + second


@pytest.mark.parametrize("description", ["It is sk-SECRET123.", "It is \\u0073k-SECRET123."])
def test_a_key_in_a_description_is_not_kept(material, tmp_path, monkeypatch, capfd, description):
    """In the summary, in explanations.jsonl, and in the table; also where the answer's own JSON writes it in escapes."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET123")
    with Endpoint(chat(GOOD_REPLY.replace("Fires on adjectives.", description))) as endpoint:
        run_probe(*explained(material, tmp_path / "out", endpoint))
    written = [path.read_text() for path in (tmp_path / "out").rglob("*.json*")]
    assert "It is [OPENAI_API_KEY]." in "".join(written) and not any(
        "SECRET" in text for text in (*written, *capfd.readouterr())
    )


@pytest.mark.parametrize(
    "url", ["http://user:SECRET@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=SECRET"]
)
def test_a_key_in_an_explainer_s_url(material, tmp_path, capfd, url):
    error = probe_refused(
        capfd, *flags("features", material, tmp_path / "out", explainer=url, explainer_model="tiny")
    )
    assert (
        "SECRET" not in error
        and "--explainer: " in error
        and "OPENAI_API_KEY" in error
        and not (tmp_path / "out").exists()
    )


def test_an_endpoint_that_is_down(material, tmp_path, capfd):
    with Endpoint(chat(GOOD_REPLY)) as endpoint:
        pass
    error = probe_refused(capfd, *explained(material, tmp_path / "out", endpoint))
    assert "refused, 4 times; 0 of 3 descriptions are kept" in error.lower()


def test_a_local_model_is_asked_too(material, tmp_path, capfd, monkeypatch):
    """Its likeliest answer, as Hugging Face's generate() gives it; one whose context is too short is no traceback."""
    policy, tokenizer = load_policy(str(material / "model"), value_head=False), world.tokenizer()
    monkeypatch.setattr(explainer, "ANSWER_TOKENS", 10)
    ids = torch.tensor([tokenizer("review the hotel :").input_ids])
    best = policy.lm.generate(ids, do_sample=False, max_new_tokens=10)[0, ids.shape[1] :]
    assert explainer.local_asker(str(material / "model"), "cpu")(
        "review the hotel :"
    ) == tokenizer.decode(best, skip_special_tokens=True)
    error = probe_refused(
        capfd,
        *flags("features", material, tmp_path / "out", explainer=material / "model", features="1"),
    )
    assert "longer than the model's context of 128" in error and "0 of 1 descriptions" in error


# ------------------------------------------------------------------------------------------------------------------------ ablation


@pytest.mark.parametrize("normalize", ["dataset", "token", "none"])
@pytest.mark.parametrize("kind", ["topk", "vanilla"])
def test_only_the_chosen_features_are_taken_away(kind, normalize):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16) * 3 + 1
    sae = (
        TopKSAE(16, 40, 6, normalize)
        if kind == "topk"
        else SparseAutoencoder(16, 40, normalize=normalize)
    )
    sae.fit(x)
    x_hat, f = sae(x)
    ids = f.flatten(0, 1).sum(0).topk(3).indices
    zeroed = f.clone()
    zeroed[..., ids] = 0
    expected = sae.decode(zeroed, sae.moments(x)) + (
        x - x_hat
    )  # the definition: reconstruction with zeros, plus the error
    found = ablation.without(sae, ids)(x)
    assert (found - expected).abs().max() < 1e-4 and (found - x).abs().max() > 0.1
    assert torch.equal(ablation.without(sae, ids[:0])(x), x)


def test_random_features_are_as_frequent_and_others():
    rates = torch.logspace(-4, -0.5, 100)
    drawn = [feature_scores.alike(rates, [50, 51, 90], np.random.default_rng(i)) for i in range(20)]
    for ids in drawn:
        assert len(set(ids) | {50, 51, 90}) == 6
        ratios = (rates[ids] / rates[[50, 51, 90]]).log()
        assert ratios.abs().max() < 12 * 3.5 / 99 * np.log(10)
    assert len({tuple(ids) for ids in drawn}) > 10
    few = rates[:6]
    for rng in map(np.random.default_rng, range(20)):
        first = feature_scores.alike(few, [0, 1], rng)
        second = feature_scores.alike(few, [0, 1], rng, but=first)
        assert sorted([0, 1, *first, *second]) == [0, 1, 2, 3, 4, 5]
        assert not set(feature_scores.alike(few, [0, 1], rng, but=first + second)) & {
            0,
            1,
        }  # none are left: any but the two


def test_ablate(material, tmp_path, capsys):
    chosen = list(range(20))
    run_probe(
        *flags(
            "ablate",
            material,
            tmp_path / "out",
            site="residual",
            features=",".join(map(str, chosen)),
        )
    )
    printed, found = capsys.readouterr().out, summary(tmp_path / "out")
    assert (
        "nothing' wrote the same tokens" in printed
        and found["nothing_is_plain"]
        and found["prompts"] == 8
    )
    arms = found["arms"]
    assert list(arms) == [
        "plain",
        "nothing",
        "features",
        "random 0",
        "random 1",
        "strong 0",
        "strong 1",
    ]
    assert (
        arms["plain"] | {"features": []} == arms["nothing"] | {"features": []}
        and arms["features"]["features"] == chosen
    )
    name = "reward.py:words"
    assert arms["features"][name] != arms["nothing"][name] and 0 < arms["features"]["removed"]
    row = found["differences"][name]["features - nothing"]
    assert row["mean"] == pytest.approx(
        arms["features"][name]["mean"] - arms["nothing"][name]["mean"]
    )
    assert row["low"] <= row["mean"] <= row["high"]
    random = np.mean([arms[f"random {i}"]["length"]["mean"] for i in range(2)])
    assert found["differences"]["length"]["features - random"]["mean"] == pytest.approx(
        arms["features"]["length"]["mean"] - random
    )


def test_rollouts_feel_the_hook_and_forget_it(material):
    """Switching off a feature that pushes one word changes what is written, and afterwards nothing is left of it."""
    policy, sae = (
        load_policy(str(material / "model"), value_head=False),
        TopKSAE(32, M, K, normalize="none", seed=1),
    )
    prompts, mask = torch.randint(5, 100, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    plain = generate(policy, prompts, mask, 10)
    with replaced(policy.lm, (1, "mlp"), ablation.without(sae, torch.arange(0))):
        nothing = generate(policy, prompts, mask, 10)
    with replaced(policy.lm, (1, "mlp"), ablation.without(sae, torch.arange(M))):
        everything = generate(policy, prompts, mask, 10)
    after = generate(policy, prompts, mask, 10)
    for other in (nothing, after):
        assert torch.equal(plain.logprobs, other.logprobs) and torch.equal(
            plain.response_ids, other.response_ids
        )
    assert not torch.equal(plain.logprobs, everything.logprobs)


@torch.no_grad()
def test_features_stay_on_at_bos(material):
    """Tokens with BOS's id keep what the layer puts out, in the middle of a text too; without such an id none does."""
    policy, sae = (
        load_policy(str(material / "model"), value_head=False),
        TopKSAE(32, M, K, normalize="none", seed=1),
    )
    lm, place, everything, bos = policy.lm, (1, "mlp"), torch.arange(M), 7
    ids = torch.tensor([[bos, 5, bos, 9], [8, 6, 5, bos]])
    with captured(lm, [place]) as kept:
        lm(ids)
    x = kept[place]
    changed = ablation.without(sae, everything)(x)
    expected = changed.clone()
    for row, column in ((0, 0), (0, 2), (1, 3)):
        expected[row, column] = x[row, column]
    for skip_bos, right in ((bos, expected), (None, changed)):
        with (
            ablation.switched_off(lm, place, sae, everything, skip_bos),
            captured(lm, [place]) as kept,
        ):
            lm(ids)
        torch.testing.assert_close(kept[place], right)
    assert not torch.allclose(expected, changed)


@pytest.mark.parametrize("static", [False, True])
def test_features_stay_on_at_a_bos_of_a_rollout(material, static):
    """Log-probs of a rollout, token by token, are those of one forward over the whole text, for a BOS that the policy writes."""
    policy, sae = (
        load_policy(str(material / "model"), value_head=False),
        TopKSAE(32, M, K, normalize="none", seed=1),
    )
    prompts, mask = (
        torch.randint(5, 100, (4, 6), generator=torch.Generator().manual_seed(0)),
        torch.ones(4, 6, dtype=torch.bool),
    )
    place, everything = (1, "mlp"), torch.arange(M)
    results = []
    bos = None
    for _ in range(2):  # the second time BOS is what was written the first time
        with ablation.switched_off(policy.lm, place, sae, everything, bos):
            rollout = generate(policy, prompts, mask, 10, static=static)
            whole = policy(rollout.packed(), rollout.response_mask)["logprobs"]
        torch.testing.assert_close(rollout.logprobs, whole, rtol=1e-4, atol=1e-4)
        results.append(rollout.logprobs)
        bos = rollout.response_ids[0, 3].item()
    assert not torch.allclose(results[0], results[1], atol=1e-3)


def test_ablation_with_a_bos(material, tmp_path, capsys):
    """A word as BOS: rates are of the other tokens alone, unless --keep_bos has it as one like them."""
    tokenizer = world.tokenizer()
    tokenizer.bos_token = "was"
    save_policy(
        load_policy(str(material / "model"), value_head=False), tokenizer, str(tmp_path / "model")
    )
    found = {}
    for keep in ("false", "true"):
        options = {
            "model": tmp_path / "model",
            "features": "1,2,3,4,5",
            "keep_bos": keep,
            "draws": 1,
        }
        run_probe(*flags("ablate", material, tmp_path / keep, **options))
        found[keep] = summary(tmp_path / keep)
    capsys.readouterr()
    assert found["false"]["nothing_is_plain"] and found["true"]["nothing_is_plain"]
    assert found["false"]["arms"]["features"]["rates"] != found["true"]["arms"]["features"]["rates"]


def test_what_follows_a_token():
    """The next token of the text, counted or not; next to the last comes nothing."""
    bos = 1
    tokens = Tokens([[bos, 5, bos, 6], [7, bos], [8]], skip_bos=bos)
    text_of, ids = activation_store.where(tokens)
    assert text_of.tolist() == [0, 0, 1, 2] and ids.tolist() == [5, 6, 7, 8]
    following, goes_on = world_concepts.next_ids(tokens)
    assert goes_on.tolist() == [True, False, True, False]
    assert following[goes_on].tolist() == [bos, bos]


def test_contexts_around_a_bos():
    """Values stand at the tokens they are of, also behind a BOS in the middle of a text."""
    tokens = Tokens([[1, 5, 1, 6], [7, 1, 8]], skip_bos=1)  # 5, 6, 7, 8 count
    text_of, _ = activation_store.where(tokens)
    config = FeaturesConfig(sae=["."], contexts=2)
    at, value = torch.tensor([1, 3]), torch.tensor([2.0, 4.0])  # the feature fires on 6 and 8
    contexts = top_contexts(config, tokens, text_of, at, value, 4.0, str)
    assert [context["values"] for context in contexts] == [[0, 0, 1], [0, 0, 0, 0.5]]
    assert [context["tokens"] for context in contexts] == [["7", "1", "8"], ["1", "5", "1", "6"]]


def test_concept_features(material):
    """By words, by what comes before them and by logits: each finds the one that was planted."""
    tokenizer, lm = world.tokenizer(), load_policy(str(material / "model"), value_head=False).lm
    seen = Tokens([tokenizer(row["response"]).input_ids for row in world.demonstrations(50)])
    names, table = world_concepts.concept_table(tokenizer)
    concept = table[:, names.index("positive")]
    text_of, ids = activation_store.where(seen)
    f = torch.rand(seen.total, M, generator=torch.Generator().manual_seed(0))
    f[:, 9] = concept[ids].float()
    f[:, 8] = torch.cat(
        [concept[ids][1:] & (text_of[1:] == text_of[:-1]), torch.tensor([False])]
    ).float()
    sae = TopKSAE(32, M, K)
    unembedding = lm.lm_head.weight.detach()
    sae.W_dec.data[7] = unembedding[concept].mean(0) - unembedding[~concept].mean(0)
    for by, planted in (("on", 9), ("before", 8), ("logits", 7)):
        config = ablation.AblateConfig(by=by, top=1)
        assert ablation.choose_features(
            config, feature_scores.sparse(f), concept, seen, sae, lm
        ) == [planted]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sae": "nowhere"}, "no sparse autoencoder here"),
        ({"sae": "narrow"}, "for activations of width 16, not 32"),
        ({"features": "64"}, "has the features 0 to 63"),
        ({"features": "", "concept": "happy"}, "--concept happy: it must be one of"),
        ({"features": ",".join(map(str, range(40)))}, "leave too few others"),
        ({"features": "", "top": 4000}, "--top 4000 is more than"),
        ({"layer": 7}, "the layers 0 to 1"),
        ({"by": "magic"}, "--by must be one of on, before, logits"),
        ({"reward": "no.py:f"}, "no.py: no such file"),
    ],
)
def test_wrong_ablations_are_one_line(material, tmp_path, capfd, changes, words):
    changes = {k: material / v if k == "sae" else v for k, v in changes.items()}
    assert words in probe_refused(capfd, *flags("ablate", material, tmp_path / "out", **changes))
    assert not os.path.exists(tmp_path / "out")
