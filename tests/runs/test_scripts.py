"""The three training scripts as runs.

What they write, what does not change the result (processes, micro-batches), what every option does.
Most runs are calls of main(Config(...)) on the embedded world; processes are real where they are
the point. Everything runs on one thread, here as in the processes, so that results can be equal bit
for bit.

    B sequences, R response tokens, T = prompt and response, V vocabulary
"""

import contextlib
import io
import json
import math
import os
import runpy
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat_tokenizers import CHAT, CHATML, byte_tokenizer
from safetensors.torch import load_file
from support import (
    SCRIPTS,
    assert_close_runs,
    command_line,
    drive,
    flags,
    forks,
    join,
    metrics,
    ranks,
    read_rows,
    small,
    summary,
    train,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train_ppo
import train_rm
import train_sft
from nanorlhf import evaluation, rollout, stages, world
from nanorlhf import ppo as ppo_maths
from nanorlhf.errors import InputError
from nanorlhf.hf.blocks import speed_up
from nanorlhf.models import load_policy, load_reward_model
from nanorlhf.runtime import cli, distributed
from nanorlhf.runtime.help import help_text
from nanorlhf.scoring import Scoring
from nanorlhf.splits import load_splits

forks.set_forkserver_preload(
    ["test_scripts", "transformers.models.gpt_neox.modeling_gpt_neox", "torch.distributed.fsdp"]
)


def ppo(base, folder, **changes):
    """A tiny run of PPO with these settings. -> the rows of its metrics, step 0 first"""
    return train(base, "ppo", folder, **changes)


def column(rows, name):
    """One field of all rows."""
    return [row[name] for row in rows]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".png")


def model_file(run):
    """The tensors of the model that a run has trained."""
    return load_file(Path(run) / "model/model.safetensors")


def check_equal(tensors, others):
    """Two models are equal bit for bit."""
    assert tensors.keys() == others.keys()
    for name in others:
        assert tensors[name].equal(others[name]), name


def check_first_ratios(rows):
    """Old log-probs are those that the first update finds: every ratio begins at 1."""
    for row in rows[1:]:
        assert row["first_ratio_error"] <= 1e-5


def check_finite(rows):
    for row in rows:
        for name, value in row.items():
            assert math.isfinite(value), name


# ----------------------------------------------------------------------------- the run of train_sft


def test_an_sft_run_leaves_these_files(base):
    names = ["config.json", "metrics.jsonl", "model", "samples.jsonl", "summary.json"]
    assert names_in(base / "sft") == names


def test_the_config_of_a_run_has_given_and_default_settings(base):
    config = json.loads((base / "sft/config.json").read_text())
    assert config["steps"] == 20
    assert config["lr"] == 3e-3
    assert config["dataset"] == "world"


def test_the_loss_of_sft_falls(base):
    rows = metrics(base / "sft")
    assert column(rows, "step") == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_the_summary_has_the_last_evaluation(base):
    last = metrics(base / "sft")[-1]
    assert summary(base / "sft")["eval/perplexity"] == last["eval/perplexity"]


def test_the_samples_of_sft(base):
    samples = read_rows(base / "sft/samples.jsonl")
    assert len(samples) == 4
    assert set(samples[0]) == {"step", "prompt", "response"}
    assert samples[0]["step"] == 20


@torch.no_grad()
def read_response(model, tokenizer, row):
    """A demonstration by plain transformers, alone and without padding.

    -> the logits [R, V] in float64 that predict the response, and the response's ids [R]
    """
    prompt = tokenizer(row["prompt"]).input_ids
    response = tokenizer(row["response"]).input_ids + [tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt + response])).logits[0]
    # Logits at t score token t + 1; those after the last token score nothing.
    return logits[len(prompt) - 1 : -1].double(), torch.tensor(response)


def error_over_rows(totals, lengths, mean):
    """The standard error of a mean over tokens: of what each row has more than the mean says."""
    more = [total - mean * length for total, length in zip(totals, lengths)]
    return statistics.stdev(more) * len(more) ** 0.5 / sum(lengths)


@pytest.mark.parametrize("label", ["eval", "ood"])
def test_perplexity_and_accuracy_by_plain_transformers(base, label):
    folder = base / "sft"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = train_sft.Config(output_dir=str(folder), eval_size=16, eval_splits=["test", "ood"])
    _, held_out, _ = load_splits(config, "sft")

    nlls = []  # of each row, as the two lists that follow
    rights = []
    lengths = []
    for row in held_out[label]:
        logits, response = read_response(model, tokenizer, row)
        logprobs = logits.log_softmax(-1).gather(1, response[:, None])
        nlls.append(-logprobs.sum().item())
        rights.append((logits.argmax(-1) == response).sum().item())
        lengths.append(len(response))
    n_tokens = sum(lengths)
    loss = sum(nlls) / n_tokens
    accuracy = sum(rights) / n_tokens

    found = summary(folder)
    assert list(held_out) == ["eval", "ood"]
    assert len(held_out[label]) == 16
    assert found[f"{label}/n_rows"] == 16
    assert found[f"{label}/n_tokens"] == n_tokens
    assert found[f"{label}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    # One token of difference is allowed, where two logits are all but equal.
    assert found[f"{label}/accuracy"] == pytest.approx(accuracy, abs=1.5 / n_tokens)
    # Errors are over rows, and d exp(loss) = exp(loss) d loss.
    loss_se = error_over_rows(nlls, lengths, loss)
    assert found[f"{label}/perplexity_se"] == pytest.approx(math.exp(loss) * loss_se, rel=1e-3)
    accuracy_se = error_over_rows(rights, lengths, accuracy)
    assert found[f"{label}/accuracy_se"] == pytest.approx(accuracy_se, rel=0.2)


class IdsAsLosses(torch.nn.Module):
    """In the place of a policy: the log-prob of a token is minus its id, times a weight of 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch, mask, correct=False):
        ids = torch.zeros(mask.shape)
        for i, (start, n) in enumerate(zip(batch.prompt_lengths, batch.response_lengths)):
            ids[i, :n] = batch.ids[i, start : start + n].float()
        return {"logprobs": -self.weight * ids * mask, "correct": mask}


@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_the_loss_on_a_chat_is_on_its_assistants_turns(loss_on):
    """In training and in an evaluation: on what the assistant says, and the ends of its turns."""
    tokenizer = byte_tokenizer("<|im_end|>", CHATML)
    rows = [{"prompt": CHAT, "response": "Yes"}, {"prompt": CHAT[:1], "response": "Of a dog!"}]
    turns = ["Yes<|im_end|>", "Of a dog!<|im_end|>"]
    if loss_on == "all":
        turns.append("Of a cat?<|im_end|>")  # an earlier turn of CHAT
    learned = []
    for turn in turns:
        learned += tokenizer(turn, add_special_tokens=False).input_ids
    expected = sum(learned) / len(learned)

    config = train_sft.Config(loss_on=loss_on, micro_batch_size=1)
    dist = distributed.Dist(0, 1, torch.device("cpu"))
    model = IdsAsLosses()
    answers, _ = train_sft.encode_answers(rows, tokenizer, None, config)
    n_tokens = train_sft.count_tokens(answers, [0, 1])
    totals = train_sft.add_gradients(
        model, answers, [0, 1], n_tokens, None, tokenizer, config, dist
    )
    assert totals["loss"].item() == pytest.approx(expected)
    assert model.weight.grad.item() == pytest.approx(expected)

    found = train_sft.evaluate_demonstrations(model, answers[0], tokenizer, config, dist)
    assert found["n_tokens"] == len(learned)
    assert math.log(found["perplexity"]) == pytest.approx(expected)


def test_the_samples_prompts_keep_their_bos(base, monkeypatch):
    """A prompt that is cut for a short context still begins with BOS, where there is one."""
    tokenizer = AutoTokenizer.from_pretrained(base / "sft/model")
    tokenizer.bos_token = "review"
    seen = []
    generate = train_sft.generate

    def record(policy, ids, *args, **kwargs):
        seen.append(ids)
        return generate(policy, ids, *args, **kwargs)

    monkeypatch.setattr(train_sft, "generate", record)
    config = train_sft.Config(output_dir="x", n_samples=1, max_new_tokens=4)
    policy = load_policy(f"{base}/sft", value_head=False)
    dist = distributed.Dist(0, 1, torch.device("cpu"))
    rows = [{"prompt": "review the hotel last week :", "response": "the room"}]
    # A context of 7 has room for 4 new tokens and 3 of the prompt.
    train_sft.sample(policy, rows, tokenizer, 7, config, dist)
    assert tokenizer.batch_decode(seen[0]) == ["review week :"]


@pytest.mark.slow
def test_a_few_samples_are_not_worth_compiling_for(base, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(base / "sft/model")
    policy = load_policy(f"{base}/sft", value_head=False)
    dist = distributed.Dist(0, 1, torch.device("cpu"))
    speed_up(policy.lm, dist.device, "float32", compile=True)
    seen = []
    generate = train_sft.generate

    def record(policy, *args, **kwargs):
        seen.append(policy.lm.compiled)
        return generate(policy, *args, **kwargs)

    monkeypatch.setattr(train_sft, "generate", record)
    config = train_sft.Config(output_dir="x", n_samples=1, max_new_tokens=4)
    train_sft.sample(policy, [{"prompt": "review", "response": "a"}], tokenizer, 0, config, dist)
    assert seen == [False]
    assert policy.lm.compiled


# ------------------------------------------------------------------------------ the run of train_rm


def test_a_reward_models_run_leaves_these_files(base):
    names = set(names_in(base / "rm"))
    assert {"config.json", "metrics.jsonl", "model", "summary.json"} <= names
    assert "checkpoint" not in names


def test_the_loss_of_a_reward_model_begins_at_log_2(base):
    """A new head tells nothing apart: -log sigmoid(0) = log 2."""
    rows = metrics(base / "rm")
    assert column(rows, "step") == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.3)


def test_the_loss_of_pairs_by_hand():
    chosen = torch.tensor([2.0, -1.0])
    rejected = torch.tensor([0.5, 3.0])
    expected = []
    for r_c, r_r in zip(chosen.tolist(), rejected.tolist()):
        preference = math.log(1 + math.exp(r_r - r_c))
        expected.append(preference + 0.2 / 2 * (r_c**2 + r_r**2))
    found = train_rm.pair_losses(chosen, rejected, 0.2)
    assert found.tolist() == pytest.approx(expected)


@pytest.fixture(scope="module")
def rm_scores(base):
    """The held-out pairs of rm/ and their scores by plain transformers, by the split's label.

    {label: pairs [32], texts of the chosen, then of the rejected [64], their scores [64]}
    """
    folder = base / "rm"
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="right")
    config = train_rm.Config(output_dir=str(folder), eval_size=32, eval_splits=["test", "ood"])
    _, splits, _ = load_splits(config, "pairs")
    found = {}
    for label, pairs in splits.items():
        prompts = column(pairs, "prompt") * 2
        responses = column(pairs, "chosen") + column(pairs, "rejected")
        texts = []
        for prompt, response in zip(prompts, responses):
            texts.append(f"{prompt} {response} <eos>")
        # Padded rows too have the scores of plain transformers, since pad is not EOS here.
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[:, 0].double()
        scores = logits - model.config.reward_mean
        golds = world.gold(prompts, responses)
        found[label] = SimpleNamespace(pairs=pairs, scores=scores, golds=golds)
    return found


def test_scores_are_standardised_on_held_out_texts(rm_scores):
    scores = rm_scores["eval"].scores
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert scores.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("label", ["eval", "ood"])
def test_accuracy_and_margin_by_plain_transformers(base, rm_scores, label):
    chosen = rm_scores[label].scores[:32]
    rejected = rm_scores[label].scores[32:]
    n_right = (chosen > rejected).sum().item()
    margins = (chosen - rejected).tolist()

    found = summary(base / "rm")
    assert found["eval/n_pairs"] == 32
    assert found["eval/n_texts"] == 64
    assert found[f"{label}/accuracy"] == pytest.approx(n_right / 32)
    share = n_right / 32
    assert found[f"{label}/accuracy_se"] == pytest.approx((share * (1 - share) / 31) ** 0.5)
    assert found[f"{label}/margin"] == pytest.approx(statistics.mean(margins), abs=1e-3)
    assert found[f"{label}/margin_se"] == pytest.approx(
        statistics.stdev(margins) / 32**0.5, rel=1e-2
    )


@pytest.mark.parametrize("label", ["eval", "ood"])
def test_how_often_the_longer_response_wins_by_a_loop(base, rm_scores, label):
    """Two responses of one length count half for each side."""
    longer = 0.0
    for pair in rm_scores[label].pairs:
        chosen_length = len(pair["chosen"].split())
        rejected_length = len(pair["rejected"].split())
        if chosen_length > rejected_length:
            longer += 1
        elif chosen_length == rejected_length:
            longer += 0.5
    found = summary(base / "rm")
    assert found[f"{label}/longer_wins"] == pytest.approx(longer / 32)
    assert found[f"{label}/shorter_wins"] == pytest.approx(1 - longer / 32)


@pytest.mark.parametrize("label", ["eval", "ood"])
def test_kendalls_tau_to_gold_by_a_loop(base, rm_scores, label):
    """The share of pairs of texts that are in the same order, less that of the others."""
    scores = rm_scores[label].scores.tolist()
    golds = rm_scores[label].golds
    n_pairs = 0
    n_agree = 0
    for i in range(64):
        for j in range(i):
            n_pairs += 1
            n_agree += (scores[i] - scores[j]) * (golds[i] - golds[j]) > 0
    tau = 2 * n_agree / n_pairs - 1

    found = summary(base / "rm")
    assert -1 <= found[f"{label}/gold_kendall_tau"] <= 1
    # There are a few ties, which the loop counts as disagreement.
    assert found[f"{label}/gold_kendall_tau"] == pytest.approx(tau, abs=0.02)
    assert 0 < found[f"{label}/gold_kendall_p"] <= 1


def test_a_model_as_gold_reads_both_answers(base):
    """Its scores are those of an evaluation of it."""
    config = train_rm.Config(output_dir="x", model=f"{base}/sft", gold_model=f"{base}/rm")
    tokenizer = AutoTokenizer.from_pretrained(base / "rm/model")
    dist = distributed.Dist(0, 1, torch.device("cpu"))
    pairs, _ = train_rm.encode_pairs(read_rows(base / "pairs.jsonl")[:6], tokenizer, None, config)
    golds = train_rm.gold_scores({"eval": pairs}, tokenizer, config, dist)
    _, scores = train_rm.evaluate(load_reward_model(f"{base}/rm"), pairs, config, dist)
    torch.testing.assert_close(golds["eval"], scores)


# ----------------------------------------------------------------------------- the run of train_ppo

# What every step of PPO logs.
LOGGED = """
    score_mean score_std reward kl kl_k2 kl_k3 kl_coef entropy ratio_mean ratio_max
    clip_fraction approx_kl policy_loss value_loss explained_variance advantage_mean
    advantage_std grad_norm lr length eos_rate seconds_rollout seconds_score seconds_update
    tokens_per_second peak_memory_mb first_ratio_error
""".split()


@pytest.fixture(scope="module")
def ppo_run(base, tmp_path_factory):
    """Three steps of PPO on the reward model rm/, evaluated on two splits at steps 0, 2 and 3.

    folder; rows, of its metrics; printed; batches: what the evaluations sampled, the first split
    (ood, whose label is eval) and the second (test) in turn
    """
    folder = tmp_path_factory.mktemp("ppo_run") / "ppo"
    batches = []
    roll_out = rollout.roll_out

    def record(policy, prompts, place, step, *rest):
        rollout, answers = roll_out(policy, prompts, place, step, *rest)
        # Only evaluations are sampled as of step 0.
        if step == 0:
            batches.append(answers.batch)
        return rollout, answers

    settings = {"steps": 3, "eval_every": 2, "eval_size": 8, "eval_splits": ["ood", "test"]}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(evaluation, "roll_out", record)
        ppo(base, folder, reward_model=[f"{base}/rm"], **settings)
    rows = read_rows(folder / "metrics.jsonl")
    return SimpleNamespace(folder=folder, rows=rows, printed=printed.getvalue(), batches=batches)


def test_ppo_logs_every_step(ppo_run):
    rows = ppo_run.rows
    assert column(rows, "step") == [0, 1, 2, 3]
    for row in rows[1:]:
        assert set(LOGGED) <= set(row)
    check_finite(rows[1:])


def test_what_ppo_logs_is_within_its_bounds(ppo_run):
    check_first_ratios(ppo_run.rows)
    for row in ppo_run.rows[1:]:
        # The policy does move.
        assert row["approx_kl"] > 1e-5
        assert row["ratio_max"] >= 1
        assert 0 < row["entropy"] < math.log(len(world.vocabulary()))
        assert 1 <= row["length"] <= 12


def test_ppo_starts_at_the_reference(ppo_run):
    _, first, _, third = ppo_run.rows
    assert abs(first["kl"]) < 1e-4
    assert abs(first["explained_variance"]) < 1e-6
    assert third["kl_k3"] > 1e-3


def test_ppo_measures_memory_and_speed(ppo_run):
    assert ppo_run.rows[1]["peak_memory_mb"] > 50
    assert ppo_run.rows[1]["tokens_per_second"] > 1


# The label in the metrics, the split of the embedded world, and the folder of its answers.
EVALUATED = [("eval", "ood", "eval"), ("test", "test", "eval_test")]


@pytest.mark.parametrize("label, split, answers_in", EVALUATED)
def test_evaluations_are_of_the_answers_in_their_files(ppo_run, label, split, answers_in):
    folder = ppo_run.folder / answers_in
    assert names_in(folder) == ["step_0.jsonl", "step_2.jsonl", "step_3.jsonl"]
    for step in (0, 2, 3):
        answers = read_rows(folder / f"step_{step}.jsonl")
        assert len(answers) == 8
        for row in answers:
            assert set(row) == {
                "prompt",
                "response",
                "scores",
                "gold",
                "prompt_ids",
                "response_ids",
                "tokens",  # of the first eight answers
            }
            numbers = row["tokens"]["logprob"]
            assert len(numbers) == len(row["response_ids"])
        prompts = column(answers, "prompt")
        assert set(prompts) <= set(column(world.prompts(split), "prompt"))

        golds = world.gold(prompts, column(answers, "response"))
        assert column(answers, "gold") == pytest.approx(golds, abs=1e-5)
        scores = column(answers, "scores")
        proxies = torch.tensor(column(scores, "rm"), dtype=torch.float64)
        logged = ppo_run.rows[step]
        assert logged[f"{label}/proxy"] == pytest.approx(proxies.mean().item())
        # The standard error of a mean over 8 prompts.
        assert logged[f"{label}/proxy_se"] == pytest.approx(proxies.std().item() / 8**0.5)
        assert logged[f"{label}/gold"] == pytest.approx(sum(golds) / 8, abs=1e-5)
        assert logged[f"{label}/gold_n"] == 8


def test_samples_are_the_first_answers_of_each_evaluation(ppo_run):
    samples = read_rows(ppo_run.folder / "samples.jsonl")
    assert column(samples, "step") == [0] * 3 + [2] * 3 + [3] * 3
    answers = read_rows(ppo_run.folder / "eval/step_3.jsonl")
    assert samples[-1]["response"] == answers[2]["response"]
    assert samples[0]["response"] in ppo_run.printed


def row_ids(batch, i):
    """Prompt and response of row i, without padding: [1, T]."""
    return batch.ids[i : i + 1, : int(batch.lengths[i])]


def test_the_reward_models_scores_by_plain_transformers(base, ppo_run):
    """One answer at a time, those of the last evaluation's first split."""
    model = AutoModelForSequenceClassification.from_pretrained(base / "rm/model")
    answers = read_rows(ppo_run.folder / "eval/step_3.jsonl")
    for i, row in enumerate(answers):
        ids = row_ids(ppo_run.batches[-2], i)
        # Plain transformers read the score at the last token that is not padding.
        if ids[0, -1] == model.config.pad_token_id:
            continue
        with torch.no_grad():
            score = model(ids).logits[0, 0].item() - model.config.reward_mean
        assert row["scores"]["rm"] == pytest.approx(score, abs=1e-4)


def test_the_summary_of_ppo_has_gold_before_and_after(ppo_run):
    found = summary(ppo_run.folder)
    first = ppo_run.rows[0]
    last = ppo_run.rows[3]
    assert found["steps"] == 3
    assert found["after"]["gold"] == last["eval/gold"]
    assert found["before"]["gold"] == first["eval/gold"]
    assert found["before"]["test/gold"] == first["test/gold"]
    assert f"test/gold  {first['test/gold']:6.2f}" in ppo_run.printed


def test_plain_transformers_generate_with_the_saved_policy(ppo_run):
    policy = AutoModelForCausalLM.from_pretrained(ppo_run.folder / "model")
    ids = policy.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    assert ids.shape == (1, 4)
    value_head = load_file(ppo_run.folder / "model/value_head.safetensors")
    assert value_head["weight"].abs().sum() > 0


def test_ppo_draws_its_curves(base, tmp_path, pictures):
    ppo(base, tmp_path, steps=1)
    path = tmp_path / "curves.png"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not path.exists()
        return
    picture = path.read_bytes()
    # A PNG's first eight bytes, and the chunk that ends a whole one.
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture[-8:-4] == b"IEND"
    assert len(picture) > 10_000


# --------------------------------------------------------------------------- what a run starts from


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """An empty machine, whose train_sft.py and train_rm.py only record their settings."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def record_sft(config):
        calls.append(("sft", config.output_dir, config.model, config.dataset, config.steps))

    def record_rm(config):
        calls.append(("rm", config.output_dir, config.model, config.dataset, config.steps))

    monkeypatch.setattr(train_sft, "main", record_sft)
    monkeypatch.setattr(train_rm, "main", record_rm)
    return calls


def train_before_ppo(**settings):
    """What train_ppo.py does before it loads anything."""
    stages.train_what_is_missing(train_ppo.Config(**settings), "model", "reward_model")


# (script, output_dir, model, dataset, steps): the defaults of the scripts.
DEFAULT_SFT = ("sft", "runs/sft", "world", "world", 400)
DEFAULT_RM = ("rm", "runs/rm/seed_0", "runs/sft", "world", 100)


def test_no_arguments_trains_what_is_missing(trained):
    """Each by its own script and that script's defaults, in order."""
    train_before_ppo()
    assert trained == [DEFAULT_SFT, DEFAULT_RM]


def test_what_is_missing_is_trained_on_the_runs_device(trained, monkeypatch):
    devices = []
    for script in (train_sft, train_rm):
        monkeypatch.setattr(script, "main", lambda config: devices.append(config.device))
    train_before_ppo(device="cpu")
    assert devices == ["cpu", "cpu"]


def test_a_reward_model_trains_its_sft_model(trained):
    stages.train_what_is_missing(train_rm.Config(), "model")
    assert trained == [DEFAULT_SFT]


def test_a_missing_reward_model_is_trained_on_the_runs_world(trained):
    train_before_ppo(model="mine", dataset="world:3")
    assert trained == [("rm", "runs/rm/seed_0", "runs/sft", "world:3", 100)]


def test_a_model_and_a_reward_of_ones_own_need_no_training(trained):
    train_before_ppo(model="mine", reward_model=["mine.py:f"])
    assert trained == []


def test_for_data_of_ones_own_nothing_is_trained(trained):
    train_before_ppo(dataset="mine.jsonl")
    assert trained == []


@pytest.mark.slow
def test_a_reward_model_on_an_empty_machine(tmp_path, monkeypatch):
    """python train_rm.py trains runs/sft first; members on one process do so once."""
    monkeypatch.chdir(tmp_path)
    main = train_sft.main
    calls = []

    def train_one_step(config):
        calls.append(config.output_dir)
        return main(train_sft.Config(steps=1, batch_size=4, eval_size=4))

    monkeypatch.setattr(train_sft, "main", train_one_step)
    train_rm.main(train_rm.Config(members=2, steps=1, batch_size=2, eval_size=8))
    assert calls == ["runs/sft"]
    assert sorted(os.listdir("runs/rm")) == ["seed_0", "seed_1"]


def put_run(folder, config, finished, **more):
    """A run folder with this Config's settings, and no more in it than what is read of it."""
    Path(folder).mkdir(parents=True)
    settings = {**vars(config), **more}
    (Path(folder) / "config.json").write_text(json.dumps(settings))
    if finished:
        (Path(folder) / "summary.json").write_text("{}")


USED = "is done already and used as it is"


def test_a_finished_run_in_a_default_folder_is_used_as_it_is(trained, capsys):
    """Its settings that are not the default ones are said, but for where it ran and how."""
    sft_config = train_sft.Config(steps=33, lr=0.001, output_dir="elsewhere", device="cuda")
    put_run("runs/sft", sft_config, finished=True)
    rm_config = train_rm.Config(label_noise=0.25, micro_batch_size=2)
    put_run("runs/rm/seed_0", rm_config, finished=True)

    train_before_ppo()
    of_sft, of_rm = capsys.readouterr().out.splitlines()
    assert trained == []
    assert of_sft.startswith(f"runs/sft {USED}")
    assert of_sft.endswith(": steps 33, lr 0.001")
    assert of_rm.startswith(f"runs/rm/seed_0 {USED}")
    assert of_rm.endswith(": label_noise 0.25")


def test_a_reward_model_of_another_sft_policy_is_used_and_said_to_be(trained, capsys):
    put_run("runs/sft", train_sft.Config(steps=33), finished=True)
    Path("runs/sft/model").mkdir()
    Path("runs/sft/model/config.json").write_text("{}")
    inputs = {"runs/sft/model": {"digest": "of another policy", "size": 1, "mtime": 1}}
    put_run("runs/rm/seed_0", train_rm.Config(), finished=True, inputs=inputs)

    train_before_ppo()
    _, of_rm = capsys.readouterr().out.splitlines()
    assert trained == []
    assert of_rm == f"runs/rm/seed_0 {USED}: runs/sft/model has changed since"


def test_an_unfinished_run_with_other_settings_is_an_error_that_names_the_way_on(trained):
    put_run("runs/sft", train_sft.Config(), finished=True)
    put_run("runs/rm/seed_0", train_rm.Config(label_noise=0.25), finished=False)
    place = "runs/rm/seed_0.*not finished"
    way_on = "--resume --output_dir runs/rm/seed_0"
    with pytest.raises(InputError, match=f"{place}.*label_noise 0.25.*{way_on}"):
        train_before_ppo()


def test_an_unfinished_run_with_the_default_settings_is_gone_on_with(trained):
    put_run("runs/sft", train_sft.Config(), finished=False)
    train_before_ppo()
    assert [name for name, *_ in trained] == ["sft", "rm"]


NO_CONFIGS = ["[]", '"steps"', "7", "null", "{", "[" * 100_000]
WRONG_TYPES = [
    '{"steps": [4]}',
    '{"betas": 3}',
    '{"betas": ["a"]}',
    '{"lr": "1"}',
    '{"steps": 4.5}',
    '{"steps": true}',
    '{"resume": 1}',
    '{"model": null}',
]
# Without --resume a setting of another type is just another setting.
DAMAGED_CONFIGS = (
    [(content, ["--resume"]) for content in NO_CONFIGS + WRONG_TYPES]
    + [(content, ["--lr", "1e-3"]) for content in NO_CONFIGS]
)  # fmt: skip


@pytest.mark.parametrize("content, args", DAMAGED_CONFIGS, ids=lambda value: str(value)[:20])
def test_a_damaged_config_of_a_run(tmp_path, capsys, content, args):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        cli.run(train_ppo.Config, train_ppo.main, ["--output_dir", str(tmp_path), *args])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert len(error.splitlines()) == 1
    assert "config.json" in error


# ------------------------------------------------------------- the same result, however it is split


def dropout_of(base, where):
    """Settings of a run with dropout: of its model, or of LoRA."""
    if where == "model":
        return {"model": f"{base}/dropout"}
    return {"model": f"{base}/sft", "lora_rank": 2, "lora_dropout": 0.3}


# The first step of LoRA that can tell is the second: an adapter starts as no change at all.
@pytest.mark.slow
@pytest.mark.parametrize("where, step", [("model", 0), ("lora", 1)], ids=["model", "lora"])
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_with_dropout_micro_batches_change_results(base, tmp_path, kind, where, step):
    """As the help says. PPO's do not: test_ppo_has_no_dropout_that_micro_batches_could_change."""
    settings = {"steps": 2, "lr": 1e-2, **dropout_of(base, where)}
    whole = train(base, kind, tmp_path / "8", micro_batch_size=8, **settings)
    parts = train(base, kind, tmp_path / "3", micro_batch_size=3, **settings)
    assert abs(whole[step]["loss"] - parts[step]["loss"]) > 1e-3


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_the_help_says_that_with_dropout_micro_batches_change_results(capsys, kind):
    with pytest.raises(SystemExit):
        cli.run(SCRIPTS[kind].Config, SCRIPTS[kind].main, ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for flag in ("--micro_batch_size", "--tokens_per_micro_batch"):
        _, _, from_flag_on = words.rpartition(f"{flag} ")
        shown, _, _ = from_flag_on.partition(" (default")
        assert "dropout" in shown
        assert "results too" in shown


@pytest.mark.slow
@pytest.mark.parametrize("where", ["model", "lora"])
def test_ppo_has_no_dropout_that_micro_batches_could_change(base, tmp_path, where):
    for size in (8, 3):
        ppo(base, tmp_path / f"{size}", micro_batch_size=size, **dropout_of(base, where))
    assert_close_runs(tmp_path / "8", tmp_path / "3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_fewer_held_out_rows_than_processes(base, tmp_path, kind):
    settings = small(base, kind, eval_size=1, steps=1)
    if kind == "sft":
        settings["max_new_tokens"] = 4
    join(*ranks(2, drive, tmp_path, [(kind, settings)], STDERR=f"{tmp_path}/stderr"))
    assert (tmp_path / kind / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("gold", ["world:gold", "rewards.py:the", "rm"])
def test_gold_of_fewer_texts_than_processes(base, tmp_path, gold):
    """One held-out pair is two texts: of three processes one has none to score."""
    gold_model = gold if gold == "world:gold" else f"{base}/{gold}"
    settings = small(base, "rm", eval_size=1, steps=1, batch_size=6, gold_model=gold_model)
    join(*ranks(3, drive, tmp_path, [("rm", settings)], STDERR=f"{tmp_path}/stderr"))
    found = summary(tmp_path / "rm")
    assert found["eval/n_texts"] == 2
    assert "eval/gold_kendall_tau" in found


@pytest.mark.slow
def test_an_error_on_one_rank_only(base, tmp_path):
    """Both processes end, and the error is said in one line."""
    settings = small(base, "ppo", reward_model=[f"{base}/rewards.py:fails_on_rank_1"])
    args = ["--output_dir", f"{tmp_path}/ppo", *flags(settings)]
    processes = ranks(2, command_line, "ppo", *args, STDERR=f"{tmp_path}/stderr")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 2]
    errors = (tmp_path / "stderr_0").read_text() + (tmp_path / "stderr_1").read_text()
    assert "a text that only rank 1 has" in errors
    assert "Traceback" not in errors


# --------------------------------------------------------------------------- the options of PPO: KL


@pytest.fixture(scope="module")
def plain_run(base, tmp_path_factory):
    """A PPO run with no options, reward `the`: what an option is compared with."""
    folder = tmp_path_factory.mktemp("plain")
    ppo(base, folder)
    return folder


@pytest.fixture(scope="module")
def plain(plain_run):
    """The rows of its metrics."""
    return metrics(plain_run)


@pytest.fixture
def seen(monkeypatch):
    """What goes on inside a PPO run: .steps, a record of each, and .n_updates of the optimizer.

    A step: experience, scores [B], finished [B], and, by plain forwards before its update, kls and
    last_values [B].
    """
    record = SimpleNamespace(steps=[], n_updates=0)
    scores = []
    experience = train_ppo.experience
    read = Scoring.read
    optimizer_step = train_ppo.optimizer_step

    def record_experience(parts, scaler, rollout, answers, kl_coef):
        kls = plain_kls(parts.policy, parts.reference, answers.batch)
        last_values = plain_last_values(parts.policy, answers.batch)
        found, numbers = experience(parts, scaler, rollout, answers, kl_coef)
        step = SimpleNamespace(
            experience=found,
            scores=scores[-1][0],
            finished=rollout.finished,
            kls=kls,
            last_values=last_values,
        )
        record.steps.append(step)
        return found, numbers

    def record_scores(*args):
        readings = read(*args)
        scores.append(readings["member_scores"].T)  # [K, B]
        return readings

    def count_updates(*args):
        record.n_updates += 1
        return optimizer_step(*args)

    monkeypatch.setattr(train_ppo, "experience", record_experience)
    monkeypatch.setattr(Scoring, "read", record_scores)
    monkeypatch.setattr(train_ppo, "optimizer_step", count_updates)
    return record


def plain_logprobs(policy, ids, first):
    """All log-probs of the tokens from position `first` on, by a plain forward: [R, V], float64."""
    logits = policy.lm(ids).logits[0, first - 1 : -1]
    return logits.double().log_softmax(-1)


@torch.no_grad()
def plain_kls(policy, reference, batch):
    """The mean over sequences of each kind of KL, summed over tokens, one row at a time.

    With d = log pi - log ref of the sampled token: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d.
    """
    sums = {"k1": 0.0, "k2": 0.0, "k3": 0.0, "full": 0.0}
    for i in range(len(batch)):
        ids = row_ids(batch, i)
        first = int(batch.prompt_lengths[i])
        logp = plain_logprobs(policy, ids, first)
        ref_logp = plain_logprobs(reference, ids, first)
        sampled = ids[0, first:, None]
        d = (logp - ref_logp).gather(1, sampled)  # [R, 1]
        sums["k1"] += d.sum().item()
        sums["k2"] += (d**2 / 2).sum().item()
        sums["k3"] += ((-d).exp() - 1 + d).sum().item()
        sums["full"] += (logp.exp() * (logp - ref_logp)).sum().item()
    return {kind: total / len(batch) for kind, total in sums.items()}


@torch.no_grad()
def plain_last_values(policy, batch):
    """The value head on the last token of every row, one row at a time: [B]."""
    trunk = policy.value_trunk
    if trunk is None:
        trunk = policy.lm.base_model
    values = []
    for i in range(len(batch)):
        hidden = trunk(row_ids(batch, i)).last_hidden_state[0, -1]
        values.append(policy.value_head(hidden)[0])
    return torch.stack(values)


KL_KINDS = [
    "k1",
    pytest.param("k2", marks=pytest.mark.slow),
    pytest.param("k3", marks=pytest.mark.slow),
    "full",
]


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_in_the_reward(base, tmp_path, seen, kind):
    rows = ppo(base, tmp_path, kl_kind=kind, kl_coef=0.7, lr=2e-3)
    # At step 2 the policy has moved once, and the four kinds can be told apart.
    kls = seen.steps[1].kls
    kinds = {round(kl, 4) for kl in kls.values()}
    assert len(kinds) == 4
    assert kls["full"] > 0.05

    penalty = rows[2]["score_mean"] - rows[2]["reward"]
    assert penalty == pytest.approx(0.7 * kls[kind], rel=1e-3)
    assert rows[2]["kl"] == pytest.approx(kls["k1"], rel=1e-3)
    assert rows[2]["kl_k2"] == pytest.approx(kls["k2"], rel=1e-3)
    assert rows[2]["kl_k3"] == pytest.approx(kls["k3"], rel=1e-3)


GROUPS = {"advantage": "grpo", "group_size": 4}
KL_LOSSES = [
    ("k2", {}),
    pytest.param("full", {}, marks=pytest.mark.slow),
    pytest.param("k3", {}, marks=pytest.mark.slow),
    pytest.param("k2", GROUPS, marks=pytest.mark.slow),
    pytest.param("full", GROUPS, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, advantage", KL_LOSSES)
def test_kl_in_the_loss(base, tmp_path, monkeypatch, kind, advantage):
    """loss = policy + vf_coef value + kl_coef KL, and there is no penalty in the reward."""
    found = []
    expected = []
    loss_of = train_ppo.loss_of

    def record(parts, batch, experience, at, n_tokens, kl_coef):
        loss, stats = loss_of(parts, batch, experience, at, n_tokens, kl_coef)
        kl_term = loss - stats["policy_loss"] - 0.5 * stats.get("value_loss", 0.0)
        found.append(kl_term.item())
        # plain_kls is a mean over sequences, and the loss one over the tokens of all processes.
        kl = plain_kls(parts.policy, parts.reference, batch)[kind]
        expected.append(3.0 * kl * len(batch) / n_tokens.item())
        return loss, stats

    monkeypatch.setattr(train_ppo, "loss_of", record)
    rows = ppo(base, tmp_path, kl_in="loss", kl_kind=kind, kl_coef=3.0, lr=2e-3, **advantage)
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=0, abs=1e-4)
    assert max(expected) > 0.05
    for row in rows[1:]:
        assert row["reward"] == pytest.approx(row["score_mean"], rel=1e-5)
    check_first_ratios(rows[:2])


@pytest.fixture
def square_kl(monkeypatch):
    """One line more in ppo.py's table: x^2, which is twice k2."""
    monkeypatch.setitem(ppo_maths.KL_ESTIMATES, "square", torch.square)
    # Config as a new process reads it.
    config_class = runpy.run_path(train_ppo.__file__)["Config"]
    monkeypatch.setattr(train_ppo, "Config", config_class)


def test_the_flag_and_its_help_know_a_further_kl_kind(square_kl):
    text = help_text("train_ppo.py", "", train_ppo.Config)
    assert "--kl_kind {k1,k2,k3,square,full}" in text


def test_a_further_kl_kind_in_the_reward(square_kl, base, tmp_path, seen):
    rows = ppo(base, tmp_path, kl_kind="square", kl_coef=0.35, lr=2e-3)
    kls = seen.steps[1].kls
    penalty = rows[2]["score_mean"] - rows[2]["reward"]
    assert penalty == pytest.approx(0.35 * 2 * kls["k2"], rel=1e-3)
    assert rows[2]["kl_square"] == pytest.approx(2 * kls["k2"], rel=1e-3)


@pytest.mark.slow
def test_a_further_kl_kind_in_the_loss(square_kl, base, tmp_path):
    """At half its coefficient it is k2, bit for bit: a factor of 2 rounds nothing."""
    ppo(base, tmp_path / "square", kl_in="loss", kl_kind="square", kl_coef=1.5, lr=2e-3)
    ppo(base, tmp_path / "k2", kl_in="loss", kl_kind="k2", kl_coef=3.0, lr=2e-3)
    check_equal(weights(tmp_path / "square"), weights(tmp_path / "k2"))


def test_what_a_further_kl_kind_may_be_used_for_stands_beside_it(square_kl, monkeypatch):
    monkeypatch.setattr(ppo_maths, "KL_WITHOUT_GRADIENT", ("k1", "square"))
    with pytest.raises(InputError, match="--kl_in loss: square's gradient"):
        train_ppo.Config(kl_in="loss", kl_kind="square")


def test_adaptive_kl(base, tmp_path):
    """Ziegler et al. 2019, section 2.2, with n = 8 episodes a step:

    coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)
    """
    settings = {"kl_coef": 0.5, "kl_target": 0.5, "kl_horizon": 80}
    rows = ppo(base, tmp_path, steps=3, lr=2e-3, **settings)
    coefs = [0.5]
    for row in rows[1:]:
        assert row["kl_coef"] == pytest.approx(coefs[-1])
        # The reward pays this step's price.
        penalty = row["score_mean"] - row["reward"]
        assert penalty == pytest.approx(coefs[-1] * row["kl"], rel=1e-3, abs=1e-5)
        error = row["kl"] / 0.5 - 1
        error = min(max(error, -0.2), 0.2)
        coefs.append(coefs[-1] * (1 + error * 8 / 80))
    # At first the KL is 0, which is far below the target.
    assert coefs[1] == pytest.approx(0.5 * 0.98)
    assert len(set(coefs)) == 4


# Three epochs are six updates. The target is looked at after each epoch.
TARGETS = [
    pytest.param(0.0, 6, marks=pytest.mark.slow),
    (1e-9, 2),
    pytest.param(1e9, 6, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("target, n_updates", TARGETS)
def test_target_kl_ends_the_epochs(base, tmp_path, seen, target, n_updates):
    ppo(base, tmp_path, steps=1, ppo_epochs=3, target_kl=target)
    assert seen.n_updates == n_updates


# ----------------------------------------------------------------------- the options of PPO: scores


# With a scale the scores are 7 / sqrt(42) = 1.08 and -1.08, which a clip of 1 cuts.
CLIPS = [("none", 1.5, -0.75), ("first", 1.0, -0.5)]


@pytest.mark.parametrize("scaling, clip, mean", CLIPS)
def test_score_clip(base, tmp_path, scaling, clip, mean):
    """Of eight answers two have the score 7, and six have -7: scaled first, and clipped then."""
    file = tmp_path / "signs.py"
    code = "def signs(prompts, responses): return [7.0] * 2 + [-7.0] * (len(responses) - 2)"
    file.write_text(code)
    rows = ppo(
        base,
        tmp_path / "run",
        reward_model=[f"{file}:signs"],
        score_scaling=scaling,
        score_clip=clip,
        kl_coef=0.0,
    )
    assert column(rows[1:], "score_mean") == [-3.5, -3.5]
    assert column(rows[1:], "reward") == [mean, mean]


@pytest.mark.parametrize("kind", ["running", pytest.param("first", marks=pytest.mark.slow)])
def test_score_scaling(base, tmp_path, seen, kind):
    """Scores are divided by the standard deviation of all scores so far, or of the first ones."""
    rows = ppo(base, tmp_path, score_scaling=kind, kl_coef=0.0)
    first = seen.steps[0].scores.double()
    second = seen.steps[1].scores.double()
    std = first.std()
    if kind == "running":
        std = torch.cat([first, second]).std()
    assert rows[1]["reward"] == pytest.approx((first.mean() / first.std()).item(), rel=1e-5)
    assert rows[2]["reward"] == pytest.approx((second.mean() / std).item(), rel=1e-5)


def shaped_scores(step, eos_required=False, missing_eos_penalty=0.0, length_penalty=0.0):
    """The scores of a step as the three flags shape them, one response at a time."""
    lengths = step.experience.mask.sum(1)
    shaped = []
    for score, finished, length in zip(step.scores, step.finished, lengths):
        if not finished:
            if eos_required:
                score = 0.0
            score = score - missing_eos_penalty
        shaped.append(score - length_penalty * length)
    return shaped


ENDINGS = [
    pytest.param({"missing_eos_penalty": 3.0}, marks=pytest.mark.slow),
    pytest.param({"eos_required": True}, marks=pytest.mark.slow),
    {"eos_required": True, "missing_eos_penalty": 3.0},
    {"length_penalty": 0.25},
]


@pytest.mark.parametrize("options", ENDINGS, ids=" ".join)
def test_endings_and_lengths(base, tmp_path, seen, options):
    rows = ppo(base, tmp_path, kl_coef=0.0, steps=1, **options)
    expected = sum(shaped_scores(seen.steps[0], **options)) / 8
    # Some responses are cut off, and the flags do change the reward.
    assert 0 < rows[1]["eos_rate"] < 1
    assert abs(rows[1]["reward"] - rows[1]["score_mean"]) > 0.05
    assert rows[1]["reward"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("bootstrap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bootstrap_truncated(base, tmp_path, seen, bootstrap):
    """With gamma = lambda = 1 and no KL every token's return is the score.

    Where the response was cut off, the value after its end is added to it.
    """
    settings = {"lam": 1.0, "kl_coef": 0.0, "lr": 3e-3, "micro_batch_size": 3}
    ppo(base, tmp_path, bootstrap_truncated=bootstrap, **settings)
    # At the first rollout every value is 0: this is the second.
    step = seen.steps[1]
    is_cut = ~step.finished
    assert 0 < is_cut.sum() < 8
    assert step.last_values.abs().min() > 1e-3

    expected = step.scores  # [B]
    if bootstrap:
        expected = expected + step.last_values * is_cut
    expected = expected[:, None] * step.experience.mask  # [B, R]
    torch.testing.assert_close(step.experience.returns, expected, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------- the options of PPO: loss and models


@pytest.mark.slow
def test_entropy_bonus(base, tmp_path):
    rows = ppo(base, tmp_path / "with", ent_coef=5.0, steps=3, lr=2e-3)
    without = ppo(base, tmp_path / "without", ent_coef=0.0, steps=3, lr=2e-3)
    assert rows[1]["entropy"] == without[1]["entropy"]
    assert rows[3]["entropy"] > without[3]["entropy"] + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"kl_kind": "full", "kl_in": "loss"}], ids=["k1", "full"])
def test_entropy_bonus_at_a_low_temperature(base, tmp_path, settings):
    """Most probabilities are too small for float32, and a run goes on."""
    rows = ppo(base, tmp_path, ent_coef=0.01, temperature=0.02, **settings)
    assert len(rows) == 3
    check_finite(rows)


@pytest.mark.parametrize("source", ["sft", pytest.param("rm", marks=pytest.mark.slow)])
def test_value_model(base, tmp_path, seen, source):
    """The critic starts from `source`, is trained, and is saved beside the policy."""
    settings = {"value_model": f"{base}/{source}", "lr": 1e-3, "bootstrap_truncated": True}
    rows = ppo(base, tmp_path, **settings)
    check_first_ratios(rows[:2])
    assert rows[1]["explained_variance"] == 0

    saved = load_file(tmp_path / "model/value_model/model.safetensors")
    start = {}
    for name, tensor in model_file(base / source).items():
        start[name.removeprefix("gpt_neox.")] = tensor
    n_moved = 0
    for name in saved:
        n_moved += not saved[name].equal(start[name])
        # Adam moves a weight by at most the learning rate an update: 2 steps of 2 x 2 updates.
        assert (saved[name] - start[name]).abs().max() < 8 * 1e-3 + 1e-6
    assert n_moved > len(saved) / 2

    policy = load_policy(str(tmp_path))
    for name, tensor in policy.value_trunk.state_dict().items():
        assert tensor.equal(saved[name])
    # Its values at step 2 are not those of a new head, 0.
    assert seen.steps[1].experience.values.abs().max() > 1e-3


def names_with(names, parts):
    """Those of the names that hold one of the parts."""
    return [name for name in names if any(part in name for part in parts)]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_freeze_layers(base, tmp_path, kind):
    """Half of four blocks, and what lies below them, keep their bits; the rest is trained."""
    train(base, kind, tmp_path, model=f"{base}/sft", freeze_layers=0.5, steps=2)
    before = model_file(base / "sft")
    after = model_file(tmp_path)

    frozen = names_with(before, ["embed_in", "layers.0.", "layers.1."])
    assert len(frozen) == 25
    for name in frozen:
        assert before[name].equal(after[name]), name
    trained = names_with(after, ["layers.2.", "layers.3.", "final_layer_norm"])
    assert len(trained) == 26
    for name in trained:
        assert not before[name].equal(after[name]), name


# Every way in which a reference or a value is asked for.
ASKED_FOR = [
    pytest.param({}, id="plain"),
    pytest.param({"kl_kind": "full"}, id="full KL", marks=pytest.mark.slow),
    pytest.param(
        {"kl_kind": "full", "kl_in": "loss"}, id="full KL in the loss", marks=pytest.mark.slow
    ),
    pytest.param({"bootstrap_truncated": True}, id="bootstrap", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", ASKED_FOR)
def test_a_frozen_trunk_that_runs_once_changes_nothing(base, tmp_path, monkeypatch, settings):
    """Against a run in which every forward goes through all blocks."""

    def never(*args):
        return False

    frozen = {"freeze_layers": 0.5, "steps": 2, "eval_every": 1}
    rows = ppo(base, tmp_path / "shared", **frozen, **settings)
    monkeypatch.setattr("nanorlhf.hf.blocks.FrozenTrunk.same", never)
    ppo(base, tmp_path / "whole", **frozen, **settings)
    assert_close_runs(tmp_path / "shared", tmp_path / "whole")
    check_first_ratios(rows)


@pytest.mark.slow
def test_bfloat16(base, tmp_path, plain):
    rows = ppo(base, tmp_path, dtype="bfloat16", steps=3)
    check_finite(rows)
    assert rows[1]["entropy"] != plain[1]["entropy"]
    assert rows[1]["entropy"] == pytest.approx(plain[1]["entropy"], rel=0.02)
    # Old log-probs come from the same batch forward, not from the decode.
    check_first_ratios(rows)
    for name, tensor in weights(tmp_path).items():
        assert tensor.dtype == torch.float32, name


def test_dropout_is_off(base, tmp_path):
    rows = ppo(base, tmp_path, model=f"{base}/dropout")
    check_first_ratios(rows)
    assert abs(rows[1]["kl"]) < 1e-4


def test_temperature(base, tmp_path, plain):
    rows = ppo(base, tmp_path, temperature=0.5)
    assert rows[1]["entropy"] < plain[1]["entropy"] - 0.3
    # It is in all log-probs alike: those of the sampler, the policy and the reference.
    check_first_ratios(rows)
    assert abs(rows[1]["kl"]) < 1e-4


def test_max_prompt_length(base, tmp_path, plain, plain_run):
    """The left side of a prompt is cut; the log keeps the data's own prompt, and what was read."""
    rows = ppo(base, tmp_path, max_prompt_length=2, gold_model=f"{base}/rewards.py:words")
    cut = read_rows(tmp_path / "eval/step_0.jsonl")
    whole = read_rows(plain_run / "eval/step_0.jsonl")
    for cut_row, whole_row in zip(cut, whole, strict=True):
        assert cut_row["prompt"] == whole_row["prompt"]
        assert cut_row["prompt_ids"] == whole_row["prompt_ids"][-2:]
    assert rows[1]["entropy"] != plain[1]["entropy"]
    check_first_ratios(rows[:2])


def test_the_learning_rate_is_constant_by_default(plain):
    assert column(plain[1:], "lr") == [3e-4, 3e-4]


@pytest.mark.parametrize("kind", ["sft", "rm", "ppo"])
def test_learning_rate_schedule(base, tmp_path, kind):
    """Up to its peak in two steps, then linearly to a quarter of it after the last."""
    schedule = {"lr": 4e-4, "schedule": "linear", "final_lr": 0.25, "warmup": 2}
    rows = train(base, kind, tmp_path, steps=4, **schedule)
    assert column(rows[-4:], "lr") == pytest.approx([2e-4, 4e-4, 4e-4, 2.5e-4])


# ---------------------------------------------------------------- the options of PPO: ones own data


def test_jsonl_prompts_and_a_python_reward(base, tmp_path):
    """Prompts of one's own, the columns renamed; the function sees the texts that are logged."""
    given = []
    for i, row in enumerate(world.prompts("train")[:40]):
        given.append({"question": row["prompt"], "id": i})
    write_rows(tmp_path / "mine.jsonl", given)
    mine = {"dataset": f"{tmp_path}/mine.jsonl", "columns": ["prompt=question"]}
    rows = ppo(base, tmp_path / "run", eval_size=5, **mine)

    answers = read_rows(tmp_path / "run/eval/step_2.jsonl")
    assert len(answers) == 5
    assert set(column(answers, "prompt")) <= set(column(given, "question"))
    for row in answers:
        words = row["response"].split()
        score = words.count("the") - 0.3 * len(words)
        assert row["scores"] == {"rewards.py:the": pytest.approx(score, abs=1e-5)}
        assert row["gold"] is None
    assert "eval/gold" not in rows[0]


@pytest.mark.slow
def test_lexicon_reward(base, tmp_path):
    """The sum of the words' weights / 5; further columns of the file are passed over."""
    (tmp_path / "words.tsv").write_text("the\t2.5\t0.1\textra\nwas\t-1\n\n")
    ppo(base, tmp_path / "run", reward_model=[f"{tmp_path}/words.tsv"], eval_size=8)

    answers = read_rows(tmp_path / "run/eval/step_0.jsonl")
    expected = []
    for response in column(answers, "response"):
        words = response.split()
        expected.append((2.5 * words.count("the") - words.count("was")) / 5)
    scores = column(answers, "scores")
    assert column(scores, "words.tsv") == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 2


def test_a_run_with_the_same_seed_is_the_same(base, tmp_path, plain):
    assert ppo(base, tmp_path) == plain


@pytest.mark.slow
def test_a_run_with_another_seed_is_another(base, tmp_path, plain):
    other = ppo(base, tmp_path, seed=1)
    for row, plain_row in zip(other[1:], plain[1:], strict=True):
        assert row["score_mean"] != plain_row["score_mean"]


# ------------------------------------------------------------------ the options of the reward model


@pytest.fixture(scope="module")
def first_rm_step(base, tmp_path_factory):
    """A function: options of train_rm.py -> the metrics of its first step, before any update."""
    folder = tmp_path_factory.mktemp("rm_options")

    def run(**options):
        rows = train(base, "rm", folder / str(options), **options)
        return rows[0]

    return run


@pytest.fixture(scope="module")
def clean(first_rm_step):
    return first_rm_step()


def test_noise_on_all_labels_turns_the_margin_round(first_rm_step, clean):
    flipped = first_rm_step(label_noise=1.0)
    assert clean["margin"] == pytest.approx(-flipped["margin"], rel=1e-4)
    assert abs(clean["margin"]) > 1e-3


@pytest.mark.slow
def test_noise_on_half_of_the_labels_depends_on_its_seed(first_rm_step, clean):
    half = first_rm_step(label_noise=0.5)
    other_half = first_rm_step(label_noise=0.5, noise_seed=1)
    assert abs(half["margin"]) != pytest.approx(abs(clean["margin"]), rel=1e-3)
    assert half["margin"] != pytest.approx(other_half["margin"], rel=1e-3)


def exchange_labels(rows, share, seed):
    """Chosen and rejected exchanged, row by row: label noise by a loop."""
    draws = np.random.default_rng([5, seed]).random(len(rows))
    noisy = []
    for row, draw in zip(rows, draws):
        if draw < share:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        noisy.append(row)
    return noisy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "rm"])
def test_the_noise_of_a_seed_is_one_for_dpo_and_reward_models(base, tmp_path, kind):
    """Training on pairs that are exchanged in their file is the same as with --label_noise."""
    rows = read_rows(f"{base}/pairs.jsonl")
    pairs = [row for row in rows if row["chosen"] != row["rejected"]]  # equal ones are skipped
    noisy = tmp_path / "noisy.jsonl"
    write_rows(noisy, exchange_labels(pairs, 0.4, 3))
    # All pairs of the file are trained on; others are held out.
    settings = {"eval_dataset": f"{base}/pairs.jsonl", "steps": 2}

    by_flag = train(base, kind, tmp_path / "flag", label_noise=0.4, noise_seed=3, **settings)
    by_file = train(base, kind, tmp_path / "file", dataset=str(noisy), **settings)

    plain = train(base, kind, tmp_path / "plain", **settings)
    # DPO's line of step 0 has no loss.
    losses_by_flag = [row["loss"] for row in by_flag if row["step"] > 0]
    losses_by_file = [row["loss"] for row in by_file if row["step"] > 0]
    assert losses_by_flag == losses_by_file
    assert by_flag[-1]["loss"] != plain[-1]["loss"]


@pytest.mark.slow
def test_score_l2_is_added_to_the_loss_alone(first_rm_step, clean):
    penalised = first_rm_step(score_l2=0.5)
    assert penalised["loss"] > clean["loss"] + 0.01
    assert penalised["accuracy"] == clean["accuracy"]


def test_equal_pairs_are_skipped_and_counted(base, tmp_path, capsys):
    rows = read_rows(base / "pairs.jsonl")
    rows[3]["rejected"] = rows[3]["chosen"]
    write_rows(tmp_path / "pairs.jsonl", rows)
    train(base, "rm", tmp_path / "rm", dataset=f"{tmp_path}/pairs.jsonl", steps=1)
    assert "1 with chosen == rejected skipped" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- named splits


def numbers_of(record, label):
    """What a record says of a split, without the split's label."""
    numbers = {}
    for name, value in record.items():
        if name.startswith(f"{label}/"):
            numbers[name.removeprefix(f"{label}/")] = value
    return numbers


def without_splits(record, *labels):
    """A record without what it says of these splits."""
    prefixes = tuple(f"{label}/" for label in labels)
    return {name: value for name, value in record.items() if not name.startswith(prefixes)}


KINDS_WITH_SPLITS = [
    pytest.param("sft", marks=pytest.mark.slow),
    pytest.param("dpo", marks=pytest.mark.slow),
    pytest.param("rm", marks=pytest.mark.slow),
    "ppo",
]


@pytest.fixture(scope="module", params=KINDS_WITH_SPLITS)
def named_splits(request, base, tmp_path_factory):
    """A run that is evaluated on one file, and one evaluated on further splits besides.

    The further ones are `same`, the first split's file again, and `other`, another file.
    kind; alone and named, the folders; alone_rows and named_rows, of their metrics
    """
    root = tmp_path_factory.mktemp("named_splits")
    kind = request.param
    files = {"sft": "sft", "dpo": "pairs", "rm": "pairs", "ppo": "prompts"}
    dataset = f"{base}/{files[kind]}.jsonl"
    rows = read_rows(dataset)
    write_rows(root / "a.jsonl", rows[:5])
    write_rows(root / "b.jsonl", rows[5:8])
    settings = {"dataset": dataset, "eval_dataset": f"{root}/a.jsonl", "model": f"{base}/sft"}
    settings |= {"eval_every": 1, "steps": 2}
    script = kind
    if kind == "dpo":
        script = "sft"
        settings["loss"] = "dpo"

    splits = ["test", f"same={root}/a.jsonl", f"other={root}/b.jsonl"]
    alone_rows = train(base, script, root / "alone", **settings)
    named_rows = train(base, script, root / "named", eval_splits=splits, **settings)
    return SimpleNamespace(
        kind=kind,
        alone=root / "alone",
        named=root / "named",
        alone_rows=alone_rows,
        named_rows=named_rows,
    )


def test_further_splits_change_nothing(named_splits):
    """The first split is evaluated as it was alone, and the trained model is the same."""
    for record, alone in zip(named_splits.named_rows, named_splits.alone_rows, strict=True):
        assert without_splits(record, "same", "other") == alone
    check_equal(weights(named_splits.named), weights(named_splits.alone))
    # A reward model has no samples.
    if named_splits.kind != "rm":
        samples = (named_splits.alone / "samples.jsonl").read_bytes()
        assert (named_splits.named / "samples.jsonl").read_bytes() == samples


def check_same_answers(named_splits):
    """The answers of PPO to the first split's file, asked once or twice."""
    for step in (0, 1, 2):
        answers = (named_splits.alone / f"eval/step_{step}.jsonl").read_bytes()
        assert (named_splits.named / f"eval/step_{step}.jsonl").read_bytes() == answers
        assert (named_splits.named / f"eval_same/step_{step}.jsonl").read_bytes() == answers


def test_the_same_file_as_another_split_gives_the_same_numbers(named_splits):
    n_evaluations = 0
    for record in named_splits.named_rows:
        first = numbers_of(record, "eval")
        other = numbers_of(record, "other")
        assert first == numbers_of(record, "same")
        assert first.keys() == other.keys()
        if first:
            assert first != other
            n_evaluations += 1
    assert n_evaluations > 0
    if named_splits.kind == "ppo":
        check_same_answers(named_splits)


def test_the_summary_tells_splits_apart(named_splits):
    found = summary(named_splits.named)
    if named_splits.kind == "ppo":
        after = found["after"]
        assert after["same/proxy"] == after["proxy"]
        assert after["proxy"] != after["other/proxy"]
    else:
        assert found["same/accuracy"] == found["eval/accuracy"]
        assert found["same/accuracy_se"] != found["other/accuracy_se"]
