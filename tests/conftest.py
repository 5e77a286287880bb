"""What pytest needs to know before the tests, and the fixtures that several files share.

Fixtures of the whole session are made once and only read: a test copies a file before changing it.
"""

import gc
import os
import sys

# Modules and the list of tests live to the end: looking through them for garbage takes seconds.
# workers.py turns the garbage collector on again.
gc.disable()

# Tests run on the CPU, also where there is a GPU, unless pytest is called with --gpu. Torch must
# not have looked before; processes that tests start inherit it.
if "--gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# One thread, before torch makes a second: workers.py forks, and a fork has no copies of threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# transformers needs no pool of threads to read a model: with one, a tiny model takes twice as long.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
# No test asks the hub: without a network each question would be tried again for half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
import signal
from pathlib import Path

# `pytest`, unlike `python -m pytest`, does not look for modules where it is called.
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from support import (
    ALL_SCRIPTS,
    BAD_REWARDS,
    GOOD_ROWS,
    RUN_REWARDS,
    SCRIPTS,
    fork,
    hold,
    wait_for,
    write_rows,
)
from transformers import AutoModelForCausalLM
from workers import pytest_runtestloop  # noqa: F401 (a hook of pytest)

import sample_bon
import train_rm
import train_sae
import train_sft
from nanorlhf import data, world
from nanorlhf.runtime import plots
from nanorlhf.show import page

# In the background of a shell script Ctrl-C is ignored. Processes that tests start would inherit
# that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Leave the slow tests out also where pytest is called without `tests`.

    It finds no pytest.ini then, since that lies in the folder tests.
    """
    if config.inipath is None:
        config.addinivalue_line("markers", "slow: left out by default; see pytest.ini")
        config.option.markexpr = config.option.markexpr or "not slow"


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the tests see GPUs")
    parser.addoption(
        "--kills",
        type=int,
        default=3,
        help="how often test_kills.py kills each script at a random moment",
    )
    parser.addoption(
        "--processes",
        type=int,
        choices=[1, 2],
        default=2,
        help="how many share the test files; see workers.py",
    )


SAVE = plots.save


def draw_only(draw, what, path):
    """In the place of plots.save(): put the figure together, and write no file.

    That takes a tenth of the time.
    """
    # plots.save() returns None as well where matplotlib is missing.
    try:
        import matplotlib.figure
    except ImportError:
        return None
    draw(matplotlib.figure.Figure(), what)
    return path


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Drawing takes as long as a run: no test draws but those that take `pictures`.

    No test writes a run's page but those that take `written_pages`.
    """
    with pytest.MonkeyPatch.context() as patch:
        # Each script has imported the functions by name, so they are replaced in each script.
        for script in (*SCRIPTS.values(), sample_bon):
            patch.setattr(script, "plot_run", lambda run: None)
        for script in ALL_SCRIPTS.values():
            patch.setattr(script, "write_page", lambda run, dist: None)
        patch.setattr(plots, "save", draw_only)
        yield


@pytest.fixture(scope="session", autouse=True)
def small_world():
    """The embedded world's data sets in a few hundred rows: thousands take seconds to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.WORLD_SIZES, "sft", 600)
        patch.setitem(data.WORLD_SIZES, "pairs", 200)
        patch.setattr(data, "WORLD_HELD_OUT", 64)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """No test waits for the disk: what tests write need not outlive the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """A test that takes this fixture has its pictures written."""
    monkeypatch.setattr(plots, "save", SAVE)
    for script in (*SCRIPTS.values(), sample_bon):
        monkeypatch.setattr(script, "plot_run", plots.plot_run)


@pytest.fixture
def written_pages(monkeypatch):
    """The scripts of a test that takes this fixture write the pages of their runs."""
    for script in ALL_SCRIPTS.values():
        monkeypatch.setattr(script, "write_page", page.write_page)


# ---------------------------------------------------------------------------------- trained runs


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The trained runs of this session, all on the embedded world, and files of data and rewards.

    sft/ and rm/; sae/, an autoencoder of sft's residual stream; sarm/, trained on it; dropout/, a
    model of random weights that has dropout.
    """
    root = tmp_path_factory.mktemp("base")
    # Rows of the world as files, in the formats of users' own data.
    write_rows(root / "sft.jsonl", world.demonstrations(120))
    write_rows(root / "pairs.jsonl", world.preferences(120))
    write_rows(root / "prompts.jsonl", world.prompts("train")[::6])
    (root / "rewards.py").write_text(RUN_REWARDS)
    train_base_policy(root)
    train_base_reward_model(root)
    save_random_model(root / "dropout", dropout=0.2)
    train_base_autoencoder(root)
    train_base_sarm(root)
    return root


def train_base_policy(root):
    # 20 steps: most tests need a trained model, but not a good one.
    config = train_sft.Config(
        output_dir=f"{root}/sft",
        steps=20,
        batch_size=16,
        eval_size=16,
        warmup=2,
        max_new_tokens=12,
        eval_splits=["test", "ood"],
    )
    train_sft.main(config)


def train_base_reward_model(root):
    config = train_rm.Config(
        output_dir=f"{root}/rm",
        model=f"{root}/sft",
        steps=6,
        batch_size=8,
        eval_size=32,
        warmup=0,
        eval_splits=["test", "ood"],
    )
    train_rm.main(config)


def train_base_autoencoder(root):
    # A SARM needs this kind: TopK, each token normalised by itself, no ReLU.
    config = train_sae.Config(
        output_dir=f"{root}/sae",
        model=f"{root}/sft",
        base="none",
        dataset=f"{root}/sft.jsonl",
        site="residual",
        layers="2",
        normalize="token",
        relu=False,
        expansion=2,
        k=8,
        steps=20,
        batch_size=256,
        eval_size=16,
        buffer_tokens=2048,
        dead_after=1000,
    )
    train_sae.main(config)


def train_base_sarm(root):
    config = train_rm.Config(
        output_dir=f"{root}/sarm",
        model=f"{root}/sft",
        sarm=f"{root}/sae",
        steps=6,
        batch_size=8,
        dataset=f"{root}/pairs.jsonl",
        eval_size=32,
        warmup=0,
    )
    train_rm.main(config)


def save_random_model(folder, dropout=0.0):
    """A model of the embedded world's size and words that has learned nothing."""
    config = world.model_config()
    config.hidden_dropout = dropout
    config.attention_dropout = dropout
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    world.tokenizer().save_pretrained(folder)


# -------------------------------------------------------------------------- material for bad input


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder of good input: model/, sft.jsonl, rm.jsonl, ppo.jsonl, rewards.py."""
    root = tmp_path_factory.mktemp("material")
    save_random_model(root / "model")
    for kind, rows in GOOD_ROWS.items():
        write_rows(root / f"{kind}.jsonl", rows)
    (root / "rewards.py").write_text(BAD_REWARDS)
    return root


@pytest.fixture
def here(material, tmp_path, monkeypatch):
    """A copy of the material as the working directory: what a script writes by mistake shows."""
    shutil.copytree(material, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# ---------------------------------------------------------------------------------- other processes


@pytest.fixture
def another(tmp_path):
    """A function: another process works in this folder until the test ends."""
    processes = []

    def works_in(folder):
        ready = tmp_path / f"ready_{len(processes)}"
        processes.append(fork(hold, str(folder), str(ready), RANK="0"))
        wait_for(ready.exists)
        return processes[-1]

    yield works_in
    for process in processes:
        process.kill()
        process.join()
