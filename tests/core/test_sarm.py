"""nanorlhf.sarm and feature_reader: the public layout written by hand, and float64 loops over texts and latents.

B texts, T tokens, D hidden, M features, k kept
"""

import copy
import json
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    BATCH,
    PROMPTS,
    RESPONSES,
    SARM_CONFIGS,
    SARM_PARAM,
    B,
    D,
    full_lm,
    head_tensors,
    join,
    public_checkpoint,
    ranks,
    word_tokenizer,
)
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
)

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
from nanorlhf.rewards import check_reward, load_reward, score
from nanorlhf.runtime.distributed import Dist, setup, shutdown
from nanorlhf.runtime.fsdp import is_sharded
from nanorlhf.sae import SparseAutoencoder, TopKSAE
from nanorlhf.sarm import SARM, is_sarm, new_sae, reweighted, save_sarm

M, K, N, L = 48, 6, 4, 3
OLD = {
    "sae_hidden_state_source_layer": L,
    "sae_latent_size": M,
    "sae_k": K,
    "sae_use_sequence_level": True,
    "sarm_use_topk": True,
}
ALONE = Dist(0, 1, torch.device("cpu"))


def by_loop(lm, t, dense=False, n_blocks=L):
    """Scores [B] and latents [B, M], one text at a time in float64, from HF's hidden_states and the spec's formulas."""
    scores, latents = [], []
    t = {name: x.detach().double().numpy() for name, x in t.items()}
    for prompt, response in zip(PROMPTS, RESPONSES):
        hidden = lm(
            input_ids=torch.tensor([prompt + response]), output_hidden_states=True
        ).hidden_states[n_blocks]
        h = hidden[0, -1].detach().double().numpy()
        x = (h - h.mean()) / (h.std(ddof=1) + 1e-6)
        pre = [
            sum(w * (xi - b) for w, xi, b in zip(row, x, t["sae.pre_bias"]))
            for row in t["sae.encoder.weight"]
        ]
        pre = np.array(pre) + t["sae.latent_bias"]
        keep = sorted(range(M), key=lambda i: -pre[i])[: M if dense else K]
        z = np.array([pre[i] if i in keep else 0.0 for i in range(M)])
        latents.append(z)
        scores.append((z * t["score.weight"][0]).sum())
    return torch.tensor(np.array(scores)).float(), torch.tensor(np.array(latents)).float()


def same(a, b, tol=1e-4):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("public") / "sarm")
    lm, tensors = public_checkpoint(path)
    return path, lm, tensors


@pytest.fixture(scope="module")
def sarm(public):
    return SARM.from_pretrained(public[0])


# -------------------------------------------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("param", [SARM_PARAM, OLD], ids=["new names", "old names"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_public_layout_round_trips(tmp_path, param, shards):
    lm, tensors = public_checkpoint(str(tmp_path / "a"), param, shards)
    sarm = SARM.from_pretrained(str(tmp_path / "a"))
    same(sarm(BATCH), by_loop(lm, tensors)[0])
    sarm.save_pretrained(str(tmp_path / "b"))
    again = load_file(str(tmp_path / "b" / "model.safetensors"))
    assert set(again) == set(tensors) and all(again[name].equal(tensors[name]) for name in tensors)
    config = json.load(open(tmp_path / "b" / "config.json"))
    assert (
        config["sarm_param"] == SARM_PARAM
        and config["num_hidden_layers"] == N
        and config["model_type"] == "llama"
    )
    assert SARM.from_pretrained(str(tmp_path / "b"))(BATCH).equal(sarm(BATCH))


def test_l_defaults_to_the_middle(tmp_path):
    lm, tensors = public_checkpoint(str(tmp_path))
    param = {"sae_latent_size": M, "sae_k": K}
    config = json.load(open(tmp_path / "config.json"))
    json.dump(config | {"sarm_param": param}, open(tmp_path / "config.json", "w"))
    tensors = {
        name: x for name, x in tensors.items() if not name.startswith(f"model.layers.{L - 1}.")
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    sarm = SARM.from_pretrained(str(tmp_path))
    assert sarm.config.sarm_param["sae_source_layer"] == N // 2
    same(sarm(BATCH), by_loop(lm, tensors, n_blocks=N // 2)[0])


@pytest.mark.parametrize("old", [False, True])
def test_dense_scores(tmp_path, old):
    lm, tensors = public_checkpoint(
        str(tmp_path),
        OLD | {"sarm_use_topk": False} if old else SARM_PARAM | {"sarm_use_activation": False},
    )
    sarm = SARM.from_pretrained(str(tmp_path))
    scores, latents = by_loop(lm, tensors, dense=True)
    same(sarm(BATCH), scores)
    reading = sarm.read(BATCH, edits={3: ("set", 0.5)})
    same(reading.latents, latents)
    same(reading.edited, scores + tensors["score.weight"][0, 3] * (0.5 - latents[:, 3]))


def test_no_remote_code_is_run(tmp_path):
    public_checkpoint(str(tmp_path / "a"), auto_map=True)
    SARM.from_pretrained(str(tmp_path / "a")).save_pretrained(str(tmp_path / "b"))
    assert "auto_map" not in json.load(open(tmp_path / "b" / "config.json"))
    assert is_sarm(str(tmp_path / "a"))


@pytest.mark.parametrize("name", SARM_CONFIGS)
def test_any_decoder(tmp_path, name):
    """The residual stream after block L, of which HF's hidden_states speak; saved under the LM's own names, and back with the same bits."""
    lm, tensors = full_lm(name), head_tensors(1)
    config = copy.deepcopy(lm.config)
    config.sarm_param = SARM_PARAM
    sarm = SARM(copy.deepcopy(lm.base_model), new_sae(config), config)
    with torch.no_grad():
        for own, key in ((sarm.sae.b_dec, "sae.pre_bias"), (sarm.sae.b_enc, "sae.latent_bias"), (sarm.sae.W_enc, "sae.encoder.weight"),
                         (sarm.score.weight, "score.weight")):  # fmt: skip
            own.copy_(tensors[key])
    scores, latents = by_loop(lm, tensors)
    same(sarm(BATCH), scores)
    same(sarm.read(BATCH).latents, latents)
    sarm.standardise(1.5, 2.0)
    same(sarm(BATCH), (scores - 1.5) / 2)
    save_sarm(sarm, word_tokenizer(), str(tmp_path))
    assert SARM.from_pretrained(str(tmp_path))(BATCH).equal(sarm(BATCH))
    saved = load_file(str(tmp_path / "model.safetensors"))
    prefix = lm.base_model_prefix
    whole = {
        name: p
        for name, p in lm.state_dict().items()
        if f".{L}." not in name and name.startswith(prefix)
    }
    assert all(saved[name].equal(p) for name, p in whole.items()) and len(saved) == len(whole) + 5


# ----------------------------------------------------------------------------------------------------------- readings, edits, weights


def test_readings(sarm, public):
    scores, latents = by_loop(*public[1:])
    reading = sarm.read(BATCH)
    same(reading.scores, scores)
    same(reading.latents, latents)
    assert reading.edited.equal(reading.scores) and (reading.latents != 0).sum(1).eq(K).all()
    chosen = [5, 0, 47, 5]
    assert sarm.read(BATCH, chosen).latents.equal(reading.latents[:, chosen])
    assert sarm.read(BATCH, []).latents.shape == (B, 0)


def test_edits_of_latents(sarm, public):
    scores, z = by_loop(*public[1:])
    w = public[2]["score.weight"][0]
    fires = [i for i in range(M) if 0 < (z[:, i] != 0).sum() < B]
    a, b = fires[:2]
    cases = {
        "set": lambda x: 0.7,
        "min": lambda x: max(x, 0.7),
        "max": lambda x: min(x, 0.7),
        "*": lambda x: 0.7 * x,
    }
    for op, function in {**cases, "+": lambda x: x + 0.7}.items():
        reading = sarm.read(BATCH, [a], {a: (op, 0.7), b: ("set", 0.0)})
        change = [w[a] * (function(z[t, a].item()) - z[t, a]) - w[b] * z[t, b] for t in range(B)]
        same(reading.edited, scores + torch.stack(change))
        same(reading.latents[:, 0], z[:, a])  # unedited
    unfired = sarm.read(BATCH, edits={a: ("*", 0.0)})
    without = z[:, a] == 0
    assert unfired.edited[without].equal(unfired.scores[without]) and not unfired.edited[
        ~without
    ].equal(unfired.scores[~without])


def exact(sarm):
    """Each text's score as float32 rounds the exact (rational) sum of w_i z_i, from the model's own float32 latents."""
    z, w = sarm.read(BATCH).latents.tolist(), sarm.score.weight[0].tolist()
    return torch.tensor(
        [float(sum(Fraction(a) * Fraction(b) for a, b in zip(row, w))) for row in z],
        dtype=torch.float64,
    ).float()


def test_one_head_weight_changes_only_texts_that_have_the_feature_and_by_w_z(sarm):
    """Bit for bit: a score is the exact sum of w_i z_i, rounded once, so the change of a weight adds its z and nothing else."""
    before = sarm.read(BATCH)
    assert before.scores.equal(exact(sarm))
    for i in range(M):
        z = before.latents[:, i]
        with reweighted(sarm, {i: ("+", 0.3)}):
            after = sarm(BATCH).detach()
            assert after.equal(exact(sarm))
        assert after[z == 0].equal(before.scores[z == 0])
        same(after - before.scores, 0.3 * z, 1e-5)
        with reweighted(
            sarm, {j: ("set", 0.3 * (i == j)) for j in range(M)}
        ):  # alone: w z itself, rounded once
            assert sarm(BATCH).equal((torch.tensor(0.3).double() * z.double()).float())
    assert sarm(BATCH).equal(before.scores)


def test_reweighted_is_undone_also_by_an_error(sarm):
    own = sarm.score.weight.detach().clone()
    with pytest.raises(KeyError), reweighted(sarm, {3: ("set", 9.0), 4: ("*", 0.1)}):
        assert sarm.score.weight[0, 3] == 9 and sarm.score.weight[0, 4] == own[0, 4] * 0.1
        raise KeyError
    assert sarm.score.weight.equal(own)


def test_scores_are_float32_under_autocast(sarm, public):
    """The trunk may run in bfloat16; from h on everything is float32: the scores are those of the loop at that very h."""
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        h, scores = sarm.pooled(BATCH), sarm(BATCH)
    sarm_scores = sarm.weighted(*sarm.code(h)).float()
    assert (
        scores.dtype == torch.float32
        and scores.equal(sarm_scores)
        and len(set(scores.tolist())) == B
    )
    assert not scores.equal(scores.bfloat16().float())


def test_gradients(sarm, public):
    """d score / d w is z; the LM's gradient is autograd's through the dense formula."""
    z = sarm.read(BATCH).latents
    grad = torch.autograd.grad(
        sarm(BATCH).sum(), [sarm.score.weight, sarm.sae.W_enc, sarm.trunk.embed_tokens.weight]
    )
    same(grad[0][0], z.sum(0))
    dense = (sarm.sae.encode(sarm.pooled(BATCH)) @ sarm.score.weight[0]).sum()
    for a, b in zip(
        grad,
        torch.autograd.grad(
            dense, [sarm.score.weight, sarm.sae.W_enc, sarm.trunk.embed_tokens.weight]
        ),
    ):
        same(a, b, 1e-3)


# ---------------------------------------------------------------------------------------------------- another reward model with an SAE


def reward_model(name="neox", seed=2):
    config = copy.deepcopy(SARM_CONFIGS[name])
    config.num_labels = 1
    torch.manual_seed(seed)
    return RewardModel(AutoModelForSequenceClassification.from_config(config).eval()).eval()


@pytest.mark.parametrize("kind", ["topk token", "topk dataset", "vanilla none"])
@pytest.mark.parametrize("site", ["residual", "mlp"])
def test_an_autoencoder_on_a_layer(kind, site):
    """Edits by a loop that re-runs the model on one text alone, with a hook of its own."""
    model, normalize = reward_model(), kind.split()[1]
    sae = (
        TopKSAE(D, M, K, normalize)
        if "topk" in kind
        else SparseAutoencoder(D, M, normalize=normalize)
    )
    sae.b_enc.data.normal_(0, 0.1)
    sae.mean.normal_(), sae.scale.fill_(1.7)
    both = WithSAE(model, sae, (1, site))
    edits = {3: ("set", 2.0), 7: ("*", 0.0)}
    plain, reading = both.read(BATCH, [7, 3]), both.read(BATCH, None, edits)
    assert plain.edited.equal(plain.scores) and plain.scores.equal(model(BATCH))
    block = model.model.gpt_neox.layers[1]
    module = block if site == "residual" else block.mlp
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        kept = {}

        def hook(module, args, output):
            x = kept["x"] = (output[0] if isinstance(output, tuple) else output).clone()
            if "z" in kept:
                s = {"token": x[0, -1].std() + 1e-6, "dataset": 1.7, "none": 1.0}[normalize]
                x[0, -1] += s * ((2.0 - kept["z"][3]) * sae.W_dec[3] - kept["z"][7] * sae.W_dec[7])
                return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = module.register_forward_hook(hook)
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            model.model(ids)
            kept["z"] = sae.encode(kept["x"][0, -1])
            same(reading.latents[row], kept["z"])
            same(plain.latents[row], kept["z"][[7, 3]])
            last = model.model.gpt_neox(ids).last_hidden_state[0, -1]
            same(reading.edited[row], model.model.score(last)[0])
        handle.remove()
    assert (reading.edited - reading.scores).abs().max() > 1e-3


def test_an_edit_that_changes_some_of_the_texts():
    """Only these run again, each with its own change: as if each were alone. The first text is not among them."""
    both = WithSAE(reward_model(), SparseAutoencoder(D, M, normalize="none"), (1, "residual"))
    both.sae.b_enc.data.normal_(0, 0.1)
    z = both.read(BATCH).latents  # [B, M]
    feature = int((z[1:].amin(0) - z[0]).argmax())  # larger in all other texts than in the first
    assert (z[1:, feature] > z[0, feature]).all()
    edits = {feature: ("max", z[0, feature].item() + 1e-6)}
    scores, _, edited = both.read(BATCH, [], edits)
    assert (edited != scores).tolist() == [False, *[True] * (B - 1)]
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        same(edited[row], both.read(pack([prompt], [response]), [], edits).edited[0], 1e-5)


def answers(batch=True):
    tokenizer = word_tokenizer()
    texts = [tokenizer.batch_decode(rows) for rows in (PROMPTS, RESPONSES)]
    return Answers(*texts, BATCH if batch else None)


def test_feature_rewards(tmp_path, public, sarm):
    path = public[0]
    reward = load_feature_reader(path, "", word_tokenizer(), ALONE, micro_batch_size=2)
    expected = sarm.read(BATCH, [2, 9], {2: ("+", 1.0)})
    got = reward.read(answers(), [2, 9], {2: ("+", 1.0)})
    for a, b in zip(got, expected):
        same(a, b, 1e-5)
    same(reward(answers()), expected.scores, 1e-5)
    same(load_reward(path, word_tokenizer(), ALONE)(answers()), expected.scores, 1e-5)
    assert (
        reward.m == M
        and reward.weights.equal(sarm.score.weight[0])
        and reward.read(answers()).latents.shape == (B, M)
    )
    assert check_feature_reader(path, "", [0, M - 1]) == M
    check_reward(path)

    model = reward_model("llama")
    save_reward_model(model, word_tokenizer(), str(tmp_path / "rm"))
    sae = TopKSAE(D, M, K, "dataset")
    save_sae(sae, str(tmp_path / "sae"), model="x", layer=2, site="residual")
    save_sae(sae, str(tmp_path / "run/policy/2_residual"), model="x", layer=2, site="residual")
    for folder in ("sae", "run"):  # the folder itself, or that of train_sae.py's run
        assert check_feature_reader(
            str(tmp_path / "rm"), str(tmp_path / folder)
        ) == M and not is_sarm(str(tmp_path / "rm"))
    assert (
        load_feature_reader(str(tmp_path / "rm"), str(tmp_path / "run"), word_tokenizer(), ALONE).m
        == M
    )
    reward = load_feature_reader(
        str(tmp_path / "rm"), str(tmp_path / "sae"), word_tokenizer(), ALONE
    )
    expected = WithSAE(load_reward_model(str(tmp_path / "rm")), sae, (2, "residual")).read(
        BATCH, [1], {1: ("set", 3.0)}
    )
    for a, b in zip(reward.read(answers(), [1], {1: ("set", 3.0)}), expected):
        same(a, b, 1e-5)
    assert reward.weights is None
    prints = [
        latents_fingerprint(path),
        latents_fingerprint(str(tmp_path / "rm"), str(tmp_path / "sae")),
    ]
    assert latents_fingerprint(str(tmp_path / "rm"), str(tmp_path / "run")) == prints[1]
    save_sae(
        TopKSAE(D, M, K, "dataset", seed=1),
        str(tmp_path / "sae"),
        model="x",
        layer=2,
        site="residual",
    )
    prints.append(latents_fingerprint(str(tmp_path / "rm"), str(tmp_path / "sae")))
    assert (
        prints[1]["reward_model"] == prints[2]["reward_model"]
        and len({p["sae"] for p in prints}) == 3
    )


# ------------------------------------------------------------------------------------------------------------------------- bad input


def broken(path, change):
    """The public checkpoint with its tensors or config changed: change(tensors, config)."""
    public_checkpoint(path)
    tensors, config = (
        load_file(os.path.join(path, "model.safetensors")),
        json.load(open(os.path.join(path, "config.json"))),
    )
    change(tensors, config)
    save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})
    json.dump(config, open(os.path.join(path, "config.json"), "w"))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t, c: t.pop("sae.latent_bias"), "sae.latent_bias is missing"),
        (lambda t, c: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda t, c: t.update({"sae.extra": torch.zeros(2)}), "sae.extra is not a tensor"),
        (lambda t, c: t.update({f"model.layers.{L}.mlp.up_proj.weight": torch.zeros(2, 2)}), "is not a tensor"),
        (lambda t, c: t.update({"score.weight": torch.zeros(1, M + 1)}), rf"score.weight is \[1, {M + 1}\].*\[1, {M}\]"),
        (lambda t, c: c["sarm_param"].update(sae_k=M + 1), "sae_k"),
        (lambda t, c: c["sarm_param"].update(sae_source_layer=N + 1), "sae_source_layer"),
        (lambda t, c: c["sarm_param"].pop("sae_latent_size"), "sae_latent_size"),
        (lambda t, c: c.update(sarm_param=[1]), "sarm_param"),
        (lambda t, c: c.pop("sarm_param"), "no SARM"),
    ],
)  # fmt: skip
def test_a_broken_checkpoint(tmp_path, change, match):
    broken(str(tmp_path), change)
    with pytest.raises(InputError, match=match) as e:
        SARM.from_pretrained(str(tmp_path))
    assert "\n" not in str(e.value)


def test_a_file_that_is_no_safetensors(tmp_path):
    public_checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        SARM.from_pretrained(str(tmp_path))
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no weights"):
        SARM.from_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="no such"):
        is_sarm(str(tmp_path / "nowhere"))


def test_bad_features_and_rewards(tmp_path, public, sarm):
    path = public[0]
    for features, edits in (([M], None), ([-1], None), (None, {M: ("set", 0.0)})):
        with pytest.raises(InputError, match=f"0 to {M - 1}"):
            sarm.read(BATCH, features, edits)
    save_reward_model(reward_model("llama"), word_tokenizer(), str(tmp_path / "rm"))
    save_sae(TopKSAE(D, M, K), str(tmp_path / "sae"), layer=N, site="residual")
    save_sae(TopKSAE(D, M, K), str(tmp_path / "nowhere"))
    save_sae(TopKSAE(D + 1, M, K), str(tmp_path / "wide"), layer=1, site="residual")
    full_lm("llama").save_pretrained(tmp_path / "lm")
    rm = str(tmp_path / "rm")
    for spec, sae, features, match in (
        (path, "", [3, M], f"feature {M}"), (path, str(tmp_path / "sae"), [], "is a SARM"), (rm, "", [], "no SARM: name an autoencoder"),
        (rm, str(tmp_path / "sae"), [], f"layer {N}"), (rm, str(tmp_path / "wide"), [], "width"),
        (rm, str(tmp_path / "nowhere"), [], "metadata"), (rm, str(tmp_path / "gone"), [], "no sparse autoencoder"),
        ("world:gold", "", [], "no features"), (str(tmp_path / "lm"), "x", [], "no reward model"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            check_feature_reader(spec, sae, features)


def test_a_trunk_that_cannot_be_cut():
    trunk = AutoModel.from_config(copy.deepcopy(SARM_CONFIGS["llama"]))
    trunk.register_forward_hook(
        lambda module, args, output: (
            setattr(output, "last_hidden_state", output.last_hidden_state * 2) or output
        )
    )
    config = copy.deepcopy(SARM_CONFIGS["llama"])
    config.sarm_param = SARM_PARAM
    with pytest.raises(InputError, match="more than a norm"):
        SARM(trunk, new_sae(config), config)


# ---------------------------------------------------------------------------------------------------------------- on two processes


def read_in_shards(specs, out):
    """What one of two processes under FSDP2 says of its half of the answers, by several reward models."""
    dist, texts = setup("cpu", "fsdp"), answers()
    mine = torch.tensor([0, 1, 2] if dist.main else [3, 4])
    own = Answers(
        [texts.prompts[i] for i in mine], [texts.responses[i] for i in mine], BATCH.rows(mine)
    )
    for i, (path, sae) in enumerate(specs):
        reward = load_feature_reader(path, sae, word_tokenizer(), dist)
        reading = reward.read(own, [2, 9], {2: ("+", 1.0)})
        assert is_sharded(reward.module) and score(reward, [own], dist).equal(reading.scores)
        save_file(
            {name: x.contiguous() for name, x in reading._asdict().items()},
            f"{out}/{i}_{dist.rank}.safetensors",
        )
    shutdown()


@pytest.mark.slow
def test_in_shards(tmp_path, public):
    rm, sae = str(tmp_path / "rm"), str(tmp_path / "sae")
    save_reward_model(reward_model("llama"), word_tokenizer(), rm)
    save_sae(TopKSAE(D, M, K, "dataset"), sae, layer=2, site="residual")
    specs = [(public[0], ""), (rm, sae)]
    join(*ranks(2, read_in_shards, specs, str(tmp_path)))
    for i, spec in enumerate(specs):
        parts = [load_file(str(tmp_path / f"{i}_{rank}.safetensors")) for rank in range(2)]
        expected = load_feature_reader(*spec, word_tokenizer(), ALONE).read(
            answers(), [2, 9], {2: ("+", 1.0)}
        )
        for name, x in expected._asdict().items():
            same(torch.cat([part[name] for part in parts]), x, 1e-5)
