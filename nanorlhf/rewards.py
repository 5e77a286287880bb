"""The reward stack: anything that gives a text a number.

A reward is named by one string, which kind_of() understands:
    FOLDER or hub name       a reward model of train_rm.py, a SARM, or any HF sequence classifier (its positive logit)
    FILE.py:FUNCTION         a Python function of (prompts, responses), two lists of texts, that returns one float for each
    FILE.tsv or FILE.txt     a lexicon, WORD<TAB>VALUE...: the sum of the response's words' values / 5, clipped to +-10
    world:gold               the embedded world's gold reward

load_reward() turns it into a function Answers -> scores [B]. Several rewards side by side, the members of an ensemble, are scores
[K, B] (load_rewards, score_all); ensemble.py makes one of them.
"""

import inspect
import math
import os
import re
from collections.abc import Mapping, Set
from numbers import Real

import torch
from transformers import AutoModelForSequenceClassification

from . import world
from .data import encode_prompts, encode_responses
from .errors import InputError, require, user_code
from .hf.folders import check_model, context_length
from .models import RewardModel, fingerprint, load_tokenizer, pretrained
from .packing import pack
from .runtime.distributed import autocast
from .runtime.files import decode_text, digest, digest_file, python_function, read_bytes
from .runtime.fsdp import gathered
from .sarm import SARM, check_sarm, is_sarm


def score_all(rewards, parts, dist=None):
    """{name: reward}, a list of Answers, B in all -> scores [K, B] in float32 on the CPU.

    One row a reward. See score() for `dist`.
    """
    return torch.stack([score(reward, parts, dist) for reward in rewards.values()])


def score(reward, parts, dist=None):
    """A list of Answers -> their scores [B].

    With `dist` all processes call this: a model in shards is gathered for it, once, and an
    InputError on one process is raised on all. A process without a text asks for no scores.
    """

    def mine():
        scores = []
        for answers in parts:
            scores.append(reward(answers) if len(answers) else torch.zeros(0))
        return torch.cat(scores)

    with gathered(getattr(reward, "module", None)):
        return dist.together(mine) if dist else mine()


def reward_names(specs):
    """What rewards are called in records: the last parts of their paths, or the whole paths where two would be the same."""
    names = [os.path.basename(os.path.normpath(spec)) for spec in specs]
    return names if len(set(names)) == len(names) else list(specs)


def expand(specs):
    """Specs (or one) in which {seed} stands for the folders that exist -> all specs, in the order of their seeds."""
    out = []
    for spec in [specs] if isinstance(specs, str) else specs:
        head, placeholder, _ = spec.partition("{seed}")
        folder, start = os.path.split(head)
        entries = os.listdir(folder or ".") if placeholder and os.path.isdir(folder or ".") else []
        found = [re.match(re.escape(start) + r"(\d+)", name) for name in entries]
        paths = [spec.replace("{seed}", seed) for seed in sorted({m[1] for m in found if m}, key=int)]
        paths = [path for path in paths if os.path.exists(path)] if placeholder else [spec]
        require(paths, f"{spec}: no such folder for any seed (python train_rm.py --members 5 trains runs/rm/seed_0 to runs/rm/seed_4)")
        out += paths
    require(out, "--reward_model names no reward")
    twice = [spec for spec in out if out.count(spec) > 1]
    require(not twice, f"--reward_model names {twice[0] if twice else ''} twice")
    return out


def kind_of(spec: str) -> str:
    """What a reward's name stands for: "gold", "function", "lexicon" or "model".

    By the name alone: nothing is opened. Which kind of model it is its folder says (is_sarm).
    """
    if spec == "world:gold":
        return "gold"
    if ".py:" in spec:
        return "function"
    if spec.endswith((".tsv", ".txt")):
        return "lexicon"
    return "model"


def check_reward(spec):
    """Look at what a reward's name stands for before any model is loaded; errors in one line."""
    kind = kind_of(spec)
    if kind == "function":
        python_function(spec)
    elif kind == "lexicon":
        read_lexicon(spec)
    elif kind == "model" and is_sarm(spec):
        check_sarm(spec)
    elif kind == "model":
        check_model(spec)


def fingerprint_reward(spec: str) -> str:
    """What a reward's name stands for at this moment: a digest of its files, of a hub model its commit.

    Pitfall: of FILE.py:FUNCTION it is that file alone, not what it imports.
    """
    kind = kind_of(spec)
    if kind == "gold":
        return digest(spec, digest_file(world.__file__))
    if kind == "function":
        path, _, name = spec.rpartition(":")
        return digest(name, digest_file(path))
    return fingerprint(spec)


def load_rewards(specs, tokenizer, dist, micro_batch_size=64, dtype="float32"):
    """Rewards by their names in records: {name: function Answers -> scores [B]}."""
    return {name: load_reward(spec, tokenizer, dist, micro_batch_size, dtype) for name, spec in zip(reward_names(specs), specs)}


def load_reward(spec, tokenizer, dist, micro_batch_size=64, dtype="float32"):
    """A reward's name -> function Answers -> scores [B] (float32, CPU). `tokenizer` is the policy's; None: there is only text.

    dtype: of a model's matrix products. In bfloat16 a score moves by about 1e-2 of its unit; the score head stays in float32.
    """
    kind = kind_of(spec)
    if kind == "gold":
        return text_reward(spec, world.gold)
    if kind == "function":
        return text_reward(spec, python_function(spec))
    if kind == "lexicon":
        lexicon, note = read_lexicon(spec)
        if note:
            dist.print(note)
        return text_reward(spec, lexicon_reward(lexicon))
    return model_reward(spec, tokenizer, dist, micro_batch_size, dtype)


# ------------------------------------------------------------------------------------------------------------------------ on texts


def text_reward(name, function):
    """A function of (prompts, responses) -> a reward that checks what it returns."""

    def reward(answers):
        # The function gets lists of its own: it may sort or empty them, and the next reward
        # reads the same answers.
        prompts = list(answers.prompts)
        responses = list(answers.responses)
        with user_code(f"the reward {name} raised"):
            returned = function(prompts, responses)
        with user_code(f"the reward {name} must return one float for each response:"):
            scores = read_scores(returned)
        require(len(scores) == len(answers), f"the reward {name} returned {len(scores)} scores for {len(answers)} responses")
        for score, response in zip(scores, answers.responses):
            fits = abs(score) <= torch.finfo(torch.float32).max  # of nan and inf it is False
            require(fits, f"the reward {name} returned {score} for the response {response[:60]!r}")
        return torch.tensor(scores)

    return reward


def read_scores(returned) -> list[float]:
    """The scores that a function returned, in any iterable that keeps their order, as floats.

    Each is a real number of Python, numpy or torch. TypeError: anything else, such as digits in text.
    """
    if inspect.iscoroutine(returned):
        returned.close()  # else Python warns that nobody has waited for it
        raise TypeError("an async function cannot be a reward")
    if isinstance(returned, (str, bytes, bytearray, Mapping, Set)):
        raise TypeError(f"it returned a {type(returned).__name__}")
    scores = []
    for x in returned:
        number = x.item() if hasattr(x, "item") else x
        if not isinstance(number, Real):
            raise TypeError(f"{number!r:.60} is of type {type(number).__name__}")
        scores.append(float(number))
    return scores


def read_lexicon(path):
    """WORD<TAB>VALUE[<TAB>anything] a line -> {word: value}, a sentence on lines without effect or "".

    A word that cannot be one of find_words() never matches: "very good", say, which is two.
    """
    lexicon, lost, again = {}, [], []
    for number, line in enumerate(decode_text(read_bytes(path), path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            word, value = line.split("\t")[:2]
            value = float(value)
            require(math.isfinite(value), "not finite")
        except ValueError:
            raise InputError(f"{path}:{number}: not WORD<TAB>VALUE: {line[:40]!r}") from None
        word = word.strip().lower()
        if find_words(word) != [word]:
            lost.append(word)
            continue
        if word in lexicon:
            again.append(word)
        lexicon[word] = value
    require(lexicon or lost, f"{path}: the lexicon is empty")
    require(lexicon, f"{path}: none of its {len(lost)} lines can match a word of a text, such as {lost[:1]}")
    notes = []
    if lost:
        notes.append(f"{len(lost)} can match no word of a text, such as {lost[0]!r}")
    if again:
        notes.append(f"{len(again)} name a word again, whose last value counts, such as {again[0]!r}")
    return lexicon, f"{path}: of its lines {', and '.join(notes)}" if notes else ""


def find_words(text):
    """The words of a text, in small letters, as lexicons have them."""
    return re.findall(r"[a-z][a-z'-]*", text.lower())


def lexicon_reward(lexicon):
    """Controlled sentiment: sum over the words of the response of their values / 5, clipped to +-10."""

    def reward(prompts, responses):
        totals = (sum(lexicon.get(word, 0.0) for word in find_words(text)) for text in responses)
        return [max(-10.0, min(10.0, total / 5)) for total in totals]

    return reward


# ----------------------------------------------------------------------------------------------------------------------- by a model


def model_reward(path, tokenizer, dist, micro_batch_size, dtype):
    """A reward model, a SARM, or any other sequence classifier by its positive logit, as a reward."""
    if is_sarm(path):
        module = model = SARM.from_pretrained(path)
    else:
        model = pretrained(AutoModelForSequenceClassification, path)
        module = RewardModel(model).eval() if model.config.num_labels == 1 and hasattr(model, "score") else model
    is_scalar = isinstance(module, (RewardModel, SARM))
    module = dist.wrap(module.to(dist.load_device).requires_grad_(False), dtype=dtype)
    if is_scalar:
        scores_of = scalar_scorer(module, model.config, path, tokenizer, dist, micro_batch_size)
    else:
        scores_of = classifier_scorer(module, path, dist, micro_batch_size)

    @torch.no_grad()
    def reward(answers):
        with autocast(dist, dtype):
            scores = scores_of(answers).cpu()
        require(bool(scores.isfinite().all()), f"the reward model {path} gave a score that is not finite")
        return scores

    reward.module = module  # for score(), which gathers its shards
    return reward


def identity(tokenizer):
    """Equal for tokenizers that do the same to any text."""
    words = hash(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else id(tokenizer)
    return words, tokenizer.bos_token_id, tokenizer.eos_token_id  # a base and a chat model may differ in EOS alone


def packed_reader(config, path, tokenizer, dist, micro_batch_size):
    """-> a function Answers -> [(rows, Packed)], of similar length each, as the model of this config in `path` reads them.

    With the policy's own tokenizer the sampled ids are read as they are: never decoded and tokenised again.
    """
    own = load_tokenizer(path)
    same = tokenizer is not None and own.get_vocab() == tokenizer.get_vocab()
    context, rows = context_length(config), config.get_text_config().vocab_size
    key = ("sampled ids" if same else identity(own), micro_batch_size)

    def prepare(answers):
        """What all members with this tokenizer read."""
        batch = answers.batch
        if not same:
            responses = encode_responses(own, answers.responses)
            if batch is not None:  # one that was cut off has no EOS
                last = batch.ids[torch.arange(len(batch)), (batch.lengths - 1).cpu()].tolist()
                responses = [r if i == tokenizer.eos_token_id else r[:-1] or r for r, i in zip(responses, last)]
            batch = pack(encode_prompts(own, answers.prompts), responses, own.pad_token_id)
        batch = batch.to(dist.device)
        return [(rows, batch.rows(rows)) for rows in batch.micro_batches(micro_batch_size)]

    def read(answers):
        if key not in answers.micro_batches:
            answers.micro_batches[key] = prepare(answers)
        longest = max(part.ids.shape[1] for _, part in answers.micro_batches[key])
        require(not context or longest <= context, f"{path}: a text of {longest} tokens, a context of {context}")
        for _, part in answers.micro_batches[key]:
            low, high = (int(x) for x in part.ids.aminmax())
            odd = low if low < 0 else high
            require(0 <= low and high < rows, f"{path}: a text holds the token {odd}, and the model has embeddings 0 to {rows - 1} alone")
        return answers.micro_batches[key]

    return read


def scalar_scorer(module, config, path, tokenizer, dist, micro_batch_size):
    """The scores of a module Packed -> scores, on packed rows."""
    read = packed_reader(config, path, tokenizer, dist, micro_batch_size)

    def score(answers):
        scores = torch.zeros(len(answers), device=dist.device)
        for rows, part in read(answers):
            scores[rows] = module(part)
        return scores

    return score


def classifier_scorer(model, path, dist, micro_batch_size):
    """The positive logit on "prompt response": the label that is called positive (or pos), else the last one."""
    tokenizer = load_tokenizer(path, needs_eos=False)
    require(tokenizer.pad_token_id is not None, f"{path}: the tokenizer has neither a padding nor an EOS token")
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"  # the response must stay
    context = min(tokenizer.model_max_length, context_length(model.config) or tokenizer.model_max_length, 2**20)
    labels = {name.lower(): i for i, name in model.config.id2label.items()}
    label = labels.get("positive", labels.get("pos", model.config.num_labels - 1))

    key = ("text", identity(tokenizer), context, micro_batch_size)

    def prepare(answers):
        """What all members with this tokenizer read: (rows, padded inputs) of similar length each."""
        texts = [f"{p} {r}" for p, r in zip(answers.prompts, answers.responses)]
        encoded = tokenizer(texts, truncation=True, max_length=context)
        order = torch.tensor([len(ids) for ids in encoded.input_ids]).argsort(stable=True)
        parts = [{name: [values[i] for i in rows] for name, values in encoded.items()} for rows in order.split(micro_batch_size)]
        return [(rows, tokenizer.pad(part, return_tensors="pt")) for rows, part in zip(order.split(micro_batch_size), parts)]

    def score(answers):
        if key not in answers.micro_batches:
            answers.micro_batches[key] = prepare(answers)
        scores = torch.zeros(len(answers))
        for rows, inputs in answers.micro_batches[key]:
            scores[rows] = model(**inputs.to(dist.device)).logits[:, label].float().cpu()
        return scores

    return score
