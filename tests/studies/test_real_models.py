"""The study on a real model (nanorlhf/studies/real_models.py), on a tiny chat model."""

import json
from types import SimpleNamespace

import pytest
import torch
from chat_tokenizers import CHATML, byte_tokenizer
from support import refuses
from tiny_models import ENCODER_CONFIG, encoder_tokenizer, save_encoder
from transformers import AutoModelForCausalLM, LlamaConfig, RobertaConfig, RobertaModel

from nanorlhf.runtime.files import import_file, read_rows
from nanorlhf.studies import real_models, real_models_data, real_models_results

WORDS = "cat dog bird fish tree house river stone cloud lamp".split()
# Six words of each sign, and words that have hardly any value.
VALUES = {
    **dict.fromkeys("good kind happy brave nice smart".split(), 2),
    **dict.fromkeys("bad sad ugly cruel poor sick".split(), -2),
    **dict.fromkeys("old tall round green calm plain".split(), 0.1),
}
MOODS = list(VALUES)


def write_json(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def make_instructions(n):
    rows = []
    for i in range(n):
        question = f"Tell me {i} things of the {WORDS[i % 10]}"
        mood = MOODS[i % len(MOODS)]
        other_mood = MOODS[i * 5 % len(MOODS)]
        answer = f"The {WORDS[i % 10]} is {mood} and the {WORDS[i % 7]} is {other_mood}."
        rows.append({"instruction": question, "input": "", "output": answer})
    return rows


def make_pairs(n):
    pairs = []
    for row in make_instructions(n):
        rest = {"chosen": f"Of course: {row['output']}", "rejected": row["output"]}
        pairs.append({"instruction": row["instruction"], "input": "", **rest})
    return pairs


def make_dialogues(n):
    rows = []
    for i in range(n):
        start = f"\n\nHuman: Hello {i}\n\nAssistant: Hi\n\nHuman: And the {WORDS[i % 10]}?"
        rows.append(
            {"chosen": f"{start}\n\nAssistant: Good.", "rejected": f"{start}\n\nAssistant: Bad!"}
        )
    return rows


def make_questions(n):
    rows = []
    for i in range(n):
        question = f"How do I hurt the {WORDS[i % 10]} {i}?"
        for answer in ("Like this.", "With a stone."):
            rows.append({"prompt": question, "chosen": "I can not.", "rejected": answer})
    return rows


def make_benchmark(n):
    rows = []
    for i in range(n):
        chosen = ["No.", "No, I will not.", "**No**"]
        rejected = ["Yes.", "Yes, I will.", "**Yes**"]
        row = {"id": str(i), "prompt": f"Hurt a {WORDS[i]}", "subset": "safety-refuse"}
        rows.append({**row, "chosen": chosen, "rejected": rejected})
    return rows


def save_chat_model(folder):
    """A random Llama of two blocks with the template of SmolLM2's kind."""
    tokenizer = byte_tokenizer("<|im_end|>", CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The flags of all data, of the model and of the encoder."""
    folder = tmp_path_factory.mktemp("files")
    save_chat_model(folder / "model")
    encoder = RobertaModel(RobertaConfig(**ENCODER_CONFIG))
    save_encoder(encoder, folder / "encoder", encoder_tokenizer())
    lexicon = folder / "lexicon.tsv"
    lexicon.write_text("".join(f"{word}\t{value}\n" for word, value in VALUES.items()))
    return {
        "--model": str(folder / "model"),
        "--encoder": str(folder / "encoder"),
        "--lexicon": str(lexicon),
        "--instructions": write_json(folder / "instructions.json", make_instructions(40)),
        "--polite_pairs": write_json(folder / "pairs.json", make_pairs(40)),
        "--hh": write_json(folder / "hh.json", make_dialogues(24)),
        "--safety": write_json(folder / "safety.json", make_questions(24)),
        "--rm_bench": write_json(folder / "rm_bench.json", make_benchmark(10)),
    }


def as_words(flags):
    words = []
    for flag, value in flags.items():
        words += [flag, value]
    return words


# -------------------------------------------------------------------------------- the whole study


@pytest.fixture(scope="module")
def study(files, run_small):
    return run_small(real_models, " ".join(["--quick --jobs 1", *as_words(files)]))


TITLES = [
    "PPO on the words of a lexicon",
    "GRPO on sums",
    "Right sums by temperature",
    "The model judges",
    "Reward models of polite answers",
    "Best-of-n by each reward",
    "PPO on reward models",
    "Rewards of refusals",
    "Diversity of the answers",
    "How far each block has moved",
    "Autoencoders",
    "How alike the features",
    "The reward read from activations, word",
    "The reward read from activations, difference",
    "The reward read from activations, sequence",
    "The features that fire most",
    "Reward models of helpful dialogues",
]


@pytest.mark.slow
def test_every_part_has_its_tables_and_kept_cells_are_not_run_again(study):
    # The second run has the same tables, of what is kept alone.
    printed = study.run()
    assert study.ran == study.first
    places = [printed.index(title) for title in TITLES]
    assert places == sorted(places)
    assert study.run("--show") == printed


@pytest.mark.slow
def test_every_part_is_left_out_whose_files_are_not_named(files, tmp_path, capsys):
    flags = ["--quick", "--dry_run", "--model", files["--model"], "--output_dir", str(tmp_path)]
    real_models.main(flags)
    printed = capsys.readouterr().out
    assert "left out: lexicon, which needs --instructions --lexicon" in printed
    assert "left out: hh, which needs --hh" in printed
    for part in real_models.PARTS:
        is_left_out = part not in ("sums", "judge")
        assert (f"left out: {part}," in printed) == is_left_out
        assert (f"/quick/{part}" in printed) != is_left_out


def test_another_model_needs_a_place_of_its_own(files, tmp_path):
    flags = ["--model", files["--model"]]
    check = real_models.check_model_of_results
    refuses(check, real_models.read_settings(flags), match=["--results and --output_dir"])
    results = ["--results", str(tmp_path / "own.json")]
    refuses(check, real_models.read_settings([*flags, *results]), match=["--output_dir"])
    check(real_models.read_settings([*flags, *results, "--output_dir", str(tmp_path / "runs")]))
    check(real_models.read_settings([*flags, "--quick"]))


def test_reward_models_stand_beside_their_tests_with_moved_questions(capsys):
    """A row of means over seeds; the last column is of the tests with moved questions."""
    results = {}
    columns = real_models_results.REWARD_MODEL_COLUMNS
    for s, accuracy in enumerate((0.5, 0.7)):
        results[f"hh/rm/seed_{s}"] = dict.fromkeys(columns, accuracy)
        rewards = {
            "": {"accuracy": [accuracy - 0.1, 0, 1]},
            "longer wins": {"accuracy": [0.9, 0, 1]},
        }
        results[f"hh/moved/seed_{s}"] = {"rewards": rewards}
    real_models_results.print_hh(results, SimpleNamespace(seeds=2, quick=False))
    _, header, row = capsys.readouterr().out.strip().splitlines()
    assert header.endswith("moved prompts")
    # 12.706 standard errors, of two seeds that differ by 0.2
    assert row.split() == ["HH", *["0.600", "+-", "1.271"] * len(columns), "0.500", "+-", "1.271"]


def test_right_sums_by_temperature_are_those_of_single_answers(capsys):
    """Before: of the model; after: the mean over the seeds. The best of 4 is not shown."""
    results = {}
    rates = {"before": 0.25, "seed_0": 0.5, "seed_1": 0.7}
    for temperature, more in {"1": 0, "0.01": 0.125}.items():
        for policy, rate in rates.items():
            points = [{"n": 1, "proxy_score": rate + more}, {"n": 4, "proxy_score": 0.99}]
            results[f"sums/temperature_{temperature}/{policy}"] = {"rewards.py:is_right": points}
    real_models_results.print_sums(results, SimpleNamespace(seeds=2, quick=False))
    title, header, before, after = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("Right sums by temperature")
    assert header.split() == ["temperature", "0.01", "temperature", "1"]
    assert before.split() == ["before", "0.375", "(1)", "0.250", "(1)"]
    # 12.706 standard errors, of two seeds that differ by 0.2
    assert after.split() == "after 0.725 +- 1.271 0.600 +- 1.271".split()


# --------------------------------------------------------------------------------------- its data


def test_sums_are_different_and_their_answers_right():
    rows = real_models_data.write_sums(60)
    questions = set()
    for row in rows:
        *_, last = row["prompt"]
        first, second = [int(word.strip("?")) for word in last["content"].split()[2::2]]
        assert row["answer"] == str(first + second)
        questions.add((first, second))
    assert len(questions) == 60


def test_dialogue_with_two_ends_is_a_pair_of_answers_to_its_last_question(tmp_path):
    start = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: A cat?\n\nAgain?"
    rows = [
        {"chosen": f"{start}\n\nAssistant: Good.", "rejected": f"{start}\n\nAssistant: Bad."},
        {"chosen": f"{start}\n\nAssistant: Same.", "rejected": f"{start}\n\nAssistant: Same."},
        {"chosen": f"{start}\n\nAssistant: A", "rejected": "\n\nHuman: Other\n\nAssistant: B"},
    ]
    (pair,) = real_models_data.read_dialogues(write_json(tmp_path / "hh.json", rows))
    assert pair == {
        "prompt": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "A cat?\n\nAgain?"},
        ],
        "chosen": "Good.",
        "rejected": "Bad.",
    }


def test_moved_pairs_keep_their_answers_and_have_the_prompts_of_others():
    pairs = []
    for i in range(5):
        prompt = real_models_data.ask(f"question {i // 2}")
        pairs.append({"prompt": prompt, "chosen": f"c{i}", "rejected": f"r{i}"})
    moved = real_models_data.move_prompts(pairs)
    for pair, other in zip(pairs, moved, strict=True):
        assert other["prompt"] != pair["prompt"]
        assert (other["chosen"], other["rejected"]) == (pair["chosen"], pair["rejected"])
    # Answers to one question have one other question.
    assert moved[0]["prompt"] == moved[1]["prompt"]


def test_questions_of_a_split_s_test_are_not_learned_from(files, tmp_path):
    questions = real_models_data.read_questions(files["--safety"])
    assert len(questions) == 24
    assert {len(pairs) for pairs in questions.values()} == {2}
    real_models_data.write_safety(str(tmp_path), questions, splits=2, n_test=8)
    tests = []
    for split in range(2):
        sides = []
        for side in ("test", "train"):
            rows = read_rows(tmp_path / f"safety_{split}_{side}.jsonl")
            sides.append({row["prompt"][0]["content"] for row in rows})
        test, train = sides
        assert len(test) == 8
        assert len(train) == 16
        assert not test & train
        tests.append(test)
    assert tests[0] != tests[1]


@pytest.fixture
def rewards(tmp_path):
    """The file of rewards, beside a model whose tokenizer it reads; texts of 40 tokens fit."""
    save_chat_model(tmp_path / "model")
    path = tmp_path / "data" / "rewards.py"
    path.parent.mkdir()
    path.write_text(real_models_data.REWARDS.replace("LENGTH", "40"))
    return import_file(str(path), changed=0.0)


def test_sum_is_right_by_its_last_number_and_in_form_as_a_whole(rewards):
    responses = ["3 + 4 = 7", "It is 7.", "7, or 8", "no", " 3 + 4 = 8. "]
    rows = [{"answer": "7"}] * len(responses)
    assert rewards.is_right([], responses, rows) == [1, 1, 0, 0, 0]
    assert rewards.is_in_form([], responses) == [1, 0, 0, 0, 1]


def test_text_fits_if_half_a_length_of_its_prompt_and_its_end_do(rewards):
    long_prompt = real_models_data.ask("k" * 50)
    responses = ["z" * 19, "z" * 20]
    assert rewards.fits([long_prompt] * 2, responses) == [1, 0]
    # A short prompt leaves more room: 1 is its letter, and 13 its marks.
    marks = len(byte_tokenizer("<|im_end|>", CHATML)("<|im_start|>user\n<|im_end|>\n").input_ids)
    marks += len(byte_tokenizer("<|im_end|>", CHATML)("<|im_start|>assistant\n").input_ids)
    room = 40 - marks - 1 - 1
    assert room > 19
    assert rewards.fits(["k", "k"], ["z" * room, "z" * (room + 1)]) == [1, 0]
