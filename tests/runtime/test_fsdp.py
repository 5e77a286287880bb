"""--distributed fsdp: the same runs as with DDP, on two and four real processes; saved, killed and resumed on other numbers of them.

The runs are those of support.rank_settings(): SFT, reward model, and a PPO run with the controllers and the scaler on. They are
made once (the fixtures below) and many tests look at them.
"""

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import (
    assert_bit_equal,
    assert_close_runs,
    drive,
    join,
    metrics,
    rank_settings,
    ranks,
    rollouts,
    small,
    train,
)
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import train_ppo
import train_rm
from nanorlhf import evaluation, rollout
from nanorlhf.errors import InputError
from nanorlhf.hf.blocks import freeze, trainable
from nanorlhf.models import Policy, load_policy, load_reward_model
from nanorlhf.packing import pack, response_mask_of
from nanorlhf.rollout import generate, left_pad
from nanorlhf.runtime import checkpoint, cli, distributed, fsdp, log
from nanorlhf.runtime.optim import adamw, optimizer_step

FSDP = {"distributed": "fsdp"}
KINDS = ("sft", "dpo", "rm", "ppo")


# ------------------------------------------------------------------------------------------------------------------------ the runs


def keeping(folder, runs, step=1):
    """drive(), which also copies a run as it is after the checkpoint of a step: as if it had been killed right there."""
    real = log.RunFolder.checkpoint

    def kept(self, at, *args):
        real(self, at, *args)
        if at == step and self.dist.main:
            shutil.copytree(self.path, self.path + "_killed")

    log.RunFolder.checkpoint = kept
    drive(folder, runs)


def on(work, name, n, target, runs, **env):
    (work / name).mkdir()
    join(*ranks(n, target, work / name, runs, **env))
    return work / name


def settings_of(base, **more):
    return {
        kind: {**settings, "checkpoint_every": 1, "eval_every": 0, **more}
        for kind, settings in rank_settings(base)
        if kind in KINDS
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of this file's runs."""
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ddp(base, work):
    return on(
        work, "ddp", 2, keeping, list(settings_of(base, checkpoint_activations=True).items())
    )  # which changes nothing


@pytest.fixture(scope="module")
def two(base, work):
    return on(work, "two", 2, keeping, list(settings_of(base, **FSDP).items()))


@pytest.fixture(scope="module")
def four(base, work, two):
    """On four processes: a PPO run, and the rest of one that was killed on two."""
    shutil.copytree(two / "ppo_killed", work / "four/resumed/ppo")
    (work / "four/new").mkdir()
    settings = settings_of(base, **FSDP)["ppo"]
    join(
        *ranks(
            4,
            in_turn,
            [
                (keeping, work / "four/new", [("ppo", settings)]),
                (drive, work / "four/resumed", [("ppo", settings)]),
            ],
        )
    )
    return work / "four"


def in_turn(jobs):
    """Several jobs in one process; what drive() and keeping() patch is put back after each."""
    shutdown, distributed.shutdown = distributed.shutdown, lambda: None
    roll_out, save = rollout.roll_out, log.RunFolder.checkpoint
    for function, *args in jobs:
        function(*args)
        train_ppo.roll_out = evaluation.roll_out = roll_out
        log.RunFolder.checkpoint = save
    shutdown()


@pytest.fixture(scope="module")
def resumed(base, work, ddp, two, four, killed):
    """On two processes the rest of runs that were killed: on two (sft, rm, ppo), on four (ppo), and with DDP (ppo)."""
    jobs, settings = [], settings_of(base, **FSDP)
    for name, kind, source in [("two", "sft", two / "sft_killed"), ("two", "rm", two / "rm_killed"), ("two", "ppo", killed),
                               ("four", "ppo", four / "new/ppo_killed"), ("ddp", "ppo", ddp / "ppo_killed")]:  # fmt: skip
        shutil.copytree(source, work / "resumed" / name / kind)
        jobs.append((drive, work / "resumed" / name, [(kind, settings[kind])]))
    join(*ranks(2, in_turn, jobs))
    return work / "resumed"


def killing(folder, runs):
    """drive(), in which rank 1 dies right after it has written its shard of the second checkpoint."""
    from torch.distributed import checkpoint as dcp

    real, count = dcp.save, [0]

    def save(tensors, storage_writer):
        count[0] += 1
        writer, write = storage_writer, storage_writer.write_data
        if count[0] == 2 and os.environ["RANK"] == "1":
            writer.write_data = lambda *args: (write(*args), os.kill(os.getpid(), signal.SIGKILL))
        real(tensors, storage_writer=writer)

    dcp.save = save
    drive(folder, runs)


@pytest.fixture(scope="module")
def killed(base, work):
    (work / "killed").mkdir()
    first, second = ranks(
        2,
        killing,
        work / "killed",
        [("ppo", settings_of(base, **FSDP)["ppo"])],
        STDERR=str(work / "killed/stderr"),
    )
    join(second, code=-signal.SIGKILL)
    first.kill()
    first.join()
    return work / "killed/ppo"


# ----------------------------------------------------------------------------------------------------------- the same runs as DDP's


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_as_with_ddp(ddp, two, kind):
    assert_close_runs(ddp / kind, two / kind)


@pytest.mark.slow
def test_the_same_answers_as_with_ddp(ddp, two, four):
    assert rollouts(ddp) == rollouts(two) == rollouts(four / "new") and len(
        rollouts(two)
    ) == 3 * 8 + 2 * (7 + 7)  # two splits


@pytest.mark.slow
def test_four_processes_as_with_ddp(ddp, four):
    assert_close_runs(ddp / "ppo", four / "new/ppo")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, load", [("sft", load_policy), ("rm", load_reward_model), ("ppo", load_policy)]
)
def test_what_is_saved_is_whole(ddp, two, name, load):
    """The same files, names, shapes and dtypes as with DDP, loaded by the same code."""
    files = [
        sorted(str(p.relative_to(f)) for p in (f / name / "model").rglob("*")) for f in (ddp, two)
    ]
    assert files[0] == files[1] and any("safetensors" in file for file in files[0])
    a, b = load(str(ddp / name)), load(str(two / name))
    assert all(
        p.dtype == torch.float32 and p.shape == q.shape
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


# --------------------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.slow
def test_resumed_on_as_many_processes(two, resumed):
    for kind in ("sft", "rm", "ppo"):
        assert_bit_equal(two / kind, resumed / "two" / kind)


@pytest.mark.slow
def test_killed_between_two_shards(killed):
    """One shard of step 2 is there, the other process died: step 1's checkpoint is the newest. test_resumed... goes on from it."""
    assert sorted(os.listdir(killed / "checkpoint")) == [".tmp_step_2", "step_1"]
    assert any("shard" in name for name in os.listdir(killed / "checkpoint/.tmp_step_2"))


@pytest.mark.slow
def test_resumed_on_another_number_of_processes(ddp, two, four, resumed):
    assert_close_runs(two / "ppo", four / "resumed/ppo")  # 2 -> 4
    assert_close_runs(two / "ppo", resumed / "four/ppo")  # 4 -> 2
    assert_close_runs(two / "ppo", resumed / "ddp/ppo")  # DDP's checkpoint


@pytest.mark.slow
def test_resumed_in_one_process(base, two, tmp_path):
    shutil.copytree(two / "ppo_killed", tmp_path / "ppo")
    cli.run(
        train_ppo.Config, train_ppo.main, ["--output_dir", str(tmp_path / "ppo"), "--resume"]
    )  # its config says fsdp: nothing to shard
    assert_close_runs(two / "ppo", tmp_path / "ppo")


@pytest.mark.slow
def test_a_checkpoint_in_shards(two):
    folder = two / "ppo_killed/checkpoint/step_1"
    names = sorted(os.listdir(folder))
    assert [name.split("-")[:2] for name in names[:-1]] == [
        ["shard", "00001"],
        ["shard", "00002"],
    ] and names[-1] == "state.json"
    sizes = [(folder / name).stat().st_size for name in names[:-1]]
    assert max(sizes) < 1.15 * sum(sizes) / 2
    with safe_open(folder / names[0], "pt") as f:
        assert json.loads(f.metadata()["DCP_SHARDING_INFO"])  # where each shard belongs


# ------------------------------------------------------------------------------------------------------------- models in shards


def tiny(kind="llama", **kwargs):
    torch.manual_seed(0)
    if kind == "gpt2":  # tied embeddings
        config = GPT2Config(
            n_embd=32,
            n_layer=3,
            n_head=2,
            vocab_size=50,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    else:
        config = LlamaConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
                             vocab_size=50, max_position_embeddings=64)  # fmt: skip
    policy = Policy(AutoModelForCausalLM.from_config(config), **kwargs).eval()
    for p in policy.value_head.parameters():
        nn.init.normal_(p, std=0.1)
    return policy


BATCH = pack(
    [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], [[11, 12], [13, 14, 15], [16], [17, 18, 19, 20]]
)


def total(policy, batch=BATCH):
    out = policy(batch, response_mask_of(batch))
    return (out["logprobs"] + out["values"] ** 2).sum() / 10


def step(policy, optimizer, batch, world=1):
    (total(policy, batch) * world).backward()
    return optimizer_step(optimizer, policy, 1e-2, 1e-3, 1)


def mine(dist):
    return BATCH.rows(torch.tensor(list(dist.part(len(BATCH)))))


def check_shards(folder, kind):
    """On two processes: one model in shards against itself whole."""
    dist = distributed.setup("cpu", "fsdp")
    assert dist.sharded
    plain, policy = tiny(kind), tiny(kind)
    for p in (plain, policy):
        p.lm.base_model.get_input_embeddings().requires_grad_(False)
        for (
            name,
            q,
        ) in (
            p.named_parameters()
        ):  # frozen and trained weights side by side in each unit, as with adapters
            q.requires_grad_(q.requires_grad and ("attn" not in name))
        fsdp.all_blocks(p)[0].requires_grad_(False)  # and a unit of which nothing is trained
    everything = fsdp.local_bytes(plain)["parameters"]
    assert (
        dist.wrap(policy, total) is policy
        and fsdp.is_sharded(policy)
        and not fsdp.is_sharded(plain)
    )
    assert [name for name, _ in trainable(policy)] == [name for name, _ in trainable(plain)]
    optimizers = [adamw(p, 1e-2, (0.9, 0.95), 0.1) for p in (plain, policy)]
    for _ in range(3):
        norms = (
            step(plain, optimizers[0], BATCH),
            step(policy, optimizers[1], mine(dist), dist.world),
        )
        assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 1e-3  # clipped
        assert len(set(dist.gather(torch.tensor([norms[1]])).tolist())) == 1
    for (name, p), q in zip(plain.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(
            p.detach(), q.detach().full_tensor(), rtol=0, atol=1e-5, msg=name
        )
        assert q.requires_grad or q.grad is None
    held = fsdp.local_bytes(policy)["parameters"]
    assert held < 0.6 * everything

    # Rollouts and forwards inside gathered(): as often as each process likes. And after it everything is in shards again.
    ids, mask = left_pad([[1, 2, 3], [4, 5]], 0)
    with fsdp.gathered(policy):
        assert fsdp.local_bytes(policy)["parameters"] == everything
        for _ in range(1 + 2 * dist.rank):
            a, b = (
                generate(
                    p,
                    ids,
                    mask,
                    6 + 3 * dist.rank,
                    eos_token_id=None,
                    pad_token_id=0,
                    seed=1,
                    step=2,
                )
                for p in (plain, policy)
            )
            assert a.response_ids.equal(b.response_ids)
            torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(total(plain), total(policy), rtol=1e-4, atol=1e-5)
    assert fsdp.local_bytes(policy)["parameters"] == held
    step(policy, optimizers[1], mine(dist), dist.world)

    # Whole again for saving: on the main process, tied where it was tied; the shards come back.
    before = [p.to_local().clone() for p in policy.parameters()]
    with fsdp.whole(policy, dist.main):
        if dist.main:
            policy.lm.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder)
            assert all(
                p.equal(q) for p, q in zip(again.parameters(), policy.lm.parameters(), strict=True)
            )
            assert len(load_file(Path(folder) / "model.safetensors")) == len(
                list(policy.lm.parameters())
            )
        else:
            assert sum(p.numel() for p in policy.parameters()) == 0
    assert all(p.to_local().equal(q) for p, q in zip(policy.parameters(), before, strict=True))
    step(policy, optimizers[1], mine(dist), dist.world)


def check_memory(folder):
    """What a process holds of a fully trained model: its share, of parameters, gradients and Adam's moments."""
    dist = distributed.setup("cpu", "fsdp")
    held = {}
    for name in ("plain", "sharded"):
        torch.manual_seed(0)
        policy = load_policy(f"{folder}/sft")
        model = dist.wrap(policy, total) if name == "sharded" else policy
        optimizer = adamw(policy, 1e-3, (0.9, 0.95), 0.0)
        step(model, optimizer, BATCH)
        total(model).backward()
        held[name] = fsdp.local_bytes(policy, optimizer)
    assert (
        held["plain"]["gradients"]
        == held["plain"]["parameters"]
        == pytest.approx(held["plain"]["optimizer"] / 2, rel=1e-3)
    )
    for part, size in held["plain"].items():
        assert held["sharded"][part] == pytest.approx(size / dist.world, rel=0.15), part
    assert sum(held["sharded"].values()) == pytest.approx(
        sum(held["plain"].values()) / dist.world, rel=0.15
    )


def check_bfloat16(folder):
    """Gathered in bfloat16; shards, heads and optimizer in float32."""
    dist = distributed.setup("cpu", "fsdp")
    plain, policy = tiny(), tiny()
    model = dist.wrap(policy, total, "bfloat16")
    optimizer = adamw(policy, 1e-3, (0.9, 0.95), 0.0)
    with fsdp.gathered(policy), torch.no_grad():
        assert (
            policy.lm.lm_head.weight.dtype == torch.bfloat16
            and policy.value_head.weight.dtype == torch.float32
        )
        with distributed.autocast(dist, "bfloat16"):
            assert total(policy).item() == pytest.approx(total(plain).item(), rel=0.02)
    with distributed.autocast(dist, "bfloat16"):
        step(model, optimizer, mine(dist))
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert all(
        value.dtype == torch.float32
        for state in optimizer.state.values()
        for value in state.values()
    )


def odd_settings(base):
    """A separate value model, the KL in the loss by full forwards of the reference, frozen blocks and several rewards, one of them text."""
    return small(base, "ppo", reward_model=[f"{base}/rm", f"{base}/rewards.py:the"], value_model=f"{base}/rm", kl_in="loss", kl_kind="full",
                 freeze_layers=0.5, steps=2, minibatch_size=8)  # fmt: skip


def lora_settings(base):
    """A reference that is the policy itself, asked inside the policy's forward too; as many micro-batches as each rank's tokens need."""
    return small(base, "ppo", reward_model=[f"{base}/rm"], lora_rank=2, lr=1e-2, kl_in="loss", kl_kind="full", steps=2, minibatch_size=8,
                 tokens_per_micro_batch=40)  # fmt: skip


def merge_settings(base):
    return small(base, "sft", model=f"{base}/sft", lora_rank=2, lr=1e-2, merge=True)


@pytest.fixture(scope="module")
def checked(base, work):
    """The checks above, on two processes, and three small runs."""
    jobs = [
        (check_shards, work / "gpt2", "gpt2"),
        (check_shards, work / "llama", "llama"),
        (check_memory, base),
        (check_bfloat16, base),
    ]
    (work / "checked").mkdir()
    ppo = small(base, "ppo", reward_model=[f"{base}/rm"], dtype="bfloat16", **FSDP)
    runs = [("ppo", {**odd_settings(base), **FSDP, "checkpoint_activations": True})]
    jobs += [
        (drive, work / "checked/odd", runs),
        (drive, work / "checked/bfloat16", [("ppo", ppo)]),
    ]
    jobs += [
        (
            drive,
            work / "checked/lora",
            [("ppo", {**lora_settings(base), **FSDP}), ("sft", {**merge_settings(base), **FSDP})],
        )
    ]
    for name in ("odd", "bfloat16", "lora"):
        (work / "checked" / name).mkdir()
    join(*ranks(2, in_turn, jobs))
    return work / "checked"


@pytest.mark.slow
def test_shards_against_the_whole(checked):
    """check_shards() on GPT-2 and Llama, check_memory() and check_bfloat16() ran in the fixture's two processes."""


@pytest.mark.slow
def test_separate_value_model_and_full_kl(base, checked, tmp_path):
    train(base, "ppo", tmp_path / "plain", **odd_settings(base))
    assert_close_runs(tmp_path / "plain", checked / "odd/ppo")


@pytest.mark.slow
def test_lora(base, checked, tmp_path, monkeypatch):
    counts, even = [], distributed.Dist.even
    monkeypatch.setattr(
        distributed.Dist, "even", lambda self, parts: counts.append(len(parts)) or even(self, parts)
    )
    train(base, "ppo", tmp_path / "plain", **lora_settings(base))
    assert max(counts) > 2  # of both ranks' rows here; the ranks have their own
    assert_close_runs(tmp_path / "plain", checked / "lora/ppo")
    assert sorted(p.name for p in (tmp_path / "plain/model").iterdir()) == sorted(
        p.name for p in (checked / "lora/ppo/model").iterdir()
    )


@pytest.mark.slow
def test_merged_from_shards(base, checked, tmp_path):
    train(base, "sft", tmp_path / "plain", **merge_settings(base))
    assert_close_runs(tmp_path / "plain", checked / "lora/sft")
    before, after = (
        load_file(f"{base}/sft/model/model.safetensors"),
        load_file(checked / "lora/sft/model/model.safetensors"),
    )
    assert before.keys() == after.keys() and any(
        not before[name].equal(after[name]) for name in before
    )


def test_even_micro_batches():
    """Rank 0 has two parts where another rank has four: its largest are halved, nothing is lost, and no part grows."""
    dist = distributed.Dist(0, 2, torch.device("cpu"), sharded=True)
    dist.gather = lambda counts: torch.cat([counts, torch.tensor([4])])
    parts = dist.even((torch.tensor([5, 1, 2, 7, 3]), torch.tensor([4])))
    assert [part.tolist() for part in parts] == [[5, 1], [2], [7, 3], [4]]
    dist.sharded = False
    assert len(dist.even((torch.tensor([5]),))) == 1


@pytest.mark.slow
def test_bfloat16(base, checked, tmp_path):
    train(base, "ppo", tmp_path / "ddp", reward_model=[f"{base}/rm"], dtype="bfloat16")
    rows, others = metrics(tmp_path / "ddp"), metrics(checked / "bfloat16/ppo")
    assert rows[0]["eval/kl_k3"] == pytest.approx(others[0]["eval/kl_k3"], abs=0.02)
    assert all(row["first_ratio_error"] < 1e-2 for row in others[1:])
    assert rows[1]["entropy"] == pytest.approx(others[1]["entropy"], abs=0.5)
    saved = load_file(checked / "bfloat16/ppo/model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------- without processes


@pytest.mark.parametrize("training", [True, False])
def test_checkpoint_activations(training):
    """The same gradients bit by bit, with dropout's noise too, from a fraction of the memory; also where blocks are frozen."""

    def gradients(checkpointed):
        policy = tiny("gpt2").train(training)
        freeze(policy.lm, 0.4)
        if checkpointed:
            fsdp.checkpoint_activations(policy)
        kept = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x
        ):
            loss = total(policy)
        loss.backward()
        return {name: p.grad for name, p in policy.named_parameters()}, sum(kept)

    (plain, all_kept), (again, few_kept) = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and few_kept < 0.5 * all_kept
    for name, grad in plain.items():
        assert grad is None and again[name] is None or grad.equal(again[name]), name


def test_checkpointed_blocks_can_be_copied():
    policy = tiny()
    fsdp.checkpoint_activations(policy)
    twin = copy.deepcopy(policy)
    nn.init.zeros_(fsdp.all_blocks(policy)[0].mlp.down_proj.weight)
    assert (
        total(twin).item()
        == pytest.approx(total(tiny()).item())
        != pytest.approx(total(policy).item())
    )
    ids, mask = left_pad([[1, 2, 3], [4, 5]], 0)
    a, b = (
        generate(p, ids, mask, 6, eos_token_id=None, pad_token_id=0, seed=1) for p in (twin, tiny())
    )
    assert a.response_ids.equal(b.response_ids) and a.logprobs.equal(b.logprobs)  # with its cache


def test_one_process_shards_nothing():
    dist, policy = distributed.setup("cpu", "fsdp"), tiny()
    assert not dist.sharded and dist.wrap(policy, total) is policy and not fsdp.is_sharded(policy)
    with fsdp.gathered(policy, None), fsdp.whole(policy):
        assert fsdp.local_bytes(policy)["gradients"] == 0


def test_old_and_new_checkpoints_of_a_whole_module(tmp_path):
    """A checkpoint of one process is one plain safetensors file; its scalars, vectors and matrices come back as they were."""
    policy = tiny()
    optimizer = adamw(policy, 1e-2, (0.9, 0.95), 0.1)
    step(policy, optimizer, BATCH)
    checkpoint.save(str(tmp_path), 1, policy, optimizer, {}, 1)
    again = tiny()
    other = adamw(again, 1e-2, (0.9, 0.95), 0.1)
    assert checkpoint.load(str(tmp_path), again, other) == {"step": 1}
    for (name, p), q in zip(policy.named_parameters(), again.parameters(), strict=True):
        assert p.equal(q) and optimizer.state[p].keys() == other.state[q].keys(), name
        assert all(value.equal(other.state[q][key]) for key, value in optimizer.state[p].items())


def test_bad_flags():
    with pytest.raises(InputError, match="--distributed must be one of ddp, fsdp"):
        train_ppo.Config(distributed="zero")
    with pytest.raises(InputError, match="--members trains each on one process"):
        train_rm.Config(members=2, distributed="fsdp")
