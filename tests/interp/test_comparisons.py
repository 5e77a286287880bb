"""probe.py: its commands on tiny models, against what their files hold.

L blocks, N tokens, D hidden, M features of an autoencoder
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    ENV,
    REPO,
    encode_field,
    flags,
    probe_refused,
    read_rows,
    run_probe,
    summary,
    write_rows,
)
from transformers import AutoModelForCausalLM

import probe
from nanorlhf import world
from nanorlhf.hf.lora import adapters, add_lora
from nanorlhf.interp import reward_probes
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.models import Policy, load_policy, load_tokenizer, save_policy
from nanorlhf.runtime import plots
from nanorlhf.sae import SparseAutoencoder

L = 3


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """base/, policy/ (block 1 is as it was), adapter/ (LoRA on base), other/ (another shape),
    texts.jsonl."""
    root = tmp_path_factory.mktemp("probe")
    tokenizer = world.tokenizer()
    torch.manual_seed(0)
    config = world.model_config()
    config.num_hidden_layers = L
    lm = AutoModelForCausalLM.from_config(config)
    save_policy(Policy(lm, value_head=False), tokenizer, str(root / "base"))
    for i in (0, 2):
        for p in lm.gpt_neox.layers[i].parameters():
            p.data += 0.02 * (i + 1) * torch.randn_like(p)
    save_policy(Policy(lm, value_head=False), tokenizer, str(root / "policy"))

    config.num_hidden_layers = 2
    other = AutoModelForCausalLM.from_config(config)
    save_policy(Policy(other, value_head=False), tokenizer, str(root / "other"))

    adapted = load_policy(str(root / "base"), value_head=False)
    add_lora(adapted.lm, ["dense_h_to_4h"])
    for layer in adapters(adapted.lm).values():
        layer.lora_B.data.normal_(0, 0.1)
    save_policy(adapted, tokenizer, str(root / "adapter"))

    rows = []
    for topic in world.TOPICS:
        rows.append({"prompt": f"review the {topic} :", "response": "it was a nice day ."})
    write_rows(root / "texts.jsonl", rows)
    return root


def divergence_command(material, out, **changes):
    """The words of `probe.py divergence` from base/ to policy/, with some flags changed."""
    settings = {
        "model": material / "base",
        "policy": material / "policy",
        "dataset": material / "texts.jsonl",
        "output_dir": out,
    }
    return ["divergence", *flags(settings | changes)]


# ------------------------------------------------------------------------------------ divergence


def read_block(folder, layer):
    """The parameters of one block, from the file: {name within the block: tensor}."""
    parameters = {}
    for name, tensor in load_file(str(folder / "model.safetensors")).items():
        _, is_inside, own_name = name.partition(f".layers.{layer}.")
        if is_inside:
            parameters[own_name] = tensor.double()
    return parameters


def check_block(row, material):
    """A block's distances |p - q|, and relative to |p|, from the files of both models."""
    base = read_block(material / "base", row["layer"])
    policy = read_block(material / "policy", row["layer"])
    assert row["parameters"].keys() == base.keys()
    total = 0.0
    for name, found in row["parameters"].items():
        distance = (base[name] - policy[name]).norm().item()
        norm = base[name].norm().item()
        total += distance
        assert found["frobenius"] == pytest.approx(distance, rel=1e-6)
        assert found["base"] == pytest.approx(norm, rel=1e-6)
        if norm > 0:
            assert found["relative"] == pytest.approx(distance / norm, rel=1e-6)
        elif distance > 0:
            # Infinitely far: JSON has no number for it.
            assert found["relative"] is None
        else:
            assert found["relative"] == 0
    assert row["frobenius"] == pytest.approx(total, rel=1e-6)


@torch.no_grad()
def block_outputs(folder, texts, layer):
    """What a block puts out, one text after another, from Hugging Face's hidden states: [N, D]."""
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    outputs = []
    for text in texts:
        states = lm(torch.tensor([text]), output_hidden_states=True).hidden_states
        outputs.append(states[layer + 1][0])
    return torch.cat(outputs).double()


def read_texts(material):
    """The token lists of texts.jsonl, prompt and response."""
    tokenizer = load_tokenizer(str(material / "base"))
    rows = read_rows(material / "texts.jsonl")
    prompts, responses = encode_field(tokenizer, rows, "response")
    return [prompt + response for prompt, response in zip(prompts, responses)]


def check_residual_stream(found, material, layer):
    """How far a block's output has moved: 1 - cosine, and squared distance / variance."""
    texts = read_texts(material)
    x = block_outputs(material / "base", texts, layer)
    y = block_outputs(material / "policy", texts, layer)
    assert found["tokens"] == len(x)
    moved = found["layers"][layer]["activations"]["residual"]

    total = 0.0
    for a, b in zip(x, y):
        total += 1 - (a @ b / a.norm() / b.norm()).item()
    assert moved["cosine"] == pytest.approx(total / len(x), rel=1e-4)
    squared = ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert moved["squared"] == pytest.approx(squared.item(), rel=1e-4)


@pytest.fixture(scope="module")
def divergence(material, tmp_path_factory):
    """The folder of a run that selects the block that moved most."""
    out = tmp_path_factory.mktemp("divergence") / "out"
    run_probe(*divergence_command(material, out, layers="highest:1"))
    return out


def test_parameters_have_moved_by_what_the_files_say(material, divergence):
    layers = summary(divergence)["layers"]
    assert [row["layer"] for row in layers] == [0, 1, 2]
    for row in layers:
        check_block(row, material)
    # Block 1 was left alone; block 0 has biases that were 0 and have moved.
    assert layers[1]["frobenius"] == 0
    assert layers[1]["relative"] == 0
    assert layers[0]["relative"] is None


@pytest.mark.parametrize("layer", [0, 1])
def test_activations_have_moved_by_what_hidden_states_say(material, divergence, layer):
    check_residual_stream(summary(divergence), material, layer)


def test_a_block_that_was_left_alone_puts_out_something_else(divergence):
    """Its weights are the same, its input is not."""
    block = summary(divergence)["layers"][1]
    assert block["activations"]["mlp"]["cosine"] > 0


def test_the_selected_blocks_are_those_that_moved_most(material, tmp_path, capfd, pictures):
    out = tmp_path / "out"
    run_probe(*divergence_command(material, out, layers="highest:1"))
    assert summary(out)["selected"] == [2]
    assert read_config(out)["layers"] == "highest:1"

    printed = capfd.readouterr().out
    assert "*    2" in printed
    assert "selected (*): 2" in printed
    assert str(out) in printed
    pytest.importorskip("matplotlib")
    assert (out / "picture.png").stat().st_size > 1000


def test_other_layers_are_no_other_run(material, tmp_path):
    out = tmp_path / "out"
    run_probe(*divergence_command(material, out, sites=["residual"]))
    first = summary(out)
    run_probe(*divergence_command(material, out, sites=["residual"], layers="lowest:2"))
    second = summary(out)
    assert second["selected"] == [0, 1]
    assert second["layers"][2]["activations"] == first["layers"][2]["activations"]


def test_without_matplotlib_there_is_no_picture(material, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(plots, "save", lambda draw, what, path: None)
    out = tmp_path / "out"
    run_probe(*divergence_command(material, out, sites=["residual"]))
    assert sorted(os.listdir(out)) == ["config.json", "summary.json"]
    assert "picture" not in capfd.readouterr().out


def test_another_policy_is_no_other_run_and_all_is_new(material, tmp_path):
    out = tmp_path / "out"
    run_probe(*divergence_command(material, out, sites=["residual"]))
    before = summary(out)["layers"]
    adapter = material / "adapter"
    run_probe(*divergence_command(material, out, sites=["residual"], policy=adapter))
    assert summary(out)["layers"] != before


def test_the_folder_of_another_run_is_refused(material, tmp_path, capfd):
    (tmp_path / "config.json").write_text('{"steps": 60, "kl_coef": 0.05}')
    error = probe_refused(capfd, *divergence_command(material, tmp_path, sites=["residual"]))
    assert "another run" in error


def default_settings(config_class):
    """{flag: default} of the flags that have one."""
    settings = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            settings[field.name] = field.default
    return settings


def test_config_says_whose_results_they_are(material, tmp_path):
    """All flags of `pairs` are flags of `reward` too: the flags alone do not say it."""
    pairs = default_settings(reward_probes.PairsConfig)
    reward = {field.name for field in dataclasses.fields(reward_probes.RewardConfig)}
    assert pairs.keys() <= reward

    run_probe(*divergence_command(material, tmp_path / "out", sites=["residual"]))
    assert read_config(tmp_path / "out")["command"] == "Divergence"


@pytest.mark.parametrize("whose", ["pairs", "nobody"])
def test_another_command_s_results_are_not_written_over(material, tmp_path, capfd, whose):
    settings = {}
    if whose == "pairs":
        settings = default_settings(reward_probes.PairsConfig) | {"command": "Pairs"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "summary.json").write_text("precious")

    settings = {"policy": material / "policy", "output_dir": tmp_path}
    error = probe_refused(capfd, "reward", *flags(settings))
    assert "holds no results of this command" in error
    assert str(tmp_path) in error
    assert (tmp_path / "summary.json").read_text() == "precious"


def test_adapters_are_merged_first(material, tmp_path):
    out = tmp_path / "out"
    run_probe(*divergence_command(material, out, policy=material / "adapter"))

    tensors = load_file(str(material / "adapter" / "adapter_model.safetensors"))
    for row in summary(out)["layers"]:
        # What an adapter adds to its layer is alpha / r B A, by default with alpha = 16 and r = 8.
        name = f"base_model.model.gpt_neox.layers.{row['layer']}.mlp.dense_h_to_4h"
        A = tensors[f"{name}.lora_A.weight"].double()
        B = tensors[f"{name}.lora_B.weight"].double()
        expected = (16 / 8 * B @ A).norm().item()
        assert row["frobenius"] == pytest.approx(expected, rel=1e-4)
        own = row["parameters"]["mlp.dense_h_to_4h.weight"]
        assert own["frobenius"] == pytest.approx(expected, rel=1e-4)


def test_rows_may_be_prompts_alone_and_are_cut(material, tmp_path):
    rows = [{"text": f"the {topic} was good ."} for topic in list(world.TOPICS)[:5]]
    changes = {
        "dataset": write_rows(tmp_path / "plain.jsonl", rows),
        "kind": "prompts",
        "columns": "prompt=text",
        "max_length": 3,
    }
    run_probe(*divergence_command(material, tmp_path / "out", **changes))
    found = summary(tmp_path / "out")
    assert found["texts"] == 5
    assert found["tokens"] == 5 * 3


# Of the eleven tokens of the texts three are 'the'.
@pytest.mark.parametrize("keep_bos, n_tokens", [("false", 8), ("true", 11)])
def test_a_bos_counts_by_option(material, tmp_path, keep_bos, n_tokens):
    """A token that is BOS in the tokenizers of copies of both models is left out wherever it
    stands."""
    for name in ("base", "policy"):
        tokenizer = load_tokenizer(str(material / name))
        tokenizer.bos_token = "the"
        policy = load_policy(str(material / name), value_head=False)
        save_policy(policy, tokenizer, str(tmp_path / name))
    rows = [{"prompt": "the room was the best ."}, {"prompt": "it was the worst ."}]
    changes = {
        "dataset": write_rows(tmp_path / "plain.jsonl", rows),
        "kind": "prompts",
        "keep_bos": keep_bos,
        "sites": "mlp",
    }
    run_probe(*divergence_command(tmp_path, tmp_path / "out", **changes))
    assert summary(tmp_path / "out")["tokens"] == n_tokens


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layers": "9"}, "layers '9': the model has the layers 0 to 2"),
        ({"layers": "top"}, "highest:K"),
        ({"sites": ["head"]}, "--sites must be one of mlp, attention, residual"),
        ({"kind": "texts"}, "--kind must be one of"),
    ],
)
def test_wrong_flags_are_one_line(material, tmp_path, capfd, changes, words):
    out = tmp_path / "out"
    assert words in probe_refused(capfd, *divergence_command(material, out, **changes))
    assert not out.exists()


@pytest.mark.parametrize(
    "flag, path, words",
    [
        ("policy", "other", "have 3 and 2 blocks"),
        ("policy", "nothing", "no such model folder"),
        ("dataset", "none.jsonl", "no such file"),
    ],
)
def test_wrong_folders_are_one_line(material, tmp_path, capfd, flag, path, words):
    out = tmp_path / "out"
    changes = {flag: material / path}
    assert words in probe_refused(capfd, *divergence_command(material, out, **changes))
    assert not out.exists()


def test_models_of_different_tokenizers_are_not_compared(material, tmp_path, capfd):
    tokenizer = world.tokenizer()
    tokenizer.add_tokens(["zebra"])
    policy = load_policy(str(material / "policy"), value_head=False)
    policy.lm.resize_token_embeddings(len(tokenizer))
    save_policy(policy, tokenizer, str(tmp_path / "zebra"))

    out = tmp_path / "out"
    command = divergence_command(material, out, policy=tmp_path / "zebra")
    assert "have different tokenizers" in probe_refused(capfd, *command)
    assert not out.exists()


# ------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_commands_are_listed_with_what_they_do(capfd, words):
    run_probe(*words)
    printed = capfd.readouterr().out
    for name, (_, function) in probe.COMMANDS.items():
        first_line = function.__doc__.splitlines()[0]
        assert f"  {name:17s}{first_line}" in printed


def test_a_command_has_help_of_its_own(capfd):
    with pytest.raises(SystemExit) as exit_:
        run_probe("divergence", "--help")
    assert exit_.value.code == 0
    printed = capfd.readouterr().out
    assert "--policy" in printed
    assert "How far a policy has moved" in printed
    assert "divergence [flags]" in printed


def test_an_unknown_command_or_flag_is_one_line(capfd):
    commands = ", ".join(probe.COMMANDS)
    error = probe_refused(capfd, "nothing")
    assert f"no command 'nothing'; there are {commands}" in error
    error = probe_refused(capfd, "divergence", "--nothing", "1")
    assert "unrecognized arguments: --nothing" in error


def start_probe(folder, *words):
    """probe.py as a user starts it in a folder, in a process of its own."""
    script = str(REPO / "probe.py")
    command = [sys.executable, script, *words]
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)


@pytest.mark.slow
def test_as_a_script(tmp_path):
    listed = start_probe(tmp_path)
    assert listed.returncode == 0
    assert "\n  divergence       How far" in listed.stdout
    assert not listed.stderr

    wrong = start_probe(tmp_path, "divergence", "--model", "nowhere/to/be/found")
    assert wrong.returncode == 2
    assert wrong.stderr == "probe.py: error: nowhere/to/be/found: no such model folder\n"
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------ mmcs


# Autoencoders: (dimensions, features). The thin one reads another model.
SHAPES = {"seed_0": (8, 12), "seed_1": (8, 20), "seed_2": (8, 12), "thin": (6, 12)}


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """A folder of random autoencoders, one for each of SHAPES."""
    root = tmp_path_factory.mktemp("sae")
    for i, (name, (d, m)) in enumerate(SHAPES.items()):
        torch.manual_seed(m + d + i)
        sae = SparseAutoencoder(d, m)
        for p in sae.parameters():
            p.data.normal_()
        save_sae(sae, str(root / name))
    return root


def read_directions(root, name):
    """The decoder's rows, of whatever length: M lists of D numbers."""
    return load_file(str(root / name / "sae_weights.safetensors"))["W_dec"].tolist()


def dot(x, y):
    return sum(p * q for p, q in zip(x, y))


def cosine_table(root, a, b):
    """The cosines of all pairs of features of two autoencoders, by loops: Ma lists of Mb."""
    table = []
    for p in read_directions(root, a):
        line = []
        for q in read_directions(root, b):
            line.append(dot(p, q) / math.sqrt(dot(p, p) * dot(q, q)))
        table.append(line)
    return table


def mean_of_largest(table):
    """MMCS by hand: the mean over A's features of the largest cosine with one of B's."""
    return sum(max(line) for line in table) / len(table)


def mmcs_command(out, **settings):
    return ["mmcs", *flags(settings | {"output_dir": out})]


@pytest.mark.parametrize("name", ["seed_0", "seed_1"])
def test_mmcs_is_the_mean_of_the_largest_cosines(autoencoders, tmp_path, capfd, name):
    a = autoencoders / name
    b = autoencoders / "seed_2"
    run_probe(*mmcs_command(tmp_path / "out", a=a, b=b, top=3))
    (row,) = summary(tmp_path / "out")["pairs"]

    table = cosine_table(autoencoders, name, "seed_2")
    best = [max(line) for line in table]
    assert row["mmcs"] == pytest.approx(mean_of_largest(table), abs=1e-5)
    assert f"{row['mmcs']:.3f}" in capfd.readouterr().out
    assert row["features_a"] == len(best)
    assert row["features_b"] == 12
    assert 0 < row["chance"] < 1
    n_above = len([cosine for cosine in best if cosine > 0.9])
    assert row["above_0.9"] == n_above / len(best)
    counts = [0] * 20  # of the cosines from 0 to 0.05, to 0.1, ..., to 1
    for cosine in best:
        counts[int(20 * cosine)] += 1
    assert min(best) > 0
    assert row["histogram"] == counts

    # The three closest pairs of features, the closest first.
    by_cosine = sorted(range(len(best)), key=lambda i: best[i], reverse=True)
    for i, (feature_a, feature_b, _) in zip(by_cosine[:3], row["best"], strict=True):
        assert feature_a == i
        assert feature_b == table[i].index(best[i])


def pair_of(row):
    """The names of the two autoencoders of a row."""
    return Path(row["a"]).name, Path(row["b"]).name


def test_each_of_a_is_compared_with_each_of_b(autoencoders, tmp_path):
    a = [autoencoders / "seed_0", autoencoders / "seed_1"]
    run_probe(*mmcs_command(tmp_path / "out", a=a, b=autoencoders / "seed_2"))
    pairs = [pair_of(row) for row in summary(tmp_path / "out")["pairs"]]
    assert pairs == [("seed_0", "seed_2"), ("seed_1", "seed_2")]


def test_seeds_are_paired_with_one_another(autoencoders, tmp_path):
    command = mmcs_command(tmp_path / "out", a=autoencoders / "seed_{seed}")
    run_probe(*command, "--one_to_one")
    rows = summary(tmp_path / "out")["pairs"]
    assert len(rows) == 6
    mmcs = {pair_of(row): row["mmcs"] for row in rows}
    for a, b in mmcs:
        # A pairing, unlike the largest cosine, is the same from both sides.
        assert mmcs[a, b] == pytest.approx(mmcs[b, a], abs=1e-6)
        # Each of the fewer features has a partner, at best the one that is closest.
        table = cosine_table(autoencoders, a, b)
        if len(table) <= len(table[0]):
            assert mmcs[a, b] <= mean_of_largest(table) + 1e-6


@pytest.fixture
def two_seeds(autoencoders, tmp_path):
    """Copies of seed_0 and seed_2; features 3 and 7 of seed_0 never fire, by its sparsity.

    The file holds log10(rate + 1e-10), as SAELens writes it.
    """
    for name in ("seed_0", "seed_2"):
        shutil.copytree(autoencoders / name, tmp_path / name)
    rates = torch.full((12,), 0.01)
    rates[[3, 7]] = 0
    rates[5] = 1e-8  # seldom, but it fires
    write_sparsity(tmp_path, sparsity=(rates + 1e-10).log10())
    return tmp_path


def write_sparsity(folder, **tensors):
    save_file(tensors, str(folder / "seed_0" / "sparsity.safetensors"))


def test_features_that_never_fire_are_left_out(two_seeds):
    a = two_seeds / "seed_0"
    b = two_seeds / "seed_2"
    run_probe(*mmcs_command(two_seeds / "out", a=a, b=b, top=12))
    (row,) = summary(two_seeds / "out")["pairs"]

    table = cosine_table(two_seeds, "seed_0", "seed_2")
    alive = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert row["features_a"] == 10
    assert row["mmcs"] == pytest.approx(mean_of_largest([table[i] for i in alive]), abs=1e-5)
    assert sorted(feature for feature, _, _ in row["best"]) == alive
    for feature_a, feature_b, cosine in row["best"]:
        assert cosine == pytest.approx(table[feature_a][feature_b], abs=1e-5)


@pytest.mark.parametrize(
    "name, words",
    [("sparsity", "sparsity is [3], not [12]"), ("x", "sparsity is missing")],
)
def test_a_sparsity_that_does_not_fit_is_refused(two_seeds, capfd, name, words):
    write_sparsity(two_seeds, **{name: torch.zeros(3)})
    a = two_seeds / "seed_0"
    b = two_seeds / "seed_2"
    assert words in probe_refused(capfd, *mmcs_command(two_seeds / "out", a=a, b=b))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"a": "nowhere", "b": "thin"}, "nowhere: no sparse autoencoder here"),
        ({"a": "thin"}, "name others to compare it with, as --b"),
        ({"a": "thin", "b": "thin"}, "name others to compare it with, as --b"),
        ({"a": "thin", "b": "seed_0"}, "features must be"),
        ({}, "required: --a"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    autoencoders, tmp_path, monkeypatch, capfd, settings, words
):
    monkeypatch.chdir(autoencoders)
    assert words in probe_refused(capfd, *mmcs_command(tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()
