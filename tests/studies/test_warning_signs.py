"""Signs that gold has fallen (nanorlhf/studies/warning_signs.py), by hand on made-up runs; and
(known_states.py) the Mahalanobis distance in numpy, and the distances of a real PPO run.
"""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from support import read_rows, refuses, small, train, write_rows
from tiny_models import PROMPTS, RESPONSES, tiny_config
from transformers import AutoModelForSequenceClassification

import sample_bon
from nanorlhf import world
from nanorlhf.models import RewardModel
from nanorlhf.studies import known_states, warning_signs
from nanorlhf.studies.known_states import KnownStates
from nanorlhf.studies.warning_signs import STEP, Sign

KL = Sign("kl", +1)
LENGTH = Sign("length", -1)


def read_numbers(text):
    """ "1 -2 -" -> [1.0, -2.0, None]"""
    return [None if word == "-" else float(word) for word in text.split()]


def make_run(gold, **columns):
    """A run with an evaluation every 5 steps, from the numbers of its columns: "0 1 -1"."""
    run = {"gold": read_numbers(gold)}
    run["step"] = [5 * i for i in range(len(run["gold"]))]
    for name, text in columns.items():
        run[name] = read_numbers(text)
    return run


# ------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_are_those_after_the_start_that_have_a_number():
    runs = [
        make_run("1 2 0.5 1", length="30 20 - 10"),
        make_run("1 0"),
        make_run("0 -1") | {"length": None},
        make_run("-2 -2.5", length="7 8"),
    ]
    expected = [(5, -20, False), (15, -10, False), (5, -8, True)]
    assert warning_signs.list_checkpoints(LENGTH, runs) == expected


def test_a_sign_says_its_direction():
    assert [KL.name, LENGTH.name] == ["kl +", "length -"]


# -------------------------------------------------------------------------------------------- AUC


def auc_by_hand(scores, has_fallen):
    """The share of pairs, of a fallen and another checkpoint, in which the fallen one is higher."""
    points = []
    for i, j in itertools.product(range(len(scores)), repeat=2):
        if has_fallen[i] and not has_fallen[j]:
            is_tie = scores[i] == scores[j]
            points.append(0.5 if is_tie else float(scores[i] > scores[j]))
    return sum(points) / len(points)


# Two seeds, and of each the scores, steps and labels of its checkpoints.
SEED_3 = [make_run("0 1 -1 -2", kl="0 4 3 9"), make_run("0 1 1", kl="0 1 9")]
SEED_8 = [make_run("0 2 -1", kl="0 5 5"), make_run("0 -1", kl="0 0")]
TWO_SEEDS = {3: SEED_3, 8: SEED_8}
OF_3 = [read_numbers(text) for text in ("4 3 9 1 9", "5 10 15 5 10", "0 1 1 0 0")]
OF_8 = [read_numbers(text) for text in ("5 5 0", "5 10 5", "0 1 1")]
OF_BOTH = [of_3 + of_8 for of_3, of_8 in zip(OF_3, OF_8)]


def measure_auc(sign, runs):
    """With as few resamples as show what is drawn: three of four resamples are sure to come."""
    return warning_signs.measure_auc(sign, runs, resamples=100)


def test_auc_counts_pairs_over_all_checkpoints():
    scores, steps, has_fallen = OF_BOTH
    row = measure_auc(KL, TWO_SEEDS)
    assert row["auc"] == pytest.approx(auc_by_hand(scores, has_fallen))
    of_step = auc_by_hand(steps, has_fallen)
    assert row["less_step"] == pytest.approx(row["auc"] - of_step)


def test_the_interval_draws_whole_seeds():
    """Of two seeds there are three different resamples: one of them twice, the other, and both."""
    aucs = []
    differences = []
    for scores, steps, has_fallen in (OF_3, OF_8, OF_BOTH):
        aucs.append(auc_by_hand(scores, has_fallen))
        differences.append(aucs[-1] - auc_by_hand(steps, has_fallen))
    row = measure_auc(KL, TWO_SEEDS)
    assert row["auc_interval"] == pytest.approx([min(aucs), max(aucs)])
    assert row["less_step_interval"] == pytest.approx([min(differences), max(differences)])


def test_a_sign_of_the_other_direction_has_the_rest_of_the_area():
    up = measure_auc(KL, TWO_SEEDS)
    down = measure_auc(Sign("kl", -1), TWO_SEEDS)
    assert up["auc"] + down["auc"] == pytest.approx(1)


def test_step_is_compared_on_the_same_checkpoints():
    """A column that is missing in one seed, and is the step in the others, is no better than it."""
    with_column = [{**run, "kl": run["step"]} for run in SEED_3]
    without = [make_run("0 1")]
    row = measure_auc(KL, {0: with_column, 1: without, 2: with_column})
    assert row["auc"] < 1
    assert row["less_step"] == 0
    assert row["less_step_interval"] == [0, 0]


RISING = make_run("0 1", kl="0 1")
FALLING = make_run("0 -1", kl="0 2")


@pytest.mark.parametrize(
    ("runs", "auc", "has_interval"),
    [
        ({}, math.nan, False),
        ({0: [make_run("0 1")]}, math.nan, False),  # no such column
        ({0: [RISING], 1: [RISING]}, math.nan, False),  # gold never falls
        ({0: [RISING, FALLING]}, 1.0, False),  # one seed
        ({0: [RISING], 1: [FALLING]}, 1.0, True),  # two of four resamples have both kinds
    ],
)
def test_what_cannot_be_known_is_nan(runs, auc, has_interval):
    row = measure_auc(KL, runs)
    assert row["auc"] == pytest.approx(auc, nan_ok=True)
    assert math.isnan(row["less_step"]) == math.isnan(auc)
    for end in row["auc_interval"] + row["less_step_interval"]:
        assert math.isfinite(end) == has_interval


# ------------------------------------------------------------------------------ alarms and leads


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_lowest_with_few_alarms(seed):
    """Ties included: all scores are tried, the lowest first."""
    generator = random.Random(seed)
    scores = [generator.randint(0, 8) for _ in range(generator.randint(1, 40))]
    for rate in (0, 0.05, 0.3):
        allowed = []
        for threshold in scores:
            n_alarms = sum(score > threshold for score in scores)
            if n_alarms <= rate * len(scores):
                allowed.append(threshold)
        assert warning_signs.choose_threshold(scores, rate) == min(allowed)


def test_the_lead_is_the_fall_less_the_alarm():
    """The first seed's good checkpoints set a threshold of 10 for the second, at a rate of 0."""
    threshold = make_run("0 1 1", kl="99 10 2")
    second = [
        make_run("0 1 1 -1 1", kl="50 11 0 0 0"),  # the fall at 15, the alarm at 5
        make_run("0 -1 1 1", kl="0 10 10 10.5"),  # at 5, at 15
        make_run("0 -1 0", kl="0 12 12"),  # both at 5
        make_run("0 0 0", kl="0 1 2"),  # never below its start, no alarm
        make_run("0 0 0", kl="0 1 12"),  # the same, and a false alarm
    ]
    row = warning_signs.measure_leads(KL, {1: [threshold], 2: second}, rate=0)
    assert row["falling_runs"] == 3
    assert row["lead"] == 0  # the median of 10, -10 and 0
    assert row["warned"] == pytest.approx(2 / 3)
    # The first seed's run never falls. Its threshold, 12, is the second seed's: no alarm.
    assert row["other_runs"] == 3
    assert row["false_alarms"] == pytest.approx(1 / 3)


def test_a_seed_does_not_set_its_own_threshold():
    """One seed alone has huge values. It has an alarm, since its own bar of 2000 is left out."""
    ordinary = make_run("0 1 1 -1", kl="0 1 2 3")
    huge = make_run("0 1 1 -1", kl="0 1000 2000 1500")
    row = warning_signs.measure_leads(KL, {0: [ordinary], 1: [ordinary], 2: [huge]}, rate=0)
    assert row["falling_runs"] == 3
    assert row["warned"] == pytest.approx(1 / 3)
    # For the others it is the bar, and their 3 is no alarm.
    assert row["lead"] == -math.inf


def test_fallen_checkpoints_set_no_threshold():
    """The first seed's 80 is an alarm that is right, so the second seed's bar is 5."""
    first = make_run("0 1 -1", kl="0 5 80")
    second = make_run("0 1 -1", kl="0 6 6")
    row = warning_signs.measure_leads(KL, {0: [first], 1: [second]}, rate=0)
    assert row["warned"] == 1
    assert row["lead"] == 2.5  # the median of 0 and 5


def test_most_runs_without_an_alarm_have_no_lead():
    """A run without an alarm counts as a lead below every number, and not as none."""
    bar = make_run("0 1", kl="0 5")
    early = make_run("0 1 -1", kl="0 9 9")
    silent = make_run("0 1 -1", kl="0 1 1")

    def median_lead(*runs):
        return warning_signs.measure_leads(KL, {0: [bar], 1: list(runs)}, rate=0)["lead"]

    assert median_lead(early, early, silent) == 5
    assert median_lead(early, silent) == median_lead(early, silent, silent) == -math.inf


@pytest.mark.parametrize("runs", [{}, {0: SEED_3}, {0: [make_run("0 1")], 1: []}])
def test_without_another_seed_or_without_the_column_there_is_no_lead(runs):
    row = warning_signs.measure_leads(KL, runs)
    for name in ("lead", "warned", "false_alarms"):
        assert math.isnan(row[name])
    assert row["falling_runs"] == row["other_runs"] == 0


def test_seeds_without_the_column_take_no_part():
    without = {5: [make_run("0 -1")], 6: [make_run("0 1", kl="- -")]}
    expected = warning_signs.measure_leads(KL, TWO_SEEDS)
    assert warning_signs.measure_leads(KL, TWO_SEEDS | without) == expected


def make_noise(generator, n_seeds=10, n_runs=20):
    """Runs with noise beside gold, which falls late in every other run."""
    runs = {}
    for seed in range(n_seeds):
        runs[seed] = []
        for k in range(n_runs):
            gold = "0 1 1 1 1 1 1 1 1"
            if k % 2:
                gold = "0 1 1 1 1 -1 -1 -1 -1"
            run = make_run(gold)
            run["noise"] = [generator.gauss(0, 1) for _ in run["step"]]
            runs[seed].append(run)
    return runs


def test_noise_is_no_sign():
    """The step is one: a third of the checkpoints that have not fallen are as late."""
    runs = make_noise(random.Random(0))
    signs = (STEP, Sign("noise", +1))
    table = warning_signs.compare_signs(runs, signs, resamples=100)
    noise = table["noise +"]
    low, high = noise["auc_interval"]
    assert 0.4 < low < noise["auc"] < high < 0.6
    low, high = noise["less_step_interval"]
    assert low < noise["less_step"] < high < 0
    assert table["step +"]["auc"] == pytest.approx(2 / 3 + 1 / 3 * 1 / 2)
    assert table["step +"]["less_step"] == 0

    # An alarm at one checkpoint in 20: at one of five up to the fall, or of a good run's eight.
    assert noise["lead"] == -math.inf
    assert noise["warned"] == pytest.approx(1 - 0.95**5, abs=0.1)
    assert noise["false_alarms"] == pytest.approx(1 - 0.95**8, abs=0.1)


def test_the_table_has_a_line_for_each_sign(capsys):
    table = warning_signs.compare_signs(TWO_SEEDS, resamples=100)
    assert list(table)[:3] == ["step +", "kl +", "variance +"]
    assert table["kl +"]["auc"] == measure_auc(KL, TWO_SEEDS)["auc"]
    assert table["kl +"]["lead"] == warning_signs.measure_leads(KL, TWO_SEEDS)["lead"]

    warning_signs.print_signs(table)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == "AUC less that of step lead warned false alarms".split()
    of_step, _, of_variance, *_ = lines
    assert of_step.startswith("step +")
    assert "0.00 [0.00, 0.00]" in of_step
    assert of_variance.split() == ["variance", "+", "-", "-", "-", "-", "-"]
    assert len(lines) == len(warning_signs.SIGNS)
    for line in lines:
        assert len(line) == len(header)


@pytest.mark.parametrize(
    ("lead", "text"), [(math.nan, "-"), (-math.inf, "none"), (-5.0, "-5"), (10, "10")]
)
def test_a_lead_says_where_there_is_none(lead, text):
    assert warning_signs.lead_as_text(lead) == text


# -------------------------------------------------------------------------------------- distances


def make_states(n, d, seed=0):
    """States with a mean and a covariance that are neither 0 nor diagonal."""
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(d, d, generator=generator).double()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator).double() @ mixture + 3


def distance_by_hand(known, h, s):
    """One state's distance, with an inverse: sqrt((h - mean)' S^-1 (h - mean))."""
    known = known.double().numpy()
    shrunk = np.cov(known, rowvar=False)
    for i, j in itertools.permutations(range(len(shrunk)), 2):
        shrunk[i, j] *= 1 - s
    deviation = h.double().numpy() - known.mean(0)
    return math.sqrt(deviation @ np.linalg.inv(shrunk) @ deviation)


@pytest.mark.parametrize("s", [0, 1e-4, 0.3, 1])
def test_distance_is_mahalanobis_with_correlations_made_smaller(s):
    known = make_states(40, 5)
    others = make_states(7, 5, seed=1)
    expected = [distance_by_hand(known, h, s) for h in others]
    assert KnownStates(known, s).distance(others).tolist() == pytest.approx(expected)


def test_known_states_have_a_mean_square_of_about_d():
    """sum_i d_i^2 = tr(S^-1 sum_i (h_i - mean)(h_i - mean)') = (N - 1) D, exactly."""
    known = make_states(50, 6)
    squares = KnownStates(known, 0).distance(known).square()
    assert squares.mean().item() == pytest.approx(6 * 49 / 50)


def test_distances_do_not_depend_on_the_coordinates():
    """Without shrinkage on none of them; with it not on their units, but on how they are mixed."""
    known = make_states(40, 4)
    others = make_states(5, 4, seed=1)
    units = torch.tensor([1e-3, 1, 20, 7], dtype=torch.float64).diag()
    mixture = make_states(4, 4, seed=2)

    def measure(s, matrix):
        """The distances of the others where all states are h -> h matrix - 5."""
        states = KnownStates(known @ matrix - 5, s)
        return states.distance(others @ matrix - 5).tolist()

    for s in (0, 0.5):
        expected = pytest.approx(KnownStates(known, s).distance(others).tolist(), rel=1e-3)
        assert measure(s, units) == expected
        is_same = measure(s, mixture) == expected
        assert is_same == (s == 0)


def test_states_behind_a_layernorm_have_distances():
    """They never vary in one direction, so their covariance has no inverse."""
    norm = torch.nn.LayerNorm(6).double()
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    known = norm(make_states(60, 6)).detach()
    covariance = np.cov(known.numpy(), rowvar=False)
    assert np.linalg.eigvalsh(covariance)[0] < 1e-12
    # So five of six dimensions are left; the shrinkage takes a little.
    squares = KnownStates(known).distance(known).square()
    assert squares.mean().item() == pytest.approx(5 * 59 / 60, rel=0.01)


@pytest.mark.parametrize("hidden", [torch.ones(1, 3), torch.tensor([[1.0, 2.0], [3.0, 2.0]])])
def test_states_that_do_not_vary_are_refused(hidden):
    with pytest.raises(ValueError, match="all vary"):
        KnownStates(hidden)


def test_hidden_states_are_those_at_the_last_token(monkeypatch):
    """Against Hugging Face, one text at a time, without padding; and in several chunks."""
    torch.manual_seed(0)
    config = tiny_config("neox")
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = []
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        rows.append({"prompt_ids": prompt, "response_ids": response})
        with torch.no_grad():
            out = model(torch.tensor([prompt + response]), output_hidden_states=True)
        expected.append(out.hidden_states[-1][0, -1])

    monkeypatch.setattr(known_states, "CHUNK", 2)
    hidden = known_states.hidden_states(RewardModel(model), rows)
    torch.testing.assert_close(hidden, torch.stack(expected), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- from files


def test_an_answer_of_a_pool_has_its_eos_unless_it_was_cut_off(tmp_path):
    """Two tokens at most were sampled: one word and its end, or two words."""
    tokenizer = world.tokenizer()
    row = {"prompt": "the room :", "responses": ["was", "was bright", "was"]}
    path = write_rows(tmp_path / "pool.jsonl", [row, row])
    rows = known_states.read_pool_answers(str(path), 2, tokenizer, {"max_new_tokens": 2})
    was, bright = tokenizer("was bright", add_special_tokens=False).input_ids
    answers = [[was, tokenizer.eos_token_id], [was, bright]]
    assert [row["response_ids"] for row in rows] == answers * 2
    assert [row["prompt_ids"] for row in rows] == [tokenizer("the room :").input_ids] * 4


@pytest.fixture(scope="module")
def ppo_run(base, tmp_path_factory):
    """A PPO run against two reward models, with three evaluations of 40 answers."""
    folder = tmp_path_factory.mktemp("warning") / "ppo"
    train(
        base,
        "ppo",
        folder,
        reward_model=[f"{base}/rm", f"{base}/sarm"],
        steps=2,
        eval_every=1,
        eval_size=40,
    )
    return folder


def states_by_hand(folder, rows):
    """The reward model's last hidden states by Hugging Face, one text at a time: [N, D]."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    states = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        states.append(out.hidden_states[-1][0, -1])
    return torch.stack(states)


def mean_distance(base, known_rows, rows):
    """The mean distance of texts from known ones, by hand. rows {prompt_ids, response_ids}"""
    known = states_by_hand(base / "rm/model", known_rows)
    states = states_by_hand(base / "rm/model", rows)
    return np.mean([distance_by_hand(known, h, 1e-4) for h in states])


@pytest.fixture(scope="module")
def pool_folder(base, tmp_path_factory):
    """Best-of-n with 40 answers to each of six of the run's prompts."""
    folder = tmp_path_factory.mktemp("warning") / "bon"
    settings = small(base, "bon", n_answers=40, eval_size=6)
    sample_bon.main(sample_bon.Config(output_dir=str(folder), **settings))
    return folder


def read_pool(folder):
    """The rows of the first 30 answers to each of a pool's prompts."""
    settings = {"max_new_tokens": 12}
    return known_states.read_pool_answers(f"{folder}/pool.jsonl", 30, world.tokenizer(), settings)


@pytest.mark.slow
def test_answers_of_a_pool_are_the_tokens_that_were_sampled(pool_folder):
    """All but the control tokens in their middle, which no text has."""
    (cache,) = (pool_folder / "cache").glob("answers_*.jsonl")
    control_ids = set(world.tokenizer().all_special_ids)
    expected = []
    for row in read_rows(cache):
        for ids in row["response_ids"][:30]:
            expected.append({"prompt_ids": row["prompt_ids"], "response_ids": ids})

    n_same = 0
    for row, sampled in zip(read_pool(pool_folder), expected, strict=True):
        if control_ids.isdisjoint(sampled["response_ids"][:-1]):
            assert row == sampled
            n_same += 1
    assert n_same > 150


@pytest.mark.slow
def test_only_answers_to_prompts_of_the_pool_are_measured(base, ppo_run, pool_folder, tmp_path):
    known_rows = read_pool(pool_folder)
    known_prompts = [row["prompt_ids"] for row in known_rows]
    pool = f"{pool_folder}/pool.jsonl"
    distances = known_states.measure_distances(str(ppo_run), pool, answers_each=30)
    assert len(set(distances)) == 3
    for step, distance in enumerate(distances):
        rows = []
        for row in read_rows(ppo_run / f"eval/step_{step}.jsonl"):
            if row["prompt_ids"] in known_prompts:
                rows.append(row)
        assert 0 < len(rows) < 40
        assert distance == pytest.approx(mean_distance(base, known_rows, rows), rel=0.01)

    # A pool without any of the run's prompts cannot say anything.
    other = {"prompt": "the room :", "responses": ["was bright", "was grey", "was a bar ."]}
    path = write_rows(tmp_path / "other.jsonl", [other])
    words = ["other.jsonl has none of the prompts"]
    refuses(known_states.measure_distances, str(ppo_run), str(path), match=words)


@pytest.mark.slow
def test_a_reward_that_is_no_model_has_no_distances(base, tmp_path):
    train(base, "ppo", tmp_path / "ppo", steps=1)
    pool = str(tmp_path / "pool.jsonl")
    refuses(known_states.measure_distances, str(tmp_path / "ppo"), pool, match=["is no model"])
