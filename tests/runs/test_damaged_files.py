"""Files that were damaged, or that hold something else: every kind of damage, at every door through which a file comes in.

A door is a file and the command that reads it. What is refused is one InputError that names the file, without a line from any library,
and nothing on disk is changed: cli.run() makes one line and exit code 2 of it (test_errors.py).
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


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    """A folder with one good file of each kind: models, an adapter, autoencoders, runs, caches."""
    root = tmp_path_factory.mktemp("shelf") / "shelf"
    shutil.copytree(base, root)
    policy = load_policy(f"{root}/sft/model")
    save_policy(policy, load_tokenizer(f"{root}/sft"), str(root / "valued"))
    add_lora(policy.lm, ["query_key_value"], rank=2)
    save_adapter(policy.lm, str(root / "adapter"), f"{root}/sft/model")

    human = human_latents.HumanLatents("", torch.rand(8, 2), [3, 5], torch.rand(8), True)
    human_latents.save(f"{root}/human.safetensors", human, latents_fingerprint(f"{root}/sarm"))

    with pytest.MonkeyPatch.context() as patch:

        def killed(*args):
            raise Killed

        patch.setattr(log.RunFolder, "save_model", killed)
        with pytest.raises(Killed):
            train_sft.main(sft(root, output_dir=f"{root}/half", checkpoint_every=1))
    settings = small(
        root, "ppo", steps=1, eval_size=4, output_dir=f"{root}/ppo", dataset=f"{root}/prompts.jsonl"
    )
    train_ppo.main(train_ppo.Config(**settings))
    sample_bon.main(bon(root))
    (root / "pool.json").write_text(
        json.dumps([{"prompt": "p", "responses": ["a", "b"], "gold_scores": [1, 2]}] * 3)
    )
    (root / "answers.json").write_text(
        json.dumps([{"prompt": "review the hotel :", "response": "a nice day ."}])
    )
    with open(root / "sft.jsonl") as f:
        rows = [json.loads(line) for line in f]
    (root / "sft.json").write_text(json.dumps(rows))
    return root


def sft(root, **changes):
    return train_sft.Config(**{"output_dir": f"{root}/out", **small(root, "sft"), **changes})


def bon(root, **changes):
    settings = {
        "output_dir": f"{root}/bon",
        **small(root, "bon", n_answers=2, eval_size=3, max_new_tokens=4),
    }
    return sample_bon.Config(**{**settings, "reward_model": [f"{root}/rewards.py:the"], **changes})


def best_of_n(root):
    sample_bon.main(bon(root))


def resume(root):
    args = ["--output_dir", f"{root}/half", "--resume"]
    train_sft.main(cli.parse(train_sft.Config, args))


def score_gold(root):
    train_ppo.main(
        train_ppo.Config(score_gold=f"{root}/ppo", gold_model=f"{root}/rewards.py:words")
    )


def judge(root):
    answers = [f"{root}/answers.json"]
    win_rates.judge(win_rates.JudgeConfig(a=answers, b=answers, output_dir=f"{root}/out"))


def mmcs(root):
    name = f"{root}/sae/policy/2_residual"
    comparisons.mmcs(
        comparisons.MmcsConfig(
            a=[name], b=[f"{root}/sae/policy/../policy/2_residual"], output_dir=f"{root}/out"
        )
    )


def control(root):
    settings = small(root, "control", tau=["q0.5"], human_latents=f"{root}/human.safetensors")
    train_ppo.main(train_ppo.Config(output_dir=f"{root}/out", **settings))


def frozen_sarm(root):
    train_rm.main(train_rm.Config(output_dir=f"{root}/out", **small(root, "sarm_frozen")))


def ppo(root, **changes):
    train_ppo.main(train_ppo.Config(output_dir=f"{root}/out", **small(root, "ppo", **changes)))


def adapter(root):
    ppo(root, model=f"{root}/adapter")


def reward_model(root):
    ppo(root, reward_model=[f"{root}/rm"])


def sarm(root):
    ppo(root, reward_model=[f"{root}/sarm"])


# What is in no folder that a command writes: {file: a command that reads it}.
JSON = {
    "sft/model/config.json": ppo,
    "sft/model/tokenizer.json": ppo,
    "sft/model/tokenizer_config.json": ppo,
    "sft/model/model.safetensors.index.json": ppo,
    "rm/model/config.json": reward_model,
    "sarm/model/config.json": sarm,
    "adapter/adapter_config.json": adapter,
    "adapter/nanorlhf.json": adapter,
    "sae/policy/2_residual/cfg.json": frozen_sarm,
    "half/config.json": resume,
    "ppo/config.json": score_gold,
    "ppo/summary.json": score_gold,
    "bon/config.json": best_of_n,
    "sft.json": lambda root: train_sft.main(sft(root, dataset=f"{root}/sft.json")),
    "pool.json": lambda root: pool.read(f"{root}/pool.json"),
    "answers.json": judge,
}
JSONL = {
    "sft.jsonl": lambda root: train_sft.main(sft(root)),
    "pairs.jsonl": lambda root: train_rm.main(
        train_rm.Config(output_dir=f"{root}/out", **small(root, "rm"))
    ),
    "ppo/metrics.jsonl": score_gold,
    "ppo/eval/step_0.jsonl": score_gold,
    "bon/cache/answers_*.jsonl": best_of_n,
    "bon/cache/scores_*.jsonl": best_of_n,
}
TENSORS = {
    "sft/model/model.safetensors": lambda root: load_policy(f"{root}/sft"),
    "rm/model/model.safetensors": lambda root: load_reward_model(f"{root}/rm"),
    "sarm/model/model.safetensors": lambda root: load_reward(f"{root}/sarm", None, setup("cpu")),
    "sae/policy/2_residual/sparsity.safetensors": mmcs,
    "valued/value_head.safetensors": lambda root: load_policy(f"{root}/valued"),
    "adapter/adapter_model.safetensors": lambda root: load_policy(f"{root}/adapter"),
    "sae/policy/2_residual/sae_weights.safetensors": frozen_sarm,
    "human.safetensors": control,
}

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


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def replaced_by_a_link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


def flipped_in_the_header(path):
    content = bytearray(path.read_bytes())
    content[12] ^= 0x40
    path.write_bytes(content)


def with_tensor(change):
    """A damage: the last of a file's tensors is changed, or left out for None."""

    def damage(path):
        with safe_open(path, "pt") as f:
            notes, tensors = f.metadata(), {name: f.get_tensor(name).clone() for name in f.keys()}
        name = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point())[-1]
        tensors[name] = change(tensors[name])
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None}, path, notes
        )

    return damage


DAMAGED_TENSORS = {
    "nothing": b"",
    "a header as long as the universe": b"\xff" * 40,
    "text": b"no tensors are in this file",
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a bit of the header": flipped_in_the_header,
    "a folder": replaced_by_folder,
    "a loop of links": replaced_by_a_link_to_itself,
    "NaN": with_tensor(lambda x: x.index_fill(-1, torch.tensor([0]), torch.nan)),
    "infinity": with_tensor(lambda x: x.index_fill(-1, torch.tensor([x.shape[-1] - 1]), torch.inf)),
    "beyond float32": with_tensor(lambda x: x.double() + 1e300),
    "whole numbers": with_tensor(lambda x: x.to(torch.int32)),
    "another shape": with_tensor(lambda x: x[..., None].contiguous()),
    "one less": with_tensor(lambda x: None),
}

# What is no damage there: an adapter has no notes.
HARMLESS = {("adapter/nanorlhf.json", "an empty object")}


def content_of(root):
    """Every file below: what is in it, or, of a large one, its time and size."""
    found = {}
    for path in sorted(root.rglob("*")):
        if not path.is_dir() and "__pycache__" not in str(path):
            stat = path.lstat()
            large = path.is_symlink() or stat.st_size > 2**17
            found[path] = (stat.st_mtime_ns, stat.st_size) if large else path.read_bytes()
    return found


@contextlib.contextmanager
def damaged(path, damage):
    """A file with other content, or what damage(path) makes of it; afterwards it is what it was."""
    before = path.read_bytes() if path.exists() else None
    try:
        if callable(damage):
            damage(path)
        else:
            path.write_bytes(damage)
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)


def refuses_file(capfd, root, pattern, door, damage):
    """The door refuses the file that it reads: an InputError that names it or its model, and no other trace."""
    path = next(iter(root.glob(pattern)), root / pattern)
    with damaged(path, damage):
        before = content_of(root)
        capfd.readouterr()
        with pytest.raises(InputError) as e:
            door(root)
        assert capfd.readouterr().err == ""
        assert content_of(root) == before
    message = str(e.value)
    assert "\n" not in message and len(message) < 1000, message
    assert any(str(place) in message for place in (path, path.parent, path.parent.parent)), message


@pytest.mark.parametrize("file", JSON)
def test_json(shelf, capfd, file):
    for what, content in DAMAGED_JSON.items():
        if (file, what) not in HARMLESS:
            print(what)
            refuses_file(capfd, shelf, file, JSON[file], content)


@pytest.mark.parametrize("file", JSONL)
def test_lines(shelf, capfd, file):
    for what, content in DAMAGED_JSON.items():
        if content:
            print(what)
            add = lambda path, line=content + b"\n": path.write_bytes(path.read_bytes() + line)  # noqa: E731
            refuses_file(capfd, shelf, file, JSONL[file], add)


@pytest.mark.parametrize("file", TENSORS)
def test_tensors(shelf, capfd, file):
    for what, damage in DAMAGED_TENSORS.items():
        print(what)
        refuses_file(capfd, shelf, file, TENSORS[file], damage)


@pytest.mark.slow
def test_the_shelf_is_good(shelf):
    """Else the tests above could pass for the wrong reason. The last test, since it changes what is there."""
    doors = {**JSON, **JSONL, **TENSORS}
    for door in dict.fromkeys(doors.values()):
        shutil.rmtree(shelf / "out", ignore_errors=True)
        door(shelf)
