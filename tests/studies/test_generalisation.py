"""The study of generalisation and diversity (nanorlhf/studies/generalisation.py), reduced: what it
runs, and its numbers against loops.
"""

import math
import shlex
from statistics import fmean

import pytest
import torch
from support import parse_command, write_rows

from nanorlhf.diversity import ead
from nanorlhf.studies import common, generalisation

pytestmark = pytest.mark.slow

SMALL = """
    --seeds 2 --kl_coef 0.05 0.2 --steps 1 --prompts 4 --answers 3 --n 2 --jobs 1
    "--diversity_flags=--vocab_size 208 --truncate 5"
    "--sft_flags=--steps 15 --batch_size 16 --eval_size 8"
    "--rm_flags=--steps 4 --batch_size 8 --eval_size 16"
    "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 12"
    "--bon_flags=--max_new_tokens 12"
"""
CELLS = ["k1_0.05", "k1_0.2", "k2_0.05", "k2_0.2"]
SYSTEMS = ["sft", "best_of_n", *CELLS]
SEEDS = (0, 1)
SPLITS = ("test", "ood")


@pytest.fixture(scope="module")
def study(run_small):
    return run_small(generalisation, SMALL)


@pytest.fixture
def tables(study):
    return study.summary["tables"]


# ------------------------------------------------------------------------------------- what is run


def test_every_run_is_done_once(study):
    scripts = [command.split()[0] for command in study.first]
    expected = ["train_sft.py"]
    expected += 2 * ["train_rm.py"]  # a seed each
    expected += ["sample_bon.py"]  # the pool
    expected += 8 * ["train_ppo.py"]  # 4 cells, 2 seeds
    # Answers of SFT and 4 cells, and of best-of-n in 2 splits; diversity in 2 splits; 2 seeds.
    expected += 2 * (5 + 2 + 2) * ["sample_bon.py"]
    assert scripts == expected
    # A second time there is nothing to do.
    study.run()
    assert study.ran == study.first


def test_quick_marks_its_tables(study, tables):
    mark = " [QUICK, 2 seeds: not the study's numbers]"
    quick = study.run_quick()
    assert quick.count(mark) == len(tables)
    assert quick.replace(mark, "") == study.run()


@pytest.fixture
def full(study):
    """The settings of the full study: 4 coefficients, 5 seeds."""
    return study.settings(
        seeds=5,
        kl_coef=[0.02, 0.05, 0.1, 0.2],
        prompts=60,
        answers=16,
        n=16,
        steps=40,
        bon_flags="",
        ppo_flags="",
    )


def value_after(flag, words):
    return words[words.index(flag) + 1]


def test_how_many_runs_the_full_study_has(full):
    sft, rm, runs, answers, diversity = generalisation.commands(full)
    assert len(sft) == 1
    assert len(rm) == 5
    assert len(runs) == 1 + 5 * 8  # the pool; kinds of KL and coefficients, for each seed
    assert len(answers) == 5 * (9 + 2)  # SFT and 8 cells; best-of-n in 2 splits
    assert len(diversity) == 5 * 2


def test_every_run_of_the_full_study_has_a_folder_of_its_own(full):
    folders = []
    for stage in generalisation.commands(full):
        for command in stage:
            folders.append(value_after("--output_dir", shlex.split(command)))
    assert len(set(folders)) == len(folders)


def test_the_full_study_tries_every_coefficient_of_both_kinds(full):
    _, _, (_, *ppo), _, _ = generalisation.commands(full)
    found = set()
    for command in ppo:
        _, config = parse_command(command)
        assert config.kl_in == "reward"
        found.add((config.kl_kind, config.kl_coef, config.seed))
    expected = set()
    for kind in ("k1", "k2"):
        for coefficient in full.kl_coef:
            for seed in range(5):
                expected.add((kind, coefficient, seed))
    assert found == expected


def test_sfts_answers_are_not_the_pools(full):
    """No two policies sample with one seed: the pool, PPO's five, SFT's five."""
    noise = set()
    for stage in generalisation.commands(full):
        for command in stage:
            script, *words = shlex.split(command)
            if script == "sample_bon.py" and "--seed" in words:
                noise.add(int(value_after("--seed", words)))
    assert noise == {2000, *range(5), *range(1000, 1005)}


@pytest.mark.parametrize(
    "changes, is_done",
    [({}, True), ({"kl_coef": [0.05]}, False), ({"encoder": "another"}, False)],
    ids=["the same", "fewer systems", "another encoder"],
)
def test_diversity_is_measured_again_where_a_system_is_new(study, changes, is_done):
    settings = study.settings(**changes)
    *_, diversity = generalisation.commands(settings)
    assert len(diversity) == 4
    for command in diversity:
        assert generalisation.finished(settings, command) == is_done


# ------------------------------------------------------------------------------------- the answers


def read_answers(study, name, seed, split):
    """The rows of a system's answers, read here from its file: {prompt: [K rows]}."""
    file = "best_of_2" if name == "best_of_n" else "best_of_1"
    rows = {}
    for row in study.read_rows(f"answers/{name}/seed_{seed}/{split}/{file}.jsonl"):
        rows.setdefault(row["prompt"], []).append(row)
    return rows


def texts_of(rows):
    return [row["response"] for row in rows]


@pytest.mark.parametrize("split", SPLITS)
def test_systems_answer_the_same_prompts(study, split):
    expected = list(read_answers(study, "sft", 0, split))
    assert len(expected) == 4
    for name in SYSTEMS:
        for seed in SEEDS:
            answers = read_answers(study, name, seed, split)
            assert list(answers) == expected
            for rows in answers.values():
                assert len(rows) == 3


def test_splits_share_no_prompt(study):
    inside = read_answers(study, "sft", 0, "test")
    outside = read_answers(study, "sft", 0, "ood")
    assert not inside.keys() & outside.keys()


def test_best_of_n_keeps_the_best_of_its_own_answers(study):
    """Of six answers of the pool, taken two at a time."""
    pool = study.read_rows("pool/ood/pool.jsonl")
    scored = study.read_rows("answers/best_of_n/seed_1/ood/pool.jsonl")
    kept = read_answers(study, "best_of_n", 1, "ood")
    for row, scored_row in zip(pool, scored, strict=True):
        scores = scored_row["scores"]["seed_1"]
        best = []
        for i in (0, 2, 4):
            winner = i if scores[i] >= scores[i + 1] else i + 1
            best.append(row["responses"][winner])
        assert texts_of(kept[row["prompt"]]) == best


# -------------------------------------------------------------------------------------- the tables

# Some systems in some splits: (split, system, seed).
SOME = pytest.mark.parametrize(
    "split, name, seed", [("test", "k1_0.2", 0), ("ood", "best_of_n", 1), ("ood", "k2_0.05", 1)]
)


def win_points(x, y):
    """1 for a higher score, 0.5 in a tie, 0 for a lower one."""
    if x == y:
        return 0.5
    return float(x > y)


def scores_of(rows, label, seed):
    """The answers' gold scores, or the proxy's: those of the seed's reward model."""
    if label == "gold":
        return [row["gold"] for row in rows]
    return [row["scores"][f"seed_{seed}"] for row in rows]


@SOME
@pytest.mark.parametrize("label", ["gold", "proxy"])
def test_scores_and_win_rates_of_the_tables(study, tables, split, name, seed, label):
    own = read_answers(study, name, seed, split)
    sft = read_answers(study, "sft", seed, split)
    scores = []
    points = []
    for prompt in own:
        own_scores = scores_of(own[prompt], label, seed)
        sft_scores = scores_of(sft[prompt], label, seed)
        scores += own_scores
        for x in own_scores:
            for y in sft_scores:
                points.append(win_points(x, y))
    assert len(points) == 4 * 3 * 3
    row = tables[split][name]
    assert row[label][seed] == pytest.approx(fmean(scores))
    assert row[f"win {label}"][seed] == pytest.approx(fmean(points))


def mean_ead(texts):
    """The mean EAD of a set of texts over n-grams of 1 to 5 words; the vocabulary has 208."""
    return fmean(ead(texts, n, 208) for n in range(1, 6))


@SOME
@pytest.mark.parametrize("end, n_words", [("", None), (", cut", 5)], ids=["whole", "cut"])
def test_diversity_of_the_tables(study, tables, split, name, seed, end, n_words):
    """Of whole answers, and of answers cut to 5 words, as --truncate 5 has it."""
    answers = []  # [prompts][K] texts
    lengths = []
    for rows in read_answers(study, name, seed, split).values():
        cut_texts = []
        for text in texts_of(rows):
            words = text.split()[:n_words]
            cut_texts.append(" ".join(words))
            lengths.append(len(words))
        answers.append(cut_texts)

    per_prompt = [mean_ead(texts) for texts in answers]
    across_prompts = [mean_ead(texts) for texts in zip(*answers)]
    row = tables[split][name]
    assert row["in EAD" + end][seed] == pytest.approx(fmean(per_prompt))
    assert row["across EAD" + end][seed] == pytest.approx(fmean(across_prompts))
    assert row["length" + end][seed] == pytest.approx(fmean(lengths))
    assert 0 < row["in emb"][seed] < 1


def test_kl_of_the_tables(study, tables):
    # Best of 2: log n - (n - 1) / n.
    assert tables["ood"]["best_of_n"]["KL"] == pytest.approx([math.log(2) - 0.5] * 2)
    assert tables["test"]["sft"]["KL"] == [0, 0]
    # PPO measured its own.
    after = study.read("ppo/k2_0.2/seed_1/summary.json")["after"]
    assert tables["test"]["k2_0.2"]["KL"][1] == after["kl"]
    assert tables["ood"]["k2_0.2"]["KL"][1] == after["ood/kl"]


def test_sft_wins_half_of_the_pairs_against_itself(tables):
    assert tables["test"]["sft"]["win gold"] == [0.5, 0.5]


@pytest.mark.parametrize("seed", SEEDS)
def test_comparisons_are_paired_by_seed(tables, seed):
    def gold(title, name):
        return tables[title][name]["gold"][seed]

    def gap(name):
        return gold("test", name) - gold("ood", name)

    found = gold("gap, test less ood", "k1_0.2")
    assert found == pytest.approx(gap("k1_0.2"))
    found = gold("gap, test less ood, less SFT's", "k1_0.2")
    assert found == pytest.approx(gap("k1_0.2") - gap("sft"))
    found = gold("ood, less SFT", "k2_0.05")
    assert found == pytest.approx(gold("ood", "k2_0.05") - gold("ood", "sft"))
    found = gold("ood, largest less smallest coefficient", "k2")
    assert found == pytest.approx(gold("ood", "k2_0.2") - gold("ood", "k2_0.05"))
    found = gold("test, k2 less k1 at the same coefficient", "k2_0.2")
    assert found == pytest.approx(gold("test", "k2_0.2") - gold("test", "k1_0.2"))


# Made-up rows of the table of one seed. As in the study, the smaller coefficient of k1, whose KL is
# the larger, comes first.
ROWS = {
    "sft": {"KL": 0.0, "y": 1.0},
    "best_of_n": {"KL": 1.8, "y": 9.0},
    "k1_0.05": {"KL": 16.0, "y": 2.0},
    "k1_0.2": {"KL": 4.0, "y": 3.0},
    "k2_0.2": {"KL": 1.0, "y": 7.0},
    "k2_0.05": {"KL": 9.0, "y": 7.0},
    "k2_0.02": {"KL": 25.0, "y": 7.0},
}


@pytest.mark.parametrize("kl, expected", [(0, 1), (1, 2), (4, 3), (9, 2.5), (16, 2), (16.1, None)])
def test_between_cells_y_is_straight_in_the_root_of_the_kl(kl, expected):
    """SFT at sqrt(KL) 0, k1's cells at 2 and 4; beyond the last there is no number."""
    assert generalisation.k1_at_kl(ROWS, kl, "y") == pytest.approx(expected)


def test_a_seed_beyond_the_kl_of_k1_has_no_number():
    # At KL 9 k1 has 2.5, at KL 1 it has 2, at KL 25 nothing.
    at_9 = generalisation.less_at_its_kl(ROWS, "k2_0.05")
    at_1 = generalisation.less_at_its_kl(ROWS, "k2_0.2")
    at_25 = generalisation.less_at_its_kl(ROWS, "k2_0.02")
    assert at_9 == {"y": pytest.approx(4.5)}
    collected = generalisation.collect([at_1, at_25])
    assert collected["y"] == pytest.approx([5.0])


def test_a_cell_says_of_how_many_seeds_it_is_where_some_have_no_number():
    assert common.as_text([5.0, 5.0], 3) == "5.000 +- 0.000 (2)"
    assert common.as_text([], 3) == "-"


def test_answers_to_a_chat_are_read_like_others(tmp_path):
    chat = [{"role": "user", "content": "a room"}]
    rows = []
    for prompt, score in (("b", 1.0), (chat, 2.0), ("b", 3.0), (chat, 4.0)):
        rows.append({"prompt": prompt, "scores": {"rm": score}, "gold": None})
    scores = generalisation.read_scores(str(write_rows(tmp_path / "best_of_1.jsonl", rows)))
    assert scores.keys() == {"proxy"}
    assert scores["proxy"].tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_win_rates_count_ties_half():
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    b = torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    # First prompt: 1 = 1, 1 = 1, 2 > 1, 2 > 1. Second one: 0 < 3, 0 > -1, 0 < 3, 0 > -1.
    assert generalisation.win_rate(a, b) == (0.5 + 0.5 + 1 + 1 + 0 + 1 + 0 + 1) / 8
    assert generalisation.win_rate(a, b) + generalisation.win_rate(b, a) == 1


def test_picture(study):
    pytest.importorskip("matplotlib")
    assert study.has_picture("generalisation.png")
