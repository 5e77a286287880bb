"""Models: a causal LM as policy (with a value head), as reference and as reward model.

    B sequences, P prompt, R response, T = P + R tokens, D hidden, V vocabulary
    n response tokens of the whole micro-batch, c of a chunk of them

Every batch forward takes packed rows (packing.py). Response token j of a row stands at column
length(prompt) + j, and the hidden state one column to its left scores it.

The first half of this file is what models compute; the second half loads and saves them. Checks of
folders that anybody may have written are in hf/folders.py.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterable

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging as hf_logging

from . import ppo
from .errors import InputError, library_call, require
from .hf.adapters import is_adapter, load_merged, read_config, read_notes, resolve, save_model
from .hf.blocks import FrozenTrunk, compiled
from .hf.folders import (
    VALUE_MODEL,
    check_causal,
    check_complete,
    check_heads,
    check_model,
    check_run,
    check_shapes,
    check_vocabulary,
    check_weights,
    has_tokenizer,
    hidden_width,
    open_tokenizer,
    read_end_ids,
    read_longest_text,
    read_text_config,
)
from .hf.lora import adapters, adapters_off
from .hf.weights import find_dtype
from .packing import Packed, unflatten
from .runtime.files import digest
from .runtime.fingerprints import digest_path
from .runtime.tensors import check_tensors, read_tensors

# "newly initialized: score.weight" is what we ask for, not news.
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

# The file of a value head, beside its policy's weights.
VALUE_HEAD = "value_head.safetensors"
# The most elements of one float32 chunk of logits (64 MB and 1 GB): no [B, T, V] is ever held.
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**28}


# ------------------------------------------------------------------------------------ the policy


class Policy(nn.Module):
    """A causal LM with, for PPO, a value head: Linear(D, 1) on the trunk's last hidden state.

    The value head is zero at the start. The LM and the value head share a trunk, so that one
    forward gives log-probs and values; `value_trunk` is a separate value model instead.
    `frozen` are the blocks that need to run only once over a rollout (reference_of). A batch that
    holds their output, `batch.frozen_output`, goes on from there.
    """

    frozen: FrozenTrunk | None = None

    def __init__(self, lm, value_head: bool = True, value_trunk=None):
        super().__init__()
        self.lm = lm
        self.value_trunk = value_trunk
        self.value_head = None
        if value_head:
            trunk = lm if value_trunk is None else value_trunk
            self.value_head = nn.Linear(hidden_width(trunk.config), 1)
            # Values of 0 at first: a random head would be noise in the first advantages.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        # What rollouts with --compile keep from one to the next: hf/compiled_decode.py.
        self.linear_copies = None
        self.decoders = {}

    @property
    def shares_trunk(self) -> bool:
        """Whether a forward of the LM gives values too: by a value head on its own hidden states.

        False without a value head, and False where a value model of its own has to be run for them.
        """
        return self.value_head is not None and self.value_trunk is None

    def last_hidden(self, batch: Packed, trunk=None) -> Tensor:
        """The last hidden states [B, T, D] of the LM, or of another trunk."""
        if trunk is not None:
            return trunk(input_ids=batch.ids, use_cache=False).last_hidden_state

        # Frozen blocks have run over this batch already: the LM takes what they gave then.
        stored = contextlib.nullcontext()
        if batch.frozen_output is not None:
            stored = self.frozen.stored(self.lm, batch.frozen_output)
        with stored:
            return self.lm.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state

    def scoring_states(
        self, batch: Packed, response_mask: Tensor, trunk=None
    ) -> tuple[Tensor, Tensor]:
        """The hidden states that score the response tokens [n, D], and those tokens [n].

        response_mask [B, R]. The n tokens are those of row 0, then those of row 1, and so on.
        """
        hidden = self.last_hidden(batch, trunk)  # [B, T, D]
        row, token = response_mask.nonzero(as_tuple=True)  # [n], [n]
        column = batch.prompt_lengths[row] + token  # [n]: where the token itself stands
        # What scores a token stands one to the left of it. Rows lie one after another in memory.
        at = row * batch.ids.shape[1] + column - 1
        scoring = hidden.flatten(0, 1).index_select(0, at)  # [n, D]
        return scoring, batch.ids[row, column]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V] in float32, as in the LM's own forward."""
        logits = self.lm.get_output_embeddings()(hidden).float()
        config = self.lm.config.get_text_config()
        # Cohere multiplies its logits by a number, Granite divides them by one.
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        # Gemma 2 keeps logits between -cap and cap.
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def forward(
        self,
        batch: Packed,
        response_mask: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        correct: bool = False,
        kl_to: "Policy | None" = None,
    ) -> dict[str, Tensor]:
        """Packed rows -> {logprobs, values, entropies, correct, full_kl}, each [B, R].

        Masked positions hold 0. Log-probs and entropies are those of softmax(logits / temperature),
        the distribution that was sampled. `values` are there with a value head. On request there
        are `entropies`, `correct` (1 where the token is the most likely one) and `full_kl` (to the
        Policy `kl_to`, exact over the vocabulary).
        """
        hidden, tokens = self.scoring_states(batch, response_mask)  # [n, D], [n]
        if kl_to is not None:
            with torch.no_grad():
                ref_hidden, _ = kl_to.scoring_states(batch, response_mask)  # [n, D]
        # score_tokens itself, or with --compile a compiled copy of it.
        score = compiled(self.lm, score_tokens)

        def score_chunk(rows: slice) -> dict[str, Tensor]:
            """The outputs for some of the n tokens: {name: [c]}."""
            logits = divide(self.logits(hidden[rows]), temperature)  # [c, V]
            out = score(logits, tokens[rows], entropy)
            if correct:
                out["correct"] = (logits.argmax(-1) == tokens[rows]).float()
            # The reference is not trained, so no gradient goes through its logits.
            if kl_to is not None:
                ref_logits = divide(kl_to.logits(ref_hidden[rows]).detach(), temperature)
                out["full_kl"] = ppo.full_kl(logits, ref_logits)
            return out

        # Logits are by far the largest tensors here: they are made for a part of the tokens at a
        # time.
        vocab_size = self.lm.config.get_text_config().vocab_size
        chunk_size = max(1, MAX_LOGITS[tokens.device.type] // vocab_size)
        out = run_in_chunks(score_chunk, len(tokens), chunk_size)  # {name: [n]}

        # Values are one number a token, [n, D] @ [D]: they need no chunks.
        if self.value_head is not None:
            if self.value_trunk is not None:
                hidden, _ = self.scoring_states(batch, response_mask, self.value_trunk)
            out["values"] = apply_head(self.value_head, hidden)
        return {name: unflatten(flat, response_mask) for name, flat in out.items()}

    def final_values(self, batch: Packed) -> Tensor:
        """The value after the last token of every row: [B].

        A truncated response is bootstrapped with it.
        """
        hidden = self.last_hidden(batch, self.value_trunk)  # [B, T, D]
        return apply_head(self.value_head, hidden_at_end(hidden, batch))


def divide(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature. At 1 they are left alone: no tensor here takes longer to go through."""
    if temperature == 1:
        return logits
    return logits / temperature


def score_tokens(logits: Tensor, tokens: Tensor, entropy: bool) -> dict[str, Tensor]:
    """logits [c, V], tokens [c] -> {logprobs and, on request, entropies}, each [c].

    With --compile it is compiled, and goes through the logits fewer times.
    """
    logp = logits.log_softmax(-1)
    # logp.gather() gives the same numbers, but the compiler would write zeros [c, V] for its
    # gradient.
    out = {"logprobs": -nll_loss(logp, tokens, reduction="none")}
    if entropy:
        out["entropies"] = ppo.entropy(logp, logp.exp())
    return out


def run_in_chunks(
    function: Callable[[slice], dict[str, Tensor]], n: int, size: int
) -> dict[str, Tensor]:
    """function(slice of at most `size` rows) -> {name: [c]}, run over n rows -> {name: [n]}.

    Where there are several chunks, the backward pass runs the function again for each, so that
    never more than one chunk of logits is held.
    """
    if n <= size:
        return function(slice(0, n))

    # checkpoint() forgets a chunk's logits until the backward pass makes them again. Without
    # gradients nothing is kept anyway.
    chunks = []
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        if torch.is_grad_enabled():
            chunks.append(checkpoint(function, rows, use_reentrant=False))
        else:
            chunks.append(function(rows))
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def hidden_at_end(hidden: Tensor, batch: Packed) -> Tensor:
    """Hidden states [B, T, D] -> those of the last real token of each row: [B, D]."""
    rows = torch.arange(len(batch), device=hidden.device)
    return hidden[rows, batch.lengths - 1]


def apply_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Linear(D, 1) in float32, also under bfloat16 autocast: [n, D] -> [n].

    Rounded scores would tie, and rounded values are noise.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())[:, 0]


# --------------------------------------------------------------------------------- the reference


def reference_of(policy: Policy, share: bool = True) -> Policy:
    """The reference policy pi_ref: `policy` as it is now, before training.

    What is frozen in the policy is shared with it, and the rest is copied. With share=False all is
    copied: FSDP shards each model on its own. With LoRA the reference is the policy without its
    adapters. Where the embeddings and bottom blocks are frozen, both then know that these need to
    run only once over a rollout.
    """
    # The output of frozen blocks is the same in both models, so one run of them serves both.
    policy.frozen = FrozenTrunk(policy.lm)
    if adapters(policy.lm):
        reference = WithoutAdapters(policy)
    else:
        # deepcopy takes what it finds here for copied already.
        shared = {}
        if share:
            shared = {id(p): p for p in policy.lm.parameters() if not p.requires_grad}
        lm = copy.deepcopy(policy.lm, shared)
        reference = Policy(lm, value_head=False).requires_grad_(False)
    reference.frozen = policy.frozen
    return reference


class WithoutAdapters(Policy):
    """The reference of a policy with LoRA: the same LM with its adapters off.

    So there is no second copy in memory.
    """

    def __init__(self, policy: Policy):
        super().__init__(policy.lm, value_head=False)
        self.policy = policy  # FSDP gathers the LM's weights with the rest of it

    def scoring_states(self, *args, **kwargs):
        with adapters_off(self.lm):
            return super().scoring_states(*args, **kwargs)

    def logits(self, hidden):
        with adapters_off(self.lm.get_output_embeddings()):
            return super().logits(hidden)


# ------------------------------------------------------------------------------ the reward model


class RewardModel(nn.Module):
    """A trunk and Linear(D, 1) on the hidden state of the last real token: [B, T] -> [B].

    It is an HF sequence classifier with one label. The position comes from the lengths, never from
    `ids != pad`. Scores are standardised: 1/std is folded into the score weight, and the mean (in
    units of the std) is config.reward_mean, applied here. Plain HF loading gives the same scores up
    to that constant, if pad differs from EOS. config.reward_std keeps the std.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: Packed) -> Tensor:
        """Packed rows -> scores [B], float32."""
        output = self.model.base_model(input_ids=batch.ids, use_cache=False)
        last = hidden_at_end(output.last_hidden_state, batch)  # [B, D]
        mean = getattr(self.model.config, "reward_mean", 0.0)
        return apply_head(self.model.score, last) - mean

    @torch.no_grad()
    def standardise(self, mean: float, std: float):
        """After this, scores that had this mean and standard deviation have 0 and 1."""
        config = self.model.config
        # (w . h - own_mean - mean) / std = (w / std) . h - (own_mean + mean) / std
        own_mean = getattr(config, "reward_mean", 0.0)
        own_std = getattr(config, "reward_std", 1.0)
        self.model.score.weight /= std
        config.reward_mean = float((own_mean + mean) / std)
        config.reward_std = float(own_std * std)

    @torch.no_grad()
    def undo_standardise(self):
        """Give the score head the weights that it was trained to, before it was standardised."""
        config = self.model.config
        self.model.score.weight *= config.reward_std
        config.reward_mean = 0.0
        config.reward_std = 1.0


# ---------------------------------------------------------------------------- loading and saving


def load_policy(
    path: str, value_head: bool = True, value_model: str | None = None, device="cpu"
) -> Policy:
    """A run folder, model folder, adapter folder or hub name -> Policy, float32, in eval mode.

    An adapter is merged into its base model. value_model: the path of a separate value trunk, of
    any width (a policy's or a reward model's). Without it the trunk is shared, or what
    save_policy() put beside the weights is loaded: the value head, and the value model if it was a
    separate one. InputError: hf/folders.py.
    """
    path = resolve(path)
    require(
        not check_model(path).is_encoder_decoder,
        f"{path}: an encoder-decoder, where a policy is a decoder alone",
    )
    lm = pretrained(transformers.AutoModelForCausalLM, path)

    # A value model that the caller names starts with a new value head.
    saved_trunk = os.path.join(path, VALUE_MODEL)
    saved_head = os.path.join(path, VALUE_HEAD)
    uses_saved = value_head and not value_model
    if uses_saved and os.path.isdir(saved_trunk):
        value_model = saved_trunk

    value_trunk = None
    if value_head and value_model:
        value_trunk = pretrained(transformers.AutoModel, value_model)
        check_causal(value_model, value_trunk)
    policy = Policy(lm, value_head, value_trunk).eval()
    check_causal(path, lm)
    check_logits(path, policy)
    if uses_saved and os.path.lexists(saved_head):
        load_value_head(policy.value_head, saved_head)
    return policy.to(device)


@torch.no_grad()
def check_logits(path: str, policy: Policy):
    """InputError where Policy.logits is not what the LM itself computes.

    Some architectures scale their logits; the policy would train quietly on something else.
    """
    # Two tokens will show it. 1e-3 leaves room for rounding; a scale or cap should change more.
    ids = torch.tensor([[1, 2]])
    hidden = policy.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = policy.logits(hidden)
    theirs = policy.lm(input_ids=ids, use_cache=False).logits.float()
    if (ours - theirs).norm() > 1e-3 * theirs.norm():
        name = type(policy.lm).__name__
        raise InputError(
            f"{path}: {name} does more to its logits than Policy.logits knows; take a model of "
            "another architecture"
        )


def load_value_head(head: nn.Linear, file: str):
    """Fill a value head from its file. InputError: other tensors, or other shapes."""
    own = head.state_dict()
    tensors = read_tensors(file)
    check_tensors(tensors, {name: p.shape for name, p in own.items()}, file)
    head.load_state_dict({name: tensors[name] for name in own})


def save_policy(policy: Policy, tokenizer, path: str):
    """Write a folder that plain AutoModelForCausalLM loads (with LoRA: PEFT).

    The value head and a separate value model are written beside it.
    """
    save_model(policy.lm, path)
    tokenizer.save_pretrained(path)
    if policy.value_head is not None:
        tensors = policy.value_head.state_dict()
        tensors = {name: p.contiguous() for name, p in tensors.items()}
        save_file(tensors, os.path.join(path, VALUE_HEAD))
    if policy.value_trunk is not None:
        save_model(policy.value_trunk, os.path.join(path, VALUE_MODEL))


def load_reward_model(path: str, device="cpu", seed: int | None = None) -> RewardModel:
    """A reward model's folder -> RewardModel, float32, in eval mode.

    With `seed` the path is a causal LM's, whose LM head gives way to a new score head. InputError:
    an encoder, or what hf/folders.py refuses.
    """
    path = resolve(path)
    has_new_head = seed is not None
    config = check_model(path)
    require(
        not is_classifier(config) or config.num_labels == 1,
        f"{path}: a classifier of {config.num_labels} labels, where a reward model has one; take "
        "the model that it was made from",
    )
    model = pretrained(
        transformers.AutoModelForSequenceClassification, path, has_new_head, num_labels=1
    )
    if not hasattr(model, "score"):
        raise InputError(
            f"{path}: {type(model).__name__} has no score head on a decoder; a reward model needs "
            "a causal LM's trunk"
        )
    check_causal(path, model)
    if has_new_head:
        generator = torch.Generator().manual_seed(seed)
        # Stiennon et al. 2020: 1 / sqrt(D + 1)
        std = (hidden_width(model.config) + 1) ** -0.5
        model.score.weight.data.normal_(0, std, generator=generator)
        # The trunk may be that of a reward model, whose head had a scale of its own.
        model.config.reward_mean = 0.0
        model.config.reward_std = 1.0
    return RewardModel(model).eval().to(device)


def save_reward_model(reward_model: RewardModel, tokenizer, path: str):
    """Write a folder that plain AutoModelForSequenceClassification loads (with LoRA: PEFT).

    config.reward_mean holds the mean.
    """
    reward_model.model.config.pad_token_id = tokenizer.pad_token_id
    save_model(reward_model.model, path)
    tokenizer.save_pretrained(path)


def pretrained(auto, path: str, new_head: bool = False, **kwargs):
    """auto.from_pretrained in float32, in eval mode, from safetensors only.

    Every model of this project is loaded here. Adapters come merged into their base. Code that
    comes with a model is never run, and nobody is asked whether to run it. new_head: the score head
    (a causal LM becomes a reward model) or an unused pooler may be missing. InputError: other
    missing weights, a model for which transformers has no class, and what hf/folders.py refuses.
    """
    path = resolve(path)
    if is_adapter(path):
        model = load_merged(pretrained, auto, path, new_head, **kwargs)
        check_weights(path, model)
        return model

    # Nothing is loaded that was not looked at, whoever asks for it.
    check_model(path)
    stored_dtype = find_dtype(path)
    with library_call(f"{path}: cannot be loaded"):
        model, info = auto.from_pretrained(
            path,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_shapes() refuses them, and names one
            **kwargs,
        )
    model.eval()
    model.stored_dtype = stored_dtype  # save_model() writes it so again
    check_shapes(path, info["mismatched_keys"])
    check_complete(path, model, info["missing_keys"], new_head)
    if not new_head and auto is not transformers.AutoModel:
        check_heads(path, model, info["unexpected_keys"])
    check_weights(path, model)
    check_run(path, model)
    return model


def load_tokenizer(path: str, needs_eos: bool = True):
    """The tokenizer of a model, which must know its EOS unless needs_eos is False.

    Its `end_ids` are the ids at which a response ends (read_end_ids). A tokenizer without a padding
    token, or with one that the model has no embedding for, pads with EOS: masks never look at ids.
    InputError: hf/folders.py.
    """
    path = resolve(path)
    if not has_tokenizer(path):
        if is_adapter(path):
            base = read_config(path)["base_model_name_or_path"]
            return load_tokenizer(base, needs_eos)
        # from_pretrained would make up an empty one.
        raise InputError(f"{path}: no tokenizer in this model folder")

    with library_call(f"{path}: no tokenizer could be loaded"):
        tokenizer = open_tokenizer(path)
        tokenizer("a text")  # some settings are only looked at here
    tokenizer.model_max_length = read_longest_text(path, tokenizer)
    text_config = read_text_config(path)
    tokenizer.end_ids = read_end_ids(path, tokenizer, text_config)

    n_embeddings = None
    if text_config is not None:
        n_embeddings = text_config.vocab_size
        check_vocabulary(path, tokenizer, n_embeddings)
    if tokenizer.eos_token_id is None and needs_eos:
        raise InputError(f"{path}: the tokenizer has no EOS token, so no response could ever end")

    # A padding id is embedded like any other, and what comes of it is never read.
    pad_id = tokenizer.pad_token_id
    is_beyond = pad_id is not None and n_embeddings is not None and pad_id >= n_embeddings
    if pad_id is None or is_beyond:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_shared_tokenizer(path: str, others: Iterable[str], needs_eos: bool = True):
    """The tokenizer of a model, which some other models must share. InputError: one has another."""
    tokenizer = load_tokenizer(path, needs_eos)
    for other in others:
        is_same = load_tokenizer(other, needs_eos=False).get_vocab() == tokenizer.get_vocab()
        require(is_same, f"{path} and {other} have different tokenizers")
    return tokenizer


def check_reads_tokens(path: str, tokenizer):
    """InputError where a model cannot read token ids of this tokenizer, which is another model's.

    It lacks some of them, or its own tokenizer means other words by them. Tokens that were added to
    a vocabulary, such as PAD, may differ. A folder without a tokenizer does not say what it means.
    """
    check_vocabulary(path, tokenizer, check_model(path).get_text_config().vocab_size)
    if not has_tokenizer(resolve(path)):
        return
    own_ids = load_tokenizer(path, needs_eos=False).get_vocab()
    # Reward models often have a PAD of their own, and Llama 3.1 uses some that Llama 3 reserves.
    added = tokenizer.added_tokens_decoder
    for token, token_id in tokenizer.get_vocab().items():
        require(
            token_id in added or own_ids.get(token) == token_id,
            f"{path}: its tokenizer is not the policy's, whose tokens it would read (they differ "
            f"in {token!r})",
        )


# -------------------------------------------------------------------------- what a name stands for


def is_classifier(config) -> bool:
    """Whether a model's config names a sequence classifier among its architectures."""
    names = config.architectures
    if not isinstance(names, list):  # None; a damaged config may hold anything
        return False
    return any("ForSequenceClassification" in str(name) for name in names)


def is_reward_model(spec: str) -> bool:
    """Whether a folder or hub name holds a classifier with one label, or an adapter of one.

    InputError: there is no model at all.
    """
    config = check_model(spec)
    path = resolve(spec)
    if is_adapter(path):
        return read_config(path).get("task_type") == "SEQ_CLS"
    return config.num_labels == 1


def knows_scale(spec: str) -> bool:
    """Whether a reward model says by what its scores were divided when they were standardised.

    Those that were saved before config.reward_std existed do not. InputError: no model at all.
    """
    config = check_model(spec)
    notes = read_notes(resolve(spec))  # of an adapter: the config is that of its base model
    return hasattr(config, "reward_std") or notes.get("reward_std") is not None


def fingerprint(spec: str) -> str:
    """What the name of a model, or of any file, stands for at this moment.

    A digest of its files, an adapter's base included; of a hub model its commit.
    """
    path = resolve(spec)
    if is_adapter(path):
        base = read_config(path)["base_model_name_or_path"]
        return digest(digest_path(path), fingerprint(base))
    if os.path.exists(path):
        return digest_path(path)
    commit = getattr(check_model(path), "_commit_hash", None)
    return digest(path, commit)
