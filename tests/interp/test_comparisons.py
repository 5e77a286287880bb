"""probe.py: its commands on tiny models, against what their files hold.

L blocks, N tokens, D hidden
"""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ENV, REPO, probe_refused, run_probe
from transformers import AutoModelForCausalLM

import probe
from nanorlhf import world
from nanorlhf.data import encode
from nanorlhf.hf.lora import adapters, add_lora
from nanorlhf.interp import reward_probes
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.models import Policy, load_policy, load_tokenizer, save_policy
from nanorlhf.runtime import plots
from nanorlhf.sae import SparseAutoencoder

L = 3


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """base/, policy/ (block 1 is as it was), adapter/ (LoRA on base), other/ (another shape), texts.jsonl."""
    root = tmp_path_factory.mktemp("probe")
    torch.manual_seed(0)
    config = world.model_config()
    config.num_hidden_layers = L
    lm = AutoModelForCausalLM.from_config(config)
    tokenizer = world.tokenizer()
    save_policy(Policy(lm, value_head=False), tokenizer, str(root / "base"))
    for i in (0, 2):
        for p in lm.gpt_neox.layers[i].parameters():
            p.data += 0.02 * (i + 1) * torch.randn_like(p)
    save_policy(Policy(lm, value_head=False), tokenizer, str(root / "policy"))
    config.num_hidden_layers = 2
    save_policy(
        Policy(AutoModelForCausalLM.from_config(config), value_head=False),
        tokenizer,
        str(root / "other"),
    )
    adapted = load_policy(str(root / "base"), value_head=False)
    add_lora(adapted.lm, ["dense_h_to_4h"])
    for layer in adapters(adapted.lm).values():
        layer.lora_B.data.normal_(0, 0.1)
    save_policy(adapted, tokenizer, str(root / "adapter"))
    rows = [
        {"prompt": f"review the {topic} :", "response": "it was a nice day ."}
        for topic in world.TOPICS
    ]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(material, out, **changes):
    flags = {
        "model": material / "base",
        "policy": material / "policy",
        "dataset": material / "texts.jsonl",
        "output_dir": out,
    } | changes
    lists = {name: value if isinstance(value, list) else [value] for name, value in flags.items()}
    return [
        "divergence",
        *(str(x) for name, values in lists.items() for x in (f"--{name}", *values)),
    ]


def distances(base, policy, layer):
    """{parameter: (||p - q||, ||p||)} of a block, from the files."""
    a, b = (load_file(str(path / "model.safetensors")) for path in (base, policy))
    names = [name for name in a if f".layers.{layer}." in name]
    return {name.split(f".layers.{layer}.")[1]: ((a[name] - b[name]).double().norm().item(), a[name].double().norm().item())
            for name in names}  # fmt: skip


@torch.no_grad()
def moved(material, layer):
    """1 - cosine and squared distance / variance of the block's output, one text after another, from Hugging Face's hidden states."""
    tokenizer, lms = load_tokenizer(str(material / "base")), []
    rows = [json.loads(line) for line in (material / "texts.jsonl").read_text().splitlines()]
    texts = [p + r for p, r in zip(*encode(tokenizer, rows, "response")[:2])]
    for name in ("base", "policy"):
        lm = AutoModelForCausalLM.from_pretrained(material / name).eval()
        lms.append(
            torch.cat(
                [
                    lm(torch.tensor([t]), output_hidden_states=True).hidden_states[layer + 1][0]
                    for t in texts
                ]
            ).double()
        )
    x, y = lms
    cosine = sum(1 - (a @ b / a.norm() / b.norm()).item() for a, b in zip(x, y)) / len(x)
    return cosine, ((x - y) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item(), len(x)


def test_divergence(material, tmp_path, capfd, pictures):
    run_probe(*arguments(material, tmp_path / "out", layers="highest:1"))
    shown = capfd.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["layer"] for row in summary["layers"]] == [0, 1, 2] and summary["selected"] == [2]
    for row in summary["layers"]:
        files = distances(material / "base", material / "policy", row["layer"])
        assert row["parameters"].keys() == files.keys()
        for name, (distance, norm) in files.items():
            p = row["parameters"][name]
            assert (p["frobenius"], p["base"]) == pytest.approx((distance, norm), rel=1e-6)
            ratio = distance / norm if norm else math.inf if distance else 0
            assert (
                p["relative"] is None
                if math.isinf(ratio)
                else p["relative"] == pytest.approx(ratio, rel=1e-6)
            )
        assert row["frobenius"] == pytest.approx(
            sum(distance for distance, _ in files.values()), rel=1e-6
        )
    assert (
        summary["layers"][1]["frobenius"] == 0 == summary["layers"][1]["relative"]
        and summary["layers"][0]["relative"] is None
    )
    for layer in (0, 1):
        cosine, squared, n = moved(material, layer)
        got = summary["layers"][layer]["activations"]["residual"]
        assert (got["cosine"], got["squared"]) == pytest.approx(
            (cosine, squared), rel=1e-4
        ) and summary["tokens"] == n
    assert (
        summary["layers"][1]["activations"]["mlp"]["cosine"] > 0
    )  # its weights are the same, its input is not
    assert "*    2" in shown and "selected (*): 2" in shown and str(tmp_path / "out") in shown
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layers"] == "highest:1"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    assert (tmp_path / "out" / "picture.png").stat().st_size > 1000


def test_without_matplotlib_and_again(material, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(plots, "save", lambda draw, what, path: None)
    run_probe(*arguments(material, tmp_path / "out", sites=["residual"]))
    first = (tmp_path / "out" / "summary.json").read_text()
    run_probe(
        *arguments(material, tmp_path / "out", sites=["residual"], layers="lowest:2")
    )  # other layers are no other run
    second = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (
        second["selected"] == [0, 1]
        and second["layers"][2]["activations"] == json.loads(first)["layers"][2]["activations"]
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "summary.json"]
    assert "picture" not in capfd.readouterr().out
    run_probe(
        *arguments(material, tmp_path / "out", sites=["residual"], policy=material / "adapter")
    )  # nor is another policy: it is all new
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["layers"] != second["layers"]
    (tmp_path / "out" / "config.json").write_text(
        '{"steps": 60, "kl_coef": 0.05}'
    )  # but this is something else's folder
    assert "another run" in probe_refused(
        capfd, *arguments(material, tmp_path / "out", sites=["residual"])
    )


def test_another_command_s_results_are_not_written_over(material, tmp_path, capfd):
    """All flags of `pairs` are flags of `reward` too, so config.json says whose results they are; `{}` is nobody's."""
    pairs = {
        f.name: f.default
        for f in dataclasses.fields(reward_probes.PairsConfig)
        if f.default is not dataclasses.MISSING
    }
    assert pairs.keys() <= {f.name for f in dataclasses.fields(reward_probes.RewardConfig)}
    run_probe(*arguments(material, tmp_path / "divergence", sites=["residual"]))
    assert (
        json.loads((tmp_path / "divergence" / "config.json").read_text())["command"] == "Divergence"
    )
    for name, settings in (("pairs", pairs | {"command": "Pairs"}), ("nobody", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        (tmp_path / name / "summary.json").write_text("precious")
        error = probe_refused(
            capfd, "reward", "--policy", material / "policy", "--output_dir", tmp_path / name
        )
        assert "holds no results of this command" in error and str(tmp_path / name) in error
        assert (tmp_path / name / "summary.json").read_text() == "precious"


def test_adapters_are_merged_first(material, tmp_path):
    run_probe(*arguments(material, tmp_path / "out", policy=material / "adapter"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    lora = load_file(str(material / "adapter" / "adapter_model.safetensors"))
    for row in summary["layers"]:
        A, B = (
            next(
                x
                for name, x in lora.items()
                if f".layers.{row['layer']}." in name and f"lora_{ab}" in name
            )
            for ab in "AB"
        )
        expected = (16 / 8 * B.double() @ A.double()).norm().item()
        assert row["frobenius"] == pytest.approx(expected, rel=1e-4)
        assert row["parameters"]["mlp.dense_h_to_4h.weight"]["frobenius"] == pytest.approx(
            expected, rel=1e-4
        )


def test_tokens_of_other_kinds_of_rows(material, tmp_path):
    rows = [{"text": f"the {topic} was good ."} for topic in list(world.TOPICS)[:5]]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_probe(
        *arguments(
            material,
            tmp_path / "out",
            dataset=tmp_path / "plain.jsonl",
            kind="prompts",
            columns="prompt=text",
            max_length=3,
        )
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["texts"], summary["tokens"]) == (5, 15)


def test_a_bos_counts_by_option(material, tmp_path):
    """A token that is BOS in the tokenizers of copies of both models is left out wherever it stands."""
    for name in ("base", "policy"):
        tokenizer = load_tokenizer(str(material / name))
        tokenizer.bos_token = "the"
        save_policy(
            load_policy(str(material / name), value_head=False), tokenizer, str(tmp_path / name)
        )
    (tmp_path / "plain.jsonl").write_text(
        '{"prompt": "the room was the best ."}\n{"prompt": "it was the worst ."}\n'
    )
    counts = []
    for keep in ("false", "true"):
        run_probe(
            *arguments(
                tmp_path,
                tmp_path / keep,
                dataset=tmp_path / "plain.jsonl",
                kind="prompts",
                keep_bos=keep,
                sites="mlp",
            )
        )
        counts.append(json.loads((tmp_path / keep / "summary.json").read_text())["tokens"])
    assert counts == [8, 11]


def test_bad_input(material, tmp_path, capfd):
    def error(**changes):
        return probe_refused(capfd, *arguments(material, tmp_path / "out", **changes))

    assert "have 3 and 2 blocks" in error(policy=material / "other")
    assert "layers '9': the model has the layers 0 to 2" in error(layers="9")
    assert "highest:K" in error(layers="top")
    assert "no such model folder" in error(policy=material / "nothing")
    assert "no such file" in error(dataset=tmp_path / "none.jsonl")
    assert "--sites must be one of mlp, attention, residual" in error(sites=["head"])
    assert "--kind must be one of" in error(kind="texts")
    words = world.tokenizer()
    words.add_tokens(["zebra"])
    folder = tmp_path / "zebra"
    policy = load_policy(str(material / "policy"), value_head=False)
    policy.lm.resize_token_embeddings(len(words))
    save_policy(policy, words, str(folder))
    assert "have different tokenizers" in error(policy=folder)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------ the command line


def test_commands_are_listed(capfd):
    for args in ([], ["--help"], ["-h"]):
        run_probe(*args)
        shown = capfd.readouterr().out
        for name, (_, function) in probe.COMMANDS.items():
            assert f"  {name:17s}{function.__doc__.splitlines()[0]}" in shown
    with pytest.raises(SystemExit) as exit_:
        run_probe("divergence", "--help")
    shown = capfd.readouterr().out
    assert (
        exit_.value.code == 0
        and "--policy" in shown
        and "How far a policy has moved" in shown
        and "divergence [flags]" in shown
    )
    assert f"no command 'nothing'; there are {', '.join(probe.COMMANDS)}" in probe_refused(
        capfd, "nothing"
    )
    assert "unrecognized arguments: --nothing" in probe_refused(
        capfd, "divergence", "--nothing", "1"
    )


@pytest.mark.slow
def test_as_a_script(tmp_path):
    def script(*args):
        return subprocess.run(
            [sys.executable, str(REPO / "probe.py"), *args],
            cwd=tmp_path,
            env=ENV,
            capture_output=True,
            text=True,
        )

    listed = script()
    assert (
        listed.returncode == 0
        and "\n  divergence     How far" in listed.stdout
        and not listed.stderr
    )
    wrong = script("divergence", "--model", "nowhere/to/be/found")
    assert (
        wrong.returncode == 2
        and wrong.stderr == "probe.py: error: nowhere/to/be/found: no such model folder\n"
    )
    assert list(Path(tmp_path).iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------------- mmcs


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """seed_0/, seed_1/ and seed_2/, of 12, 20 and 12 features of 8 dimensions, and thin/ of another model's 6. -> folder, {name: [M, D]}"""
    root, directions = tmp_path_factory.mktemp("sae"), {}
    for name, d, m in (("seed_0", 8, 12), ("seed_1", 8, 20), ("seed_2", 8, 12), ("thin", 6, 12)):
        torch.manual_seed(m + d + len(directions))
        sae = SparseAutoencoder(d, m)
        for p in sae.parameters():
            p.data.normal_()
        save_sae(sae, str(root / name))
        directions[name] = sae.decoder_directions().detach().tolist()
    return root, directions


def cosines(a, b):
    def cosine(p, q):
        return sum(x * y for x, y in zip(p, q)) / math.sqrt(
            sum(x * x for x in p) * sum(y * y for y in q)
        )

    return [[cosine(p, q) for q in b] for p in a]


def test_mmcs(autoencoders, tmp_path, capfd):
    root, directions = autoencoders
    run_probe(
        "mmcs",
        "--a",
        root / "seed_0",
        root / "seed_1",
        "--b",
        root / "seed_2",
        "--output_dir",
        tmp_path / "out",
        "--top",
        3,
    )
    shown = capfd.readouterr().out
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["pairs"]
    assert [(Path(row["a"]).name, Path(row["b"]).name) for row in rows] == [
        ("seed_0", "seed_2"),
        ("seed_1", "seed_2"),
    ]
    for row in rows:
        table = cosines(directions[Path(row["a"]).name], directions["seed_2"])
        best = [max(line) for line in table]
        assert (
            row["mmcs"] == pytest.approx(sum(best) / len(best), abs=1e-5)
            and f"{row['mmcs']:.3f}" in shown
        )
        assert (row["features_a"], row["features_b"]) == (len(best), 12) and 0 < row["chance"] < 1
        assert row["above_0.9"] == sum(x > 0.9 for x in best) / len(best)
        top = sorted(range(len(best)), key=lambda i: -best[i])[:3]
        assert [x[:2] for x in row["best"]] == [[i, table[i].index(best[i])] for i in top]


def test_mmcs_of_seeds_with_one_another(autoencoders, tmp_path):
    root, directions = autoencoders
    run_probe("mmcs", "--a", root / "seed_{seed}", "--one_to_one", "--output_dir", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["pairs"]
    assert len(rows) == 6
    both = {(Path(row["a"]).name, Path(row["b"]).name): row["mmcs"] for row in rows}
    for a, b in both:  # a pairing, unlike the largest cosine, is the same from both sides
        assert both[a, b] == pytest.approx(both[b, a], abs=1e-6)
        if len(directions[a]) <= len(
            directions[b]
        ):  # each of A's has a partner, at best the one that is closest
            assert (
                both[a, b]
                <= sum(map(max, cosines(directions[a], directions[b]))) / len(directions[a]) + 1e-6
            )


def test_features_that_never_fire_are_left_out(autoencoders, tmp_path, capfd):
    root, directions = autoencoders
    alive = [i for i in range(12) if i not in (3, 7)]
    for name in ("seed_0", "seed_2"):
        shutil.copytree(root / name, tmp_path / name)
    rates = torch.full((12,), 0.01)
    rates[[3, 7]] = 0
    save_file(
        {"sparsity": (rates + 1e-10).log10()}, str(tmp_path / "seed_0" / "sparsity.safetensors")
    )
    run_probe(
        "mmcs",
        "--a",
        tmp_path / "seed_0",
        "--b",
        tmp_path / "seed_2",
        "--output_dir",
        tmp_path / "out",
        "--top",
        12,
    )
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["pairs"]
    table = cosines(directions["seed_0"], directions["seed_2"])
    assert (
        row["mmcs"] == pytest.approx(sum(max(table[i]) for i in alive) / 10, abs=1e-5)
        and row["features_a"] == 10
    )
    assert sorted(i for i, _, _ in row["best"]) == alive and all(
        table[i][j] == pytest.approx(x, abs=1e-5) for i, j, x in row["best"]
    )
    for tensors, words in (
        ({"sparsity": torch.zeros(3)}, "sparsity is [3], not [12]"),
        ({"x": torch.zeros(3)}, "sparsity is missing"),
    ):
        save_file(tensors, str(tmp_path / "seed_0" / "sparsity.safetensors"))
        assert words in probe_refused(
            capfd,
            "mmcs",
            "--a",
            tmp_path / "seed_0",
            "--b",
            tmp_path / "seed_2",
            "--output_dir",
            tmp_path / "new",
        )


def test_mmcs_of_what_cannot_be_compared(autoencoders, tmp_path, capfd):
    root, _ = autoencoders
    out = ("--output_dir", tmp_path / "out")
    assert "nowhere: no sparse autoencoder here" in probe_refused(
        capfd, "mmcs", "--a", "nowhere", "--b", root / "thin", *out
    )
    for b in ((), ("--b", root / "thin")):
        assert "name others to compare it with, as --b" in probe_refused(
            capfd, "mmcs", "--a", root / "thin", *b, *out
        )
    assert "features must be" in probe_refused(
        capfd, "mmcs", "--a", root / "thin", "--b", root / "seed_0", *out
    )
    assert "required: --a" in probe_refused(capfd, "mmcs", *out)
    assert not (tmp_path / "out").exists()
