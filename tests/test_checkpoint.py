"""nanorlhf.checkpoint, optim and the run folders of log.py: exact resume, atomic writes, the learning rate by hand."""

import json
import math
import os
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import nanorlhf.checkpoint
from nanorlhf.checkpoint import checkpoints, load, save
from nanorlhf.distributed import Dist
from nanorlhf.errors import InputError
from nanorlhf.files import read_json, replace_folder, write_json
from nanorlhf.locks import unlock_afterwards
from nanorlhf.log import RunFolder
from nanorlhf.optim import adamw, learning_rate, optimizer_step

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
    assert load(str(tmp_path), module, optimizer) == {"step": 3, "kl_coef": 0.25, "scaler": [1, 2.5]}
    assert equal(module.parameters(), half)
    assert equal(train(module, optimizer, range(3, 6)), whole) and not equal(half, whole)
    module, optimizer = fresh()
    load(str(tmp_path), module, optimizer)
    optimizer.state.clear()
    assert not equal(train(module, optimizer, range(3, 6)), whole)  # the optimizer's state is needed


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
    assert sorted(os.listdir(tmp_path / "checkpoint" / "step_11")) == ["state.json", "state.safetensors"]


def test_a_save_that_was_killed_leaves_the_last_one(tmp_path, monkeypatch):
    module, optimizer = fresh()
    train(module, optimizer, [0])
    save(str(tmp_path), 1, module, optimizer, {"x": 1}, keep=1)
    saved = [p.detach().clone() for p in module.parameters()]
    train(module, optimizer, [1])
    with monkeypatch.context() as m:
        m.setattr(nanorlhf.checkpoint, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
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
    assert sorted(os.listdir(tmp_path / "checkpoint" / "step_2")) == ["state.json", "state.safetensors"]


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


# ------------------------------------------------------------------------------------------------------------------ optimizer


def test_the_learning_rate_by_hand():
    def rates(schedule, steps=6, **kwargs):
        return pytest.approx([learning_rate(s, steps, 2.0, schedule, **kwargs) for s in range(steps)])

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
    assert {id(p) for p in vectors["params"]} == {id(m.bias) for m in (module[0], module[1], module[3], module[4])} | {id(module[1].weight)}
    assert matrices["betas"] == (0.9, 0.95)


def test_a_step_clips_by_the_global_norm_and_clears_the_gradients():
    module, _ = fresh()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=123.0)
    before = [p.detach().clone() for p in module.parameters()]
    (module(torch.ones(2, 3)) ** 2).sum().mul(50).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
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
    assert done.state == "done" and done.already_done() == {"gold": 1.5} and not os.path.exists(os.path.join(path, "checkpoint"))
    with pytest.raises(InputError):
        RunFolder(Config(path, lr=0.2), ALONE)
    write_json(os.path.join(path, "config.json"), {**done.config, "gone": 1})  # a setting that is no more
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


def test_create_drops_what_came_after_the_checkpoint(tmp_path):
    folder = RunFolder(Config(str(tmp_path)), ALONE)
    folder.create()
    assert folder.records() == []
    folder.append("metrics.jsonl", [{"step": s, "x": "\u2028"} for s in range(4)])
    folder.append("samples.jsonl", [{"step": s} for s in (0, 0, 2, 3)])
    module, optimizer = fresh()
    folder.checkpoint(1, module, optimizer, {}, 2)
    folder.checkpoint(2, module, optimizer, {}, 2)
    folder.append("metrics.jsonl", [{"step": 4}])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, "half')  # the kill
    again = RunFolder(Config(str(tmp_path)), ALONE)
    assert again.state == "unfinished" and [r["step"] for r in again.records()] == [0, 1, 2, 3, 4]
    again.create()
    assert again.records() == [{"step": s, "x": "\u2028"} for s in range(3)]
    assert [json.loads(line)["step"] for line in open(tmp_path / "samples.jsonl")] == [0, 0, 2]
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
    assert (tmp_path / "eval" / "step_3.jsonl").read_text() == '{"prompt": "c"}\n' and len(os.listdir(tmp_path / "eval")) == 1


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
