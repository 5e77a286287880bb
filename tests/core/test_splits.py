"""nanorlhf.splits: formats of prompts, what is in distribution, what each named split holds, and
what is refused.
"""

import io
import json

import pytest
import torch
from support import jsonl, refuses

import nanorlhf.data
import sample_bon
from nanorlhf import splits, world
from nanorlhf.data import read_rows
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.flags import RunConfig
from nanorlhf.runtime.log import RunFolder
from nanorlhf.splits import load, load_splits

POST = {
    "subreddit": "tifu",
    "title": "By {trusting} a cat",
    "post": "It purred.\nThen it bit.",
    "summary": " Cats bite. ",
}
TLDR = "SUBREDDIT: r/tifu\nTITLE: By {trusting} a cat\nPOST: It purred.\nThen it bit.\nTL;DR:"
NEWS = {"article": "(CNN) It rained.", "highlights": "Rain .", "id": 5}
# A row that is read keeps the data's own beside its fields.
CNN_DM = {"prompt": "ARTICLE: (CNN) It rained.\nTL;DR:", "response": " Rain .", "row": NEWS}


def reddit_rows():
    """180 rows of 60 prompts, p0 to p59, which are in one of four subreddits.

    Every fourth prompt has its third row in another subreddit than its other two: in AskReddit.
    Responses are numbered, and have two to six words.
    """
    subreddits = ["tifu", "AskReddit", "cats", "dogs"]
    rows = []
    for i in range(180):
        prompt = i // 3
        subreddit = subreddits[prompt % 4]
        if subreddit == "tifu" and i % 3 == 2:
            subreddit = "AskReddit"
        response = "w " * (i % 5 + 1) + str(i)
        rows.append({"prompt": f"p{prompt}", "response": response, "subreddit": subreddit})
    return rows


ROWS = reddit_rows()


@pytest.fixture
def reddit(tmp_path):
    """The path of a file with these rows."""
    return jsonl(tmp_path / "a.jsonl", ROWS)


def flags(dataset, **changes):
    """A training script's flags."""
    return RunConfig(**{"dataset": str(dataset), "eval_size": 9} | changes)


def column(rows, name):
    return [row[name] for row in rows]


def prompts_of(rows):
    return set(column(rows, "prompt"))


def responses_of(rows):
    return set(column(rows, "response"))


# ------------------------------------------------------------------------------------ formats


def test_a_post_of_reddit_in_the_format_tldr(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [POST])
    rows = read_rows(path, "sft", prompt_format="tldr")
    prompts = read_rows(path, "prompts", prompt_format="tldr")
    assert rows == [{"prompt": TLDR, "response": " Cats bite.", "row": POST}]
    assert prompts == [{"prompt": TLDR, "row": POST}]


def test_the_summary_may_stand_in_another_column(tmp_path):
    post = {**POST, "label": "x"}
    path = jsonl(tmp_path / "a.jsonl", [post])
    rows = read_rows(path, "sft", ["summary=label"], prompt_format="tldr")
    assert rows == [{"prompt": TLDR, "response": " x", "row": post}]


def test_pairs_of_summaries(tmp_path):
    pair = {**POST, "chosen": "a", "rejected": " b\n"}
    path = jsonl(tmp_path / "a.jsonl", [pair])
    rows = read_rows(path, "pairs", prompt_format="tldr")
    assert rows == [{"prompt": TLDR, "chosen": " a", "rejected": " b", "row": pair}]


@pytest.fixture
def news(tmp_path):
    return jsonl(tmp_path / "news.jsonl", [NEWS])


def test_an_article_in_the_format_cnn_dm(news):
    assert read_rows(news, "sft", prompt_format="cnn_dm") == [CNN_DM]


def check_format_refused(path, prompt_format, *words, columns=()):
    """read_rows() must refuse this file in this format and say these words."""
    refuses(read_rows, path, "sft", columns, prompt_format=prompt_format, match=words)


def test_a_file_of_another_format(news):
    words = ["no field 'subreddit'", "--columns subreddit=COLUMN"]
    check_format_refused(news, "tldr", f"{news}:1", *words)


def test_columns_of_a_format(news):
    words = "'id' must be a string, not int"
    check_format_refused(news, "cnn_dm", f"{news}:1", words, columns=["highlights=id"])
    # A format makes the prompt: it is no column to be named.
    words = ["--columns names prompt", "article, highlights"]
    check_format_refused(news, "cnn_dm", *words, columns=["prompt=article"])


def test_a_format_that_is_not_known(news):
    check_format_refused(
        news, "xsum", "--prompt_format must be one of tldr, cnn_dm, alpaca, not 'xsum'"
    )


# ---------------------------------------------------------------------------------- predicates

TEXTS = [
    {"t": "a", "n": 1},
    {"t": " a b\n\nc ", "n": 2},
    {"t": "a b c d", "n": True},
    {"t": "", "n": "x=y"},
]
FUNCTIONS = """
def is_long(row): return len(row["t"]) > 3
def word(row): return "yes"
def fails(row): return row["u"]
async def later(row): return True
def spoils(row):
    row["t"] = "x"
    row["more"].clear()
    return True
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """my.py with these functions, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(FUNCTIONS)


def places_inside(where, rows=TEXTS):
    """The places of the rows that are in distribution."""
    inside = splits.predicate(where)
    return [i for i, row in enumerate(rows) if inside("a.jsonl:1", row)]


@pytest.mark.parametrize(
    "where, expected",
    [
        ("", [0, 1, 2, 3]),
        ("t=a", [0]),
        ("n=1, x=y", [0, 3]),
        ("n=True,2", [1, 2]),
        # The texts have 1, 3, 4 and 0 words.
        ("words:t<=3", [0, 1, 3]),
        ("words:t<3", [0, 3]),
        ("words:t>=3", [1, 2]),
        ("words:t>3", [2]),
        ("my.py:is_long", [1, 2]),
    ],
)
def test_which_rows_are_in_distribution(functions, where, expected):
    assert places_inside(where) == expected


# {--in_distribution: what the message says}
BAD_PREDICATES = {
    "u=1": "a.jsonl:1: no field 'u', which --in_distribution u=1 reads",
    "words:u<=3": "a.jsonl:1: no field 'u'",
    "words:n<=3": "a.jsonl:1: field 'n' must be a string",
    "my.py:word": "a.jsonl:1: my.py:word must return True or False, not 'yes'",
    "my.py:fails": "a.jsonl:1: --in_distribution my.py:fails raised KeyError: 'u'",
    "my.py:none": "it defines no function 'none'",
    "my.py:later": "later is an async function",
    "other.py:long": "other.py: no such file",
}


@pytest.mark.parametrize("where, words", BAD_PREDICATES.items())
def test_rows_that_cannot_be_asked(functions, where, words):
    refuses(places_inside, where, match=[words])


@pytest.mark.parametrize("where", ["t", "t=", "=a", "words:t=3", "words:t<=many"])
def test_predicates_of_no_known_form(where):
    refuses(places_inside, where, match=["--in_distribution takes", repr(where)])


def test_a_predicate_gets_a_row_of_its_own(functions):
    """Whatever it does to the row, and to what is in it, the data stay as they are."""
    row = {"t": "a", "more": [1]}
    assert places_inside("my.py:spoils", [row]) == [0]
    assert row == {"t": "a", "more": [1]}


ENDS = {"sys.exit(0)": "SystemExit: 0", "exit()": "SystemExit", "raise GeneratorExit": "Gen"}


@pytest.mark.parametrize("statement, words", ENDS.items())
def test_a_predicate_that_ends_the_process(tmp_path, monkeypatch, statement, words):
    # exit() closes sys.stdin.
    monkeypatch.setattr("sys.stdin", io.StringIO())
    at_call = tmp_path / "at_call.py"
    at_call.write_text(f"import sys\ndef f(row):\n    {statement}\n")
    refuses(places_inside, f"{at_call}:f", match=["a.jsonl:1", f"raised {words}"])
    at_import = tmp_path / "at_import.py"
    at_import.write_text(f"import sys\n{statement}\n")
    message = ["at_import.py: cannot be imported", words]
    refuses(places_inside, f"{at_import}:f", match=message)


# ------------------------------------------------------------------------ what the splits hold

# Rows in distribution, which are those of two subreddits: 75 of 180.
TWO_SUBREDDITS = "subreddit=tifu,cats"
INSIDE = {row["response"] for row in ROWS if row["subreddit"] in ("tifu", "cats")}


@pytest.fixture
def by_subreddit(reddit):
    """A function: load the two subreddits, with these flags."""

    def load_two(**changes):
        return load_splits(flags(reddit, in_distribution=TWO_SUBREDDITS, **changes), "sft")

    return load_two


def test_rows_of_a_split_are_on_its_side(by_subreddit):
    rows, held_out, _ = by_subreddit(eval_splits=["test", "ood"])
    test = responses_of(held_out["eval"])
    ood = responses_of(held_out["ood"])
    assert len(INSIDE) == 75
    assert responses_of(rows) | test <= INSIDE
    assert not ood & INSIDE
    assert len(test) == 9
    assert len(ood) == 9


def test_no_held_out_prompt_is_trained_on(by_subreddit):
    rows, held_out, _ = by_subreddit(eval_splits=["test", "ood"])
    train = prompts_of(rows)
    assert not train & prompts_of(held_out["eval"])
    assert not train & prompts_of(held_out["ood"])


def test_rows_that_are_left_out_are_counted(by_subreddit):
    rows, _, note = by_subreddit(eval_splits=["test", "ood"])
    train = prompts_of(rows)
    # Of the prompts with rows on either side, those that are trained on.
    n_seen = 0
    for row in ROWS:
        is_outside = row["response"] not in INSIDE
        if is_outside and row["prompt"] in train:
            n_seen += 1
    assert 5 < n_seen < 20
    assert note == (
        f"{len(rows)} demonstrations, 9 held out, 9 in ood, 105 out of distribution left out "
        f"({n_seen} of them with prompts that are trained on, so they are not in ood either)"
    )


def test_ood_holds_all_rows_outside_whose_prompts_are_not_trained_on(by_subreddit):
    _, held_out, _ = by_subreddit(eval_splits=["ood"], eval_size=500)
    ood = held_out["eval"]
    assert 80 < len(ood) < 105
    outside = responses_of(ROWS) - INSIDE
    assert responses_of(ood) < outside


def test_no_split_depends_on_the_seed(reddit, by_subreddit):
    rows, held_out, _ = by_subreddit(eval_splits=["test", "ood"])
    seed_5 = load(flags(reddit, in_distribution=TWO_SUBREDDITS, seed=5), "sft")
    assert seed_5[:2] == (rows, held_out["eval"])


def test_no_split_depends_on_the_others(by_subreddit):
    _, held_out, _ = by_subreddit(eval_splits=["test", "ood"])
    rows, other_order, note = by_subreddit(eval_splits=["ood", "test"], max_rows=4)
    # The first is always called eval.
    assert other_order == {"eval": held_out["ood"], "test": held_out["eval"]}
    assert len(rows) == 4
    assert note.startswith("4 demonstrations, 9 in ood, 9 held out")


@pytest.fixture
def with_evaluation_set(reddit, tmp_path):
    """A function: flags with an evaluation set of its own, whose responses have 0 to 7 words.

    It has one prompt, p0, that is trained on.
    """
    rows = [{"prompt": f"q{i}", "response": "v " * i} for i in range(8)]
    rows.append({"prompt": "p0", "response": "v v v v v v"})
    other = jsonl(tmp_path / "b.jsonl", rows)

    def flags_with(eval_size):
        return flags(
            reddit,
            eval_size=eval_size,
            eval_dataset=other,
            eval_splits=["test", "ood"],
            in_distribution="words:response<=4",
        )

    return flags_with


def test_an_evaluation_set_has_its_own_ood(with_evaluation_set):
    rows, held_out, note = load_splits(with_evaluation_set(eval_size=9), "sft")
    test = sorted(prompts_of(held_out["eval"]))
    ood = sorted(prompts_of(held_out["ood"]))
    assert test == ["q0", "q1", "q2", "q3", "q4"]
    assert ood == ["p0", "q5", "q6", "q7"]
    # Training rows of at most four words: i % 5 + 2 of them.
    short_rows = [row["response"] for i, row in enumerate(ROWS) if i % 5 < 3]
    assert column(rows, "response") == short_rows
    assert note == (
        "108 demonstrations, 5 held out, 4 in ood, 72 out of distribution left out, "
        "1 of 4 prompts in ood are trained on too"
    )


def test_eval_size_bounds_the_ood_of_an_evaluation_set(with_evaluation_set):
    _, held_out, _ = load_splits(with_evaluation_set(eval_size=2), "sft")
    assert len(held_out["ood"]) == 2


def test_a_predicate_sees_the_prompt_that_two_dialogues_share(tmp_path):
    pairs = []
    for i in range(1, 20):
        prompt = f"\n\nHuman: {'why ' * i}\n\nAssistant:"
        pairs.append({"chosen": f"{prompt} a", "rejected": f"{prompt} b"})
    path = jsonl(tmp_path / "a.jsonl", pairs)
    rows, held_out, _ = load_splits(flags(path, in_distribution="words:prompt<=8"), "pairs")
    counts = {prompt.count("why") for prompt in prompts_of(rows + held_out["eval"])}
    # Human:, Assistant: and up to six times why.
    assert counts == {1, 2, 3, 4, 5, 6}


def test_a_predicate_reads_the_columns_of_the_data(tmp_path):
    """Where the data have a column called prompt it is that one, not the field made of another."""
    questions = []
    for i in range(20):
        questions.append({"prompt": "b", "question": f"q{2 * i}"})
        questions.append({"prompt": "a", "question": f"q{2 * i + 1}"})
    path = jsonl(tmp_path / "a.jsonl", questions)
    config = flags(path, columns=["prompt=question"], in_distribution="prompt=a")
    rows, held_out, _ = load_splits(config, "prompts")
    odd_questions = {f"q{i}" for i in range(1, 40, 2)}
    assert prompts_of(rows + held_out["eval"]) == odd_questions


def test_files_as_splits(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{**POST, "title": str(i)} for i in range(30)])
    news = jsonl(tmp_path / "news.jsonl", [NEWS] * 3)
    plain = jsonl(tmp_path / "plain.jsonl", ROWS)
    more = jsonl(tmp_path / "more.jsonl", [{**POST, "title": "more"}])
    # The second file names its format; the third has none; the last is read as --dataset is.
    named = ["test", f"cnn=cnn_dm:{news}", f"mine=:{plain}", f"more={more}"]
    config = flags(path, prompt_format="tldr", eval_splits=named, in_distribution="subreddit=tifu")

    _, held_out, note = load_splits(config, "sft")
    assert list(held_out) == ["eval", "cnn", "mine", "more"]
    assert "6 held out, 3 in cnn, 9 in mine, 1 in more" in note
    assert held_out["cnn"][0] == CNN_DM
    assert held_out["more"][0]["prompt"] == TLDR.replace("By {trusting} a cat", "more")
    # Nine random rows, not the first nine.
    mine = column(held_out["mine"], "response")
    assert set(mine) < responses_of(ROWS)
    assert mine != column(ROWS[:9], "response")


def test_a_file_without_a_format_has_the_columns_of_the_data_set(tmp_path):
    rows = [{"question": f"q{i}", "response": "a"} for i in range(40)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    more = jsonl(tmp_path / "more.jsonl", [{"question": "more", "response": "a"}])
    named = ["test", f"more={more}"]
    config = flags(path, columns=["prompt=question"], eval_splits=named)

    _, held_out, _ = load_splits(config, "sft")
    assert prompts_of(held_out["more"]) == {"more"}


def test_pairs_that_say_nothing_are_counted_in_all_splits(tmp_path):
    pairs = []
    for i in range(40):
        # Every fourth pair has two equal answers; every second one is in distribution.
        rejected = "a" if i % 4 == 0 else "b"
        kind = "x" if i % 2 == 0 else "y"
        pairs.append({"prompt": f"p{i}", "chosen": "a", "rejected": rejected, "kind": kind})
    path = jsonl(tmp_path / "a.jsonl", pairs)
    config = flags(path, in_distribution="kind=x", eval_splits=["test", "ood"])

    rows, held_out, note = load_splits(config, "pairs")
    assert len(rows) + len(held_out["eval"]) == 10
    for row in rows + held_out["eval"] + held_out["ood"]:
        assert row["rejected"] == "b"
    assert "10 with chosen == rejected skipped" in note


def test_a_file_of_pairs_that_say_nothing_is_named(tmp_path):
    """Which may be that of a split, not --dataset."""
    good = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    bad = jsonl(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}])
    nothing = "no pair is left in which chosen and rejected differ"
    refuses(load_splits, flags(good, eval_dataset=bad), "pairs", match=[f"{bad}: {nothing}"])
    refuses(load_splits, flags(bad, eval_dataset=good), "pairs", match=[f"{bad}: {nothing}"])
    named = flags(good, eval_dataset=good, eval_splits=["test", f"x={bad}"])
    refuses(load_splits, named, "pairs", match=[f"{bad}: {nothing}"])


def world_prompts(split):
    return prompts_of(world.prompts(split))


@pytest.mark.parametrize("kind", ["sft", "pairs", "prompts"])
def test_the_world_has_its_own_ood(monkeypatch, kind):
    monkeypatch.setattr(nanorlhf.data, "WORLD_SIZES", {"sft": 300, "pairs": 40})
    config = flags("world:2", eval_splits=["test", "ood"], eval_size=50)
    rows, held_out, note = load_splits(config, kind)
    ood = prompts_of(held_out["ood"])
    assert len(held_out["ood"]) == 50
    assert note.endswith("50 in ood")
    assert ood <= world_prompts("ood")
    assert len({world.topic_of(prompt) for prompt in ood}) == 4

    if kind == "pairs":
        everything = world.preferences(512, seed=2, split="ood")
        for row in held_out["ood"]:
            assert row in everything

    # Whether it is asked for or not, the others are the same.
    without_ood = load(flags("world:2", eval_size=50), kind)
    assert without_ood[:2] == (rows, held_out["eval"])


@pytest.fixture(scope="module")
def reviews():
    """Demonstrations of training topics, without those that answer questions."""
    prompts = world_prompts("train")
    return [row for row in world.demonstrations(1500) if row["prompt"] in prompts]


@pytest.fixture(scope="module")
def ood_reviews():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanorlhf.data, "WORLD_HELD_OUT", 512)
        return read_rows("world", "sft", split="ood")


def test_demonstrations_out_of_distribution_are_other_reviews(reviews, ood_reviews):
    assert len(ood_reviews) == 512
    assert prompts_of(ood_reviews) <= world_prompts("ood")
    assert not responses_of(ood_reviews) & responses_of(reviews)


def count_words(row):
    return len(row["response"].split())


def count_marks(row):
    return sum(word in world.MARKS for word in row["response"].split())


def gold_of(row):
    return world.gold([row["prompt"]], [row["response"]])[0]


def measure_all(measure, rows):
    return torch.tensor([measure(row) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("measure", [count_words, count_marks, gold_of])
def test_demonstrations_out_of_distribution_are_by_the_same_writer(reviews, ood_reviews, measure):
    inside = measure_all(measure, reviews)
    outside = measure_all(measure, ood_reviews)
    standard_error = inside.std(correction=0) / 512**0.5
    assert abs(inside.mean() - outside.mean()) < 4 * standard_error


# -------------------------------------------------------------------------------------- labels


def test_the_first_split_is_called_eval_and_others_by_their_names():
    assert splits.read_eval_splits(["test"]) == {"eval": "test"}
    assert splits.read_eval_splits(["cnn=cnn_dm:c.jsonl"]) == {"eval": "cnn_dm:c.jsonl"}
    sources = splits.read_eval_splits(["ood", "test", "a-1=x=y.jsonl"])
    assert sources == {"eval": "ood", "test": "test", "a-1": "x=y.jsonl"}


# Neither test nor ood, no file, no name, or a name that metrics have already.
BAD_LABELS = ["validation", "", "a=", "=a.jsonl", "a b=c.jsonl", "a/b=c.jsonl"]
TAKEN_LABELS = ["eval=a.jsonl", "ood=a.jsonl", "score=a.jsonl"]


@pytest.mark.parametrize("wrong", BAD_LABELS + TAKEN_LABELS)
def test_names_that_no_split_can_have(wrong):
    message = ["--eval_splits takes test, ood and NAME=FILE", repr(wrong)]
    refuses(splits.read_eval_splits, ["test", wrong], match=message)


def test_no_two_splits_have_one_name():
    refuses(splits.read_eval_splits, ["test", "test"], match=["--eval_splits names test twice"])
    refuses(
        splits.read_eval_splits, ["a=b.jsonl", "a=c.jsonl"], match=["--eval_splits names a twice"]
    )


# --------------------------------------------------------------------------- what is refused


def check_flags_refused(reddit, words, **changes):
    """load_splits() must refuse these flags and say these words."""
    config = flags(**{"dataset": reddit} | changes)
    refuses(load_splits, config, "sft", match=[words])


def test_no_row_in_distribution(reddit):
    words = "a.jsonl: no row is in distribution (--in_distribution subreddit=birds)"
    check_flags_refused(reddit, words, in_distribution="subreddit=birds")


def test_no_row_out_of_distribution(reddit):
    words = "a.jsonl: no held-out row is out of distribution"
    everything = "words:response<100"
    check_flags_refused(reddit, words, in_distribution=everything, eval_splits=["test", "ood"])


def test_a_column_that_is_missing(reddit):
    words = "a.jsonl:1: no field 'subredit'"
    check_flags_refused(reddit, words, in_distribution="subredit=cats")


def test_a_file_of_a_split_that_is_missing(reddit):
    changes = {"in_distribution": "subreddit=cats", "eval_dataset": reddit}
    words = "missing.jsonl: no such file"
    check_flags_refused(reddit, words, eval_splits=["x=missing.jsonl"], **changes)


def test_ood_needs_to_be_told_what_is_in_distribution(reddit):
    words = "--eval_splits ood needs --in_distribution"
    check_flags_refused(reddit, words, eval_splits=["test", "ood"])


def test_a_split_that_is_not_known(reddit):
    splits_asked = ["test", "validation"]
    check_flags_refused(reddit, "--eval_splits takes", eval_splits=splits_asked)
    check_flags_refused(reddit, "'validation'", eval_splits=splits_asked)


def test_the_world_takes_neither_a_predicate_nor_a_format(reddit):
    words = "--in_distribution is for data of one's own"
    check_flags_refused(reddit, words, dataset="world", in_distribution="prompt=x")
    check_flags_refused(reddit, words, eval_dataset="world", in_distribution="subreddit=cats")
    words = "--prompt_format is for data of one's own"
    check_flags_refused(reddit, words, dataset="world", prompt_format="tldr")


def test_demonstrations_of_the_world_are_no_evaluation_set(reddit):
    words = "--eval_dataset world: its demonstrations are all for training"
    check_flags_refused(reddit, words, eval_dataset="world")


# --------------------------------------------------------------------------- the scripts' use


def test_a_run_older_than_these_flags_is_the_same_run(tmp_path):
    config = flags("a.jsonl", output_dir=str(tmp_path))
    old = dict(vars(config))
    for name in ("eval_splits", "in_distribution", "prompt_format", "betas"):
        del old[name]
    (tmp_path / "config.json").write_text(json.dumps(old))
    dist = Dist(0, 1, torch.device("cpu"))
    assert RunFolder(config, dist).status == "unfinished"
    other = flags("a.jsonl", output_dir=str(tmp_path), eval_splits=["ood"])
    refuses(RunFolder, other, dist, match=["differs in eval_splits"])


def bon_flags(dataset, **changes):
    """The flags of sample_bon.py for the two subreddits."""
    defaults = {"in_distribution": TWO_SUBREDDITS, "eval_size": 9, "gold_model": "my.py:f"}
    return sample_bon.Config(**{"dataset": dataset, **defaults, **changes})


def test_prompts_of_best_of_n(reddit):
    config = flags(reddit, in_distribution=TWO_SUBREDDITS, eval_splits=["test", "ood"])
    rows, held_out, _ = load_splits(config, "prompts")

    def prompts(**changes):
        return sample_bon.prompts_of(bon_flags(reddit, **changes))[0]

    assert prompts() == held_out["eval"]
    assert prompts(split="train") == rows
    assert prompts(split="ood") == held_out["ood"]
    assert prompts(eval_splits=["ood"]) == held_out["ood"]


def test_all_prompts_of_a_format_for_best_of_n(tmp_path):
    path = str(jsonl(tmp_path / "a.jsonl", [POST]))
    config = bon_flags(path, split="all", in_distribution="", prompt_format="tldr")
    prompts, _ = sample_bon.prompts_of(config)
    assert column(prompts, "prompt") == [TLDR]


def test_prompts_of_the_world_for_best_of_n():
    config = sample_bon.Config(eval_splits=["ood"], eval_size=7)
    prompts, *_ = sample_bon.prompts_of(config)
    assert len(prompts) == 7
    assert prompts_of(prompts) < world_prompts("ood")


def check_bon_refused(reddit, words, **changes):
    refuses(bon_flags, reddit, split="ood", match=[words], **changes)


def test_flags_of_best_of_n_that_contradict_each_other(reddit):
    check_bon_refused(reddit, "--split ood is the embedded world's", in_distribution="")
    words = "--eval_splits takes the place of --split"
    check_bon_refused(reddit, words, eval_splits=["ood"])
    refuses(bon_flags, "world", split="ood", match=["data of one's own"])
