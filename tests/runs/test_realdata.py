"""The three scripts on a real small language model and real data. They lie beside the project in ../shared, not in it: without them
these tests are skipped."""

import gzip
import json
import os

import pytest
from support import REPO

import train_ppo
import train_rm
import train_sft

REAL = os.path.join(REPO.parent, "shared", "realdata")
MODEL = os.path.join(REAL, "lm", "stories260K")  # Llama, 260 thousand parameters; bos = eos = 1
pytestmark = pytest.mark.skipif(
    not os.path.isdir(REAL), reason="the real data is not beside this checkout (../shared/realdata)"
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The first six words of real stories as prompts, the rest as responses."""
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    with gzip.open(os.path.join(REAL, "text", "tinystories.txt.gz"), "rt", encoding="utf-8") as f:
        texts = [t.strip().split(" ") for t in f.read().split("<|endoftext|>")[:-1]]
    rows = [
        {"prompt": " ".join(words[:6]), "response": " ".join(words[6:40])}
        for words in texts
        if len(words) > 40
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_ppo_on_a_word_lexicon(stories, tmp_path):
    config = train_ppo.Config(
        model=MODEL, dataset=stories, reward_model=os.path.join(REAL, "sentiment", "vader_lexicon.tsv"), steps=8, batch_size=32,
        minibatch_size=16, max_new_tokens=16, eval_size=64, lr=2e-4, output_dir=str(tmp_path / "ppo"),
    )  # fmt: skip
    summary = train_ppo.main(config)
    before, after = summary["before"], summary["after"]
    assert after["proxy"] - before["proxy"] > 3 * (after["proxy_se"] + before["proxy_se"])
    assert 0 < after["kl"] < 50
    records = [json.loads(line) for line in open(tmp_path / "ppo" / "metrics.jsonl")]
    assert all(
        r["first_ratio_error"] < 5e-5 for r in records[1:]
    )  # logits of +-20 lose a digit against the small models of other tests


def test_reward_model_on_polite_pairs(tmp_path):
    config = train_rm.Config(
        model=MODEL, dataset=os.path.join(REAL, "preferences", "instruction_polite.json.gz"), columns=["prompt=instruction"], steps=40, max_length=128,
        batch_size=16, eval_size=100, lr=1e-3, output_dir=str(tmp_path / "rm"),
    )  # fmt: skip
    result = train_rm.main(config)
    assert result["eval/accuracy"] > result["eval/longer_wins"] + 3 * result["eval/accuracy_se"]
    assert result["eval/accuracy"] > result["eval/shorter_wins"] + 3 * result["eval/accuracy_se"]
    assert result["eval/score_std"] == pytest.approx(1, abs=1e-3)


def test_sft_on_stories(stories, tmp_path):
    config = train_sft.Config(
        model=MODEL,
        dataset=stories,
        steps=1,
        batch_size=16,
        lr=0.0,
        eval_size=32,
        n_samples=1,
        output_dir=str(tmp_path / "a"),
    )
    before = train_sft.main(config)
    config = train_sft.Config(
        model=MODEL,
        dataset=stories,
        steps=20,
        batch_size=16,
        lr=1e-3,
        eval_size=32,
        n_samples=1,
        output_dir=str(tmp_path / "b"),
    )
    after = train_sft.main(config)
    assert after["eval/perplexity"] < before["eval/perplexity"] < 20
