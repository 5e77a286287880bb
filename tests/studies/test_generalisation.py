"""The study of generalisation and diversity (nanorlhf/studies/generalisation.py), reduced: its plumbing, and its numbers against loops."""

import json
import math
import shlex
from types import SimpleNamespace

import pytest
import torch
from support import ALL_SCRIPTS, parse_command

from nanorlhf.diversity import ead
from nanorlhf.runtime import cli
from nanorlhf.studies import common, generalisation

pytestmark = pytest.mark.slow

SMALL = [
    "--seeds", "2", "--kl_coef", "0.05", "0.2", "--steps", "1", "--prompts", "4", "--answers", "3", "--n", "2", "--jobs", "1",
    "--diversity_flags=--vocab_size 208 --truncate 5", "--sft_flags=--steps 15 --batch_size 16 --eval_size 8",
    "--rm_flags=--steps 4 --batch_size 8 --eval_size 16", "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 12",
    "--bon_flags=--max_new_tokens 12",
]  # fmt: skip
CELLS = ["k1_0.05", "k1_0.2", "k2_0.05", "k2_0.2"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study's module, with commands run in this process, its folder, and the commands that it ran."""
    ran, threads, folder = [], torch.get_num_threads(), tmp_path_factory.mktemp("study") / "quick"
    torch.set_num_threads(1)

    def run(command):
        main, config = parse_command(command)
        main(config)
        ran.append(command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run_command", run)
        for script in ALL_SCRIPTS.values():
            patch.setattr(script, "plot_run", lambda run: None, raising=False)
        generalisation.main(["--output_dir", str(folder), *SMALL])
        first = list(ran)
        generalisation.main(
            ["--output_dir", str(folder), *SMALL]
        )  # a second time there is nothing to do
    torch.set_num_threads(threads)
    yield generalisation, folder, first, ran
    cli.distributed.shutdown()


def settings(study, **changes):
    return SimpleNamespace(
        **json.loads((study[1] / "summary.json").read_text())["settings"] | changes
    )


def tables_of(study):
    return json.loads((study[1] / "summary.json").read_text())["tables"]


def answers(study, name, seed, split, key=None):
    """{prompt: [K numbers]} of a system's file, read here: gold, or the score of the seed's reward model."""
    out = {}
    file = "best_of_2" if name == "best_of_n" else "best_of_1"
    for line in (
        (study[1] / f"answers/{name}/seed_{seed}/{split}/{file}.jsonl").read_text().splitlines()
    ):
        row = json.loads(line)
        out.setdefault(row["prompt"], []).append(
            row["response"] if key is None else row["gold"] if key == "gold" else row["scores"][key]
        )
    return out


def test_every_run_is_done_once(study):
    _, _, first, ran = study
    assert [c.split()[0] for c in first] == [
        "train_sft.py", *["train_rm.py"] * 2, "sample_bon.py", *["train_ppo.py"] * 8, *["sample_bon.py"] * 18]  # fmt: skip
    assert ran == first


def test_quick_marks_its_tables(study, capsys):
    module, folder, _, _ = study
    mark = " [QUICK, 2 seeds: not the study's numbers]"
    module.main(
        ["--quick", "--output_dir", str(folder.parent), *SMALL]
    )  # its runs are there already
    quick = capsys.readouterr().out
    module.main(["--output_dir", str(folder), *SMALL])
    whole = capsys.readouterr().out
    assert quick.count(mark) == len(tables_of(study)) and quick.replace(mark, "") == whole


def test_the_full_study_is_what_the_issue_asks_for(study):
    full = settings(
        study,
        seeds=5,
        kl_coef=[0.02, 0.05, 0.1, 0.2],
        prompts=60,
        answers=16,
        n=16,
        bon_flags="",
        ppo_flags="",
        steps=40,
    )
    sft, rm, (pool, *ppo), sampled, diversity = study[0].commands(full)
    assert [len(part) for part in (sft, rm, ppo, sampled, diversity)] == [1, 5, 40, 5 * (9 + 2), 10]
    everything = [shlex.split(c) for c in (*sft, *rm, pool, *ppo, *sampled, *diversity)]
    folders = [words[words.index("--output_dir") + 1] for words in everything]
    assert len(set(folders)) == len(folders)
    configs = [parse_command(command)[1] for command in ppo]
    assert {(c.kl_kind, c.kl_in, c.kl_coef, c.seed) for c in configs} == {
        (kind, "reward", coef, seed)
        for kind in ("k1", "k2")
        for coef in full.kl_coef
        for seed in range(5)
    }
    noise = [
        words[words.index("--seed") + 1]
        for words in everything
        if "--seed" in words and words[0] == "sample_bon.py"
    ]
    assert sorted(set(noise)) == sorted(
        ["2000", *map(str, range(5)), *map(str, range(1000, 1005))]
    )  # SFT's answers are not the pool's


def test_diversity_is_measured_again_where_a_system_is_new(study):
    for changes, done in (
        ({}, True),
        ({"kl_coef": [0.05]}, False),
        ({"encoder": "another"}, False),
    ):
        a = settings(study, **changes)
        assert [study[0].finished(a, command) for command in study[0].commands(a)[-1]] == [done] * 4


def test_systems_answer_the_same_prompts(study):
    for split in ("test", "ood"):
        prompts = [
            list(answers(study, name, seed, split))
            for name in ("sft", "best_of_n", *CELLS)
            for seed in (0, 1)
        ]
        assert all(p == prompts[0] for p in prompts) and len(prompts[0]) == 4
        assert all(
            len(x) == 3
            for name in ("sft", "best_of_n", *CELLS)
            for x in answers(study, name, 1, split).values()
        )
    assert not set(answers(study, "sft", 0, "test")) & set(answers(study, "sft", 0, "ood"))


def test_best_of_n_keeps_the_best_of_its_own_answers(study):
    pool = [
        json.loads(line) for line in (study[1] / "pool/ood/pool.jsonl").read_text().splitlines()
    ]
    kept = answers(study, "best_of_n", 1, "ood")
    scored = [
        json.loads(line)
        for line in (study[1] / "answers/best_of_n/seed_1/ood/pool.jsonl").read_text().splitlines()
    ]
    for row, again in zip(pool, scored, strict=True):
        own = again["scores"]["seed_1"]
        best = [row["responses"][i if own[i] >= own[i + 1] else i + 1] for i in (0, 2, 4)]
        assert kept[row["prompt"]] == best


def test_numbers_of_the_tables(study):
    tables = tables_of(study)
    for split, name, seed in (
        ("test", "k1_0.2", 0),
        ("ood", "best_of_n", 1),
        ("ood", "k2_0.05", 1),
    ):
        row = {column: values[seed] for column, values in tables[split][name].items()}
        for key, label in (("gold", "gold"), (f"seed_{seed}", "proxy")):
            own, sft = (
                answers(study, name, seed, split, key),
                answers(study, "sft", seed, split, key),
            )
            points = [
                (x > y) + (x == y) / 2 for prompt in own for x in own[prompt] for y in sft[prompt]
            ]
            assert len(points) == 36 and row[f"win {label}"] == pytest.approx(sum(points) / 36)
            assert row[label] == pytest.approx(sum(sum(x) for x in own.values()) / 12)
        texts = list(answers(study, name, seed, split).values())
        cut = [[" ".join(text.split()[:5]) for text in row] for row in texts]
        for end, rows in (("", texts), (", cut", cut)):
            per_input = [sum(ead(r, n, 208) for n in range(1, 6)) / 5 for r in rows]
            across = [
                sum(ead([r[k] for r in rows], n, 208) for n in range(1, 6)) / 5 for k in range(3)
            ]
            assert row["in EAD" + end] == pytest.approx(sum(per_input) / 4)
            assert row["across EAD" + end] == pytest.approx(sum(across) / 3)
            assert row["length" + end] == pytest.approx(
                sum(len(text.split()) for r in rows for text in r) / 12
            )
        assert 0 < row["in emb"] < 1
    assert tables["ood"]["best_of_n"]["KL"] == pytest.approx([math.log(2) - 0.5] * 2)
    assert tables["test"]["sft"]["win gold"] == [0.5, 0.5] and tables["test"]["sft"]["KL"] == [0, 0]
    after = json.loads((study[1] / "ppo/k2_0.2/seed_1/summary.json").read_text())["after"]
    assert (tables["test"]["k2_0.2"]["KL"][1], tables["ood"]["k2_0.2"]["KL"][1]) == (
        after["kl"],
        after["ood/kl"],
    )


def test_comparisons_are_paired_by_seed(study):
    tables = tables_of(study)
    test, ood = tables["test"], tables["ood"]
    for seed in (0, 1):

        def gold(table, name):
            return table[name]["gold"][seed]

        gap = {name: gold(test, name) - gold(ood, name) for name in test}
        assert tables["gap, test less ood"]["k1_0.2"]["gold"][seed] == pytest.approx(gap["k1_0.2"])
        assert tables["gap, test less ood, less SFT's"]["k1_0.2"]["gold"][seed] == pytest.approx(
            gap["k1_0.2"] - gap["sft"]
        )
        assert tables["ood, less SFT"]["k2_0.05"]["gold"][seed] == pytest.approx(
            gold(ood, "k2_0.05") - gold(ood, "sft")
        )
        more = tables["ood, largest less smallest coefficient"]["k2"]["gold"][seed]
        assert more == pytest.approx(gold(ood, "k2_0.2") - gold(ood, "k2_0.05"))
        same = tables["test, k2 less k1 at the same coefficient"]["k2_0.2"]["gold"][seed]
        assert same == pytest.approx(gold(test, "k2_0.2") - gold(test, "k1_0.2"))


def test_at_the_same_kl(study):
    points = {"sft": (0.0, 1.0), "best_of_n": (1.8, 9.0), "k1_0.2": (4.0, 3.0), "k1_0.05": (16.0, 2.0),
              "k2_0.2": (1.0, 7.0), "k2_0.05": (9.0, 7.0), "k2_0.02": (25.0, 7.0)}  # fmt: skip
    rows = {name: {"KL": kl, "y": y} for name, (kl, y) in points.items()}
    at = [study[0].at_kl(rows, "k1", kl, "y") for kl in (0, 1, 4, 9, 16)]
    assert at == pytest.approx([1, 2, 3, 2.5, 2])  # straight between sqrt(KL) 0, 2 and 4
    assert study[0].at_kl(rows, "k1", 16.1, "y") is None
    assert study[0].less_at_its_kl(rows, "k2_0.05") == {"y": pytest.approx(4.5)}
    collected = study[0].collect(
        study[0].less_at_its_kl(rows, name) for name in ("k2_0.2", "k2_0.02")
    )
    assert collected["y"] == pytest.approx([5.0])  # a seed beyond k1's KL has no such number
    assert study[0].as_text(collected["y"] * 2, 3) == "5.000 +- 0.000 (2)"
    assert study[0].as_text([], 3) == "-"


def test_win_rates_count_ties_half(study):
    a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    assert study[0].win_rate(a, b) == (0.5 + 0.5 + 1 + 1 + 0 + 1 + 0 + 1) / 8
    assert study[0].win_rate(a, b) + study[0].win_rate(b, a) == 1


def test_picture(study):
    pytest.importorskip("matplotlib")
    assert (study[1] / "generalisation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
