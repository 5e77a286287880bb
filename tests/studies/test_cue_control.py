"""The study of control by features of a spurious cue (nanorlhf/studies/cue_control.py): its rule on made-up numbers, the rest on models that learn nothing."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import ALL_SCRIPTS, parse_command

from nanorlhf import world
from nanorlhf.runtime import cli
from nanorlhf.studies import common, cue_control

pytestmark = pytest.mark.slow

SMALL = [
    "--seeds", "1", "--first_seed", "0", "--sarms", "joint", "reward_first", "--steps", "1", "--eval_every", "1", "--jobs", "1", "--sft_flags=--steps 8 --batch_size 16 --eval_size 8",
    "--sae_flags=--steps 2 --batch_size 64 --max_rows 60 --eval_size 10 --expansion 1 --k 8",
    "--rm_sae_flags=--steps 2 --batch_size 64 --max_rows 60 --eval_size 10 --k 8", "--rm_flags=--steps 1 --batch_size 8 --eval_size 8",
    "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 8", "--probe_flags=--eval_size 8",
    "--human_flags=--max_rows 30",
]  # fmt: skip


@pytest.fixture(scope="module")
def study():
    return cue_control


def feature_row(id, weight, low, mean, rate, *tokens):
    return {"id": id, "weight": weight, "tokens": [list(token) for token in tokens],
            "policy": {"rate_before": rate, "rate_after": 0.9, "differential": {"mean": mean, "low": low, "high": 1.0}}}  # fmt: skip


def test_the_rule(study):
    """Of what the policy has more of, that which follows no word; controls that fire as often, and that are punished already."""
    exploited = [
        feature_row(1, 0.5, 0.2, 0.3, 0.10, ["!", 0.9, 40]), feature_row(2, -0.1, 0.3, 0.6, 0.08, ["!", 0.8, 40]),
        feature_row(3, 0.9, 0.4, 0.5, 0.1, ["~", 0.9, 40]), feature_row(9, 0.9, 0.4, 0.5, 0.1, ["~", 0.9, 40]),
    ]  # fmt: skip
    innocent = [
        feature_row(
            4, 0.9, 0.8, 0.9, 0.10, ["superb", 0.99, 40], ["!", 0.98, 40]
        ),  # a word comes first
        feature_row(6, 0.5, -0.1, 0.9, 0.10, ["#", 0.9, 40]),  # not surely exploited
        feature_row(7, 0.5, 0.1, 0.9, 0.10, ["#", 0.6, 40]),  # follows nothing
        feature_row(8, 0.5, 0.1, 0.9, 0.10),  # was not described
    ]
    others = [
        feature_row(10 + i, -i, -1.0, 0.0, 0.001 if i > 30 else 0.02 * i, ["room", 0.6, 40])
        for i in range(1, 40)
    ]
    found = study.identify({"features": exploited + innocent + others}, 0)
    assert found["token"] == "!" and found["features"] == [
        2,
        1,
    ]  # the largest of all, then what follows the same token
    assert found["negative"] == [40, 39]  # of those that fire on 2% of the texts
    assert len(set(found["random"])) == 2 and not {1, 2} & set(found["random"])
    rates = {row["id"]: row["policy"]["rate_before"] for row in exploited + innocent + others}
    assert all(abs(rates[j] - rates[i]) <= 0.1 for i, j in zip(found["features"], found["random"]))
    assert study.identify({"features": innocent + others}, 0) == {"token": None, "features": []}
    without = [
        row | {"weight": None} for row in exploited + others
    ]  # an autoencoder on a dense reward model has no head
    assert (
        study.identify({"features": without}, 0)["features"] == [2, 1]
        and study.identify({"features": without}, 0)["negative"] == []
    )


def test_intervals(study):
    rows, base = [{"gold": x} for x in (1.0, 2.0, 6.0)], [{"gold": x} for x in (0.5, 2.5, 3.0)]
    mean, half = study.over_seeds(rows, base)["gold"]
    assert mean == 1 and half == pytest.approx(
        4.30265 * statistics.stdev([0.5, -0.5, 3.0]) / 3**0.5, rel=1e-4
    )
    assert study.over_seeds(rows)["gold"][0] == 3


@pytest.fixture(scope="module")
def ran(study, tmp_path_factory):
    """The study on tiny runs in this process, with a rule that finds something: its folder, and the commands it ran."""
    folder, commands, threads = (
        tmp_path_factory.mktemp("control") / "quick",
        [],
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)

    def run(command):
        main, config = parse_command(command)
        main(config)
        commands.append(command)

    def finds(summary, s):
        ids = [row["id"] for row in summary["features"]][:6]
        numbers = {i: {"weight": 0.25} for i in ids}
        return {
            "token": world.cue(s),
            "features": ids[:2],
            "random": ids[2:4],
            "negative": ids[4:],
            "numbers": numbers,
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run_command", run)
        patch.setattr(study, "identify", finds)
        patch.setattr(study, "SAES", {"sae": study.SAES["sae"]})
        patch.setattr(
            study, "SARMS", {name: study.SARMS[name] for name in ("joint", "reward_first")}
        )
        for script in ALL_SCRIPTS.values():
            patch.setattr(script, "plot_run", lambda run: None, raising=False)
        study.main(["--output_dir", str(folder), *SMALL])
        first = list(commands)
        study.main(["--output_dir", str(folder), *SMALL])  # a second time there is nothing to do
        torch.set_num_threads(threads)
        cli.distributed.shutdown()
        yield folder, first, commands


def test_every_run_is_made_once(study, ran):
    folder, first, commands = ran
    assert commands == first and len(set(first)) == len(first)
    reward_models, read = 1 + len(study.SARMS), 3
    assert len(first) == 1 + len(study.SAES) + 1 + reward_models + read + 2 + len(
        study.CONTROLLED
    ) + len(study.CONTROLS)
    order = [c.split()[0] if c.split()[0] != "probe.py" else c.split()[1] for c in first]
    assert (
        order.index("reward_features") > order.index("train_ppo.py") and order[-1] == "train_ppo.py"
    )


def test_quick_marks_its_tables(study, ran, capsys):
    folder, _, _ = ran
    mark = " [QUICK, one seed: not the study's numbers]"
    study.main(
        ["--quick", "--output_dir", str(folder.parent), *SMALL]
    )  # its runs are there already
    quick = capsys.readouterr().out
    tables = json.loads((folder / "summary.json").read_text())["tables"]
    study.main(["--output_dir", str(folder), *SMALL])
    whole = capsys.readouterr().out
    assert (
        quick.count(mark) == len(tables) and quick.replace(mark, "") == whole and "nan" not in whole
    )


def test_texts_of_the_autoencoder_on_a_reward_model(study, ran):
    """Both sides of the pairs that the reward model is trained on, and demonstrations."""
    folder, first, _ = ran
    rows = [json.loads(line) for line in open(folder / "texts" / "seed_0.jsonl")]
    pairs = world.preferences(800, 0)
    assert [row["response"] for row in rows[:4]] == [
        pair[side] for pair in pairs[:2] for side in ("chosen", "rejected")
    ]
    assert (
        rows[1600:] == world.demonstrations(study.DEMONSTRATIONS)
        and {"chosen", "rejected"} <= pairs[0].keys()
    )
    (command,) = (c for c in first if "--output_dir " + str(folder / "rm_sae" / "seed_0") in c)
    assert f"--dataset {folder}/texts/seed_0.jsonl" in command and "--tokens last" in command


def test_arms_differ_in_what_controls_them_alone(study, ran):
    folder, _, _ = ran
    configs = {
        p.parts[-3]: json.loads(p.read_text()) for p in folder.glob("ppo/*/seed_0/config.json")
    }
    assert set(configs) == {"plain", "dense", *study.CONTROLLED, *study.CONTROLS}
    for config in configs.values():
        config.pop("inputs")  # fingerprints of what the settings name
    plain, free = (
        configs["plain"],
        {
            "output_dir",
            "penalize_features",
            "tau",
            "alpha",
            "penalty",
            "clamp",
            "density_beta",
            "human_latents",
        },
    )
    for arm, config in configs.items():
        differs = {name for name in plain if config[name] != plain[name]}
        assert differs - free == (
            {"reward_model"} if arm == "dense" else {"kl_coef"} if arm.startswith("kl") else set()
        ), arm
    found = json.loads((folder / "identified" / "seed_0.json").read_text())
    assert (
        configs["indicator"]["penalize_features"]
        == configs["hinge"]["penalize_features"]
        == found["features"]
    )
    assert (
        configs["random"]["penalize_features"] == found["random"]
        and configs["negative"]["penalize_features"] == found["negative"]
    )
    assert configs["indicator"]["alpha"] == ["0.5std"] * 2  # 1 std, shared
    with safe_open(folder / "human" / "seed_0.safetensors", "pt") as f:
        spread = dict(
            zip(f.get_tensor("features").tolist(), f.get_tensor("latents").std(0).tolist())
        )
    for i, price in zip(
        found["features"], configs["hinge"]["alpha"]
    ):  # the same for a standard deviation of the latent
        assert float(price.removesuffix("std")) * spread.get(i, 1.0) == pytest.approx(0.5, rel=1e-2)
    assert configs["clamp"]["clamp"] == [f"{i}:set:0" for i in found["features"]]


def test_where_nothing_is_found_only_the_kl_is_tried(study, ran):
    settings = json.loads((ran[0] / "summary.json").read_text())["settings"]
    a = type("Settings", (), settings)
    commands = study.arms(a, 0, {"token": None, "features": []})
    assert list(commands) == ["kl_0.1", "kl_0.2"]
    none = study.control_tables(study.outcomes_of(a, {0: {"features": []}}))
    assert (
        list(none["at the end"]) == ["before", "plain", "kl_0.1", "kl_0.2", "dense"]
        and len(none) == 2
    )
    two = {
        "before": {0: {"gold": 0.0}, 1: {"gold": 2.0}},
        "plain": {0: {"gold": 1.0}, 1: {"gold": 3.0}},
        "clamp": {1: {"gold": 7.0}},
    }
    tables = study.control_tables(two)
    assert {arm: row["gold"][0] for arm, row in tables["at the end"].items()} == {
        "before": 1.0,
        "plain": 2.0,
    }
    some = tables["at the end, seeds with features"]
    assert {arm: row["gold"][0] for arm, row in some.items()} == {
        "before": 2.0,
        "plain": 3.0,
        "clamp": 7.0,
    }
    assert tables["less plain, the same seeds"]["clamp"]["gold"][0] == 4.0
    full = [
        len(stage) for stage in study.first_commands(type("Settings", (), settings | {"seeds": 5}))
    ]
    assert full == [1, len(study.SAES) + 5, 5, 5 * len(study.SARMS), 5 * 2, 5 * 2]


def test_features_by_the_truth(study, ran):
    settings = json.loads((ran[0] / "summary.json").read_text())["settings"]
    a = type("Settings", (), settings | {"truth": True})
    cue = world.cue(0)
    rows = [
        feature_row(i, 0.1, 0.1, 0.1, 0.1, ["room", 0.9, 4], [cue, 0.6 + 0.01 * i, 4])
        for i in range(8)
    ] + [feature_row(9, 0.1, 0.1, 0.1, 0.1)]
    found = study.by_truth({"features": rows}, 0)
    assert found == {"token": cue, "features": [7, 6, 5, 4, 3]}
    Path(study.human_file(a, 0)).unlink(missing_ok=True)
    main, config = parse_command(study.density_texts(a, 0, found))
    main(config)
    Path(study.density_file(a, 0)).rename(study.human_file(a, 0))
    commands = study.arms(a, 0, found)
    assert list(commands) == ["truth_indicator", "truth_hinge", "truth_clamp", "truth_density"]
    assert all(f"/ppo/{arm}/seed_0" in command for arm, command in commands.items())
    assert study.outcomes_of(a, {0: found}).keys() == {
        "before",
        "plain",
        "dense",
    }  # none of the four has been run here


def test_against_a_dense_model_with_an_autoencoder(study, ran):
    """The same latents, read from the dense reward model; nothing has a weight, so that no arm is about negative ones."""
    settings = json.loads((ran[0] / "summary.json").read_text())["settings"]
    a = type("Settings", (), settings | {"against": "dense", "sarms": ["reward_first"]})
    stages = study.first_commands(a)
    assert (
        len(stages[1]) == 1 and len(stages[3]) == 1
    )  # a dense reward model and a SARM on it: no autoencoder of the SFT policy
    dense, sae = f"{a.output_dir}/rm/dense/seed_0", f"{a.output_dir}/rm_sae/seed_0"
    assert (
        len(stages[4]) == 1
        and f"--reward_model {dense} " in stages[4][0]
        and "/ppo/plain/" in stages[4][0]
    )
    assert all(f"--reward_model {dense} --sae {sae} " in command for command in stages[5])
    found = {"features": [0, 1], "random": [2, 3], "negative": []}  # as the rule finds it
    few = study.density_texts(a, 0, found)
    for command in (
        few,
        few.replace(study.density_file(a, 0), study.human_file(a, 0)).replace(
            " --features 0,1", ""
        ),
    ):
        Path(study.human_file(a, 0)).unlink(missing_ok=True)
        main, config = parse_command(command)
        main(config)
    commands = study.arms(a, 0, found)
    assert list(commands) == [
        "indicator",
        "hinge",
        "clamp",
        "density",
        "random",
        "kl_0.1",
        "kl_0.2",
    ]
    assert all(
        (f"--feature_sae {sae}" in command) == (not arm.startswith("kl"))
        for arm, command in commands.items()
    )
    for command in commands.values():
        parse_command(command)


def test_tables_are_what_the_runs_say(study, ran):
    folder, _, _ = ran
    summary = json.loads((folder / "summary.json").read_text())
    end, less = summary["tables"]["at the end"], summary["tables"]["less plain, the same seeds"]
    after = {
        arm: json.loads((folder / "ppo" / arm / "seed_0" / "summary.json").read_text())["after"]
        for arm in ("plain", "clamp")
    }
    assert all(
        end["clamp"][name][0] == after["clamp"][name]
        for name in ("gold", "proxy", "length", "kl", "distinct_2")
    )
    assert less["clamp"]["gold"][0] == pytest.approx(
        after["clamp"]["gold"] - after["plain"]["gold"]
    )
    answers = [
        json.loads(line)["response"]
        for line in open(folder / "ppo" / "indicator" / "seed_0" / "eval" / "step_1.jsonl")
    ]
    assert end["indicator"]["cue"][0] == sum(
        world.cue(0) in text.split() for text in answers
    ) / len(answers)
    accuracy = json.loads((folder / "rm" / "joint" / "seed_0" / "summary.json").read_text())[
        "eval/accuracy"
    ]
    assert summary["tables"]["reward models"]["joint"]["accuracy"][0] == accuracy
    assert summary["identified"]["0"]["right"] and 0 <= summary["identified"]["0"]["auc"] <= 1
    assert (folder / "control.png").exists()
