"""show/chat.py: what is answered, what it is scored, what is kept of a chat, and how it ends.

Most tests hand it a file of prompts, in this process. Those at the end type at a real terminal.
"""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chat_tokenizers import CHATML, byte_tokenizer
from support import ENV, REPO, read_rows, wait_for, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nanorlhf import world
from nanorlhf.show import chat
from nanorlhf.show.terminal import UNSAFE, unicodedata

PROMPT = "review the hotel :"

# A reward that writes down what it is asked.
REWARDS = """
import json, pathlib
def length(prompts, responses):
    with open(pathlib.Path(__file__).parent / "asked.jsonl", "a") as file:
        for prompt, response in zip(prompts, responses):
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\\n")
    return [float(len(response)) for response in responses]
def fails(prompts, responses):
    raise KeyError("no such answer")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny random models: chat_0 and chat_1 on bytes, world on the world's words; rewards.py."""
    root = tmp_path_factory.mktemp("talkers")
    tokenizer = byte_tokenizer("<|im_end|>", CHATML)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for seed in range(2):
        save(root / f"chat_{seed}", config, tokenizer, seed)
    config = world.model_config()
    config.num_hidden_layers = 1
    config.hidden_size = 16
    save(root / "world", config, world.tokenizer(), 0)
    (root / "rewards.py").write_text(REWARDS)
    return root


def save(path, config, tokenizer, seed):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """The working directory: the models, and a copy of rewards.py, which writes beside itself."""
    for path in models.iterdir():
        if path.is_dir():
            os.symlink(path, tmp_path / path.name)
    shutil.copy(models / "rewards.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")  # nothing is wrapped
    return tmp_path


@pytest.fixture
def say(capsys, monkeypatch):
    """A function: hand prompts and flags to the chat -> the lines it prints."""

    def talk(lines, *args):
        stdin = lines
        if isinstance(lines, list):
            stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        chat.run(list(args))
        return capsys.readouterr().out.splitlines()

    return talk


def asked(folder):
    """What the recording reward was asked: rows {prompt, response}."""
    return read_rows(folder / "asked.jsonl")


# ------------------------------------------------------------------------------ answers and scores


@pytest.mark.slow
def test_the_likeliest_answer_is_that_of_plain_transformers(folder, say):
    lines = say([PROMPT], "world", "--top_k", "1", "--max_new_tokens", "9")
    tokenizer = AutoTokenizer.from_pretrained("world")
    lm = AutoModelForCausalLM.from_pretrained("world")
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    answer = lm.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert lines[:2] == ["world:", text]


def test_scores_stand_below_each_answer(folder, say):
    flags = ["--reward_model", "rewards.py:length", "--max_new_tokens", "6"]
    lines = say([PROMPT], "world", *flags)
    (row,) = asked(folder)
    assert row["prompt"] == PROMPT
    assert lines[1] == row["response"]
    (gold,) = world.gold([PROMPT], [row["response"]])
    numbers = f"rewards.py:length {len(row['response']):+.2f}   world:gold {gold:+.2f}"
    assert lines[2] == f"{numbers}   [cut off]"


@pytest.mark.slow
def test_policies_stand_side_by_side_with_the_same_noise(folder, say, monkeypatch):
    shutil.copytree(folder / "world", folder / "twin")
    monkeypatch.setenv("COLUMNS", "203")
    lines = say([PROMPT], "world", "twin", "--max_new_tokens", "5")
    # Columns of 100 with a gap of 3. Twins draw the same numbers, so they say the same.
    for line in lines[1:3]:
        assert line[:100].rstrip() == line[103:]
    assert lines[0][:100].rstrip() == "world:"
    assert lines[0][103:] == "twin:"


@pytest.mark.slow
def test_seeds_turns_and_samples_have_noise_of_their_own(folder, say):
    flags = ["world", "--n", "2", "--max_new_tokens", "6", "--reward_model", "rewards.py:length"]
    first = say([PROMPT, PROMPT], *flags)
    assert say([PROMPT, PROMPT], *flags) == first
    assert say([PROMPT, PROMPT], *flags, "--seed", "1") != first
    responses = [row["response"] for row in asked(folder)[:4]]
    assert len(set(responses)) == 4
    titles = [line for line in first if line.startswith("world (")]
    assert titles == ["world (1 of 2):", "world (2 of 2):"] * 2


@pytest.mark.slow
def test_the_rewards_of_a_run_are_taken_from_its_config(folder, say):
    run = folder / "run"
    os.makedirs(run)
    os.symlink(folder / "world", run / "model")
    (folder / "words.tsv").write_text("the\t5\n")
    settings = {"output_dir": "run", "reward_model": ["words.tsv", "gone"], "gold_model": ""}
    (run / "config.json").write_text(json.dumps(settings))
    lines = say([PROMPT], "run", "world", "--max_new_tokens", "4")
    assert lines[0].startswith("a reward of the runs is left out: gone: ")
    assert "words.tsv +" in lines[3]
    assert "world:gold" in lines[3]
    # What the command names takes their place.
    lines = say([PROMPT], "run", "--max_new_tokens", "4", "--reward_model", "none")
    assert re.fullmatch(r"world:gold [+-]\d\.\d\d   \[cut off\]", lines[2])


def test_a_program_that_a_run_names_is_not_run(folder, say):
    run = folder / "run"
    os.makedirs(run)
    os.symlink(folder / "world", run / "model")
    evil = f"{run}/evil.py"
    with open(evil, "w") as file:
        file.write("open('was_run', 'w')\ndef reward(prompts, responses): return [0.0]\n")
    settings = {
        "output_dir": "run",
        "reward_model": [f"{evil}:reward"],
        "gold_model": f"{evil}:reward",
    }
    (run / "config.json").write_text(json.dumps(settings))
    lines = say([PROMPT], "run", "--max_new_tokens", "4")
    assert "runs only if the command names it" in lines[0]
    assert lines[1] == "run:"  # it is said once, though the program is the gold reward too
    assert not os.path.exists("was_run")
    say([PROMPT], "run", "--max_new_tokens", "4", "--reward_model", f"{evil}:reward")
    assert os.path.exists("was_run")


@pytest.mark.slow
def test_a_reward_that_fails_leaves_the_others(folder, say):
    lines = say(
        ["how was it ?"], "world", "--reward_model", "rewards.py:length", "rewards.py:fails"
    )
    assert re.match(r"rewards.py:length \+\d+\.00   rewards.py:fails \?   world:gold \?", lines[2])
    assert "KeyError: 'no such answer'" in lines[4]
    assert "no topic of the embedded world" in lines[5]
    assert len(lines) == 6


# --------------------------------------------------------------------------------- what is a prompt


def test_words_that_the_world_does_not_have_are_named(folder, say):
    lines = say(["Review the hotel:", PROMPT], "world", "world", "--max_new_tokens", "3")
    assert lines[0].startswith("the embedded world has no word for: Review, hotel: (")
    assert lines[1].startswith("world:")
    assert say(["how is <eos> ?"], "world")[0].startswith(
        "the embedded world has no word for: <eos> "
    )


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_an_error_and_the_chat_goes_on(folder, say):
    lines = say(["the " * 200, "the " * 126, PROMPT], "world")
    assert "a prompt of 200 tokens" in lines[0]
    assert lines[1] == "world:"
    # The world's model reads 128 tokens, so two of an answer still fit.
    assert len(lines[2].split()) <= 2
    assert lines.count("world:") == 2


@pytest.mark.slow
def test_a_prompt_is_refused_by_one_policy_alone(folder, say):
    lines = say(["Hello"], "world", "chat_0", "--max_new_tokens", "3", "--reward_model", "none")
    assert "the embedded world has no word for: Hello" in lines[1]
    assert "chat_0:" in lines[0]


@pytest.mark.slow
def test_what_is_no_prompt(folder, say):
    assert say([], "world") == []
    assert say(["", "  ", "/quit", PROMPT], "world") == []
    assert say(["/help"], "world") == chat.HELP.splitlines()
    assert say(["/rest"], "world") == ["no command /rest; there are /reset, /quit and /help"]


# -------------------------------------------------------------------------------------------- turns


def test_a_chat_keeps_its_turns_and_each_policy_its_own(folder, say):
    flags = ["chat_0", "chat_1", "--reward_model", "rewards.py:length", "--max_new_tokens", "5"]
    say(["Hi", "And now?", "/reset", "Hi again"], *flags)
    rows = asked(folder)
    assert len(rows) == 6
    question = {"role": "user", "content": "Hi"}
    for first, second, third in (rows[::2], rows[1::2]):
        assert first["prompt"] == [question]
        answer = {"role": "assistant", "content": first["response"]}
        assert second["prompt"] == [question, answer, {"role": "user", "content": "And now?"}]
        assert third["prompt"] == [{"role": "user", "content": "Hi again"}]
    assert rows[0]["response"] != rows[1]["response"]


@pytest.mark.slow
def test_a_chat_goes_on_with_the_first_of_several_answers(folder, say):
    flags = ["chat_0", "--reward_model", "rewards.py:length", "--max_new_tokens", "5", "--n", "2"]
    say(["Hi", "And now?"], *flags)
    rows = asked(folder)
    assert rows[0]["response"] != rows[1]["response"]
    assert [row["prompt"][1]["content"] for row in rows[2:]] == [rows[0]["response"]] * 2


@pytest.mark.slow
def test_plain_prompts_stand_alone(folder, say):
    flags = ["chat_0", "--reward_model", "rewards.py:length", "--max_new_tokens", "5"]
    say(["Hi", "And now?"], *flags, "--plain")
    assert [row["prompt"] for row in asked(folder)] == ["Hi", "And now?"]


def test_a_system_prompt_begins_every_chat(folder, say):
    flags = ["chat_0", "--reward_model", "rewards.py:length", "--max_new_tokens", "5"]
    say(["Hi", "And now?", "/reset", "Hi again"], *flags, "--system", "Be brief.")
    first, second, third = [row["prompt"] for row in asked(folder)]
    system = {"role": "system", "content": "Be brief."}
    assert first == [system, {"role": "user", "content": "Hi"}]
    assert second[:2] == first
    assert [turn["role"] for turn in second] == ["system", "user", "assistant", "user"]
    assert third == [system, {"role": "user", "content": "Hi again"}]


def test_a_prompt_cannot_end_its_own_turn(folder, say):
    lines = say(["Hi<|im_end|>"], "chat_0", "--reward_model", "none")
    assert lines == ["the prompt spells <|im_end|>, which the chat template takes for its own"]


# ------------------------------------------------------------------------------------ safe printing


def test_answers_give_no_orders_to_the_terminal(folder, say):
    flags = ["--reward_model", "rewards.py:length", "--n", "30", "--max_new_tokens", "60"]
    lines = say(["Hi\x1b[31m"], "chat_0", *flags)
    responses = "".join(row["response"] for row in asked(folder))
    # A random model on bytes writes many of them.
    kinds = {unicodedata.category(letter) for letter in responses}
    assert "\x1b" in responses and "Cc" in kinds
    for line in lines:
        assert not any(unicodedata.category(letter) in UNSAFE for letter in line), ascii(line)


# ------------------------------------------------------------------------------------------- errors


def refused(capsys, *args):
    """The chat must end with exit code 2 and one line -> the line."""
    with pytest.raises(SystemExit) as exit_:
        chat.run(list(args))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "--runs"),
        (["no/such/model"], "no such model folder"),
        (["world", "gone/x/y"], "no such model folder"),
        (["world", "--system", "Be brief."], "world reads each prompt alone"),
        (["chat_0", "--system", "Be brief.", "--plain"], "chat_0 reads each prompt alone"),
        (["world", "--n", "0"], "--n must be at least 1"),
        (["world", "--top_p", "0"], "--top_p must lie between 0 and 1"),
        (["world", "--temperature", "0"], "--temperature must be positive"),
        (["world", "--reward_model", "none.py:f"], "none.py: no such file"),
        (["world", "--gold_model", "gone.tsv"], "gone.tsv: no such file"),
    ],
)
def test_errors_are_one_line(folder, capsys, args, words):
    assert words in refused(capsys, *args)


@pytest.mark.slow
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_prompts_that_are_not_utf8_are_one_error(folder, capsys, monkeypatch, errors):
    stdin = io.TextIOWrapper(io.BytesIO(b"review \xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert "not UTF-8" in refused(capsys, "world")


# --------------------------------------------------------------------------------- a real terminal


class Terminal:
    """The chat in a process of its own, on a terminal of its own."""

    def __init__(self, *args, columns=80):
        self.text = ""
        ours, theirs = pty.openpty()
        self.ours = ours
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanorlhf.show.chat", *map(str, args)],
            cwd=REPO,
            env={**ENV, "COLUMNS": str(columns), "TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def wait_for(self, text, seconds=120):
        """Read what is printed until the text is there."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, self.text
            ready, _, _ = select.select([self.ours], [], [], 1)
            if ready:
                self.text += os.read(self.ours, 4096).decode()

    def type(self, text):
        self.text = ""
        os.write(self.ours, text.encode())

    def interrupt(self):
        """Ctrl-C, once the process waits for something.

        Pitfall: Python handles a signal between two steps, or when it ends a wait. One that comes
        after the last step and before the wait is only handled when the wait is over. readline
        prints its mark before it waits, so that the mark is no sign of it.
        """
        stat = Path(f"/proc/{self.process.pid}/stat")
        if stat.exists():
            # The letter behind the name is S while the process sleeps.
            wait_for(lambda: stat.read_text().rpartition(") ")[2].startswith("S"))
        else:  # no Linux
            time.sleep(1)
        self.process.send_signal(signal.SIGINT)

    def end(self):
        """The exit code, and all that was printed since something was typed."""
        code = self.process.wait(60)
        while select.select([self.ours], [], [], 0)[0]:
            try:
                self.text += os.read(self.ours, 4096).decode()
            except OSError:  # the terminal is closed
                break
        os.close(self.ours)
        return code, self.text


@pytest.mark.slow
def test_a_terminal_has_prompt_marks_and_ctrl_d_leaves(folder):
    terminal = Terminal(folder / "world", "--max_new_tokens", "3")
    terminal.wait_for("> ")
    assert "world reads each prompt alone" in terminal.text
    assert "scored by world:gold" in terminal.text
    terminal.type(f"{PROMPT}\n")
    terminal.wait_for("world:gold")
    terminal.wait_for("> ")
    terminal.type("\x04")
    code, printed = terminal.end()
    assert code == 0
    assert printed.strip() in ("", "^D\b\b")


@pytest.mark.slow
@pytest.mark.parametrize("during", ["input", "answer"])
def test_ctrl_c_leaves_quietly(folder, during):
    slow_reward = folder / "slow.py"
    slow_reward.write_text(
        "import time\ndef f(p, r):\n    print('SCORING', flush=True)\n    time.sleep(60)\n"
    )
    terminal = Terminal(folder / "world", "--reward_model", f"{slow_reward}:f")
    terminal.wait_for("> ")
    if during == "answer":
        terminal.type(f"{PROMPT}\n")
        terminal.wait_for("SCORING")
    terminal.text = ""
    terminal.interrupt()
    code, printed = terminal.end()
    assert code == 0
    assert printed.strip() == ""


@pytest.mark.slow
def test_a_reader_that_is_gone_ends_the_chat(folder):
    prompts = write_rows(folder / "prompts.txt", [PROMPT] * 200)
    command = f"{sys.executable} -m nanorlhf.show.chat {folder}/world < {prompts} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=REPO,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout == "world:\n"
    assert done.stderr == ""
