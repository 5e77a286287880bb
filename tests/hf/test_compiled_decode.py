"""nanorlhf.hf.compiled_decode against the static loop of hf/decode.py, and against autocast.

B sequences, P prompt tokens, R response tokens
"""

import shutil
import warnings

import pytest
import torch
from support import NoWaiting, same_rollouts
from tiny_models import (
    ARCHITECTURES,
    FAMILIES,
    V,
    random_rows,
    tiny_config,
    tiny_family,
    tiny_lm,
    tiny_policy,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from nanorlhf.hf import compiled_decode
from nanorlhf.hf.activations import replaced
from nanorlhf.hf.blocks import blocks, freeze, sampling, speed_up
from nanorlhf.hf.compiled_decode import Window, cast_linear, is_compiled, one_token_attention
from nanorlhf.hf.decode import CHECK_EVERY, WARM_UP
from nanorlhf.hf.lora import adapters, add_lora, linear_layers
from nanorlhf.models import Policy
from nanorlhf.rollout import generate, left_pad
from nanorlhf.runtime.fsdp import checkpoint_activations

CPU = torch.device("cpu")
IDS, MASK = left_pad(random_rows((5, 2, 7, 1, 3, 4), seed=4), 0)

# What only --compile on a GPU uses is tested with the slow part: torch's tracer takes its time.
pytestmark = pytest.mark.slow

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def adapted_policy(architecture):
    """A policy with adapters that change what it computes."""
    policy = tiny_policy(architecture)
    add_lora(policy.lm, rank=2, dropout=0.5)
    for adapter in adapters(policy.lm).values():
        torch.nn.init.normal_(adapter.lora_B)
    return policy


def in_bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def compute_logits(policy):
    return policy.logits(policy.lm.base_model(input_ids=IDS).last_hidden_state)


# --------------------------------------------------------------------------------- the weights


@each_architecture
@pytest.mark.parametrize("make", [tiny_policy, adapted_policy])
def test_copies_of_weights_compute_what_autocast_does(architecture, make):
    """To the last bit; also after the weights have changed, with the same copies."""
    policy = make(architecture)
    addresses = []
    for _ in range(2):
        with in_bfloat16():
            expected = compute_logits(policy)
            with cast_linear(policy, "cpu"):
                assert torch.equal(compute_logits(policy), expected)
        addresses.append([copy.data_ptr() for _, _, copy in policy.linear_copies])
        for layer in linear_layers(policy.lm).values():
            layer.weight.data.mul_(1.1)
    assert addresses[0] == addresses[1]
    assert len(addresses[0]) >= 2 * 4 + 1  # four layers of each block, and the head


class CountCasts(TorchDispatchMode):
    """Count the casts of float32 tensors to bfloat16 that are weights, by their data's place."""

    def __init__(self, weights):
        super().__init__()
        self.places = {weight.data_ptr() for weight in weights}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_to_copy" in str(function) and args[0].data_ptr() in self.places:
            self.count += 1
        return function(*args, **(kwargs or {}))


@each_architecture
def test_no_weight_is_cast_while_copies_stand_in_for_it(architecture):
    """Nor is a bias. Frozen ones are: autocast caches casts of trained ones alone."""
    policy = tiny_policy(architecture)
    policy.requires_grad_(False)
    weights = []
    for layer in linear_layers(policy.lm).values():
        weights += layer.parameters()
    casts = CountCasts(weights)
    with in_bfloat16():
        with casts:
            compute_logits(policy)
        assert casts.count == len(weights)
        with cast_linear(policy, "cpu"), casts:
            compute_logits(policy)
    assert casts.count == len(weights)


@each_architecture
@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back(architecture, fails):
    """The optimizer's own tensors, after an error too."""
    policy = tiny_policy(architecture)
    freeze(policy.lm, 0.5)
    before = list(policy.named_parameters())
    values = [p.clone() for _, p in before]
    needs_grad = [p.requires_grad for _, p in before]
    head = policy.lm.get_output_embeddings()
    try:
        with in_bfloat16(), cast_linear(policy, "cpu"):
            assert head.weight.dtype == torch.bfloat16
            # Also where the head is tied to them, as in GPT-2.
            assert policy.lm.get_input_embeddings().weight.dtype == torch.float32
            if fails:
                raise KeyError
    except KeyError:
        pass
    after = list(policy.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    for (_, p), (_, own), value in zip(after, before, values):
        assert p is own
        assert torch.equal(p, value)
    assert [p.requires_grad for _, p in after] == needs_grad


def test_what_is_in_bfloat16_already_is_not_copied():
    policy = tiny_policy("llama")
    block = policy.lm.model.layers[0]
    block.mlp.to(torch.bfloat16)
    with in_bfloat16(), cast_linear(policy, "cpu"):
        copied = {layer for layer, _, _ in policy.linear_copies}
    assert block.mlp.up_proj not in copied
    assert block.self_attn.q_proj in copied


def test_nothing_is_copied_without_autocast():
    policy = tiny_policy("neox")
    with cast_linear(policy, "cpu"):
        assert policy.lm.get_output_embeddings().weight.dtype == torch.float32
    assert policy.linear_copies is None


# --------------------------------------------------------------------------------- rollouts


def roll(policy, ids=IDS, mask=MASK, new=12, bfloat16=True, **options):
    """A rollout with shapes that never change, as a GPU makes it."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    with autocast, sampling(policy.lm):
        return generate(policy, ids, mask, new, static=True, **options)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, to code that runs them as they were traced: a list that grows.

    Nothing may fall back to another loop.
    """
    torch._dynamo.reset()
    traced = []

    def backend(graph, example_inputs):
        traced.append(graph)
        return graph.forward

    @torch.compile(backend=backend, dynamic=None)
    def call(forward, *args, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(compiled_decode, "compiled_call", lambda: call)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rollouts decode")
        yield traced


def roll_eager_and_compiled(policy, **options):
    """The same rollout by the static loop, and by compiled blocks."""
    policy.lm.compiled = False
    expected = roll(policy, **options)
    policy.lm.compiled = True
    return expected, roll(policy, **options)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    "architecture, make",
    [("neox", adapted_policy), ("llama", tiny_policy), ("gpt2", adapted_policy)],
)
def test_rollouts_are_those_of_the_static_loop(graphs, architecture, make, bfloat16):
    """All blocks share one graph, and so do two rollouts."""
    policy = make(architecture)
    expected, compiled = roll_eager_and_compiled(policy, bfloat16=bfloat16)
    same_rollouts(compiled, expected, tol=0)
    same_rollouts(roll(policy, bfloat16=bfloat16), expected, tol=0)
    assert len(graphs) == 1


CUT = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": [5, 9], "pad_token_id": 3}


@pytest.mark.parametrize("new", [1, 2, 20])
def test_rollouts_that_are_cut_and_end(graphs, new):
    policy = tiny_policy("llama")
    expected, compiled = roll_eager_and_compiled(policy, new=new, **CUT)
    same_rollouts(compiled, expected, tol=0)
    assert len(graphs) == min(1, new - 1)


def test_a_loop_in_which_all_rows_have_ended_ends_early(graphs, monkeypatch):
    """At the next look. What was not written is padding."""

    def always_token_7(probs, *_):
        return torch.eye(V)[7].expand_as(probs)

    policy = tiny_policy("neox")
    monkeypatch.setattr("nanorlhf.rollout.truncate", always_token_7)
    expected, compiled = roll_eager_and_compiled(policy, new=40, eos_token_id=7, pad_token_id=3)
    same_rollouts(compiled, expected, tol=0)
    assert compiled.finished.all()

    n_read = []
    policy.lm.base_model.register_forward_pre_hook(lambda *_: n_read.append(1))
    roll(policy, new=40, eos_token_id=7)
    assert len(n_read) == CHECK_EVERY


def test_many_answers_to_one_prompt(graphs):
    policy = tiny_policy("llama")
    rows = torch.tensor([0, 0, 0, 1, 1, 2])
    expected, compiled = roll_eager_and_compiled(policy, ids=IDS[rows], mask=MASK[rows])
    same_rollouts(compiled, expected, tol=0)


# gpt_neo has no static cache.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt_neo"}))
def test_every_family(graphs, family):
    """Sliding windows, grouped heads, soft caps."""
    policy = Policy(tiny_family(family), value_head=False).eval()
    expected, compiled = roll_eager_and_compiled(policy)
    same_rollouts(compiled, expected, tol=0)
    assert len(graphs) == 1


def test_blocks_that_scale_by_their_number(graphs):
    """GPT-2 can: they know the scale before their number is hidden."""
    config = tiny_config("gpt2")
    config.scale_attn_by_inverse_layer_idx = True
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config), value_head=False).eval()
    for p in policy.parameters():
        p.data.mul_(5)
    expected, compiled = roll_eager_and_compiled(policy)
    same_rollouts(compiled, expected, tol=0)


def test_frozen_blocks_and_checkpointed_activations(graphs):
    policy = tiny_policy("neox")
    freeze(policy.lm, 0.5)
    checkpoint_activations(policy)
    expected, compiled = roll_eager_and_compiled(policy)
    same_rollouts(compiled, expected, tol=0)
    assert len(graphs) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_code_of_the_compiler(architecture):
    """Inductor rounds where the blocks as they are written do."""
    torch._dynamo.reset()
    policy = tiny_policy(architecture)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rollouts decode")
        expected, compiled = roll_eager_and_compiled(policy)
    same_rollouts(compiled, expected, tol=1e-5)


# -------------------------------------------------------------------------------- one decode step


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_a_step_after_the_first_never_waits(monkeypatch, graphs, architecture):
    steps = []

    def capture(step, n_steps, *_):
        for _ in range(n_steps - 1):
            steps.append(1)
            with NoWaiting():
                step()
        return step, n_steps

    monkeypatch.setattr(compiled_decode, "capture", capture)
    monkeypatch.setattr(compiled_decode, "BUCKET", 16)
    policy = tiny_policy(architecture)
    expected, compiled = roll_eager_and_compiled(policy, bfloat16=False, **CUT)
    same_rollouts(compiled, expected, tol=1e-4)
    # The prompts have 7 columns and give the first of 12 tokens. 9 steps then read 16 columns, and
    # 2 read 32; the first of each may compile.
    assert len(steps) == 8 + 1


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (8, 2), (6, 1)])
def test_attention_of_one_token_by_hand(heads, key_heads):
    """Heads that share a key, one by one in float64; one row sees three of seven columns."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = random(2, heads, 1, 5)
    key = random(2, key_heads, 7, 5)
    value = random(2, key_heads, 7, 5)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, :, :, 3:] = False

    output, _ = one_token_attention(None, query, key, value, mask, scaling=0.3)

    assert output.shape == (2, 1, heads, 5)
    for row, n in enumerate([7, 3]):
        for head in range(heads):
            shared = head // (heads // key_heads)
            scores = 0.3 * key[row, shared, :n] @ query[row, head, 0]
            expected = scores.softmax(0) @ value[row, shared, :n]
            torch.testing.assert_close(output[row, 0, head], expected)


def test_heads_that_share_a_key_read_it_once(graphs):
    """transformers' own attention would repeat keys and values in compiled code."""
    policy = tiny_policy("llama")
    policy.lm.compiled = True
    roll(policy)
    assert policy.lm.config.num_key_value_heads < policy.lm.config.num_attention_heads
    [graph] = graphs
    for node in graph.graph.nodes:
        assert "expand" not in str(node.target)
        assert "repeat" not in str(node.target)


# ------------------------------------------------------------------- steps that are kept


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operators of a step, on the tensors that they had.

    Python does not run when they are replayed, and nothing is read from anywhere else.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    @torch.autocast("cpu", enabled=False)  # its casts are on the tape
    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                # Views, and what was written in place, are where they were.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch, graphs):
    """Steps are recorded after a warm-up, as on a GPU, and then replayed: a list of [replays].

    Buckets have 16 columns, so that a rollout reads several. Pitfall: torch.compile leaves alone
    what it sees under a Tape, and ever after.
    """
    recorded = []

    def capture(step, n_steps, *_):
        if n_steps <= 1 + WARM_UP:
            return step, 1
        for _ in range(WARM_UP):
            step()
        tape = Tape()
        with tape:
            step()
        replays = []
        recorded.append(replays)

        def replay():
            replays.append(1)
            tape.replay()

        # Here the step that is recorded is taken as well.
        return replay, 2 + WARM_UP

    monkeypatch.setattr(compiled_decode, "capture", capture)
    monkeypatch.setattr(compiled_decode, "BUCKET", 16)
    return recorded


def change_weights(policy, seed):
    """What an optimizer does: other numbers in the same tensors."""
    generator = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator) * p.data.abs().mean())


def roll_fresh(policy, **options):
    """A rollout for which nothing was kept, and in which nothing is captured."""
    kept = policy.decoders, policy.linear_copies
    policy.decoders = {}
    policy.linear_copies = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_decode, "capture", lambda step, *_: (step, 1))
        rollout = roll(policy, **options)
    policy.decoders, policy.linear_copies = kept
    return rollout


def check_rollouts(policy, changes, **options):
    """Rollouts one after another are those for which nothing was kept, to the last bit.

    In float32 they are those of the static loop, too. In bfloat16 sums over fewer columns may round
    otherwise. changes: functions that change the policy, or return other options of the rollout, or
    do neither. -> the rollouts
    """
    rollouts = []
    for change in changes:
        now = {**options, **(change() or {})}
        policy.lm.compiled = True
        rollout = roll(policy, **now)
        same_rollouts(rollout, roll_fresh(policy, **now), tol=0)
        if not now.get("bfloat16", True):
            policy.lm.compiled = False
            same_rollouts(rollout, roll(policy, **now), tol=1e-4)
        rollouts.append(rollout)
    return rollouts


def narrower():
    """Prompts of 5 tokens in the place of 7."""
    return {"ids": IDS[[0, 1, 3, 4, 5, 1], 2:], "mask": MASK[[0, 1, 3, 4, 5, 1], 2:]}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    "architecture, make",
    [("neox", tiny_policy), ("llama", adapted_policy), ("gpt2", tiny_policy)],
)
def test_kept_steps_read_what_is_new(tapes, architecture, make, bfloat16):
    """Other weights, prompts, widths of prompts, and noise: the steps of the first rollout do."""
    policy = make(architecture)
    changes = [
        lambda: None,
        lambda: change_weights(policy, 1),
        lambda: {"step": 1},
        narrower,
    ]
    rollouts = check_rollouts(policy, changes, new=34, bfloat16=bfloat16)
    [decoder] = policy.decoders.values()
    assert list(decoder.steps) == [16, 32, 48]
    assert len(tapes) == 3
    # 33 steps, of which each of three buckets takes 5 for its recording; then all of them.
    assert sum(map(len, tapes)) == 33 - 3 * 5 + 3 * 33
    for a, b in zip(rollouts, rollouts[1:]):
        assert not torch.equal(a.response_ids, b.response_ids)


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_any_number_of_buckets_takes_two_graphs(monkeypatch, graphs, architecture):
    """The second has a length that is not fixed. Other widths of prompts take none."""
    monkeypatch.setattr(compiled_decode, "BUCKET", 16)
    policy = tiny_policy(architecture)
    check_rollouts(policy, [lambda: None, narrower], new=50, bfloat16=False)
    assert len(graphs) == 2


def test_few_steps_are_not_worth_a_recording(tapes):
    """Of 16 columns the prompts take 7 and the first token is there: 9 steps, and 3 with 32."""
    policy = tiny_policy("neox")
    check_rollouts(policy, [lambda: None, lambda: None], new=13)
    [decoder] = policy.decoders.values()
    assert list(decoder.steps) == [16]


def turn_adapters_off(policy):
    for adapter in adapters(policy.lm).values():
        adapter.on = False


def move_a_norm(policy):
    """Its weight is no copy. Now it is elsewhere, with other numbers."""
    norm = policy.lm.gpt_neox.final_layer_norm
    norm.weight = torch.nn.Parameter(2 * norm.weight.data)


BASE = {"new": 14, "eos_token_id": [44, 12], "has_token": torch.arange(V) < 50}
OTHERS = {
    "temperature": lambda policy: {"temperature": 0.7},
    "top_k": lambda policy: {"top_k": 3},
    "top_p": lambda policy: {"top_p": 0.5},
    "ends": lambda policy: {"eos_token_id": [5, 9, 30]},
    "tokens": lambda policy: {"has_token": torch.arange(V) >= 10},
    "rows": lambda policy: {"ids": IDS[:4], "mask": MASK[:4]},
    "length": lambda policy: {"new": 13},
    "float32": lambda policy: {"bfloat16": False},
    "adapters": turn_adapters_off,
    "addresses": move_a_norm,
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_step_has_a_decoder_of_its_own(tapes, other):
    """What a captured step cannot look up: sizes, numbers of Python, and addresses."""
    policy = adapted_policy("neox")
    changes = [lambda: None, lambda: OTHERS[other](policy)]
    base, changed = check_rollouts(policy, changes, **BASE)
    assert len(policy.decoders) == 2
    if other not in ("rows", "length"):
        assert not torch.equal(base.values, changed.values)


def test_rows_that_have_finished_begin_again(tapes):
    policy = tiny_policy("neox")
    ends = {"eos_token_id": [5, 9, 30, 44], "new": 20}
    first, second = check_rollouts(policy, [lambda: None, lambda: {"step": 1}], **ends)
    assert (first.finished & ~second.finished).any()
    assert len(policy.decoders) == 1


def test_the_two_decoders_used_last_are_kept(tapes):
    """A rollout of training and one of an evaluation, in turn, and a third kind."""
    policy = tiny_policy("neox")
    policy.lm.compiled = True

    def decoder_of(n_rows):
        roll(policy, IDS[:n_rows], MASK[:n_rows], new=20)
        return list(policy.decoders.values())[-1]

    training, evaluation = decoder_of(6), decoder_of(4)
    assert decoder_of(6) is training
    assert decoder_of(4) is evaluation
    assert decoder_of(6) is training
    decoder_of(5)
    assert len(policy.decoders) == 2
    assert decoder_of(6) is training
    assert decoder_of(4) is not evaluation


def test_a_cache_is_replaced_by_a_larger_one_alone(tapes):
    policy = tiny_policy("llama")
    # 4 + 20 columns, then 7 + 26, then 4 + 26 again.
    long_prompts = {"ids": IDS, "mask": MASK}
    short_prompts = {"ids": IDS[1:2, 3:].repeat(6, 1), "mask": MASK[1:2, 3:].repeat(6, 1)}
    sizes = []
    for prompts in (short_prompts, long_prompts, short_prompts):
        check_rollouts(policy, [lambda: prompts], new=26)
        assert len(policy.decoders) == 1
        [decoder] = policy.decoders.values()
        sizes.append(decoder.visible.shape[1])
    assert sizes == [32, 48, 48]


def test_a_failure_leaves_no_decoder(monkeypatch):
    policy = tiny_policy("neox")
    policy.lm.compiled = True

    def fail(*_):
        assert policy.decoders
        raise KeyError

    monkeypatch.setattr(compiled_decode.Decoder, "begin", fail)
    with pytest.warns(RuntimeWarning, match="without compiled blocks"):
        roll(policy)
    assert not policy.decoders


# -------------------------------------------------------------- what is left, and what falls back


def state_of(lm):
    """What a rollout changes in the model for a while."""
    numbers = [module.layer_idx for module in lm.modules() if hasattr(module, "layer_idx")]
    forwards = [block.__dict__.get("forward") for block in blocks(lm)]
    code = [block._compiled_call_impl for block in blocks(lm)]
    parameters = [id(p) for p in lm.parameters()]
    return numbers, forwards, code, parameters, lm.config._attn_implementation, lm.compiled


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("fails_at", [None, 0, 1])
def test_the_model_is_as_it_was(monkeypatch, graphs, checkpointed, fails_at):
    """Also after a step that fails, the first or a later one: the static loop then writes all."""
    policy = tiny_policy("llama")
    lm = policy.lm
    if checkpointed:
        checkpoint_activations(policy)
    expected = roll(policy, eos_token_id=5)
    speed_up(lm, CPU, "bfloat16", compile=True)
    assert lm.config._attn_implementation == "eager"
    before = state_of(lm)
    assert before[0] == [0, 1]
    assert None not in before[2]

    show = Window.show
    shown = []

    def fail(window, layer):
        assert state_of(lm)[0] == [0, 0]
        assert lm.config._attn_implementation == "one_token"
        if len(shown) // 2 == fails_at:
            raise KeyError("no such graph")
        shown.append(1)
        show(window, layer)

    monkeypatch.setattr(Window, "show", fail)
    if fails_at is None:
        compiled = roll(policy, eos_token_id=5)
    else:
        words = "without compiled blocks, .*LlamaForCausalLM: 'no such graph'"
        with pytest.warns(RuntimeWarning, match=words):
            compiled = roll(policy, eos_token_id=5)
    same_rollouts(compiled, expected, tol=0)
    # 11 steps of two blocks: the prompts give the first of 12 tokens.
    n_blocks_run = {None: 22, 0: 0, 1: 2}
    assert len(shown) == n_blocks_run[fails_at]
    assert state_of(lm) == before


def test_memory_that_runs_out_is_no_reason_to_try_again(monkeypatch):
    policy = tiny_policy("neox")
    policy.lm.compiled = True

    def run_out(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(compiled_decode.Decoder, "begin", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        roll(policy)


def test_hooks_are_called_where_blocks_must_run_as_they_are_written(tapes, graphs):
    """A place that is replaced, by a hook inside a block, is replaced in rollouts too.

    Kept steps know nothing of it.
    """
    policy = tiny_policy("neox")
    policy.lm.compiled = True
    expected = roll(policy)
    with replaced(policy.lm, (1, "mlp"), torch.zeros_like):
        without_mlp = roll(policy)
    assert policy.lm.compiled
    assert len(graphs) == 1
    assert not torch.equal(without_mlp.response_ids, expected.response_ids)
    same_rollouts(roll(policy), expected, tol=0)
    policy.lm.compiled = False
    with replaced(policy.lm, (1, "mlp"), torch.zeros_like):
        same_rollouts(roll(policy), without_mlp, tol=0)


# ---------------------------------------------------------------------------------- which models


def test_which_models_decode_with_compiled_blocks():
    lm = tiny_lm("neox")
    assert not is_compiled(lm)
    speed_up(lm, CPU, "float32", compile=True)
    assert is_compiled(lm)
    # FSDP's units have this method.
    lm.gpt_neox.layers[0].unshard = print
    assert not is_compiled(lm)

    del lm.gpt_neox.layers[0].unshard
    assert is_compiled(lm)
    # transformers says so of architectures that cannot have a static cache.
    lm._can_compile_fullgraph = False
    assert not is_compiled(lm)
