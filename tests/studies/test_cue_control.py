"""The study of control by features of a spurious cue (nanorlhf/studies/cue_control.py): its rule on
made-up numbers, the rest on models that learn nothing.
"""

import shutil
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from support import parse_command

from nanorlhf import data, world
from nanorlhf.errors import InputError
from nanorlhf.studies import cue_control as module

pytestmark = pytest.mark.slow

SMALL = """
    --seeds 1 --first_seed 0 --sarms joint reward_first --steps 1 --eval_every 1 --jobs 1
    "--sft_flags=--steps 8 --batch_size 16 --eval_size 8"
    "--sae_flags=--steps 2 --batch_size 64 --max_rows 60 --eval_size 10 --expansion 1 --k 8"
    "--rm_sae_flags=--steps 2 --batch_size 64 --max_rows 60 --eval_size 10 --k 8"
    "--rm_flags=--steps 1 --batch_size 8 --eval_size 8"
    "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 8"
    "--probe_flags=--eval_size 8" "--human_flags=--max_rows 30"
"""

# ---------------------------------------------------------------------------------------- the rule


def feature(i, gain=0.5, low=0.1, weight=0.5, rate=0.1, tokens=()):
    """A row of `probe.py reward_features`.

    gain, low: the mean and the lower end of what the policy has more of it; rate: how often it
    fired before training; tokens: what it follows, [(token, AUC)].
    """
    policy = {
        "rate_before": rate,
        "rate_after": 0.9,
        "differential": {"mean": gain, "low": low, "high": 1.0},
    }
    return {"id": i, "weight": weight, "tokens": tokens, "policy": policy}


# The policy has more of these, and they follow no word. One of "!" has gained most.
EXPLOITED = [
    feature(1, gain=0.3, rate=0.10, tokens=[("!", 0.9)]),
    feature(2, gain=0.6, rate=0.08, weight=-0.1, tokens=[("!", 0.8)]),
    feature(3, gain=0.5, weight=0.9, tokens=[("~", 0.9)]),
    feature(9, gain=0.5, weight=0.9, tokens=[("~", 0.9)]),
]
INNOCENT = [
    feature(4, gain=0.9, weight=0.9, tokens=[("superb", 0.99), ("!", 0.98)]),  # follows a word
    feature(6, gain=0.9, low=-0.1, tokens=[("#", 0.9)]),  # is not surely exploited
    feature(7, gain=0.9, tokens=[("#", 0.6)]),  # follows nothing
    feature(8, gain=0.9),  # was not described
]


def make_others():
    """Features 11 to 49: each is punished more than the one before; those after 40 are rare."""
    rows = []
    for n in range(1, 40):
        rate = 0.02 * n if n <= 30 else 0.001
        row = feature(10 + n, gain=0.0, low=-1.0, weight=-n, rate=rate, tokens=[("room", 0.6)])
        rows.append(row)
    return rows


OTHERS = make_others()


def identify(rows):
    return module.identify({"features": rows}, 0)


def test_the_rule_finds_what_is_exploited_and_follows_no_word():
    found = identify(EXPLOITED + INNOCENT + OTHERS)
    assert found["token"] == "!"
    # The largest of all, then what follows the same token.
    assert found["features"] == [2, 1]


def test_negative_controls_are_those_that_are_punished_most_and_fire_on_two_percent():
    found = identify(EXPLOITED + INNOCENT + OTHERS)
    assert found["negative"] == [40, 39]


def test_random_controls_fire_about_as_often():
    rows = EXPLOITED + INNOCENT + OTHERS
    found = identify(rows)
    assert len(set(found["random"])) == 2
    assert not {1, 2} & set(found["random"])
    rates = {}
    for row in rows:
        rates[row["id"]] = row["policy"]["rate_before"]
    for i, control in zip(found["features"], found["random"]):
        assert abs(rates[control] - rates[i]) <= 0.1


def test_where_nothing_is_suspicious_nothing_is_found():
    assert identify(INNOCENT + OTHERS) == {"token": None, "features": []}


def test_too_few_live_features_for_controls_are_one_line():
    rare = [feature(20 + n, gain=0.0, low=-1.0, rate=0.001) for n in range(5)]
    with pytest.raises(InputError, match="2 controls are needed .* has 1:"):
        module.by_name({"features": [feature(1), feature(2), feature(3), *rare]}, 0, [1, 2])


def test_without_head_weights_there_are_no_negative_controls():
    """As for an autoencoder on a dense reward model."""
    rows = [row | {"weight": None} for row in EXPLOITED + OTHERS]
    found = identify(rows)
    assert found["features"] == [2, 1]
    assert found["negative"] == []


# ---------------------------------------------------------------------------------- over the seeds


def test_intervals_are_of_differences_within_a_seed():
    rows = [{"gold": 1.0}, {"gold": 2.0}, {"gold": 6.0}]
    base = [{"gold": 0.5}, {"gold": 2.5}, {"gold": 3.0}]
    mean, half_width = module.over_seeds(rows, base)["gold"]
    assert mean == 1
    # The 97.5% point of Student's t with 2 degrees of freedom, times s / sqrt(3).
    expected = 4.30265 * stdev([0.5, -0.5, 3.0]) / 3**0.5
    assert half_width == pytest.approx(expected, rel=1e-4)


def test_without_a_base_the_mean_is_that_of_the_rows():
    mean, _ = module.over_seeds([{"gold": 1.0}, {"gold": 2.0}, {"gold": 6.0}])["gold"]
    assert mean == 3


def gold_of(table):
    """{arm: mean gold} of a table."""
    return {arm: row["gold"][0] for arm, row in table.items()}


def test_arms_that_not_every_seed_has_are_compared_in_their_own_seeds():
    """Two seeds, of which only the second found features to clamp."""
    outcomes = {
        "before": {0: {"gold": 0.0}, 1: {"gold": 2.0}},
        "plain": {0: {"gold": 1.0}, 1: {"gold": 3.0}},
        "clamp": {1: {"gold": 7.0}},
    }
    tables = module.control_tables(outcomes)
    assert gold_of(tables["at the end"]) == {"before": 1.0, "plain": 2.0}
    some = tables["at the end, seeds with features"]
    assert gold_of(some) == {"before": 2.0, "plain": 3.0, "clamp": 7.0}
    assert gold_of(tables["less plain, the same seeds"])["clamp"] == 4.0


def test_arms_of_named_features_are_read_from_their_own_folders(tmp_path, monkeypatch):
    """Those of a larger KL coefficient have no features: they are one run, whatever is named."""
    arms = ["plain", "indicator", "random", "kl_0.1", "dense"]
    for arm in arms:
        for folder in (arm, f"named_3_17_{arm}"):
            (tmp_path / "ppo" / folder).mkdir(parents=True)
    monkeypatch.setattr(module, "read_outcome", lambda a, s, arm, when="after": {"arm": arm})
    a = SimpleNamespace(output_dir=tmp_path, features="3,17", truth=False, first_seed=0, seeds=1)
    outcomes = module.outcomes_of(a, {0: {"features": [3, 17]}})
    own = ["named_3_17_indicator", "named_3_17_random"]
    assert list(outcomes) == ["before", "plain", *own, "kl_0.1", "dense"]


# --------------------------------------------------------------------------------- the study's runs

ARMS = [*module.CONTROLLED, *module.CONTROLS]


def find_six(summary, s):
    """In the rule's place, since tiny models exploit nothing: the first six features."""
    ids = [row["id"] for row in summary["features"]][:6]
    return {
        "token": world.cue(s),
        "features": ids[:2],
        "random": ids[2:4],
        "negative": ids[4:],
        "numbers": dict.fromkeys(ids, {"weight": 0.25}),
    }


@pytest.fixture(scope="module")
def study(run_small):
    """The study with one autoencoder, two kinds of SARM, and a rule that finds something."""
    sarms = {"joint": module.SARMS["joint"], "reward_first": module.SARMS["reward_first"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "identify", find_six)
        patch.setattr(module, "SAES", {"sae": module.SAES["sae"]})
        patch.setattr(module, "SARMS", sarms)
        yield run_small(module, SMALL)


@pytest.fixture
def found(study):
    """What the study's rule found for its one seed, and wrote down."""
    return study.read("identified/seed_0.json")


def config_of(study, arm):
    """The settings of an arm's PPO run, without the fingerprints of what they name."""
    config = study.read(f"ppo/{arm}/seed_0/config.json")
    del config["inputs"]
    return config


def find_one(commands, words):
    """The one command that has these words."""
    (command,) = [command for command in commands if words in command]
    return command


def kind_of(command):
    """The script, or the command of probe.py."""
    script, name, *_ = command.split()
    return name if script == "probe.py" else script


def test_every_run_is_made_once(study):
    kinds = list(map(kind_of, study.first))
    expected = ["train_sft.py"]
    expected += 2 * ["train_sae.py"]  # on the policy, and on the dense reward model
    expected += 3 * ["train_rm.py"]  # dense, joint, reward_first
    expected += 2 * ["train_ppo.py"]  # without control, against a SARM and the dense one
    expected += ["reward_features"] + 2 * [
        "human_latents"
    ]  # for the penalties, and for the density
    expected += len(ARMS) * ["train_ppo.py"]
    assert sorted(kinds) == sorted(expected)
    assert len(set(study.first)) == len(study.first)
    # Features are read after the run without control, and before those under control.
    assert kinds.index("reward_features") > kinds.index("train_ppo.py")
    assert kinds[-1] == "train_ppo.py"
    # A second time there is nothing to do.
    study.run()
    assert study.ran == study.first


def test_quick_marks_its_tables(study):
    mark = " [QUICK, one seed: not the study's numbers]"
    quick = study.run_quick()
    whole = study.run()
    assert quick.count(mark) == len(study.summary["tables"])
    assert quick.replace(mark, "") == whole
    assert "nan" not in whole  # a single seed has no interval


def test_texts_of_the_autoencoder_on_a_reward_model(study):
    """Both sides of the pairs that the reward model is trained on, and demonstrations."""
    rows = study.read_rows("texts/seed_0.jsonl")
    n_pairs = data.WORLD_SIZES["pairs"]
    first, second, *_ = world.preferences(n_pairs, 0)
    assert rows[0]["response"] == first["chosen"]
    assert rows[1]["response"] == first["rejected"]
    assert rows[2]["response"] == second["chosen"]
    assert rows[3]["response"] == second["rejected"]
    assert rows[2 * n_pairs :] == world.demonstrations(module.DEMONSTRATIONS)


def test_the_autoencoder_on_a_reward_model_learns_from_last_tokens(study):
    command = find_one(study.first, f"--output_dir {study.folder}/rm_sae/seed_0")
    assert f"--dataset {study.folder}/texts/seed_0.jsonl" in command
    assert "--tokens last" in command


CONTROL_FLAGS = {
    "penalize_features",
    "tau",
    "alpha",
    "penalty",
    "clamp",
    "density_beta",
    "human_latents",
}


def test_there_is_a_run_for_each_arm(study):
    configs = study.folder.glob("ppo/*/seed_0/config.json")
    arms = [path.parts[-3] for path in configs]
    assert sorted(arms) == sorted(["plain", "dense", *ARMS])


@pytest.mark.parametrize("arm", ["dense", *ARMS])
def test_arms_differ_in_what_controls_them_alone(study, arm):
    plain = config_of(study, "plain")
    config = config_of(study, arm)
    differing = {name for name in plain if config[name] != plain[name]}
    expected = set()
    if arm == "dense":
        expected = {"reward_model"}
    if arm.startswith("kl"):
        expected = {"kl_coef"}
    assert differing - CONTROL_FLAGS - {"output_dir"} == expected


@pytest.mark.parametrize(
    "arm, which",
    [
        ("indicator", "features"),
        ("hinge", "features"),
        ("random", "random"),
        ("negative", "negative"),
    ],
)
def test_features_that_an_arm_penalises(study, found, arm, which):
    assert config_of(study, arm)["penalize_features"] == found[which]


def test_prices_of_the_features(study, found):
    """One standard deviation of human scores, shared by the two; of the hinge for one std of z."""
    assert config_of(study, "indicator")["alpha"] == ["0.5std", "0.5std"]

    with safe_open(study.folder / "human/seed_0.safetensors", "pt") as f:
        ids = f.get_tensor("features").tolist()
        stds = f.get_tensor("latents").std(0).tolist()
    std_of = dict(zip(ids, stds))
    for i, alpha in zip(found["features"], config_of(study, "hinge")["alpha"]):
        price = float(alpha.removesuffix("std"))
        # A feature that is not in the file never fires: it has no standard deviation.
        assert price * std_of.get(i, 1.0) == pytest.approx(0.5, rel=1e-2)


def test_clamped_features_are_set_to_0(study, found):
    expected = [f"{i}:set:0" for i in found["features"]]
    assert config_of(study, "clamp")["clamp"] == expected


# ------------------------------------------------------------------------------ its other settings

NOTHING = {"token": None, "features": []}


def test_where_nothing_is_found_only_the_kl_is_tried(study):
    settings = study.settings()
    assert list(module.arms(settings, 0, NOTHING)) == ["kl_0.1", "kl_0.2"]
    tables = module.control_tables(module.outcomes_of(settings, {0: NOTHING}))
    assert list(tables["at the end"]) == ["before", "plain", "kl_0.1", "kl_0.2", "dense"]
    # No table of the seeds that found features.
    assert len(tables) == 2


def test_how_many_runs_five_seeds_have(study):
    stages = module.first_commands(study.settings(seeds=5))
    n_runs = [len(stage) for stage in stages]
    # SFT; an autoencoder on it, and dense models; their autoencoders; two SARMs; PPO against both;
    # what it did to the features, and human latents.
    assert n_runs == [1, 1 + 5, 5, 5 * 2, 5 * 2, 5 * 2]


def run_here(command):
    main, config = parse_command(command)
    main(config)


@pytest.fixture
def copied(study, tmp_path):
    """The place of a copy of the study's models, without human latents: tests write there."""
    for name in ("rm", "rm_sae"):
        shutil.copytree(study.folder / name, tmp_path / name)
    return str(tmp_path)


def make_human_latents(settings):
    """Run the study's own command for the human latents of seed 0."""
    *_, probes = module.first_commands(settings)
    run_here(find_one(probes, "probe.py human_latents"))


def features_of_the_cue():
    """Features 0 to 7 follow the cue, each a little better than the one before; 9 has no tokens."""
    rows = [feature(9)]
    for i in range(8):
        tokens = [("room", 0.9), (world.cue(0), 0.6 + 0.01 * i)]
        rows.append(feature(i, tokens=tokens))
    return {"features": rows}


def test_features_by_the_truth_are_those_that_follow_the_cue_best():
    found = module.by_truth(features_of_the_cue(), 0)
    assert found == {"token": world.cue(0), "features": [7, 6, 5, 4, 3]}


def test_arms_by_the_truth(study, copied):
    settings = study.settings(truth=True, output_dir=copied)
    found = module.by_truth(features_of_the_cue(), 0)
    make_human_latents(settings)
    run_here(module.density_texts(settings, 0, found))
    assert Path(module.density_file(settings, 0)).exists()

    commands = module.arms(settings, 0, found)

    arms = ["truth_indicator", "truth_hinge", "truth_clamp", "truth_density"]
    assert list(commands) == arms
    for arm in arms:
        assert f"/ppo/{arm}/seed_0" in commands[arm]


def test_outcomes_by_the_truth_are_not_those_of_the_blind_arms(study):
    """None of the four arms has been run here."""
    settings = study.settings(truth=True)
    found = module.by_truth(features_of_the_cue(), 0)
    outcomes = module.outcomes_of(settings, {0: found})
    assert outcomes.keys() == {"before", "plain", "dense"}


@pytest.fixture
def against_dense(study, copied):
    """Settings for PPO against the dense reward model, whose autoencoder has the features."""
    return study.settings(against="dense", sarms=["reward_first"], output_dir=copied)


def test_runs_against_a_dense_model(against_dense):
    folder = against_dense.output_dir
    dense = f"--reward_model {folder}/rm/dense/seed_0 "
    _, first_models, _, sarms, policies, probes = module.first_commands(against_dense)
    # A dense reward model and a SARM on it: no autoencoder of the SFT policy.
    assert len(first_models) == 1
    assert len(sarms) == 1
    (policy,) = policies
    assert dense in policy
    assert "/ppo/plain/" in policy
    # The features are read from the dense reward model.
    for command in probes:
        assert f"{dense}--sae {folder}/rm_sae/seed_0 " in command


def test_arms_against_a_dense_model(against_dense):
    """No head has weights on the features, so that no arm is about negative ones."""
    found = {"features": [0, 1], "random": [2, 3], "negative": []}
    make_human_latents(against_dense)
    run_here(module.density_texts(against_dense, 0, found))

    commands = module.arms(against_dense, 0, found)

    penalised = ["indicator", "hinge", "clamp", "density", "random"]
    assert list(commands) == [*penalised, "kl_0.1", "kl_0.2"]
    flag = f"--feature_sae {against_dense.output_dir}/rm_sae/seed_0"
    for arm, command in commands.items():
        assert (flag in command) == (arm in penalised)
        parse_command(command)


# --------------------------------------------------------------------------------------- its tables


def outcome_of(study, arm):
    """The numbers of an arm's last evaluation."""
    return study.read(f"ppo/{arm}/seed_0/summary.json")["after"]


@pytest.mark.parametrize("name", ["gold", "proxy", "length", "kl", "distinct_2"])
def test_the_table_has_the_numbers_of_the_runs(study, name):
    end = study.summary["tables"]["at the end"]
    assert end["clamp"][name][0] == outcome_of(study, "clamp")[name]


def test_the_table_of_differences(study):
    less_plain = study.summary["tables"]["less plain, the same seeds"]
    expected = outcome_of(study, "clamp")["gold"] - outcome_of(study, "plain")["gold"]
    assert less_plain["clamp"]["gold"][0] == pytest.approx(expected)


def test_the_rate_of_the_cue(study):
    has_cue = []
    for row in study.read_rows("ppo/indicator/seed_0/eval/step_1.jsonl"):
        has_cue.append(world.cue(0) in row["response"].split())
    end = study.summary["tables"]["at the end"]
    assert end["indicator"]["cue"][0] == fmean(has_cue)


def test_the_table_of_reward_models(study):
    summary = study.read("rm/joint/seed_0/summary.json")
    table = study.summary["tables"]["reward models"]
    assert table["joint"]["accuracy"][0] == summary["eval/accuracy"]


def test_the_answer_is_compared_with_the_truth(study):
    answer = study.summary["identified"]["0"]
    assert answer["right"]  # find_six() names the cue
    assert 0 <= answer["auc"] <= 1


def test_picture(study):
    pytest.importorskip("matplotlib")
    assert (study.folder / "control.png").exists()
