"""Model folders and hub names, looked at before anything is loaded from them.

Anybody may have written such a folder, a killed run may have left it half made, and a disk may have
changed it. Whatever is wrong is an InputError: one line that says what and where. models.py loads.
"""

import os
from collections.abc import Iterable

import torch
import transformers
from tokenizers import Tokenizer

from ..errors import InputError, library_call, require
from ..runtime.files import is_number, is_of_type, read_object, shorten
from ..runtime.hints import check_made
from ..runtime.tensors import check_numbers
from .adapters import is_adapter, read_config, resolve
from .lora import HEADS
from .weights import INDEX, check_config, find_file, has_weights, weight_names

# The folder of a separate value model, inside its policy's.
VALUE_MODEL = "value_model"
# The sizes that a model can have, lowest and highest.
SIZES = {"vocab_size": (3, 10**7), "hidden_size": (1, 10**6), "num_hidden_layers": (1, 10**4)}
# The files of which a tokenizer needs one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


# ------------------------------------------------------------------------ the folder and its config


def check_model(path: str):
    """The HF config of a model folder, run folder, adapter folder or hub name.

    An adapter folder has the config of its base model. The names of the weight files are looked at
    too (weights.py), and so is a separate value model inside the folder. InputError: no such model,
    or one that cannot be loaded.
    """
    path = resolve(path)
    check_made(path)
    # A folder may lead to two further models: a separate value model in it, and an adapter's base.
    value_model = os.path.join(path, VALUE_MODEL)
    if os.path.isdir(value_model):
        check_model(value_model)
    if is_adapter(path):
        base = read_config(path)["base_model_name_or_path"]
        return check_model(base)

    # For a folder that is not there transformers would ask the hub.
    check_place(path)
    with library_call(f"{path}: neither a model folder nor a model that the hub gives"):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_config(path, config)
    check_not_quantised(path, config)
    check_sizes(path, config)
    weight_names(path)  # refuses an index that leads to a pickle, or out of the folder
    return config


def check_place(path: str):
    """InputError for a folder that holds no model, and for a path where there is no folder.

    What is left is a model folder, or a name that only the hub can know.
    """
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            hint = explain_no_weights(path)
            raise InputError(f"{path}: a folder without config.json is no model{hint}")
        if not has_weights(path):
            hint = explain_no_weights(path)
            raise InputError(f"{path}: no weights (*.safetensors) in this model folder{hint}")
        return

    # A name on the hub is NAME or OWNER/NAME. Anything else with a separator was meant as a path:
    # one/two/three, ./model, ~/model, /models/llama.
    has_separator = os.path.sep in os.path.normpath(path)
    is_path = has_separator and path.count("/") != 1
    if is_path or path.startswith((".", "~", "/")):
        raise InputError(f"{path}: no such model folder")
    # runs/sft might be OWNER/NAME, but here runs/ is where scripts write.
    if path.startswith("runs/"):
        raise InputError(f"{path}: no such run yet")
    # What stands below a file, or below a link that leads nowhere, was meant as a path too.
    first_part = path.split("/")[0]
    if os.path.lexists(first_part) and not os.path.isdir(first_part):
        raise InputError(f"{path}: no such model folder; {first_part} is not a folder")


def explain_no_weights(path: str) -> str:
    """What to do about a model folder without safetensors, for the end of an error."""
    # A run writes model/ at its end. Until then it has only checkpoints.
    if os.path.isdir(os.path.join(path, "checkpoint")):
        return "; the run has not finished"
    names = os.listdir(path)
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            "; pickles are never read: if you trust this one, load it with "
            "AutoModelForCausalLM.from_pretrained and call save_pretrained, which writes "
            "safetensors"
        )
    if any(name.startswith("model-") and name.endswith(".safetensors") for name in names):
        return f"; parts of them are there, without {INDEX}, which lists them"
    if any(name.endswith(".gguf") for name in names):
        return "; GGUF is for inference: take the safetensors that it was made from"
    return ""


def check_not_quantised(path: str, config):
    """InputError for a model whose weights are quantised: no gradient could change them."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    if isinstance(quantised, dict):
        method = quantised.get("quant_method")
    else:
        method = getattr(quantised, "quant_method", None)
    raise InputError(
        f"{path}: its weights are quantised ({shorten(method)}), and cannot be trained; take the "
        "model that it was made from"
    )


def context_length(config) -> int | None:
    """The most tokens a model can read, or None where its config names no limit.

    A model whose rotary factors change at a length (longrope) is read up to there: behind it a text
    is computed otherwise from its first token on, so that neither a cache nor the log-probs of a
    shorter text would fit.
    """
    # Some older configs call it n_positions.
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    length = length or getattr(config, "n_positions", None)
    length = length or getattr(config, "max_seq_len", None)  # so MPT calls it
    if length == -1:  # so XLNet says that there is none
        length = None
    rope = getattr(config, "rope_parameters", None) or {}
    # The length at which the factors change is in one of two places.
    if rope.get("rope_type") == "longrope":
        changes_at = rope.get("original_max_position_embeddings")
        changes_at = changes_at or getattr(config, "original_max_position_embeddings", None)
        return changes_at or length
    return length


def choose_max_length(max_length: int, config) -> int | None:
    """--max_length -> how many tokens a text may have; 0: the model's context, if it has one.

    InputError: more than the model can read. Learned positions end there, and no other kind was
    trained behind it.
    """
    context = context_length(config)
    fits = context is None or max_length <= context
    require(fits, f"--max_length {max_length} is above the model's context of {context} tokens")
    return max_length or context


def hidden_width(config) -> int:
    """The size D of a model's last hidden states: config.hidden_size, for all but a few models.

    OPT-350m projects them to the width of its embeddings.
    """
    config = config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def check_sizes(path: str, config):
    """InputError where a config's sizes, its context, or the scale of its scores cannot be."""
    # Some architectures have other names for these sizes. A size that is missing passes.
    text_config = config.get_text_config()
    for name, (low, high) in SIZES.items():
        size = getattr(text_config, name, low)
        require(
            type(size) is int and low <= size <= high,
            f"{path}: config.json's {name} must be a whole number from {low} to {high}, "
            f"not {shorten(size)}",
        )

    context = context_length(text_config)
    require(
        is_of_type(context, int | None),
        f"{path}: config.json's context must be a whole number, not {shorten(context)}",
    )

    # It is in units of the scores' standard deviation, so a large one means a damaged file.
    mean = getattr(config, "reward_mean", 0.0)
    require(
        is_of_type(mean, float) and abs(mean) < 1e9,
        f"{path}: config.json's reward_mean cannot be {shorten(mean)}",
    )
    std = getattr(config, "reward_std", 1.0)
    require(
        is_of_type(std, float) and 0 < std < 1e9,
        f"{path}: config.json's reward_std cannot be {shorten(std)}",
    )


# ------------------------------------------------------------------------------------ the tokenizer


def has_tokenizer(path: str) -> bool:
    """Whether a folder holds a tokenizer's files. A hub name counts as having one."""
    if not os.path.isdir(path):
        return True
    return any(os.path.isfile(os.path.join(path, name)) for name in TOKENIZER_FILES)


def open_tokenizer(path: str):
    """The tokenizer of a folder or hub name, which cuts texts as its tokenizer.json says.

    transformers may take a class by the model's architecture that cuts them in another way: it does
    for a Qwen2 model with a tokenizer of its own. Then the file counts, as a model was trained with
    what it says.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    file = find_file(path, "tokenizer.json", must=False)
    if file is None or type(tokenizer) is transformers.PreTrainedTokenizerFast:
        return tokenizer

    of_file = Tokenizer.from_file(file)
    of_file.no_truncation()
    of_file.no_padding()
    some_tokens = sorted(of_file.get_vocab())[::100]
    text = " ".join(["Once upon 1234 nights,\n\n it's  a naïve\tcat", *some_tokens])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if ids == of_file.encode(text, add_special_tokens=False).ids:
        return tokenizer
    by_file = transformers.PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
    by_file.model_input_names = tokenizer.model_input_names
    # Older folders name no special tokens: these are the class's, if the file knows them.
    for name, token in tokenizer.special_tokens_map.items():
        if name not in by_file.special_tokens_map and of_file.token_to_id(token) is not None:
            setattr(by_file, name, token)
    return by_file


def read_text_config(path: str):
    """The text config of the model in a tokenizer's folder; None: it holds a tokenizer alone."""
    # A tokenizer's folder without a model is enough for `probe.py diversity --tokenizer`.
    holds_model = has_weights(path) or is_adapter(path)
    if os.path.isdir(path) and not holds_model:
        return None
    return check_model(path).get_text_config()


def check_vocabulary(path: str, tokenizer, n_embeddings: int):
    """InputError where a token of texts has an id for which the model has no embedding.

    Special tokens that texts do not hold, such as PAD, may lie beyond the embeddings.
    """
    # The token with the highest id decides, since embeddings are rows 0 to n - 1 of a table. A GPU
    # that looks up a row beyond them stops with an error that names no token.
    special_ids = find_special_ids(tokenizer)
    last_token = ""
    last_id = -1
    for token, token_id in tokenizer.get_vocab().items():
        if token_id > last_id and token_id not in special_ids:
            last_token = token
            last_id = token_id
    require(
        last_id < n_embeddings,
        f"{path}: the tokenizer's token {last_token!r} has the id {last_id}, and the model has "
        f"embeddings 0 to {n_embeddings - 1} alone; give it more (resize_token_embeddings), "
        "or take the token out of the tokenizer",
    )


def find_special_ids(tokenizer) -> set[int]:
    """The ids of special tokens that texts do not hold, such as PAD.

    A folder saved after load_tokenizer() has put EOS in the place of PAD still holds the token
    that was PAD: a special one without a role. So the role alone does not tell. Pitfall: a text
    that spells such a token out holds it.
    """
    # Special tokens that texts do hold: those that the tokenizer puts around a text, UNK in the
    # place of an unknown word, and BOS and EOS, which tokens.py adds.
    in_texts = set(tokenizer("a text").input_ids)
    in_texts |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    template = str(tokenizer.chat_template)

    special_ids = set()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        is_in_texts = token_id in in_texts or token.content in template
        if token.special and not is_in_texts:
            special_ids.add(token_id)
    return special_ids


def read_end_ids(path: str, tokenizer, text_config) -> list[int]:
    """The ids at which a response ends: the tokenizer's EOS, then the model's further ends.

    text_config: the model's, by read_text_config().
    A chat model often has two, one that ends a turn and one that ends a text. Its list is the
    eos_token_id of generation_config.json, or else of config.json. Only control tokens count: the
    list of a config that was never set may name any word. InputError: the list holds no ids.
    """
    ends = []
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    special_ids = set(tokenizer.all_special_ids)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special_ids.add(token_id)

    listed = read_listed_ends(path, text_config)
    if not isinstance(listed, list):
        listed = [listed]
    for token_id in listed:
        # It is None where the model has no end of its own.
        require(
            is_of_type(token_id, int | None),
            f"{path}: eos_token_id must be a token's id or a list of them, not {shorten(listed)}",
        )
        if token_id in special_ids and token_id not in ends:
            ends.append(token_id)
    return ends


def read_listed_ends(path: str, text_config):
    """The eos_token_id of a model's generation_config.json, or else of its config.json."""
    if text_config is None:  # a tokenizer alone
        return None
    if is_adapter(path):
        # The config of an adapter is that of its base already.
        base = resolve(read_config(path)["base_model_name_or_path"])
        return read_listed_ends(base, text_config)
    # This is the order of transformers' generate().
    listed = None
    file = find_file(path, "generation_config.json", must=False)
    if file:
        listed = read_object(file).get("eos_token_id")
    if listed is None:
        listed = getattr(text_config, "eos_token_id", None)
    return listed


def read_longest_text(path: str, tokenizer) -> int:
    """The most tokens that a tokenizer gives a text: a whole number, 10^30 where nobody says it.

    InputError: it is none.
    """
    # tokenizer_config.json may say 512.0 or 1e30, so a float is accepted if it is whole.
    longest = tokenizer.model_max_length
    require(
        is_number(longest) and longest == int(longest) > 0,
        f"{path}: the tokenizer's model_max_length must be a whole number above 0, "
        f"not {shorten(longest)}",
    )
    return int(longest)


# --------------------------------------------------------------------------------- the loaded model


def check_shapes(path: str, mismatched: Iterable[tuple]):
    """InputError where weights do not have the shapes that config.json gives them.

    mismatched: (name, the shape in the folder, the shape by the config) of each such weight.
    """
    if mismatched:
        name, stored, expected = min(mismatched)
        raise InputError(
            f"{path}: {name} has the shape {list(stored)}, and config.json asks for "
            f"{list(expected)}"
        )


def check_complete(path: str, model, missing: list[str], new_head: bool):
    """InputError where the folder of a model lacks weights: `missing` are their names.

    new_head: a score head is new, and a pooler is not used, so that these may be missing.
    """
    lacking = []
    for name in missing:
        is_optional = new_head and name.startswith(("score.", "pooler."))
        if not is_optional:
            lacking.append(name)
    if lacking:
        names = ", ".join(sorted(lacking)[:3])
        raise InputError(f"{path}: as {type(model).__name__} it lacks the weights {names}")


def check_heads(path: str, model, unexpected: list[str]):
    """InputError where the model has no place for a head's weights that its folder holds.

    transformers leaves them out without a word: a reward model as a policy whose LM head is tied to
    its embeddings, or the bias of a score head that has none.
    """
    left_out = [name for name in sorted(unexpected) if name.split(".")[0] in HEADS]
    first_names = ", ".join(left_out[:3])
    require(
        not left_out,
        f"{path}: it holds {first_names}, for which {type(model).__name__} has no place: the head "
        "of another kind of model",
    )


def readable_length(model) -> int | None:
    """The most tokens that a loaded model reads, or None where its config names no limit.

    RoBERTa counts its positions from the padding id on, so its last ones are out of reach.
    """
    context = context_length(model.config)
    if context is None:
        return None
    # With padding id 1 the first token of a text has position 2: 514 positions read 512 tokens.
    n_unused = 0
    for name, module in model.named_modules():
        padding_id = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding_id is not None:
            n_unused = max(n_unused, padding_id + 1)
    return context - n_unused


def check_weights(path: str, model):
    """InputError where a weight is not finite: a run that went wrong saved it."""
    check_numbers(dict(model.named_parameters()), path)


@torch.no_grad()
def check_run(path: str, model):
    """InputError where a model cannot read two tokens: some wrong settings only show there."""
    with library_call(f"{path}: cannot be run"):
        output = model.base_model(input_ids=torch.tensor([[1, 2]]))
    require(
        hasattr(output, "last_hidden_state"),
        f"{path}: {type(model).__name__} does not give the hidden states that its head reads; "
        "take a model of another architecture",
    )
    hidden = output.last_hidden_state
    require(bool(hidden.isfinite().all()), f"{path}: what the model computes is not finite")


@torch.no_grad()
def check_causal(path: str, model):
    """InputError where a token's hidden state depends on a token to its right.

    Rows are padded on the right, and no mask hides the padding.
    """
    # Two texts that begin alike: in one batch, since each pass reads all weights.
    ids = torch.tensor([[1, 1], [1, 2]])
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [2, 2, D]
    first_of_one, first_of_other = hidden[:, 0]
    require(
        torch.allclose(first_of_one, first_of_other, rtol=1e-3, atol=1e-3),
        f"{path}: {type(model).__name__} reads what stands to the right of a token; a policy and "
        "a reward model need a decoder, which does not",
    )
