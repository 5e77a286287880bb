"""The reward stack: anything that gives a text a number.

A reward is named by one string, which kind_of() understands:
    FOLDER or hub name       a reward model of train_rm.py, a SARM, or any HF sequence classifier
    FOLDER#LABEL             (the logit of this label, or of the one that is called positive)
    FILE.py:FUNCTION         a Python function of (prompts, responses) or (prompts, responses, rows)
                             that returns one float for each; see text_reward()
    FILE.tsv or FILE.txt     a lexicon, WORD<TAB>VALUE...: the sum of the response's words' values
                             / 5, clipped to +-10
    world:gold               the embedded world's gold reward

load_reward() turns the name into a function Answers -> scores [B]. Several rewards side by side,
the members of an ensemble, are scores [K, B] (load_rewards, score_all); ensemble.py makes one of
them.

    B answers, K rewards, T tokens
"""

import copy
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Set
from numbers import Real

import torch
import transformers
from torch import Tensor

from . import world
from .chat_templates import end_ids, render
from .chats import as_chat, is_chat, show
from .errors import InputError, library_call, require, user_code
from .hf.adapters import resolve
from .hf.folders import check_model, context_length, readable_length
from .models import RewardModel, fingerprint, is_classifier, load_tokenizer, pretrained
from .packing import Answers, Packed, micro_batches, pack
from .runtime.distributed import Dist, autocast
from .runtime.files import decode_text, digest, digest_file, python_function, read_bytes
from .runtime.fsdp import gathered
from .sarm import SARM, check_sarm, is_sarm
from .tokens import Encoded, cut_items, encode

Reward = Callable[[Answers], Tensor]


def score_all(rewards: dict[str, Reward], parts: list[Answers], dist: Dist | None = None) -> Tensor:
    """{name: reward}, a list of Answers, B in all -> scores [K, B] in float32 on the CPU.

    One row a reward. See score() for `dist`.
    """
    return torch.stack([score(reward, parts, dist) for reward in rewards.values()])


def score(reward: Reward, parts: list[Answers], dist: Dist | None = None) -> Tensor:
    """A list of Answers -> their scores [B].

    With `dist` all processes call this: a model in shards is gathered for it, once, and an
    InputError on one process is raised on all. A process without a text asks for no scores.
    """

    def score_mine() -> Tensor:
        scores = []
        for answers in parts:
            if len(answers) > 0:
                scores.append(reward(answers))
            else:
                scores.append(torch.zeros(0))
        return torch.cat(scores)

    # A reward that is a function has no module to gather. together() raises an InputError of one
    # process on all: else the others would wait for it for ever.
    module = getattr(reward, "module", None)
    with gathered(module):
        if dist is None:
            return score_mine()
        return dist.together(score_mine)


# ------------------------------------------------------------------------------ names of rewards


def reward_names(specs: list[str]) -> list[str]:
    """What rewards are called in records: the last parts of their paths.

    Where two of these would be the same, all are called by their whole paths.
    """
    names = [os.path.basename(os.path.normpath(spec)) for spec in specs]
    if len(set(names)) < len(names):
        return list(specs)
    return names


def expand(specs: str | list[str], flag: str = "--reward_model") -> list[str]:
    """Names of rewards, or one, in which {seed} stands for the folders that exist -> all names.

    flag: where the names stand, for errors. InputError: no folder for a {seed}, no name at all, or
    the same name twice.
    """
    if isinstance(specs, str):
        specs = [specs]
    expanded = []
    for spec in specs:
        if "{seed}" in spec:
            expanded += expand_seeds(spec)
        else:
            expanded.append(spec)

    require(expanded, f"{flag} names no reward")
    names = {}  # {what a name stands for: the name}
    for spec in expanded:
        reward = locate(spec)
        if reward in names:
            other = names[reward]
            also = "" if other == spec else f" (also as {other})"
            raise InputError(f"{flag} names {spec} twice{also}")
        names[reward] = spec
    return expanded


def locate(spec: str) -> tuple[str, str]:
    """Where a reward is, and which one there: the same for rm, ./rm, rm/model and links to them."""
    kind = kind_of(spec)
    which = ""
    path = spec
    if kind == "function":
        path, _, which = spec.rpartition(":")
    elif kind == "model":
        path, which = split_label(spec)
        path = resolve(path)
    if os.path.exists(path):
        path = os.path.realpath(path)
    return path, which


def expand_seeds(spec: str) -> list[str]:
    """A path with {seed} in it -> the paths that exist, in the order of their seeds."""
    # 'runs/rm/seed_{seed}' -> the folder 'runs/rm', and names in it that start with 'seed_'.
    before_seed = spec.partition("{seed}")[0]
    folder, start = os.path.split(before_seed)
    folder = folder or "."

    # Numbers that stand in the place of {seed} in names beside it. The rest of the path may still
    # be missing.
    seeds = set()
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            match = re.match(re.escape(start) + r"(\d+)", name)
            if match:
                seeds.add(match[1])

    # By number: seed_10 comes after seed_9.
    paths = []
    for seed in sorted(seeds, key=int):
        path = spec.replace("{seed}", seed)
        if os.path.exists(path):
            paths.append(path)
    require(
        paths,
        f"{spec}: no such folder for any seed "
        "(python train_rm.py --members 5 trains runs/rm/seed_0 to runs/rm/seed_4)",
    )
    return paths


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


def check_reward(spec: str):
    """Look at what a reward's name stands for before any model is loaded; errors in one line."""
    kind = kind_of(spec)
    if kind == "function":
        reward_function(spec)
    elif kind == "lexicon":
        read_lexicon(spec)
    elif kind == "model":
        path, label = split_label(spec)
        is_code = os.path.isfile(path) and path.endswith(".py")
        require(not is_code, f"{spec}: name a function in it, as {spec}:FUNCTION")
        if is_sarm(path):
            check_sarm(path)
            require(not label, f"{spec}: a SARM gives one score, and has no label {label!r}")
        else:
            check_label(path, check_model(path), label)


def fingerprint_reward(spec: str) -> str:
    """What a reward's name stands for now: a digest of its files, or of a hub model's commit.

    Pitfall: of FILE.py:FUNCTION it is that file alone, not what it imports.
    """
    kind = kind_of(spec)
    if kind == "gold":
        return digest(spec, digest_file(world.__file__))
    if kind == "function":
        path, _, name = spec.rpartition(":")
        return digest(name, digest_file(path))
    # The rest are models, which may have a label, and the files of lexicons, which have none.
    path, label = split_label(spec)
    if label:
        return digest(label, fingerprint(path))
    return fingerprint(path)


def split_label(spec: str) -> tuple[str, str]:
    """FOLDER#LABEL -> the model's path, and the label, or ''."""
    # The name of a folder may itself hold a #.
    if os.path.exists(spec):
        return spec, ""
    path, _, label = spec.partition("#")
    return path, label


def check_label(path: str, config, label: str):
    """InputError where a sequence classifier's label has to be named, or is not there.

    What is no classifier, such as a language model, is refused when it is loaded.
    """
    if label or is_classifier(config):
        choose_label(path, config, label)


def choose_label(path: str, config, label: str) -> int:
    """The place of the logit that is the reward, among those of a sequence classifier.

    It is that of `label`, else of the label that is called positive or pos; a model with one logit
    needs no label. InputError, with all labels: nobody says which one is good.
    """
    labels = {str(name).lower(): int(i) for i, name in config.id2label.items()}
    known = ", ".join(f"{path}#{name}" for name in config.id2label.values())
    if label:
        require(label.lower() in labels, f"{path}: no label {label!r}; there are {known}")
        return labels[label.lower()]
    if config.num_labels == 1:
        return 0
    for name in ("positive", "pos"):
        if name in labels:
            return labels[name]
    raise InputError(f"{path}: which of its labels is the reward? Name one of {known}")


# --------------------------------------------------------------------------------------- loading


def load_rewards(
    specs: list[str], tokenizer, dist: Dist, micro_batch_size: int = 64, dtype: str = "float32"
) -> dict[str, Reward]:
    """Rewards by their names in records: {name: function Answers -> scores [B]}."""
    rewards = {}
    for name, spec in zip(reward_names(specs), specs):
        rewards[name] = load_reward(spec, tokenizer, dist, micro_batch_size, dtype)
    return rewards


def load_reward(
    spec: str, tokenizer, dist: Dist, micro_batch_size: int = 64, dtype: str = "float32"
) -> Reward:
    """A reward's name -> function Answers -> scores [B] (float32, CPU).

    tokenizer: the policy's, whose sampled ids a reward model may read as they are. None: there is
    only text. dtype: of a model's matrix products. In bfloat16 a score moves by about 1e-2 of its
    unit; the score head stays in float32.
    """
    kind = kind_of(spec)
    if kind == "gold":
        return text_reward(spec, world.gold)
    if kind == "function":
        return text_reward(spec, reward_function(spec))
    if kind == "lexicon":
        lexicon, note = read_lexicon(spec)
        if note:
            dist.print(note)
        return text_reward(spec, lexicon_reward(lexicon))
    return model_reward(spec, tokenizer, dist, micro_batch_size, dtype)


# -------------------------------------------------------------------------------------- on texts


def text_reward(name: str, function: Callable) -> Reward:
    """A Python function -> a reward that checks what the function returns.

    function(prompts, responses) or function(prompts, responses, rows): lists of one length. Prompts
    are the data's own, strings or lists of messages; rows are the data's own rows, with all their
    columns. InputError, of the reward: it returned something else than one finite number for each
    response, or asked for rows where there are none.
    """
    # Scores become float32 tensors, in which a larger number would be infinite.
    largest = torch.finfo(torch.float32).max
    needs_rows = takes_rows(function)

    @torch.no_grad()
    def reward(answers: Answers) -> Tensor:
        # The function gets lists of its own: it may sort or empty them, and the next reward
        # reads the same answers.
        given = [copy.deepcopy(answers.prompts), list(answers.responses)]
        if needs_rows:
            require(
                answers.rows is not None,
                f"the reward {name} asks for the data's rows, and these answers have none",
            )
            given.append(copy.deepcopy(answers.rows))
        with user_code(f"the reward {name} raised"):
            returned = function(*given)
        with user_code(f"the reward {name} must return one float for each response:"):
            scores = read_scores(returned, len(answers))

        # Anything but a finite number for each answer would spoil the training without a word.
        n_scores = len(scores)
        n_answers = len(answers)
        require(
            n_scores == n_answers,
            f"the reward {name} returned {n_scores} scores for {n_answers} responses",
        )
        for score, response in zip(scores, answers.responses):
            fits = abs(score) <= largest  # False for nan and inf
            require(fits, f"the reward {name} returned {score} for the response {response[:60]!r}")
        return torch.tensor(scores)

    return reward


def reward_function(spec: str) -> Callable:
    """FILE.py:FUNCTION -> the function. InputError: text_reward() could not call it.

    Prompts and responses are given by their places. A function whose names are in the other order
    would score the prompts, without a word.
    """
    function = python_function(spec)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions that are written in C do not say
        return function
    given = ["prompts", "responses"]
    if takes_rows(function):
        given.append("rows")
    call = f"the reward {spec} is called with ({', '.join(given)})"
    try:
        signature.bind(*given)
    except TypeError as e:
        raise InputError(f"{call}: {e}") from None
    names = list(signature.parameters)
    require(names[1:2] != ["prompts"], f"{call}, and takes them as ({', '.join(names)})")
    return function


def takes_rows(function: Callable) -> bool:
    """Whether a reward function has a third positional argument for the data's rows.

    It is called rows, or has no value of its own. Further arguments with values are its settings.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions that are written in C do not say
        return False
    if len(parameters) < 3:
        return False
    # reward(prompts, responses, scale=2.0) asks for no rows.
    third = parameters[2]
    is_positional = third.kind in (third.POSITIONAL_ONLY, third.POSITIONAL_OR_KEYWORD)
    return is_positional and (third.name == "rows" or third.default is third.empty)


def read_scores(returned, n: int) -> list[float]:
    """The scores that a function returned, in any iterable that keeps their order, as floats.

    Each is a real number of Python, numpy or torch. TypeError: anything else, such as text, or more
    than n numbers: an iterable may have no end.
    """
    if inspect.iscoroutine(returned):
        returned.close()  # else Python warns that nobody has waited for it
        raise TypeError("an async function cannot be a reward")
    # These could be looped over as well, but they give characters, keys, or items in no order.
    if isinstance(returned, (str, bytes, bytearray, Mapping, Set)):
        raise TypeError(f"it returned a {type(returned).__name__}")

    scores = []
    for value in returned:
        if len(scores) == n:
            raise TypeError(f"it returned more than {n} scores")
        number = value
        if hasattr(value, "item"):  # numpy's and torch's numbers
            number = value.item()
        if not isinstance(number, Real):
            raise TypeError(f"{number!r:.60} is of type {type(number).__name__}")
        scores.append(float(number))
    return scores


def lexicon_reward(lexicon: dict[str, float]) -> Callable:
    """Controlled sentiment: the sum of the response's words' values / 5, clipped to +-10."""

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        scores = []
        for response in responses:
            total = sum(lexicon.get(word, 0.0) for word in find_words(response))
            scores.append(max(-10.0, min(10.0, total / 5)))
        return scores

    return reward


def find_words(text: str) -> list[str]:
    """The words of a text, in small letters, as lexicons have them."""
    return re.findall(r"[a-z][a-z'-]*", text.lower())


def read_lexicon(path: str) -> tuple[dict[str, float], str]:
    """WORD<TAB>VALUE[<TAB>anything] a line -> {word: value}, a sentence on lines without effect.

    The sentence is "" where every line has an effect. A word that cannot be one of find_words()
    never matches: "very good", say, which is two. InputError: a line of another form, or no word.
    """
    # A line without effect is reported, not refused: some lexicons have entries of two words.
    lexicon = {}
    no_match = []
    repeated = []
    lines = decode_text(read_bytes(path), path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        word, value = parse_entry(f"{path}:{number}", line)
        # Texts are cut by find_words(), so a word that it would cut or drop is never looked up.
        if find_words(word) != [word]:
            no_match.append(word)
            continue
        if word in lexicon:
            repeated.append(word)
        lexicon[word] = value

    require(lexicon or no_match, f"{path}: the lexicon is empty")
    require(
        lexicon,
        f"{path}: none of its {len(no_match)} lines can match a word of a text, "
        f"such as {no_match[:1]}",
    )
    notes = []
    if no_match:
        notes.append(f"{len(no_match)} can match no word of a text, such as {no_match[0]!r}")
    if repeated:
        notes.append(
            f"{len(repeated)} name a word again, whose last value counts, such as {repeated[0]!r}"
        )
    if not notes:
        return lexicon, ""
    return lexicon, f"{path}: of its lines {', and '.join(notes)}"


def parse_entry(place: str, line: str) -> tuple[str, float]:
    """A line of a lexicon -> its word, in small letters, and its value. InputError: no entry."""
    columns = line.split("\t")
    try:
        value = float(columns[1])
    except (IndexError, ValueError):
        value = math.nan
    require(math.isfinite(value), f"{place}: not WORD<TAB>VALUE: {line[:40]!r}")
    return columns[0].strip().lower(), value


# ------------------------------------------------------------------------------------ by a model


def model_reward(spec: str, tokenizer, dist: Dist, micro_batch_size: int, dtype: str) -> Reward:
    """A reward model, a SARM, or any other sequence classifier -> a reward."""
    path, label = split_label(spec)
    # Reward models and SARMs read packed rows: Packed -> scores [B]. Other classifiers read what
    # their own tokenizer makes of the texts.
    if is_sarm(path):
        model = SARM.from_pretrained(path)
        module = model
        reads_packed = True
    else:
        model = pretrained(transformers.AutoModelForSequenceClassification, path)
        module = model
        reads_packed = model.config.num_labels == 1 and hasattr(model, "score")
        if reads_packed:
            module = RewardModel(model).eval()
        else:
            check_reads_text(path, model)

    # A reward is never trained. Under FSDP it is loaded on the CPU, and goes into shards here.
    module = dist.wrap(module.to(dist.load_device).requires_grad_(False), dtype=dtype)
    if reads_packed:
        score_answers = packed_scorer(module, model.config, path, tokenizer, dist, micro_batch_size)
    else:
        place = choose_label(path, model.config, label)
        score_answers = classifier_scorer(module, path, place, dist, micro_batch_size)

    # The scores of all rewards are stacked on the CPU.
    @torch.no_grad()
    def reward(answers: Answers) -> Tensor:
        with autocast(dist, dtype):
            scores = score_answers(answers).cpu()
        is_finite = bool(scores.isfinite().all())
        require(is_finite, f"the reward model {path} gave a score that is not finite")
        return scores

    reward.module = module  # for score(), which gathers its shards
    return reward


@torch.no_grad()
def check_reads_text(path: str, model):
    """InputError where a classifier cannot score what its own tokenizer makes of a text."""
    tokenizer = load_tokenizer(path, needs_eos=False)
    with library_call(f"{path}: cannot score a text"):
        model(**tokenizer("a text", return_tensors="pt"))


def packed_scorer(
    module, config, path: str, tokenizer, dist: Dist, micro_batch_size: int
) -> Reward:
    """The scores of a module Packed -> scores [B], a RewardModel or a SARM."""
    reader = PackedReader(config, path, tokenizer, dist, micro_batch_size)

    def score_answers(answers: Answers) -> Tensor:
        scores = torch.zeros(len(answers), device=dist.device)
        for rows, part in reader.read(answers):
            scores[rows] = module(part)
        return scores

    return score_answers


class PackedReader:
    """Answers as the model in `path` reads them: micro-batches of packed rows.

    config: the model's; tokenizer: the policy's, or None where there is only text. With the same
    tokenizer the model reads the sampled ids as they are: they are never decoded and tokenised
    again. A text that is longer than the model's context is cut: see tokens.fit_item().
    """

    def __init__(self, config, path: str, tokenizer, dist: Dist, micro_batch_size: int):
        self.path = path
        self.dist = dist
        self.micro_batch_size = micro_batch_size
        self.context = context_length(config)
        self.n_embeddings = config.get_text_config().vocab_size
        self.has_told_of_cuts = False
        self.policy_tokenizer = tokenizer
        self.tokenizer = load_tokenizer(path)
        # With equal vocabularies an id means the same to both models. Decoded and tokenised again,
        # a text might get other tokens than those that were sampled.
        vocabulary = self.tokenizer.get_vocab()
        self.reads_ids = tokenizer is not None and tokenizer.get_vocab() == vocabulary
        # Members of an ensemble that read the same rows share them: Answers keep them by this key.
        what_is_read = "sampled ids" if self.reads_ids else key_of(self.tokenizer)
        self.key = (what_is_read, micro_batch_size, self.context)

    def read(self, answers: Answers) -> list[tuple[Tensor, Packed]]:
        """-> [(the places of some answers, their packed rows)].

        InputError: a text holds a token without an embedding.
        """
        if self.key not in answers.prepared:
            answers.prepared[self.key] = self.prepare(answers)
        # Members that share micro-batches may still differ in the number of their embeddings.
        parts = answers.prepared[self.key]
        for _, part in parts:
            check_ids(self.path, part.ids, self.n_embeddings)
        return parts

    def prepare(self, answers: Answers) -> list[tuple[Tensor, Packed]]:
        """The micro-batches of answers that no member has read yet."""
        batch = answers.batch
        if not self.reads_ids:
            batch = encode_again(answers, self.policy_tokenizer, self.tokenizer)
        if self.context and batch.ids.shape[1] > self.context:
            batch, sentence = cut_batch(batch, self.context, self.tokenizer)
            self.tell_of_cuts(f"of {len(answers)} texts, {sentence}")
        # Rows of similar length together, each part trimmed to its longest.
        batch = batch.to(self.dist.device)
        parts = []
        for rows in batch.micro_batches(self.micro_batch_size):
            parts.append((rows, batch.rows(rows)))
        return parts

    def tell_of_cuts(self, sentence: str):
        """Print that texts had to be cut, the first time that it happens."""
        if not self.has_told_of_cuts:
            self.dist.print(f"{self.path}: {sentence} (not said again)")
        self.has_told_of_cuts = True


def key_of(tokenizer) -> tuple:
    """Equal for tokenizers that do the same to any text."""
    if tokenizer.is_fast:
        words = hash(tokenizer.backend_tokenizer.to_str())
    else:
        words = id(tokenizer)
    # A base and a chat model may differ in EOS alone.
    return words, tokenizer.bos_token_id, tokenizer.eos_token_id


def encode_again(answers: Answers, policy_tokenizer, tokenizer) -> Packed:
    """The texts of answers as a tokenizer that is not the policy's encodes them.

    Chats go through its own template, or are plain text where it has none.
    """
    # encode() takes rows of data, so that texts are encoded as for the training of that model.
    has_template = bool(tokenizer.chat_template)
    rows = []
    for prompt, response in zip(answers.prompts, answers.responses):
        if is_chat(prompt) and not has_template:
            prompt = chat_as_text(prompt)
        rows.append({"prompt": prompt, "response": response})
    chat = answers.chat and has_template
    encoded = encode(tokenizer, rows, ("response",), chat=chat)
    prompts = encoded.prompts
    responses = encoded.responses["response"]
    if answers.batch is None:
        return pack(prompts, responses, tokenizer.pad_token_id)

    # Every response ends with an EOS now. One that was cut off was sampled without it: its last
    # sampled token is another. It loses the EOS again, unless it has no other token.
    batch = answers.batch
    last_columns = (batch.lengths - 1).cpu()
    last_ids = batch.ids[torch.arange(len(batch)), last_columns].tolist()
    for i, last_id in enumerate(last_ids):
        was_cut_off = last_id not in end_ids(policy_tokenizer)
        if was_cut_off and len(responses[i]) > 1:
            responses[i] = responses[i][:-1]
    return pack(prompts, responses, tokenizer.pad_token_id)


def chat_as_text(prompt: list[dict]) -> str:
    """A chat for a model without a chat template, up to where its answer begins."""
    return f"{show(prompt)}\nassistant:\n"


def cut_batch(batch: Packed, max_length: int, tokenizer) -> tuple[Packed, str]:
    """The rows of a batch, cut to max_length, and how many had to be.

    Answers to one prompt that stand side by side keep the same part of it.
    """
    prompts = []
    responses = []
    for ids, n_prompt, length in zip(batch.ids, batch.prompt_lengths, batch.lengths):
        prompts.append(ids[:n_prompt].tolist())
        responses.append(ids[n_prompt:length].tolist())
    encoded = Encoded(prompts, {"response": responses})
    cut_items(encoded, max_length, tokenizer.bos_token_id)
    cut = pack(encoded.prompts, encoded.responses["response"], tokenizer.pad_token_id)
    return cut, encoded.describe_cuts(max_length)


def check_ids(path: str, ids: Tensor, n_embeddings: int):
    """InputError where token ids [B, T] hold one for which the model has no embedding."""
    lowest, highest = ids.aminmax()
    for token_id in (int(lowest), int(highest)):
        require(
            0 <= token_id < n_embeddings,
            f"{path}: a text holds the token {token_id}, and the model has embeddings "
            f"0 to {n_embeddings - 1} alone",
        )


def classifier_scorer(model, path: str, label: int, dist: Dist, micro_batch_size: int) -> Reward:
    """The logit of a label of any sequence classifier, on the texts of text_batches()."""
    tokenizer = load_tokenizer(path, needs_eos=False)
    require(
        tokenizer.pad_token_id is not None,
        f"{path}: the tokenizer has neither a padding nor an EOS token",
    )
    # A classifier on a decoder finds a text's last token by this id.
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"  # the response must stay
    # Tokenizers without a limit of their own have one of 1e30.
    longest = tokenizer.model_max_length
    context = min(longest, readable_length(model) or longest, 2**20)
    # All members with this tokenizer read the same.
    key = ("text", key_of(tokenizer), context, micro_batch_size)

    def score_answers(answers: Answers) -> Tensor:
        if key not in answers.prepared:
            batches = text_batches(answers, tokenizer, context, micro_batch_size)
            answers.prepared[key] = batches
        scores = torch.zeros(len(answers))
        for rows, inputs in answers.prepared[key]:
            logits = model(**inputs.to(dist.device)).logits  # [b, labels]
            scores[rows] = logits[:, label].float().cpu()
        return scores

    return score_answers


def text_batches(answers: Answers, tokenizer, max_length: int, micro_batch_size: int) -> list:
    """What a classifier reads: "prompt response", tokenized: [(rows, padded inputs)].

    A chat is what the classifier's own template writes, or plain text where it has none.
    """
    with_template = bool(tokenizer.chat_template) and (answers.chat or is_chat(answers.prompts[0]))
    texts = []
    for prompt, response in zip(answers.prompts, answers.responses):
        if with_template:
            turn = {"role": "assistant", "content": response}
            texts.append(render(tokenizer, [*as_chat(prompt), turn]))
        elif is_chat(prompt):
            texts.append(chat_as_text(prompt) + response)
        else:
            texts.append(f"{prompt} {response}")
    # A template writes its own control tokens; those that a plain text spells are text.
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        add_special_tokens=not with_template,
        split_special_tokens=not with_template,
    )
    # Texts of similar length share a forward pass, so that little of it is padding.
    lengths = torch.tensor([len(ids) for ids in encoded.input_ids])
    batches = []
    for rows in micro_batches(lengths, micro_batch_size):
        inputs = {}
        for name, values in encoded.items():
            inputs[name] = [values[i] for i in rows]
        batches.append((rows, tokenizer.pad(inputs, return_tensors="pt")))
    return batches
