"""Models: a causal LM as policy (with a value head), as reference and as reward model; loading and saving.

    B sequences, P prompt, R response, T = P + R tokens, D hidden, V vocabulary, n response tokens of the whole micro-batch

Every batch forward takes packed rows (packing.py): response token j of a row stands at column length(prompt) + j, and is scored by
the hidden state one column to its left.
"""

import contextlib
import copy
import os

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from . import ppo
from .errors import InputError, library_call, require
from .hf.adapters import is_adapter, load_merged, read_config, resolve, save_model
from .hf.blocks import FrozenTrunk
from .hf.lora import LoRA, adapters_off
from .hf.weights import check_config, check_types, has_weights, weight_names
from .packing import unflatten
from .runtime.files import digest, is_of_type, shorten
from .runtime.fingerprints import digest_path
from .runtime.hints import check_made
from .runtime.tensors import check_tensors, read_tensors

hf_logging.set_verbosity_error()  # "newly initialized: score.weight" is what we ask for, not news
hf_logging.disable_progress_bar()

VALUE_MODEL = "value_model"  # the folder of a separate value model, inside its policy's
# The sizes that a model can have, lowest and highest.
SIZES = {"vocab_size": (3, 10**7), "hidden_size": (1, 10**6), "num_hidden_layers": (1, 10**4)}
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**27}  # elements of one float32 chunk of logits (64, 512 MB): no [B, T, V] tensor is ever held


def context_length(config):
    """The most tokens a model can read, or None where its config names no limit."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


# ---------------------------------------------------------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """A causal LM with, for PPO, a value head: Linear(D, 1) on the trunk's last hidden state, zero at the start.

    The trunk is shared: one forward gives log-probs and values. `value_trunk` is a separate value model instead. `frozen` are the
    blocks that need to run only once over a rollout (reference_of): a batch whose `trunk` is there goes on from their output.
    """

    frozen = None

    def __init__(self, lm, value_head=True, value_trunk=None):
        super().__init__()
        self.lm, self.value_trunk = lm, value_trunk
        self.value_head = nn.Linear((value_trunk or lm).config.get_text_config().hidden_size, 1) if value_head else None
        if value_head:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def shares_trunk(self) -> bool:
        """Whether a forward of the LM gives values too: by a value head on its own hidden states.

        False without a value head, and False where a value model of its own has to be run for them.
        """
        return self.value_head is not None and self.value_trunk is None

    def logits(self, hidden):
        """Hidden states [..., D] -> logits [..., V] in float32, as the LM's own forward gives them."""
        logits = self.lm.get_output_embeddings()(hidden).float()
        cap = getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def last_hidden(self, batch, trunk=None):
        """The last hidden states [B, T, D] of the LM, or of another trunk."""
        use_stored = batch.trunk is not None and trunk is None
        context = self.frozen.stored(self.lm, batch.trunk) if use_stored else contextlib.nullcontext()
        with context:
            return (trunk or self.lm.base_model)(input_ids=batch.ids, use_cache=False).last_hidden_state

    def hidden(self, batch, response_mask, trunk=None):
        """The hidden states that score the response tokens: [n, D], row by row, and the tokens they score: [n]."""
        hidden = self.last_hidden(batch, trunk)  # [B, T, D]
        row, token = response_mask.nonzero(as_tuple=True)  # [n], [n]
        column = batch.prompt_lengths[row] + token  # of the token itself: its logits stand one to the left
        at = row * batch.ids.shape[1] + column - 1
        return hidden.flatten(0, 1).index_select(0, at), batch.ids[row, column]

    def forward(self, batch, response_mask, temperature=1.0, entropy=False, correct=False, kl_to=None):
        """Packed rows -> {logprobs, values, entropies, correct, full_kl}, each [B, R] with 0 where masked.

        Log-probs and entropies are those of softmax(logits / temperature): the distribution that was sampled. `values` are there
        with a value head; on request `entropies`, `correct` (1 where the token is the most likely one) and `full_kl` (to the Policy
        `kl_to`, exact over the vocabulary).
        """
        hidden, tokens = self.hidden(batch, response_mask)  # [n, D], [n]
        with torch.no_grad():
            ref_hidden = kl_to.hidden(batch, response_mask)[0] if kl_to else None

        def chunk(rows):
            logits = self.logits(hidden[rows]) / temperature  # [c, V]
            logp = logits.log_softmax(-1)
            out = {"logprobs": logp.gather(1, tokens[rows, None])[:, 0]}
            if entropy:
                out["entropies"] = ppo.entropy(logp, logp.exp())
            if correct:
                out["correct"] = (logits.argmax(-1) == tokens[rows]).float()
            if kl_to:
                out["full_kl"] = ppo.full_kl(logits, kl_to.logits(ref_hidden[rows]).detach() / temperature)
            return out

        out = in_chunks(chunk, len(tokens), max(1, MAX_LOGITS[tokens.device.type] // self.lm.config.get_text_config().vocab_size))
        if self.value_head is not None:
            if self.value_trunk is not None:
                hidden, _ = self.hidden(batch, response_mask, self.value_trunk)
            out["values"] = scalar(self.value_head, hidden)
        return {name: unflatten(flat, response_mask) for name, flat in out.items()}

    def final_values(self, batch):
        """The value after the last token of every row, [B]: what a truncated response is bootstrapped with."""
        hidden = self.last_hidden(batch, self.value_trunk)  # [B, T, D]
        return scalar(self.value_head, hidden[torch.arange(len(batch), device=hidden.device), batch.lengths - 1])


class WithoutAdapters(Policy):
    """The reference of a policy with LoRA: the same LM with its adapters off, and no second copy in memory."""

    def __init__(self, policy):
        super().__init__(policy.lm, value_head=False)
        self.policy = policy  # FSDP gathers the LM's weights with the rest of it

    def hidden(self, *args, **kwargs):
        with adapters_off(self.lm):
            return super().hidden(*args, **kwargs)

    def logits(self, hidden):
        with adapters_off(self.lm.get_output_embeddings()):
            return super().logits(hidden)


def reference_of(policy, share=True):
    """The reference policy pi_ref: `policy` as it is now, before training. What is frozen in the policy is shared, the rest copied
    (share=False: all is copied, for FSDP, which shards each model on its own). With LoRA it is the policy without its adapters.

    Where the embeddings and bottom blocks are frozen both then know that these need to run only once over a rollout.
    """
    policy.frozen = FrozenTrunk(policy.lm)
    if any(isinstance(module, LoRA) for module in policy.lm.modules()):
        reference = WithoutAdapters(policy)
    else:
        shared = {id(p): p for p in policy.lm.parameters() if share and not p.requires_grad}
        reference = Policy(copy.deepcopy(policy.lm, shared), value_head=False).requires_grad_(False)
    reference.frozen = policy.frozen
    return reference


def in_chunks(function, n, size):
    """{name: [n]} by function(slice) of at most `size` rows; where there are several, each is recomputed in the backward pass."""
    if n <= size:
        return function(slice(0, n))
    parts = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    if torch.is_grad_enabled():
        parts = [checkpoint(function, part, use_reentrant=False) for part in parts]
    else:
        parts = [function(part) for part in parts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def scalar(head, hidden):
    """Linear(D, 1) in float32, also under bfloat16 autocast: [n, D] -> [n]. Rounded scores would tie, and rounded values are noise."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())[:, 0]


# --------------------------------------------------------------------------------------------------------------- the reward model


class RewardModel(nn.Module):
    """A trunk and Linear(D, 1) on the hidden state of the last real token: [B, T] -> [B].

    It is an HF sequence classifier with one label. The position comes from the lengths, never from `ids != pad`. Scores are
    standardised: 1/std is folded into the score weight, the mean (in units of the std) is config.reward_mean, applied here.
    Plain HF loading gives the same scores up to that constant, if pad differs from EOS.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        hidden = self.model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state  # [B, T, D]
        last = hidden[torch.arange(len(batch), device=hidden.device), batch.lengths - 1]  # [B, D]
        return scalar(self.model.score, last) - getattr(self.model.config, "reward_mean", 0.0)

    @torch.no_grad()
    def standardise(self, mean, std):
        """After this, scores that had this mean and standard deviation have 0 and 1."""
        config = self.model.config
        self.model.score.weight /= std
        config.reward_mean = float((getattr(config, "reward_mean", 0.0) + mean) / std)


# -------------------------------------------------------------------------------------------------------------- loading and saving


def check_model(path):
    """The HF config of a model folder or hub name, looked at before anything is loaded.

    So are the names of its weight files (weights.py), and a separate value model inside the folder.
    Errors are InputErrors, in one line.
    """
    path = resolve(path)
    check_made(path)
    value_model = os.path.join(path, VALUE_MODEL)
    if os.path.isdir(value_model):
        check_model(value_model)
    if is_adapter(path):
        return check_model(read_config(path)["base_model_name_or_path"])
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise InputError(f"{path}: a folder without config.json is no model")
        if not has_weights(path):
            hint = "; the run has not finished" if os.path.isdir(os.path.join(path, "checkpoint")) else ""
            raise InputError(f"{path}: no weights (*.safetensors) in this model folder{hint}")
    elif os.path.sep in os.path.normpath(path) and path.count("/") != 1 or path.startswith((".", "~", "/")):
        raise InputError(f"{path}: no such model folder")
    elif path.startswith("runs/"):
        raise InputError(f"{path}: no such run yet")
    with library_call(f"{path}: neither a model folder nor a model that the hub gives"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_config(path, config)
    check_sizes(path, config)
    weight_names(path)  # an index that leads to a pickle, or out of the folder, is refused
    return config


def check_sizes(path, config):
    """InputError where a config has a size, a context or a reward's mean that is none."""
    text_config = config.get_text_config()
    for name, (low, high) in SIZES.items():
        size = getattr(text_config, name, low)
        good = type(size) is int and low <= size <= high
        require(good, f"{path}: config.json's {name} must be a whole number from {low} to {high}, not {shorten(size)}")
    context = context_length(text_config)
    good = is_of_type(context, int | None)
    require(good, f"{path}: config.json's context must be a whole number, not {shorten(context)}")
    mean = getattr(config, "reward_mean", 0.0)
    good = is_of_type(mean, float) and abs(mean) < 1e9  # in units of the scores' standard deviation
    require(good, f"{path}: config.json's reward_mean cannot be {shorten(mean)}")


def load_tokenizer(path, needs_eos=True):
    """The tokenizer of a model. It must know its EOS; padding falls back to EOS, since masks never look at ids."""
    path = resolve(path)
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in files):
        if is_adapter(path):
            return load_tokenizer(read_config(path)["base_model_name_or_path"], needs_eos)
        raise InputError(f"{path}: no tokenizer in this model folder")  # from_pretrained would make up an empty one
    with library_call(f"{path}: no tokenizer could be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a text")  # some settings are only looked at here
    check_vocabulary(path, tokenizer)
    if tokenizer.eos_token_id is None and needs_eos:
        raise InputError(f"{path}: the tokenizer has no EOS token, so no response could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(path, tokenizer):
    """InputError where a tokenizer gives ids for which the model beside it has no embeddings.

    A folder may hold a tokenizer alone.
    """
    if os.path.isdir(path) and not has_weights(path) and not is_adapter(path):
        return
    rows = check_model(path).get_text_config().vocab_size
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    require(
        last < rows,
        f"{path}: the tokenizer's token {token!r} has the id {last}, and the model has embeddings 0 to {rows - 1} alone; "
        "give it more (resize_token_embeddings), or take the token out of the tokenizer",
    )


def pretrained(auto, path, new_head=False, **kwargs):
    """auto.from_pretrained in float32, in eval mode, from safetensors only; weights that the folder lacks are an error.

    Code that comes with a model is never run, and nobody is asked whether to run it: a model for
    which transformers has no class is an error.

    new_head: the score head (a causal LM becomes a reward model) or an unused pooler may be missing. Adapters come merged into their base.
    """
    if is_adapter(path := resolve(path)):
        return check_weights(load_merged(pretrained, auto, path, new_head, **kwargs), path)
    check_model(path)  # nothing is loaded that was not looked at, whoever asks for it
    check_types(path)
    with library_call(f"{path}: cannot be loaded"):
        model, info = auto.from_pretrained(
            path,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **kwargs,
        )
    missing = [name for name in info["missing_keys"] if not (new_head and name.startswith(("score.", "pooler.")))]
    if missing:
        raise InputError(f"{path}: as {type(model).__name__} it lacks the weights {', '.join(sorted(missing)[:3])}")
    model = check_weights(model.eval(), path)
    # Some wrong settings only show when the model is run.
    with library_call(f"{path}: cannot be run"), torch.no_grad():
        model.base_model(input_ids=torch.tensor([[1, 2]]))
    return model


def check_weights(model, path):
    """InputError where a weight is not finite: a run that went wrong saved it. -> the model"""
    weights = dict(model.named_parameters())
    check_tensors(weights, dict.fromkeys(weights), path)
    return model


def load_policy(path, value_head=True, value_model=None, device="cpu"):
    """A run folder, model folder, adapter folder (merged into its base model) or hub name -> Policy in float32, in eval mode.

    value_model: a path is a separate value trunk, of any width (a policy's or a reward model's). Without it the trunk is shared,
    or what save_policy() put beside the weights is loaded: the value head, and the value model if it was a separate one.
    """
    path = resolve(path)
    lm = pretrained(AutoModelForCausalLM, path)
    saved_trunk = os.path.join(path, VALUE_MODEL)
    saved_head = os.path.join(path, "value_head.safetensors")
    own = not value_model
    if own and os.path.isdir(saved_trunk):
        value_model = saved_trunk
    trunk = pretrained(AutoModel, value_model) if value_head and value_model else None
    policy = Policy(lm, value_head, trunk).eval()
    check_logits(policy, path)
    if value_head and own and os.path.lexists(saved_head):
        own_head = policy.value_head.state_dict()
        tensors = read_tensors(saved_head)
        check_tensors(tensors, {name: p.shape for name, p in own_head.items()}, saved_head)
        policy.value_head.load_state_dict({name: tensors[name] for name in own_head})
    return policy.to(device)


@torch.no_grad()
def check_logits(policy, path):
    """Some architectures scale their logits; a policy that is not the LM would train quietly on something else."""
    ids = torch.tensor([[1, 2]])
    ours = policy.logits(policy.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    theirs = policy.lm(input_ids=ids, use_cache=False).logits.float()
    if (ours - theirs).norm() > 1e-3 * theirs.norm():
        raise InputError(f"{path}: {type(policy.lm).__name__} does more to its logits than Policy.logits knows")


def save_policy(policy, tokenizer, path):
    """A folder that plain AutoModelForCausalLM loads (with LoRA: PEFT); the value head and a separate value model beside it."""
    save_model(policy.lm, path)
    tokenizer.save_pretrained(path)
    if policy.value_head is not None:
        save_file({k: v.contiguous() for k, v in policy.value_head.state_dict().items()}, os.path.join(path, "value_head.safetensors"))
    if policy.value_trunk is not None:
        policy.value_trunk.save_pretrained(os.path.join(path, VALUE_MODEL))


def load_reward_model(path, device="cpu", seed=None):
    """A reward model's folder -> RewardModel. With `seed` the path is a causal LM's, whose LM head gives way to a new score head."""
    path = resolve(path)
    model = pretrained(AutoModelForSequenceClassification, path, new_head=seed is not None, num_labels=1)
    if not hasattr(model, "score"):
        raise InputError(f"{path}: {type(model).__name__} has no score head on a decoder; a reward model needs a causal LM's trunk")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        std = (model.config.get_text_config().hidden_size + 1) ** -0.5  # Stiennon et al. 2020
        model.score.weight.data.normal_(0, std, generator=generator)
    return RewardModel(model).eval().to(device)


def save_reward_model(reward_model, tokenizer, path):
    """A folder that plain AutoModelForSequenceClassification loads (with LoRA: PEFT), with config.reward_mean."""
    reward_model.model.config.pad_token_id = tokenizer.pad_token_id
    save_model(reward_model.model, path)
    tokenizer.save_pretrained(path)


# --------------------------------------------------------------------------------------------------------- what a name stands for


def is_reward_model(spec):
    """Whether a folder or hub name holds a classifier with one label, or an adapter of one. InputError: there is no model at all."""
    config, path = check_model(spec), resolve(spec)
    return read_config(path).get("task_type") == "SEQ_CLS" if is_adapter(path) else config.num_labels == 1


def fingerprint(spec):
    """What a model's name, or any file's, stands for at this moment: a digest of its files, of a hub model its commit."""
    path = resolve(spec)
    if is_adapter(path):
        return digest(digest_path(path), fingerprint(read_config(path)["base_model_name_or_path"]))
    if os.path.exists(path):
        return digest_path(path)
    return digest(path, getattr(check_model(path), "_commit_hash", None))
