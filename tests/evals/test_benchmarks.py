"""probe.py evaluate and its maths, against loops over scores that stand in the texts themselves.

    K rewards, A answers to a prompt

An answer here is "3 word word 1": two rewards read its first or its last number. So an expected
figure is a loop over the rows of a file.
"""

import itertools
import json
import math
import random
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from checks import refuses, seeded
from support import join, probe_refused, ranks, run_probe, summary, write_rows
from transformers import AutoModelForCausalLM

import train_rm
from nanorlhf import splits, world
from nanorlhf.evals.benchmark_files import Item, read_pairs
from nanorlhf.evals.benchmark_scores import (
    hard_normal_easy,
    mean_of_groups,
    shared_credit,
    style_wins,
    ties_score,
    ties_terms,
)
from nanorlhf.evals.benchmarks import scores_of
from nanorlhf.models import (
    Policy,
    load_reward_model,
    load_tokenizer,
    save_policy,
    save_reward_model,
)
from nanorlhf.runtime.distributed import Dist, setup, shutdown
from nanorlhf.stats import bootstrap, pair_wins

REWARD = """
def last(prompts, responses):
    return [float(r.split()[-1]) for r in responses]


def first(prompts, responses):
    return [float(r.split()[0]) for r in responses]
"""
LAST = "reward.py:last"  # the rewards' names in a summary
FIRST = "reward.py:first"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    (root / "reward.py").write_text(REWARD)
    return root


def draw_answer(rng, low=0, high=4):
    """A text that holds two scores; few different ones, so that there are ties."""
    first = rng.randint(low, high)
    words = "word " * rng.randint(0, 5)
    return f"{first} {words}{rng.randint(low, high)}"


def draw_answers(rng, n, low=0, high=4):
    return [draw_answer(rng, low, high) for _ in range(n)]


def read_first(text):
    return float(text.split()[0])


def read_last(text):
    return float(text.split()[-1])


def evaluate(folder, path, *flags, rewards=("last",)):
    """Run the command on a file -> its summary. The results go beside the file."""
    specs = [f"{folder / 'reward.py'}:{name}" for name in rewards]
    out = path.with_suffix("")
    run_probe("evaluate", "--reward_model", *specs, "--dataset", path, "--output_dir", out, *flags)
    return summary(out)


def evaluate_rows(folder, name, rows, *flags, **kwargs):
    """evaluate() of rows that are written to a file with this name."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows))
    return evaluate(folder, path, *flags, **kwargs)


def values_of(figures, names):
    """The values of some figures, without their intervals. A figure is (value, low, high)."""
    return {name: figures[name][0] for name in names}


# ------------------------------------------------------------------------------ scores of rewards


def save_random_policy(folder, **sizes):
    """A policy of random weights on the embedded world's words -> its folder as a string."""
    config = world.model_config()
    for name, size in sizes.items():
        setattr(config, name, size)
    policy = Policy(AutoModelForCausalLM.from_config(config), value_head=False)
    save_policy(policy, world.tokenizer(), str(folder))
    return str(folder)


def score_one_text(root, specs):
    """The scores of a single text by each reward, by all processes together -> root/scores.json."""
    dist = setup("cpu")
    config = SimpleNamespace(max_length=0, chat_template=False, micro_batch_size=4, dtype="float32")
    item = Item("review the hotel :", ["3 word 2"], correct=1, group="all", unit="0")
    found = []
    for spec in specs:
        scores, _ = scores_of(spec, [item], config, dist)
        found.append(scores.tolist())
    if dist.main:
        (root / "scores.json").write_text(json.dumps(found))
    dist.barrier()
    shutdown()


@pytest.mark.slow
def test_fewer_texts_than_processes(folder):
    """The second of two processes has no text: no model and no function is asked to score none."""
    # It reads the first of its texts: with none it fails.
    (folder / "strict.py").write_text(
        "def last(prompts, responses):\n"
        "    return [float(responses[0].split()[-1])] * len(prompts)\n"
    )
    torch.manual_seed(0)
    lm = save_random_policy(folder / "few_lm")
    rm = str(folder / "few_rm")
    save_reward_model(load_reward_model(lm, seed=1), world.tokenizer(), rm)

    specs = [f"{folder}/strict.py:last", rm, "world:gold"]
    join(*ranks(2, score_one_text, folder, specs, STDERR=str(folder / "stderr")))

    strict, of_model, gold = json.loads((folder / "scores.json").read_text())
    assert strict == [2.0]
    assert len(of_model) == 1
    assert of_model != [0.0]
    assert len(gold) == 1


def test_a_reward_model_as_train_rm_measures_it(folder):
    """The same held-out pairs, the same cuts, the same scores."""
    torch.manual_seed(0)
    lm = save_random_policy(
        folder / "lm", num_hidden_layers=1, hidden_size=32, intermediate_size=64
    )
    model = load_reward_model(lm, seed=1)
    torch.nn.init.normal_(model.model.score.weight, generator=seeded(2))
    save_reward_model(model, world.tokenizer(), str(folder / "rm"))

    config = train_rm.Config(
        model=lm, eval_size=100, max_length=24, output_dir=str(folder / "unused")
    )
    _, held_out, *_ = splits.load(config, "pairs")
    dist = Dist(0, 1, torch.device("cpu"))
    pairs, _ = train_rm.encode_pairs(held_out, load_tokenizer(lm), 24, config)
    expected, _ = train_rm.evaluate(model.eval(), pairs, config, dist)

    rewards = ("--reward_model", folder / "rm", "world:gold")
    sizes = ("--eval_size", 100, "--max_length", 24)
    run_probe("evaluate", *rewards, *sizes, "--output_dir", folder / "out_rm")
    found = summary(folder / "out_rm")

    of_model = found["rewards"]["rm"]
    assert of_model["accuracy"][0] == pytest.approx(expected["accuracy"], abs=1e-9)
    assert of_model["margin"][0] == pytest.approx(expected["margin"], rel=1e-4)
    assert found["rewards"]["world:gold"]["accuracy"][0] == 1
    # Some answers were longer than 24 tokens.
    assert found["cut"]["rm"] > 0


# ----------------------------------------------------------------------------------------- pairs


def test_pairs_of_one_prompt_are_one_unit(folder):
    """Also where the prompt is written with other blanks."""
    rows = []
    for i in range(3):
        for blank in (" ", "  ", "\n"):
            rows.append({"prompt": f"p{blank}{i}", "chosen": "2", "rejected": "1"})
    path = write_rows(folder / "pairs_of_one_prompt.jsonl", rows)
    config = SimpleNamespace(dataset=str(path), eval_size=0, columns=[])
    units = [item.unit for item in read_pairs(config)]
    assert units == ["p 0"] * 3 + ["p 1"] * 3 + ["p 2"] * 3


def test_a_pair_is_won_tied_or_lost():
    wins = pair_wins(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert wins.tolist() == [1, 0.5, 0]


def draw_pairs():
    """Up to 80 pairs of different answers, two to a prompt."""
    rng = random.Random(3)
    rows = []
    for i in range(80):
        chosen = draw_answer(rng, 1, 4)
        rejected = draw_answer(rng, 0, 3)
        if chosen != rejected:
            rows.append({"prompt": f"p{i // 2}", "chosen": chosen, "rejected": rejected})
    return rows


def mean_points(margins):
    """1 for a positive margin, 1/2 for none: the mean."""
    points = []
    for margin in margins:
        if margin == 0:
            points.append(0.5)
        else:
            points.append(1 if margin > 0 else 0)
    return mean(points)


def margins_by(score, rows):
    return [score(row["chosen"]) - score(row["rejected"]) for row in rows]


def test_accuracy_and_margin_of_two_rewards(folder):
    rows = draw_pairs()
    margins = {LAST: margins_by(read_last, rows), FIRST: margins_by(read_first, rows)}
    longer = mean_points(margins_by(len, rows))

    found = evaluate_rows(folder, "pairs", rows, "--eval_size", 0, rewards=("last", "first"))

    rewards = found["rewards"]
    for name in (LAST, FIRST):
        assert rewards[name]["accuracy"][0] == pytest.approx(mean_points(margins[name]))
        assert rewards[name]["margin"][0] == pytest.approx(mean(margins[name]))
    # Differences are to the first reward.
    difference = mean_points(margins[FIRST]) - mean_points(margins[LAST])
    assert found["differences"][FIRST]["accuracy"][0] == pytest.approx(difference)
    assert rewards["longer wins"]["accuracy"][0] == pytest.approx(longer)
    assert rewards["shorter wins"]["accuracy"][0] == pytest.approx(1 - longer)
    assert found["units"] == 40
    assert found["prompts"] == 40


def test_an_interval_does_not_shrink_when_each_pair_stands_three_times(folder):
    """It draws whole prompts, which know no more for being repeated."""
    rows = draw_pairs()
    once = evaluate_rows(folder, "once", rows, "--eval_size", 0)["rewards"][LAST]
    thrice = evaluate_rows(folder, "thrice", rows * 3, "--eval_size", 0)["rewards"][LAST]
    for metric in ("accuracy", "margin"):
        assert thrice[metric] == pytest.approx(once[metric])
        value, low, high = thrice[metric]
        assert low < value < high


# ---------------------------------------------------------------------------------- RewardBench 2


def test_shared_credit_against_loops():
    """The chosen answer, the first, gets 1 / n where it is one of n best ones."""
    scores = torch.randint(0, 4, (200, 4), generator=seeded(0)).double()  # [prompts, A]
    expected = []
    for row in scores.tolist():
        best = max(row)
        expected.append(1 / row.count(best) if row[0] == best else 0.0)
    # The example has all cases: 0, 1, 1/2, 1/3 and 1/4.
    assert len(set(expected)) == 5

    assert shared_credit(scores).tolist() == expected


def gap_of(correct, incorrect):
    """By how much correct answers are above incorrect ones at least, over all pairs."""
    return min(c - i for c, i in itertools.product(correct, incorrect))


def spread_of(correct):
    """How far two correct answers are apart at most."""
    return max(abs(a - b) for a, b in itertools.combinations(correct, 2))


def margin_score(gap, spread):
    """tanh(gap / spread - 1), and its limits where the spread is 0."""
    if spread:
        return math.tanh(gap / spread - 1)
    if gap == 0:
        return 0.0
    return math.copysign(1, gap)


def share_right(prompts):
    """In how many prompts every correct answer is above every incorrect one."""
    right = []
    for answers in prompts.values():
        right.append(all(c > i for c, i in itertools.product(*answers)))
    return mean(right)


def ties_by_loops(tied, reference):
    """{prompt: (correct, incorrect)} of both kinds -> the score, as the leaderboard's code has it.

    A tied prompt has several correct answers, which should be close to each other and above all
    others; the same prompt's reference has one. The other three terms are over prompts with both.
    """
    easy = []
    hard = []
    margins = []
    for prompt in set(tied) & set(reference):
        spread = spread_of(tied[prompt][0])
        gap = gap_of(*tied[prompt])
        least_gap = min(gap, gap_of(*reference[prompt]))
        easy.append(gap > spread)
        hard.append(least_gap > spread)
        margins.append(margin_score(least_gap, spread))
    accuracy = 0.3 * share_right(tied) + 0.3 * share_right(reference)
    return accuracy + 0.2 * mean(easy) + 0.2 * mean(hard) + 0.01 * mean(margins)


def draw_scores(rng, n, low):
    return [rng.randint(low, low + 3) for _ in range(n)]


def draw_tied(rng):
    """Scores of 2 to 6 correct answers and 1 to 5 incorrect ones."""
    correct = draw_scores(rng, rng.randint(2, 6), 2)
    return correct, draw_scores(rng, rng.randint(1, 5), rng.randint(-4, 0))


def draw_reference(rng):
    correct = draw_scores(rng, 1, 2)
    return correct, draw_scores(rng, rng.randint(1, 5), rng.randint(-3, 0))


def floats(numbers):
    return torch.tensor(numbers, dtype=torch.float32)


def terms_of_prompt(halves):
    """ties_terms() of {"tied": (correct, incorrect), "reference": ...}, or of one of the two."""
    tensors = {}
    for name, (correct, incorrect) in halves.items():
        tensors[name] = (floats(correct), floats(incorrect))
    return ties_terms(**tensors)


def score_prompts(tied, reference):
    """ties_score() of {prompt: (correct, incorrect)} of both kinds."""
    values = []
    counted = []
    for prompt in sorted(set(tied) | set(reference)):
        halves = {}
        if prompt in tied:
            halves["tied"] = tied[prompt]
        if prompt in reference:
            halves["reference"] = reference[prompt]
        terms, has_term = terms_of_prompt(halves)
        values.append(terms)
        counted.append(has_term)
    return ties_score(torch.stack(values), torch.stack(counted)).item()


@pytest.mark.parametrize("missing", [False, True])
def test_ties_against_loops(missing):
    """300 prompts with small whole scores; with `missing`, some prompts have one half only."""
    rng = random.Random(0)
    tied = {}
    reference = {}
    for prompt in range(300):
        if not missing or prompt % 3:
            tied[prompt] = draw_tied(rng)
    for prompt in range(300):
        if not missing or prompt % 5:
            reference[prompt] = draw_reference(rng)

    score = score_prompts(tied, reference)

    assert score == pytest.approx(ties_by_loops(tied, reference), abs=1e-12)
    assert 0.2 < score < 0.9


@pytest.mark.parametrize("incorrect, expected", [(0.0, 1), (1.0, 0), (2.0, -1)])
def test_the_margin_of_answers_without_a_spread(incorrect, expected):
    """Gaps of 1, 0 and -1 over a spread of 0: the limits of the tanh, and 0 for 0 / 0."""
    tied = (torch.tensor([1.0, 1.0]), torch.tensor([incorrect]))
    reference = (torch.tensor([9.0]), torch.tensor([0.0]))
    terms, _ = ties_terms(tied, reference)
    margin = terms[4].item()
    assert margin == expected


def test_a_perfect_model_has_1_01():
    """0.3 + 0.3 + 0.2 + 0.2 + 0.01: correct answers that are close, and far above."""
    correct = [50.0, 50.001]
    tied = {0: (correct, [-50.0])}
    reference = {0: (correct[:1], [-50.0])}
    assert score_prompts(tied, reference) == pytest.approx(1.01)


def test_ties_need_a_half_and_two_correct_answers():
    with refuses("tied answers or the reference"):
        ties_terms()
    with refuses("at least two"):
        ties_terms((torch.tensor([50.0]), torch.tensor([-50.0])))


def draw_rewardbench2_rows(rng):
    """30 prompts with one best answer of four, and 12 of the subset Ties with both halves."""
    rows = []
    for i in range(30):
        rows.append(
            {
                "id": str(i),
                "prompt": f"p{i}",
                "chosen": [draw_answer(rng, 1)],
                "rejected": draw_answers(rng, 3),
                "num_correct": 1,
                "num_incorrect": 3,
                "total_completions": 4,
                "subset": "Math" if i < 8 else "Safety",
            }
        )
    for i in range(12):
        for kind, n_correct in (("ref", 1), ("tied", rng.randint(2, 5))):
            rows.append(
                {
                    "id": f"{kind}:{i}",
                    "prompt": f"t{i}",
                    "chosen": draw_answers(rng, n_correct, 3, 5),
                    "rejected": draw_answers(rng, 4, 0, 3),
                    "num_correct": n_correct,
                    "num_incorrect": 4,
                    "subset": "Ties",
                }
            )
    rng.shuffle(rows)
    return rows


def score_rewardbench2_by_loops(rows):
    """{"Math", "Safety", "ties": score}."""
    credits = {"Math": [], "Safety": []}
    halves = {"tied": {}, "ref": {}}
    for row in rows:
        chosen = [read_last(text) for text in row["chosen"]]
        rejected = [read_last(text) for text in row["rejected"]]
        if row["subset"] == "Ties":
            kind, number = row["id"].split(":")
            halves[kind][number] = (chosen, rejected)
        else:
            scores = chosen + rejected
            is_best = chosen[0] == max(scores)
            credits[row["subset"]].append(is_best / scores.count(max(scores)))
    return {
        "Math": mean(credits["Math"]),
        "Safety": mean(credits["Safety"]),
        "ties": ties_by_loops(halves["tied"], halves["ref"]),
    }


REWARDBENCH2 = ("--benchmark", "rewardbench2")


def test_rewardbench2_against_loops(folder):
    rows = draw_rewardbench2_rows(random.Random(5))
    expected = score_rewardbench2_by_loops(rows)

    found = evaluate_rows(folder, "rewardbench2", rows, *REWARDBENCH2)["rewards"][LAST]

    assert values_of(found, expected) == pytest.approx(expected)
    assert found["overall"][0] == pytest.approx(mean(expected.values()))
    for value, low, high in found.values():
        assert low <= value <= high
        assert low < high


def flatten_rows(rows):
    """The flat form of the same prompts: a row for each rejected answer."""
    flat = []
    for i, row in enumerate(rows):
        for rejected in row["rejected"]:
            flat.append(
                {
                    "question_id": row["id"],
                    "prompt": row["prompt"],
                    "chosen": row["chosen"][0],
                    "rejected": rejected,
                    "id": i,
                    "subset": row["subset"],
                }
            )
    return flat


@pytest.mark.slow
def test_rewardbench2_in_other_forms(folder):
    """A flat file is the same prompts, and so is a parquet file."""
    import datasets

    drawn = draw_rewardbench2_rows(random.Random(6))
    rows = [row for row in drawn if row["subset"] != "Ties"]
    nested = evaluate_rows(folder, "nested", rows, *REWARDBENCH2)

    flat = evaluate_rows(folder, "flat", flatten_rows(rows), *REWARDBENCH2)
    assert flat["rewards"] == nested["rewards"]
    assert flat["answers"] == 4 * len(rows)

    path = folder / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    assert evaluate(folder, path, *REWARDBENCH2)["rewards"] == nested["rewards"]


# -------------------------------------------------------------------------------------- RM-Bench

# Three chosen and three rejected answers, each concise, detailed and in markdown. Hard is a chosen
# answer against a rejected one in a fancier style: above the diagonal of chosen x rejected.
HARD = [(0, 1), (0, 2), (1, 2)]
NORMAL = [(0, 0), (1, 1), (2, 2)]
EASY = [(1, 0), (2, 0), (2, 1)]


def level_by_loops(rows, places):
    """The share of wins at these places, over rows of (3 chosen scores, 3 rejected scores)."""
    wins = []
    for chosen, rejected in rows:
        for i, j in places:
            # A tie is no win.
            wins.append(chosen[i] > rejected[j])
    return mean(wins)


def levels_by_loops(rows):
    """[hard, normal, easy]."""
    return [level_by_loops(rows, places) for places in (HARD, NORMAL, EASY)]


def test_levels_of_rm_bench_against_loops():
    generator = seeded(1)
    chosen = torch.randint(0, 5, (60, 3), generator=generator).double()
    rejected = torch.randint(0, 5, (60, 3), generator=generator).double()
    labels = torch.tensor([0] * 7 + [1] * 53)
    rows = list(zip(chosen.tolist(), rejected.tolist()))
    expected = torch.tensor([levels_by_loops(rows[:7]), levels_by_loops(rows[7:])]).double()

    # A domain counts as much as another, however many prompts it has.
    overall, by_domain = mean_of_groups(style_wins(chosen, rejected), labels)

    torch.testing.assert_close(hard_normal_easy(by_domain), expected)
    torch.testing.assert_close(hard_normal_easy(overall), expected.mean(0))


def test_a_model_that_likes_style_alone_wins_easy_only():
    by_style = torch.tensor([1.0, 2, 3])
    assert hard_normal_easy(style_wins(by_style, by_style)).tolist() == [0, 0, 1]


DOMAINS = ["chat"] * 4 + ["safety-refuse"] * 9 + ["safety-response"] * 5


def draw_rm_bench_rows():
    rng = random.Random(7)
    rows = []
    for i, domain in enumerate(DOMAINS):
        rows.append(
            {
                "id": i,
                "prompt": f"p{i}",
                "domain": domain,
                "chosen": draw_answers(rng, 3),
                "rejected": draw_answers(rng, 3),
            }
        )
    return rows


def read_scores(rows):
    """Rows of the file -> rows of (3 chosen scores, 3 rejected scores)."""
    scores = []
    for row in rows:
        chosen = [read_last(text) for text in row["chosen"]]
        rejected = [read_last(text) for text in row["rejected"]]
        scores.append((chosen, rejected))
    return scores


RM_BENCH = ("--benchmark", "rm_bench")


def test_rm_bench_against_loops(folder, capsys):
    """safety-refuse and safety-response are one domain."""
    rows = draw_rm_bench_rows()
    scores = read_scores(rows)
    chat = levels_by_loops(scores[:4])
    safety = levels_by_loops(scores[4:])
    # A concise chosen answer against a rejected one in markdown.
    concise_in_chat = level_by_loops(scores[:4], [(0, 2)])
    concise_in_safety = level_by_loops(scores[4:], [(0, 2)])
    expected = {
        "hard": (chat[0] + safety[0]) / 2,
        "normal": (chat[1] + safety[1]) / 2,
        "easy": (chat[2] + safety[2]) / 2,
        "domain chat": mean(chat),
        "domain safety": mean(safety),
        "average": (mean(chat) + mean(safety)) / 2,
        "concise > markdown": (concise_in_chat + concise_in_safety) / 2,
    }

    found = evaluate_rows(folder, "rm_bench", rows, *RM_BENCH)["rewards"][LAST]

    assert values_of(found, expected) == pytest.approx(expected)
    assert "beats a rejected one (concise, detailed, markdown)" in capsys.readouterr().out


@pytest.mark.slow
def test_rm_bench_without_domains_is_one_domain(folder):
    rows = draw_rm_bench_rows()
    of_one_domain = []
    without = []
    for row in rows:
        of_one_domain.append({**row, "domain": "chat"})
        without.append({name: x for name, x in row.items() if name != "domain"})
    scores = read_scores(rows)
    expected = level_by_loops(scores, HARD)
    # By domains it would be another figure.
    by_domains = (level_by_loops(scores[:4], HARD) + level_by_loops(scores[4:], HARD)) / 2
    assert expected != pytest.approx(by_domains)

    pooled = evaluate_rows(folder, "pooled", of_one_domain, *RM_BENCH)["rewards"][LAST]
    unnamed = evaluate_rows(folder, "unnamed", without, *RM_BENCH)["rewards"][LAST]

    assert unnamed["hard"] == pooled["hard"]
    assert pooled["hard"][0] == pytest.approx(expected)


# ------------------------------------------------------------------------- strata of a bootstrap


def test_strata_keep_their_sizes():
    labels = torch.tensor([0, 1, 1, 0, 1, 2])
    draws = []

    def keep_rows(rows):
        draws.append(rows.long())
        return 0

    bootstrap(torch.arange(6), keep_rows, resamples=300, strata=labels)

    of_stratum_0 = set()
    for rows in draws:
        assert labels[rows].bincount().tolist() == [2, 3, 1]
        own = rows[labels[rows] == 0]
        of_stratum_0.add(tuple(sorted(own.tolist())))
    # Its two rows are 0 and 3, drawn with replacement.
    assert of_stratum_0 == {(0, 0), (0, 3), (3, 3)}


def test_without_spread_within_strata_there_is_none_at_all():
    labels = torch.tensor([0, 1, 1, 0, 1, 2])
    values = torch.tensor([0.0, 5, 5, 0, 5, 9])
    low, high = bootstrap(values, strata=labels)
    assert low.item() == 4
    assert high.item() == 4


# ------------------------------------------------------------------------------------- bad input

GOOD = {"id": "0", "prompt": "p", "chosen": ["1"], "rejected": ["0", "0", "0"], "subset": "Math"}
STYLED = {"id": 0, "prompt": "p", "chosen": ["1", "1", "1"], "rejected": ["0", "0", "0"]}
FLAT = {"question_id": 0, "prompt": "p", "chosen": "1", "rejected": "0"}
TIES = {**GOOD, "subset": "Ties"}


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


def refuse_row(folder, capfd, benchmark, good_row, row):
    """The command on a good row and a bad one -> its error, which names the second line."""
    path = write_rows(folder / "bad.jsonl", [good_row, row])
    reward = f"{folder / 'reward.py'}:last"
    files = ("--dataset", path, "--output_dir", folder / "never")
    error = probe_refused(
        capfd, "evaluate", "--reward_model", reward, *files, "--benchmark", benchmark
    )
    assert "bad.jsonl:2" in error
    assert not (folder / "never").exists()
    return error


@pytest.mark.parametrize(
    "row, message",
    [
        ({**GOOD, "chosen": []}, "field 'chosen' must be a list of strings"),
        ({**GOOD, "rejected": ["0", None]}, "field 'rejected' must be a list of strings"),
        ({**GOOD, "rejected": "0"}, "field 'rejected' must be a list of strings"),
        ({**GOOD, "prompt": ["p"]}, "prompt[0] must be an object with role and content"),
        ({**GOOD, "prompt": 5}, "field 'prompt' must be a string, not int"),
        (without(GOOD, "rejected"), "no field 'rejected'"),
        (
            {**GOOD, "chosen": ["1", "1"]},
            "2 chosen answers; outside the subset Ties there is one",
        ),
        (TIES, "must be tied:N or ref:N, not '0'"),
        ({**TIES, "id": "tied:0"}, "a tied row needs at least two chosen answers"),
        (GOOD, "another row of the subset Math has the id '0' already"),
        (["p", "1", "0"], "a row must be an object"),
    ],
)
def test_broken_rows_of_rewardbench2(folder, capfd, row, message):
    assert message in refuse_row(folder, capfd, "rewardbench2", GOOD, row)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {**FLAT, "chosen": "2"},
            "question 0 has another prompt or chosen answer in an earlier row",
        ),
        (without(FLAT, "question_id"), "no field 'question_id'"),
        ({**FLAT, "rejected": ["0"]}, "field 'rejected' must be a string, not list"),
    ],
)
def test_broken_rows_of_the_flat_form(folder, capfd, row, message):
    assert message in refuse_row(folder, capfd, "rewardbench2", FLAT, row)


@pytest.mark.parametrize(
    "row, message",
    [
        ({**STYLED, "chosen": ["1", "1"]}, "2 chosen and 3 rejected answers, not 3 each"),
        ({**STYLED, "rejected": [1, 2, 3]}, "field 'rejected' must be a list of strings"),
    ],
)
def test_broken_rows_of_rm_bench(folder, capfd, row, message):
    assert message in refuse_row(folder, capfd, "rm_bench", STYLED, row)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--benchmark arena",
            "--benchmark must be one of pairs, rewardbench2, rm_bench, not 'arena'",
        ),
        ("--benchmark rm_bench", "--benchmark rm_bench: name its file as --dataset"),
        ("--benchmark rewardbench2 --dataset cut.jsonl", "cut.jsonl:2: not JSON"),
        ("--benchmark rewardbench2 --dataset empty.json", "empty.json: no rows"),
        (
            "--benchmark rewardbench2 --dataset bad.parquet",
            "bad.parquet: neither a file nor a data set",
        ),
        ("--dataset none.jsonl", "none.jsonl: no such file"),
        ("--max_rows -1", "--max_rows must be at least 0"),
        ("--reward_model nowhere/at/all", "nowhere/at/all: no such model folder"),
    ],
)
def test_broken_flags(folder, capfd, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    half_a_row = json.dumps(GOOD)[:30]
    (folder / "cut.jsonl").write_text(f"{json.dumps(GOOD)}\n{half_a_row}")
    (folder / "empty.json").write_text("[]")
    (folder / "bad.parquet").write_text("no parquet")

    always = ("--reward_model", "reward.py:last", "--output_dir", "never")
    assert message in probe_refused(capfd, "evaluate", *always, *flags.split())
