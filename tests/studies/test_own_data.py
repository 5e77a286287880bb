"""Studies on a model and data of one's own (nanorlhf/studies/own_data.py, benchmark_data.py), and
--dry_run (plan.py).

The model and the files here have nothing to do with the embedded world: other words, other rewards.
"""

import hashlib
import json
import random
import shlex
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from support import read_rows, write_rows
from tiny_models import enlarge_matrices, tiny_config, word_tokenizer
from transformers import AutoModelForCausalLM

from nanorlhf.studies import (
    benchmark_data,
    common,
    cue_control,
    feedback_patterns,
    generalisation,
    overoptimisation,
)

# ------------------------------------------------------------------- a model and data of one's own

GOOD = "happy lovely superb brave warm gentle bright sweet".split()
BAD = "awful nasty cruel grim bitter rotten sour dull".split()
NEUTRAL = "table river stone paper window garden bottle ladder".split()
FILLERS = "the a we saw found was here today and but then they said it".split()
WORDS = [*GOOD, *BAD, *NEUTRAL, *FILLERS]


def draw_text(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


def draw_texts(rng, n_texts):
    return [draw_text(rng, 6) for _ in range(n_texts)]


def make_question(rng, i):
    """A prompt that no other question has."""
    first, second = divmod(i, len(FILLERS))
    return f"{FILLERS[first]} {FILLERS[second]} {draw_text(rng, 2)}"


def make_files(folder):
    """Write all files: texts, pairs, a lexicon, two benchmarks, a rule for what is in."""
    rng = random.Random(0)
    texts = []
    pairs = []
    for i in range(80):
        prompt = make_question(rng, i)
        texts.append({"prompt": prompt, "response": draw_text(rng, 12)})
        pairs.append({"prompt": prompt, "chosen": draw_text(rng, 5), "rejected": draw_text(rng, 7)})
    write_rows(folder / "texts.jsonl", texts)
    write_rows(folder / "pairs.jsonl", pairs)

    values = {**dict.fromkeys(GOOD, 2), **dict.fromkeys(BAD, -2), **dict.fromkeys(NEUTRAL, 0)}
    lines = map("\t".join, zip(values, map(str, values.values())))
    write_rows(folder / "lexicon.tsv", lines)

    # Ten questions are in both benchmarks.
    rewardbench2 = []
    rm_bench = []
    for i in range(40):
        answers = draw_texts(rng, 4)
        row = {"id": str(i), "prompt": make_question(random.Random(i), i), "subset": "Safety"}
        rewardbench2.append({**row, "chosen": answers[:1], "rejected": answers[1:]})
    for i in range(30, 60):
        answers = draw_texts(rng, 6)
        row = {
            "id": str(i),
            "prompt": make_question(random.Random(i), i),
            "domain": "safety-refuse",
        }
        rm_bench.append({**row, "chosen": answers[:3], "rejected": answers[3:]})
    write_rows(folder / "rewardbench2.jsonl", rewardbench2)
    write_rows(folder / "rm_bench.jsonl", rm_bench)
    write_rows(folder / "rule.py", ["def is_in(row):", "    return 'the' not in row['prompt']"])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of all files, in which the model will be."""
    folder = tmp_path_factory.mktemp("own")
    make_files(folder)
    return folder


@pytest.fixture(scope="module")
def own_model(own):
    """The same folder, with a tiny Llama and a tokenizer of these words in it."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny_config("llama"))
    enlarge_matrices(lm, 10)
    lm.save_pretrained(own / "model")
    word_tokenizer(["<pad>", "<eos>", "<unk>", *WORDS]).save_pretrained(own / "model")
    return own


# The flags of each study on these files: FOLDER is theirs. The pipelines are whole, but small.
SAMPLING = "--max_new_tokens 8"
PPO = f"--batch_size 8 --minibatch_size 8 --eval_size 6 {SAMPLING}"
RM = "--steps 3 --batch_size 8 --eval_size 10"
SAE = "--steps 3 --batch_size 64 --max_rows 60 --eval_size 10 --expansion 1 --k 8"
MODEL = "--model FOLDER/model --seeds 1 --jobs 1"
FLAGS = {
    overoptimisation: f"""
        --dataset FOLDER/texts.jsonl --sft_dataset FOLDER/texts.jsonl
        --pairs FOLDER/pairs.jsonl --gold_model FOLDER/lexicon.tsv
        --members 2 --label_noise 0.25 --kl_coef 0.05
        --steps 1 --eval_every 1 --n_answers 8 --prompts 6
        "--sft_flags=--steps 3 --batch_size 8 --eval_size 8 {SAMPLING}"
        "--rm_flags={RM}" "--ppo_flags={PPO}" "--bon_flags={SAMPLING}"
    """,
    generalisation: f"""
        --dataset FOLDER/texts.jsonl --pairs FOLDER/pairs.jsonl
        --data_flags "--in_distribution FOLDER/rule.py:is_in"
        --kl_coef 0.05 --kinds k1 --steps 1 --prompts 4 --answers 3 --n 2
        "--rm_flags={RM}" "--ppo_flags={PPO}" "--bon_flags={SAMPLING}"
    """,
    feedback_patterns: f"""
        --dataset FOLDER/texts.jsonl --pairs FOLDER/pairs.jsonl
        --reward_model FOLDER/lexicon.tsv --layer 1
        "--ppo_flags=--steps 1 {PPO}" "--sae_flags={SAE}"
        "--probe_flags=--max_rows 60 --seeds 2"
        "--ablate_flags=--draws 2 --n_answers 1 --eval_size 6 --max_rows 20 {SAMPLING}"
    """,
    cue_control: f"""
        --dataset FOLDER/rewardbench2.jsonl --rm_bench FOLDER/rm_bench.jsonl
        --sarms joint reward_first --layer 1 --steps 1 --eval_every 1
        "--rm_flags={RM}" "--sae_flags={SAE}" "--rm_sae_flags={SAE}" "--ppo_flags={PPO}"
        "--probe_flags=--eval_size 8" "--human_flags=--max_rows 30"
    """,
}
STUDIES = list(FLAGS)
every_study = pytest.mark.parametrize(
    "study", STUDIES, ids=lambda study: study.__name__.rpartition(".")[2]
)


def flags_of(study, folder):
    text = f"{MODEL} {FLAGS[study]}"
    return shlex.split(text.replace("FOLDER", str(folder)))


def read_settings(study, folder, *more):
    return study.read_settings(["--output_dir", "out", *flags_of(study, folder), *more])


def commands_of(study, settings):
    """The command lines of a study; those of cue_control where it finds no features."""
    stages = study.plan(settings) if study is cue_control else study.commands(settings)
    commands = []
    for stage in stages:
        commands += stage
    return commands


def find_command(study, settings, script):
    """The one command of a script."""
    (found,) = [line for line in commands_of(study, settings) if line.startswith(script)]
    return found


# ------------------------------------------------------------------------- the embedded world stays

# What each study runs on the embedded world by default, as it was before it could run on other
# data. A command that changes would make every finished run begin anew.
COMMANDS_BEFORE = {
    overoptimisation: "8b83192d8c70e5c5b3dad183a6b079d46ef4b533196ef489e5fc25fe1aaa855b",
    feedback_patterns: "a267c75de7c40ffe3b6909871b41a62fd0ca66eb79ac4c419ffd37701dba478e",
    generalisation: "f7173bd2d0d5a3334b698ab7cb8758ab0e03548759ecb0e29e3ffea8dce7d6b2",
    cue_control: "9e68ce5415889fdba121615ebf1210125f05c7fbffc60caff027d5223aeadc43",
}


def stages_in_world(study):
    settings = study.read_settings(["--output_dir", "out"])
    if study is not cue_control:
        return study.commands(settings)
    stages = study.first_commands(settings)
    for seed in study.seeds(settings):
        stages.append(list(study.arms(settings, seed, {"features": []}).values()))
    return stages


@every_study
def test_the_embedded_worlds_commands_are_what_they_were(study):
    text = "\n".join("\n".join(stage) + "\n--" for stage in stages_in_world(study))
    assert hashlib.sha256(text.encode()).hexdigest() == COMMANDS_BEFORE[study]


# ----------------------------------------------------------------------------------- --dry_run


@every_study
def test_a_dry_run_prints_every_command_and_runs_none(study, own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "run_command", lambda command: pytest.fail(command))
    arguments = ["--output_dir", "out", *flags_of(study, own), "--dry_run"]
    study.main(arguments)
    printed = capsys.readouterr().out

    commands = commands_of(study, study.read_settings(arguments))
    shown = []
    for line in printed.splitlines():
        if line.startswith("python "):
            shown.append(shlex.split(line)[1:])
    assert shown == list(map(shlex.split, commands))
    assert printed.startswith(f"{len(commands)} commands in ")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_how_large_a_command_is(own, capsys):
    overoptimisation.main(["--output_dir", "out", *flags_of(overoptimisation, own), "--dry_run"])
    printed = capsys.readouterr().out
    model = own / "model"
    for size in (
        f"    3 steps x 8 demonstrations, from {model}\n",
        "    2 members x 3 steps x 8 pairs, from out/sft/seed_0\n",
        "    6 prompts x 8 answers, from out/sft/seed_0\n",
        "    1 steps x 8 answers, from out/sft/seed_0\n",
        "    the answers of a pool, from out/pool/pool.jsonl\n",
    ):
        assert size in printed


def test_a_dry_run_finds_a_flag_that_no_script_knows(own, capsys):
    arguments = [*flags_of(overoptimisation, own), "--dry_run", "--rm_flags", "--stepz 3"]
    with pytest.raises(SystemExit) as ended:
        overoptimisation.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "train_rm.py --members 2" in error
    assert "--stepz" in error


def test_a_dry_run_marks_what_is_done(own, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), *flags_of(overoptimisation, own), "--dry_run"]
    done = tmp_path / "sft" / "seed_0"
    done.mkdir(parents=True)
    (done / "summary.json").write_text("{}")
    overoptimisation.main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("(done)") == 1
    assert f"demonstrations, from {own}/model (done)\n" in printed


# --------------------------------------------------------------------------- what is on own data


@every_study
def test_own_data_has_a_folder_beside_the_worlds(study, own):
    """What is done in the embedded world would pass for done on own data."""
    default = study.Settings.output_dir
    flags = flags_of(study, own)
    assert study.read_settings(flags).output_dir == f"{default}/own"
    assert study.read_settings([*flags, "--quick"]).output_dir == f"{default}/own/quick"
    assert study.read_settings([*flags, "--output_dir", "mine"]).output_dir == "mine"
    # Another model may also run on the data of the embedded world.
    assert study.read_settings(["--model", "m"]).output_dir == f"{default}/own"
    assert study.read_settings([]).output_dir == default


@every_study
def test_nothing_of_the_embedded_world_is_left(study, own):
    for command in commands_of(study, read_settings(study, own)):
        assert "world" not in command


def test_a_model_without_demonstrations_is_the_sft_policy(own):
    settings = read_settings(generalisation, own)
    assert generalisation.commands(settings)[0] == []
    assert generalisation.sft_of(settings) == str(own / "model")


def test_pairs_are_by_default_those_of_the_dataset(own):
    settings = read_settings(overoptimisation, own, "--pairs", "")
    command = find_command(overoptimisation, settings, "train_rm.py")
    assert f"--dataset {own}/texts.jsonl" in command


def test_without_gold_the_pool_is_scored_by_a_reward_model_that_is_there(own):
    settings = read_settings(overoptimisation, own, "--gold_model", "")
    assert overoptimisation.measure_of(settings) == "proxy"
    commands = commands_of(overoptimisation, settings)
    assert "--gold_model" not in " ".join(commands)
    pool = find_command(overoptimisation, settings, "sample_bon.py --model")
    assert "--reward_model out/rm_noise0.25/finetune/seed_0/seed_0 " in pool
    # Two members are trained ahead of it, of which this is the first.
    members = find_command(overoptimisation, settings, "train_rm.py")
    assert "--output_dir out/rm_noise0.25/finetune/seed_0/seed_{seed} " in members
    assert commands.index(members) < commands.index(pool)


def test_seeds_with_the_same_reward_models_are_said_to_have_them(own, capsys):
    """Without label noise nothing but PPO's draws differs between seeds."""
    arguments = ["--output_dir", "out", *flags_of(overoptimisation, own), "--dry_run"]
    overoptimisation.main(arguments)
    assert "the same reward models" not in capsys.readouterr().out
    overoptimisation.main([*arguments, "--label_noise", "0"])
    assert "the same reward models" in capsys.readouterr().out


@every_study
def test_gold_watches_every_policy_and_no_training_of_a_reward_model(study, own):
    settings = read_settings(study, own, "--gold_model", "gold reward.tsv")
    for command in commands_of(study, settings):
        script, *words = shlex.split(command)
        is_watched = script == "train_ppo.py" or "--n_answers" in words and script != "probe.py"
        assert ("--gold_model" in words) == is_watched, command
        if is_watched:
            assert words[words.index("--gold_model") + 1] == "gold reward.tsv"


def test_the_words_of_diversity_are_the_models_tokens(own):
    settings = read_settings(generalisation, own)
    *_, diversity = generalisation.commands(settings)
    assert f"--tokenizer {own}/model --truncate 16" in diversity[0]
    settings = read_settings(generalisation, own, "--diversity_flags", "--nli_sentences 2")
    *_, diversity = generalisation.commands(settings)
    assert "--tokenizer" not in diversity[0]


def test_a_policy_that_is_there_takes_the_place_of_ppo(own):
    settings = read_settings(feedback_patterns, own, "--policy", "my policy")
    divergence, autoencoder, *others = commands_of(feedback_patterns, settings)
    assert "train_ppo.py" not in " ".join(others)
    assert "--policy 'my policy' " in divergence
    assert "--model 'my policy' " in autoencoder


@pytest.mark.parametrize("study", [feedback_patterns, cue_control])
def test_runs_of_other_features_have_other_folders(study, own, monkeypatch):
    """The second choice in one folder would show the numbers of the first."""
    monkeypatch.setattr(
        cue_control,
        "control_flags",
        lambda a, s, found: {"density": f"--human_latents {cue_control.density_file(a, s)}"},
    )

    def runs_of(features):
        settings = read_settings(study, own, "--features", features)
        if study is feedback_patterns:
            return study.ablation_commands(settings, 0)
        commands = study.arms(settings, 0, {"features": [3]})
        return [command for arm, command in commands.items() if not arm.startswith("kl_")]

    (first,) = runs_of("3,17")
    (second,) = runs_of("5")
    words = shlex.split(first)
    others = shlex.split(second)
    for flag in ("--output_dir", "--human_latents"):
        if flag in words:
            assert words[words.index(flag) + 1] != others[others.index(flag) + 1]
    assert "3_17" in common.output_of(words)


@pytest.mark.parametrize(
    "more, kinds",
    [
        ([], {"words", "responses", "pairs"}),
        (["--pairs", ""], {"words", "responses"}),
        (["--reward_model", ""], {"responses", "pairs"}),
        (["--reward_model", "", "--gold_model", "gold.tsv"], {"words", "responses", "pairs"}),
    ],
)
def test_what_has_no_true_reward_is_not_probed(own, more, kinds):
    settings = read_settings(feedback_patterns, own, *more)
    names = feedback_patterns.probes_of(settings)
    assert {name.split(",")[0] for name in names} == kinds


@pytest.mark.parametrize(
    "study, flags, words",
    [
        (overoptimisation, ["--pairs", "p.jsonl"], "it goes with --dataset"),
        (overoptimisation, ["--dataset", "d.jsonl"], "name a --model"),
        (overoptimisation, ["--model", "m", "--dataset", "world:3"], "without --dataset"),
        (overoptimisation, ["--model", "m", "--methods", "pretrain_wco"], "from --sft_dataset"),
        (
            overoptimisation,
            ["--model", "m", "--dataset", "d", "--methods", "wco", "pretrain_mean"],
            "--methods pretrain_mean needs several SFT policies",
        ),
        (generalisation, ["--model", "m", "--dataset", "d"], "--in_distribution"),
        (feedback_patterns, ["--features", "3"], "it goes with --dataset"),
        (feedback_patterns, ["--model", "m", "--dataset", "d"], "--reward_model"),
        (
            feedback_patterns,
            ["--model", "m", "--dataset", "d", "--reward_model", "r", "--policy", "p"],
            "--seeds 1",
        ),
        (cue_control, ["--model", "m", "--dataset", "d", "--pairs", "p"], "benchmarks"),
        (cue_control, ["--model", "m", "--dataset", "d", "--truth"], "no cue is known"),
        (cue_control, ["--model", "m", "--dataset", "d", "--features", "3"], "--seeds 1"),
        (cue_control, ["--model", "m", "--dataset", "gone.jsonl"], "gone.jsonl"),
    ],
)
def test_flags_that_do_not_go_together(study, flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        study.main(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert words in error


# ------------------------------------------------------------------------- benchmarks without leaks


def files_of(own):
    return {name: str(own / f"{name}.jsonl") for name in ("rewardbench2", "rm_bench")}


def prompts_of(path):
    return {row["prompt"] for row in read_rows(path)}


@pytest.fixture
def written(own, tmp_path):
    """The folder with both sides of the benchmarks."""
    benchmark_data.write_sides(benchmark_data.divide_benchmarks(files_of(own)), str(tmp_path))
    return tmp_path


def test_no_question_is_on_both_sides(own, written):
    everything = prompts_of(own / "rewardbench2.jsonl") | prompts_of(own / "rm_bench.jsonl")
    assert len(everything) == 60  # ten are in both files
    learned = prompts_of(written / "prompts.jsonl")
    for name in ("demonstrations", "pairs", "texts"):
        assert prompts_of(written / f"{name}.jsonl") == learned
    kept = prompts_of(written / "rewardbench2.jsonl") | prompts_of(written / "rm_bench.jsonl")
    assert prompts_of(written / "held_out_prompts.jsonl") == kept
    assert not learned & kept
    assert learned | kept == everything
    assert len(kept) == 30


def test_rows_that_are_kept_are_the_files(own, written):
    for name in ("rewardbench2", "rm_bench"):
        rows = read_rows(own / f"{name}.jsonl")
        kept = read_rows(written / f"{name}.jsonl")
        places = [rows.index(row) for row in kept]
        assert places == sorted(places)


def test_pairs_have_a_right_and_a_wrong_answer_of_one_question(own, written):
    learned = prompts_of(written / "prompts.jsonl")
    expected = []
    for row in read_rows(own / "rewardbench2.jsonl"):
        if row["prompt"] in learned:
            for wrong in row["rejected"]:
                expected.append((row["prompt"], row["chosen"][0], wrong))
    for row in read_rows(own / "rm_bench.jsonl"):
        if row["prompt"] in learned:
            for right, wrong in zip(row["chosen"], row["rejected"]):
                expected.append((row["prompt"], right, wrong))
    pairs = []
    for row in read_rows(written / "pairs.jsonl"):
        pairs.append((row["prompt"], row["chosen"], row["rejected"]))
    assert pairs == expected


def test_questions_of_ties_are_kept(own, tmp_path):
    rows = read_rows(own / "rewardbench2.jsonl")
    for row in rows[:4]:
        row["subset"] = "Ties"
    for number, (tied, reference) in enumerate((rows[:2], rows[2:4])):
        tied["id"] = f"tied:{number}"
        tied["chosen"] = ["one", "two"]
        reference["id"] = f"ref:{number}"
    path = write_rows(tmp_path / "with_ties.jsonl", rows)
    sides = benchmark_data.divide_benchmarks({"rewardbench2": str(path)})
    kept = [row["prompt"] for row in sides.kept["rewardbench2"]]
    for row in rows[:4]:
        assert row["prompt"] in kept


# --------------------------------------------------------------------------------- whole pipelines


PICTURES = {
    overoptimisation: "ppo_noise0.25_kl0.05.png",
    generalisation: "generalisation.png",
    feedback_patterns: "probes.png",
    cue_control: "control.png",
}
# What is run once features are named: ablations, and PPO under control with its reference data.
NAMED_LATER = {feedback_patterns: "probe.py ablate", cue_control: "named"}


@pytest.mark.slow
@every_study
def test_a_whole_pipeline_runs_and_is_not_run_again(study, own_model, run_small):
    small = run_small(study, shlex.join(flags_of(study, own_model)))
    assert len(set(small.first)) == len(small.first)
    printed = small.run()
    assert small.ran == small.first
    assert "your own data: " in printed
    # The numbers of each run, or those of the tables.
    numbers = "cells.json" if study is overoptimisation else "summary.json"
    assert "nan" not in json.dumps(small.read(numbers)).lower()
    if find_spec("matplotlib"):
        assert small.has_picture(PICTURES[study])

    # Features are named after a first look: what is there stays.
    if study in NAMED_LATER:
        small.run("--features", "0,3")
        added = small.ran[len(small.first) :]
        assert added
        for command in added:
            assert NAMED_LATER[study] in command


# {what is different: flags, and how many commands of each script}
OTHER_PIPELINES = {
    "several SFT policies": (
        "--methods single pretrain_wco warm",
        # Members of two kinds and one by --average, after those of one kind.
        {"train_sft.py": 2, "train_rm.py": 4, "sample_bon.py": 4, "train_ppo.py": 3},
    ),
    "one SFT policy": (
        "--sft_dataset= --methods warm",
        {"train_rm.py": 2, "sample_bon.py": 2, "train_ppo.py": 1},
    ),
    "no gold": (
        "--gold_model= --methods wco",
        {"train_sft.py": 1, "train_rm.py": 1, "sample_bon.py": 2, "train_ppo.py": 1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("flags, scripts", OTHER_PIPELINES.values(), ids=OTHER_PIPELINES)
def test_other_pipelines_of_overoptimisation(own_model, tmp_path, run_small, flags, scripts):
    arguments = [*flags_of(overoptimisation, own_model), *shlex.split(flags)]
    small = run_small(overoptimisation, shlex.join(arguments))
    of_this = [command for command in small.first if str(small.folder) in command]
    assert Counter(command.split()[0] for command in of_this) == scripts
    printed = small.run()
    assert small.ran == small.first
    proxy_title = "Proxy on held-out prompts"
    assert (proxy_title in printed) == ("--gold_model=" in flags)
    # Signs that gold has fallen, and distances, are for the embedded world's gold and answers.
    for cell in small.read("cells.json")["cells"].values():
        result = cell["result"]
        if "distance" in result:
            assert set(result["distance"]) == {None}
            assert (None in result["gold"]) == ("--gold_model=" in flags)
