"""Model folders that transformers loads without a word, and that must not train on wrong numbers.

Architectures that rollouts, adapters or rows without a mask do not fit; a tokenizer that
transformers would read otherwise; a head that it would leave out.
"""

import pytest
import torch
from checks import same
from safetensors.torch import load_file, save_file
from support import join, ranks, refuses, write_rows
from tiny_models import BATCH, EOS, MASK, SIZE, SPECIAL, tiny_lm, word_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertGenerationConfig,
    DeepseekV4Config,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    PhimoeConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

import sample_bon
import train_ppo
import train_sft
from nanorlhf.errors import InputError
from nanorlhf.hf.activations import activations, replaced
from nanorlhf.hf.blocks import blocks, freeze
from nanorlhf.hf.decode import static_cache
from nanorlhf.hf.folders import context_length
from nanorlhf.hf.lora import adapters, add_lora
from nanorlhf.models import (
    Policy,
    load_policy,
    load_reward_model,
    load_tokenizer,
    reference_of,
)
from nanorlhf.rewards import load_reward
from nanorlhf.rollout import check_rollouts
from nanorlhf.runtime.distributed import Dist, setup

BART = dict(
    SPECIAL,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    forced_eos_token_id=None,
)
MAMBA = dict(SPECIAL, hidden_size=32, num_hidden_layers=2, state_size=4)
FALCON = dict(SPECIAL, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
GPT1 = dict(SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def make(config, auto=AutoModelForCausalLM):
    """A model of random weights, large enough that positions make a difference."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model


def save(model, path, tokenizer=None):
    """A model's folder with the tokenizer of w3, w4, ... or another -> its name"""
    model.save_pretrained(path)
    (tokenizer or word_tokenizer()).save_pretrained(path)
    return str(path)


# ------------------------------------------------------------------------- what rollouts cannot use


@pytest.mark.parametrize(
    ("config", "why"),
    [
        # It counts positions by the columns of a batch, padding included.
        (BartConfig(**BART), "behind padding"),
        # It keeps no cache, or, from transformers 5.24 on, a state that padding changes.
        (MambaConfig(**MAMBA), "(no key-value cache|behind padding)"),
    ],
    ids=["bart", "mamba"],
)
def test_a_policy_that_cannot_write_in_batches_is_refused(tmp_path, config, why):
    policy = load_policy(save(make(config), tmp_path / "model"))
    with pytest.raises(InputError, match=f"model: .*cannot write answers in batches.*{why}"):
        check_rollouts(policy)


@pytest.mark.parametrize("architecture", ["neox", "llama", "gpt2"])
def test_a_policy_that_can_write_passes_with_and_without_values(architecture):
    lm = tiny_lm(architecture)
    check_rollouts(Policy(lm).eval())
    check_rollouts(Policy(lm, value_head=False).eval())


@pytest.mark.parametrize("script", [train_sft, train_ppo, sample_bon], ids=lambda s: s.__name__)
def test_it_is_refused_before_anything_is_trained(tmp_path, script):
    path = save(make(BartConfig(**BART)), tmp_path / "bart")
    rows = [{"prompt": f"w{i}", "response": "w4 w5"} for i in range(3, 13)]
    settings = {
        "model": path,
        "dataset": str(write_rows(tmp_path / "rows.jsonl", rows)),
        "output_dir": str(tmp_path / "out"),
        "max_new_tokens": 4,
    }
    if script is not train_sft:
        (tmp_path / "mine.py").write_text(
            "def score(prompts, responses): return [1.0] * len(prompts)"
        )
        settings["reward_model"] = [f"{tmp_path}/mine.py:score"]

    refuses(script.main, script.Config(**settings), match=["cannot write answers in batches"])

    assert not (tmp_path / "out/metrics.jsonl").exists()
    assert not (tmp_path / "out/pool.jsonl").exists()


def test_a_cache_that_cannot_stand_still_is_left_to_the_growing_one():
    """transformers' StaticCache knows no such layers, and says so by a KeyError."""
    config = DeepseekV4Config(num_hidden_layers=1, layer_types=["heavily_compressed_attention"])
    lm = tiny_lm("llama")
    lm._can_compile_fullgraph = False
    lm.config = config
    assert static_cache(lm, 16) is None


# -------------------------------------------------------------------- what rows without a mask need


def test_a_model_that_reads_to_the_right_is_refused(tmp_path):
    sizes = dict(SIZE, is_decoder=False)
    path = save(make(BertGenerationConfig(**sizes)), tmp_path / "model")
    with pytest.raises(InputError, match="BertGenerationDecoder reads what stands to the right"):
        load_policy(path)

    policy = save(tiny_lm("llama"), tmp_path / "policy")
    with pytest.raises(InputError, match="BertGenerationEncoder reads what stands to the right"):
        load_policy(policy, value_model=path)


def test_an_encoder_decoder_is_refused(tmp_path):
    """transformers would take its decoder, whose attention to the encoder has nothing to read."""
    model = make(BartConfig(**BART), AutoModelForSeq2SeqLM)
    path = save(model, tmp_path / "model")
    with pytest.raises(InputError, match="model: an encoder-decoder"):
        load_policy(path)


def test_the_context_of_mpt_is_as_long_as_its_biases():
    lm = make(MptConfig(vocab_size=60, d_model=32, n_heads=4, n_layers=1, max_seq_len=16))
    assert context_length(lm.config) == 16
    lm(input_ids=torch.full((1, 16), 5))
    with pytest.raises(RuntimeError):
        lm(input_ids=torch.full((1, 17), 5))


# ------------------------------------------------------------------------------- adapters and hooks


def test_blocks_are_those_that_read_texts():
    """A model of texts and images may have as many blocks for images."""
    text = Gemma3TextConfig(**SIZE, num_key_value_heads=2, head_dim=8)
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel):
        model = make(config, auto)
        assert type(blocks(model)[0]).__name__ == "Gemma3DecoderLayer"


def test_an_adapter_that_the_model_would_pass_by_is_refused():
    lm = make(MambaConfig(**MAMBA))
    with pytest.raises(InputError, match=r"layers\.0\.mixer\.dt_proj.*--lora_layers"):
        add_lora(lm)


def test_the_layers_that_the_model_runs_can_have_adapters():
    policy = Policy(make(MambaConfig(**MAMBA)), value_head=False)
    add_lora(policy.lm, ["in_proj", "x_proj"], rank=2)
    policy(BATCH, MASK)["logprobs"].sum().backward()
    assert all(layer.lora_B.grad.norm() > 0 for layer in adapters(policy.lm).values())


def test_a_router_made_from_a_linear_layer_gets_no_adapter():
    """Phi-MoE's router is an nn.Linear by its class, and returns a tuple."""
    config = PhimoeConfig(**SIZE, num_key_value_heads=2, num_local_experts=2)
    lm = make(config)
    add_lora(lm, rank=2)
    assert not any("router" in name for name in adapters(lm))
    lm(input_ids=BATCH.ids)


def test_a_linear_layer_of_an_own_class_gets_one():
    """Falcon's layers are of a class that is made from nn.Linear."""
    lm = make(FalconConfig(**FALCON))
    assert type(lm.transformer.h[0].self_attention.dense) is not torch.nn.Linear
    add_lora(lm, rank=2)
    assert len(adapters(lm)) == 4


@torch.no_grad()
def test_blocks_that_return_lists_can_be_read_and_replaced():
    """The first GPT's blocks return [hidden states]."""
    lm = make(OpenAIGPTConfig(**GPT1))
    ids = BATCH.ids[:1]
    own = lm(input_ids=ids, output_hidden_states=True)
    read = activations(lm, ids, [(0, "residual"), (1, "attention")])
    same(read[0, "residual"], own.hidden_states[1])
    assert read[1, "attention"].norm() > 0
    with replaced(lm, (1, "residual"), torch.zeros_like):
        assert lm(input_ids=ids).logits.abs().max() == 0


def test_blocks_that_return_lists_can_be_frozen():
    policy = Policy(make(OpenAIGPTConfig(**GPT1)), value_head=False)
    freeze(policy.lm, 0.5)
    reference_of(policy)
    assert policy.frozen.n == 1


def step_twice(folder):
    """Two backward passes of a policy that has weights which no text reaches, as a rank does it."""
    dist = setup("cpu", "ddp")
    lm = tiny_lm("llama")
    lm.for_images = torch.nn.Linear(3, 3)
    policy = Policy(lm, value_head=False).eval()

    def total(model):
        return model(BATCH, MASK)["logprobs"].sum()

    model = dist.wrap(policy, total)
    for _ in range(2):
        policy.zero_grad()
        total(model).backward()
    assert lm.for_images.weight.grad is None
    if dist.main:
        torch.save(lm.lm_head.weight.grad, f"{folder}/gradient.pt")


@pytest.mark.slow
def test_two_processes_train_a_model_with_weights_that_no_text_reaches(tmp_path):
    join(*ranks(2, step_twice, str(tmp_path)))
    policy = Policy(tiny_lm("llama"), value_head=False).eval()
    policy(BATCH, MASK)["logprobs"].sum().backward()
    gradient = torch.load(tmp_path / "gradient.pt", weights_only=True)
    same(gradient, policy.lm.lm_head.weight.grad)


# ------------------------------------------------------------------ tokenizers and heads of folders


def test_the_tokenizer_of_a_folder_is_that_of_its_file(tmp_path):
    """transformers takes Qwen2's own class for it, which cuts texts into other tokens."""
    config = Qwen2Config(**SIZE, num_key_value_heads=2)
    path = save(make(config), tmp_path / "qwen")
    tokenizer = load_tokenizer(path)
    assert tokenizer("w3 w4 w59").input_ids == [3, 4, 59]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, 0)


@pytest.mark.parametrize("in_file", [True, False])
def test_the_special_tokens_that_a_folder_does_not_name_are_those_of_the_class(tmp_path, in_file):
    end = "<|endoftext|>" if in_file else "<end>"  # Qwen2's class has the first for its EOS
    own = word_tokenizer(["<pad>", end, "<unk>", "w3", "w4"], eos_token=end)
    path = save(make(Qwen2Config(**SIZE, num_key_value_heads=2)), tmp_path / "qwen", own)
    (tmp_path / "qwen/tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(path, needs_eos=False)
    assert tokenizer("w3 w4").input_ids == [3, 4]  # as the file cuts it
    assert tokenizer.eos_token_id == (EOS if in_file else None)


@pytest.fixture
def tied_reward_model(tmp_path):
    """A reward model whose LM head would be its embeddings."""
    config = LlamaConfig(**SIZE, num_labels=1, tie_word_embeddings=True)
    return save(make(config, AutoModelForSequenceClassification), tmp_path / "rm")


def test_a_reward_model_is_no_policy(tied_reward_model):
    load_reward_model(tied_reward_model)
    with pytest.raises(InputError, match=r"rm: it holds score\.weight.*LlamaForCausalLM"):
        load_policy(tied_reward_model)


def test_the_bias_of_a_head_is_not_left_out(tied_reward_model):
    file = f"{tied_reward_model}/model.safetensors"
    tensors = load_file(file) | {"score.bias": torch.ones(1)}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"rm: it holds score\.bias"):
        load_reward_model(tied_reward_model)


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    config = LlamaConfig(**SIZE, num_labels=3)
    path = save(make(config, AutoModelForSequenceClassification), tmp_path / "model")
    for seed in (None, 0):
        with pytest.raises(InputError, match="model: a classifier of 3 labels, .*made from"):
            load_reward_model(path, seed=seed)


def test_a_classifier_that_cannot_score_a_text_is_refused_when_it_is_loaded(tmp_path):
    """Bart's classifier reads the last EOS of a text, and this tokenizer writes none."""
    config = BartConfig(**BART)
    model = make(config, AutoModelForSequenceClassification)
    path = save(model, tmp_path / "bart")
    with pytest.raises(InputError, match="bart: cannot score a text .*eos"):
        load_reward(f"{path}#LABEL_1", None, Dist(0, 1, torch.device("cpu")))
