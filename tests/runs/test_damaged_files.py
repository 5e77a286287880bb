"""Files that were damaged, or that hold something else, at every door where a file comes in.

A door is a file and the command that reads it. What is refused is one InputError that names the
file, without a line from any library, and nothing on disk is changed: cli.run() makes one line and
exit code 2 of it (test_errors.py).
"""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import Killed, small

import sample_bon
import train_ppo
import train_rm
import train_sft
from nanorlhf import pool
from nanorlhf.control import human_latents
from nanorlhf.control.feature_reader import latents_fingerprint
from nanorlhf.errors import InputError
from nanorlhf.evals import win_rates
from nanorlhf.hf.adapters import save_adapter
from nanorlhf.hf.lora import add_lora
from nanorlhf.interp import comparisons
from nanorlhf.models import load_policy, load_reward_model, load_tokenizer, save_policy
from nanorlhf.rewards import load_reward
from nanorlhf.runtime import cli, log
from nanorlhf.runtime.distributed import setup

# Hundreds of broken files take a while.
pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------------- the doors

# Each of these reads files of the folder `root`, which is the shelf below.


def run_sft(root, **changes):
    settings = {"output_dir": f"{root}/out", **small(root, "sft"), **changes}
    train_sft.main(train_sft.Config(**settings))


def run_sft_on_json(root):
    run_sft(root, dataset=f"{root}/sft.json")


def run_rm(root):
    train_rm.main(train_rm.Config(output_dir=f"{root}/out", **small(root, "rm")))


def run_frozen_sarm(root):
    train_rm.main(train_rm.Config(output_dir=f"{root}/out", **small(root, "sarm_frozen")))


def run_ppo(root, **changes):
    settings = {"output_dir": f"{root}/out", **small(root, "ppo"), **changes}
    train_ppo.main(train_ppo.Config(**settings))


def run_ppo_from_an_adapter(root):
    run_ppo(root, model=f"{root}/adapter")


def run_ppo_with_a_reward_model(root):
    run_ppo(root, reward_model=[f"{root}/rm"])


def run_ppo_with_a_sarm(root):
    run_ppo(root, reward_model=[f"{root}/sarm"])


def run_control(root):
    human = f"{root}/human.safetensors"
    run_ppo(root, **small(root, "control", tau=["q0.5"], human_latents=human))


def run_best_of_n(root):
    settings = small(root, "bon", n_answers=2, eval_size=3, max_new_tokens=4)
    settings["reward_model"] = [f"{root}/rewards.py:the"]
    sample_bon.main(sample_bon.Config(output_dir=f"{root}/bon", **settings))


def resume_sft(root):
    args = ["--output_dir", f"{root}/half", "--resume"]
    train_sft.main(cli.parse(train_sft.Config, args))


def score_gold(root):
    gold = f"{root}/rewards.py:words"
    train_ppo.main(train_ppo.Config(score_gold=f"{root}/ppo", gold_model=gold))


def judge(root):
    answers = [f"{root}/answers.json"]
    win_rates.judge(win_rates.JudgeConfig(a=answers, b=answers, output_dir=f"{root}/out"))


def compare_autoencoders(root):
    """One autoencoder with itself, by another name."""
    a = f"{root}/sae/policy/2_residual"
    b = f"{root}/sae/policy/../policy/2_residual"
    comparisons.mmcs(comparisons.MmcsConfig(a=[a], b=[b], output_dir=f"{root}/out"))


def read_pool(root):
    pool.read(f"{root}/pool.json")


def load_sft(root):
    load_policy(f"{root}/sft")


def load_rm(root):
    load_reward_model(f"{root}/rm")


def load_sarm(root):
    load_reward(f"{root}/sarm", None, setup("cpu"))


def load_valued(root):
    load_policy(f"{root}/valued")


def load_adapter(root):
    load_policy(f"{root}/adapter")


# {file: a command that reads it}, for files of one JSON value, of JSON lines, and of tensors.
JSON = {
    "sft/model/config.json": run_ppo,
    "sft/model/tokenizer.json": run_ppo,
    "sft/model/tokenizer_config.json": run_ppo,
    "sft/model/model.safetensors.index.json": run_ppo,
    "rm/model/config.json": run_ppo_with_a_reward_model,
    "sarm/model/config.json": run_ppo_with_a_sarm,
    "adapter/adapter_config.json": run_ppo_from_an_adapter,
    "adapter/nanorlhf.json": run_ppo_from_an_adapter,
    "sae/policy/2_residual/cfg.json": run_frozen_sarm,
    "half/config.json": resume_sft,
    "ppo/config.json": score_gold,
    "ppo/summary.json": score_gold,
    "bon/config.json": run_best_of_n,
    "sft.json": run_sft_on_json,
    "pool.json": read_pool,
    "answers.json": judge,
}
JSONL = {
    "sft.jsonl": run_sft,
    "pairs.jsonl": run_rm,
    "ppo/metrics.jsonl": score_gold,
    "ppo/eval/step_0.jsonl": score_gold,
    "bon/cache/answers_*.jsonl": run_best_of_n,
    "bon/cache/scores_*.jsonl": run_best_of_n,
}
TENSORS = {
    "sft/model/model.safetensors": load_sft,
    "rm/model/model.safetensors": load_rm,
    "sarm/model/model.safetensors": load_sarm,
    "sae/policy/2_residual/sparsity.safetensors": compare_autoencoders,
    "valued/value_head.safetensors": load_valued,
    "adapter/adapter_model.safetensors": load_adapter,
    "sae/policy/2_residual/sae_weights.safetensors": run_frozen_sarm,
    "human.safetensors": run_control,
}


# ---------------------------------------------------------------------------------------- the shelf


def stop_before_the_model_is_saved(root):
    """A run of SFT that is unfinished, with a checkpoint: half/."""

    def kill(*args):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log.RunFolder, "save_model", kill)
        with pytest.raises(Killed):
            run_sft(root, output_dir=f"{root}/half", checkpoint_every=1)


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    """A folder with one good file of each kind: models, an adapter, autoencoders, runs, caches."""
    root = tmp_path_factory.mktemp("shelf") / "shelf"
    shutil.copytree(base, root)

    # A policy with a value head, and an adapter on it.
    policy = load_policy(f"{root}/sft/model")
    save_policy(policy, load_tokenizer(f"{root}/sft"), str(root / "valued"))
    add_lora(policy.lm, ["query_key_value"], rank=2)
    save_adapter(policy.lm, str(root / "adapter"), f"{root}/sft/model")
    human = human_latents.HumanLatents("", torch.rand(8, 2), [3, 5], torch.rand(8), True)
    human_latents.save(f"{root}/human.safetensors", human, latents_fingerprint(f"{root}/sarm"))

    # Runs.
    stop_before_the_model_is_saved(root)
    prompts = f"{root}/prompts.jsonl"
    run_ppo(root, steps=1, eval_size=4, output_dir=f"{root}/ppo", dataset=prompts)
    run_best_of_n(root)

    # Files of data.
    pool_row = {"prompt": "p", "responses": ["a", "b"], "gold_scores": [1, 2]}
    (root / "pool.json").write_text(json.dumps([pool_row] * 3))
    answer = {"prompt": "review the hotel :", "response": "a nice day ."}
    (root / "answers.json").write_text(json.dumps([answer]))
    with open(root / "sft.jsonl") as f:
        rows = [json.loads(line) for line in f]
    (root / "sft.json").write_text(json.dumps(rows))
    return root


# ------------------------------------------------------------------------------------------- damage

# What may stand in a file of JSON, or in its last line.
DAMAGED_JSON = {
    "nothing": b"",
    "cut": b'{"a": ["b", ',
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "an empty object": b"{}",
    "nested deep": b"[" * 100_000 + b"]" * 100_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "NaN": b'{"a": NaN}',
    "beyond all floats": b'{"a": 1e999}',
    "binary": bytes(range(128, 256)),
    "half of a character": b'{"a": "\\ud800"}',
}

# What is no damage there: an adapter has no notes.
HARMLESS = {("adapter/nanorlhf.json", "an empty object")}


def write_over(content):
    """A damage: other content."""

    def damage(path):
        path.write_bytes(content)

    return damage


def add_line(content):
    """A damage: one line more."""

    def damage(path):
        path.write_bytes(path.read_bytes() + content + b"\n")

    return damage


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit_of_the_header(path):
    content = bytearray(path.read_bytes())
    content[12] ^= 0x40
    path.write_bytes(content)


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_a_link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


def read_all(path):
    """A safetensors file's notes and tensors."""
    tensors = {}
    with safe_open(path, "pt") as f:
        for name in f.keys():
            tensors[name] = f.get_tensor(name).clone()
        return f.metadata(), tensors


def last_of(tensors):
    """The name of the last floating-point tensor."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    return max(names)


def change_tensor(change):
    """A damage: the last of a file's tensors is changed."""

    def damage(path):
        notes, tensors = read_all(path)
        name = last_of(tensors)
        tensors[name] = change(tensors[name])
        save_file(tensors, path, notes)

    return damage


def remove_a_tensor(path):
    notes, tensors = read_all(path)
    del tensors[last_of(tensors)]
    save_file(tensors, path, notes)


def put_nan_first(x):
    x[..., 0] = torch.nan
    return x


def put_infinity_last(x):
    x[..., -1] = torch.inf
    return x


def leave_float32(x):
    return x.double() + 1e300


def to_whole_numbers(x):
    return x.to(torch.int32)


def add_dimension(x):
    return x[..., None].contiguous()


DAMAGED_TENSORS = {
    "nothing": write_over(b""),
    "a header as long as the universe": write_over(b"\xff" * 40),
    "text": write_over(b"no tensors are in this file"),
    "cut": cut_off,
    "a bit of the header": flip_a_bit_of_the_header,
    "a folder": replace_by_a_folder,
    "a loop of links": replace_by_a_link_to_itself,
    "NaN": change_tensor(put_nan_first),
    "infinity": change_tensor(put_infinity_last),
    "beyond float32": change_tensor(leave_float32),
    "whole numbers": change_tensor(to_whole_numbers),
    "another shape": change_tensor(add_dimension),
    "one less": remove_a_tensor,
}


def remove(path):
    """Remove what is there: a file, a link or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def damaged(path, damage):
    """damage(path) is done to a file, which may be missing; afterwards it is what it was."""
    before = None
    if path.exists():
        before = path.read_bytes()
    try:
        damage(path)
        yield
    finally:
        remove(path)
        if before is not None:
            path.write_bytes(before)


# ---------------------------------------------------------------------------------- what is checked


def snapshot(root):
    """Every file below: what is in it, or the time and size of a link or a large file."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_dir() or "__pycache__" in str(path):
            continue
        stat = path.lstat()
        if path.is_symlink() or stat.st_size > 2**17:
            found[path] = (stat.st_mtime_ns, stat.st_size)
        else:
            found[path] = path.read_bytes()
    return found


def refuses_file(capfd, root, pattern, door, damage):
    """The door refuses the file that it reads: an InputError that names it or its model.

    Nothing is said on stderr, and nothing is changed on disk.
    """
    # The file may be missing in a good folder.
    path = root / pattern
    for match in root.glob(pattern):
        path = match
    with damaged(path, damage):
        before = snapshot(root)
        capfd.readouterr()
        with pytest.raises(InputError) as raised:
            door(root)
        assert capfd.readouterr().err == ""
        assert snapshot(root) == before

    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 1000
    # An error may name the folder of the file, or the folder of its model.
    places = [str(path), str(path.parent), str(path.parent.parent)]
    assert any(place in message for place in places), message


@pytest.mark.parametrize("file", JSON)
def test_damaged_json(shelf, capfd, file):
    for what, content in DAMAGED_JSON.items():
        if (file, what) not in HARMLESS:
            print(what)
            refuses_file(capfd, shelf, file, JSON[file], write_over(content))


@pytest.mark.parametrize("file", JSONL)
def test_a_damaged_line(shelf, capfd, file):
    for what, content in DAMAGED_JSON.items():
        # An empty line is no damage.
        if what != "nothing":
            print(what)
            refuses_file(capfd, shelf, file, JSONL[file], add_line(content))


@pytest.mark.parametrize("file", TENSORS)
def test_damaged_tensors(shelf, capfd, file):
    for what, damage in DAMAGED_TENSORS.items():
        print(what)
        refuses_file(capfd, shelf, file, TENSORS[file], damage)


def test_the_shelf_is_good(shelf):
    """Else the tests above could pass for the wrong reason.

    It is the last test, since it changes what is there.
    """
    doors = {**JSON, **JSONL, **TENSORS}
    for door in dict.fromkeys(doors.values()):
        shutil.rmtree(shelf / "out", ignore_errors=True)
        door(shelf)
