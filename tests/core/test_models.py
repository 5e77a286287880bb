"""nanorlhf.models and packing against Hugging Face's own forward of one row at a time, loops, and
round trips through folders.

    B sequences, R response tokens, T tokens of a packed row, D hidden, V vocabulary

PROMPTS and RESPONSES are five random token lists each, BATCH the same packed, MASK its responses.
"""

import copy
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from checks import same
from safetensors.torch import load_file, save_file
from tiny_models import (
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
from nanorlhf.hf.folders import check_model
from nanorlhf.models import (
    Policy,
    check_reads_tokens,
    divide,
    knows_scale,
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_policy,
    save_reward_model,
)
from nanorlhf.packing import Packed, micro_batches, pack, pad_rows, response_mask_of

TEMPERATURE = 0.7


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request):
    return tiny_policy(request.param)


@pytest.fixture(scope="module")
def reference():
    return tiny_policy("llama", seed=5, value_head=False)


@pytest.fixture(scope="module")
def policies():
    """{architecture: policy}"""
    return {name: tiny_policy(name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def folders(policies, tmp_path_factory):
    """{architecture: the folder that its policy was saved in}"""
    root = tmp_path_factory.mktemp("policies")
    paths = {}
    for name, policy in policies.items():
        paths[name] = str(root / name)
        save_policy(policy, word_tokenizer(), paths[name])
    return paths


# ------------------------------------------------------------------------------------ packed rows


def test_a_packed_row_is_prompt_response_and_padding():
    rows = BATCH.ids.tolist()
    assert rows[2] == PROMPTS[2] + RESPONSES[2]  # the longest row
    assert rows[3] == PROMPTS[3] + RESPONSES[3] + [0, 0]
    assert BATCH.lengths.tolist() == [7, 7, 8, 6, 7]
    assert len(BATCH) == 5


def test_rows_are_padded_on_one_side():
    assert pad_rows([[5], [6, 7]]).tolist() == [[5, 0], [6, 7]]
    assert pad_rows([[5], [6, 7]], 9, side="left").tolist() == [[9, 5], [6, 7]]


def test_a_process_may_have_no_rows():
    batch = pack([], [])
    assert batch.ids.shape == (0, 0)
    assert len(batch) == 0
    assert batch.lengths.tolist() == []


def test_the_response_mask_holds_as_many_tokens_as_the_response():
    expected = []
    for response in RESPONSES:
        expected.append([j < len(response) for j in range(6)])  # the longest has 6
    assert response_mask_of(BATCH).tolist() == expected


def test_chosen_rows_are_trimmed_to_their_own_longest():
    part = BATCH.rows(torch.tensor([3, 0]))
    first, second = part.ids.tolist()
    assert first == PROMPTS[3] + RESPONSES[3] + [0]
    assert second == PROMPTS[0] + RESPONSES[0]


def test_micro_batches_are_of_similar_length():
    # The lengths are 7, 7, 8, 6, 7: by length, ties in their order.
    parts = BATCH.micro_batches(2)
    assert [rows.tolist() for rows in parts] == [[3, 0], [1, 4], [2]]
    some_rows = torch.tensor([2, 4, 3])
    parts = BATCH.micro_batches(2, index=some_rows)
    assert [rows.tolist() for rows in parts] == [[3, 4], [2]]
    parts = micro_batches(torch.tensor([7, 3, 5]), 2)
    assert [rows.tolist() for rows in parts] == [[1, 2], [0]]


@pytest.mark.parametrize("tokens", [0, 8])
def test_no_rows_are_no_micro_batch(tokens):
    """A process that has no share of a few texts makes no forward pass."""
    none = torch.zeros(0, dtype=torch.long)
    assert micro_batches(none, 2, tokens) == []
    assert pack([], []).micro_batches(2, tokens) == []


TOKEN_BUDGET = 40


def test_a_micro_batch_may_fill_its_token_budget():
    lengths = torch.tensor([20, 20])
    [rows] = micro_batches(lengths, 64, TOKEN_BUDGET)
    assert rows.tolist() == [0, 1]


def fits(lengths):
    """Whether rows of these lengths, padded to the longest, stay within the budget, or one row."""
    return len(lengths) == 1 or len(lengths) * max(lengths) <= TOKEN_BUDGET


def fewest_parts(lengths):
    """The fewest parts of any cut of a sorted list into parts that fit, by trying all 2^(n-1)."""
    n = len(lengths)
    fewest = n
    for n_cuts in range(n):
        for cuts in itertools.combinations(range(1, n), n_cuts):
            ends = [0, *cuts, n]
            parts = [lengths[i:j] for i, j in itertools.pairwise(ends)]
            if all(fits(part) for part in parts):
                fewest = min(fewest, len(parts))
    return fewest


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_within_a_token_budget(seed):
    """Every row once, no part above the budget but a single row, and as few parts as possible."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 9, (), generator=generator))
    lengths = torch.randint(1, 30, (n,), generator=generator)
    parts = micro_batches(lengths, 64, TOKEN_BUDGET)

    order = lengths.argsort(stable=True)
    assert torch.cat(parts).tolist() == order.tolist()
    for rows in parts:
        assert fits(lengths[rows].tolist())
    assert len(parts) == fewest_parts(lengths[order].tolist())


# ------------------------------------------------------------------------------ the packed forward


def forward_alone(lm, prompt, response):
    """HF's own forward of one row: logits [T, V] and the trunk's last hidden states [T, D]."""
    ids = torch.tensor([prompt + response])
    out = lm(input_ids=ids, output_hidden_states=True)
    return out.logits[0], out.hidden_states[-1][0]


def value_of(policy, hidden):
    """The value head at one hidden state [D], or at several [.., D]."""
    return hidden @ policy.value_head.weight[0] + policy.value_head.bias[0]


def entropy_by_a_loop(p):
    total = 0.0
    for p_v in p.tolist():
        total -= p_v * math.log(p_v)
    return total


def kl_by_a_loop(p, q):
    total = 0.0
    for p_v, q_v in zip(p.tolist(), q.tolist()):
        total += p_v * math.log(p_v / q_v)
    return total


def expected_output(policy, name, reference=None):
    """One of the outputs of a policy, [B, R], by a loop over rows and tokens."""
    expected = torch.zeros(B, R)
    for b in range(B):
        prompt = PROMPTS[b]
        response = RESPONSES[b]
        logits, hidden = forward_alone(policy.lm, prompt, response)
        if reference is not None:
            ref_logits, _ = forward_alone(reference.lm, prompt, response)
        for j, token in enumerate(response):
            # The position to the left of the token scores it.
            t = len(prompt) + j - 1
            scaled = logits[t] / TEMPERATURE
            if name == "logprobs":
                expected[b, j] = scaled.log_softmax(-1)[token]
            elif name == "values":
                expected[b, j] = value_of(policy, hidden[t])
            elif name == "entropies":
                expected[b, j] = entropy_by_a_loop(scaled.softmax(-1))
            elif name == "full_kl":
                ref_scaled = ref_logits[t] / TEMPERATURE
                expected[b, j] = kl_by_a_loop(scaled.softmax(-1), ref_scaled.softmax(-1))
    return expected


@pytest.mark.parametrize("name", ["logprobs", "values"])
def test_forward_is_that_of_the_hf_model(policy, name):
    """Values and gradients."""
    out = policy(BATCH, MASK, TEMPERATURE)
    assert set(out) == {"logprobs", "values"}
    expected = expected_output(policy, name)
    assert expected[MASK].std() > 0.5  # far from flat
    same(out[name], expected)
    assert (out[name][~MASK] == 0).all()

    weights = torch.randn(B, R, generator=torch.Generator().manual_seed(3))
    found_gradients = gradients(policy, (out[name] * weights).sum())
    expected_gradients = gradients(policy, (expected * weights).sum())
    for found, expected in zip(found_gradients, expected_gradients):
        same(found, expected, 2e-4)


def test_entropies_and_full_kl_by_loops(policy, reference):
    out = policy(BATCH, MASK, TEMPERATURE, entropy=True, kl_to=reference)
    same(out["entropies"], expected_output(policy, "entropies"))
    same(out["full_kl"], expected_output(policy, "full_kl", reference))
    assert out["full_kl"][MASK].min() > 0.1


def test_entropy_at_a_low_temperature(policy):
    """Probabilities that underflow: the entropies' gradient is finite, and float64's."""
    temperature = 0.02
    with torch.no_grad():
        hidden, _ = policy.hidden(BATCH, MASK)
        probs = (policy.logits(hidden) / temperature).softmax(-1)
    assert (probs == 0).any()  # they do
    out = policy(BATCH, MASK, temperature, entropy=True)
    found = gradients(policy, out["entropies"].sum())

    # In float64, over the probabilities that it still tells from 0.
    exact = copy.deepcopy(policy).double()
    hidden, _ = exact.hidden(BATCH, MASK)
    logits = exact.lm.get_output_embeddings()(hidden)
    logp = (logits / temperature).log_softmax(-1)
    logp = logp[logp > -700]
    entropy = -(logp.exp() * logp).sum()
    expected = gradients(exact, entropy)

    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        error = (a.double() - b).norm()
        assert error <= 1e-3 * b.norm() + 1e-6


def test_the_reference_gets_no_gradient(policy, reference):
    out = policy(BATCH, MASK, TEMPERATURE, kl_to=reference)
    out["full_kl"].sum().backward()
    for parameter in reference.parameters():
        assert parameter.grad is None
    assert policy.lm.get_output_embeddings().weight.grad.abs().max() > 0
    policy.zero_grad()


def pad_wider(pad_id, extra):
    """BATCH with `extra` columns more of padding, all padding of the id pad_id."""
    # A longer row makes the padding, and is left out again.
    longest = [pad_id] * (7 + extra)
    wide = pack([*PROMPTS, [9]], [*RESPONSES, longest], pad_id)
    assert wide.ids.shape[1] == 8 + extra
    return Packed(wide.ids[:B], wide.prompt_lengths[:B], wide.response_lengths[:B])


@pytest.mark.parametrize("pad_id, extra", [(EOS, 0), (7, 5), (0, 3)])
def test_padding_and_its_id_do_not_matter(policy, pad_id, extra):
    expected = policy(BATCH, MASK, TEMPERATURE)
    padded = policy(pad_wider(pad_id, extra), MASK, TEMPERATURE)
    for name in expected:
        same(padded[name], expected[name])


def test_the_order_of_rows_does_not_matter(policy):
    expected = policy(BATCH, MASK, TEMPERATURE)
    order = torch.tensor([4, 2, 0, 3, 1])
    reordered = policy(BATCH.rows(order), MASK[order], TEMPERATURE)
    for name in expected:
        same(reordered[name], expected[name][order])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_do_not_matter(policy, size):
    expected = policy(BATCH, MASK, TEMPERATURE)
    for rows in BATCH.micro_batches(size):
        part = BATCH.rows(rows)
        mask = response_mask_of(part)
        width = mask.shape[1]
        out = policy(part, mask, TEMPERATURE)
        for name in expected:
            same(out[name], expected[name][rows, :width])


@pytest.fixture
def chunk_sizes(monkeypatch):
    """At how many positions at once the LM head has been called: a list that grows."""
    sizes = []
    logits = Policy.logits

    def watched(policy, hidden):
        sizes.append(len(hidden))
        return logits(policy, hidden)

    monkeypatch.setattr(Policy, "logits", watched)
    return sizes


def run_with_all_outputs(policy, reference):
    """All outputs, detached, and the gradients of a weighted sum of them."""
    out = policy(BATCH, MASK, TEMPERATURE, entropy=True, kl_to=reference)
    weights = {"entropies": 1.0, "full_kl": -0.5, "logprobs": 2.0, "values": 0.3}
    loss = 0.0
    for name, weight in weights.items():
        loss = loss + (out[name] * weight).sum()
    outputs = {name: value.detach() for name, value in out.items()}
    return outputs, gradients(policy, loss)


@pytest.mark.parametrize("size", [1, 4])
def test_chunks_of_logits_change_nothing(policy, reference, monkeypatch, chunk_sizes, size):
    whole, whole_gradients = run_with_all_outputs(policy, reference)
    n_tokens = int(MASK.sum())
    assert max(chunk_sizes) == n_tokens

    chunk_sizes.clear()
    monkeypatch.setattr(nanorlhf.models, "MAX_LOGITS", {"cpu": V * size})
    chunked, chunked_gradients = run_with_all_outputs(policy, reference)
    assert max(chunk_sizes) == size
    # Policy and reference, forward and again in backward.
    assert len(chunk_sizes) == 4 * math.ceil(n_tokens / size)

    with torch.no_grad():
        without = policy(BATCH, MASK, TEMPERATURE, entropy=True, kl_to=reference)
    assert max(chunk_sizes) == size
    for name in whole:
        same(chunked[name], whole[name])
        same(without[name], whole[name])
    for found, expected in zip(chunked_gradients, whole_gradients):
        same(found, expected, 2e-4)


def test_at_temperature_1_nothing_is_divided_and_the_bits_are_the_same(
    policy, reference, monkeypatch
):
    def outputs_and_gradients():
        out = policy(BATCH, MASK, 1.0, entropy=True, kl_to=reference)
        loss = (2 * out["logprobs"] + out["entropies"] - out["full_kl"]).sum()
        return [*out.values(), *gradients(policy, loss)]

    found = outputs_and_gradients()
    divided = []

    def really_divide(logits, temperature):
        divided.append(temperature)
        return logits / temperature

    monkeypatch.setattr(nanorlhf.models, "divide", really_divide)
    expected = outputs_and_gradients()
    assert divided == [1.0, 1.0]  # the policy's logits and the reference's
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(tensor, other)

    logits = torch.randn(3, V)
    assert divide(logits, 1.0) is logits
    same(divide(logits, 0.5), 2 * logits)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_scores_of_tokens():
    """Log-probs, entropies and gradients with --compile, for micro-batches of three sizes.

    The first size is compiled as it is, the second for any size; the third compiles nothing.
    """
    policy = tiny_policy("neox")

    def outputs_and_gradients(part):
        out = policy(part, response_mask_of(part), 1.0, entropy=True)
        loss = (2 * out["logprobs"] + out["entropies"]).sum()
        return [out["logprobs"], out["entropies"], *gradients(policy, loss)]

    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    n_graphs = []
    for n_rows in (3, 2, 4):
        part = BATCH.rows(torch.arange(n_rows))
        # The blocks are not handed to the compiler: nothing else is compiled.
        policy.lm.compiled = False
        expected = outputs_and_gradients(part)
        policy.lm.compiled = True
        found = outputs_and_gradients(part)
        for tensor, other in zip(found, expected, strict=True):
            assert (tensor - other).norm() <= 1e-6 * other.norm()
        n_graphs.append(graphs["unique_graphs"])
    assert n_graphs == [1, 2, 2]


def test_soft_capped_logits():
    policy = tiny_policy("llama")
    hidden = torch.randn(3, D)
    plain = policy.logits(hidden)
    policy.lm.config.final_logit_softcapping = 1.5
    same(policy.logits(hidden), 1.5 * (plain / 1.5).tanh())


SCALERS = {
    "granite": GraniteConfig(**SIZE, logits_scaling=8.0),
    "cohere": CohereConfig(**SIZE, logit_scale=0.1),
}


@pytest.mark.parametrize("config", SCALERS.values(), ids=SCALERS.keys())
def test_a_model_that_scales_its_logits(config, tmp_path):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    lm.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path))
    ids = torch.tensor([[3, 4, 5]])

    hidden = policy.lm.base_model(input_ids=ids).last_hidden_state

    # What is scaled is far from what is not: the test would see a factor that is missing.
    same(policy.logits(hidden), lm(input_ids=ids).logits)
    unscaled = policy.lm.get_output_embeddings()(hidden)
    assert (policy.logits(hidden) - unscaled).norm() > 0.5 * unscaled.norm()


def test_a_model_that_does_something_else_to_its_logits_is_refused(tmp_path, monkeypatch):
    tiny_lm("llama").save_pretrained(tmp_path)
    logits = Policy.logits
    monkeypatch.setattr(Policy, "logits", lambda self, hidden: 2 * logits(self, hidden))
    with pytest.raises(InputError, match="logits"):
        load_policy(str(tmp_path))


# ----------------------------------------------------------------------------------------- values


def test_a_new_value_head_says_zero():
    policy = Policy(tiny_lm("neox"))
    assert (policy(BATCH, MASK)["values"] == 0).all()


def test_without_a_value_head_there_are_no_values():
    policy = Policy(tiny_lm("neox"), value_head=False)
    assert "values" not in policy(BATCH, MASK)


def test_final_values(policy):
    """The value after the last token of each row."""
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        _, hidden = forward_alone(policy.lm, prompt, response)
        expected.append(value_of(policy, hidden[-1]))
    same(policy.final_values(BATCH), torch.stack(expected))


def test_a_separate_value_trunk():
    other = tiny_lm("gpt2", seed=3)
    policy = tiny_policy("neox", value_trunk=other.base_model)
    out = policy(BATCH, MASK, TEMPERATURE)
    final_values = policy.final_values(BATCH)
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        _, hidden = forward_alone(other, prompt, response)
        values = value_of(policy, hidden)
        same(out["values"][b, : len(response)], values[len(prompt) - 1 : -1])
        same(final_values[b], values[-1])


def test_a_separate_value_trunk_leaves_the_logprobs_alone():
    policy = tiny_policy("neox", value_trunk=tiny_lm("gpt2", seed=3).base_model)
    shared = tiny_policy("neox")
    shared.value_head.load_state_dict(policy.value_head.state_dict())
    found = policy(BATCH, MASK, TEMPERATURE)
    expected = shared(BATCH, MASK, TEMPERATURE)
    same(found["logprobs"], expected["logprobs"])


def test_a_value_trunk_of_another_width():
    config = GPT2Config(**SPECIAL, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    trunk = AutoModelForCausalLM.from_config(config).base_model
    policy = Policy(tiny_lm("neox"), value_trunk=trunk)
    assert policy(BATCH, MASK)["values"].shape == MASK.shape


# ---------------------------------------------------------------------------- policies in folders


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_policy_loads_whole(policies, folders, architecture):
    policy = policies[architecture]
    loaded = load_policy(folders[architecture]).eval()
    with torch.no_grad():
        old = policy(BATCH, MASK, TEMPERATURE)
        new = loaded(BATCH, MASK, TEMPERATURE)
    assert torch.equal(old["logprobs"], new["logprobs"])
    assert torch.equal(old["values"], new["values"])
    assert old["values"].abs().max() > 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_policy_is_a_plain_hf_model(policies, folders, architecture):
    path = folders[architecture]
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = policies[architecture].lm(BATCH.ids).logits
        assert torch.equal(plain(BATCH.ids).logits, expected)
    assert load_policy(path, value_head=False).value_head is None
    assert load_tokenizer(path).get_vocab() == word_tokenizer().get_vocab()


def test_a_run_folder_stands_for_its_model(policies, folders, tmp_path):
    run = str(tmp_path / "run")
    shutil.copytree(folders["neox"], f"{run}/model")
    assert check_model(run).model_type == "gpt_neox"
    assert load_tokenizer(run).eos_token_id == EOS
    head = load_policy(run).value_head
    assert torch.equal(head.weight, policies["neox"].value_head.weight)


def test_a_separate_value_model_survives_the_round_trip(folders, tmp_path):
    policy = load_policy(folders["llama"], value_model=folders["gpt2"]).eval()
    policy.value_head.weight.data.normal_()
    path = str(tmp_path / "p")
    save_policy(policy, word_tokenizer(), path)
    again = load_policy(path).eval()

    old = policy(BATCH, MASK)
    new = again(BATCH, MASK)
    assert torch.equal(old["values"], new["values"])
    assert torch.equal(old["logprobs"], new["logprobs"])
    assert policy.value_trunk is not None
    assert again.value_trunk.config.model_type == "gpt2"
    assert load_policy(path, value_head=False).value_trunk is None
    assert check_model(path).model_type == "llama"


def test_a_given_value_model_does_not_get_the_saved_head(folders):
    policy = load_policy(folders["neox"], value_model=folders["gpt2"])
    assert (policy.value_head.weight == 0).all()


# ---------------------------------------------------------------------------------- reward models


def scores_by_hand(rm):
    """The score of each row alone: its last hidden state times the head, less the mean."""
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        ids = torch.tensor([prompt + response])
        out = rm.model(input_ids=ids, output_hidden_states=True)
        last_hidden = out.hidden_states[-1][0, -1]
        scores.append(last_hidden @ rm.model.score.weight[0])
    mean = getattr(rm.model.config, "reward_mean", 0.0)
    return torch.stack(scores) - mean


@pytest.fixture(params=ARCHITECTURES)
def rm(folders, request):
    """A reward model with a fresh head."""
    return load_reward_model(folders[request.param], seed=0).eval().requires_grad_(False)


def test_a_reward_model_scores_the_last_token(rm):
    expected = scores_by_hand(rm)
    assert expected.std() > 0.1
    same(rm(BATCH), expected)
    # BATCH has EOS inside and at the end of rows: as padding it changes nothing.
    same(rm(pack(PROMPTS, RESPONSES, pad_id=EOS)), expected)
    order = torch.tensor([3, 1])
    same(rm(BATCH.rows(order)), expected[order])  # trimmed


def test_standardised_scores(rm):
    raw = scores_by_hand(rm)
    rm.standardise(raw.mean().item(), raw.std().item())
    once = rm(BATCH)
    same(once, (raw - raw.mean()) / raw.std())
    # Again, as if other data had this mean and std.
    rm.standardise(0.5, 3.0)
    same(rm(BATCH), (once - 0.5) / 3.0)


def test_standardising_can_be_undone(rm):
    raw = scores_by_hand(rm)
    assert abs(raw.std() - 1) > 0.01
    rm.standardise(raw.mean().item(), raw.std().item())
    rm.standardise(0.5, 3.0)
    rm.undo_standardise()
    same(rm(BATCH), raw)
    # And once more, which leaves it as it is.
    rm.undo_standardise()
    same(rm(BATCH), raw)


def test_a_reward_model_from_before_its_std_was_kept_scores_as_ever(rm, tmp_path):
    rm.standardise(0.5, 3.0)
    expected = rm(BATCH)
    save_reward_model(rm, word_tokenizer(), str(tmp_path))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("reward_std") == 3
    file.write_text(json.dumps(config))
    again = load_reward_model(str(tmp_path))
    assert torch.equal(again(BATCH), expected)
    assert not knows_scale(str(tmp_path))
    # From here on it is kept.
    again.standardise(0.25, 2.0)
    assert again.model.config.reward_std == 2


def test_a_new_head_on_the_trunk_of_a_reward_model_has_no_scale_yet(rm, tmp_path):
    rm.standardise(0.5, 3.0)
    save_reward_model(rm, word_tokenizer(), str(tmp_path))
    assert knows_scale(str(tmp_path))
    again = load_reward_model(str(tmp_path), seed=1)
    raw = again.model.score.weight.clone()
    same(again(BATCH), scores_by_hand(again))
    again.standardise(0.25, 2.0)
    config = again.model.config
    assert (config.reward_mean, config.reward_std) == (0.125, 2)
    again.undo_standardise()
    assert torch.equal(again.model.score.weight, raw)


def test_a_saved_reward_model_is_a_plain_hf_model_up_to_its_mean(rm, tmp_path):
    raw = scores_by_hand(rm)
    rm.standardise(raw.mean().item(), raw.std().item())
    rm.standardise(0.5, 3.0)
    expected = rm(BATCH)
    path = str(tmp_path / "rm")
    rm.model.config.pad_token_id = None  # the tokenizer's is saved
    save_reward_model(rm, word_tokenizer(), path)

    again = load_reward_model(path).eval()
    # The weight lies elsewhere in memory than before, and a product may round otherwise there.
    assert torch.equal(again.model.score.weight, rm.model.score.weight)
    same(again(BATCH), expected)
    mean = again.model.config.reward_mean
    assert abs(mean) > 1e-3
    # HF finds the last token as the last one that is not the padding's id, 0.
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert plain.config.num_labels == 1
    same(plain(BATCH.ids).logits[:, 0] - mean, expected)


def test_the_seed_draws_the_score_head(folders):
    first = load_reward_model(folders["neox"], seed=0).model.score.weight
    again = load_reward_model(folders["neox"], seed=0).model.score.weight
    other = load_reward_model(folders["neox"], seed=1).model.score.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Its standard deviation is about 1 / sqrt(D + 1).
    assert abs(first.std().item() * math.sqrt(D + 1) - 1) < 0.4


def test_a_new_reward_model_has_the_trunk_of_the_policy(policies, folders):
    trunk = load_reward_model(folders["neox"], seed=1).model.gpt_neox.state_dict()
    for name, tensor in policies["neox"].lm.gpt_neox.state_dict().items():
        assert torch.equal(tensor, trunk[name])


# --------------------------------------------------------------------------- errors, one line each


def check_error(function, path, *words):
    """The function refuses the path, in one line that names it and says these words."""
    with pytest.raises(InputError) as error:
        function(str(path))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for word in words:
        assert word in message


def test_folders_that_are_not_there(tmp_path):
    check_error(check_model, tmp_path / "missing", "no such")
    check_error(check_model, "./missing", "no such")


def test_a_path_below_a_file_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").touch()
    Path("circle").symlink_to("circle")

    for path in ("pairs.jsonl/x", "circle/x"):
        with pytest.raises(InputError, match=f"^{path}: no such model folder; .* is not a folder$"):
            check_model(path)


def test_an_empty_folder(tmp_path):
    check_error(check_model, tmp_path, "config.json")


def test_a_folder_without_weights(policies, folders, tmp_path):
    shutil.copy(folders["neox"] + "/config.json", tmp_path)
    check_error(check_model, tmp_path, "no weights")
    (tmp_path / "value_head.safetensors").write_bytes(b"")
    check_error(check_model, tmp_path, "no weights")
    # A pickle is never read.
    torch.save(policies["neox"].lm.state_dict(), tmp_path / "pytorch_model.bin")
    check_error(check_model, tmp_path, "no weights")
    check_error(load_policy, tmp_path)


def test_a_config_that_cannot_be_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    (tmp_path / "config.json").write_text("{ not json")
    check_error(check_model, tmp_path)


def test_a_good_folder(folders):
    assert check_model(folders["neox"]).vocab_size == V


def test_weights_that_cannot_be_read(folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders["neox"], broken)
    (broken / "model.safetensors").write_bytes(b"not tensors")
    check_error(load_policy, broken)


def test_a_folder_without_a_tokenizer(tmp_path):
    check_error(load_tokenizer, tmp_path, "tokenizer")


def test_a_tokenizer_without_eos(tmp_path):
    word_tokenizer(eos_token=None).save_pretrained(tmp_path)
    check_error(load_tokenizer, tmp_path, "EOS")


def test_a_value_model_may_have_added_tokens_of_its_own(tmp_path):
    """Such as the PAD of a reward model, or names for what another version reserves."""
    tiny_lm("gpt2").save_pretrained(tmp_path)
    words = ["<eos>", "<unk>", *[f"w{i}" for i in range(V - 3)]]
    word_tokenizer(words, pad_token="<pad>").save_pretrained(tmp_path)
    check_reads_tokens(str(tmp_path), word_tokenizer(words, pad_token="<end of turn>"))
    # A word of the vocabulary itself is another matter.
    words[-1] = "new"
    with pytest.raises(InputError, match="its tokenizer is not the policy's.*differ in 'new'"):
        check_reads_tokens(str(tmp_path), word_tokenizer(words, pad_token="<pad>"))


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path):
    word_tokenizer(pad_token=None).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == EOS


# ---------------------------------------------------------------------------------- damaged folders


@pytest.fixture
def damaged(tmp_path):
    """A function: a saved policy, changed -> its folder.

    config: fields of config.json; weights: a function of the tensors.
    """

    def make(config=None, weights=None):
        lm = tiny_lm("llama")
        lm.save_pretrained(tmp_path / "model")
        word_tokenizer().save_pretrained(tmp_path / "model")
        if config is not None:
            path = tmp_path / "model/config.json"
            path.write_text(
                json.dumps(
                    config
                    if not isinstance(config, dict)
                    else {**json.loads(path.read_text()), **config}
                )
            )
        if weights is not None:
            path = tmp_path / "model/model.safetensors"
            tensors = {name: x.clone() for name, x in load_file(path).items()}
            weights(tensors)
            save_file(tensors, path, {"format": "pt"})
        return str(tmp_path / "model")

    return make


@pytest.mark.parametrize(
    "config",
    [
        None,
        5,
        "x",
        [],
        {"hidden_size": "16"},
        {"hidden_size": 0},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": 2.0},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 1e30},
        {"vocab_size": 0},
        {"vocab_size": 2},
        {"vocab_size": -5},
        {"vocab_size": 10**15},
        {"max_position_embeddings": "many"},
        {"model_type": "nonsense"},
        {"model_type": 5},
        {"hidden_act": "nonsense"},
        {"dtype": "nonsense"},
        {"rope_parameters": 5},
        {"reward_mean": "0"},
        {"reward_std": None},
        {"reward_std": "1"},
        {"reward_std": 0.0},
        {"reward_std": -1.0},
        {"reward_std": float("nan")},
        {"reward_mean": [1.0]},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"rms_norm_eps": "x"},
        {"rms_norm_eps": float("nan")},
        {"id2label": "x"},
        {"architectures": {}, "hidden_size": 10**30},
    ],
    ids=str,
)
def test_configs_that_make_no_model(damaged, config):
    folder = damaged(config="null" if config is None else config)
    if config is None:
        (Path(folder) / "config.json").write_text("null")
    with pytest.raises(InputError) as e:
        load_policy(folder)
    assert "\n" not in str(e.value) and folder in str(e.value)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("change, words", [
    (lambda x: x.view(-1)[3:4].fill_(math.nan), "holds numbers that are not finite"),
    (lambda x: x.view(-1)[-1:].fill_(-math.inf), "holds numbers that are not finite"),
])  # fmt: skip
def test_weights_that_are_not_finite(damaged, name, change, words):
    folder = damaged(weights=lambda tensors: change(tensors[name]))
    with pytest.raises(InputError, match=f"{folder}: {name} {words}"):
        load_policy(folder)


def test_weights_of_whole_numbers(damaged):
    folder = damaged(
        weights=lambda tensors: tensors.update(
            {"model.norm.weight": torch.ones(SIZE["hidden_size"], dtype=torch.int64)}
        )
    )
    with pytest.raises(InputError, match="model.safetensors: model.norm.weight holds I64"):
        load_policy(folder)


def test_tokens_without_embeddings(damaged):
    """One in the middle of the vocabulary, and EOS alone.

    One line says which and what to do, before the model is loaded.
    """
    folder = damaged()
    tokenizer = word_tokenizer()
    load_tokenizer(folder)
    tokenizer.add_tokens([f"more{i}" for i in range(V)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        InputError,
        match=f"the tokenizer's token 'more.*' has the id .* embeddings 0 to {V - 1} alone"
        ".*resize_token_embeddings",
    ):
        load_tokenizer(folder)
    path = Path(folder) / "tokenizer_config.json"
    word_tokenizer().save_pretrained(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<the end>"}))
    with pytest.raises(InputError, match="the tokenizer's token '<the end>' has the id"):
        load_tokenizer(folder)


def test_a_padding_token_without_an_embedding(damaged):
    """Padding is never read, so EOS takes its place.

    Also where the token is left in a tokenizer that was saved so.
    """
    folder = damaged()
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == V
    for _ in range(2):
        tokenizer.save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.pad_token_id == EOS and tokenizer.get_vocab()["[PAD]"] == V


@pytest.mark.parametrize("role", ["bos_token", "unk_token", "chat_template"])
def test_special_tokens_of_texts_without_embeddings(damaged, role):
    """Texts hold them, so they are refused, other than a padding token."""
    folder = damaged()
    tokenizer = word_tokenizer()
    if role == "chat_template":
        tokenizer.add_special_tokens({"pad_token": "<new>"})
        tokenizer.chat_template = "<new> {{ messages[0]['content'] }}"
    else:
        tokenizer.add_special_tokens({role: "<new>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=f"the tokenizer's token '<new>' has the id {V}"):
        load_tokenizer(folder)


def test_a_tokenizer_alone(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == word_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{}"},
        {"tokenizer.json": "[]"},
        {"tokenizer.json": "null"},
        {"tokenizer.json": "[" * 10**5},
        {"tokenizer_config.json": "[]"},
        {"tokenizer_config.json": '{"eos_token": 5}'},
        {"tokenizer_config.json": '{"tokenizer_class": "Nonsense"}'},
        {"special_tokens_map.json": "[]", "tokenizer_config.json": "5"},
    ],
    ids=str,
)
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
