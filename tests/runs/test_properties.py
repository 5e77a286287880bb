"""Properties that every script has, each written once: what changes no result (micro-batches, ranks, kills), what a finished folder does.
The kinds of runs stand in support.RUNS; kills at random moments in test_kills.py; flags and --help in runtime/test_flags.py.
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import (
    ALL_SCRIPTS,
    ENV,
    RUNS,
    SCRIPTS,
    STATEFUL,
    KillAt,
    Killed,
    assert_close_runs,
    assert_same_run,
    command_line,
    drive,
    flags,
    fork,
    hashes,
    join,
    metrics,
    rank_settings,
    ranks,
    read_rows,
    rollouts,
    small,
    train,
)

from nanorlhf.runtime import cli, log


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_a_script_calls_main_at_its_end(name):
    """A function that stands below the call does not exist yet when the script is run from a shell."""
    source = Path(ALL_SCRIPTS[name].__file__).read_text()
    last = ast.parse(source).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


def weights_error(kind):
    """How far float error may move a weight. A SARM's head, divided by the small spread of its scores, is large."""
    return 5e-4 if kind.startswith("sarm") else 1e-4


# ----------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize(
    "kind", ["sft", "dpo", "rm", "sarm_encoder_frozen", "sarm_detached", "ppo", "control"]
)
def test_micro_batches_change_nothing(base, tmp_path, kind):
    settings = {"steps": 3, "micro_batch_size": 8}
    if kind == "sft":
        settings |= {"model": f"{base}/sft"}  # without dropout, which DPO switches off
    if kind in ("dpo", "sarm_encoder_frozen", "sarm_detached"):
        settings |= {"eval_every": 2, "eval_size": 7}
    # Without a penalty the last bias has no gradient but float error, which AdamW makes large.
    if kind == "rm" or kind.startswith("sarm"):
        settings |= {"score_l2": 0.01}
    if kind == "ppo":
        settings |= {"reward_model": [f"{base}/rm"], "ent_coef": 0.01, "bootstrap_truncated": True}
    train(base, kind, tmp_path / "a", **settings)
    train(base, kind, tmp_path / "b", **settings | {"micro_batch_size": 3})
    train(
        base,
        kind,
        tmp_path / "c",
        **settings | {"micro_batch_size": 1, "tokens_per_micro_batch": 60},
    )
    for other in "bc":
        assert_close_runs(tmp_path / "a", tmp_path / other, weights_atol=weights_error(kind))
        for path in (tmp_path / "a").glob("eval/*"):
            answers, others = (
                read_rows(folder / path.name) for folder in (path.parent, tmp_path / other / "eval")
            )
            assert [row["response"] for row in answers] == [row["response"] for row in others]


# ------------------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    """A folder with the runs of rank_settings in one process, named by their kinds."""
    folder = tmp_path_factory.mktemp("one")
    join(fork(drive, folder, rank_settings(base)))
    return folder


@pytest.fixture(scope="module")
def two_processes(base, tmp_path_factory):
    """The same by torchrun in two."""
    folder, driver = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("driver") / "driver.py"
    driver.write_text(
        "import sys, json, support; support.in_child(support.drive, (sys.argv[1], json.loads(sys.argv[2])), {})"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        driver,
    ]
    done = subprocess.run(
        [*command, folder, json.dumps(rank_settings(base))],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def four_processes(base, tmp_path_factory):
    """The run of PPO in four."""
    folder = tmp_path_factory.mktemp("four")
    runs = [(kind, settings) for kind, settings in rank_settings(base) if kind == "ppo"]
    join(*ranks(4, drive, folder, runs))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["sft", "dpo", "rm", "sarm_encoder_frozen", "sarm_detached", "ppo"]
)
def test_two_processes_change_nothing(one_process, two_processes, kind):
    assert_close_runs(one_process / kind, two_processes / kind, weights_atol=weights_error(kind))
    if kind == "ppo":
        assert len(rollouts(one_process)) == 3 * 8 + 2 * 4 * 7 and rollouts(
            one_process
        ) == rollouts(two_processes)
        assert {path.name for path in two_processes.glob("rollouts_*")} == {
            "rollouts_0.jsonl",
            "rollouts_1.jsonl",
        }
        for step in range(4):
            for split in ("eval", "eval_ood"):
                rows, others = (
                    read_rows(folder / f"ppo/{split}/step_{step}.jsonl")
                    for folder in (one_process, two_processes)
                )
                assert [(r["prompt"], r["response"]) for r in rows] == [
                    (r["prompt"], r["response"]) for r in others
                ]
                assert [r["scores"]["rm"] for r in rows] == pytest.approx(
                    [r["scores"]["rm"] for r in others], rel=1e-4, abs=1e-4
                )


@pytest.mark.slow
def test_four_processes_change_nothing(one_process, four_processes):
    assert_close_runs(one_process / "ppo", four_processes / "ppo")
    assert rollouts(one_process) == rollouts(four_processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "n", [2, 4]
)  # with four, the order in which gradients are added up matters too
def test_sigkill_of_one_of_several_processes(request, base, tmp_path, n):
    """Rank 1 dies during an evaluation; all are started again and end as those that were left alone, bit for bit."""
    whole, folder = (
        request.getfixturevalue("two_processes" if n == 2 else "four_processes"),
        tmp_path / "killed",
    )
    settings = ["--output_dir", str(folder), *flags(dict(rank_settings(base))["ppo"])]
    first, second, *others = ranks(
        n, command_line, "ppo", *settings, KILL_AT="6", KILL_RANK="1"
    )  # step 2's second split
    join(second, code=-signal.SIGKILL)
    for process in (first, *others):
        process.kill()
        process.join()
    assert os.listdir(folder / "checkpoint") == ["step_1"] and len(metrics(folder)) == 2
    join(*ranks(n, command_line, "ppo", "--output_dir", str(folder), "--resume"))
    assert_same_run("ppo", whole / "ppo", folder)


# -------------------------------------------------------------------------- killed at every write


# {case: (kind of run, its settings)}; what a kill before the first checkpoint leaves is tried by ppo.
KILLED = {
    "ppo": ("ppo", {"ppo_epochs": 1, "minibatch_size": 8, "steps": 2, "checkpoint_every": 1, "max_new_tokens": 6, "eval_size": 2,
                    "n_samples": 1, **STATEFUL}),
    "control": ("control", {"ppo_epochs": 1, "minibatch_size": 8, "steps": 2, "checkpoint_every": 1, "max_new_tokens": 6, "eval_size": 2,
                            "n_samples": 1}),
    "rm": ("rm", {"checkpoint_every": 2}),
    "sft": ("sft", {"checkpoint_every": 2, "eval_every": 1}),
    "dpo": ("dpo", {"checkpoint_every": 1, "eval_every": 2, "eval_size": 2}),
    "dpo with lora": ("dpo", {"checkpoint_every": 2, "eval_size": 2, "lora_rank": 2, "lora_dropout": 0.3}),
    "sarm_frozen": ("sarm_frozen", {"steps": 4, "checkpoint_every": 2, "label_noise": 0.3}),
    "sarm_detached": ("sarm_detached", {"steps": 4, "checkpoint_every": 2, "label_noise": 0.3}),
    "sae": ("sae", {"steps": 3, "checkpoint_every": 2, "batch_size": 64, "eval_size": 2, "max_rows": 24, "buffer_tokens": 4096}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_killed_at_every_write(base, tmp_path, monkeypatch, case):
    """Kill a run at each of its writes, resume it, and compare it with one that was left alone."""
    kind, settings = KILLED[case]
    settings = {**settings, "keep_checkpoints": 1}
    with monkeypatch.context() as patch:
        counter = KillAt(patch)
        train(base, kind, tmp_path / "whole", **settings)
    assert counter.count > 10
    for n in range(1 if case == "ppo" else 4, counter.count + 1):
        folder = tmp_path / f"killed_{n}"
        with monkeypatch.context() as patch:
            kill = KillAt(patch, n)
            with pytest.raises(Killed):
                train(base, kind, folder, **settings)
        print("killed at", kill.at)
        train(
            base, kind, folder, resume=n % 2 == 0, **settings
        )  # with --resume or without: the same
        assert_same_run(kind, tmp_path / "whole", folder)
        shutil.rmtree(folder)


def test_killed_at_the_first_write(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        KillAt(patch, 1)
        with pytest.raises(Killed):
            train(base, "rm", tmp_path / "rm")
    train(base, "rm", tmp_path / "rm", resume=True)


def test_the_last_k_checkpoints_are_kept(base, tmp_path, monkeypatch):
    monkeypatch.setattr(log.RunFolder, "finish", lambda self, summary: summary)
    train(base, "rm", tmp_path / "rm", steps=5, checkpoint_every=1, keep_checkpoints=3)
    assert sorted(os.listdir(tmp_path / "rm/checkpoint")) == ["step_3", "step_4", "step_5"]


# --------------------------------------------------------------------------------------- run again


@pytest.mark.parametrize("kind", [*SCRIPTS, "sae"])
def test_run_again(base, tmp_path, kind, capsys):
    folder, module = tmp_path / kind, RUNS[kind]
    train(base, kind, folder)
    before, summary = hashes(folder), json.loads((folder / "summary.json").read_text())
    capsys.readouterr()
    assert (
        module.main(module.Config(output_dir=str(folder), **small(base, kind))) == summary
    )  # done
    assert "this run is done" in capsys.readouterr().out
    cli.run(
        module.Config, module.main, ["--output_dir", str(folder), "--resume"]
    )  # the folder's settings
    assert "this run is done" in capsys.readouterr().out
    other_seed = flags(small(base, kind, seed=1))
    for args, changed in (
        (["--resume", "--lr", "0.5"], "lr"),
        (["--steps", "7", "--resume"], "steps"),
        (other_seed, "seed"),
        ([], "steps"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.run(module.Config, module.main, ["--output_dir", str(folder), *args])
        error = capsys.readouterr().err
        assert (
            exit_.value.code == 2
            and len(error.splitlines()) == 1
            and "already holds another run" in error
        )
        assert f" {changed}" in error
    assert hashes(folder) == before
