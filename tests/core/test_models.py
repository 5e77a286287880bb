"""nanorlhf.models against Hugging Face's own forward of one row at a time, loops, and round trips through folders.

    B sequences, R response tokens, T tokens of a packed row, D hidden, V vocabulary
"""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    ARCHITECTURES,
    BATCH,
    EOS,
    MASK,
    PROMPTS,
    RESPONSES,
    SIZE,
    SPECIAL,
    B,
    D,
    R,
    V,
    gradients,
    same,
    tiny_lm,
    tiny_policy,
    word_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
)

import nanorlhf.models
from nanorlhf.errors import InputError
from nanorlhf.models import (
    Policy,
    check_model,
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_policy,
    save_reward_model,
)
from nanorlhf.packing import Packed, micro_batches, pack, response_mask_of

TEMPERATURE = 0.7


RESPONSES[1][-1] = RESPONSES[3][-1] = EOS
RESPONSES[4][1] = EOS  # within a response


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request):
    return tiny_policy(request.param)


@pytest.fixture(scope="module")
def reference():
    return tiny_policy("llama", seed=5, value_head=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{architecture: policy}, {architecture: the folder it was saved in}"""
    root = tmp_path_factory.mktemp("policies")
    policies = {name: tiny_policy(name) for name in ARCHITECTURES}
    for name, policy in policies.items():
        save_policy(policy, word_tokenizer(), str(root / name))
    return policies, {name: str(root / name) for name in ARCHITECTURES}


def alone(lm, prompt, response):
    """HF's own forward of one row: logits [T, V] and the trunk's last hidden states [T, D]."""
    out = lm(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
    return out.logits[0], out.hidden_states[-1][0]


def expected(policy, name, other=None):
    """[B, R] by a loop over rows and tokens."""
    out = torch.zeros(B, R)
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        logits, hidden = alone(policy.lm, prompt, response)
        for j, token in enumerate(response):
            at = len(prompt) + j - 1
            p = (logits[at] / TEMPERATURE).softmax(-1)
            if name == "logprobs":
                out[b, j] = (logits[at] / TEMPERATURE).log_softmax(-1)[token]
            elif name == "entropies":
                out[b, j] = -sum(x * math.log(x) for x in p.tolist())
            elif name == "full_kl":
                q = (alone(other.lm, prompt, response)[0][at] / TEMPERATURE).softmax(-1)
                out[b, j] = sum(x * math.log(x / y) for x, y in zip(p.tolist(), q.tolist()))
            else:
                out[b, j] = hidden[at] @ policy.value_head.weight[0] + policy.value_head.bias[0]
    return out


# ------------------------------------------------------------------------------------------------------------------ the packed forward


def test_pack_and_its_mask():
    assert BATCH.ids.tolist()[2] == PROMPTS[2] + RESPONSES[2] and BATCH.ids.tolist()[3] == PROMPTS[3] + RESPONSES[3] + [0, 0]
    assert BATCH.lengths.tolist() == [7, 7, 8, 6, 7] and len(BATCH) == 5
    assert MASK.tolist() == [[j < len(r) for j in range(6)] for r in RESPONSES]
    assert response_mask_of(BATCH, 9).tolist() == [[j < len(r) for j in range(9)] for r in RESPONSES]
    part = BATCH.rows(torch.tensor([3, 0]))
    assert part.ids.tolist() == [PROMPTS[3] + RESPONSES[3] + [0], PROMPTS[0] + RESPONSES[0]]
    parts = BATCH.micro_batches(2)
    assert [p.tolist() for p in parts] == [[3, 0], [1, 4], [2]]  # by length, ties in their order
    assert [p.tolist() for p in BATCH.micro_batches(2, torch.tensor([2, 4, 3]))] == [[3, 4], [2]]


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_within_a_token_budget(seed):
    """Every row once; no part above the budget but a row that is alone; and as few parts as any cut of the sorted rows allows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
    n, tokens = len(lengths), 40
    parts = micro_batches(lengths, 64, tokens)
    order = lengths.argsort(stable=True)
    assert torch.cat(parts).tolist() == order.tolist()

    def fits(rows):
        return len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= tokens

    assert all(fits(part) for part in parts)
    cuts = [[i for i in range(1, n) if bits >> i & 1] for bits in range(0, 2**n, 2)]  # every way to cut the sorted rows
    fewest = min(len(cut) + 1 for cut in cuts if all(fits(part) for part in order.tensor_split(cut)))
    assert len(parts) == fewest


def test_forward_is_that_of_the_hf_model(policy):
    out = policy(BATCH, MASK, TEMPERATURE)
    assert set(out) == {"logprobs", "values"}
    weights = torch.randn(B, R, generator=torch.Generator().manual_seed(3))
    for name in ("logprobs", "values"):
        oracle = expected(policy, name)
        assert oracle[MASK].std() > 0.5  # far from flat
        same(out[name], oracle)
        assert (out[name][~MASK] == 0).all()
        for mine, theirs in zip(gradients(policy, (out[name] * weights).sum()), gradients(policy, (oracle * weights).sum())):
            same(mine, theirs, 2e-4)
        out = policy(BATCH, MASK, TEMPERATURE)


def test_entropies_and_full_kl_by_loops(policy, reference):
    out = policy(BATCH, MASK, TEMPERATURE, entropy=True, kl_to=reference)
    same(out["entropies"], expected(policy, "entropies"))
    same(out["full_kl"], expected(policy, "full_kl", reference))
    assert out["full_kl"][MASK].min() > 0.1


def test_entropy_at_a_low_temperature(policy):
    """Probabilities that underflow: the entropies' gradient is finite, and float64's."""
    temperature = 0.02
    with torch.no_grad():
        hidden, _ = policy.hidden(BATCH, MASK)
        assert ((policy.logits(hidden) / temperature).softmax(-1) == 0).any()  # they do
    mine = gradients(policy, policy(BATCH, MASK, temperature, entropy=True)["entropies"].sum())

    exact = copy.deepcopy(policy).double()
    hidden, _ = exact.hidden(BATCH, MASK)
    logits = exact.lm.get_output_embeddings()(hidden)
    logp = (logits / temperature).log_softmax(-1)
    held = logp > -700
    theirs = gradients(exact, -(logp.exp()[held] * logp[held]).sum())
    for a, b in zip(mine, theirs, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() <= 1e-3 * b.norm() + 1e-6


def test_the_reference_gets_no_gradient(policy, reference):
    out = policy(BATCH, MASK, TEMPERATURE, kl_to=reference)
    out["full_kl"].sum().backward()
    assert all(p.grad is None for p in reference.parameters())
    assert policy.lm.get_output_embeddings().weight.grad.abs().max() > 0
    policy.zero_grad()


def test_padding_its_id_order_and_micro_batches_do_not_matter(policy):
    base = policy(BATCH, MASK, TEMPERATURE)
    for pad, extra in ((EOS, 0), (7, 5), (0, 3)):
        wide = pack([*PROMPTS, [9]], [*RESPONSES, [pad] * (7 + extra)], pad)  # a longer row makes the padding
        wide = Packed(wide.ids[:B], wide.prompt_lengths[:B], wide.response_lengths[:B])
        assert wide.ids.shape[1] == 8 + extra
        for name, value in policy(wide, MASK, TEMPERATURE).items():
            same(value, base[name])
    order = torch.tensor([4, 2, 0, 3, 1])
    for name, value in policy(BATCH.rows(order), MASK[order], TEMPERATURE).items():
        same(value, base[name][order])
    for size in (1, 2, 3):
        for rows in BATCH.micro_batches(size):
            part = BATCH.rows(rows)
            mask = response_mask_of(part)
            for name, value in policy(part, mask, TEMPERATURE).items():
                same(value, base[name][rows, : mask.shape[1]])


@pytest.mark.parametrize("size", [1, 4])
def test_chunks_of_logits_change_nothing(policy, reference, monkeypatch, size):
    def run():
        out = policy(BATCH, MASK, TEMPERATURE, entropy=True, kl_to=reference)
        loss = sum((out[name] * w).sum() for name, w in zip(sorted(out), (1.0, -0.5, 2.0, 0.3)))
        return {k: v.detach() for k, v in out.items()}, gradients(policy, loss)

    widths = []
    monkeypatch.setattr(Policy, "logits", lambda self, h, plain=Policy.logits: widths.append(len(h)) or plain(self, h))
    whole, whole_gradients = run()
    assert max(widths) == MASK.sum()
    widths.clear()
    monkeypatch.setattr(nanorlhf.models, "MAX_LOGITS", {"cpu": V * size})
    chunked, chunked_gradients = run()
    assert max(widths) == size and len(widths) == 4 * -(-int(MASK.sum()) // size)  # policy and reference, forward and again in backward
    with torch.no_grad():
        without = policy(BATCH, MASK, TEMPERATURE, entropy=True, kl_to=reference)
    assert max(widths) == size
    for name in whole:
        same(chunked[name], whole[name])
        same(without[name], whole[name])
    for a, b in zip(chunked_gradients, whole_gradients):
        same(a, b, 2e-4)


def test_soft_capped_logits():
    policy = tiny_policy("llama")
    hidden = torch.randn(3, D)
    plain = policy.logits(hidden)
    policy.lm.config.final_logit_softcapping = 1.5
    same(policy.logits(hidden), 1.5 * (plain / 1.5).tanh())


@pytest.mark.parametrize("config", [GraniteConfig(**SIZE, logits_scaling=8.0), CohereConfig(**SIZE, logit_scale=0.1)], ids=["granite", "cohere"])
def test_a_model_that_scales_its_logits_is_refused(config, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="logits"):
        load_policy(str(tmp_path))


# -------------------------------------------------------------------------------------------------------------------------- values


def test_a_new_value_head_says_zero():
    policy = Policy(tiny_lm("neox"))
    assert (policy(BATCH, MASK)["values"] == 0).all()
    assert "values" not in Policy(tiny_lm("neox"), value_head=False)(BATCH, MASK)


def test_final_values(policy):
    last = [alone(policy.lm, p, r)[1][-1] @ policy.value_head.weight[0] + policy.value_head.bias[0] for p, r in zip(PROMPTS, RESPONSES)]
    same(policy.final_values(BATCH), torch.stack(last))


def test_a_separate_value_trunk():
    other = tiny_lm("gpt2", seed=3)
    policy = tiny_policy("neox", value_trunk=other.base_model)
    shared = tiny_policy("neox")
    shared.value_head.load_state_dict(policy.value_head.state_dict())
    out = policy(BATCH, MASK, TEMPERATURE)
    same(out["logprobs"], shared(BATCH, MASK, TEMPERATURE)["logprobs"])
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        hidden = alone(other, prompt, response)[1]
        values = hidden @ policy.value_head.weight[0] + policy.value_head.bias
        same(out["values"][b, : len(response)], values[len(prompt) - 1 : -1])
        same(policy.final_values(BATCH)[b], values[-1])


def test_a_value_trunk_of_another_width():
    trunk = AutoModelForCausalLM.from_config(GPT2Config(**SPECIAL, n_embd=48, n_layer=2, n_head=4, n_positions=64)).base_model
    assert Policy(tiny_lm("neox"), value_trunk=trunk)(BATCH, MASK)["values"].shape == MASK.shape


# -------------------------------------------------------------------------------------------------------------- policies in folders


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_policy_loads_whole(folders, architecture):
    policy, path = folders[0][architecture], folders[1][architecture]
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        assert torch.equal(plain(BATCH.ids).logits, policy.lm(BATCH.ids).logits)
        old, new = policy(BATCH, MASK, TEMPERATURE), load_policy(path).eval()(BATCH, MASK, TEMPERATURE)
    assert torch.equal(old["logprobs"], new["logprobs"]) and torch.equal(old["values"], new["values"])
    assert old["values"].abs().max() > 0.5
    assert load_policy(path, value_head=False).value_head is None
    assert load_tokenizer(path).get_vocab() == word_tokenizer().get_vocab()


def test_a_run_folder_stands_for_its_model(folders, tmp_path):
    shutil.copytree(folders[1]["neox"], tmp_path / "run" / "model")
    assert check_model(str(tmp_path / "run")).model_type == "gpt_neox"
    assert load_tokenizer(str(tmp_path / "run")).eos_token_id == EOS
    assert torch.equal(load_policy(str(tmp_path / "run")).value_head.weight, folders[0]["neox"].value_head.weight)


def test_a_separate_value_model_survives_the_round_trip(folders, tmp_path):
    policy = load_policy(folders[1]["llama"], value_model=folders[1]["gpt2"]).eval()
    policy.value_head.weight.data.normal_()
    save_policy(policy, word_tokenizer(), str(tmp_path / "p"))
    again = load_policy(str(tmp_path / "p")).eval()
    old, new = policy(BATCH, MASK), again(BATCH, MASK)
    assert torch.equal(old["values"], new["values"]) and torch.equal(old["logprobs"], new["logprobs"])
    assert again.value_trunk.config.model_type == "gpt2" and policy.value_trunk is not None
    assert load_policy(str(tmp_path / "p"), value_head=False).value_trunk is None
    assert check_model(str(tmp_path / "p")).model_type == "llama"


def test_a_given_value_model_does_not_get_the_saved_head(folders):
    assert (load_policy(folders[1]["neox"], value_model=folders[1]["gpt2"]).value_head.weight == 0).all()


# -------------------------------------------------------------------------------------------------------------- reward models


def pooled(rm, prompt, response):
    """The score of one row alone: its last hidden state times the head, less the mean."""
    hidden = rm.model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0, -1]
    return (hidden @ rm.model.score.weight[0] - getattr(rm.model.config, "reward_mean", 0.0)).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reward_model(folders, architecture, tmp_path):
    rm = load_reward_model(folders[1][architecture], seed=0).eval().requires_grad_(False)
    raw = torch.tensor([pooled(rm, p, r) for p, r in zip(PROMPTS, RESPONSES)])
    assert raw.std() > 0.1
    same(rm(BATCH), raw)
    same(rm(pack(PROMPTS, RESPONSES, pad_id=EOS)), raw)  # BATCH has EOS inside and at the end of rows
    order = torch.tensor([3, 1])
    same(rm(BATCH.rows(order)), raw[order])  # trimmed

    rm.standardise(raw.mean().item(), raw.std().item())
    once = rm(BATCH)
    same(once, (raw - raw.mean()) / raw.std())
    rm.standardise(0.5, 3.0)  # as if other data had this mean and std
    twice = rm(BATCH)
    same(twice, (once - 0.5) / 3.0)

    path = str(tmp_path / "rm")
    save_reward_model(rm, word_tokenizer(), path)
    again = load_reward_model(path).eval()
    assert torch.equal(again(BATCH), twice)
    mean = again.model.config.reward_mean
    assert abs(mean) > 1e-3
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()  # finds the last token as `ids != pad`, pad is 0
    assert plain.config.num_labels == 1
    same(plain(BATCH.ids).logits[:, 0] - mean, twice)


def test_the_seed_draws_the_score_head(folders):
    heads = [load_reward_model(folders[1]["neox"], seed=s).model.score.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert abs(heads[0].std().item() * math.sqrt(D + 1) - 1) < 0.4
    trunk = load_reward_model(folders[1]["neox"], seed=1).model.gpt_neox.state_dict()
    assert all(torch.equal(v, trunk[k]) for k, v in folders[0]["neox"].lm.gpt_neox.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- errors, one line each


def one_line(function, path, *words):
    with pytest.raises(InputError) as e:
        function(str(path))
    message = str(e.value)
    assert "\n" not in message and message.startswith(str(path)) and all(w in message for w in words), message


def test_folders_that_are_no_models(folders, tmp_path):
    one_line(check_model, tmp_path / "missing", "no such")
    one_line(check_model, "./missing", "no such")
    (tmp_path / "empty").mkdir()
    one_line(check_model, tmp_path / "empty", "config.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folders[1]["neox"] + "/config.json", bare)
    one_line(check_model, bare, "no weights")
    (bare / "value_head.safetensors").write_bytes(b"")
    one_line(check_model, bare, "no weights")
    torch.save(folders[0]["neox"].lm.state_dict(), bare / "pytorch_model.bin")  # a pickle: never read
    one_line(check_model, bare, "no weights")
    one_line(load_policy, bare)
    (bare / "model.safetensors").write_bytes(b"not tensors")
    (bare / "config.json").write_text("{ not json")
    one_line(check_model, bare)
    assert check_model(folders[1]["neox"]).vocab_size == V


def test_weights_that_cannot_be_read(folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders[1]["neox"], broken)
    (broken / "model.safetensors").write_bytes(b"not tensors")
    one_line(load_policy, broken)


def test_tokenizers(tmp_path):
    one_line(load_tokenizer, tmp_path, "tokenizer")
    word_tokenizer(eos_token=None).save_pretrained(tmp_path / "no_eos")
    one_line(load_tokenizer, tmp_path / "no_eos", "EOS")
    word_tokenizer(pad_token=None).save_pretrained(tmp_path / "no_pad")
    assert load_tokenizer(str(tmp_path / "no_pad")).pad_token_id == EOS


# -------------------------------------------------------------------------------------------- damaged folders


@pytest.fixture
def damaged(tmp_path):
    """A function: a saved policy, changed -> its folder. config: fields of config.json; weights: a function of the tensors."""

    def make(config=None, weights=None):
        lm = tiny_lm("llama")
        lm.save_pretrained(tmp_path / "model")
        word_tokenizer().save_pretrained(tmp_path / "model")
        if config is not None:
            path = tmp_path / "model/config.json"
            path.write_text(json.dumps(config if not isinstance(config, dict) else {**json.loads(path.read_text()), **config}))
        if weights is not None:
            path = tmp_path / "model/model.safetensors"
            tensors = {name: x.clone() for name, x in load_file(path).items()}
            weights(tensors)
            save_file(tensors, path, {"format": "pt"})
        return str(tmp_path / "model")

    return make


@pytest.mark.parametrize("config", [
    None, 5, "x", [], {"hidden_size": "16"}, {"hidden_size": 0}, {"hidden_size": None}, {"num_attention_heads": 0}, {"num_attention_heads": 3},
    {"num_hidden_layers": 2.0}, {"num_hidden_layers": 10**12}, {"num_hidden_layers": 1e30}, {"vocab_size": 0}, {"vocab_size": 2},
    {"vocab_size": -5}, {"vocab_size": 10**15}, {"max_position_embeddings": "many"}, {"model_type": "nonsense"}, {"model_type": 5},
    {"hidden_act": "nonsense"}, {"dtype": "nonsense"}, {"rope_parameters": 5}, {"reward_mean": "0"},
    {"reward_mean": [1.0]}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"rms_norm_eps": "x"},
    {"id2label": "x"}, {"architectures": {}, "hidden_size": 10**30},
], ids=str)  # fmt: skip
def test_configs_that_make_no_model(damaged, config):
    folder = damaged(config="null" if config is None else config)
    if config is None:
        (Path(folder) / "config.json").write_text("null")
    with pytest.raises(InputError) as e:
        load_policy(folder)
    assert "\n" not in str(e.value) and folder in str(e.value)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("change, words", [
    (lambda x: x.view(-1)[3:4].fill_(math.nan), "holds numbers that are not finite"),
    (lambda x: x.view(-1)[-1:].fill_(-math.inf), "holds numbers that are not finite"),
])  # fmt: skip
def test_weights_that_are_not_finite(damaged, name, change, words):
    folder = damaged(weights=lambda tensors: change(tensors[name]))
    with pytest.raises(InputError, match=f"{folder}: {name} {words}"):
        load_policy(folder)


def test_weights_of_whole_numbers(damaged):
    folder = damaged(weights=lambda tensors: tensors.update({"model.norm.weight": torch.ones(SIZE["hidden_size"], dtype=torch.int64)}))
    with pytest.raises(InputError, match="model.safetensors: model.norm.weight holds I64"):
        load_policy(folder)


def test_tokens_without_embeddings(damaged):
    """One in the middle of the vocabulary, and EOS alone: one line says which and what to do, before the model is loaded."""
    folder = damaged()
    tokenizer = word_tokenizer()
    load_tokenizer(folder)
    tokenizer.add_tokens([f"more{i}" for i in range(V)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=f"the tokenizer's token 'more.*' has the id .* embeddings 0 to {V - 1} alone.*resize_token_embeddings"):
        load_tokenizer(folder)
    path = Path(folder) / "tokenizer_config.json"
    word_tokenizer().save_pretrained(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<the end>"}))
    with pytest.raises(InputError, match="the tokenizer's token '<the end>' has the id"):
        load_tokenizer(folder)


def test_a_tokenizer_alone(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == word_tokenizer().get_vocab()


@pytest.mark.parametrize("files", [
    {"tokenizer.json": "{}"}, {"tokenizer.json": "[]"}, {"tokenizer.json": "null"}, {"tokenizer.json": "[" * 10**5},
    {"tokenizer_config.json": "[]"}, {"tokenizer_config.json": '{"eos_token": 5}'}, {"tokenizer_config.json": '{"tokenizer_class": "Nonsense"}'},
    {"special_tokens_map.json": "[]", "tokenizer_config.json": "5"},
], ids=str)  # fmt: skip
def test_files_that_make_no_tokenizer(damaged, files):
    folder = damaged()
    for name, text in files.items():
        (Path(folder) / name).write_text(text)
    with pytest.raises(InputError) as e:
        load_tokenizer(folder)
    assert "\n" not in str(e.value) and folder in str(e.value)


def test_a_name_of_no_letters(damaged, monkeypatch):
    """'' is not the folder model/ that happens to be here."""
    monkeypatch.chdir(Path(damaged()).parent)
    for function in (check_model, load_tokenizer, load_policy, load_reward_model):
        with pytest.raises(InputError, match="a model without a name"):
            function("")
