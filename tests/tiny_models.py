"""Tiny random models for tests: language models, SARMs, text encoders, and their tokenizers.

    V words, D hidden, B sequences, R response tokens, M features

They are random, but their weights are large enough that an error shows: with the usual small
weights every distribution is nearly flat and every block nearly the identity.
"""

import copy
import json
import os

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from nanorlhf import world
from nanorlhf.hf.blocks import trainable
from nanorlhf.models import Policy
from nanorlhf.packing import pack, response_mask_of
from nanorlhf.sae import TopKSAE
from nanorlhf.sarm import SARM, save_sarm


def enlarge_matrices(lm, factor):
    """Multiply every weight matrix; biases and norms stay."""
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(factor)


def leave_out_none(settings):
    """The settings that have a value."""
    return {name: value for name, value in settings.items() if value}


# -------------------------------------------------------------------- language models of two blocks

V, EOS, D = 60, 1, 32
ARCHITECTURES = ("neox", "llama", "gpt2")
SPECIAL = dict(vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=0)
SIZE = dict(
    SPECIAL,
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)


def tiny_config(architecture):
    if architecture == "neox":
        return GPTNeoXConfig(**SIZE, hidden_dropout=0.1, attention_dropout=0.1)
    if architecture == "llama":
        return LlamaConfig(**SIZE, num_key_value_heads=2, attention_dropout=0.1)
    return GPT2Config(**SPECIAL, n_embd=D, n_layer=2, n_head=4, n_positions=64)


def tiny_lm(architecture, seed=0):
    """Two blocks of random weights, in eval mode. Dropout is in the config, to be switched off."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    enlarge_matrices(lm, 10)
    return lm


def tiny_policy(architecture, seed=0, **kwargs):
    """With a value head that is not zero, so that values can be told apart."""
    policy = Policy(tiny_lm(architecture, seed), **kwargs).eval()
    if policy.value_head is not None:
        policy.value_head.weight.data.normal_()
        policy.value_head.bias.data.fill_(0.3)
    return policy


def word_level_backend(words):
    """A tokenizer of the tokenizers library: a word's id is its place in the list."""
    ids = dict(zip(words, range(len(words))))
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def word_tokenizer(words=None, **special):
    """A word-level tokenizer over <pad> <eos> <unk> w3 w4 ... (or `words`).

    `special` sets special tokens; None leaves one out.
    """
    if not words:
        plain_words = [f"w{i}" for i in range(3, V)]
        words = ["<pad>", "<eos>", "<unk>", *plain_words]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level_backend(words), unk_token="<unk>", **leave_out_none(special)
    )


def random_rows(lengths, seed):
    """Lists of random ids, one of each length; neither PAD nor EOS."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, V, (n,), generator=generator).tolist() for n in lengths]


# One batch of prompts and responses for everybody: unequal lengths; EOS at the end of two
# responses, and in the middle of one, where it is a token like any other.
PROMPTS = random_rows((3, 1, 7, 4, 2), seed=1)
RESPONSES = random_rows((4, 6, 1, 2, 5), seed=2)
RESPONSES[1][-1] = EOS
RESPONSES[3][-1] = EOS
RESPONSES[4][1] = EOS
BATCH = pack(PROMPTS, RESPONSES)
MASK = response_mask_of(BATCH)  # [B, R]
B, R = MASK.shape


def gradients(policy, loss):
    """The gradient of every trained parameter; zeros where the loss does not depend on it."""
    parameters = [parameter for _, parameter in trainable(policy)]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = []
    for parameter, gradient in zip(parameters, found):
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        filled.append(gradient)
    return filled


# ----------------------------------------------------------------------- every supported family

DEPTH = 3
DEEPER = {**SIZE, "num_hidden_layers": DEPTH}
GROUPED = dict(DEEPER, num_key_value_heads=2)
WIDE_HEADS = dict(GROUPED, head_dim=8)
GPT2_SIZE = dict(SPECIAL, n_embd=D, n_layer=DEPTH, n_head=4, n_positions=64)
GPT_NEO_SIZE = dict(
    SPECIAL,
    hidden_size=D,
    num_layers=DEPTH,
    attention_types=[[["global"], DEPTH]],
    num_heads=4,
    max_position_embeddings=64,
)
FALCON = dict(
    SPECIAL, hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=4, ffn_hidden_size=48
)
# Where a block's parts are: its attention, its MLP, and the norms, if any, that each part's output
# passes through before it is added to the residual stream.
PLAIN = ("self_attn", "mlp", None, None)
NEOX = ("attention", "mlp", None, None)
GPT2 = ("attn", "mlp", None, None)
FALCON_PARTS = ("self_attention", "mlp", None, None)
NORMED = ("self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm")
# {family: (a function that makes its config, where a block's parts are)}
FAMILIES = {
    "neox": (lambda: GPTNeoXConfig(**DEEPER), NEOX),
    "neox_sequential": (lambda: GPTNeoXConfig(**DEEPER, use_parallel_residual=False), NEOX),
    "llama": (lambda: LlamaConfig(**GROUPED), PLAIN),
    "gpt2": (lambda: GPT2Config(**GPT2_SIZE), GPT2),
    "gpt_neo": (lambda: GPTNeoConfig(**GPT_NEO_SIZE), GPT2),
    "gemma": (lambda: GemmaConfig(**WIDE_HEADS), PLAIN),
    "gemma2": (lambda: Gemma2Config(**WIDE_HEADS, sliding_window=3), NORMED),
    "gemma3": (lambda: Gemma3TextConfig(**WIDE_HEADS, sliding_window=3), NORMED),
    "qwen2": (lambda: Qwen2Config(**GROUPED), PLAIN),
    "qwen3": (lambda: Qwen3Config(**WIDE_HEADS), PLAIN),
    # A parallel block adds the attention's output to the MLP's in place; a sequential one does not.
    "falcon": (lambda: FalconConfig(**FALCON), FALCON_PARTS),
    "falcon_40b": (
        lambda: FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
        FALCON_PARTS,
    ),
    "falcon_sequential": (
        lambda: FalconConfig(**FALCON, parallel_attn=False, multi_query=False),
        FALCON_PARTS,
    ),
}


def tiny_family(architecture, auto=AutoModelForCausalLM, seed=0):
    """Three random blocks of a family; `auto` is the class that makes the model."""
    make_config, _ = FAMILIES[architecture]
    torch.manual_seed(seed)
    lm = auto.from_config(make_config()).eval()
    enlarge_matrices(lm, 3)
    return lm


# ----------------------------------------------------------- a tiny SARM, and its latents by hand

SARM_M, SARM_K, SARM_L, SARM_D = 48, 6, 2, 32


def sarm_lm(layers=3):
    """A random LM on the embedded world's words."""
    torch.manual_seed(0)
    config = world.model_config()
    config.num_hidden_layers = layers
    config.hidden_size = SARM_D
    config.intermediate_size = 64
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_sarm(path):
    """A random SARM on the embedded world's words, saved -> (the LM it was cut from, the SARM)."""
    lm = sarm_lm()
    config = copy.deepcopy(lm.config)
    config.sarm_param = {
        "sae_source_layer": SARM_L,
        "sae_latent_size": SARM_M,
        "sae_k": SARM_K,
        "sarm_use_activation": True,
    }
    sae = TopKSAE(SARM_D, SARM_M, SARM_K, normalize="token", relu=False, seed=1)
    sarm = SARM(copy.deepcopy(lm.base_model), sae, config)
    sarm.score.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    sarm.sae.b_enc.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    config.reward_mean = 0.25
    save_sarm(sarm, world.tokenizer(), str(path))
    return lm, sarm


@torch.no_grad()
def z_by_hand(lm, sarm, prompt, response):
    """The latents [SARM_M], as a list, and the score of one text, in float64.

        x = (h - mean h) / (std h + 1e-6)            h: the hidden state at the last token
        z = top-k of W_enc (x - b_dec) + b_enc
        score = w . z - reward_mean

    h is Hugging Face's. A response is a string, which gets an EOS, or a list of ids.
    """
    tokenizer = world.tokenizer()
    if isinstance(response, str):
        response = [*tokenizer(response).input_ids, tokenizer.eos_token_id]
    ids = tokenizer(prompt).input_ids + response
    hidden_states = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states
    h = hidden_states[SARM_L][0, -1].double()  # [D]

    x = (h - h.mean()) / (h.std() + 1e-6)
    centred = x - sarm.sae.b_dec.double()
    pre = sarm.sae.W_enc.double() @ centred + sarm.sae.b_enc.double()  # [M]
    kept = pre.argsort(descending=True)[:SARM_K]
    z = torch.zeros(SARM_M, dtype=torch.float64)
    z[kept] = pre[kept]
    score = (z @ sarm.score.weight[0].double()).item() - 0.25
    return z.tolist(), score


# ------------------------------------------------------ a public SARM checkpoint, written by hand

PUBLIC_M, PUBLIC_K, PUBLIC_N, PUBLIC_L = 48, 6, 4, 3
SARM_SIZES = {**SIZE, "num_hidden_layers": PUBLIC_N}
SARM_CONFIGS = {
    "neox": GPTNeoXConfig(**SARM_SIZES),
    "llama": LlamaConfig(**SARM_SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(**SPECIAL, n_embd=D, n_layer=PUBLIC_N, n_head=4, n_positions=64),
    "gemma2": Gemma2Config(**SARM_SIZES, num_key_value_heads=2, head_dim=8),
}
SARM_PARAM = {
    "sae_source_layer": PUBLIC_L,
    "sae_latent_size": PUBLIC_M,
    "sae_k": PUBLIC_K,
    "sae_use_sequence_level": True,
    "sarm_use_activation": True,
}
# The classes of evil.py, a file of code in the checkpoint, that a careless loader would run.
REMOTE_CLASSES = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForSequenceClassification": "evil.Model",
}


def full_lm(name, seed=0):
    """The LM of four blocks that a SARM is cut from."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(SARM_CONFIGS[name])).eval()
    enlarge_matrices(lm, 5)
    return lm


def head_tensors(seed=0):
    """The public checkpoint's own tensors, random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "sae.pre_bias": [D],
        "sae.latent_bias": [PUBLIC_M],
        "sae.encoder.weight": [PUBLIC_M, D],
        "sae.decoder.weight": [D, PUBLIC_M],
        "score.weight": [1, PUBLIC_M],
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def trunk_tensors(lm):
    """What the public checkpoint keeps of the LM: its first PUBLIC_L blocks."""
    tensors = {
        "model.embed_tokens.weight": lm.model.embed_tokens.weight,
        "model.norm.weight": lm.model.norm.weight,
    }
    for i in range(PUBLIC_L):
        for name, parameter in lm.model.layers[i].named_parameters():
            tensors[f"model.layers.{i}.{name}"] = parameter
    return {name: parameter.detach().clone() for name, parameter in tensors.items()}


def write_json(path, content):
    with open(path, "w") as file:
        json.dump(content, file)


def save_in_shards(tensors, path, shards):
    """The tensors in files model-00001-of-0000N.safetensors, dealt out in turn, and their index."""
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, os.path.join(path, file), {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(os.path.join(path, "model.safetensors.index.json"), index)


def public_checkpoint(path, param=SARM_PARAM, shards=1, seed=0, auto_map=False):
    """A folder in the layout of the public Llama checkpoint, from the spec's list of tensors.

    -> (the LM it is cut from, its tensors). With `auto_map` it asks for code of its own to be run.
    """
    os.makedirs(path, exist_ok=True)
    config = SARM_CONFIGS["llama"].to_dict()
    config["architectures"] = ["LlamaSARM"]
    config["sarm_param"] = param
    # One label is what makes num_labels 1.
    config["id2label"] = {"0": "LABEL_0"}
    config["label2id"] = {"LABEL_0": 0}
    if auto_map:
        config["auto_map"] = REMOTE_CLASSES
        with open(os.path.join(path, "evil.py"), "w") as file:
            file.write("raise RuntimeError('remote code was run')\n")
    write_json(os.path.join(path, "config.json"), config)

    lm = full_lm("llama", seed)
    tensors = {**trunk_tensors(lm), **head_tensors(seed)}
    if shards == 1:
        save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})
    else:
        save_in_shards(tensors, path, shards)
    word_tokenizer().save_pretrained(path)
    return lm, tensors


# ---------------------------------------------------------------------------- tiny text encoders

# RoBERTa's ids of the special tokens: 0, 1, 2, 3.
ENCODER_WORDS = ["<s>", "<pad>", "</s>", "<unk>", *"a b c d e f g h .".split()]
ENCODER_TEXTS = ["a b c .", "d", "a b c .", "", "e f g h a b c d e f .", "zebra a", "d"]
# Every ordered pair of the first six texts.
ENCODER_PAIRS = [(a, b) for a in ENCODER_TEXTS[:6] for b in ENCODER_TEXTS[:6]]
ENCODER_SIZE = dict(
    vocab_size=len(ENCODER_WORDS),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
)
ENCODER_CONFIG = dict(ENCODER_SIZE, max_position_embeddings=20, pad_token_id=1)
# Not in the order of any public model: whoever reads labels by their place reads them wrong.
NLI_LABELS = {0: "ENTAILMENT", 1: "CONTRADICTION", 2: "NEUTRAL"}


def label_settings(labels):
    """{number: name} of a classifier's labels -> what its config says of them."""
    numbers = {name: number for number, name in labels.items()}
    return {"id2label": labels, "label2id": numbers}


def encoder_tokenizer(special=True, **more):
    """Words of one letter; with `special`, <s> and </s> around a text and between two."""
    backend = word_level_backend(ENCODER_WORDS)
    names = {"pad_token": "<pad>", "unk_token": "<unk>"}
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
        names["eos_token"] = "</s>"
    names |= more
    return PreTrainedTokenizerFast(tokenizer_object=backend, **leave_out_none(names))


@torch.no_grad()
def balance_labels(model, tokenizer):
    """Take the mean logits off the last bias: otherwise one label wins for every pair."""
    firsts, seconds = zip(*ENCODER_PAIRS)
    inputs = tokenizer(
        list(firsts),
        list(seconds),
        padding=True,
        truncation=True,
        max_length=18,
        return_tensors="pt",
    )
    biases = [p for name, p in model.named_parameters() if "classifier" in name]
    biases[-1] -= model.eval()(**inputs).logits.mean(0)


def save_encoder(model, folder, tokenizer):
    """Give the model random weights and save it with its tokenizer -> the folder as a string."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    has_classifier = any("classifier" in name for name, _ in model.named_parameters())
    if has_classifier and model.num_labels == 3:
        balance_labels(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
