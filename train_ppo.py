r"""PPO for language models, the whole algorithm: roll out, score, estimate
advantages, update. The maths is in nanorlhf/ppo.py.

    the embedded world; trains its SFT policy and reward model first:
        python train_ppo.py
    GRPO, which compares answers to one prompt and has no value function:
        python train_ppo.py --advantage grpo --loss_mean sequence \
            --kl_in loss --kl_kind k3 --output_dir runs/grpo
    your own model, prompts and reward:
        python train_ppo.py --model gpt2 --dataset prompts.jsonl \
            --reward_model my.py:reward --output_dir runs/my
    the same global batch, and the same result, on four processes (or GPUs):
        torchrun --nproc_per_node=4 train_ppo.py

With --advantage gae, a value function says what to expect of each token.
With rloo, grpo or dr_grpo there is none: an answer is compared with the other
answers to its prompt. estimate_advantages and loss_of are where they differ.

    B sequences of the global batch, b of this process, m of a micro-batch,
    P prompt and R response tokens, K rewards, G answers to one prompt
"""

import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from nanorlhf import data, ppo
from nanorlhf.chat_templates import leave_out_of_splits
from nanorlhf.control import controlled_scoring
from nanorlhf.ensemble import OBJECTIVES
from nanorlhf.errors import at_least, divides, require
from nanorlhf.evals.score_gold import score_gold
from nanorlhf.evaluation import PPOParts, evaluate, forward, record_evaluation, sampled_outputs
from nanorlhf.hf.blocks import speed_up
from nanorlhf.hf.folders import check_model
from nanorlhf.hf.lora import cast_frozen, choose_trained, merge
from nanorlhf.models import (
    check_reads_tokens,
    load_policy,
    load_tokenizer,
    reference_of,
    save_policy,
)
from nanorlhf.packing import pack, response_mask_of
from nanorlhf.rewards import expand, load_reward
from nanorlhf.rollout import SamplingFlags, check_rollouts, roll_out
from nanorlhf.runtime import checkpoint, cli
from nanorlhf.runtime.distributed import (
    autocast,
    peak_memory_mb,
    return_freed_memory,
    setup,
    sync_on,
)
from nanorlhf.runtime.flags import SCHEDULES, FlagGroup, RunConfig, changed_flags
from nanorlhf.runtime.fsdp import checkpoint_activations, gathered
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import Progress, RunFolder, before_and_after_table, sample_table
from nanorlhf.runtime.optim import adamw, learning_rate, optimizer_step
from nanorlhf.runtime.plots import plot_run
from nanorlhf.scoring import Scoring
from nanorlhf.show.page import write_page
from nanorlhf.splits import load_splits
from nanorlhf.stages import check_inputs, train_what_is_missing
from nanorlhf.tokens import ready_prompts

TRY_NEXT = """Try next:
  python train_ppo.py --kl_coef 0 --steps 60 --eval_every 5 --output_dir runs/no_kl
      the proxy rises further; watch gold
  python train_rm.py --members 5 --label_noise 0.25 --output_dir 'runs/noisy/seed_{seed}'
      an ensemble that learns from labels of which a quarter are wrong
  python train_ppo.py --reward_model 'runs/noisy/seed_{seed}' --objective wco --output_dir runs/wco
      PPO on the worst of its scores
  python train_ppo.py --reward_model my.py:reward --output_dir runs/my_reward
      a reward of your own: def reward(prompts, responses): return [...]"""


@dataclass
class ScoreFlags(FlagGroup):
    """Scores: what is done to the score of an answer before PPO sees it"""

    score_scaling: str = HfArg(
        default="none",
        metadata={"choices": ("none", "running", "first")},
        help="divide scores by a standard deviation: that of all scores so far (running) or that "
        "of the first rollout (first)",
    )
    score_clip: float = HfArg(
        default=0.0,
        metadata={"may_be_infinite": True},
        help="clip scores to between minus and plus this; 0: no clipping",
    )
    missing_eos_penalty: float = HfArg(
        default=0.0, help="subtracted from the score of an answer that does not end with EOS"
    )
    eos_required: bool = HfArg(
        default=False,
        help="an answer without EOS scores -missing_eos_penalty, whatever it says",
    )
    length_penalty: float = HfArg(
        default=0.0, help="subtracted from the score for each token of the answer"
    )


@dataclass
class KLFlags(FlagGroup):
    """The KL penalty: what the policy pays for moving away from the model it starts from"""

    # k1 in the reward gives the gradient of the sequence KL. In the loss, on-policy, k2 and full
    # give the token KL's gradient, without the effect on later states, and k3 gives that of the
    # reversed KL. In later epochs the samples are the old policy's and have no importance weight
    # there, so that k2 and k3 are only near this. See kl_estimate and full_kl.
    kl_coef: float = HfArg(default=0.05, help="the price of one nat of KL divergence")
    kl_kind: str = HfArg(
        default="k1",
        metadata={"choices": ppo.kl_kinds},
        help="how the KL divergence of a token is estimated; full: exactly, over the vocabulary "
        "(see nanorlhf/ppo.py)",
    )
    kl_in: str = HfArg(
        default="reward",
        metadata={"choices": ("reward", "loss")},
        help="subtract the penalty from each token's reward, or add it to the loss",
    )
    kl_target: float = HfArg(
        default=0.0,
        help="change kl_coef during the run so that the KL of an answer stays near this, in "
        "nats; 0: kl_coef is fixed",
    )
    kl_horizon: int = HfArg(default=10_000, help="answers over which kl_coef adapts to kl_target")


ADVANTAGES = ("gae", *ppo.GROUP_KINDS)
# Flags of the value function, which --advantage gae alone has.
VALUE_FLAGS = ("value_model", "vf_coef", "value_clip_range", "gamma", "lam", "bootstrap_truncated")


@dataclass
class UpdateFlags(FlagGroup):
    """Advantages and losses: how the policy learns from a rollout"""

    minibatch_size: int = HfArg(default=32, help="answers in an optimizer step, over all processes")
    ppo_epochs: int = HfArg(default=4, help="how often each rollout is gone through")
    advantage: str = HfArg(
        default="gae",
        metadata={"choices": ADVANTAGES},
        help="what an answer is compared with: gae: a value function's expectation; rloo, grpo, "
        "dr_grpo: the other answers to its prompt, without a value function (the advantage alone: "
        "the papers' means and KL are --loss_mean, --kl_kind and --kl_in)",
    )
    group_size: int | None = HfArg(
        default=None,
        help="answers to each prompt of a rollout, which has batch_size / group_size prompts; by "
        "default 8, with gae 1",
    )
    loss_mean: str = HfArg(
        default="token",
        metadata={"choices": ppo.LOSS_MEANS},
        help="token: the mean over all response tokens; sequence: over answers, of the mean over "
        "each one's tokens; constant: the sum over tokens / (answers * max_new_tokens)",
    )
    gamma: float = HfArg(default=1.0, help="discount of later rewards, between 0 and 1")
    lam: float = HfArg(
        default=0.95, help="lambda of generalised advantage estimation, between 0 and 1"
    )
    clip_range: float = HfArg(
        default=0.2,
        metadata={"may_be_infinite": True},
        help="the ratio of new to old probability is clipped to 1 plus or minus this",
    )
    clip_range_high: float | None = HfArg(
        default=None,
        metadata={"may_be_infinite": True},
        help="the ratio is clipped to 1 plus this on its upper side; by default clip_range",
    )
    value_clip_range: float = HfArg(
        default=0.2,
        metadata={"may_be_infinite": True},
        help="a value may move by at most this in one rollout",
    )
    vf_coef: float = HfArg(default=0.5, help="weight of the value loss")
    ent_coef: float = HfArg(default=0.0, help="weight of the entropy bonus")
    target_kl: float = HfArg(
        default=0.0,
        metadata={"may_be_infinite": True},
        help="end the epochs on a rollout once the policy has moved by this much (approx_kl, in "
        "nats a token); 0: never",
    )
    bootstrap_truncated: bool = HfArg(
        default=False,
        help="an answer that was cut off ends with the value of its last state, not with 0",
    )


@dataclass
class Config(ScoreFlags, SamplingFlags, KLFlags, UpdateFlags, controlled_scoring.Flags, RunConfig):
    """Models and rewards: what PPO starts from, and what it learns from"""

    model: str = HfArg(
        default="runs/sft", help="the SFT policy: a run folder, a model folder or a hub name"
    )
    reward_model: list[str] = HfArg(
        default_factory=lambda: ["runs/rm/seed_0"],
        help="one reward, or the members of an ensemble: a model folder ({seed} stands for all "
        "that exist; FOLDER#LABEL: the logit of a classifier's label), a hub name, "
        "FILE.py:FUNCTION, or a lexicon FILE.tsv",
    )
    objective: str = HfArg(
        default="mean",
        metadata={"choices": OBJECTIVES},
        help="how the scores of an ensemble become one: their mean, the worst case (wco), or the "
        "mean less their variance (uwo)",
    )
    uwo_lambda: float = HfArg(default=0.1, help="uwo: weight of the variance between members")
    reward_weights: list[float] = HfArg(
        default_factory=list,
        help="a weight for each reward of --reward_model: the score is their weighted sum, as of "
        "rewards that are not members of an ensemble",
    )
    value_model: str = HfArg(
        default="",
        help="a value model of its own, trained in full: a policy or reward model to start from. "
        "Without it, a head on the policy",
    )
    gold_model: str = HfArg(
        default="",
        help="a second reward, for evaluation only; in the embedded world, its gold reward",
    )
    score_gold: str = HfArg(
        default="",
        help="train nothing: add the scores of --gold_model to the evaluations of this finished "
        "run",
    )
    n_samples: int = HfArg(default=3, help="how many samples an evaluation prints")

    output_dir: str = HfArg(default="runs/ppo", help="the folder that the run writes")
    steps: int = HfArg(default=40, help="how many rollouts to learn from")
    batch_size: int = HfArg(default=128, help="answers in a rollout, over all processes")
    lr: float = HfArg(default=3e-4, help="peak learning rate of AdamW")
    schedule: str = HfArg(
        default="constant",
        metadata={"choices": SCHEDULES},
        help="how the learning rate falls over the rollouts",
    )
    temperature: float = HfArg(
        default=1.0,
        help="what logits are divided by, in sampling and in every log-prob: below 1 makes "
        "answers more alike",
    )
    eval_every: int = HfArg(
        default=20, help="evaluate every N rollouts; 0: only at the start and at the end"
    )
    checkpoint_every: int = HfArg(default=10, help="write a checkpoint every N rollouts")

    def __post_init__(self):
        if self.group_size is None and self.advantage in ppo.GROUP_KINDS:
            self.group_size = 8
        super().__post_init__()
        at_least(self, 1, "minibatch_size", "ppo_epochs", "kl_horizon")
        if self.group_size is not None:
            at_least(self, 1, "group_size")
            divides(self, "batch_size", self.group_size, "--group_size")
        if self.advantage in ppo.GROUP_KINDS:
            require(
                self.group_size > 1,
                f"--advantage {self.advantage} compares answers to one prompt: --group_size must "
                "be 2 or more",
            )
        if not self.has_value_function:
            check_value_flags(self)
        at_least(self, 0, "kl_coef", "kl_target", "target_kl", "vf_coef", "ent_coef", "score_clip")
        at_least(self, 0, "uwo_lambda", "n_samples")
        require(
            self.clip_range > 0 and self.value_clip_range > 0,
            "--clip_range and --value_clip_range must be positive",
        )
        require(
            self.clip_range_high is None or self.clip_range_high > 0,
            "--clip_range_high must be positive",
        )
        require(
            0 <= self.gamma <= 1 and 0 <= self.lam <= 1,
            "--gamma and --lam must lie between 0 and 1",
        )
        useless = self.kl_in == "loss" and self.kl_kind in ppo.KL_WITHOUT_GRADIENT
        require(
            not useless,
            f"--kl_in loss: {self.kl_kind}'s gradient there has mean zero; take k2, k3 or full",
        )
        require(
            not self.kl_target or self.kl_coef > 0,
            "--kl_target adapts --kl_coef, which must start above 0",
        )
        # A rollout with a low KL multiplies the coefficient by 1 - 0.2 batch_size / kl_horizon
        # (ppo.AdaptiveKL), which must stay above 0.
        require(
            self.batch_size < 5 * self.kl_horizon,
            "--kl_horizon must be above a fifth of --batch_size",
        )
        # The world's gold is known. Here it only evaluates: it shows what the proxy is worth.
        if data.is_world(self.dataset) and not self.gold_model:
            self.gold_model = "world:gold"
        self.reward_model = expand(self.reward_model)
        if self.reward_weights:
            check_weights(self)

    @property
    def has_value_function(self) -> bool:
        """Whether a value function says what to expect, and not the other answers to a prompt."""
        return self.advantage == "gae"


def check_value_flags(config):
    """InputError where a flag of the value function is set, and --advantage has none."""
    unread = changed_flags(config, VALUE_FLAGS)
    require(
        not unread,
        f"--advantage {config.advantage} has no value function, so nothing reads "
        f"{', '.join(unread)}",
    )


def check_weights(config):
    """InputError where --reward_weights do not fit the rewards, or the flags of ensembles."""
    n_weights = len(config.reward_weights)
    n_rewards = len(config.reward_model)
    require(
        n_weights == n_rewards,
        f"--reward_weights needs one for each reward: {n_weights} weights, {n_rewards} rewards",
    )
    # They make a sum of rewards that are not members of an ensemble.
    unread = changed_flags(config, ("objective", "uwo_lambda"))
    require(not unread, f"with --reward_weights nothing reads {', '.join(unread)}")


@unlock_afterwards()
def main(config):
    # ------------------------------------------------------------------------------------ set-up
    dist = setup(config.device, config.distributed)
    if config.score_gold:
        summary = score_gold(config, dist)
        if dist.main:
            plot_run(config.score_gold)
        write_page(config.score_gold, dist)
        return summary

    divides(config, "batch_size", config.minibatch_size, "--minibatch_size")
    divides(config, "minibatch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist)
    if folder.status == "done":
        return folder.already_done()

    # What is wrong with a model or a reward is said now, before anything is trained or loaded.
    check_inputs(config, "model", "value_model", "reward_model", "gold_model")
    # Control by features scores answers in its own way; without its flags it prepares None.
    scoring = controlled_scoring.prepare(config) or Scoring(config)
    rows, held_out, note = load_splits(config, "prompts")  # held_out: {label of a split: rows}
    train_what_is_missing(config, "model", "reward_model")
    torch.manual_seed(config.seed)

    # -------------------------------------------------------------------------------------- data
    model_config = check_model(config.model)
    tokenizer = load_tokenizer(config.model)
    if config.value_model:
        # It reads the policy's tokens; reward models look at theirs themselves.
        check_reads_tokens(config.value_model, tokenizer)

    def encode(rows):
        return ready_prompts(
            tokenizer,
            rows,
            model_config,
            config.max_new_tokens,
            config.max_prompt_length,
            config.chat_template,
        )

    # Everything becomes token ids once, before the loop: a step only picks prompts.
    rows, held_out = leave_out_of_splits(tokenizer, rows, held_out, config, dist.print)
    prompts = encode(rows).compact()
    held_out_prompts = {label: encode(part) for label, part in held_out.items()}
    fewest = min(map(len, held_out_prompts.values()))
    require(
        fewest >= dist.world,
        f"{fewest} held-out prompts are fewer than the {dist.world} processes",
    )
    against = " ".join(config.reward_model)
    dist.print(
        f"PPO of {config.model} against {against} on {config.dataset}: {note}; "
        f"{dist.world} process(es), {dist.device}"
    )

    # ------------------------------------------------------------------------------------ models
    # The policy is in eval mode throughout: dropout would make each ratio of the update noisy.
    policy = load_policy(
        config.model,
        value_head=config.has_value_function,
        value_model=config.value_model or None,
        device=dist.load_device,
    )
    check_rollouts(policy)
    note = choose_trained(policy.lm, config)
    n_parameters = sum(parameter.numel() for parameter in policy.parameters())
    dist.print(f"{n_parameters:,} parameters, {note}")
    reference = reference_of(policy, share=not dist.sharded)

    # With LoRA the policy and the reference have one language model, which is sped up once.
    language_models = {policy.lm, reference.lm}
    if policy.value_trunk is not None:
        language_models.add(policy.value_trunk)
    for lm in language_models:
        speed_up(lm, dist.device, config.dtype, config.compile)
        cast_frozen(lm, config)
    if config.checkpoint_activations:
        checkpoint_activations(policy)

    # On several processes the policy goes into DDP or is sharded (FSDP), the reference is sharded.
    first = prompts.ids[0]
    example = pack([first], [first[-1:]]).to(dist.device)

    def sum_of_outputs(model):
        outputs = model(example, response_mask_of(example))
        return sum(output.sum() for output in outputs.values())

    model = dist.wrap(policy, sum_of_outputs, config.dtype)
    if reference.lm is not policy.lm:
        dist.wrap(reference, sum_of_outputs, config.dtype)

    scoring.load(tokenizer, dist)
    gold = None
    if config.gold_model:
        gold = load_reward(config.gold_model, tokenizer, dist, config.micro_batch_size)
    optimizer = adamw(policy, config.lr, config.betas, config.weight_decay)
    scaler = ppo.ScoreScaler(config.score_scaling)
    kl_controller = None
    if config.kl_target:
        kl_controller = ppo.AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)

    # A run that was killed goes on from its last checkpoint.
    state = checkpoint.load(config.output_dir, policy, optimizer, dist)
    if state:
        scaler.moments = tuple(state["scaler"])
        if kl_controller:
            kl_controller.coef = state["kl_coef"]
        scoring.restore(state.get("tensors", {}))
    parts = PPOParts(config, dist, tokenizer, policy, model, reference, scoring, gold)

    def evaluate_splits():
        """{label of a split: its results and answers}"""
        return {label: evaluate(parts, part) for label, part in held_out_prompts.items()}

    def report(step, evaluations):
        """Write and print an evaluation. -> its numbers, for metrics.jsonl"""
        record = {}
        for label, (result, rows) in evaluations.items():
            record |= record_evaluation(folder, step, label, result, rows)

        _, rows = evaluations["eval"]
        samples = []
        for row in rows[: config.n_samples]:
            texts = {"prompt": row["prompt"], "response": row["response"]}
            samples.append({"step": step, **texts, **row["scores"], "gold": row["gold"]})
        folder.append("samples.jsonl", samples)
        dist.print(sample_table(samples))
        return record

    # The first evaluation comes before anything is written: a reward that fails leaves no trace.
    first_evaluation = None if state else evaluate_splits()
    folder.create(state)
    if first_evaluation:
        folder.append("metrics.jsonl", [{"step": 0, **report(0, first_evaluation)}])

    # -------------------------------------------------------------------------------------- loop
    first_step = state["step"] + 1 if state else 1
    progress = Progress(dist, "ppo", config.steps, first_step - 1, config.compile)
    for step in range(first_step, config.steps + 1):
        clock = [time.perf_counter()]
        kl_coef = kl_controller.coef if kl_controller else config.kl_coef
        lr = learning_rate(
            step - 1, config.steps, config.lr, config.schedule, config.warmup, config.final_lr
        )

        # 1. Every process samples its share of the global batch: G answers to each prompt.
        group_size = config.group_size or 1  # it may be missing with --advantage gae
        n_prompts = config.batch_size // group_size
        prompt_index = data.batch_indices(len(prompts), n_prompts, step - 1, config.seed)
        index = np.repeat(prompt_index, group_size).tolist()  # a prompt's answers adjoin
        place = dist.share(range(config.batch_size))  # which rows of the global batch are mine
        # With FSDP the weights are gathered once for a whole rollout, not for each token.
        with gathered(policy):
            mine = prompts.at([index[i] for i in place])
            rollout, answers = roll_out(parts, mine, place, step)
        return_freed_memory()
        clock.append(time.perf_counter())

        # 2. Scores of the answers, log-probs under the reference, advantages.
        x, record = experience(parts, scaler, rollout, answers, kl_coef)
        clock.append(time.perf_counter())

        # 3. A few epochs of minibatches on them.
        with gathered(reference if needs_full_kl(config, "loss") else None):
            record |= update(parts, optimizer, answers.batch, x, place[0], step, kl_coef, lr)
        return_freed_memory()
        if kl_controller:
            kl_controller.update(record["kl"], config.batch_size)
        clock.append(time.perf_counter())

        # 4. What happened.
        seconds = np.diff(clock).tolist()
        n_tokens = x.lengths.sum().item()
        record = {
            "step": step,
            **record,
            "kl_coef": kl_coef,
            "lr": lr,
            "seconds_rollout": seconds[0],
            "seconds_score": seconds[1],
            "seconds_update": seconds[2],
            "tokens_per_second": n_tokens / (clock[-1] - clock[0]),
            "peak_memory_mb": peak_memory_mb(dist),
        }
        is_last = step == config.steps
        if is_last or (config.eval_every and step % config.eval_every == 0):
            record |= report(step, evaluate_splits())
        folder.append("metrics.jsonl", [record])
        progress.step(
            step,
            f"score {record['score_mean']:.2f}  kl {record['kl']:.1f}  "
            f"length {record['length']:.0f}",
        )
        if is_last or step % config.checkpoint_every == 0:
            # The controller has moved since this step's kl_coef: the next step's is kept.
            next_kl_coef = kl_controller.coef if kl_controller else kl_coef
            numbers = {"kl_coef": next_kl_coef, "scaler": scaler.moments}
            folder.checkpoint(
                step, policy, optimizer, numbers, config.keep_checkpoints, scoring.tensors()
            )
    progress.close()

    # -------------------------------------------------------------------------------------- save
    if config.merge:
        merge(policy.lm)
    folder.save_model(save_policy, policy, tokenizer)
    picture = plot_run(config.output_dir) if dist.main else None
    summary = folder.finish(folder.before_and_after(held_out))

    # The table shows the first split in full, and three numbers of each further one.
    names = [*scoring.summary_names, "gold", "kl", "length", "distinct_2"]
    for label in held_out:
        if label != "eval":
            names += [f"{label}/proxy", f"{label}/gold", f"{label}/length"]
    dist.print(before_and_after_table(summary, names))
    curves = f", the curves in {picture}" if picture else ""
    dist.print(f"The policy is in {folder.path}/model, every answer in {folder.path}/eval{curves}.")
    write_page(folder.path, dist)
    dist.print(TRY_NEXT if data.is_world(config.dataset) else "")
    return summary


# ------------------------------------------------------------------------------------ experience


@dataclass
class Experience:
    """What the update needs of a rollout, for the whole global batch: [B, R], and lengths [B]."""

    mask: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor  # whitened with --advantage gae
    lengths: torch.Tensor
    values: torch.Tensor | None  # None without a value function
    returns: torch.Tensor | None


def experience(parts, scaler, rollout, answers, kl_coef):
    """Turn a rollout into an Experience and the step's numbers. -> Experience, {name: float}

    What all processes have is gathered first, so that no mean depends on their number.
    """
    config = parts.config
    outputs = gather_outputs(parts, rollout, answers)  # {name: [B, ...]}
    mask = outputs["mask"]  # [B, R]
    lengths = mask.sum(1)  # [B]

    # What PPO maximises: `scores` [B]. A scoring that learns does so only now, so that no rollout
    # is judged by what was learned from it.
    scored = parts.scoring.combine(outputs)
    learned = parts.scoring.learn(outputs)

    # The rules on endings and length come before the scale of the scores.
    shaped = ppo.shape_scores(
        scored.scores,
        lengths,
        outputs["finished"],
        config.missing_eos_penalty,
        config.eos_required,
        config.length_penalty,
    )
    shaped = scaler(shaped)
    if config.score_clip:
        shaped = shaped.clamp(-config.score_clip, config.score_clip)

    # Rewards of tokens (the score on the last one, a KL penalty on each), then advantages.
    rewards = ppo.token_rewards(shaped, kl_in_reward(config, outputs), mask, kl_coef)  # [B, R]
    advantages, returns, advantage_record = estimate_advantages(config, outputs, rewards)

    # The KL of a sequence, in nats, by all estimators, whatever kind is in the reward. That by k1
    # is called kl, the others are kl_k2, kl_k3, ...
    kl_record = {}
    for kind in ppo.KL_ESTIMATES:
        kl = ppo.kl_estimate(outputs["old_logprobs"], outputs["ref_logprobs"], kind)
        name = "kl" if kind == "k1" else f"kl_{kind}"
        kl_record[name] = kl.sum(1).mean().item()  # kl [B, R] is 0 where masked

    record = {
        "score_mean": scored.proxy.mean().item(),
        "score_std": scored.proxy.std(correction=0).item(),
        **{name: term.mean().item() for name, term in scored.terms.items()},
        **learned,
        "reward": rewards.sum(1).mean().item(),  # of a sequence: shaped score less its KL penalty
        **kl_record,
        "entropy": (outputs["entropies"].sum() / mask.sum()).item(),  # of a token, nats
        "length": lengths.float().mean().item(),
        "eos_rate": outputs["finished"].float().mean().item(),
        **advantage_record,
    }
    if len(scored.members) > 1:
        for name, scores in scored.members.items():
            record[f"score/{name}"] = scores.mean().item()
        record["score_variance"] = scored.variance.mean().item()  # between the members

    x = Experience(
        mask=mask,
        old_logprobs=outputs["old_logprobs"],
        ref_logprobs=outputs["ref_logprobs"],
        advantages=advantages,
        lengths=lengths,
        values=outputs.get("values"),
        returns=returns,
    )
    return x, record


def estimate_advantages(config, outputs, rewards):
    """How much better than expected each token turned out. rewards [B, R]

    -> advantages [B, R]; returns [B, R], or None without a value function; {name: float}
    """
    mask = outputs["mask"]
    if config.has_value_function:
        # The value function says what was expected before each token. By default an answer that was
        # cut off counts as one that ended: nothing is expected after it.
        bootstrap = outputs["bootstrap"] if config.bootstrap_truncated else None
        advantages, returns = ppo.gae(
            rewards, outputs["values"], mask, config.gamma, config.lam, bootstrap
        )
    else:
        # The other answers to the prompt say what was expected. An answer's reward is its score,
        # less the KL penalties of its tokens where the KL is in the reward; all its tokens get one
        # advantage.
        answer_rewards = rewards.sum(1)  # [B]
        answer_advantages = ppo.group_advantages(
            answer_rewards, config.group_size, config.advantage
        )
        advantages = torch.where(mask, answer_advantages[:, None], 0.0)
        returns = None

    mean, variance = ppo.masked_moments(advantages, mask)
    record = {"advantage_mean": mean.item(), "advantage_std": variance.sqrt().item()}
    # Whitening makes the size of an update independent of the unit of the scores. Advantages within
    # a group have mean 0 already. Whitening them too would shift them by a mean over all tokens:
    # answers with equal rewards, which teach nothing, would get advantages that are not 0.
    if config.has_value_function:
        advantages = ppo.whiten(advantages, mask, (mean, variance))
        record["explained_variance"] = ppo.explained_variance(outputs["values"], returns, mask)
    return advantages, returns, record


def gather_outputs(parts, rollout, answers):
    """What the policy, the reference and the rewards say of a rollout, of all processes together.

    b rows of this process, B of all -> {name: [B, ...]}
    """
    config = parts.config
    dist = parts.dist
    # The policy, the reference and the rewards read the same tokens, one after another. With FSDP
    # the shards of each are gathered for its own turn alone.
    needs_reference = needs_full_kl(config, "reward")
    kl_to = parts.reference if needs_reference else None

    with gathered(parts.policy, kl_to):
        old = sampled_outputs(parts, rollout, answers.batch, kl_to)
        if config.bootstrap_truncated:
            old["bootstrap"] = bootstrap_values(parts, rollout, answers.batch)  # [b]
    with gathered(parts.reference):
        ref = forward(parts, parts.reference, answers.batch)
    readings = parts.scoring.read([answers])

    local = {name: value.to(dist.device) for name, value in readings.items()}
    local |= {
        "finished": rollout.finished,  # [b]
        "mask": rollout.response_mask,  # [b, R], as all that follow
        "old_logprobs": old["logprobs"],
        "ref_logprobs": ref["logprobs"],
        "entropies": rollout.entropies,
    }
    for name in ("values", "bootstrap", "full_kl"):
        if name in old:  # where the settings need it
            local[name] = old[name]
    return {name: dist.gather(value) for name, value in local.items()}


def needs_full_kl(config, place):
    """Whether the KL in a place, "reward" or "loss", is the exact one over the vocabulary."""
    return config.kl_in == place and config.kl_kind in ppo.KL_OF_LOGITS


def kl_in_reward(config, outputs):
    """The KL that is a penalty in the reward: [B, R]; all 0 where it is in the loss instead."""
    if config.kl_in == "loss":
        return torch.zeros_like(outputs["old_logprobs"])
    if needs_full_kl(config, "reward"):
        return outputs["full_kl"]
    return ppo.kl_estimate(outputs["old_logprobs"], outputs["ref_logprobs"], config.kl_kind)


@torch.no_grad()
def bootstrap_values(parts, rollout, batch):
    """[b]: the value after the last token of a response that was cut off, 0 for one that ended."""
    config = parts.config
    dist = parts.dist
    # Nothing follows an EOS, so the value behind it is 0. A cut answer might have gone on.
    values = torch.zeros(len(batch), device=dist.device)
    cut_off = (~rollout.finished).nonzero()[:, 0]  # rows
    for rows in batch.micro_batches(
        config.micro_batch_size, config.tokens_per_micro_batch, cut_off
    ):
        with autocast(dist, config.dtype):
            values[rows] = parts.policy.final_values(batch.rows(rows))
    return values


# ---------------------------------------------------------------------------------------- update

# Statistics of which the largest counts. All others are sums, whose shares add up.
MAXIMA = ("ratio_max", "ratio_error", "first_ratio_error")


def update(parts, optimizer, batch, x, first, step, kl_coef, lr):
    """ppo_epochs passes of minibatches over the rollout. -> the update's numbers

    batch: this process's rows. first: the place of the first of them in the global batch, and so in
    the Experience x.
    """
    config = parts.config
    dist = parts.dist
    epochs = []  # the numbers of each
    for epoch in range(config.ppo_epochs):
        stats = defaultdict(lambda: torch.zeros((), device=dist.device))
        for minibatch in data.minibatches(
            config.batch_size, config.minibatch_size, config.seed, step, epoch
        ):
            # The response tokens of the whole minibatch: the denominator of every statistic, and
            # of the loss with --loss_mean token.
            n_tokens = x.lengths[minibatch.to(dist.device)].sum()
            mine = dist.share(minibatch).to(dist.device) - first  # rows of `batch`
            micro_batches = batch.micro_batches(
                config.micro_batch_size, config.tokens_per_micro_batch, mine
            )
            micro_batches = dist.even(micro_batches)

            # Gradients add up over the micro-batches.
            for i, rows in enumerate(micro_batches, 1):
                with sync_on(parts.model, last=i == len(micro_batches)):
                    with autocast(dist, config.dtype):
                        loss, numbers = loss_of(
                            parts, batch.rows(rows), x, rows + first, n_tokens, kl_coef
                        )
                    # DDP and FSDP average over ranks, and the loss is a sum.
                    (loss * dist.world).backward()
                add_to(stats, numbers)

            # At the first minibatch nothing has been learned from this rollout yet, so every ratio
            # should be 1: what is left is the difference between sampling and training.
            if "first_ratio_error" not in stats:
                stats["first_ratio_error"] = stats["ratio_error"]
            grad_norm = optimizer_step(optimizer, parts.policy, lr, config.max_grad_norm, step)
            stats["grad_norm"] += grad_norm / dist.world

        # Each epoch moves the policy further from the one that sampled. If it is too far away, the
        # rollout says little about it, and --target_kl ends the update.
        n_minibatches = config.batch_size // config.minibatch_size
        epochs.append(reduce_stats(stats, n_minibatches, dist))
        if config.target_kl and epochs[-1]["approx_kl"] > config.target_kl:
            break

    # Means over the epochs, but for the two maxima that are recorded.
    record = {}
    for name in epochs[0]:
        if name != "ratio_error":
            record[name] = sum(numbers[name] for numbers in epochs) / len(epochs)
    record["ratio_max"] = max(numbers["ratio_max"] for numbers in epochs)
    record["first_ratio_error"] = epochs[0]["first_ratio_error"]
    return record


def loss_of(parts, batch, x, at, n_tokens, kl_coef):
    """One micro-batch's share of the loss, and of the statistics.

    batch: m packed rows; at [m]: their rows in the Experience x -> loss (scalar), {name: scalar}
    """
    config = parts.config
    mask = response_mask_of(batch)  # [m, R'], trimmed to its longest response
    # What the rollout knows of these tokens. All of it was computed before the first update.
    width = mask.shape[1]
    old_logprobs = x.old_logprobs[at, :width]
    ref_logprobs = x.ref_logprobs[at, :width]
    advantages = x.advantages[at, :width]
    # What a sum over tokens is divided by, one number or one for each row.
    denominator = ppo.loss_denominator(
        config.loss_mean, mask.sum(1), n_tokens, config.minibatch_size, config.max_new_tokens
    )

    # The policy as it is now reads what the policy of the rollout has written.
    kl_to = parts.reference if needs_full_kl(config, "loss") else None
    new = parts.model(
        batch, mask, config.temperature, entropy=config.ent_coef > 0, kl_to=kl_to
    )  # {name: [m, R']}

    # total = policy [+ vf_coef * value] [- ent_coef * entropy] [+ kl_coef * kl]
    policy_loss, stats = ppo.policy_loss(
        new["logprobs"],
        old_logprobs,
        advantages,
        mask,
        config.clip_range,
        denominator,
        config.clip_range_high,
        n_stats=n_tokens,
    )
    loss = policy_loss
    stats["policy_loss"] = policy_loss.detach()
    if config.has_value_function:
        value_loss = ppo.value_loss(
            new["values"],
            x.values[at, :width],
            x.returns[at, :width],
            mask,
            config.value_clip_range,
            denominator,
        )
        loss = loss + config.vf_coef * value_loss
        stats["value_loss"] = value_loss.detach()
    if config.ent_coef:
        entropy = ppo.sum_over_tokens(new["entropies"], mask, denominator)
        loss = loss - config.ent_coef * entropy
    if config.kl_in == "loss" and kl_coef > 0:
        if kl_to:
            kl = new["full_kl"]
        else:
            kl = ppo.kl_estimate(new["logprobs"], ref_logprobs, config.kl_kind)
        loss = loss + kl_coef * ppo.sum_over_tokens(kl, mask, denominator)

    stats["ratio_error"] = (new["logprobs"] - old_logprobs).detach().abs().max()
    return loss, stats


def add_to(stats, numbers):
    """Add one micro-batch's numbers to the statistics of its epoch."""
    for name, value in numbers.items():
        if name in MAXIMA:
            stats[name] = torch.maximum(stats[name], value)
        else:
            stats[name] += value


def reduce_stats(stats, n_minibatches, dist):
    """One epoch's statistics of this process -> those of all processes, {name: float}.

    Sums become means over the epoch's minibatches; maxima stay maxima.
    """
    sums = {name: value for name, value in stats.items() if name not in MAXIMA}
    totals = dist.sum(torch.stack(list(sums.values())))
    means = (totals / n_minibatches).tolist()

    mine = torch.stack([stats[name] for name in MAXIMA])
    maxima = dist.gather(mine[None]).amax(0).tolist()
    return dict(zip(sums, means)) | dict(zip(MAXIMA, maxima))


if __name__ == "__main__":
    cli.run(Config, main)
