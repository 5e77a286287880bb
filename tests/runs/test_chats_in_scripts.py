"""A chat goes through all scripts: SFT, reward model, DPO, PPO, best-of-n, a probe and judges."""

import json

import pytest
import torch
from chat_tokenizers import CHATML, LLAMA, byte_tokenizer
from support import join, metrics, ranks, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
)

import sample_bon
import train_ppo
import train_rm
import train_sft
from nanorlhf.errors import InputError
from nanorlhf.evals import win_rates
from nanorlhf.interp import comparisons

pytestmark = pytest.mark.slow

REWARDS = """
import json
import pathlib

ROWS = {}  # {the last user turn: the row}
for line in open(__file__[:-8] + "/chats.jsonl"):
    row = json.loads(line)
    ROWS[json.dumps(row["messages"][-2])] = row

def knows_its_row(prompts, responses, rows):
    for prompt, row in zip(prompts, rows):
        # The row is the file's, and the prompt is its chat up to the last user turn.
        assert row == ROWS[json.dumps(prompt[-1])], (prompt, row)
        assert prompt == row["messages"][:-1], (prompt, row)
    return [float(len(response)) for response in responses]

CALLS = []

def stops_once(prompts, responses, rows):
    CALLS.append(1)
    stop = pathlib.Path(__file__).parent / "stop"
    if stop.exists() and len(CALLS) == 4:  # two evaluations, the first rollout, the second
        stop.unlink()
        raise RuntimeError("stopped")
    return knows_its_row(prompts, responses, rows)
"""


def say(role, content):
    return {"role": role, "content": content}


def make_chats():
    """Rows of one to three turns; every other chat has a system prompt."""
    rows = []
    for i in range(24):
        messages = []
        if i % 2:
            messages.append(say("system", "Be brief."))
        for turn in range(i % 3):
            messages += [say("user", f"Is {turn} odd?"), say("assistant", "Think.")]
        messages += [say("user", f"What is {i}?"), say("assistant", f"A number, {i}.")]
        rows.append({"messages": messages, "answer": i})
    return rows


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a tiny chat model, chats, pairs of them and a reward; a trained run of each."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = byte_tokenizer("<|im_end|>", CHATML)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eot>")]
    GenerationConfig(eos_token_id=ends).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    chats = make_chats()
    write_rows(folder / "chats.jsonl", chats)
    pairs = []
    for row in chats:
        worse = [*row["messages"][:-1], say("assistant", "No idea!")]
        pairs.append({"chosen": row["messages"], "rejected": worse})
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "mine.py").write_text(REWARDS)

    small = {"steps": 2, "batch_size": 4, "eval_size": 4, "warmup": 0}
    train_sft.main(
        train_sft.Config(
            model=f"{folder}/base",
            dataset=f"{folder}/chats.jsonl",
            output_dir=f"{folder}/sft",
            max_new_tokens=6,
            **small,
        )
    )
    train_rm.main(
        train_rm.Config(
            model=f"{folder}/sft",
            dataset=f"{folder}/pairs.jsonl",
            output_dir=f"{folder}/rm",
            **small,
        )
    )
    train_ppo.main(ppo_config(folder, "ppo", [f"{folder}/rm"]))
    return folder


def ppo_config(folder, name, rewards, **changes):
    settings = {
        "model": f"{folder}/sft",
        "dataset": f"{folder}/chats.jsonl",
        "reward_model": rewards,
        "gold_model": f"{folder}/mine.py:knows_its_row",
        "output_dir": f"{folder}/{name}",
        "steps": 2,
        "batch_size": 4,
        "minibatch_size": 4,
        "eval_size": 4,
        "max_new_tokens": 6,
        **changes,
    }
    return train_ppo.Config(**settings)


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_evaluations_hold_the_datas_own_chats(here):
    chats = make_chats()
    for step in (0, 2):
        for answer in read(here / f"ppo/eval/step_{step}.jsonl"):
            assert answer["row"] in chats
            assert answer["prompt"] == answer["row"]["messages"][:-1]


def test_evaluations_are_data_again(here):
    summary = train_sft.main(
        train_sft.Config(
            model=f"{here}/base",
            dataset=f"{here}/ppo/eval/step_2.jsonl",
            eval_dataset=f"{here}/ppo/eval/step_0.jsonl",
            output_dir=f"{here}/sft_on_answers",
            steps=1,
            batch_size=2,
            max_new_tokens=4,
        )
    )
    assert summary["step"] == 1


def test_rewards_that_know_the_row_in_ppo(here):
    summary = train_ppo.main(ppo_config(here, "ppo_rows", [f"{here}/mine.py:knows_its_row"]))
    assert summary["after"]["proxy"] == summary["after"]["gold"]


def test_rewards_know_their_rows_after_a_resume(here):
    (here / "stop").touch()
    settings = {"eval_splits": ["test"], "gold_model": "", "checkpoint_every": 1, "steps": 3}
    rewards = [f"{here}/mine.py:stops_once"]
    with pytest.raises(InputError, match="stopped"):
        train_ppo.main(ppo_config(here, "stopped", rewards, **settings))
    assert not (here / "stopped/summary.json").exists()

    train_ppo.main(ppo_config(here, "stopped", rewards, resume=True, **settings))
    train_ppo.main(ppo_config(here, "whole", rewards, **settings))

    for step in (0, 3):
        name = f"eval/step_{step}.jsonl"
        assert read(here / "stopped" / name) == read(here / "whole" / name)


def test_rewards_know_their_rows_on_two_processes(here, tmp_path):
    rewards = [f"{here}/mine.py:knows_its_row"]
    config = ppo_config(
        here, "two", rewards, steps=1, gold_model="", output_dir=str(tmp_path / "two")
    )
    join(*ranks(2, train_ppo.main, config))
    one = train_ppo.main(ppo_config(here, "ppo_one", rewards, steps=1, gold_model=""))
    two = json.loads((tmp_path / "two/summary.json").read_text())
    assert two["before"]["proxy"] == pytest.approx(one["before"]["proxy"], abs=1e-6)


def test_best_of_n_of_chats(here):
    config = sample_bon.Config(
        model=f"{here}/sft",
        dataset=f"{here}/chats.jsonl",
        reward_model=[f"{here}/mine.py:knows_its_row", f"{here}/rm"],
        output_dir=f"{here}/bon",
        n_answers=4,
        n=[2],
        save_best=True,
        split="all",
        max_rows=4,
        max_new_tokens=6,
        diversity=True,
    )
    sample_bon.main(config)
    chats = make_chats()
    for row in read(here / "bon/pool.jsonl"):
        assert row["row"] in chats
        assert row["prompt"] == row["row"]["messages"][:-1]
        assert row["scores"]["mine.py:knows_its_row"] == [len(text) for text in row["responses"]]
    for row in read(here / "bon/best_of_2.jsonl"):
        assert row["row"] in chats

    # The pool is data again, and its rows are still those of the file.
    pool = sample_bon.Config(
        pool=f"{here}/bon/pool.jsonl",
        reward_model=[f"{here}/mine.py:knows_its_row"],
        output_dir=f"{here}/bon_again",
    )
    sample_bon.main(pool)


def test_dpo_on_pairs_of_chats(here):
    summary = train_sft.main(
        train_sft.Config(
            loss="dpo",
            model=f"{here}/sft",
            dataset=f"{here}/pairs.jsonl",
            output_dir=f"{here}/dpo",
            steps=2,
            batch_size=4,
            eval_size=4,
            max_new_tokens=4,
        )
    )
    assert 0 <= summary["eval/accuracy"] <= 1


def test_a_probe_on_chats(here):
    config = comparisons.DivergenceConfig(
        model=f"{here}/base",
        policy=f"{here}/sft",
        dataset=f"{here}/chats.jsonl",
        output_dir=f"{here}/diverge",
    )
    summary = comparisons.divergence(config)
    assert summary["texts"] == 24


def test_judges_of_chats(here):
    config = win_rates.JudgeConfig(
        a=[f"{here}/ppo/eval/step_2.jsonl"],
        b=[f"{here}/ppo/eval/step_0.jsonl"],
        judge=[f"{here}/rm"],
        output_dir=f"{here}/judge",
    )
    summary = win_rates.judge(config)
    assert summary["prompts"] == 4


# ------------------------------------------------------------------------- strings as users' turns


@pytest.fixture(scope="module")
def strings(here):
    """Files of plain strings, the same as chats of one turn, and a classifier with a template."""
    rows = []
    for i in range(24):
        answers = {"chosen": f"A number, {i}.", "rejected": "No idea!"}
        rows.append({"prompt": f"What is {i}?", "response": f"{i}.", **answers})
    chats = [{**row, "prompt": [say("user", row["prompt"])]} for row in rows]
    for name, some in {"strings": rows, "turns": chats}.items():
        texts = [{"prompt": row["prompt"], "response": row["response"]} for row in some]
        pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in some]
        write_rows(here / f"{name}.jsonl", texts)
        write_rows(here / f"{name}_pairs.jsonl", pairs)

    # It has a template of its own, so it must know that the strings are turns.
    tokenizer = byte_tokenizer(template=LLAMA)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(here / "classifier")
    tokenizer.save_pretrained(here / "classifier")
    return here


SMALL = {"steps": 2, "batch_size": 4, "eval_size": 4, "warmup": 0}


def run_on(here, kind, name):
    """A run on the strings with --chat_template, or on the chats. -> what it measures"""
    settings = {"output_dir": f"{here}/{kind}_{name}", "chat_template": name == "strings"}
    dataset = f"{here}/{name}.jsonl"
    if kind == "sft":
        settings |= {"model": f"{here}/base", "max_new_tokens": 6, **SMALL}
        train_sft.main(train_sft.Config(dataset=dataset, **settings))
    elif kind == "rm":
        # Gold in each record, as Kendall's tau to it.
        settings |= {"model": f"{here}/sft", "gold_model": f"{here}/classifier", **SMALL}
        summary = train_rm.main(train_rm.Config(dataset=f"{here}/{name}_pairs.jsonl", **settings))
        return summary
    elif kind == "ppo":
        settings |= {"dataset": dataset, "gold_model": ""}
        train_ppo.main(ppo_config(here, kind, [f"{here}/classifier"], **settings))
    else:
        settings |= {"n_answers": 2, "max_new_tokens": 6, "split": "all", "max_rows": 3}
        rewards = [f"{here}/classifier"]
        config = sample_bon.Config(
            model=f"{here}/sft", dataset=dataset, reward_model=rewards, **settings
        )
        sample_bon.main(config)
        pool = read(here / f"bon_{name}/pool.jsonl")
        return [(row["responses"], row["scores"]) for row in pool]
    samples = read(here / f"{kind}_{name}/samples.jsonl")
    return metrics(here / f"{kind}_{name}"), [row["response"] for row in samples]


@pytest.mark.parametrize("kind", ["sft", "rm", "ppo", "bon"])
def test_strings_with_chat_template_are_chats_of_one_turn(strings, kind):
    assert run_on(strings, kind, "strings") == run_on(strings, kind, "turns")
