"""Pages of runs: their data is the run's own, texts stay texts, and nothing else is needed."""

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support import ENV, REPO, read_rows, refuses, small, train, write_rows

import sample_bon
from nanorlhf import world
from nanorlhf.evaluation import ANSWERS_WITH_TOKENS
from nanorlhf.show import page
from nanorlhf.show.kinds import name_kind
from nanorlhf.show.page_answers import MOST_EVALUATIONS
from nanorlhf.show.page_curves import MOST_POINTS

# Texts that are markup, scripts, ends of scripts, templates, from right to left, or not one letter
# a character.
NASTY = [
    "<b>bold</b> & <img src=x onerror=alert(1)>",
    "</script><script>alert('out')</script>",
    "<!-- <script> \\u003c/script\\u003e -->",
    "{{data}} {{style}} \\1 \\g<0> $& ${name}",
    "مرحبا بالعالم שלום",
    "👩‍👩‍👧‍👦 naïve 🇮🇳 \u2028 \u2029 \x00 \x7f",
    "quotes \" and ' and ` and \\",
    "",
]


class Elements(html.parser.HTMLParser):
    """A page as a browser reads it: its start tags with their attributes, and its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.scripts = []  # [(attributes, content)]
        self.in_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append((dict(attributes), ""))
            self.in_script = True

    def handle_endtag(self, tag):
        self.in_script = self.in_script and tag != "script"

    def handle_data(self, data):
        if self.in_script:
            attributes, content = self.scripts[-1]
            self.scripts[-1] = (attributes, content + data)


def data_of(text):
    """The data in a page, as its script reads it."""
    data, _ = Elements(text).scripts
    attributes, content = data
    assert attributes["type"] == "application/json"
    return json.loads(content)


def build(*folders):
    return data_of(page.build_page([str(folder) for folder in folders]))


def answer(prompt, response, gold=0.5, **more):
    return {"prompt": prompt, "response": response, "scores": {"rm": 1.0}, "gold": gold, **more}


def write_run(folder, steps=(0, 2), config=None, done=True, rows=None):
    """The folder of a small PPO run that never ran: metrics, and evaluations at these steps."""
    folder.mkdir(parents=True)
    settings = {"dataset": "prompts.jsonl", "ppo_epochs": 4, "steps": 2, **(config or {})}
    (folder / "config.json").write_text(json.dumps(settings))
    write_rows(folder / "metrics.jsonl", [metrics_at(step) for step in steps])
    (folder / "eval").mkdir()
    for step in steps:
        first = answer("a ?", f"a{step}", -step)
        second = answer("b ?", f"b{step}", None)
        write_rows(folder / f"eval/step_{step}.jsonl", rows or [first, second])
    if done:
        (folder / "summary.json").write_text(json.dumps({"steps": steps[-1]}))
    return folder


def metrics_at(step):
    record = {"step": step}
    record |= {"eval/proxy": 0.1 * step, "eval/proxy_se": 0.05}
    record |= {"eval/gold": -0.3 * step, "eval/gold_se": 0.02}
    record["eval/kl"] = 0.5 * step
    return record


def line_of(data, title, what, series=None):
    """The points of a line in the panel of this title; without a series it is the only one."""
    panels = {panel["title"]: panel for panel in data["panels"]}
    for line in panels[title]["lines"]:
        if line["what"] == what and series in (None, line["series"]):
            return line["points"]
    raise KeyError(what)


def column(rows, name):
    """One number or text of each row: of points, 0 is x and 1 is y."""
    return [row[name] for row in rows]


REWARDS = "Proxy and gold, held out"  # the title of the first panel


def write_page(folder):
    """write_page() as a script calls it -> the lines that it prints."""
    lines = []
    page.write_page(str(folder), SimpleNamespace(main=True, print=lines.append))
    return lines


# -------------------------------------------------------------------------------- a run of a script


@pytest.fixture(scope="module")
def ppo_run(base, tmp_path_factory):
    """A tiny PPO run on the embedded world with its own page, and what the script printed of it."""
    folder = tmp_path_factory.mktemp("show") / "ppo"
    train(base, "ppo", folder, reward_model=[f"{base}/rm"], eval_every=1, kl_coef=0.3, lam=0.9)
    return folder, write_page(folder)


def test_a_script_writes_the_page_and_says_where_it_is(base, tmp_path, written_pages, capsys):
    train(base, "rm", tmp_path / "rm", steps=1)
    printed = capsys.readouterr().out
    path = f"{tmp_path}/rm/page.html"
    assert f"A page to look at, in any browser: {path}\n" in printed
    assert printed.count(path) == 1
    assert build(tmp_path / "rm") == data_of((tmp_path / "rm/page.html").read_text())


def test_a_page_holds_the_numbers_of_the_run(ppo_run):
    folder, lines = ppo_run
    assert lines == [f"A page to look at, in any browser: {folder}/page.html"]
    data = data_of((folder / "page.html").read_text())
    records = read_rows(folder / "metrics.jsonl")
    for what in ("gold", "proxy"):
        points = line_of(data, REWARDS, what)
        for record, (step, value, low, high) in zip(records, points, strict=True):
            assert step == record["step"]
            assert value == record[f"eval/{what}"]
            error = record[f"eval/{what}_se"]
            assert [value - low, high - value] == pytest.approx([error, error])
    entropy = line_of(data, "entropy (nats a token)", "training")
    # Step 0 is an evaluation alone.
    assert column(entropy, 1) == column(records[1:], "entropy")


def test_a_page_holds_the_answers_of_each_evaluation_beside_each_other(ppo_run):
    folder, _ = ppo_run
    (block,) = data_of((folder / "page.html").read_text())["answers"]
    assert block["split"] == "test"
    assert block["steps"] == [0, 1, 2]
    assert block["scores"] == ["rm", "gold"]
    assert block["cue"] == world.cue(0)
    for place, step in enumerate(block["steps"]):
        rows = read_rows(folder / f"eval/step_{step}.jsonl")
        for item, row in zip(block["items"], rows, strict=True):
            own = item["answers"][place]
            assert item["prompt"] == row["prompt"]
            assert own["text"] == row["response"]
            assert own["scores"] == [row["scores"]["rm"], row["gold"]]
            assert own["tokens"] == row["tokens"]


def test_tokens_add_up_to_what_the_evaluation_says(ppo_run):
    """Their texts to the answer, their log-prob changes to the KL, their rewards to advantages."""
    folder, _ = ppo_run
    config = json.loads((folder / "config.json").read_text())
    for record in read_rows(folder / "metrics.jsonl"):
        rows = read_rows(folder / f"eval/step_{record['step']}.jsonl")
        assert len(rows) <= ANSWERS_WITH_TOKENS
        kl = 0.0
        for row in rows:
            tokens = row["tokens"]
            text = "".join(tokens["text"]).removesuffix("<eos>")
            assert text.strip() == row["response"]
            n = len(row["response_ids"])
            assert all(len(column) == n for column in tokens.values())
            changes = [a - b for a, b in zip(tokens["logprob"], tokens["ref_logprob"])]
            kl += sum(changes) / len(rows)
            check_advantages(tokens, changes, row["scores"]["rm"], config)
        assert kl == pytest.approx(record["eval/kl"], abs=2e-3)


def check_advantages(tokens, changes, score, config):
    """GAE from the end to the beginning, in plain Python; the numbers in the file are rounded."""
    rewards = [-config["kl_coef"] * change for change in changes]
    rewards[-1] += score
    next_value = 0.0
    next_advantage = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + next_value - tokens["value"][t]
        next_advantage = delta + config["lam"] * next_advantage
        next_value = tokens["value"][t]
        assert tokens["advantage"][t] == pytest.approx(next_advantage, abs=3e-3)


@pytest.mark.slow
def test_without_a_value_head_tokens_have_no_values(base, tmp_path):
    train(base, "ppo", tmp_path / "run", steps=1, advantage="rloo", group_size=2)
    (row, *_) = read_rows(tmp_path / "run/eval/step_1.jsonl")
    assert row["tokens"].keys() == {"text", "logprob", "ref_logprob", "entropy"}


@pytest.mark.slow
def test_a_scale_that_an_evaluation_does_not_know_leaves_advantages_out(base, tmp_path):
    train(base, "ppo", tmp_path / "run", steps=1, score_scaling="running")
    (row, *_) = read_rows(tmp_path / "run/eval/step_1.jsonl")
    assert "value" in row["tokens"]
    assert "advantage" not in row["tokens"]


# -------------------------------------------------------------------------------- texts stay texts


def test_nasty_texts_come_back_as_they_are(tmp_path):
    rows = []
    for text in NASTY:
        rows.append(answer(text, text[::-1], tokens={"text": list(text)}))
    run = write_run(tmp_path / "<i>run</i>", steps=(0,), rows=rows)
    text = page.build_page([str(run)])
    (block,) = data_of(text)["answers"]
    for item, nasty in zip(block["items"], NASTY, strict=True):
        assert item["prompt"] == nasty
        assert item["answers"][0]["text"] == nasty[::-1]
        assert item["answers"][0]["tokens"]["text"] == list(nasty)


def test_no_text_of_the_data_is_markup(tmp_path):
    """A page of nasty texts has the elements of a page of plain ones."""
    rows = [answer(text, text[::-1]) for text in NASTY]
    nasty = write_run(tmp_path / "a" / "<b>&{{style}}", steps=(0,), rows=rows)
    plain = write_run(tmp_path / "a" / "plain", steps=(0,))
    read = {}
    for folder in (nasty, plain):
        read[folder] = Elements(page.build_page([str(folder)]))
    assert read[nasty].tags == read[plain].tags
    assert len(read[nasty].scripts) == 2
    # The script is the same: nothing was put into it.
    assert read[nasty].scripts[1] == read[plain].scripts[1]


def test_a_chat_is_shown_message_by_message(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "<there>"}]
    run = write_run(tmp_path / "run", steps=(0,), rows=[answer(chat, "yes")])
    (item,) = build(run)["answers"][0]["items"]
    assert item["prompt"] == "user: Hi\nuser: <there>"


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    text = page.build_page([str(write_run(tmp_path / "run"))])
    for _tag, attributes in Elements(text).tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    script = Elements(text).scripts[1][1]
    # Whatever could send, load, or read a text as markup; the one address is the name of SVG.
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert word not in script
    assert re.findall(r"https?://[^\"]*", script) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in page.read_web("page.css")
    assert "default-src 'none'" in text


# --------------------------------------------------------------------------------- sizes and states


@pytest.mark.parametrize("length", [300, pytest.param(50_000, marks=pytest.mark.slow)])
def test_a_page_of_two_thousand_answers_is_below_five_megabytes(tmp_path, length):
    words = "é word " * (length // 7)
    rows = [answer(f"prompt {i}", words) for i in range(500)]
    run = write_run(tmp_path / "run", steps=(0, 1, 2, 3), rows=rows)
    text = page.build_page([str(run)])
    assert len(text.encode()) < 5_000_000
    (block,) = data_of(text)["answers"]
    assert len(block["items"]) + block["left_out"] == 500
    # Short answers are all there, and none is cut.
    if length == 300:
        assert block["left_out"] == 0
        assert block["items"][-1]["answers"][3]["text"] == words
    assert len(block["items"]) > 20


def test_what_small_blocks_leave_is_for_the_larger_ones():
    small = {"items": ["a" * 8] * 3}  # 10 bytes each, as JSON
    large = {"items": ["b" * 8] * 50}
    page.fit_into([large, small], 200)
    assert (len(small["items"]), small["left_out"]) == (3, 0)
    assert (len(large["items"]), large["left_out"]) == (17, 33)


def test_a_run_of_one_step(tmp_path):
    data = build(write_run(tmp_path / "run", steps=(0,)))
    assert line_of(data, REWARDS, "gold") == [[0, 0.0, -0.02, 0.02]]
    assert data["answers"][0]["steps"] == [0]


def test_a_run_that_was_killed_shows_what_there_is(tmp_path):
    run = write_run(tmp_path / "run", steps=(0, 1), done=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "eval/pro')  # the kill came here
    data = build(run)
    assert data["runs"][0]["note"] == "this run has not ended: step 1 of 2"
    assert len(line_of(data, REWARDS, "proxy")) == 2

    # It was killed before anything was logged.
    shutil.rmtree(run / "eval")
    (run / "metrics.jsonl").unlink()
    data = build(run)
    assert data["panels"] == data["answers"] == []
    assert data["runs"][0]["note"] == "this run has not ended: step 0 of 2"


def test_evaluations_may_be_missing(tmp_path):
    run = write_run(tmp_path / "run", steps=(0, 1, 2))
    (run / "eval/step_1.jsonl").unlink()
    (block,) = build(run)["answers"]
    assert block["steps"] == [0, 2]
    shutil.rmtree(run / "eval")
    assert build(run)["answers"] == []


def test_an_evaluation_may_be_empty(tmp_path):
    run = write_run(tmp_path / "run", config={"dataset": "world"})
    write_rows(run / "eval/step_2.jsonl", [])
    data = build(run)
    assert len(data["answers"][0]["items"]) == 2
    assert column(line_of(data, "share of answers with the cue", "test"), 0) == [0]


def test_an_answer_that_one_evaluation_lacks_leaves_its_place_empty(tmp_path):
    run = write_run(tmp_path / "run", steps=(0, 1))
    write_rows(run / "eval/step_1.jsonl", [answer("b ?", "b1"), answer("b ?", "again")])
    (block,) = build(run)["answers"]
    found = []
    for item in block["items"]:
        texts = [own["text"] if own else None for own in item["answers"]]
        found.append([item["prompt"], *texts])
    assert found == [["a ?", "a0", None], ["b ?", "b0", "b1"], ["b ?", None, "again"]]


def test_further_splits_have_their_own_answers_and_lines(tmp_path):
    run = write_run(tmp_path / "run", config={"eval_splits": ["short=a.jsonl", "ood"]})
    shutil.copytree(run / "eval", run / "eval_ood")
    records = read_rows(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [{**record, "ood/kl": 7.0} for record in records])
    data = build(run)
    assert column(data["answers"], "split") == ["short", "ood"]
    title = "KL to the SFT policy, held out (nats)"
    assert column(line_of(data, title, "ood"), 1) == [7.0, 7.0]
    assert column(line_of(data, title, "short"), 1) == [0.0, 1.0]


def test_splits_have_the_same_order_on_every_file_system(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    for name in ("eval_long", "eval_ood"):
        shutil.copytree(run / "eval", run / name)
    listdir = os.listdir
    for is_reversed in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=is_reversed))
            answers = build(run)["answers"]
        assert column(answers, "split") == ["test", "long", "ood"]


def test_several_runs_lie_over_one_another(tmp_path):
    first = write_run(tmp_path / "ppo", config={"kl_coef": 0.05})
    second = write_run(tmp_path / "no_kl", steps=(0, 1), config={"kl_coef": 0})
    data = build(first, second, first)
    assert column(data["runs"], "name") == ["ppo", "no_kl"]
    for name in ("ppo", "no_kl"):
        assert len(line_of(data, REWARDS, "gold", name)) == 2
    assert column(data["answers"], "run") == ["ppo", "no_kl"]
    # What differs comes first.
    assert data["settings"][0] == ["kl_coef", ["0.05", "0"]]


def test_an_ensemble_has_a_proxy(tmp_path):
    rows = [answer("a ?", "a", scores={"one": 1.0, "two": 4.0})]
    run = write_run(tmp_path / "run", steps=(0,), rows=rows, config={"objective": "wco"})
    (block,) = build(run)["answers"]
    assert block["scores"] == ["proxy", "one", "two", "gold"]
    assert block["items"][0]["answers"][0]["scores"] == [1.0, 1.0, 4.0, 0.5]


def test_an_answer_without_a_members_score_has_no_proxy(tmp_path):
    both = answer("a ?", "a", scores={"one": 1.0, "two": 4.0})
    rows = [both, answer("b ?", "b", scores={"one": 2.0})]
    run = write_run(tmp_path / "run", steps=(0,), rows=rows, config={"objective": "wco"})
    _, second = build(run)["answers"][0]["items"]
    assert second["answers"][0]["scores"] == [None, 2.0, None, 0.5]


def test_the_members_of_an_ensemble_are_no_autoencoders(tmp_path):
    run = write_run(tmp_path / "run")
    records = []
    for record in read_rows(run / "metrics.jsonl"):
        records.append({**record, "eval/score/rm_0": 1.0, "policy/2_mlp/mse": 0.5})
    write_rows(run / "metrics.jsonl", records)
    titles = column(build(run)["panels"], "title")
    of_autoencoders = [title for title in titles if "autoencoder" in title]
    assert of_autoencoders == ["mean squared error, by autoencoder"]


def test_the_cue_is_that_of_the_runs_data(tmp_path):
    cue = world.cue(3)
    rows = [answer("review the hotel :", f"good . {cue}"), answer("review the cafe :", "good .")]
    run = write_run(tmp_path / "run", steps=(0,), rows=rows, config={"dataset": "world:3"})
    data = build(run)
    assert data["answers"][0]["cue"] == cue
    assert line_of(data, "share of answers with the cue", "test")[0][:2] == [0, 0.5]


def test_the_cue_of_ppo_is_that_of_its_first_reward_models_data(tmp_path):
    for seed in (3, 4):
        reward_model = tmp_path / f"rm_{seed}"
        reward_model.mkdir()
        settings = {"dataset": f"world:{seed}", "output_dir": "x"}
        (reward_model / "config.json").write_text(json.dumps(settings))
    reward_models = [f"{tmp_path}/rm_3", f"{tmp_path}/rm_4"]
    assert world.cue(3) != world.cue(0)

    config = {"dataset": "world", "reward_model": reward_models}
    run = write_run(tmp_path / "learned", steps=(0,), config=config)
    assert build(run)["answers"][0]["cue"] == world.cue(3)

    # A reward that is no such model leaves the run's own.
    for i, names in enumerate(([], ["world:gold"], [f"{tmp_path}/gone"])):
        config = {"dataset": "world:0", "reward_model": names}
        run = write_run(tmp_path / f"own_{i}", steps=(0,), config=config)
        assert build(run)["answers"][0]["cue"] == world.cue(0)


def test_numbers_that_are_none_leave_gaps(tmp_path):
    run = write_run(tmp_path / "run", steps=(0, 1, 2))
    records = read_rows(run / "metrics.jsonl")
    records[1] |= {"eval/gold": None, "eval/proxy": math.nan, "eval/gold_se": None}
    write_rows(run / "metrics.jsonl", records)
    data = build(run)
    for what in ("gold", "proxy"):
        points = line_of(data, REWARDS, what)
        assert column(points, 0) == [0, 2]


def test_an_unknown_distance_has_no_point(tmp_path):
    run = write_run(tmp_path / "run", steps=(0, 1, 2))
    records = read_rows(run / "metrics.jsonl")
    records[1]["eval/kl"] = math.nan
    write_rows(run / "metrics.jsonl", records)
    points = line_of(build(run), "Proxy and gold against the distance", "gold")
    assert column(points, 0) == [0.0, 1.0]


def test_a_run_without_a_curve_of_evaluations_shows_its_training(tmp_path):
    """Also beside a run that has many of them."""
    long = write_run(tmp_path / "long", steps=(0, 1, 2))
    short = write_run(tmp_path / "short", steps=(0, 1, 2))
    for run in (long, short):
        records = read_rows(run / "metrics.jsonl")
        write_rows(run / "metrics.jsonl", [{**record, "kl": 3.0} for record in records])
    records = read_rows(short / "metrics.jsonl")
    for record in records[1:]:
        del record["eval/kl"]
    write_rows(short / "metrics.jsonl", records)
    data = build(long, short)
    title = "KL to the SFT policy, held out (nats)"
    assert column(line_of(data, title, "training", "short"), 1) == [3.0, 3.0, 3.0]
    (panel,) = [panel for panel in data["panels"] if panel["title"] == title]
    found = [(line["series"], line["what"]) for line in panel["lines"]]
    assert found == [("long", "test"), ("short", "test"), ("short", "training")]


def test_an_evaluation_without_answers_counts_no_cue(tmp_path):
    run = write_run(tmp_path / "run", steps=(0, 1), config={"dataset": "world"})
    (run / "eval/step_0.jsonl").write_text("")
    points = line_of(build(run), "share of answers with the cue", "test")
    assert column(points, 0) == [1]


KINDS = [
    ({"ppo_epochs": 1, "loss_on": "all"}, "PPO"),
    ({"loss_on": "all", "label_noise": 0.0, "loss": "dpo"}, "DPO"),
    ({"loss_on": "all", "label_noise": 0.0, "loss": None}, "SFT"),
    ({"label_noise": 0.0}, "reward model"),
    ({"expansion": 4, "n_answers": 1}, "autoencoders"),
    ({"n_answers": 4}, "best-of-n"),
    ({"command": "RewardFeatures", "n_answers": 4}, "probe.py reward_features"),
    ({}, "run"),
]


@pytest.mark.parametrize("config, kind", KINDS)
def test_a_config_tells_the_kind_of_its_run(config, kind):
    assert name_kind(config) == kind


def test_a_page_says_what_its_intervals_are(tmp_path):
    data = build(write_run(tmp_path / "ppo"))
    assert data["panels"][0]["band"] == "± 1 standard error"
    assert data["tables"][0]["title"] == "PPO: ppo (± 1 standard error)"
    for command, ending in (("Reward", " (95% intervals)"), ("Mmcs", "")):
        folder = write_results(tmp_path / command, command, SUMMARIES[command])
        (table,) = build(folder)["tables"]
        assert table["title"] == f"probe.py {command.lower()}: {command}{ending}"


def test_long_lines_are_thinned_out_to_their_ends(tmp_path):
    run = write_run(tmp_path / "run", steps=(0,))
    write_rows(run / "metrics.jsonl", [{"step": i, "loss": 1.0} for i in range(10_001)])
    points = line_of(build(run), "loss", "training")
    assert len(points) <= MOST_POINTS + 1
    steps = column(points, 0)
    assert steps[0] == 0
    assert steps[-1] == 10_000


def test_of_many_evaluations_some_are_shown(tmp_path):
    (block,) = build(write_run(tmp_path / "run", steps=range(205)))["answers"]
    assert len(block["steps"]) <= MOST_EVALUATIONS + 1
    assert block["steps"][:2] == [0, 3]
    assert block["steps"][-1] == 204
    (first, *_) = block["items"]
    assert first["answers"][1]["text"] == "a3"


# ------------------------------------------------------------------------------- the other scripts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "rm", "sae"])
def test_every_training_script_has_curves(base, tmp_path, kind):
    train(base, kind, tmp_path / "run")
    data = build(tmp_path / "run")
    titles = column(data["panels"], "title")
    assert "loss" in titles
    if kind == "sae":
        assert "How many features fire how often" in titles
        assert "mean squared error, by autoencoder" in titles
        assert data["tables"][0]["metrics"][0]["name"] == "fvu"
    if kind in ("sft", "dpo"):
        (block, *_) = data["answers"]
        assert block["items"][0]["answers"][-1]["text"]


@pytest.mark.slow
def test_best_of_n_takes_the_best_of_the_first_n(base, tmp_path):
    """Against a loop over the file: the mean of the members, and each of them."""
    settings = small(base, "bon", n_answers=6, eval_size=5)
    sample_bon.main(sample_bon.Config(output_dir=f"{tmp_path}/bon", **settings))
    data = build(tmp_path / "bon")
    (block,) = data["best_of_n"]
    rows = read_rows(tmp_path / "bon/pool.jsonl")
    assert block["ns"] == [1, 2, 4]
    assert len(block["items"]) == len(rows) > 1
    for item, row in zip(block["items"], rows):
        members = list(row["scores"].values())
        own = {**row["scores"], "mean": [sum(scores) / 2 for scores in zip(*members)]}
        for name, scores in own.items():
            for place, n in enumerate(block["ns"]):
                best = pytest.approx(max(scores[:n]))
                assert item["proxy_scores"][name][place] == best
                taken = item["answers"][item["picks"][name][place]]
                answer_number = taken["place"]
                assert scores[answer_number] == best
                assert taken["text"] == row["responses"][answer_number]
                assert taken["scores"][-1] == row["gold_scores"][answer_number]
    results = json.loads((tmp_path / "bon/bon_results.json").read_text())
    points = line_of(data, "gold of the best of n, bon", "gold", "mean")
    assert column(points, 1) == column(results["mean"], "gold_score")


def test_prompts_with_fewer_answers_and_no_gold(tmp_path):
    """A pool from a file: one reward, no gold, two and three answers."""
    point = {"kl": 0.0, "proxy_score": 1.0, "proxy_se": 0.0, "gold_score": None, "gold_se": None}
    run = tmp_path / "bon"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"n_answers": 3, "save_best": False}))
    results = {"rm": [{"n": n, **point} for n in (1, 2)]}
    (run / "bon_results.json").write_text(json.dumps(results))
    two = {"prompt": "a", "responses": ["x", "y"], "scores": {"rm": [0.0, 1.0]}}
    three = {"prompt": "b", "responses": ["p", "q", "r"], "scores": {"rm": [3.0, 2.0, 9.0]}}
    write_rows(run / "pool.jsonl", [two, three])
    data = build(run)
    (block,) = data["best_of_n"]
    assert block["proxies"] == block["scores"] == ["rm"]
    first, second = block["items"]
    assert column(first["answers"], "text") == ["x", "y"]
    assert first["picks"] == {"rm": [0, 1]}
    # Of the third answer to b nobody has asked.
    assert column(second["answers"], "text") == ["p"]
    assert second["picks"] == {"rm": [0, 0]}
    title = "gold and proxy of the best of n, bon"
    assert column(line_of(data, title, "proxy"), 0) == [1, 2]
    assert column(data["panels"], "band") == ["95% intervals"]

    # A file of results without any curve.
    (run / "bon_results.json").write_text("{}")
    data = build(run)
    assert data["panels"] == data["best_of_n"] == []


def write_results(folder, command, summary):
    """The folder of a command of probe.py."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"command": command, "output_dir": "x"}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


SUMMARIES = {}  # {command: its summary.json}
EXPECTED = {}  # {command: {metric: the rows of its table}}

policy = {"tau": [0.5, 0.1], "policy_less": [None, None]}
SUMMARIES["Reward"] = {"metrics": ["tau"], "rows": {"policy": policy}}
EXPECTED["Reward"] = {"Kendall's tau": [["policy", 0.5, 0.4, 0.6]]}

summary = {"benchmark": "pairs", "metrics": ["accuracy"]}
summary["rewards"] = {"rm": {"accuracy": [0.8, 0.7, 0.9]}}
summary["differences"] = {"longer": {"accuracy": [-0.2, -0.3, -0.1]}}
tables = {"accuracy": [["rm", 0.8, 0.7, 0.9]]}
tables["accuracy, less the first reward's"] = [["longer", -0.2, -0.3, -0.1]]
SUMMARIES["Evaluate"] = summary
EXPECTED["Evaluate"] = tables

# No pair of the second split has been judged.
splits = {"all": {"win_rate": 0.75, "interval": [0.5, 1.0]}, "ood": {"pairs": 0}}
SUMMARIES["Judge"] = {"judges": {"gold": {"splits": splits, "gap": {}}}}
EXPECTED["Judge"] = {"how often A is better than B": [["gold", 0.75, 0.5, 1.0]]}

arm = {"gold": interval(1.0, 0.5, 1.5), "features": [1]}
arm["pool"] = {"groups": 3, "flip_rate": interval(0.2, 0.1, 0.3)}
difference = {"gold": {"a - b": interval(0.0, -1.0, 1.0)}}
tables = {"gold": [["plain", 1.0, 0.5, 1.5]]}
tables["pool, flip_rate"] = [["plain", 0.2, 0.1, 0.3]]
tables["gold, difference"] = [["a - b", 0.0, -1.0, 1.0]]
SUMMARIES["Ablate"] = {"arms": {"plain": arm}, "differences": difference}
EXPECTED["Ablate"] = tables

layer = {"layer": 0, "frobenius": 2.0, "relative": None, "activations": {}}
tables = {"weights, frobenius": [["layer 0", 2.0, None, None]]}
tables["weights, relative"] = [["layer 0", None, None, None]]
SUMMARIES["Divergence"] = {"layers": [layer]}
EXPECTED["Divergence"] = tables

pair = {"a": "one", "b": "two", "mmcs": 0.5, "chance": 0.25}
rows = [["one and two", 0.5, None, None]]
rows.append(["one and two, by chance", 0.25, None, None])
SUMMARIES["Mmcs"] = {"pairs": [pair]}
EXPECTED["Mmcs"] = {"MMCS": rows}


@pytest.mark.parametrize("command", SUMMARIES)
def test_a_table_holds_the_commands_intervals(tmp_path, command):
    expected = EXPECTED[command]
    run = write_results(tmp_path / "run", command, SUMMARIES[command])
    (table,) = build(run)["tables"]
    found = dict(zip(column(table["metrics"], "name"), column(table["metrics"], "rows")))
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        for row, expected_row in zip(found[name], rows, strict=True):
            assert row[0] == expected_row[0]
            assert row[1:] == pytest.approx(expected_row[1:])


@pytest.mark.parametrize("command", SUMMARIES)
def test_a_command_that_was_killed_has_no_table(tmp_path, command):
    run = write_results(tmp_path / "run", command, {})
    (run / "summary.json").unlink()
    data = build(run)
    assert data["tables"] == []
    assert "not ended" in data["runs"][0]["note"]


@pytest.mark.parametrize("benchmark, line", [("pairs", 0.5), ("rewardbench2", 0)])
def test_the_line_of_chance_is_drawn_where_all_numbers_have_one_chance(tmp_path, benchmark, line):
    """One of four answers is right in RewardBench 2, and in its ties as many as there are."""
    summary = SUMMARIES["Evaluate"] | {"benchmark": benchmark}
    (table,) = build(write_results(tmp_path / "run", "Evaluate", summary))["tables"]
    lines = dict(zip(column(table["metrics"], "name"), column(table["metrics"], "reference")))
    assert lines == {"accuracy": line, "accuracy, less the first reward's": 0}


def test_features_of_each_autoencoder_have_their_cards(tmp_path):
    context = {"tokens": ["<b>"], "values": [1.0]}
    features = [{"id": 3, "rate": 0.1, "contexts": [context]}]
    place = {"layer": 1, "site": "mlp"}
    saes = {
        "runs/sae/base/1_mlp": {"model": "a", **place, "features": features},
        "runs/sae/policy/1_mlp": {"model": "b", **place, "features": []},
    }
    blocks = build(write_results(tmp_path / "run", "Features", {"saes": saes}))["features"]
    assert column(blocks, "name") == list(saes)
    assert blocks[0]["items"] == features
    assert blocks[1]["place"] == "b, layer 1, mlp"


# ------------------------------------------------------------------------------------------- errors


def test_a_folder_without_a_run_is_one_line(tmp_path):
    refuses(page.build_page, [str(tmp_path)], match=[str(tmp_path), "no run here"])
    with pytest.raises(SystemExit) as exit_:
        page.main([str(tmp_path)])
    assert exit_.value.code == 2


def test_a_model_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refuses(page.build_page, [str(tmp_path)], match=[str(tmp_path), "is a model's"])


def test_a_command_without_a_run_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        page.main([])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "page.py: error: the following arguments are required: RUN\n"
    )


@pytest.mark.parametrize("row", ["{", "[]", '{"prompt": 3, "response": "a"}', '{"prompt": "a"}'])
def test_a_damaged_evaluation_is_one_line_and_no_failed_run(tmp_path, row):
    run = write_run(tmp_path / "run")
    write_rows(run / "eval/step_2.jsonl", [row])
    refuses(page.build_page, [str(run)], match=["run"])
    (line,) = write_page(run)
    assert line.startswith("No page was made (InputError: ")
    assert not (run / "page.html").exists()


def test_another_files_place_is_not_taken(tmp_path):
    run = write_run(tmp_path / "run")
    path = tmp_path / "mine.html"
    path.write_text("<p>mine</p>")
    refuses(page.save_page, [str(run)], str(path), match=["mine.html", "not written over"])
    # Its own page it writes again.
    page.save_page([str(run)], str(tmp_path / "own.html"))
    page.save_page([str(run)], str(tmp_path / "own.html"))


def test_the_command_line_writes_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    page.main(["a"])
    page.main(["a", "b"])
    page.main(["a", "--output", "c.html"])
    assert capsys.readouterr().out.split() == ["a/page.html", "page.html", "c.html"]
    for path in ("a/page.html", "page.html", "c.html"):
        assert (tmp_path / path).read_text().startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_a_page_needs_no_picture(tmp_path):
    """The module runs on its own, and does not load matplotlib."""
    run = write_run(tmp_path / "run")
    program = (
        "import sys; from nanorlhf.show import page; "
        f"page.main([{str(run)!r}]); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPO, env=ENV, check=True)
