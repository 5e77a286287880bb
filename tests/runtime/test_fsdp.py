"""--distributed fsdp: the same runs as with DDP, on two and four real processes.

They are also saved, killed and resumed on other numbers of processes. The runs are those of
support.rank_settings(): SFT, DPO, reward model, and a PPO run with the controllers and the scaler
on. The fixtures below make them once, and many tests look at them.
"""

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from held_bytes import local_bytes
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
KINDS = ("sft", "dpo", "simpo", "rm", "ppo")
BETAS = (0.9, 0.95)


def names_in(folder):
    return sorted(os.listdir(folder))


# ----------------------------------------------------------------------------- what a process does

# These functions and their arguments are pickled, and run in processes of their own.


def drive_and_copy(folder, runs):
    """drive(), which also copies each run as it is after the checkpoint of step 1.

    The copy is what a kill right there would have left.
    """
    real_checkpoint = log.RunFolder.checkpoint

    def checkpoint_and_copy(self, step, *args):
        real_checkpoint(self, step, *args)
        if step == 1 and self.dist.main:
            shutil.copytree(self.path, self.path + "_killed")

    log.RunFolder.checkpoint = checkpoint_and_copy
    drive(folder, runs)


def drive_and_die(folder, runs):
    """drive(), in which rank 1 dies after it has written its shard of the second checkpoint."""
    from torch.distributed import checkpoint as dcp

    real_save = dcp.save
    saved = []

    def save(tensors, storage_writer):
        saved.append(storage_writer)
        real_write = storage_writer.write_data

        def write_and_die(*args):
            real_write(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        if len(saved) == 2 and os.environ["RANK"] == "1":
            storage_writer.write_data = write_and_die
        real_save(tensors, storage_writer=storage_writer)

    dcp.save = save
    drive(folder, runs)


def do_in_turn(jobs):
    """Several jobs [(function, *arguments)] in one group of processes.

    What drive() and drive_and_copy() put in the place of other functions is undone after each.
    """
    real_shutdown = distributed.shutdown
    real_roll_out = rollout.roll_out
    real_checkpoint = log.RunFolder.checkpoint
    distributed.shutdown = lambda: None
    for function, *args in jobs:
        function(*args)
        train_ppo.roll_out = real_roll_out
        evaluation.roll_out = real_roll_out
        log.RunFolder.checkpoint = real_checkpoint
    real_shutdown()


# ----------------------------------------------------------------------------------------- the runs


def settings_of(base, **changes):
    """{kind: the settings of its run}."""
    settings = {}
    for kind, own in rank_settings(base):
        if kind in KINDS:
            settings[kind] = {**own, "checkpoint_every": 1, "eval_every": 0, **changes}
    return settings


def run_all_kinds(folder, settings):
    """All kinds of runs on two processes."""
    folder.mkdir()
    join(*ranks(2, drive_and_copy, folder, list(settings.items())))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of this file's runs."""
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ddp(base, work):
    """The runs with DDP. That activations are computed again changes nothing."""
    return run_all_kinds(work / "ddp", settings_of(base, checkpoint_activations=True))


@pytest.fixture(scope="module")
def two(base, work):
    return run_all_kinds(work / "two", settings_of(base, **FSDP))


@pytest.fixture(scope="module")
def four(base, work, two):
    """On four processes: a PPO run, new, and the rest, resumed, of one that was killed on two."""
    new = work / "four/new"
    resumed = work / "four/resumed"
    shutil.copytree(two / "ppo_killed", resumed / "ppo")
    new.mkdir()
    runs = [("ppo", settings_of(base, **FSDP)["ppo"])]
    join(*ranks(4, do_in_turn, [(drive_and_copy, new, runs), (drive, resumed, runs)]))
    return work / "four"


@pytest.fixture(scope="module")
def killed(base, work):
    """A PPO run on two processes, one of which died in the middle of a checkpoint."""
    folder = work / "killed"
    folder.mkdir()
    runs = [("ppo", settings_of(base, **FSDP)["ppo"])]
    first, second = ranks(2, drive_and_die, folder, runs, STDERR=f"{folder}/stderr")
    join(second, code=-signal.SIGKILL)
    first.kill()
    first.join()
    return folder / "ppo"


@pytest.fixture(scope="module")
def resumed(base, work, ddp, two, four, killed):
    """On two processes the rest of runs that were killed: NAME/KIND, NAME being where."""
    sources = {
        "two/sft": two / "sft_killed",
        "two/rm": two / "rm_killed",
        "two/ppo": killed,
        "four/ppo": four / "new/ppo_killed",
        "ddp/ppo": ddp / "ppo_killed",
    }
    settings = settings_of(base, **FSDP)
    jobs = []
    for place, source in sources.items():
        shutil.copytree(source, work / "resumed" / place)
        name, kind = place.split("/")
        jobs.append((drive, work / "resumed" / name, [(kind, settings[kind])]))
    join(*ranks(2, do_in_turn, jobs))
    return work / "resumed"


# --------------------------------------------------------------------------- the same runs as DDP's


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_as_with_ddp(ddp, two, kind):
    assert_close_runs(ddp / kind, two / kind)


@pytest.mark.slow
def test_four_processes_as_with_ddp(ddp, four):
    assert_close_runs(ddp / "ppo", four / "new/ppo")


@pytest.mark.slow
def test_the_same_answers_as_with_ddp(ddp, two, four):
    answers = rollouts(ddp)
    assert rollouts(two) == answers
    assert rollouts(four / "new") == answers
    # Three rollouts of 8, and before and after them 7 of each of two splits.
    assert len(answers) == 3 * 8 + 2 * (7 + 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, load", [("sft", load_policy), ("rm", load_reward_model), ("ppo", load_policy)]
)
def test_what_is_saved_is_whole(ddp, two, name, load):
    """The same files, names, shapes and dtypes as with DDP, loaded by the same code."""
    files = names_in(two / name / "model")
    assert files == names_in(ddp / name / "model")
    assert "safetensors" in " ".join(files)
    with_ddp = load(str(ddp / name))
    with_fsdp = load(str(two / name))
    for p, q in zip(with_ddp.parameters(), with_fsdp.parameters(), strict=True):
        assert p.dtype == torch.float32
        assert p.shape == q.shape


# ---------------------------------------------------------------------------------- kill and resume


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rm", "ppo"])
def test_resumed_on_as_many_processes(two, resumed, kind):
    assert_bit_equal(two / kind, resumed / "two" / kind)


@pytest.mark.slow
def test_a_kill_between_two_shards_leaves_the_checkpoint_before(killed):
    """One shard of step 2 is there, the other process died: the run above goes on from step 1."""
    assert names_in(killed / "checkpoint") == [".tmp_step_2", "step_1"]
    assert "shard" in " ".join(names_in(killed / "checkpoint/.tmp_step_2"))


@pytest.mark.slow
def test_resumed_on_four_processes_instead_of_two(two, four):
    assert_close_runs(two / "ppo", four / "resumed/ppo")


@pytest.mark.slow
def test_resumed_on_two_processes_instead_of_four(two, resumed):
    assert_close_runs(two / "ppo", resumed / "four/ppo")


@pytest.mark.slow
def test_resumed_from_a_checkpoint_of_ddp(two, resumed):
    assert_close_runs(two / "ppo", resumed / "ddp/ppo")


@pytest.mark.slow
def test_resumed_in_one_process(two, tmp_path):
    """Its config says fsdp, but there is nothing to shard."""
    shutil.copytree(two / "ppo_killed", tmp_path / "ppo")
    arguments = ["--output_dir", str(tmp_path / "ppo"), "--resume"]
    cli.run(train_ppo.Config, train_ppo.main, arguments)
    assert_close_runs(two / "ppo", tmp_path / "ppo")


@pytest.mark.slow
def test_a_checkpoint_in_shards(two):
    """One file a process, about half of the whole in each, and what each shard's place is."""
    folder = two / "ppo_killed/checkpoint/step_1"
    *shards, state = names_in(folder)
    assert state == "state.json"
    prefixes = [name.split("-")[:2] for name in shards]
    assert prefixes == [["shard", "00001"], ["shard", "00002"]]

    sizes = [(folder / name).stat().st_size for name in shards]
    assert max(sizes) < 1.15 * sum(sizes) / 2
    with safe_open(folder / shards[0], "pt") as f:
        assert json.loads(f.metadata()["DCP_SHARDING_INFO"])


# --------------------------------------------------------------------------------- models in shards

LLAMA = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    vocab_size=50,
    max_position_embeddings=64,
)
# Its embeddings are tied.
GPT2 = GPT2Config(
    n_embd=32,
    n_layer=3,
    n_head=2,
    vocab_size=50,
    n_positions=64,
    bos_token_id=0,
    eos_token_id=0,
)
BATCH = pack(
    [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], [[11, 12], [13, 14, 15], [16], [17, 18, 19, 20]]
)


def tiny(config=LLAMA):
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(copy.deepcopy(config))).eval()
    for p in policy.value_head.parameters():
        nn.init.normal_(p, std=0.1)
    return policy


def total(policy, batch=BATCH):
    """A loss that all weights have a part in, summed over tokens."""
    out = policy(batch, response_mask_of(batch))
    return (out["logprobs"] + out["values"] ** 2).sum() / 10


def step(policy, optimizer, batch, world=1):
    """One optimizer step -> the gradient's norm. world: the ranks' gradients are averaged."""
    loss = world * total(policy, batch)
    loss.backward()
    return optimizer_step(optimizer, policy, 1e-2, 1e-3, 1)


def own_rows(dist):
    """This process's rows of the batch."""
    rows = list(dist.part(len(BATCH)))
    return BATCH.rows(torch.tensor(rows))


def parameter_bytes(policy):
    return local_bytes(policy)["parameters"]


def freeze_parts(policy):
    """Freeze the attention, so that units have frozen and trained weights, as with adapters.

    The embeddings and the whole first block are frozen too: a unit without anything to train.
    """
    policy.lm.base_model.get_input_embeddings().requires_grad_(False)
    for name, p in policy.named_parameters():
        if "attn" in name:
            p.requires_grad_(False)
    fsdp.all_blocks(policy)[0].requires_grad_(False)


def check_shards(folder, config):
    """On two processes: one model in shards against itself whole."""
    dist = distributed.setup("cpu", "fsdp")
    assert dist.sharded
    plain = tiny(config)
    policy = tiny(config)
    freeze_parts(plain)
    freeze_parts(policy)
    assert dist.wrap(policy, total) is policy
    assert fsdp.is_sharded(policy)
    assert not fsdp.is_sharded(plain)
    assert [name for name, _ in trainable(policy)] == [name for name, _ in trainable(plain)]
    optimizer = adamw(policy, 1e-2, BETAS, 0.1)

    check_training(plain, policy, optimizer, dist)
    check_gathered(plain, policy, dist)
    # After it everything is in shards again, and training goes on.
    step(policy, optimizer, own_rows(dist), dist.world)
    check_whole(policy, folder, dist)
    step(policy, optimizer, own_rows(dist), dist.world)


def check_training(plain, policy, optimizer, dist):
    """Three steps of both models give the same norms and weights."""
    plain_optimizer = adamw(plain, 1e-2, BETAS, 0.1)
    for _ in range(3):
        plain_norm = step(plain, plain_optimizer, BATCH)
        norm = step(policy, optimizer, own_rows(dist), dist.world)
        assert plain_norm == pytest.approx(norm, rel=1e-4)
        # It is clipped to 1e-3.
        assert plain_norm > 1e-3
        norms = dist.gather(torch.tensor([norm]))
        assert len(set(norms.tolist())) == 1

    for (name, p), q in zip(plain.named_parameters(), policy.parameters(), strict=True):
        q_whole = q.detach().full_tensor()
        torch.testing.assert_close(p.detach(), q_whole, rtol=0, atol=1e-5, msg=name)
        assert q.requires_grad or q.grad is None
    assert parameter_bytes(policy) < 0.6 * parameter_bytes(plain)


def check_gathered(plain, policy, dist):
    """Rollouts and forward passes inside gathered(), as often and as long as each process likes."""
    in_shards = parameter_bytes(policy)
    ids, mask = left_pad([[1, 2, 3], [1, 2, 3], [4, 5]], 0)  # two answers to the first prompt
    length = 6 + 3 * dist.rank
    sampling = {"eos_token_id": None, "pad_token_id": 0, "seed": 1, "step": 2}
    with fsdp.gathered(policy):
        assert parameter_bytes(policy) == parameter_bytes(plain)
        for _ in range(1 + 2 * dist.rank):
            expected = generate(plain, ids, mask, length, **sampling)
            found = generate(policy, ids, mask, length, **sampling)
            assert found.response_ids.equal(expected.response_ids)
            torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(total(plain), total(policy), rtol=1e-4, atol=1e-5)
    assert parameter_bytes(policy) == in_shards


def check_whole(policy, folder, dist):
    """For saving it is whole on the main process, tied where it was tied; the shards come back."""
    before = [p.to_local().clone() for p in policy.parameters()]
    with fsdp.whole(policy, dist.main):
        if dist.main:
            policy.lm.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder)
            for p, q in zip(again.parameters(), policy.lm.parameters(), strict=True):
                assert p.equal(q)
            tensors = load_file(Path(folder) / "model.safetensors")
            assert len(tensors) == len(list(policy.lm.parameters()))
        else:
            for p in policy.parameters():
                assert p.numel() == 0
    for p, old in zip(policy.parameters(), before, strict=True):
        assert p.to_local().equal(old)


def bytes_in_training(folder, dist, wrap):
    """What a process holds of parameters, gradients and optimizer, in the middle of training."""
    torch.manual_seed(0)
    policy = load_policy(f"{folder}/sft")
    model = policy
    if wrap:
        model = dist.wrap(policy, total)
    optimizer = adamw(policy, 1e-3, BETAS, 0.0)
    step(model, optimizer, BATCH)
    total(model).backward()
    return local_bytes(policy, optimizer)


def check_memory(folder):
    """A process holds its share of a fully trained model, of its gradients and Adam's moments."""
    dist = distributed.setup("cpu", "fsdp")
    plain = bytes_in_training(folder, dist, wrap=False)
    sharded = bytes_in_training(folder, dist, wrap=True)

    assert plain["gradients"] == plain["parameters"]
    # Adam has two moments of each weight.
    assert plain["parameters"] == pytest.approx(plain["optimizer"] / 2, rel=1e-3)
    for part, size in plain.items():
        assert sharded[part] == pytest.approx(size / dist.world, rel=0.15), part
    plain_total = sum(plain.values())
    assert sum(sharded.values()) == pytest.approx(plain_total / dist.world, rel=0.15)


def check_bfloat16(folder):
    """Weights are gathered in bfloat16; shards, heads and optimizer are in float32."""
    dist = distributed.setup("cpu", "fsdp")
    plain = tiny()
    policy = tiny()
    model = dist.wrap(policy, total, "bfloat16")
    optimizer = adamw(policy, 1e-3, BETAS, 0.0)
    with fsdp.gathered(policy), torch.no_grad():
        assert policy.lm.lm_head.weight.dtype == torch.bfloat16
        assert policy.value_head.weight.dtype == torch.float32
        with distributed.autocast(dist, "bfloat16"):
            assert total(policy).item() == pytest.approx(total(plain).item(), rel=0.02)

    with distributed.autocast(dist, "bfloat16"):
        step(model, optimizer, own_rows(dist))
    for p in policy.parameters():
        assert p.dtype == torch.float32
    for slots in optimizer.state.values():
        for tensor in slots.values():
            assert tensor.dtype == torch.float32


def odd_settings(base):
    """A separate value model, frozen blocks, and two rewards, one of them of texts.

    The KL is in the loss, by full forward passes of the reference.
    """
    return small(
        base,
        "ppo",
        reward_model=[f"{base}/rm", f"{base}/rewards.py:the"],
        value_model=f"{base}/rm",
        kl_in="loss",
        kl_kind="full",
        freeze_layers=0.5,
        steps=2,
        minibatch_size=8,
    )


def lora_settings(base):
    """The reference is the policy itself, asked inside the policy's forward pass too.

    There are as many micro-batches as each rank's tokens need.
    """
    return small(
        base,
        "ppo",
        reward_model=[f"{base}/rm"],
        lora_rank=2,
        lr=1e-2,
        kl_in="loss",
        kl_kind="full",
        steps=2,
        minibatch_size=8,
        tokens_per_micro_batch=40,
    )


def merge_settings(base):
    return small(base, "sft", model=f"{base}/sft", lora_rank=2, lr=1e-2, merge=True)


def bfloat16_settings(base):
    return small(base, "ppo", reward_model=[f"{base}/rm"], dtype="bfloat16")


@pytest.fixture(scope="module")
def checked(base, work):
    """The checks above, on two processes, and small runs in three folders."""
    folder = work / "checked"
    odd = {**odd_settings(base), **FSDP, "checkpoint_activations": True}
    bfloat16 = {**bfloat16_settings(base), **FSDP}
    lora = {**lora_settings(base), **FSDP}
    merge = {**merge_settings(base), **FSDP}
    for name in ("odd", "bfloat16", "lora"):
        (folder / name).mkdir(parents=True)
    jobs = [
        (check_shards, work / "gpt2", GPT2),
        (check_shards, work / "llama", LLAMA),
        (check_memory, base),
        (check_bfloat16, base),
        (drive, folder / "odd", [("ppo", odd)]),
        (drive, folder / "bfloat16", [("ppo", bfloat16)]),
        (drive, folder / "lora", [("ppo", lora), ("sft", merge)]),
    ]
    join(*ranks(2, do_in_turn, jobs))
    return folder


@pytest.mark.slow
def test_shards_against_the_whole(checked):
    """The fixture's two processes have gone through check_shards(), of GPT-2 and of Llama.

    After them came check_memory() and check_bfloat16().
    """


@pytest.mark.slow
def test_separate_value_model_and_full_kl(base, checked, tmp_path):
    train(base, "ppo", tmp_path / "plain", **odd_settings(base))
    assert_close_runs(tmp_path / "plain", checked / "odd/ppo")


@pytest.mark.slow
def test_lora(base, checked, tmp_path, monkeypatch):
    n_parts = []
    real_even = distributed.Dist.even

    def even(self, parts):
        n_parts.append(len(parts))
        return real_even(self, parts)

    monkeypatch.setattr(distributed.Dist, "even", even)
    train(base, "ppo", tmp_path / "plain", **lora_settings(base))

    # Of both ranks' rows there are several micro-batches; each rank has its own.
    assert max(n_parts) > 2
    assert_close_runs(tmp_path / "plain", checked / "lora/ppo")
    assert names_in(tmp_path / "plain/model") == names_in(checked / "lora/ppo/model")


@pytest.mark.slow
def test_an_adapter_is_merged_from_shards(base, checked, tmp_path):
    train(base, "sft", tmp_path / "plain", **merge_settings(base))
    assert_close_runs(tmp_path / "plain", checked / "lora/sft")
    before = load_file(f"{base}/sft/model/model.safetensors")
    after = load_file(checked / "lora/sft/model/model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not before[name].equal(after[name])]
    assert changed


@pytest.mark.slow
def test_bfloat16_as_with_ddp(base, checked, tmp_path):
    train(base, "ppo", tmp_path / "ddp", **bfloat16_settings(base))
    with_ddp = metrics(tmp_path / "ddp")
    with_fsdp = metrics(checked / "bfloat16/ppo")
    assert with_ddp[0]["eval/kl_k3"] == pytest.approx(with_fsdp[0]["eval/kl_k3"], abs=0.02)
    assert with_ddp[1]["entropy"] == pytest.approx(with_fsdp[1]["entropy"], abs=0.5)
    for row in with_fsdp[1:]:
        assert row["first_ratio_error"] < 1e-2
    saved = load_file(checked / "bfloat16/ppo/model/model.safetensors")
    for name, tensor in saved.items():
        assert tensor.dtype == torch.float32, name


# -------------------------------------------------------------------------------- without processes


def test_the_largest_micro_batches_are_halved_where_another_rank_has_more():
    """Rank 0 has two where the other has four: nothing is lost, and none grows."""
    dist = distributed.Dist(0, 2, torch.device("cpu"), sharded=True)
    dist.gather = lambda counts: torch.cat([counts, torch.tensor([4])])
    parts = dist.even((torch.tensor([5, 1, 2, 7, 3]), torch.tensor([4])))
    assert [part.tolist() for part in parts] == [[5, 1], [2], [7, 3], [4]]


def test_without_shards_the_number_of_micro_batches_is_each_rank_s_own():
    dist = distributed.Dist(0, 2, torch.device("cpu"), sharded=False)
    assert len(dist.even((torch.tensor([5]),))) == 1


def gradients_and_memory(training, recomputes):
    """{name: gradient} of a GPT-2 with frozen blocks, and how many numbers were kept for it."""
    policy = tiny(GPT2).train(training)
    freeze(policy.lm, 0.4)
    if recomputes:
        fsdp.checkpoint_activations(policy)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    def give_back(tensor):
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        loss = total(policy)
    loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    return gradients, sum(kept)


@pytest.mark.parametrize("training", [True, False], ids=["dropout on", "dropout off"])
def test_checkpointed_activations_give_the_same_gradients_from_less_memory(training):
    """The same bit by bit, with dropout's noise too."""
    plain, all_kept = gradients_and_memory(training, recomputes=False)
    again, few_kept = gradients_and_memory(training, recomputes=True)
    assert few_kept < 0.5 * all_kept
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        if gradient is None:
            assert again[name] is None, name
        else:
            assert gradient.equal(again[name]), name


def test_checkpointed_blocks_can_be_copied():
    """A copy has blocks of its own: it computes what it did when those of the original change."""
    policy = tiny()
    fsdp.checkpoint_activations(policy)
    twin = copy.deepcopy(policy)
    nn.init.zeros_(fsdp.all_blocks(policy)[0].mlp.down_proj.weight)

    expected = total(tiny()).item()
    assert total(twin).item() == pytest.approx(expected)
    assert total(policy).item() != pytest.approx(expected)
    # Sampling, with its cache.
    ids, mask = left_pad([[1, 2, 3], [4, 5]], 0)
    found = generate(twin, ids, mask, 6, eos_token_id=None, pad_token_id=0, seed=1)
    plain = generate(tiny(), ids, mask, 6, eos_token_id=None, pad_token_id=0, seed=1)
    assert found.response_ids.equal(plain.response_ids)
    assert found.logprobs.equal(plain.logprobs)


def test_one_process_shards_nothing():
    dist = distributed.setup("cpu", "fsdp")
    policy = tiny()
    assert not dist.sharded
    assert dist.wrap(policy, total) is policy
    assert not fsdp.is_sharded(policy)
    with fsdp.gathered(policy, None), fsdp.whole(policy, True):
        assert local_bytes(policy)["gradients"] == 0


def test_a_checkpoint_of_a_whole_module_comes_back(tmp_path):
    """Its scalars, vectors and matrices are as they were."""
    policy = tiny()
    optimizer = adamw(policy, 1e-2, BETAS, 0.1)
    step(policy, optimizer, BATCH)
    checkpoint.save(str(tmp_path), 1, policy, optimizer, {}, 1)

    again = tiny()
    its_optimizer = adamw(again, 1e-2, BETAS, 0.1)
    assert checkpoint.load(str(tmp_path), again, its_optimizer) == {"step": 1}
    for p, q in zip(policy.parameters(), again.parameters(), strict=True):
        assert p.equal(q)
        slots = optimizer.state[p]
        its_slots = its_optimizer.state[q]
        assert slots.keys() == its_slots.keys()
        for key, tensor in slots.items():
            assert tensor.equal(its_slots[key]), key


def test_a_kind_of_distribution_that_there_is_not():
    with pytest.raises(InputError, match="--distributed must be one of ddp, fsdp"):
        train_ppo.Config(distributed="zero")


def test_members_are_trained_on_one_process_each():
    with pytest.raises(InputError, match="--members trains each on one process"):
        train_rm.Config(members=2, distributed="fsdp")
