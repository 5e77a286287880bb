"""nanorlhf.runtime.checkpoint, optim and the run folders of log.py.

Training resumes with the same bits, also from the checkpoint before a damaged one; files and
folders are written whole or not at all; the learning rate is compared with numbers by hand.
"""

import hashlib
import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanorlhf.errors import InputError
from nanorlhf.runtime.checkpoint import checkpoints, digest_files, load, save
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
BETAS = (0.9, 0.95)


@dataclass
class Config:
    output_dir: str
    lr: float = 0.1
    betas: tuple = BETAS  # comes back from JSON as a list
    resume: bool = False
    eval_splits: tuple = ("test",)


def run_folder(path, dist=ALONE, **changes):
    return RunFolder(Config(str(path), **changes), dist)


def fresh():
    """A module with a matrix, a vector, a frozen layer and a tied one; its optimizer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[2].requires_grad_(False)
    module.append(nn.Linear(4, 4))
    module[4].weight = module[3].weight
    return module, adamw(module, 0.1, BETAS, 0.01)


def copy_parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def train(module, optimizer, steps):
    """Make these steps, each on inputs of its own -> the parameters after the last one."""
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        loss = (module(x) ** 2).sum()
        loss.backward()
        optimizer_step(optimizer, module, 0.1 / (step + 1), 1.0, step)
    return copy_parameters(module)


def equal(a, b):
    """Whether two lists of tensors are equal to the last bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def names_in(folder):
    return sorted(os.listdir(folder))


# ------------------------------------------------------------------------------------ save and load


def test_resumed_training_is_bit_equal(tmp_path):
    whole = train(*fresh(), range(6))
    module, optimizer = fresh()
    half = train(module, optimizer, range(3))
    state = {"kl_coef": 0.25, "scaler": [1, 2.5]}
    save(str(tmp_path), 3, module, optimizer, state, keep=2)

    module, optimizer = fresh()
    # What the module and its optimizer were before does not matter.
    train(module, optimizer, [9])
    loaded = load(str(tmp_path), module, optimizer)
    loaded_parameters = copy_parameters(module)
    resumed = train(module, optimizer, range(3, 6))

    assert loaded == {"step": 3, **state}
    assert equal(loaded_parameters, half)
    assert equal(resumed, whole)
    assert not equal(half, whole)


def test_resumed_training_needs_the_optimizer_s_state(tmp_path):
    whole = train(*fresh(), range(6))
    module, optimizer = fresh()
    train(module, optimizer, range(3))
    save(str(tmp_path), 3, module, optimizer, {}, keep=2)

    module, optimizer = fresh()
    load(str(tmp_path), module, optimizer)
    optimizer.state.clear()
    resumed = train(module, optimizer, range(3, 6))

    assert not equal(resumed, whole)


def test_resume_into_a_fresh_optimizer(tmp_path):
    whole = train(*fresh(), range(4))
    module, optimizer = fresh()
    train(module, optimizer, range(2))
    save(str(tmp_path), 2, module, optimizer, {}, keep=1)

    module, optimizer = fresh()
    load(str(tmp_path), module, optimizer)

    assert equal(train(module, optimizer, range(2, 4)), whole)


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    module, optimizer = fresh()
    before = copy_parameters(module)
    assert load(str(tmp_path), module, optimizer) is None
    assert equal(module.parameters(), before)


def test_the_last_are_kept_and_the_newest_is_loaded(tmp_path):
    module, optimizer = fresh()
    # 11 comes after 9 as a number, before it as text.
    for step in (8, 9, 10, 11):
        train(module, optimizer, [step])
        save(str(tmp_path), step, module, optimizer, {}, keep=3)

    assert [step for step, _ in checkpoints(str(tmp_path))] == [9, 10, 11]
    assert names_in(tmp_path / "checkpoint") == ["step_10", "step_11", "step_9"]
    files = names_in(tmp_path / "checkpoint/step_11")
    assert files == ["state.json", "state.safetensors"]

    again, optimizer = fresh()
    assert load(str(tmp_path), again, optimizer)["step"] == 11
    assert equal(module.parameters(), again.parameters())


def test_a_save_that_was_killed_leaves_the_last_one(tmp_path, monkeypatch):
    def kill(path, value):
        raise KeyboardInterrupt

    module, optimizer = fresh()
    saved = train(module, optimizer, [0])
    save(str(tmp_path), 1, module, optimizer, {"x": 1}, keep=1)
    train(module, optimizer, [1])
    with monkeypatch.context() as patch:
        patch.setattr("nanorlhf.runtime.checkpoint.write_json", kill)
        with pytest.raises(KeyboardInterrupt):
            save(str(tmp_path), 2, module, optimizer, {"x": 2}, keep=1)

    # The half checkpoint of step 2 has a temporary name, and step 1 is what a run resumes from.
    half = tmp_path / "checkpoint/.tmp_step_2"
    assert half.is_dir()
    (half / "junk").write_text("")
    again, its_optimizer = fresh()
    assert load(str(tmp_path), again, its_optimizer) == {"step": 1, "x": 1}
    assert equal(again.parameters(), saved)

    # The next save takes the place of both, and nothing of the half one gets into it.
    save(str(tmp_path), 2, module, optimizer, {"x": 2}, keep=1)
    assert names_in(tmp_path / "checkpoint") == ["step_2"]
    files = names_in(tmp_path / "checkpoint/step_2")
    assert files == ["state.json", "state.safetensors"]


def test_write_json_writes_a_whole_file_or_none(tmp_path):
    path = str(tmp_path / "a.json")
    write_json(path, {"a": "\u2028é"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": "\u2028é"}


def test_replace_folder_writes_a_whole_folder_or_none(tmp_path):
    target = tmp_path / "model"

    def write_x(folder):
        write_json(os.path.join(folder, "x.json"), 1)

    def write_y(folder):
        write_json(os.path.join(folder, "y.json"), 2)

    def fail(folder):
        raise ZeroDivisionError

    replace_folder(str(target), write_x)
    with pytest.raises(ZeroDivisionError):
        replace_folder(str(target), fail)
    assert names_in(target) == ["x.json"]

    replace_folder(str(target), write_y)
    assert names_in(target) == ["y.json"]
    assert not (tmp_path / ".tmp_model").exists()


def test_each_file_has_its_checksum_from_one_of_the_processes(tmp_path):
    """Each reads its own shard; the first also reads what is no shard. All get all of them."""
    expected = {}
    for name in ("shard-00001-model.safetensors", "shard-00002-model.safetensors", "more"):
        (tmp_path / name).write_bytes(name.encode())
        expected[name] = hashlib.sha256(name.encode()).hexdigest()

    sent = []  # by each process: its lines

    def record(text):
        sent.append(text)
        return text

    for rank in (0, 1):
        digest_files(tmp_path, SimpleNamespace(rank=rank, main=rank == 0, gather_text=record))
    everything = "".join(sent)
    assert everything.count("\n") == 3

    for rank in (0, 1):
        dist = SimpleNamespace(rank=rank, main=rank == 0, gather_text=lambda text: everything)
        assert digest_files(tmp_path, dist) == expected


# ------------------------------------------------------------------------------ damaged checkpoints


def log_loss(folder, step):
    folder.append("metrics.jsonl", [{"step": step, "loss": step / 3}])


def make_stopped_run(path):
    """A run that was stopped after five steps, with checkpoints of steps 2 and 4."""
    folder = run_folder(path)
    folder.create()
    module, optimizer = fresh()
    for step in range(1, 6):
        train(module, optimizer, [step])
        log_loss(folder, step)
        if step in (2, 4):
            folder.checkpoint(step, module, optimizer, {"kl_coef": step / 7}, 2)


class End(NamedTuple):
    """How a resumed run ended."""

    start: int  # the step of the checkpoint that it went on from
    parameters: list
    records: list


def resume(path):
    """Resume a run and train up to step 7."""
    module, optimizer = fresh()
    state = load(str(path), module, optimizer)
    start = state["step"]
    assert state["kl_coef"] == start / 7

    folder = run_folder(path)
    folder.create(state)
    for step in range(start + 1, 8):
        train(module, optimizer, [step])
        log_loss(folder, step)
    return End(start, copy_parameters(module), folder.records())


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """How the run ends when nothing is damaged: as one that was never stopped."""
    path = tmp_path_factory.mktemp("run")
    make_stopped_run(path)
    end = resume(path)
    assert end.start == 4
    assert equal(end.parameters, train(*fresh(), range(1, 8)))
    assert len(end.records) == 7
    return end


def check_step_2_is_taken(path, undamaged, capsys, *words):
    """The run goes on from step 2, ends with the same bits, and one line says why not step 4."""
    capsys.readouterr()
    end = resume(path)
    assert end.start == 2
    assert equal(end.parameters, undamaged.parameters)
    assert end.records == undamaged.records

    (line,) = capsys.readouterr().out.splitlines()
    assert os.path.join("checkpoint", "step_4") in line
    assert "step_2 is taken" in line
    for word in words:
        assert word in line


def flip(path, bit):
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def header_bytes(content):
    """The bytes of a safetensors file before its data: 8 of the header's length, the header."""
    length = int.from_bytes(content[:8], "little")
    return range(0, 8 + length)


def data_bytes(content):
    return range(header_bytes(content).stop, len(content))


def all_bytes(content):
    return range(0, len(content))


@pytest.mark.parametrize(
    "name, find_part",
    [
        ("state.safetensors", header_bytes),
        ("state.safetensors", data_bytes),
        ("state.json", all_bytes),
    ],
    ids=["header", "data", "state.json"],
)
def test_a_flipped_bit_is_found_anywhere(tmp_path, undamaged, capsys, name, find_part):
    make_stopped_run(tmp_path / "run")
    file = f"checkpoint/step_4/{name}"
    part = find_part((tmp_path / "run" / file).read_bytes())
    assert len(part) > 100
    chance = random.Random(find_part.__name__)

    for _ in range(10):
        bit = chance.randrange(8 * part.start, 8 * part.stop)
        print(name, "bit", bit)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        flip(tmp_path / "copy" / file, bit)
        check_step_2_is_taken(tmp_path / "copy", undamaged, capsys, name)
        shutil.rmtree(tmp_path / "copy")


# Each of these damages a checkpoint's folder in its own way.


def cut_tensors(folder):
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def empty_tensors(folder):
    (folder / "state.safetensors").write_bytes(b"")


def zero_tensors(folder):
    path = folder / "state.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


def remove_tensors(folder):
    (folder / "state.safetensors").unlink()


def make_tensors_a_folder(folder):
    remove_tensors(folder)
    (folder / "state.safetensors").mkdir()


def remove_optimizer(folder):
    kept = {}
    for name, tensor in load_file(folder / "state.safetensors").items():
        if not name.startswith("optimizer/"):
            kept[name] = tensor.clone()
    save_file(kept, folder / "state.safetensors")


def convert_to_float16(folder):
    halves = {}
    for name, tensor in load_file(folder / "state.safetensors").items():
        halves[name] = tensor.half()
    save_file(halves, folder / "state.safetensors")


def remove_state(folder):
    (folder / "state.json").unlink()


def make_state_a_list(folder):
    (folder / "state.json").write_text("[]")


def make_state_binary(folder):
    (folder / "state.json").write_bytes(b"\xff\xfe")


def nest_state_deeply(folder):
    (folder / "state.json").write_text("[" * 100_000)


def make_step_a_string(folder):
    (folder / "state.json").write_text('{"step": "4"}')


def put_another_step_there(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step_2", folder)


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def make_folder_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    "damage",
    [
        cut_tensors,
        empty_tensors,
        zero_tensors,
        remove_tensors,
        make_tensors_a_folder,
        remove_optimizer,
        convert_to_float16,
        remove_state,
        make_state_a_list,
        make_state_binary,
        nest_state_deeply,
        make_step_a_string,
        put_another_step_there,
        empty_folder,
        make_folder_a_file,
    ],
)
def test_a_damaged_checkpoint_is_found(tmp_path, undamaged, capsys, damage):
    make_stopped_run(tmp_path)
    damage(tmp_path / "checkpoint/step_4")
    check_step_2_is_taken(tmp_path, undamaged, capsys)


def test_a_metric_lost_after_step_2_comes_again(tmp_path, undamaged, capsys):
    make_stopped_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    del lines[2]
    path.write_text("".join(lines))
    check_step_2_is_taken(tmp_path, undamaged, capsys, "metrics.jsonl")


def lose_first_row(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))


def change_a_digit(path):
    text = path.read_text()
    # The first loss, 1 / 3.
    path.write_text(text.replace("0.33", "0.34", 1))


def put_garbage_first(path):
    path.write_bytes(b"\xff\n" + path.read_bytes())


def lose_file(path):
    path.unlink()


@pytest.mark.parametrize("lose", [lose_first_row, change_a_digit, put_garbage_first, lose_file])
def test_a_metric_lost_before_step_2_cannot_be_put_right(tmp_path, lose):
    """Both checkpoints have counted it: no resumed run would write it again."""
    make_stopped_run(tmp_path)
    lose(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError) as raised:
        resume(tmp_path)
    raised.match("metrics.jsonl.*no other checkpoint is whole.*remove")
    assert "\n" not in str(raised.value)


def test_where_no_checkpoint_is_whole_all_are_named(tmp_path):
    make_stopped_run(tmp_path)
    flip(tmp_path / "checkpoint/step_2/state.safetensors", 8000)
    flip(tmp_path / "checkpoint/step_4/state.safetensors", 8000)
    problems = "step_4 cannot be used.*step_2 cannot be used"
    with pytest.raises(InputError, match=f"{problems}.*remove {tmp_path}/checkpoint"):
        resume(tmp_path)


def test_a_file_in_the_place_of_all_checkpoints_is_named(tmp_path):
    make_stopped_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "checkpoint").write_text("")
    with pytest.raises(InputError, match="should be a folder"):
        resume(tmp_path)


@pytest.mark.parametrize(
    "first_layer",
    [nn.Linear(3, 4, bias=False), nn.Linear(3, 5)],
    ids=["a weight less", "another shape"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, first_layer):
    make_stopped_run(tmp_path)
    other, _ = fresh()
    other[0] = first_layer
    optimizer = adamw(other, 0.1, BETAS, 0.01)
    with pytest.raises(InputError, match="another model, which differs in 0"):
        load(str(tmp_path), other, optimizer)


def test_a_damaged_checkpoint_goes_when_its_step_has_passed(tmp_path):
    """Step 4 is damaged, the run goes on from step 2: step 4 must not be kept for newer than 3."""
    make_stopped_run(tmp_path)
    flip(tmp_path / "checkpoint/step_4/state.safetensors", 8000)
    # No name that save() gives: it is no checkpoint.
    shutil.copytree(tmp_path / "checkpoint/step_2", tmp_path / "checkpoint/step_04")

    module, optimizer = fresh()
    assert load(str(tmp_path), module, optimizer)["step"] == 2
    save(str(tmp_path), 3, module, optimizer, {}, keep=2)
    assert [step for step, _ in checkpoints(str(tmp_path))] == [2, 3]


# ---------------------------------------------------------------------------- folders are replaced


class Killed(BaseException):
    pass


class KillAtMove:
    """In the place of os.rename and shutil.rmtree: all calls are real but the n-th, which kills."""

    def __init__(self, patch, n):
        self.calls_left = n
        patch.setattr(os, "rename", self.wrap(os.rename))
        patch.setattr(shutil, "rmtree", self.wrap(shutil.rmtree))

    def wrap(self, real):
        def call(*args, **kwargs):
            self.calls_left -= 1
            if self.calls_left == 0:
                raise Killed
            return real(*args, **kwargs)

        return call


def replace_model(target, content):
    """Put a folder of two files with this content in the place of another one."""

    def write(folder):
        for name in ("a.json", "b.json"):
            write_json(os.path.join(folder, name), content)

    replace_folder(str(target), write)


def read_model(folder):
    """What its two files hold: one content, where they are of one folder."""
    return {read_json(str(folder / "a.json")), read_json(str(folder / "b.json"))}


def replace_until_killed(target, n, monkeypatch):
    """Replace a folder, and be killed at the n-th move -> whether there were as many moves."""
    with monkeypatch.context() as patch:
        KillAtMove(patch, n)
        try:
            replace_model(target, "new")
        except Killed:
            return True
    return False


def test_one_of_two_folders_is_there_whenever_a_kill_comes(tmp_path, monkeypatch):
    """replace_folder() is killed before each of its renames and removals in turn.

    Then the old folder or the new one is there, whole.
    """
    n = 1
    target = tmp_path / "run_1/model"
    replace_model(target, "old")
    while replace_until_killed(target, n, monkeypatch):
        aside = target.parent / ".old_model"
        left = target
        if not target.exists():
            left = aside
        assert read_model(left) in ({"old"}, {"new"})

        # A later run finds it under its own name, and can replace it.
        recover_folder(str(target))
        assert read_model(target) in ({"old"}, {"new"})
        assert not aside.exists()
        replace_model(target, "newer")
        assert read_model(target) == {"newer"}
        assert names_in(target.parent) == ["model"]

        n += 1
        target = tmp_path / f"run_{n}/model"
        replace_model(target, "old")
    assert n > 3
    assert read_model(target) == {"new"}


def test_a_checkpoint_that_was_moved_aside_is_found_again(tmp_path, undamaged):
    make_stopped_run(tmp_path)
    os.rename(tmp_path / "checkpoint/step_4", tmp_path / "checkpoint/.old_step_4")
    end = resume(tmp_path)
    assert end.start == 4
    assert equal(end.parameters, undamaged.parameters)


class Sync(NamedTuple):
    path: str


class Rename(NamedTuple):
    moved: list[str]  # what gets another name, with all files in it
    target: str


def paths_below(path):
    """A path, and the files below it where it is a folder."""
    paths = [os.path.abspath(path)]
    for folder, _, names in os.walk(path):
        for name in names:
            paths.append(os.path.abspath(os.path.join(folder, name)))
    return paths


def record_disk(monkeypatch):
    """A list to which every sync and every rename from now on is added."""
    events = []
    path_of = {}  # {descriptor: its path}
    real_open = os.open
    real_fsync = os.fsync

    def recorded_open(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        path_of[descriptor] = os.path.abspath(path)
        return descriptor

    def recorded_fsync(descriptor):
        events.append(Sync(path_of.get(descriptor)))
        real_fsync(descriptor)

    def recorded(real_move):
        def move(source, target):
            events.append(Rename(paths_below(source), os.path.abspath(target)))
            real_move(source, target)

        return move

    monkeypatch.setattr(os, "open", recorded_open)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded(os.rename))
    monkeypatch.setattr(os, "replace", recorded(os.replace))
    return events


def synced_paths(events):
    return {event.path for event in events if isinstance(event, Sync)}


def test_what_gets_a_name_is_on_the_disk(tmp_path, monkeypatch):
    """Before a rename all files and folders that it moves are synced.

    After it the folder is synced that holds the new name.
    """
    module, optimizer = fresh()
    train(module, optimizer, [0])
    events = record_disk(monkeypatch)
    save(str(tmp_path), 1, module, optimizer, {}, keep=1)
    write_lines(str(tmp_path / "rows.jsonl"), [{"a": 1}])

    named = set()
    for i, event in enumerate(events):
        if not isinstance(event, Rename):
            continue
        named.add(os.path.basename(event.target))
        assert set(event.moved) <= synced_paths(events[:i])
        assert os.path.dirname(event.target) in synced_paths(events[i + 1 :])
    assert named == {"state.json", "step_1", "rows.jsonl"}


# ---------------------------------------------------------------------------------------- optimizer

SQRT_HALF = math.sqrt(0.5)  # cos(pi / 4)


@pytest.mark.parametrize(
    "schedule, steps, warmup, final, expected",
    [
        ("constant", 6, 0, 0.0, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("constant", 6, 2, 0.5, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", 6, 2, 0.0, [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ("linear", 6, 0, 0.25, [2.0, 1.75, 1.5, 1.25, 1.0, 0.75]),
        ("cosine", 6, 2, 0.0, [1.0, 2.0, 2.0, 1 + SQRT_HALF, 1.0, 1 - SQRT_HALF]),
        ("cosine", 2, 0, 0.1, [2.0, 1.1]),
        ("linear", 2, 4, 0.0, [0.5, 1.0]),  # the run ends before its warm-up does
    ],
)
def test_the_learning_rate_by_hand(schedule, steps, warmup, final, expected):
    """The learning rate of every step, of a run whose --lr is 2."""
    rates = [learning_rate(step, steps, 2.0, schedule, warmup, final) for step in range(steps)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_falls_to_the_final_share_of_lr(schedule):
    assert learning_rate(6, 6, 2.0, schedule, final=0.25) == pytest.approx(0.5)


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="no schedule 'wsd'"):
        learning_rate(3, 6, 2.0, "wsd")


def identities(parameters):
    return {id(p) for p in parameters}


def test_vectors_do_not_decay_and_what_is_frozen_is_left_out():
    module, optimizer = fresh()
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.01
    assert vectors["weight_decay"] == 0.0
    assert matrices["betas"] == BETAS

    # module[2] is frozen, and the weight of module[4] is that of module[3].
    assert identities(matrices["params"]) == identities([module[0].weight, module[3].weight])
    biases = [module[0].bias, module[1].bias, module[3].bias, module[4].bias]
    assert identities(vectors["params"]) == identities([*biases, module[1].weight])


def test_a_step_clips_by_the_global_norm_and_clears_the_gradients():
    module, _ = fresh()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=123.0)
    before = copy_parameters(module)
    loss = 50 * (module(torch.ones(2, 3)) ** 2).sum()
    loss.backward()

    # The norm of all gradients as one long vector.
    gradients = []
    squares = 0.0
    for p in module.parameters():
        gradient = torch.zeros_like(p)
        if p.grad is not None:
            gradient = p.grad.clone()
        gradients.append(gradient)
        squares += (gradient**2).sum().item()
    norm = math.sqrt(squares)
    assert norm > 1

    found = optimizer_step(optimizer, module, lr=0.1, max_grad_norm=0.5, step=7)
    assert found == pytest.approx(norm, rel=1e-5)
    for p, old, gradient in zip(module.parameters(), before, gradients):
        clipped = gradient * 0.5 / norm
        torch.testing.assert_close(p.detach(), old - 0.1 * clipped)
        assert p.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run(bad):
    module, optimizer = fresh()
    before = train(module, optimizer, [0])
    loss = (module(torch.ones(2, 3)) ** 2).sum()
    loss.backward()
    module[0].weight.grad[1, 2] = bad
    with pytest.raises(FloatingPointError, match="step 17"):
        optimizer_step(optimizer, module, 0.1, 1.0, 17)
    assert equal(module.parameters(), before)


# -------------------------------------------------------------------------------------- run folders


def test_a_new_run_folder_leaves_nothing_without_create(tmp_path):
    with unlock_afterwards():
        assert run_folder(tmp_path / "runs/a").status == "new"
    # Not even the folder above it stays.
    assert names_in(tmp_path) == []


def test_an_unfinished_run_is_continued_with_the_same_settings(tmp_path):
    run_folder(tmp_path / "runs/a").create()
    assert run_folder(tmp_path / "runs/a", resume=True).status == "unfinished"
    with pytest.raises(InputError, match="lr.*--output_dir") as raised:
        run_folder(tmp_path / "runs/a", lr=0.2)
    assert "betas" not in str(raised.value)


def test_a_finished_run_is_done_and_has_no_checkpoints(tmp_path):
    run_folder(tmp_path).create()
    (tmp_path / "checkpoint").mkdir()
    assert run_folder(tmp_path).finish({"gold": 1.5}) == {"gold": 1.5}

    done = run_folder(tmp_path)
    assert done.status == "done"
    assert done.already_done() == {"gold": 1.5}
    assert not (tmp_path / "checkpoint").exists()
    with pytest.raises(InputError):
        run_folder(tmp_path, lr=0.2)


def test_a_run_with_a_setting_that_is_no_more_is_another_run(tmp_path):
    run_folder(tmp_path).create()
    run_folder(tmp_path).finish({"gold": 1.5})
    stored = run_folder(tmp_path).config
    write_json(str(tmp_path / "config.json"), {**stored, "gone": 1})
    with pytest.raises(InputError, match="gone"):
        run_folder(tmp_path)


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        run_folder(tmp_path / "file")


def test_an_empty_folder_can_be_a_run_s(tmp_path):
    assert run_folder(tmp_path).status == "new"


def test_a_folder_with_other_files_is_no_run_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not empty"):
        run_folder(tmp_path)


def test_a_run_killed_while_it_wrote_its_config_starts_again(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"lr"')
    assert run_folder(tmp_path).status == "new"


def steps_of(rows):
    return [row["step"] for row in rows]


def test_create_drops_what_came_after_the_checkpoint(tmp_path):
    folder = run_folder(tmp_path)
    folder.create()
    assert folder.records() == []
    module, optimizer = fresh()
    train(module, optimizer, [0])
    for step in range(3):
        folder.append("metrics.jsonl", [{"step": step, "x": "\u2028"}])
        folder.append("samples.jsonl", [{"step": step}, {"step": step}])
        folder.write_eval(step, [])
        if step > 0:
            folder.checkpoint(step, module, optimizer, {}, 2)
    folder.append("metrics.jsonl", [{"step": 3}, {"step": 4}])
    folder.append("samples.jsonl", [{"step": 3}])
    folder.write_eval(3, [])
    # The kill came in the middle of a line.
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, "half')

    again = run_folder(tmp_path)
    assert again.status == "unfinished"
    assert steps_of(again.records()) == [0, 1, 2, 3, 4]
    again.create(load(str(tmp_path), module, optimizer))

    assert again.records() == [{"step": step, "x": "\u2028"} for step in range(3)]
    with open(tmp_path / "samples.jsonl") as f:
        samples = [json.loads(line) for line in f]
    assert steps_of(samples) == [0, 0, 1, 1, 2, 2]
    assert names_in(tmp_path / "eval") == ["step_0.jsonl", "step_1.jsonl", "step_2.jsonl"]
    again.append("metrics.jsonl", [{"step": 3}])
    assert steps_of(again.records()) == [0, 1, 2, 3]


def test_create_without_a_checkpoint_starts_over(tmp_path):
    folder = run_folder(tmp_path)
    folder.create()
    folder.append("metrics.jsonl", [{"step": 0}])
    run_folder(tmp_path).create()
    assert folder.records() == []


def test_a_model_in_a_run_folder(tmp_path):
    def save_number(number, tokenizer, path):
        write_json(os.path.join(path, "a.json"), number)

    folder = run_folder(tmp_path)
    folder.create()
    folder.save_model(save_number, 5, None)
    assert read_json(str(tmp_path / "model/a.json")) == 5


def test_the_second_evaluation_of_a_step_replaces_the_first(tmp_path):
    folder = run_folder(tmp_path)
    folder.create()
    folder.write_eval(3, [{"prompt": "a"}, {"prompt": "b"}])
    folder.write_eval(3, [{"prompt": "c"}])
    assert names_in(tmp_path / "eval") == ["step_3.jsonl"]
    assert (tmp_path / "eval/step_3.jsonl").read_text() == '{"prompt": "c"}\n'


def test_only_the_first_process_writes(tmp_path):
    other = SimpleNamespace(
        main=False,
        barrier=lambda: None,
        together=lambda function: function(),
        on_main=lambda function: None,
    )
    folder = run_folder(tmp_path / "a", other)
    folder.create()
    folder.append("metrics.jsonl", [{"step": 0}])
    folder.write_eval(0, [])
    folder.checkpoint(1, None, None, {}, 1)
    folder.save_model(None, None, None)
    folder.finish({})
    assert not (tmp_path / "a").exists()
