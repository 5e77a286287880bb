"""probe.py features and ablate: on tiny models, against loops and against what is planted;
explainers on a loopback server.

    N tokens, M features, C concepts, D hidden
"""

import math
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import (
    GOOD_REPLY,
    Endpoint,
    chat,
    flags,
    probe_refused,
    read_rows,
    run_probe,
    summary,
    write_rows,
)
from transformers import AutoModelForCausalLM

from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.hf.activations import captured, replaced
from nanorlhf.interp import ablation, activation_store, explainer, feature_scores, world_concepts
from nanorlhf.interp.activation_store import Tokens, hold_out, token_rows
from nanorlhf.interp.features import FeaturesConfig, draw_concepts, top_contexts, top_features
from nanorlhf.interp.sae_files import load_sae, save_sae
from nanorlhf.models import Policy, load_policy, save_policy
from nanorlhf.rollout import generate
from nanorlhf.runtime.results import parse_ids
from nanorlhf.sae import SparseAutoencoder, TopKSAE

D = 32
M = 64
K = 8
# The layer and the site that the autoencoders read.
PLACE = (1, "mlp")

REWARD = """
def words(prompts, responses):
    return [len(set(r.split())) for r in responses]
"""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """model/ (2 random blocks, embedded world's words), sae/ and vanilla/ (fitted to nothing),
    unnamed/ (it names no model), narrow/ (of another width), texts.jsonl, prompts.jsonl, reward.py.
    """
    root = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    config = world.model_config()
    config.num_hidden_layers = 2
    config.hidden_size = D
    config.intermediate_size = 64
    policy = Policy(AutoModelForCausalLM.from_config(config), value_head=False)
    save_policy(policy, world.tokenizer(), str(root / "model"))

    layer, site = PLACE
    notes = {"model": str(root / "model"), "layer": layer, "site": site}
    x = 0.02 * torch.randn(500, D)
    save_sae(TopKSAE(D, M, K, seed=1).fit(x), str(root / "sae"), **notes)
    save_sae(SparseAutoencoder(D, M, seed=2).fit(x), str(root / "vanilla"), **notes)
    save_sae(TopKSAE(D, M, K), str(root / "unnamed"))
    save_sae(TopKSAE(16, M, K), str(root / "narrow"), **notes)

    write_rows(root / "texts.jsonl", world.demonstrations(200))
    prompts = [{"prompt": row["prompt"]} for row in world.prompts("train")[:40]]
    write_rows(root / "prompts.jsonl", prompts)
    (root / "reward.py").write_text(REWARD)
    return root


def features_command(material, out, **changes):
    """The words of a small run of `probe.py features`, with some flags changed."""
    settings = {
        "sae": material / "sae",
        "dataset": material / "texts.jsonl",
        "eval_size": 40,
        "top": 3,
        "output_dir": out,
    }
    return ["features", *flags(settings | changes)]


def ablate_command(material, out, **changes):
    """The words of a small run of `probe.py ablate`, with some flags changed."""
    settings = {
        "sae": material / "sae",
        "dataset": material / "prompts.jsonl",
        "reward": f"{material / 'reward.py'}:words",
        "features": "1,2",
        "draws": 2,
        "n_answers": 2,
        "max_new_tokens": 12,
        "eval_size": 8,
        "output_dir": out,
    }
    return ["ablate", *flags(settings | changes)]


def find_sae(material, changes):
    """Changes of flags, in which an autoencoder is named by its folder in the material."""
    if "sae" in changes:
        return changes | {"sae": material / changes["sae"]}
    return changes


def load_lm(material):
    return load_policy(str(material / "model"), value_head=False).lm


# -------------------------------------------------------------------------------------- concepts


def random_features(n=200, seed=0):
    """Sparse, dense, tied, negative and silent features [N, 7], labels [N, 3]."""
    generator = seeded(seed)
    x = torch.randn(n, 7, generator=generator).relu()
    x *= torch.rand(n, 7, generator=generator) < 0.5
    x[:, 2] = -x[:, 2]
    x[:, 3] = torch.randn(n, generator=generator).round()  # whole numbers: many ties
    x[:, 4] = 0
    x[:, 5] = torch.randn(n, generator=generator)
    share = torch.tensor([0.1, 0.5, 0.02])
    labels = torch.rand(n, 3, generator=generator) < share
    return x, labels


def auc_by_a_loop(of_concept, others):
    """How often a token of the concept is above another token; ties count half."""
    wins = 0.0
    for a in of_concept:
        for b in others:
            if a > b:
                wins += 1
            elif a == b:
                wins += 0.5
    return wins / (len(of_concept) * len(others))


def test_aucs_of_all_pairs_are_the_loops():
    x, labels = random_features()
    found = feature_scores.feature_aucs(feature_scores.sparse(x), labels)

    for j in range(7):
        for c in range(3):
            has_concept = labels[:, c]
            of_concept = x[has_concept, j].tolist()
            others = x[~has_concept, j].tolist()
            expected = auc_by_a_loop(of_concept, others)
            assert found[j, c].item() == pytest.approx(expected, abs=1e-12)
    # Feature 4 is silent.
    assert (found[4] == 0.5).all()


def test_correlations_are_numpys():
    x, labels = random_features()
    found = feature_scores.feature_correlations(feature_scores.sparse(x), labels)

    for j in (0, 1, 2, 3, 5, 6):
        for c in range(3):
            expected = np.corrcoef(x[:, j], labels[:, c])[0, 1]
            assert found[j, c].item() == pytest.approx(expected, abs=1e-6)
    # Feature 4 is silent: numpy would divide by zero.
    assert (found[4] == 0).all()


def test_a_mask_keeps_a_part_of_the_tokens():
    x, labels = random_features()
    mask = labels[:, 1]
    part = feature_scores.on_tokens(feature_scores.sparse(x), mask)
    assert torch.equal(part.to_dense(), x[mask].T)


def test_chosen_on_one_half_measured_on_the_other():
    chosen_on = torch.tensor([[0.9, 0.1], [0.5, 0.8]])  # [M, C]
    measured_on = torch.tensor([[0.6, 1.0], [1.0, 0.7]])
    ids, scores = feature_scores.best_features(chosen_on, measured_on)
    assert ids.tolist() == [0, 1]
    assert scores.tolist() == pytest.approx([0.6, 0.7])


def world_tokens(n):
    """The responses of n demonstrations of the embedded world, as Tokens."""
    tokenizer = world.tokenizer()
    rows = []
    for demonstration in world.demonstrations(n):
        rows.append(tokenizer(demonstration["response"]).input_ids)
    return Tokens(rows)


def before_words_of(is_of_concept, text_of):
    """Which tokens stand before one of a concept, in the same text: bool [N]."""
    goes_on = text_of[1:] == text_of[:-1]
    before = torch.zeros_like(is_of_concept)
    before[:-1] = is_of_concept[1:] & goes_on
    return before


def test_concepts_are_of_the_tokens_words():
    tokenizer = world.tokenizer()
    tokens = world_tokens(200)
    _, ids = activation_store.where(tokens)
    in_order = []
    for row in tokens.rows:
        in_order.extend(row)
    assert ids.tolist() == in_order

    names, table = world_concepts.concept_table(tokenizer)
    is_adjective = table[ids, names.index("adjective")]
    in_lexicon = []
    for i in ids.tolist():
        in_lexicon.append(tokenizer.decode([i]) in world.LEXICON)
    assert is_adjective.tolist() == in_lexicon
    # The words of value 0 are those of 'neutral': one concept, not two.
    assert "value=+0" not in names


def plant_adjectives():
    """16 features, of which 3 fires on adjectives and 5 before them; all others are noise, and so
    are the coordinates of the activations.

    -> what measure_concepts() says of them, and whether each token is an adjective [N], and its id
    """
    tokenizer = world.tokenizer()
    tokens = world_tokens(200)
    names, table = world_concepts.concept_table(tokenizer)
    text_of, ids = activation_store.where(tokens)
    is_adjective = table[ids, names.index("adjective")]

    generator = seeded(0)
    noise = torch.randn(tokens.total, 16, generator=generator).relu()
    f = noise.clone()
    f[:, 3] = is_adjective * (1 + noise[:, 3])
    # The last token of all comes before nothing: there feature 5 keeps its noise.
    f[:-1, 5] = before_words_of(is_adjective, text_of)[:-1]
    x = torch.randn(tokens.total, 8, generator=generator)

    sae = TopKSAE(8, 16, 2)
    found = world_concepts.measure_concepts(sae, x, feature_scores.sparse(f), tokens, tokenizer)
    return found, is_adjective, ids


@pytest.fixture(scope="module")
def planted():
    return plant_adjectives()


def test_a_planted_concept_is_found_and_no_control_has_it(planted):
    found, is_adjective, ids = planted
    row = found["concepts"]["adjective"]
    assert row["words"] == len(ids[is_adjective].unique())
    assert row["tokens"] == is_adjective.sum()

    assert row["auc"]["feature"] == 3
    assert row["correlation"]["feature"] == 3
    assert row["auc"]["features"] == 1
    for control in world_concepts.CONTROLS:
        assert row["auc"][control] < 0.7
        assert row["correlation"][control] < 0.3


def test_what_is_not_planted_is_not_found(planted):
    found, _, _ = planted
    assert found["concepts"]["topic"]["auc"]["features"] < 0.7


def test_concepts_that_are_found_are_counted(planted):
    found, _, _ = planted
    counts = found["found"]
    # Feature 3 has the adjectives, feature 5 what stands before them.
    one = {"features": 1, "coordinates": 0, "untrained": 0, "shuffled": 0}
    assert counts["concept"]["correlation"] == one
    assert counts["next"]["correlation"] == one
    # No feature is of a single word; shuffled words are words still, and no control.
    none = {"features": 0, "coordinates": 0, "untrained": 0}
    assert counts["word"]["correlation"] == none


def test_a_feature_of_all_adjectives_has_a_large_auc_for_some_of_them_too(planted):
    """Never above 1 - s / 2, where a share s of the other tokens are adjectives."""
    found, is_adjective, ids = planted
    n_adjectives = is_adjective.sum().item()
    # There are nine values, of about as many adjectives each: all but +3 are the others.
    share = (n_adjectives - n_adjectives / 9) / len(ids)
    auc = found["concepts"]["value=+3"]["auc"]["features"]
    assert abs(auc - (1 - share / 2)) < 0.05


# -------------------------------------------------------------------------------------- features


class ByHand:
    """The features of the autoencoder sae/, by hand: one text at a time through the model, its
    MLP's output caught by a hook of our own."""

    def __init__(self, material):
        self.tokenizer = world.tokenizer()
        self.lm = load_lm(material)
        self.sae = load_sae(str(material / "sae"))
        rows, _ = token_rows(self.tokenizer, read_rows(material / "texts.jsonl"), 128)
        _, self.texts = hold_out(rows, 40, self.tokenizer)

        caught = []
        mlp = self.lm.gpt_neox.layers[1].mlp
        hook = mlp.register_forward_hook(lambda module, args, out: caught.append(out))
        self.codes = []  # [T, M] of each text
        self.ids = []  # [N]
        for text in self.texts:
            self.lm(torch.tensor([text]))
            code = self.sae.encode(caught.pop()[0])
            self.codes.append(code.detach())
            self.ids.extend(text)
        hook.remove()
        self.f = torch.cat(self.codes)  # [N, M]


def check_strength(described, by_hand):
    """How often and how strongly a feature fires."""
    feature = by_hand.f[:, described["id"]]  # [N]
    fired = feature != 0
    mean = feature[fired].mean().item() if fired.any() else 0
    assert described["rate"] == pytest.approx(fired.double().mean().item())
    assert described["max"] == pytest.approx(feature.max().item(), rel=1e-4)
    assert described["mean"] == pytest.approx(mean, rel=1e-4)
    check_histogram(described["histogram"], feature[fired].tolist())


def check_histogram(histogram, values):
    """How many values lie in each bin, counted one by one."""
    assert sum(histogram["counts"]) == len(values)
    if not values:
        return
    width = (histogram["high"] - histogram["low"]) / len(histogram["counts"])
    assert histogram["low"] <= min(values)
    assert histogram["high"] == pytest.approx(max(*values, 0.0), rel=1e-4)
    upper_half = histogram["low"] + 10 * width
    n_above = sum(value > upper_half for value in values)
    assert sum(histogram["counts"][10:]) == pytest.approx(n_above, abs=1)


def check_effects(described, by_hand):
    """The logits that a feature's direction raises and lowers most, over the mean of all tokens."""
    direction = by_hand.sae.W_dec[described["id"]]
    effect = by_hand.lm.lm_head.weight @ direction / direction.norm()  # [V]
    effect = effect - effect.mean()
    token, up = described["up"][0]
    assert token == by_hand.tokenizer.decode([effect.argmax().item()])
    assert up == pytest.approx(effect.max().item(), rel=1e-4)
    assert described["down"][0][1] == pytest.approx(effect.min().item(), rel=1e-4)


def check_tokens(described, by_hand):
    """What share of a feature's sum is a token's, and on how many of its occurrences it fires."""
    feature = by_hand.f[:, described["id"]]  # [N]
    fired = feature != 0
    for token, share, how_often in described["tokens"]:
        here = torch.tensor([by_hand.tokenizer.decode([i]) == token for i in by_hand.ids])
        expected_share = (feature[here].sum() / feature.sum()).item()
        assert share == pytest.approx(expected_share, rel=1e-3)
        assert how_often == pytest.approx(fired[here].double().mean().item())


def check_best_context(described, by_hand):
    """The text in which a feature is largest, and the feature's values there."""
    j = described["id"]
    peaks = [code[:, j].max().item() for code in by_hand.codes]
    best = described["contexts"][0]
    assert peaks[best["text"]] == max(peaks)
    assert max(best["values"]) == 1
    values = by_hand.codes[best["text"]][:, j] / max(peaks)
    assert best["values"] == pytest.approx(values.tolist(), abs=1e-3)
    text = by_hand.texts[best["text"]]
    assert best["tokens"] == [by_hand.tokenizer.decode([i]) for i in text]


def test_descriptions_hold_what_the_model_does(material, tmp_path, capsys):
    saes = [material / "sae", material / "vanilla"]
    run_probe(*features_command(material, tmp_path / "out", sae=saes, features="7,2,40"))

    assert "single words" in capsys.readouterr().out
    results = summary(tmp_path / "out")["saes"]
    assert list(results) == [str(material / "sae"), str(material / "vanilla")]
    result = results[str(material / "sae")]
    assert result["m"] == M
    assert [described["id"] for described in result["features"]] == [7, 2, 40]

    by_hand = ByHand(material)
    assert result["tokens"] == len(by_hand.ids)
    for described in result["features"]:
        check_strength(described, by_hand)
        check_effects(described, by_hand)
        check_tokens(described, by_hand)
        check_best_context(described, by_hand)


def save_with_another_word(material, folder):
    """The material's model, with one word that the embedded world does not have."""
    shutil.copytree(material / "model", folder)
    tokenizer = world.tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)


def test_a_model_of_unknown_words_has_descriptions_alone(material, tmp_path, capsys, pictures):
    """No truth is known: no concepts. Where matplotlib is installed, descriptions are drawn."""
    other = tmp_path / "other"
    save_with_another_word(material, other)
    run_probe(*features_command(material, tmp_path / "out", model=other))

    found = summary(tmp_path / "out")["saes"][str(material / "sae")]
    assert len(found["features"]) == 3
    assert "concepts" not in found
    assert "concepts" not in capsys.readouterr().out
    assert (tmp_path / "out" / "picture.png").exists() == bool(find_spec("matplotlib"))


def test_to_ablate_a_model_of_unknown_words_features_are_named(material, tmp_path, capsys):
    other = tmp_path / "other"
    save_with_another_word(material, other)
    command = ablate_command(material, tmp_path / "out", model=other, features="")
    error = probe_refused(capsys, *command)
    assert "does not speak the embedded world's words: name --features" in error


def test_top_features_are_those_of_largest_mean():
    x, _ = random_features()
    x = x.relu()
    expected = x.mean(0).argsort(descending=True)[:3]
    assert top_features(feature_scores.sparse(x), 3) == expected.tolist()


@pytest.mark.parametrize(
    "changes, words",
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
    changes = find_sae(material, changes)
    error = probe_refused(capfd, *features_command(material, tmp_path / "out", **changes))
    assert words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, ids", [("", []), ("17", [17]), ("17, 3,17", [17, 3])])
def test_features_are_named_in_any_order_each_once(text, ids):
    assert parse_ids(text) == ids


# ------------------------------------------------------------------------------------- explainer


def explained_command(material, out, endpoint, **changes):
    """The words of a run in which an endpoint explains three features."""
    settings = {
        "explainer": endpoint.url,
        "explainer_model": "tiny",
        "features": "1,2,3",
        "pause": 0.01,
        "timeout": 0.3,
        "eval_size": 8,
    }
    return features_command(material, out, **settings | changes)


def explained_features(material, out):
    """The features of sae/ as summary.json has them."""
    return summary(out)["saes"][str(material / "sae")]["features"]


def read_explanations(out):
    return read_rows(out / explainer.FILE)


def test_an_endpoint_is_asked_with_the_key_and_the_contexts(material, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    # Two tries are in vain, and one answer has words around its JSON.
    wordy = chat(f"Sure:\n```json\n{GOOD_REPLY}\n```")
    with Endpoint((429, ""), (500, "busy"), wordy, chat(GOOD_REPLY)) as endpoint:
        run_probe(*explained_command(material, tmp_path / "out", endpoint))

    assert len(endpoint.asked) == 2 + 3
    path, headers, body = endpoint.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "tiny"

    features = explained_features(material, tmp_path / "out")
    descriptions = [feature["description"] for feature in features]
    assert descriptions == ["Fires on adjectives."] * 3
    for feature in features:
        assert feature["related"] is True
    question = body["messages"][0]["content"]
    for token in features[0]["contexts"][0]["tokens"]:
        assert token.strip() in question
    # The largest value of a feature is written as 10.
    assert "[[10]]" in question


@pytest.mark.slow
def test_any_reply_is_a_description_with_plain_answers(material, tmp_path, capfd):
    flags = {"plain_answers": True, "related_to": "Colours", "features": "1,2"}
    with Endpoint(chat("It is on\n colours. "), chat("It is on names.")) as endpoint:
        run_probe(*explained_command(material, tmp_path / "out", endpoint, **flags))
    features = explained_features(material, tmp_path / "out")
    assert [feature["description"] for feature in features] == [
        "It is on colours.",
        "It is on names.",
    ]
    assert [feature["related"] for feature in features] == [True, False]
    assert "JSON" not in endpoint.asked[0][2]["messages"][0]["content"]

    # Still, no words at all are no description.
    with Endpoint(chat(" ")) as endpoint:
        command = explained_command(material, tmp_path / "empty", endpoint, **flags)
        assert "an empty answer" in probe_refused(capfd, *command)


def test_an_endpoint_is_asked_once_for_each_feature(material, tmp_path):
    out = tmp_path / "out"
    with Endpoint(chat(GOOD_REPLY)) as endpoint:
        run_probe(*explained_command(material, out, endpoint))
        assert len(endpoint.asked) == 3
        # The second time all is there.
        run_probe(*explained_command(material, out, endpoint))
        assert len(endpoint.asked) == 3
        # The third time only feature 4 is new.
        run_probe(*explained_command(material, out, endpoint, features="1,2,3,4"))
        assert len(endpoint.asked) == 4


@pytest.mark.parametrize(
    "bad_reply, words, n_asked",
    [
        (chat("I cannot say."), "not the JSON that was asked for: 'I cannot say.'", 3),
        pytest.param(chat(None, refusal="No."), "a refusal: 'No.'", 3, marks=pytest.mark.slow),
        pytest.param(
            chat('{"description": "x", "related": "maybe"}'),
            "neither true nor false",
            3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            chat('{"description": "", "related": true}'),
            "not a sentence",
            3,
            marks=pytest.mark.slow,
        ),
        ((200, "<html>"), "not a chat completion: '<html>'", 3),
        pytest.param((200, '{"choices": []}'), "not a chat completion", 3, marks=pytest.mark.slow),
        ((400, "filtered"), "feature 2: HTTP 400 Bad Request filtered", 3),  # this question alone
        ((401, "no key"), "HTTP 401", 2),  # nobody else will be let in either
        pytest.param((503, ""), "HTTP 503 Service Unavailable, 4 times", 5, marks=pytest.mark.slow),
        pytest.param(0.6, "timed out, 4 times", 5, marks=pytest.mark.slow),  # seconds of silence
    ],
)
def test_what_an_endpoint_has_said_is_kept(material, tmp_path, capfd, bad_reply, words, n_asked):
    """The first of three features is explained; then the replies are bad."""
    out = tmp_path / "out"
    with Endpoint(chat(GOOD_REPLY), bad_reply) as endpoint:
        error = probe_refused(capfd, *explained_command(material, out, endpoint))
        assert words in error
        assert "1 of 3 descriptions are kept" in error
        assert "the other 2 again" in error
        assert len(endpoint.asked) == n_asked
        assert len(read_explanations(out)) == 1
        assert "tokens" in summary(out)["saes"][str(material / "sae")]

        # The endpoint has recovered, and a kill has left half a line: the other two are asked.
        endpoint.replies = [chat(GOOD_REPLY)]
        endpoint.asked.clear()
        with open(out / explainer.FILE, "a") as f:
            f.write('{"key": "cut off by a ki')
        run_probe(*explained_command(material, out, endpoint))
        assert len(endpoint.asked) == 2
        assert len(read_explanations(out)) == 3


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("[", marks=pytest.mark.slow),
        pytest.param("5", marks=pytest.mark.slow),
        pytest.param("{}", marks=pytest.mark.slow),
        '{"key": "a", "description": "b"}',
        pytest.param('{"key": "a", "description": 5, "related": true}', marks=pytest.mark.slow),
        pytest.param('{"key": [], "description": "b", "related": true}', marks=pytest.mark.slow),
    ],
)
def test_a_damaged_line_of_explanations_is_named_and_can_be_deleted(
    material, tmp_path, capfd, line
):
    """Without it nothing else is asked again."""
    path = tmp_path / "out" / explainer.FILE
    with Endpoint(chat(GOOD_REPLY)) as endpoint:
        command = explained_command(material, tmp_path / "out", endpoint)
        run_probe(*command)
        first, second, third = path.read_text().splitlines(keepends=True)
        path.write_text(first + line + "\n" + third)
        error = probe_refused(capfd, *command)
        assert f"{path}:2: " in error
        assert "; delete this line, its feature is asked about again" in error

        path.write_text(first + third)
        endpoint.asked.clear()
        run_probe(*command)
        assert len(endpoint.asked) == 1
        assert path.read_text() == first + third + second


@pytest.mark.parametrize("description", ["It is sk-SECRET123.", "It is \\u0073k-SECRET123."])
def test_a_key_in_a_description_is_not_kept(material, tmp_path, monkeypatch, capfd, description):
    """It stands in no file and in no table, also where the answer's own JSON writes it in
    escapes."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET123")
    reply = GOOD_REPLY.replace("Fires on adjectives.", description)
    with Endpoint(chat(reply)) as endpoint:
        run_probe(*explained_command(material, tmp_path / "out", endpoint))

    written = [path.read_text() for path in (tmp_path / "out").rglob("*.json*")]
    assert "It is [OPENAI_API_KEY]." in "".join(written)
    for text in (*written, *capfd.readouterr()):
        assert "SECRET" not in text


@pytest.mark.parametrize(
    "url", ["http://user:SECRET@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=SECRET"]
)
def test_a_key_in_an_explainer_s_url_is_refused_and_not_shown(material, tmp_path, capfd, url):
    out = tmp_path / "out"
    command = features_command(material, out, explainer=url, explainer_model="tiny")
    error = probe_refused(capfd, *command)
    assert "SECRET" not in error
    assert "--explainer: " in error
    assert "OPENAI_API_KEY" in error
    assert not out.exists()


def test_an_endpoint_that_is_down_is_tried_four_times(material, tmp_path, capfd):
    with Endpoint(chat(GOOD_REPLY)) as endpoint:
        pass  # it is down again
    error = probe_refused(capfd, *explained_command(material, tmp_path / "out", endpoint))
    assert "refused, 4 times; 0 of 3 descriptions are kept" in error.lower()


def test_a_local_model_gives_its_likeliest_answer(material, monkeypatch):
    """As Hugging Face's generate() gives it."""
    monkeypatch.setattr(explainer, "ANSWER_TOKENS", 10)
    tokenizer = world.tokenizer()
    ids = torch.tensor([tokenizer("review the hotel :").input_ids])
    text = load_lm(material).generate(ids, do_sample=False, max_new_tokens=10)
    answer = text[0, ids.shape[1] :]

    ask = explainer.local_asker(str(material / "model"), "cpu")
    expected = tokenizer.decode(answer, skip_special_tokens=True)
    assert ask("review the hotel :") == expected


def test_a_local_model_of_a_short_context_cannot_be_asked(material, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(explainer, "ANSWER_TOKENS", 10)
    model = material / "model"
    command = features_command(material, tmp_path / "out", explainer=model, features="1")
    error = probe_refused(capfd, *command)
    assert "longer than the model's context of 128" in error
    assert "0 of 1 descriptions" in error


# -------------------------------------------------------------------------------------- ablation


def make_autoencoder(kind, normalize):
    if kind == "topk":
        return TopKSAE(16, 40, 6, normalize)
    return SparseAutoencoder(16, 40, normalize=normalize)


@pytest.mark.parametrize("normalize", ["dataset", "token", "none"])
@pytest.mark.parametrize("kind", ["topk", "vanilla"])
def test_only_the_chosen_features_are_taken_away(kind, normalize):
    """The definition: the reconstruction with zeros, plus the error of the reconstruction."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16) * 3 + 1
    sae = make_autoencoder(kind, normalize).fit(x)
    x_hat, f = sae(x)
    strongest = f.flatten(0, 1).sum(0).topk(3).indices
    zeroed = f.clone()
    zeroed[..., strongest] = 0
    error = x - x_hat
    expected = sae.decode(zeroed, sae.moments(x)) + error

    found = ablation.without(sae, strongest)(x)
    assert (found - expected).abs().max() < 1e-4
    assert (found - x).abs().max() > 0.1
    no_feature = strongest[:0]
    assert torch.equal(ablation.without(sae, no_feature)(x), x)


def test_random_features_are_as_frequent_and_others():
    rates = torch.logspace(-4, -0.5, 100)
    chosen = [50, 51, 90]
    different = set()
    for seed in range(20):
        drawn = feature_scores.alike(rates, chosen, np.random.default_rng(seed))
        different.add(tuple(drawn))
        # Three others, none of them twice.
        assert len({*drawn, *chosen}) == 6
        # Neighbours are 3.5 / 99 powers of ten apart. The ten nearest that are left lie within 12.
        ratios = (rates[drawn] / rates[chosen]).log()
        assert ratios.abs().max() < 12 * 3.5 / 99 * np.log(10)
    assert len(different) > 10


@pytest.mark.parametrize("seed", range(20))
def test_features_of_earlier_draws_are_taken_again_where_no_others_are_left(seed):
    rates = torch.logspace(-4, -0.5, 100)[:6]
    chosen = [0, 1]
    rng = np.random.default_rng(seed)
    first = feature_scores.alike(rates, chosen, rng)
    second = feature_scores.alike(rates, chosen, rng, but=first)
    assert sorted([*chosen, *first, *second]) == [0, 1, 2, 3, 4, 5]
    # None are left: any but the two.
    third = feature_scores.alike(rates, chosen, rng, but=first + second)
    assert not set(third) & set(chosen)


def test_the_arms_of_an_ablation_and_their_differences(material, tmp_path, capsys):
    chosen = list(range(20))
    names = ",".join(str(i) for i in chosen)
    out = tmp_path / "out"
    run_probe(*ablate_command(material, out, site="residual", features=names))

    found = summary(out)
    assert found["prompts"] == 8
    arms = found["arms"]
    controls = ["random 0", "random 1", "strong 0", "strong 1"]
    assert list(arms) == ["plain", "nothing", "features", *controls]

    # A hook that takes nothing away changes nothing.
    assert "nothing' wrote the same tokens" in capsys.readouterr().out
    assert found["nothing_is_plain"]
    assert arms["plain"] | {"features": []} == arms["nothing"] | {"features": []}

    # Without the chosen features the policy writes something else.
    assert arms["features"]["features"] == chosen
    assert arms["features"]["removed"] > 0
    reward = "reward.py:words"
    assert arms["features"][reward] != arms["nothing"][reward]

    # A difference is one of means, inside its interval; that of a control is over all its draws.
    row = found["differences"][reward]["features - nothing"]
    difference = arms["features"][reward]["mean"] - arms["nothing"][reward]["mean"]
    assert row["mean"] == pytest.approx(difference)
    assert row["low"] <= row["mean"]
    assert row["mean"] <= row["high"]
    lengths = {name: arm["length"]["mean"] for name, arm in arms.items()}
    random = (lengths["random 0"] + lengths["random 1"]) / 2
    row = found["differences"]["length"]["features - random"]
    assert row["mean"] == pytest.approx(lengths["features"] - random)


def plain_sae():
    """An autoencoder whose features are large enough to change what the model writes."""
    return TopKSAE(D, M, K, normalize="none", seed=1)


NO_FEATURE = torch.arange(0)
EVERY_FEATURE = torch.arange(M)


def assert_same_answers(a, b):
    assert torch.equal(a.logprobs, b.logprobs)
    assert torch.equal(a.response_ids, b.response_ids)


def test_rollouts_feel_the_hook_and_forget_it(material):
    """Switching all features off changes what is written; afterwards nothing is left of it."""
    policy = load_policy(str(material / "model"), value_head=False)
    sae = plain_sae()
    prompts = torch.randint(5, 100, (4, 6))
    mask = torch.ones(4, 6, dtype=torch.bool)

    plain = generate(policy, prompts, mask, 10)
    with replaced(policy.lm, PLACE, ablation.without(sae, NO_FEATURE)):
        without_none = generate(policy, prompts, mask, 10)
    with replaced(policy.lm, PLACE, ablation.without(sae, EVERY_FEATURE)):
        without_all = generate(policy, prompts, mask, 10)
    afterwards = generate(policy, prompts, mask, 10)

    assert_same_answers(plain, without_none)
    assert_same_answers(plain, afterwards)
    assert not torch.equal(plain.logprobs, without_all.logprobs)


@torch.no_grad()
def capture(lm, ids):
    """What the layer at PLACE puts out for ids [B, T]: [B, T, D]."""
    with captured(lm, [PLACE]) as kept:
        lm(ids)
    return kept[PLACE]


@torch.no_grad()
def test_features_stay_on_at_bos(material):
    """Tokens with BOS's id keep what the layer puts out, in the middle of a text too."""
    lm = load_lm(material)
    sae = plain_sae()
    bos = 7
    ids = torch.tensor([[bos, 5, bos, 9], [8, 6, 5, bos]])
    x = capture(lm, ids)
    changed = ablation.without(sae, EVERY_FEATURE)(x)
    expected = changed.clone()
    for row, column in ((0, 0), (0, 2), (1, 3)):
        expected[row, column] = x[row, column]
    assert not torch.allclose(expected, changed)

    with ablation.switched_off(lm, PLACE, sae, EVERY_FEATURE, skip_bos=bos):
        torch.testing.assert_close(capture(lm, ids), expected)
    # Without such an id no token is spared.
    with ablation.switched_off(lm, PLACE, sae, EVERY_FEATURE, skip_bos=None):
        torch.testing.assert_close(capture(lm, ids), changed)


def check_rollout_without_features(policy, bos, static):
    """A rollout with all features off has the log-probs of one forward over the whole text.

    -> the rollout
    """
    prompts = torch.randint(5, 100, (4, 6), generator=seeded(0))
    mask = torch.ones(4, 6, dtype=torch.bool)
    with ablation.switched_off(policy.lm, PLACE, plain_sae(), EVERY_FEATURE, bos):
        rollout = generate(policy, prompts, mask, 10, static=static)
        whole = policy(rollout.packed(), rollout.response_mask)["logprobs"]
    torch.testing.assert_close(rollout.logprobs, whole, rtol=1e-4, atol=1e-4)
    return rollout


@pytest.mark.parametrize("static", [False, True])
def test_features_stay_on_at_a_bos_of_a_rollout(material, static):
    """Also where the policy writes the BOS itself, token by token."""
    policy = load_policy(str(material / "model"), value_head=False)
    rollout = check_rollout_without_features(policy, None, static)
    # The second time BOS is what was written the first time.
    bos = rollout.response_ids[0, 3].item()
    spared = check_rollout_without_features(policy, bos, static)
    assert not torch.allclose(rollout.logprobs, spared.logprobs, atol=1e-3)


@pytest.mark.slow
def test_rates_leave_a_bos_out_unless_it_is_kept(material, tmp_path):
    """With a word as BOS: --keep_bos has it as a token like others."""
    tokenizer = world.tokenizer()
    tokenizer.bos_token = "was"
    model = tmp_path / "model"
    save_policy(load_policy(str(material / "model"), value_head=False), tokenizer, str(model))

    rates = []
    for keep_bos in ("false", "true"):
        out = tmp_path / keep_bos
        changes = {"model": model, "features": "1,2,3,4,5", "keep_bos": keep_bos, "draws": 1}
        run_probe(*ablate_command(material, out, **changes))
        found = summary(out)
        assert found["nothing_is_plain"]
        rates.append(found["arms"]["features"]["rates"])
    assert rates[0] != rates[1]


def test_what_follows_a_token_counts_or_not():
    """It is the next token of the text; next to the last comes nothing."""
    bos = 1
    tokens = Tokens([[bos, 5, bos, 6], [7, bos], [8]], skip_bos=bos)
    text_of, ids = activation_store.where(tokens)
    assert text_of.tolist() == [0, 0, 1, 2]
    assert ids.tolist() == [5, 6, 7, 8]

    following, goes_on = world_concepts.next_ids(tokens)
    assert goes_on.tolist() == [True, False, True, False]
    assert following[goes_on].tolist() == [bos, bos]


def test_values_of_contexts_stand_at_their_tokens_around_a_bos():
    tokens = Tokens([[1, 5, 1, 6], [7, 1, 8]], skip_bos=1)  # 5, 6, 7, 8 count
    text_of, _ = activation_store.where(tokens)
    config = FeaturesConfig(sae=["."], contexts=2)
    # The feature fires on 6 and on 8.
    at = torch.tensor([1, 3])
    value = torch.tensor([2.0, 4.0])
    strongest, weaker = top_contexts(config, tokens, text_of, at, value, 4.0, str)
    assert strongest["tokens"] == ["7", "1", "8"]
    assert strongest["values"] == [0, 0, 1]
    assert weaker["tokens"] == ["1", "5", "1", "6"]
    assert weaker["values"] == [0, 0, 0, 0.5]


@pytest.mark.parametrize("by, planted", [("on", 9), ("before", 8), ("logits", 7)])
def test_the_planted_feature_of_a_concept_is_chosen(material, by, planted):
    """By words, by what comes before them and by logits."""
    lm = load_lm(material)
    tokens = world_tokens(50)
    names, table = world_concepts.concept_table(world.tokenizer())
    concept = table[:, names.index("positive")]  # [V]
    text_of, ids = activation_store.where(tokens)
    is_positive = concept[ids]  # [N]

    f = torch.rand(tokens.total, M, generator=seeded(0))
    f[:, 9] = is_positive.float()
    f[:, 8] = before_words_of(is_positive, text_of).float()
    sae = TopKSAE(D, M, K)
    unembedding = lm.lm_head.weight.detach()  # [V, D]
    sae.W_dec.data[7] = unembedding[concept].mean(0) - unembedding[~concept].mean(0)

    config = ablation.AblateConfig(by=by, top=1)
    chosen = ablation.choose_features(config, feature_scores.sparse(f), concept, tokens, sae, lm)
    assert chosen == [planted]


# Before no word stands every last token of a text, so that "before" is never true of all.
@pytest.mark.parametrize("by, is_in_it", [("on", False), ("on", True), ("before", False)])
def test_a_concept_has_some_words_and_not_all(by, is_in_it):
    tokens = world_tokens(5)
    concept = torch.full((len(world.tokenizer()),), is_in_it)
    f = feature_scores.sparse(torch.ones(tokens.total, M))
    config = ablation.AblateConfig(by=by)
    with pytest.raises(InputError, match="hardly writes such words"):
        ablation.choose_features(config, f, concept, tokens, None, None)


def test_the_effect_of_features_on_a_concept_by_loops():
    """Its words' mean logit minus that of all other words; a feature that never fires is last."""
    sae = TopKSAE(3, 4, 2)
    head = torch.nn.Linear(3, 5, bias=False)
    lm = SimpleNamespace(get_output_embeddings=lambda: head)
    concept = torch.tensor([False, True, False, False, True])
    f = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0]])  # [tokens, features]
    found = ablation.score_by_logits(feature_scores.sparse(f), concept, sae, lm).tolist()
    for m, direction in enumerate(sae.decoder_directions()):
        logits = [(direction @ row).item() for row in head.weight]
        expected = (logits[1] + logits[4]) / 2 - (logits[0] + logits[2] + logits[3]) / 3
        assert found[m] == (-math.inf if m == 3 else pytest.approx(expected, abs=1e-6))


FORTY_FEATURES = ",".join(str(i) for i in range(40))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sae": "nowhere"}, "no sparse autoencoder here"),
        ({"sae": "narrow"}, "for activations of width 16, not 32"),
        ({"features": "64"}, "has the features 0 to 63"),
        ({"features": "", "concept": "happy"}, "--concept happy: it must be one of"),
        # With features too: the report counts the concept's words.
        ({"concept": "happy"}, "--concept happy: it must be one of"),
        ({"features": FORTY_FEATURES}, "leave too few others"),
        ({"features": "", "top": 4000}, "--top 4000 is more than"),
        ({"layer": 7}, "the layers 0 to 1"),
        ({"by": "magic"}, "--by must be one of on, before, logits"),
        ({"reward": "no.py:f"}, "no.py: no such file"),
    ],
)
def test_wrong_ablations_are_one_line(material, tmp_path, capfd, changes, words):
    changes = find_sae(material, changes)
    error = probe_refused(capfd, *ablate_command(material, tmp_path / "out", **changes))
    assert words in error
    assert not (tmp_path / "out").exists()


def test_the_picture_has_controls_for_the_concepts_of_every_autoencoder():
    figure = pytest.importorskip("matplotlib.figure").Figure()

    def result(**shuffled):
        concepts = {}
        for concept, auc in shuffled.items():
            row = {"features": 0.9, "coordinates": 0.8, "untrained": None, "shuffled": auc}
            concepts[concept] = {"auc": row}
        return {"concepts": concepts}

    axis = figure.add_subplot()
    results = {"a": result(colour=0.5, animal=0.6), "b": result(animal=0.4)}
    draw_concepts(axis, results, {"a": "a", "b": "b"})
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines["shuffled"].get_xdata()) == ["colour", "animal"]
    assert list(lines["shuffled"].get_ydata()) == pytest.approx([0.5, 0.5])
