"""Model folders of the kinds that people have: what loads and trains right, and what is refused."""

import json

import pytest
import torch
from checks import same
from safetensors.torch import load_file, save_file
from tiny_models import EOS, PROMPTS, RESPONSES, SIZE, V, tiny_lm, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    RobertaConfig,
    SiglipVisionConfig,
)

from nanorlhf.errors import InputError
from nanorlhf.hf import adapters
from nanorlhf.hf.blocks import blocks
from nanorlhf.hf.decode import cache_name
from nanorlhf.hf.folders import check_model, context_length, hidden_width, readable_length
from nanorlhf.hf.lora import add_lora
from nanorlhf.hf.weights import find_dtype
from nanorlhf.models import (
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_policy,
    save_reward_model,
)
from nanorlhf.packing import pack, response_mask_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": 0}


def opt():
    """OPT-350m's shape: its last hidden states are projected to half of its hidden size."""
    return OPTConfig(vocab_size=V, word_embed_proj_dim=16, ffn_dim=64, **SMALL, **ENDS)


def gemma3():
    """A model of texts and images: the sizes of its language model are in text_config."""
    text = Gemma3TextConfig(
        vocab_size=V,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=96,
        **SMALL,
        **ENDS,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )


def longrope():
    """Its rotary factors change at 16 tokens, of the 128 that it can read."""
    factors = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    return Phi3Config(
        vocab_size=V,
        intermediate_size=64,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=16,
        rope_parameters=factors,
        **SMALL,
        **ENDS,
    )


def llama():
    """A plain model."""
    return LlamaConfig(**SIZE)


KINDS = {"projected": opt, "composite": gemma3, "longrope": longrope}
WIDTHS = {"projected": 16, "composite": 32, "longrope": 32}
CONTEXTS = {"projected": 2048, "composite": 96, "longrope": 16}


def save(config, path, dtype=torch.float32):
    """A model with random weights and the tokenizer of w3, w4, ... -> its folder's name"""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(the kind's name, the folder of such a model)"""
    path = tmp_path_factory.mktemp(request.param)
    return request.param, save(KINDS[request.param](), path)


def test_sizes_of_further_kinds(kind):
    name, path = kind
    config = check_model(path)
    assert context_length(config) == CONTEXTS[name]
    assert hidden_width(config) == WIDTHS[name]
    assert len(blocks(load_policy(path).lm)) == 2


def test_a_policy_of_a_further_kind_has_values_and_gradients(kind):
    _, path = kind
    policy = load_policy(path)
    torch.nn.init.normal_(policy.value_head.weight)
    batch = pack(PROMPTS, RESPONSES)
    mask = response_mask_of(batch)

    out = policy(batch, mask)
    (out["logprobs"] + out["values"]).sum().backward()

    # The log-probs are those of the model itself, token by token.
    logp = policy.lm(input_ids=batch.ids[:1]).logits.log_softmax(-1)[0]
    first = len(PROMPTS[0])
    own = logp[first - 1, batch.ids[0, first]]
    same(out["logprobs"][0, 0].detach(), own.detach())
    assert out["values"][mask].std() > 0
    assert all(p.grad is not None for p in policy.value_head.parameters())


def test_a_reward_model_of_a_further_kind_survives_the_round_trip(kind, tmp_path):
    _, path = kind
    reward_model = load_reward_model(path, seed=0)
    batch = pack(PROMPTS, RESPONSES)
    scores = reward_model(batch)
    save_reward_model(reward_model, load_tokenizer(path), str(tmp_path / "rm"))

    again = load_reward_model(str(tmp_path / "rm"))

    assert scores.std() > 0
    same(again(batch), scores)


def test_a_text_within_the_context_is_read_alike_with_and_without_a_cache(kind):
    """A longrope model's cache is only right as long as its factors do not change."""
    name, path = kind
    lm = load_policy(path).lm
    length = min(16, CONTEXTS[name])
    ids = torch.randint(3, V, (1, length), generator=torch.Generator().manual_seed(0))

    whole = lm(input_ids=ids).logits
    begun = lm(input_ids=ids[:, :10], use_cache=True)
    name_of_cache = cache_name(type(lm.base_model))
    rest = lm(input_ids=ids[:, 10:], **{name_of_cache: getattr(begun, name_of_cache)}).logits

    same(rest, whole[:, 10:])


def test_the_positions_of_roberta_begin_behind_its_padding():
    config = RobertaConfig(
        vocab_size=V,
        max_position_embeddings=34,
        intermediate_size=32,
        num_labels=2,
        **SMALL,
        **ENDS | {"pad_token_id": 1},
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    longest = readable_length(model)
    assert longest == 32
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


# -------------------------------------------------------------------------- the type of the weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_is_saved_in_the_type_it_came_in(tmp_path, dtype, tied):
    """A head that is tied to the embeddings is not written a second time."""
    config = LlamaConfig(**SIZE, tie_word_embeddings=tied)
    path = save(config, tmp_path / "in", dtype)
    policy = load_policy(path)
    assert policy.lm.dtype == torch.float32

    save_policy(policy, load_tokenizer(path), str(tmp_path / "out"))

    before = load_file(tmp_path / "in" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.dtype == dtype


def test_buffers_that_are_whole_numbers_are_saved_as_they_are(tmp_path):
    lm = load_policy(save(llama(), tmp_path / "in", torch.bfloat16)).lm
    # In bfloat16 this would be 256.
    lm.register_buffer("counter", torch.tensor([257]))

    adapters.save_model(lm, str(tmp_path / "out"))

    assert load_file(tmp_path / "out" / "model.safetensors")["counter"].tolist() == [257]


def change_weights(folder, changes):
    """Change the weights of a model's folder, or add to them."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_several_types_are_of_float32(tmp_path, dtype):
    """Saved in `dtype`, those that came in float32 would be rounded."""
    path = save(llama(), tmp_path, dtype)
    assert find_dtype(path) == dtype
    change_weights(tmp_path, {"model.norm.weight": torch.ones(32)})
    assert find_dtype(path) == torch.float32


def test_buffers_have_no_say_in_the_type(tmp_path):
    """Older folders hold masks of attention beside the weights."""
    path = save(llama(), tmp_path, torch.bfloat16)
    mask = torch.ones(4, 4, dtype=torch.bool)
    masked_bias = torch.tensor(-1e9)
    change_weights(tmp_path, {"attention.bias": mask, "attention.masked_bias": masked_bias})
    assert find_dtype(path) == torch.bfloat16


def test_weights_that_are_whole_numbers_are_refused(tmp_path):
    path = save(llama(), tmp_path)
    change_weights(tmp_path, {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(InputError, match="model.norm.weight holds I8, not floating-point numbers"):
        load_policy(path)


# ----------------------------------------------------------------------------- what is only refused


def folder_with(tmp_path, name, content=b""):
    """A model's folder whose weights are a file of this name."""
    path = save(llama(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "pickles are never read.*save_pretrained, which writes safetensors"),
        ("model.Q4_K_M.gguf", "GGUF is for inference: take the safetensors"),
        (
            "model-00001-of-00002.safetensors",
            "parts of them are there, without model.safetensors.index.json",
        ),
    ],
)
def test_weights_of_another_format_are_refused_with_what_to_do(tmp_path, name, words):
    path = folder_with(tmp_path, name)
    for look in (check_model, load_policy, load_reward_model):
        with pytest.raises(InputError, match=f"^{path}: no weights .*{words}"):
            look(path)


def test_a_part_of_a_config_may_not_name_the_file_of_weights(tmp_path):
    """transformers loads some language models by their text_config alone."""
    path = save(gemma3(), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["transformers_weights"] = "adapter_model.bin"
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="adapter_model.bin .transformers_weights.; they are read"):
        check_model(path)


@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_a_weight_of_another_shape_is_refused_by_its_name(tmp_path, load):
    """The config of a model was changed behind its weights, or the weights are another model's."""
    path = save(llama(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    words = r"model\.norm\.weight has the shape \[3\], and config\.json asks for \[32\]"
    with pytest.raises(InputError, match=f"^{path}: {words}$"):
        load(path)


def test_a_quantised_model_is_refused_with_what_to_do(tmp_path):
    path = save(llama(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"^{path}: .*quantised.*bitsandbytes.*made from"):
        load_policy(path)


# ------------------------------------------------------------------------------------- the ends


def folder_with_ends(path, of_config, of_generation):
    """A tiny model that lists these ends in config.json and generation_config.json."""
    lm = tiny_lm("llama")
    lm.config.eos_token_id = of_config
    lm.config.save_pretrained(path)
    lm.generation_config = GenerationConfig(eos_token_id=of_generation)
    lm.save_pretrained(path)
    tokenizer = word_tokenizer(additional_special_tokens=["w7", "w8"])
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("of_config", "of_generation", "ends"),
    [
        (EOS, [EOS, 7], [EOS, 7]),
        (EOS, [8, 7, EOS], [EOS, 8, 7]),
        ([EOS, 7], None, [EOS, 7]),
        (7, EOS, [EOS]),  # generation_config.json says what counts
        (7, None, [EOS, 7]),
        (EOS, [EOS, 9], [EOS]),  # w9 is a word
    ],
)
def test_the_ends_of_a_response_are_those_the_model_lists(tmp_path, of_config, of_generation, ends):
    path = folder_with_ends(tmp_path, of_config, of_generation)
    assert load_tokenizer(path).end_ids == ends


def test_a_tokenizer_alone_has_one_end(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).end_ids == [EOS]


def test_a_saved_policy_keeps_its_ends(tmp_path):
    path = folder_with_ends(tmp_path / "in", EOS, [EOS, 7])
    save_policy(load_policy(path), load_tokenizer(path), str(tmp_path / "out"))
    assert load_tokenizer(str(tmp_path / "out")).end_ids == [EOS, 7]


def test_ends_that_are_no_ids_are_refused(tmp_path):
    path = folder_with_ends(tmp_path, EOS, EOS)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(InputError, match=f"^{path}: eos_token_id must be a token's id"):
        load_tokenizer(path)


def folder_with_longest(folder, longest):
    """A tokenizer whose config says how many tokens a text may have."""
    word_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_max_length": longest}))
    return str(folder)


@pytest.mark.parametrize("longest", [512, 512.0, 1e30])
def test_the_longest_text_is_a_whole_number_however_it_is_written(tmp_path, longest):
    tokenizer = load_tokenizer(folder_with_longest(tmp_path, longest))
    assert type(tokenizer.model_max_length) is int
    assert tokenizer.model_max_length == longest


@pytest.mark.parametrize("longest", [0, -1, 512.5])
def test_a_longest_text_that_is_no_number_of_tokens_is_refused(tmp_path, longest):
    path = folder_with_longest(tmp_path, longest)
    with pytest.raises(InputError, match=f"^{path}: .*model_max_length must be a whole number"):
        load_tokenizer(path)


# --------------------------------------------------------------------------- adapters of a revision


def test_the_base_of_an_adapter_is_that_of_its_revision(tmp_path, monkeypatch):
    base = save(llama(), tmp_path / "base")
    policy = load_policy(base)
    add_lora(policy.lm, ["q_proj"], 2)
    adapters.save_adapter(policy.lm, str(tmp_path / "adapter"), base)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"base_model_name_or_path": "owner/base", "revision": "v1"}
    file.write_text(json.dumps(config))
    (tmp_path / "adapter" / "nanorlhf.json").unlink()
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        assert not any(pattern.endswith(".bin") for pattern in allow_patterns)
        return base

    monkeypatch.setattr(adapters, "snapshot_download", snapshot_download)

    assert adapters.read_config(str(tmp_path / "adapter"))["base_model_name_or_path"] == base
    assert asked == [("owner/base", "v1")]

    # Offline the hub gives nothing.
    monkeypatch.undo()
    with pytest.raises(InputError, match="owner/base: the hub gives no revision v1"):
        adapters.read_config(str(tmp_path / "adapter"))
