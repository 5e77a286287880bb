"""The three scripts on a real small language model and real data.

They lie beside the project in ../shared, not in it: without them these tests are skipped.
"""

import gzip

import pytest
from support import REPO, metrics, write_rows

import train_ppo
import train_rm
import train_sft

REAL = REPO.parent / "shared/realdata"
# A Llama of 260 thousand parameters, whose BOS and EOS are both token 1.
MODEL = str(REAL / "lm/stories260K")
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real data is not beside this checkout (../shared/realdata)"
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The first six words of real stories as prompts, the next 34 as responses."""
    with gzip.open(REAL / "text/tinystories.txt.gz", "rt", encoding="utf-8") as file:
        texts = file.read().split("<|endoftext|>")
    rows = []
    # Nothing but a line's end follows the last mark.
    for text in texts[:-1]:
        words = text.strip().split(" ")
        if len(words) > 40:
            rows.append({"prompt": " ".join(words[:6]), "response": " ".join(words[6:40])})
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    return str(write_rows(path, rows))


def test_ppo_on_a_word_lexicon(stories, tmp_path):
    config = train_ppo.Config(
        model=MODEL,
        dataset=stories,
        reward_model=[str(REAL / "sentiment/vader_lexicon.tsv")],
        steps=8,
        batch_size=32,
        minibatch_size=16,
        max_new_tokens=16,
        eval_size=64,
        lr=2e-4,
        output_dir=str(tmp_path),
    )
    summary = train_ppo.main(config)
    before = summary["before"]
    after = summary["after"]
    error = after["proxy_se"] + before["proxy_se"]
    assert after["proxy"] - before["proxy"] > 3 * error
    assert 0 < after["kl"] < 50
    for row in metrics(tmp_path)[1:]:
        # Logits of +-20 lose a digit against the small models of other tests.
        assert row["first_ratio_error"] < 5e-5


def test_reward_model_on_polite_pairs(tmp_path):
    """It learns more than which of two responses is longer."""
    config = train_rm.Config(
        model=MODEL,
        dataset=str(REAL / "preferences/instruction_polite.json.gz"),
        columns=["prompt=instruction"],
        steps=40,
        max_length=128,
        batch_size=16,
        eval_size=100,
        lr=1e-3,
        output_dir=str(tmp_path),
    )
    result = train_rm.main(config)
    at_least = result["eval/accuracy"] - 3 * result["eval/accuracy_se"]
    assert at_least > result["eval/longer_wins"]
    assert at_least > result["eval/shorter_wins"]
    assert result["eval/score_std"] == pytest.approx(1, abs=1e-3)


def sft_perplexity(stories, folder, **settings):
    """Held-out perplexity after SFT on the stories."""
    config = train_sft.Config(
        model=MODEL,
        dataset=stories,
        batch_size=16,
        eval_size=32,
        n_samples=1,
        output_dir=str(folder),
        **settings,
    )
    return train_sft.main(config)["eval/perplexity"]


def test_sft_on_stories(stories, tmp_path):
    # A step with a learning rate of 0 leaves the model as it is.
    before = sft_perplexity(stories, tmp_path / "before", steps=1, lr=0.0)
    after = sft_perplexity(stories, tmp_path / "after", steps=20, lr=1e-3)
    assert before < 20
    assert after < before
