"""The study on a real model (nanorlhf/studies/real_models.py), on a tiny chat model."""

import json

import pytest
import torch
from chat_tokenizers import CHATML, byte_tokenizer
from support import refuses
from tiny_models import ENCODER_CONFIG, encoder_tokenizer, save_encoder
from transformers import AutoModelForCausalLM, LlamaConfig, RobertaConfig, RobertaModel

from nanorlhf.runtime.files import import_file, read_rows
from nanorlhf.studies import real_models, real_models_data

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
    "A reward model of helpful dialogues",
]


@pytest.mark.slow
def test_every_part_has_its_tables_and_kept_cells_are_not_run_again(study):
    # The second run has the same tables, of what is kept alone.
    printed = study.run()
    assert study.ran == study.first
    places = [printed.index(title) for title in TITLES]
    assert places == sorted(places)
    assert study.run("--show") == printed
