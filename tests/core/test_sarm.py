"""nanorlhf.sarm and control.feature_reader: the public layout written by hand, and float64 loops
over texts and features.

    B texts, D hidden, M features, K of them kept, L blocks of N
"""

import copy
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import join, ranks, refuses
from tiny_models import (
    BATCH,
    PROMPTS,
    RESPONSES,
    SARM_CONFIGS,
    SARM_PARAM,
    B,
    D,
    full_lm,
    head_tensors,
    public_checkpoint,
    word_tokenizer,
)
from transformers import AutoModel, AutoModelForSequenceClassification

from nanorlhf.control.feature_reader import (
    WithSAE,
    check_feature_reader,
    latents_fingerprint,
    load_feature_reader,
)
from nanorlhf.errors import InputError
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.models import RewardModel, load_reward_model, save_reward_model
from nanorlhf.packing import Answers, pack
from nanorlhf.rewards import check_reward, load_reward
from nanorlhf.runtime.distributed import Dist, setup, shutdown
from nanorlhf.runtime.fsdp import is_sharded
from nanorlhf.sae import SparseAutoencoder, TopKSAE
from nanorlhf.sarm import SARM, is_sarm, new_sae, reweighted, save_sarm

M = 48
K = 6
N = 4
L = 3
# sarm_param in the names of older checkpoints.
OLD_PARAM = {
    "sae_hidden_state_source_layer": L,
    "sae_latent_size": M,
    "sae_k": K,
    "sae_use_sequence_level": True,
    "sarm_use_topk": True,
}
ALONE = Dist(0, 1, torch.device("cpu"))
# The texts of BATCH, one by one.
TEXTS = list(zip(PROMPTS, RESPONSES))


def same(found, expected, tol=1e-4):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def same_readings(found, expected):
    same(found.scores, expected.scores, 1e-5)
    same(found.latents, expected.latents, 1e-5)
    same(found.edited, expected.edited, 1e-5)


def read_json(path):
    return json.loads(path.read_text())


# ------------------------------------------------------------------------- a SARM, text by text


def hidden_by_hf(lm, prompt, response, n_blocks):
    """The residual stream after so many blocks at a text's last token, by HF: float64 [D]."""
    ids = torch.tensor([prompt + response])
    hidden = lm(input_ids=ids, output_hidden_states=True).hidden_states[n_blocks]
    return hidden[0, -1].detach().double().numpy()


def latents_by_loop(h, tensors, n_kept):
    """One text's latents, feature by feature: h [D] -> z [M]."""
    x = (h - h.mean()) / (h.std(ddof=1) + 1e-6)
    centred = x - tensors["sae.pre_bias"]
    pre = np.zeros(M)
    for i in range(M):
        pre[i] = tensors["sae.encoder.weight"][i] @ centred + tensors["sae.latent_bias"][i]
    # TopK: the largest stay as they are, whatever their sign.
    kept = np.argsort(-pre)[:n_kept]
    z = np.zeros(M)
    z[kept] = pre[kept]
    return z


def sarm_by_loop(lm, tensors, n_kept=K, n_blocks=L):
    """Scores [B] and latents [B, M] of BATCH in float64, from the paper's formulas."""
    arrays = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
    scores = []
    latents = []
    for prompt, response in TEXTS:
        h = hidden_by_hf(lm, prompt, response, n_blocks)
        z = latents_by_loop(h, arrays, n_kept)
        latents.append(z)
        scores.append(z @ arrays["score.weight"][0])
    return torch.tensor(np.array(scores)).float(), torch.tensor(np.array(latents)).float()


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A folder in the public layout -> its path, the LM that it was cut from, its tensors."""
    path = str(tmp_path_factory.mktemp("public") / "sarm")
    lm, tensors = public_checkpoint(path)
    return path, lm, tensors


@pytest.fixture(scope="module")
def sarm(public):
    path, _, _ = public
    return SARM.from_pretrained(path)


@pytest.fixture(scope="module")
def by_loop(public):
    """Scores [B] and latents [B, M] of that SARM, by the loop."""
    _, lm, tensors = public
    return sarm_by_loop(lm, tensors)


@pytest.fixture(scope="module")
def head(public):
    """The weight of each feature in the score: [M]."""
    _, _, tensors = public
    return tensors["score.weight"][0]


def test_a_sarm_has_no_labels(public):
    path, _, _ = public
    check_reward(path)
    refuses(check_reward, f"{path}#good", match=["has no label 'good'"])


# ------------------------------------------------------------------------------------ the layout


@pytest.mark.parametrize("param", [SARM_PARAM, OLD_PARAM], ids=["new names", "old names"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_public_layout_round_trips(tmp_path, param, shards):
    given = tmp_path / "given"
    saved = tmp_path / "saved"
    lm, tensors = public_checkpoint(str(given), param, shards)
    sarm = SARM.from_pretrained(str(given))
    expected, _ = sarm_by_loop(lm, tensors)
    same(sarm(BATCH), expected)

    # The same tensors, bit for bit, under the same names; settings in their newer names.
    sarm.save_pretrained(str(saved))
    saved_tensors = load_file(saved / "model.safetensors")
    assert set(saved_tensors) == set(tensors)
    for name in tensors:
        assert saved_tensors[name].equal(tensors[name])
    config = read_json(saved / "config.json")
    assert config["sarm_param"] == SARM_PARAM
    assert config["num_hidden_layers"] == N
    assert config["model_type"] == "llama"
    assert SARM.from_pretrained(str(saved))(BATCH).equal(sarm(BATCH))


def write_checkpoint(path, tensors, config):
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))


def test_l_defaults_to_the_middle(tmp_path):
    lm, tensors = public_checkpoint(str(tmp_path))
    # Neither L nor the third block.
    config = read_json(tmp_path / "config.json")
    config["sarm_param"] = {"sae_latent_size": M, "sae_k": K}
    for name in list(tensors):
        if name.startswith(f"model.layers.{L - 1}."):
            del tensors[name]
    write_checkpoint(tmp_path, tensors, config)

    sarm = SARM.from_pretrained(str(tmp_path))
    expected, _ = sarm_by_loop(lm, tensors, n_blocks=2)
    assert sarm.config.sarm_param["sae_source_layer"] == 2  # of 4
    same(sarm(BATCH), expected)


@pytest.mark.parametrize(
    "param",
    [{**SARM_PARAM, "sarm_use_activation": False}, {**OLD_PARAM, "sarm_use_topk": False}],
    ids=["new names", "old names"],
)
def test_without_topk_all_latents_count(tmp_path, param):
    lm, tensors = public_checkpoint(str(tmp_path), param)
    sarm = SARM.from_pretrained(str(tmp_path))
    scores, latents = sarm_by_loop(lm, tensors, n_kept=M)
    same(sarm(BATCH), scores)
    reading = sarm.read(BATCH, edits={3: ("set", 0.5)})
    same(reading.latents, latents)
    change = tensors["score.weight"][0, 3] * (0.5 - latents[:, 3])
    same(reading.edited, scores + change)


def test_no_remote_code_is_run(tmp_path):
    given = str(tmp_path / "given")
    saved = tmp_path / "saved"
    public_checkpoint(given, auto_map=True)
    SARM.from_pretrained(given).save_pretrained(str(saved))
    assert "auto_map" not in read_json(saved / "config.json")
    assert is_sarm(given)


def random_sarm(lm):
    """A SARM on a copy of an LM's trunk -> it, its tensors."""
    config = copy.deepcopy(lm.config)
    config.sarm_param = SARM_PARAM
    sarm = SARM(copy.deepcopy(lm.base_model), new_sae(config), config)
    tensors = head_tensors(1)
    sarm.sae.b_dec.data.copy_(tensors["sae.pre_bias"])
    sarm.sae.b_enc.data.copy_(tensors["sae.latent_bias"])
    sarm.sae.W_enc.data.copy_(tensors["sae.encoder.weight"])
    sarm.score.weight.data.copy_(tensors["score.weight"])
    return sarm, tensors


each_decoder = pytest.mark.parametrize("name", SARM_CONFIGS)


@each_decoder
def test_any_decoder_is_read_after_block_l(name):
    """The residual stream is what HF calls hidden_states."""
    lm = full_lm(name)
    sarm, tensors = random_sarm(lm)
    scores, latents = sarm_by_loop(lm, tensors)
    same(sarm(BATCH), scores)
    same(sarm.read(BATCH).latents, latents)
    sarm.standardise(1.5, 2.0)
    same(sarm(BATCH), (scores - 1.5) / 2)


@each_decoder
def test_any_decoder_is_saved_under_its_own_names(tmp_path, name):
    lm = full_lm(name)
    sarm, _ = random_sarm(lm)
    sarm.standardise(1.5, 2.0)
    save_sarm(sarm, word_tokenizer(), str(tmp_path))
    assert SARM.from_pretrained(str(tmp_path))(BATCH).equal(sarm(BATCH))

    # All of the LM but its last block and its head, and five tensors of the autoencoder and score.
    saved = load_file(tmp_path / "model.safetensors")
    n_kept = 0
    for key, tensor in lm.state_dict().items():
        is_last_block = f".{L}." in key
        if key.startswith(lm.base_model_prefix) and not is_last_block:
            assert saved[key].equal(tensor)
            n_kept += 1
    assert len(saved) == n_kept + 5


# --------------------------------------------------------------------- readings, edits, weights


def test_a_reading_is_scores_and_latents(sarm, by_loop):
    scores, latents = by_loop
    reading = sarm.read(BATCH)
    same(reading.scores, scores)
    same(reading.latents, latents)
    n_nonzero = (reading.latents != 0).sum(1)
    assert n_nonzero.eq(K).all()
    # Without edits.
    assert reading.edited.equal(reading.scores)


@pytest.mark.parametrize("k", [1, M])
def test_the_k_largest_latents_stay_whatever_their_sign(tmp_path, k):
    lm, tensors = public_checkpoint(str(tmp_path))
    config = read_json(tmp_path / "config.json")
    config["sarm_param"]["sae_k"] = k
    write_checkpoint(tmp_path, tensors, config)

    scores, latents = sarm_by_loop(lm, tensors, n_kept=k)
    assert (latents < 0).any() == (k == M)
    reading = SARM.from_pretrained(str(tmp_path)).read(BATCH)
    same(reading.scores, scores)
    same(reading.latents, latents)


def test_features_are_read_in_the_order_asked_for(sarm):
    latents = sarm.read(BATCH).latents
    chosen = [5, 0, 47, 5]
    assert sarm.read(BATCH, chosen).latents.equal(latents[:, chosen])
    assert sarm.read(BATCH, []).latents.shape == (B, 0)


def features_of_some_texts(latents):
    """The features that fire in some texts and not in others, in order."""
    n_texts = (latents != 0).sum(0)
    return [i for i in range(M) if 0 < n_texts[i] < B]


def edit_by_hand(op, z):
    """What an edit of 0.7 makes of one latent."""
    if op == "set":
        return 0.7
    if op == "min":
        return max(z, 0.7)
    if op == "max":
        return min(z, 0.7)
    if op == "*":
        return 0.7 * z
    assert op == "+"
    return 0.7 + z


@pytest.mark.parametrize("op", ["set", "min", "max", "*", "+"])
def test_an_edit_moves_a_score_by_w_times_the_change_of_z(sarm, by_loop, head, op):
    scores, latents = by_loop
    a, b, *_ = features_of_some_texts(latents)
    expected = scores.clone()
    for t in range(B):
        z_a = latents[t, a].item()
        z_b = latents[t, b].item()
        expected[t] += head[a] * (edit_by_hand(op, z_a) - z_a)
        expected[t] += head[b] * (0.0 - z_b)

    reading = sarm.read(BATCH, [a], {a: (op, 0.7), b: ("set", 0.0)})
    same(reading.edited, expected)
    # Latents are those before the edit.
    same(reading.latents[:, 0], latents[:, a])


def test_an_edit_that_changes_nothing_leaves_the_bits_of_a_score(sarm, by_loop):
    _, latents = by_loop
    a, *_ = features_of_some_texts(latents)
    reading = sarm.read(BATCH, edits={a: ("*", 0.0)})
    without = latents[:, a] == 0
    assert reading.edited[without].equal(reading.scores[without])
    assert not reading.edited[~without].equal(reading.scores[~without])


def exact_scores(sarm):
    """Scores [B] as float32 rounds the exact sum of w_i z_i, in fractions, once.

    From the model's own float32 latents.
    """
    weights = [Fraction(w) for w in sarm.score.weight[0].tolist()]
    scores = []
    for row in sarm.read(BATCH).latents.tolist():
        total = Fraction(0)
        for w, z in zip(weights, row):
            if z != 0:
                total += w * Fraction(z)
        scores.append(float(total))
    return torch.tensor(scores, dtype=torch.float64).float()


def test_a_weight_changes_only_texts_that_have_its_feature_and_by_w_z(sarm):
    """Bit for bit, since a score is the exact sum, rounded once."""
    before = sarm.read(BATCH)
    assert before.scores.equal(exact_scores(sarm))
    for i in range(M):
        z = before.latents[:, i]
        with reweighted(sarm, {i: ("+", 0.3)}):
            after = sarm(BATCH).detach()
            assert after.equal(exact_scores(sarm))
        assert after[z == 0].equal(before.scores[z == 0])
        same(after - before.scores, 0.3 * z, 1e-5)
    assert sarm(BATCH).equal(before.scores)


def test_a_feature_alone_gives_w_z_itself(sarm):
    before = sarm.read(BATCH)
    for i in range(M):
        alone = {j: ("set", 0.0) for j in range(M)}
        alone[i] = ("set", 0.3)
        z = before.latents[:, i].double()
        expected = torch.tensor(0.3).double() * z
        with reweighted(sarm, alone):
            assert sarm(BATCH).equal(expected.float())
    assert sarm(BATCH).equal(before.scores)


def test_reweighted_is_undone_also_by_an_error(sarm):
    own = sarm.score.weight.detach().clone()
    with pytest.raises(KeyError), reweighted(sarm, {3: ("set", 9.0), 4: ("*", 0.1)}):
        assert sarm.score.weight[0, 3] == 9
        assert sarm.score.weight[0, 4] == own[0, 4] * 0.1
        raise KeyError
    assert sarm.score.weight.equal(own)


def test_scores_are_float32_under_autocast(sarm):
    """The trunk may run in bfloat16. From h on everything is float32."""
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        h = sarm.pooled(BATCH)
        scores = sarm(BATCH)
    expected = sarm.weighted(*sarm.code(h)).float()
    assert scores.dtype == torch.float32
    assert scores.equal(expected)
    assert len(set(scores.tolist())) == B
    # Scores in bfloat16 would be others.
    assert not scores.equal(scores.bfloat16().float())


def test_gradients(sarm):
    """d score / d w is z; the LM's gradient is autograd's through the dense formula."""
    parameters = [sarm.score.weight, sarm.sae.W_enc, sarm.trunk.embed_tokens.weight]
    gradients = torch.autograd.grad(sarm(BATCH).sum(), parameters)
    z = sarm.read(BATCH).latents
    same(gradients[0][0], z.sum(0))

    dense_z = sarm.sae.encode(sarm.pooled(BATCH))
    dense_scores = dense_z @ sarm.score.weight[0]
    dense_gradients = torch.autograd.grad(dense_scores.sum(), parameters)
    for found, expected in zip(gradients, dense_gradients):
        same(found, expected, 1e-3)
    # The norm that follows the trunk in the whole LM is kept, and not trained.
    assert not any(p.requires_grad for p in sarm.norm.parameters())


# ---------------------------------------------------- another reward model with an autoencoder


def reward_model(name="neox"):
    config = copy.deepcopy(SARM_CONFIGS[name])
    config.num_labels = 1
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_config(config)
    return RewardModel(model.eval()).eval()


def topk_sae(normalize):
    return TopKSAE(D, M, K, normalize)


def vanilla_sae(normalize):
    return SparseAutoencoder(D, M, normalize=normalize)


def randomise(sae):
    """Biases and a mean that are not 0, and a scale that is not 1."""
    sae.b_enc.data.normal_(0, 0.1)
    sae.mean.normal_()
    sae.scale.fill_(1.7)


def step_by_hand(sae, normalize, x, z):
    """How far x [D] moves when feature 3 is set to 2 and feature 7 is switched off."""
    step = (2.0 - z[3]) * sae.W_dec[3] - z[7] * sae.W_dec[7]
    if normalize == "token":
        return step * (x.std() + 1e-6)
    if normalize == "dataset":
        return step * 1.7
    return step


@torch.no_grad()
def run_with_step(model, module, text, step):
    """Run one text with a hook of this test, which adds `step` [D] to x at the last token.

    -> x [D], a module's output before the step; the score
    """
    outputs = []

    def hook(module, args, output):
        is_tuple = isinstance(output, tuple)
        x = output[0] if is_tuple else output
        outputs.append(x[0, -1].clone())
        moved = x.clone()
        moved[0, -1] += step
        if is_tuple:
            return (moved, *output[1:])
        return moved

    prompt, response = text
    handle = module.register_forward_hook(hook)
    hidden = model.model.gpt_neox(torch.tensor([prompt + response])).last_hidden_state
    handle.remove()
    return outputs[0], model.model.score(hidden[0, -1])[0]


@pytest.mark.parametrize(
    "make_sae, normalize", [(topk_sae, "token"), (topk_sae, "dataset"), (vanilla_sae, "none")]
)
@pytest.mark.parametrize("site", ["residual", "mlp"])
def test_an_autoencoder_on_a_layer(make_sae, normalize, site):
    """Edits by a loop that runs the model on one text alone, with a hook of its own."""
    model = reward_model()
    sae = make_sae(normalize)
    randomise(sae)
    both = WithSAE(model, sae, (1, site))
    plain = both.read(BATCH, [7, 3])
    reading = both.read(BATCH, None, {3: ("set", 2.0), 7: ("*", 0.0)})
    assert plain.edited.equal(plain.scores)
    assert plain.scores.equal(model(BATCH))

    block = model.model.gpt_neox.layers[1]
    module = block if site == "residual" else block.mlp
    for row, text in enumerate(TEXTS):
        x, _ = run_with_step(model, module, text, torch.zeros(D))
        z = sae.encode(x).detach()
        step = step_by_hand(sae, normalize, x, z)
        _, edited_score = run_with_step(model, module, text, step)
        same(reading.latents[row], z)
        same(plain.latents[row], z[[7, 3]])
        same(reading.edited[row], edited_score)
    assert (reading.edited - reading.scores).abs().max() > 1e-3


def test_texts_that_an_edit_changes_run_again_each_with_its_own_change():
    """As if each were alone. The first text is not among them."""
    both = WithSAE(reward_model(), vanilla_sae("none"), (1, "residual"))
    both.sae.b_enc.data.normal_(0, 0.1)
    # A feature that is larger in all other texts than in the first.
    z = both.read(BATCH).latents  # [B, M]
    feature = int((z[1:].amin(0) - z[0]).argmax())
    assert (z[1:, feature] > z[0, feature]).all()

    edits = {feature: ("max", z[0, feature].item() + 1e-6)}
    scores, _, edited = both.read(BATCH, [], edits)
    is_changed = (edited != scores).tolist()
    assert is_changed == [False, True, True, True, True]
    for row, (prompt, response) in enumerate(TEXTS):
        alone = both.read(pack([prompt], [response]), [], edits)
        same(edited[row], alone.edited[0], 1e-5)


# --------------------------------------------------------------------------- rewards in folders


def answers():
    tokenizer = word_tokenizer()
    prompts = tokenizer.batch_decode(PROMPTS)
    responses = tokenizer.batch_decode(RESPONSES)
    return Answers(prompts, responses, BATCH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """rm/, a reward model; sae/, an autoencoder on its layer 2; run/, a run that has made it."""
    root = tmp_path_factory.mktemp("rewards")
    save_reward_model(reward_model("llama"), word_tokenizer(), str(root / "rm"))
    notes = {"model": "x", "layer": 2, "site": "residual"}
    save_sae(topk_sae("dataset"), str(root / "sae"), **notes)
    save_sae(topk_sae("dataset"), str(root / "run/policy/2_residual"), **notes)
    save_sae(TopKSAE(D, M, K, "dataset", seed=1), str(root / "another_sae"), **notes)
    return root


def load_with_sae(rm, sae):
    return load_feature_reader(str(rm), str(sae), word_tokenizer(), ALONE)


def test_a_sarm_as_a_feature_reward(public, sarm):
    path, _, _ = public
    check_reward(path)
    assert check_feature_reader(path, "", [0, M - 1]) == M
    reward = load_feature_reader(path, "", word_tokenizer(), ALONE, micro_batch_size=2)
    assert reward.m == M
    assert reward.weights.equal(sarm.score.weight[0])

    edits = {2: ("+", 1.0)}
    expected = sarm.read(BATCH, [2, 9], edits)
    same_readings(reward.read(answers(), [2, 9], edits), expected)
    assert reward.read(answers()).latents.shape == (B, M)
    # As any other reward.
    same(load_reward(path, word_tokenizer(), ALONE)(answers()), expected.scores, 1e-5)


def test_a_process_without_answers_reads_none(public):
    path, _, _ = public
    no_answers = Answers([], [], pack([], []))
    for tokenizer in (word_tokenizer(), None):  # sampled ids; texts, which are encoded first
        reward = load_feature_reader(path, "", tokenizer, ALONE)
        reading = reward.read(no_answers, [2, 9], {2: ("+", 1.0)})
        assert [tuple(values.shape) for values in reading] == [(0,), (0, 2), (0,)]


@pytest.mark.parametrize("sae", ["sae", "run"])
def test_an_autoencoder_may_be_named_by_its_folder_or_its_run(folder, sae):
    assert check_feature_reader(str(folder / "rm"), str(folder / sae)) == M
    reward = load_with_sae(folder / "rm", folder / sae)
    assert reward.m == M


def test_a_reward_model_with_an_autoencoder_as_a_feature_reward(folder):
    assert not is_sarm(str(folder / "rm"))
    reward = load_with_sae(folder / "rm", folder / "sae")
    # Its head does not read the features.
    assert reward.weights is None
    edits = {1: ("set", 3.0)}
    model = load_reward_model(str(folder / "rm"))
    expected = WithSAE(model, topk_sae("dataset"), (2, "residual")).read(BATCH, [1], edits)
    same_readings(reward.read(answers(), [1], edits), expected)


def test_fingerprints_tell_what_makes_the_latents(folder, public):
    path, _, _ = public
    rm = str(folder / "rm")
    of_sarm = latents_fingerprint(path)
    of_both = latents_fingerprint(rm, str(folder / "sae"))
    of_run = latents_fingerprint(rm, str(folder / "run"))
    of_another = latents_fingerprint(rm, str(folder / "another_sae"))
    assert of_run == of_both
    assert of_another["reward_model"] == of_both["reward_model"]
    assert len({of_sarm["sae"], of_both["sae"], of_another["sae"]}) == 3


# ------------------------------------------------------------------------------------- bad input


@pytest.fixture
def checkpoint(tmp_path):
    """A good checkpoint to be broken -> its folder, tensors and config."""
    _, tensors = public_checkpoint(str(tmp_path))
    return tmp_path, tensors, read_json(tmp_path / "config.json")


def check_broken(path, tensors, config, words):
    """A folder with these must be refused in one line that says these words."""
    write_checkpoint(path, tensors, config)
    refuses(SARM.from_pretrained, str(path), match=[words])


@pytest.mark.parametrize("name", ["sae.latent_bias", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_that_is_missing(checkpoint, name):
    path, tensors, config = checkpoint
    del tensors[name]
    check_broken(path, tensors, config, f"{name} is missing")


@pytest.mark.parametrize("name", ["sae.extra", f"model.layers.{L}.mlp.up_proj.weight"])
def test_a_tensor_too_many(checkpoint, name):
    path, tensors, config = checkpoint
    tensors[name] = torch.zeros(2, 2)
    check_broken(path, tensors, config, f"{name} is not a tensor")


def test_a_tensor_of_another_shape(checkpoint):
    path, tensors, config = checkpoint
    tensors["score.weight"] = torch.zeros(1, M + 1)
    check_broken(path, tensors, config, f"score.weight is [1, {M + 1}]")
    check_broken(path, tensors, config, f"[1, {M}]")


BAD_SETTINGS = [
    ("sae_k", M + 1),
    ("sae_k", 0),
    ("sae_source_layer", N + 1),
    ("sae_source_layer", 0),
]


@pytest.mark.parametrize("name, value", BAD_SETTINGS)
def test_a_setting_that_cannot_be(checkpoint, name, value):
    path, tensors, config = checkpoint
    config["sarm_param"][name] = value
    check_broken(path, tensors, config, name)


def test_a_setting_that_is_missing(checkpoint):
    path, tensors, config = checkpoint
    del config["sarm_param"]["sae_latent_size"]
    check_broken(path, tensors, config, "sae_latent_size")


def test_settings_that_are_no_dictionary(checkpoint):
    path, tensors, config = checkpoint
    config["sarm_param"] = [1]
    check_broken(path, tensors, config, "sarm_param")
    del config["sarm_param"]
    check_broken(path, tensors, config, "no SARM")


def test_a_file_that_is_no_safetensors(checkpoint):
    path, _, _ = checkpoint
    weights = path / "model.safetensors"
    weights.write_bytes(b"nonsense")
    refuses(SARM.from_pretrained, str(path), match=["cannot be read"])
    weights.unlink()
    refuses(SARM.from_pretrained, str(path), match=["no weights"])
    refuses(is_sarm, str(path / "nowhere"), match=["no such"])


@pytest.mark.parametrize("features, edits", [([M], None), ([-1], None), (None, {M: ("set", 0.0)})])
def test_features_that_are_not_there(sarm, features, edits):
    refuses(sarm.read, BATCH, features, edits, match=[f"0 to {M - 1}"])


@pytest.fixture(scope="module")
def bad_folder(folder):
    """`folder` with more: a plain LM, and autoencoders that fit no layer of the reward model."""
    full_lm("llama").save_pretrained(folder / "lm")
    save_sae(TopKSAE(D, M, K), str(folder / "high"), layer=N, site="residual")
    save_sae(TopKSAE(D + 1, M, K), str(folder / "wide"), layer=1, site="residual")
    save_sae(TopKSAE(D, M, K), str(folder / "no_place"))
    return folder


@pytest.mark.parametrize(
    "reward, sae, words",
    [
        ("rm", "", "no SARM: name an autoencoder"),
        ("rm", "high", f"layer {N}"),
        ("rm", "wide", "width"),
        ("rm", "no_place", "metadata"),
        ("rm", "gone", "no sparse autoencoder"),
        ("lm", "x", "no reward model"),
        ("world:gold", "", "no features"),
    ],
)
def test_rewards_without_features(bad_folder, monkeypatch, reward, sae, words):
    monkeypatch.chdir(bad_folder)
    refuses(check_feature_reader, reward, sae, match=[words])


def test_a_sarm_has_its_own_autoencoder_and_features(public, bad_folder):
    path, _, _ = public
    refuses(check_feature_reader, path, str(bad_folder / "sae"), match=["is a SARM"])
    refuses(check_feature_reader, path, "", [3, M], match=[f"feature {M}"])


def test_a_trunk_that_cannot_be_cut():
    """More than a norm follows its blocks: a hook that doubles the output."""

    def double(module, args, output):
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    config = copy.deepcopy(SARM_CONFIGS["llama"])
    trunk = AutoModel.from_config(config)
    trunk.register_forward_hook(double)
    config = copy.deepcopy(SARM_CONFIGS["llama"])
    config.sarm_param = SARM_PARAM
    with pytest.raises(InputError, match="more than a norm"):
        SARM(trunk, new_sae(config), config)


# ------------------------------------------------------------------------------ on two processes


def read_in_shards(specs, out):
    """What one of two processes under FSDP2 says of its half of the answers, in a file a reward."""
    dist = setup("cpu", "fsdp")
    first, last = (0, 3) if dist.main else (3, 5)
    texts = answers()
    mine = BATCH.rows(torch.arange(first, last))
    own = Answers(texts.prompts[first:last], texts.responses[first:last], mine)
    for i, (path, sae) in enumerate(specs):
        reward = load_feature_reader(path, sae, word_tokenizer(), dist)
        reading = reward.read(own, [2, 9], {2: ("+", 1.0)})
        assert is_sharded(reward.module)
        tensors = {name: x.contiguous() for name, x in reading._asdict().items()}
        save_file(tensors, f"{out}/{i}_{dist.rank}.safetensors")
    shutdown()


@pytest.mark.slow
def test_in_shards(tmp_path, public, folder):
    path, _, _ = public
    specs = [(path, ""), (str(folder / "rm"), str(folder / "sae"))]
    join(*ranks(2, read_in_shards, specs, str(tmp_path)))
    for i, (reward, sae) in enumerate(specs):
        first = load_file(tmp_path / f"{i}_0.safetensors")
        second = load_file(tmp_path / f"{i}_1.safetensors")
        alone = load_feature_reader(reward, sae, word_tokenizer(), ALONE)
        expected = alone.read(answers(), [2, 9], {2: ("+", 1.0)})
        for name, x in expected._asdict().items():
            same(torch.cat([first[name], second[name]]), x, 1e-5)
