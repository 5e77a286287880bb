"""nanorlhf.runtime.checkpoint, optim and the run folders of log.py: exact resume, atomic writes, the learning rate by hand."""

import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import nanorlhf.runtime.checkpoint
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanorlhf.errors import InputError
from nanorlhf.runtime.checkpoint import checkpoints, load, save
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.files import (
    read_json,
    recover_folder,
    replace_folder,
    write_json,
    write_lines,
)
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import RunFolder
from nanorlhf.runtime.optim import adamw, learning_rate, optimizer_step

ALONE = Dist(0, 1, torch.device("cpu"))


def fresh():
    """A module with a matrix, a vector, a frozen layer and a tied one; its optimizer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[2].requires_grad_(False)
    module.append(nn.Linear(4, 4))
    module[4].weight = module[3].weight
    return module, adamw(module, 0.1, (0.9, 0.95), 0.01)


def train(module, optimizer, steps):
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        (module(x) ** 2).sum().backward()
        optimizer_step(optimizer, module, 0.1 / (step + 1), 1.0, step)
    return [p.detach().clone() for p in module.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------------------- save and load


def test_resumed_training_is_bit_equal(tmp_path):
    whole = train(*fresh(), range(6))
    module, optimizer = fresh()
    half = train(module, optimizer, range(3))
    save(str(tmp_path), 3, module, optimizer, {"kl_coef": 0.25, "scaler": [1, 2.5]}, keep=2)
    module, optimizer = fresh()
    train(module, optimizer, [9])  # what was there before does not matter
    assert load(str(tmp_path), module, optimizer) == {
        "step": 3,
        "kl_coef": 0.25,
        "scaler": [1, 2.5],
    }
    assert equal(module.parameters(), half)
    assert equal(train(module, optimizer, range(3, 6)), whole) and not equal(half, whole)
    module, optimizer = fresh()
    load(str(tmp_path), module, optimizer)
    optimizer.state.clear()
    assert not equal(
        train(module, optimizer, range(3, 6)), whole
    )  # the optimizer's state is needed


def test_resume_into_a_fresh_optimizer(tmp_path):
    whole = train(*fresh(), range(4))
    module, optimizer = fresh()
    train(module, optimizer, range(2))
    save(str(tmp_path), 2, module, optimizer, {}, keep=1)
    module, optimizer = fresh()
    load(str(tmp_path), module, optimizer)
    assert equal(train(module, optimizer, range(2, 4)), whole)


def test_no_checkpoint_yet(tmp_path):
    module, optimizer = fresh()
    before = [p.clone() for p in module.parameters()]
    assert load(str(tmp_path), module, optimizer) is None
    assert equal(module.parameters(), before)


def test_the_last_are_kept_and_the_newest_is_loaded(tmp_path):
    module, optimizer = fresh()
    for step in (8, 9, 10, 11):  # 11 comes after 9 as a number, before it as text
        train(module, optimizer, [step])
        save(str(tmp_path), step, module, optimizer, {}, keep=3)
    assert [s for s, _ in checkpoints(str(tmp_path))] == [9, 10, 11]
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["step_10", "step_11", "step_9"]
    again, optimizer = fresh()
    assert load(str(tmp_path), again, optimizer)["step"] == 11
    assert equal(module.parameters(), again.parameters())
    assert sorted(os.listdir(tmp_path / "checkpoint" / "step_11")) == [
        "state.json",
        "state.safetensors",
    ]


def test_a_save_that_was_killed_leaves_the_last_one(tmp_path, monkeypatch):
    module, optimizer = fresh()
    train(module, optimizer, [0])
    save(str(tmp_path), 1, module, optimizer, {"x": 1}, keep=1)
    saved = [p.detach().clone() for p in module.parameters()]
    train(module, optimizer, [1])
    with monkeypatch.context() as m:
        m.setattr(
            nanorlhf.runtime.checkpoint,
            "write_json",
            lambda *args: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            save(str(tmp_path), 2, module, optimizer, {"x": 2}, keep=1)
    left = tmp_path / "checkpoint" / ".tmp_step_2"
    assert left.is_dir()
    (left / "junk").write_text("")
    again, other = fresh()
    assert load(str(tmp_path), again, other) == {"step": 1, "x": 1}
    assert equal(again.parameters(), saved)
    save(str(tmp_path), 2, module, optimizer, {"x": 2}, keep=1)
    assert os.listdir(tmp_path / "checkpoint") == ["step_2"]
    assert sorted(os.listdir(tmp_path / "checkpoint" / "step_2")) == [
        "state.json",
        "state.safetensors",
    ]


def test_write_json_and_replace_folder_are_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "a.json")
    write_json(path, {"a": "\u2028é"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": "\u2028é"}
    target = tmp_path / "model"
    replace_folder(str(target), lambda p: write_json(os.path.join(p, "x.json"), 1))
    with pytest.raises(ZeroDivisionError):
        replace_folder(str(target), lambda p: 1 / 0)
    assert os.listdir(target) == ["x.json"]
    replace_folder(str(target), lambda p: write_json(os.path.join(p, "y.json"), 2))
    assert os.listdir(target) == ["y.json"] and not (tmp_path / ".tmp_model").exists()


# ------------------------------------------------------------------------------------------------------------ damaged checkpoints


def a_run(path, older=False):
    """A run that was stopped after five steps, with checkpoints of steps 2 and 4; `older`: as it was before there were checksums."""
    folder = RunFolder(Config(str(path)), ALONE)
    folder.create()
    module, optimizer = fresh()
    for step in range(1, 6):
        train(module, optimizer, [step])
        folder.append("metrics.jsonl", [{"step": step, "loss": step / 3}])
        if step in (2, 4):
            folder.checkpoint(step, module, optimizer, {"kl_coef": step / 7}, 2)
    if older:
        for step, path in checkpoints(str(path)):
            write_json(os.path.join(path, "state.json"), {"step": step, "kl_coef": step / 7})


def go_on(path):
    """Resume a run and train up to step 7 -> the step that it was resumed from, its weights at the end, its metrics."""
    module, optimizer = fresh()
    state = load(str(path), module, optimizer)
    assert state["kl_coef"] == state["step"] / 7
    folder = RunFolder(Config(str(path)), ALONE)
    folder.create(state)
    for step in range(state["step"] + 1, 8):
        train(module, optimizer, [step])
        folder.append("metrics.jsonl", [{"step": step, "loss": step / 3}])
    return state["step"], [p.detach().clone() for p in module.parameters()], folder.records()


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    a_run(folder)
    step, parameters, records = go_on(folder)
    assert step == 4 and equal(parameters, train(*fresh(), range(1, 8))) and len(records) == 7
    return parameters, records


def assert_the_one_before_is_taken(run, never_stopped, capsys, *words):
    """The run goes on from step 2, ends with the same bits, and says in one line why it did not take step 4."""
    capsys.readouterr()
    step, parameters, records = go_on(run)
    assert step == 2 and equal(parameters, never_stopped[0]) and records == never_stopped[1]
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        os.path.join("checkpoint", "step_4") in line
        and "step_2 is taken" in line
        and all(word in line for word in words)
    ), line


def flip(path, bit):
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["header", "data", "state.json"])
def test_a_flipped_bit_is_found_anywhere(tmp_path, never_stopped, capsys, part):
    a_run(tmp_path / "run")
    chance = random.Random(part)
    name = "state.json" if part == "state.json" else "state.safetensors"
    content = (tmp_path / "run/checkpoint/step_4" / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    first, last = {
        "header": (0, header),
        "data": (header, len(content)),
        "state.json": (0, len(content)),
    }[part]
    assert last - first > 100
    for _ in range(25):
        bit = chance.randrange(8 * first, 8 * last)
        print(name, "bit", bit)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        flip(tmp_path / "copy/checkpoint/step_4" / name, bit)
        capsys.readouterr()
        assert_the_one_before_is_taken(
            tmp_path / "copy", never_stopped, capsys, "state.json" if part == "state.json" else name
        )
        shutil.rmtree(tmp_path / "copy")


def rewrite(path, change):
    """Change the tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path)


def without_optimizer(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")}


def in_float16(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


DAMAGE = {
    "cut": lambda f: (f / "state.safetensors").write_bytes(
        (f / "state.safetensors").read_bytes()[:-4]
    ),
    "empty": lambda f: (f / "state.safetensors").write_bytes(b""),
    "zeros": lambda f: (f / "state.safetensors").write_bytes(
        bytes((f / "state.safetensors").stat().st_size)
    ),
    "tensors missing": lambda f: (f / "state.safetensors").unlink(),
    "tensors a folder": lambda f: (
        (f / "state.safetensors").unlink() or (f / "state.safetensors").mkdir()
    ),
    "no optimizer": lambda f: rewrite(f / "state.safetensors", without_optimizer),
    "float16": lambda f: rewrite(f / "state.safetensors", in_float16),
    "state missing": lambda f: (f / "state.json").unlink(),
    "state a list": lambda f: (f / "state.json").write_text("[]"),
    "state binary": lambda f: (f / "state.json").write_bytes(b"\xff\xfe"),
    "state deep": lambda f: (f / "state.json").write_text("[" * 100_000),
    "step a string": lambda f: (f / "state.json").write_text('{"step": "4"}'),
    "another step's": lambda f: shutil.rmtree(f) or shutil.copytree(f.parent / "step_2", f),
    "empty folder": lambda f: shutil.rmtree(f) or f.mkdir(),
    "a file": lambda f: shutil.rmtree(f) or f.write_text(""),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_found(tmp_path, never_stopped, capsys, damage, older):
    """Also one that is older than checksums, by what its tensors are."""
    a_run(tmp_path, older)
    DAMAGE[damage](tmp_path / "checkpoint/step_4")
    assert_the_one_before_is_taken(tmp_path, never_stopped, capsys)


@pytest.mark.parametrize("lose", ["last row", "first row", "a digit", "garbage", "file"])
def test_metrics_that_a_checkpoint_counted(tmp_path, never_stopped, capsys, lose):
    """Rows that were lost after step 2 come again; where also step 2 had them, the run cannot be put right."""
    a_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if lose == "last row":
        path.write_text("".join(lines[:2] + lines[3:]))
        assert_the_one_before_is_taken(tmp_path, never_stopped, capsys, "metrics.jsonl")
        return
    if lose == "first row":
        path.write_text("".join(lines[1:]))
    elif lose == "a digit":
        path.write_text(lines[0].replace("0.33", "0.34") + "".join(lines[1:]))
    elif lose == "garbage":
        path.write_bytes(b"\xff\n" + path.read_bytes())
    else:
        path.unlink()
    with pytest.raises(
        InputError, match="metrics.jsonl.*no other checkpoint is whole.*remove"
    ) as e:
        go_on(tmp_path)
    assert "\n" not in str(e.value)


def test_no_checkpoint_is_whole(tmp_path):
    a_run(tmp_path)
    for step in (2, 4):
        flip(tmp_path / f"checkpoint/step_{step}/state.safetensors", 8000)
    with pytest.raises(
        InputError,
        match=f"step_4 cannot be used.*step_2 cannot be used.*remove {tmp_path}/checkpoint",
    ):
        go_on(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "checkpoint").write_text("")
    with pytest.raises(InputError, match="should be a folder"):
        go_on(tmp_path)


def test_a_checkpoint_of_another_model(tmp_path):
    a_run(tmp_path)
    for change in ({"bias": False}, {"out_features": 5}):
        other, _ = fresh()
        other[0] = nn.Linear(3, **{"out_features": 4, **change})
        with pytest.raises(InputError, match="another model, which differs in 0"):
            load(str(tmp_path), other, adamw(other, 0.1, (0.9, 0.95), 0.01))


def test_an_older_checkpoint_is_resumed_as_before(tmp_path, never_stopped):
    a_run(tmp_path, older=True)
    step, parameters, records = go_on(tmp_path)
    assert step == 4 and equal(parameters, never_stopped[0]) and records == never_stopped[1]


def test_damaged_ones_go_when_their_step_has_passed(tmp_path):
    """Step 4 is damaged, the run goes on from step 2: it must not be kept for newer than step 3."""
    a_run(tmp_path)
    flip(tmp_path / "checkpoint/step_4/state.safetensors", 8000)
    shutil.copytree(
        tmp_path / "checkpoint/step_2", tmp_path / "checkpoint/step_04"
    )  # no name that save() gives
    module, optimizer = fresh()
    assert load(str(tmp_path), module, optimizer)["step"] == 2
    save(str(tmp_path), 3, module, optimizer, {}, keep=2)
    assert [step for step, _ in checkpoints(str(tmp_path))] == [2, 3]


# --------------------------------------------------------------------------------------------------------- folders that are replaced


def test_one_of_two_folders_is_there_whenever_a_kill_comes(tmp_path, monkeypatch):
    """replace_folder() is killed before each of its renames and removals; then the old content or the new one is there, whole."""

    class Killed(BaseException):
        pass

    def write(content):
        return lambda path: [
            write_json(os.path.join(path, name), content) for name in ("a.json", "b.json")
        ]

    def found(path):
        return {read_json(str(path / name)) for name in ("a.json", "b.json")}

    n = 0
    while True:
        n += 1
        target, count = tmp_path / f"run_{n}" / "model", [0]
        target.parent.mkdir()
        replace_folder(str(target), write("old"))

        def dying(real):
            def call(*args, **kwargs):
                count[0] += 1
                if count[0] == n:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", dying(os.rename))
            patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
            try:
                replace_folder(str(target), write("new"))
                break
            except Killed:
                pass
        places = [path for path in (target, target.parent / ".old_model") if path.exists()]
        assert places and found(places[0]) in ({"old"}, {"new"})
        recover_folder(str(target))
        assert found(target) in ({"old"}, {"new"}) and not (target.parent / ".old_model").exists()
        replace_folder(str(target), write("newer"))
        assert found(target) == {"newer"} and os.listdir(target.parent) == ["model"]
    assert n > 3 and found(target) == {"new"}


def test_a_checkpoint_that_was_moved_aside_is_found_again(tmp_path, never_stopped):
    a_run(tmp_path)
    os.rename(tmp_path / "checkpoint/step_4", tmp_path / "checkpoint/.old_step_4")
    step, parameters, _ = go_on(tmp_path)
    assert step == 4 and equal(parameters, never_stopped[0])


def test_what_gets_a_name_is_on_the_disk(tmp_path, monkeypatch):
    """Before each rename every file and folder under the new name is synced; after it, the folder that holds the name."""
    events, opened = [], {}
    real_open, real_fsync = os.open, os.fsync

    def noted_open(path, *args, **kwargs):
        number = real_open(path, *args, **kwargs)
        opened[number] = os.path.abspath(path)
        return number

    def noted_fsync(number):
        events.append(("sync", opened.get(number)))
        real_fsync(number)

    def noted(real):
        def move(a, b):
            inside = [
                os.path.join(folder, name) for folder, _, names in os.walk(a) for name in names
            ] + [a]
            events.append(
                ("rename", [os.path.abspath(path) for path in inside], os.path.abspath(b))
            )
            real(a, b)

        return move

    monkeypatch.setattr(os, "open", noted_open)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted(os.rename))
    monkeypatch.setattr(os, "replace", noted(os.replace))
    module, optimizer = fresh()
    train(module, optimizer, [0])
    save(str(tmp_path), 1, module, optimizer, {}, keep=1)
    write_lines(str(tmp_path / "rows.jsonl"), [{"a": 1}])
    renames = [i for i, event in enumerate(events) if event[0] == "rename"]
    assert {os.path.basename(events[i][2]) for i in renames} == {
        "state.json",
        "step_1",
        "rows.jsonl",
    }
    for i in renames:
        _, inside, to = events[i]
        synced_before = {event[1] for event in events[:i] if event[0] == "sync"}
        synced_after = {event[1] for event in events[i + 1 :] if event[0] == "sync"}
        assert set(inside) <= synced_before and os.path.dirname(to) in synced_after, to


# ------------------------------------------------------------------------------------------------------------------ optimizer


def test_the_learning_rate_by_hand():
    def rates(schedule, steps=6, **kwargs):
        return pytest.approx(
            [learning_rate(s, steps, 2.0, schedule, **kwargs) for s in range(steps)]
        )

    assert rates("constant") == [2.0] * 6
    assert rates("constant", warmup=2, final=0.5) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert rates("linear", warmup=2) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates("linear", final=0.25) == [2.0, 1.75, 1.5, 1.25, 1.0, 0.75]
    assert rates("cosine", warmup=2) == [1.0, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    assert rates("cosine", steps=2, final=0.1) == [2.0, 1.1]
    assert rates("linear", steps=2, warmup=4) == [0.5, 1.0]
    assert learning_rate(6, 6, 2.0, "linear", final=0.25) == pytest.approx(0.5)
    assert learning_rate(6, 6, 2.0, "cosine", final=0.25) == pytest.approx(0.5)


def test_no_decay_on_vectors_and_nothing_frozen():
    module, optimizer = fresh()
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.01 and vectors["weight_decay"] == 0.0
    assert {id(p) for p in matrices["params"]} == {id(module[0].weight), id(module[3].weight)}
    assert {id(p) for p in vectors["params"]} == {
        id(m.bias) for m in (module[0], module[1], module[3], module[4])
    } | {id(module[1].weight)}
    assert matrices["betas"] == (0.9, 0.95)


def test_a_step_clips_by_the_global_norm_and_clears_the_gradients():
    module, _ = fresh()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=123.0)
    before = [p.detach().clone() for p in module.parameters()]
    (module(torch.ones(2, 3)) ** 2).sum().mul(50).backward()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()
    ]
    norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
    assert norm > 1
    assert optimizer_step(optimizer, module, 0.1, 0.5, 7) == pytest.approx(norm, rel=1e-5)
    for p, old, g in zip(module.parameters(), before, gradients):
        torch.testing.assert_close(p.detach(), old - 0.1 * g * 0.5 / norm)
        assert p.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run(bad):
    module, optimizer = fresh()
    before = train(module, optimizer, [0])
    (module(torch.ones(2, 3)) ** 2).sum().backward()
    module[0].weight.grad[1, 2] = bad
    with pytest.raises(FloatingPointError, match="step 17"):
        optimizer_step(optimizer, module, 0.1, 1.0, 17)
    assert equal(module.parameters(), before)


# ----------------------------------------------------------------------------------------------------------------- run folders


@dataclass
class Config:
    output_dir: str
    lr: float = 0.1
    betas: tuple = (0.9, 0.95)  # comes back from JSON as a list
    resume: bool = False
    eval_splits: tuple = ("test",)


def test_the_states_of_a_run_folder(tmp_path):
    path = str(tmp_path / "runs" / "a")
    with unlock_afterwards():
        assert RunFolder(Config(path), ALONE).state == "new"
    assert os.listdir(tmp_path) == []  # without create() nothing is left, and no folder on the way
    RunFolder(Config(path), ALONE).create()
    assert RunFolder(Config(path, resume=True), ALONE).state == "unfinished"
    with pytest.raises(InputError, match="lr.*--output_dir") as e:
        RunFolder(Config(path, lr=0.2), ALONE)
    assert "betas" not in str(e.value)
    os.makedirs(os.path.join(path, "checkpoint"))
    assert RunFolder(Config(path), ALONE).finish({"gold": 1.5}) == {"gold": 1.5}
    done = RunFolder(Config(path), ALONE)
    assert (
        done.state == "done"
        and done.already_done() == {"gold": 1.5}
        and not os.path.exists(os.path.join(path, "checkpoint"))
    )
    with pytest.raises(InputError):
        RunFolder(Config(path, lr=0.2), ALONE)
    write_json(
        os.path.join(path, "config.json"), {**done.config, "gone": 1}
    )  # a setting that is no more
    with pytest.raises(InputError, match="gone"):
        RunFolder(Config(path), ALONE)


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        RunFolder(Config(str(tmp_path / "file")), ALONE)
    (tmp_path / "empty").mkdir()
    assert RunFolder(Config(str(tmp_path / "empty")), ALONE).state == "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not empty"):
        RunFolder(Config(str(tmp_path / "mine")), ALONE)


def test_a_run_killed_while_it_wrote_its_config_starts_again(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"lr"')
    assert RunFolder(Config(str(tmp_path)), ALONE).state == "new"


@pytest.mark.parametrize("knows_sizes", [True, False])
def test_create_drops_what_came_after_the_checkpoint(tmp_path, knows_sizes):
    folder = RunFolder(Config(str(tmp_path)), ALONE)
    folder.create()
    assert folder.records() == []
    module, optimizer = fresh()
    train(module, optimizer, [0])
    for step in range(3):
        folder.append("metrics.jsonl", [{"step": step, "x": "\u2028"}])
        folder.append("samples.jsonl", [{"step": step}] * 2)
        folder.write_eval(step, [])
        if step and knows_sizes:
            folder.checkpoint(step, module, optimizer, {}, 2)
        elif step:
            save(
                str(tmp_path), step, module, optimizer, {}, 2
            )  # as it was before a checkpoint knew how long the logs were
    folder.append("metrics.jsonl", [{"step": 3}, {"step": 4}])
    folder.append("samples.jsonl", [{"step": 3}])
    folder.write_eval(3, [])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, "half')  # the kill
    again = RunFolder(Config(str(tmp_path)), ALONE)
    assert again.state == "unfinished" and [r["step"] for r in again.records()] == [0, 1, 2, 3, 4]
    again.create(load(str(tmp_path), module, optimizer))
    assert again.records() == [{"step": s, "x": "\u2028"} for s in range(3)]
    assert [json.loads(line)["step"] for line in open(tmp_path / "samples.jsonl")] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert sorted(os.listdir(tmp_path / "eval")) == ["step_0.jsonl", "step_1.jsonl", "step_2.jsonl"]
    again.append("metrics.jsonl", [{"step": 3}])
    assert [r["step"] for r in again.records()] == [0, 1, 2, 3]


def test_create_without_a_checkpoint_starts_over(tmp_path):
    folder = RunFolder(Config(str(tmp_path)), ALONE)
    folder.create()
    folder.append("metrics.jsonl", [{"step": 0}])
    RunFolder(Config(str(tmp_path)), ALONE).create()
    assert folder.records() == []


def test_models_and_evaluations_in_a_run_folder(tmp_path):
    folder = RunFolder(Config(str(tmp_path)), ALONE)
    folder.create()
    folder.save_model(lambda a, path: write_json(os.path.join(path, "a.json"), a), 5)
    assert read_json(str(tmp_path / "model" / "a.json")) == 5
    folder.write_eval(3, [{"prompt": "a"}, {"prompt": "b"}])
    folder.write_eval(3, [{"prompt": "c"}])
    assert (tmp_path / "eval" / "step_3.jsonl").read_text() == '{"prompt": "c"}\n' and len(
        os.listdir(tmp_path / "eval")
    ) == 1


def test_only_the_first_process_writes(tmp_path):
    other = SimpleNamespace(main=False, barrier=lambda: None, together=lambda function: function())
    folder = RunFolder(Config(str(tmp_path / "a")), other)
    folder.create()
    folder.append("metrics.jsonl", [{"step": 0}])
    folder.write_eval(0, [])
    folder.checkpoint(1, None, None, {}, 1)
    folder.save_model(None)
    folder.finish({})
    assert not os.path.exists(tmp_path / "a")
