"""nanorlhf.interp.activation_store and activation_cache: what is in a batch, against the models run
on one text at a time.

    N texts, E tokens that count, B tokens of a batch, S batches of a buffer, W processes, D hidden
"""

import json
import os
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny_models import tiny_family, word_tokenizer
from transformers import AutoModelForCausalLM

from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.interp import activation_cache, activation_store
from nanorlhf.interp.activation_cache import from_disk
from nanorlhf.interp.activation_store import (
    Stream,
    Tokens,
    from_models,
    hold_out,
    passes,
    token_rows,
)
from nanorlhf.models import Policy, save_policy
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.locks import LOCK_FILE
from nanorlhf.tokens import Prompts, encode_prompts
from train_sae import rollout_rows

CPU = torch.device("cpu")
ONE = Dist(0, 1, CPU)
PLACES = [(0, "mlp"), (2, "residual"), (1, "attention")]
BOS = 1


def make_row(i, n):
    """A text of n tokens; every third text begins with BOS."""
    first = BOS if i % 3 == 0 else 5 + (7 * i) % 50
    others = [3 + (11 * i + 5 * j) % 57 for j in range(1, n)]
    return [first, *others]


LENGTHS = [3, 9, 1, 4, 4, 7, 2, 12, 5, 1, 6, 9]
ROWS = [make_row(i, n) for i, n in enumerate(LENGTHS)]
ROWS[4][2] = BOS  # a BOS that is text: it also pads the rows of some models
ROWS[5][-1] = 0  # and a padding id that is text
# The texts hold 63 tokens, 5 of them BOS.
E = 58
ALL_TEXTS = np.arange(len(ROWS))


def make_models():
    return {"base": tiny_family("neox"), "policy": tiny_family("neox", seed=1)}


@pytest.fixture(scope="module")
def lms():
    return make_models()


class Token(NamedTuple):
    """One token that counts, and what the models have there."""

    text: int
    column: int
    x: dict[str, torch.Tensor]  # {key: [D]}


@torch.no_grad()
def run_one_text(lm, row):
    """What a model has at PLACES, by hooks of this test's own: {"0_mlp": [T, D], ...}."""
    kept = {}

    def keep_mlp(module, args, output):
        kept["0_mlp"] = output[0]

    def keep_attention(module, args, output):
        kept["1_attention"] = output[0][0]

    def keep_residual(module, args, output):
        kept["2_residual"] = output[0]

    layers = lm.gpt_neox.layers
    hooks = [
        layers[0].mlp.register_forward_hook(keep_mlp),
        layers[1].attention.register_forward_hook(keep_attention),
        layers[2].register_forward_hook(keep_residual),
    ]
    lm(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return kept


def run_one_by_one(lms, rows, skip_bos=None):
    """All tokens that count, in order, each text alone in its forward pass: [Token]."""
    tokens = []
    for text, row in enumerate(rows):
        outputs = {}
        for name, lm in lms.items():
            for place, x in run_one_text(lm, row).items():
                outputs[f"{name}/{place}"] = x
        for column, token_id in enumerate(row):
            if token_id != skip_bos:
                x = {key: output[column] for key, output in outputs.items()}
                tokens.append(Token(text, column, x))
    return tokens


@pytest.fixture(scope="module")
def expected(lms):
    """The tokens of ROWS that count where BOS does not."""
    return run_one_by_one(lms, ROWS, BOS)


def stack(tokens):
    """Tokens -> what a source gives for them: {key: [n, D]}."""
    stacked = {}
    for key in tokens[0].x:
        stacked[key] = torch.stack([token.x[key] for token in tokens])
    return stacked


def of_texts(tokens, texts):
    """The tokens of some texts, text after text."""
    found = []
    for text in texts:
        found += [token for token in tokens if token.text == text]
    return found


def join(parts):
    """Parts {key: [n, D]} one after another: {key: [sum of n, D]}."""
    joined = {}
    for key in parts[0]:
        joined[key] = torch.cat([part[key] for part in parts])
    return joined


def same(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)


def identical(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        assert torch.equal(found[key], expected[key]), key


def sort_rows(parts):
    """The rows of batches in an order that depends on their numbers alone: [n, keys D]."""
    joined = join(parts)
    rows = torch.cat([joined[key] for key in sorted(joined)], 1)
    order = np.lexsort(rows.round(decimals=3).numpy().T[::-1])
    return rows[torch.from_numpy(order)]


def same_rows(found, expected):
    """Both hold the same tokens, each as often, in whatever order."""
    torch.testing.assert_close(sort_rows(found), sort_rows(expected), rtol=1e-4, atol=2e-3)


def masks_of(tokens):
    return [mask.tolist() for mask in tokens.masks]


# -------------------------------------------------------------------------- which tokens count


@pytest.mark.parametrize("skip_bos, n_tokens", [(None, E + 5), (BOS, E)])
def test_padding_and_by_option_bos_never_enter(lms, skip_bos, n_tokens, monkeypatch):
    # There are several forward passes, with padding.
    monkeypatch.setattr(activation_store, "TOKENS_AT_ONCE", 20)
    tokens = Tokens(ROWS, skip_bos)
    expected = run_one_by_one(lms, ROWS, skip_bos)
    assert tokens.total == n_tokens
    assert len(expected) == n_tokens

    source = from_models(tokens, lms, PLACES, ONE)
    parts = list(passes(tokens, source, ONE, at_once=15))
    assert len(parts) > 2
    same(join(parts), stack(expected))
    # Texts may be asked for in any order.
    texts = np.array([7, 0, 9, 4])
    same(source(texts), stack(of_texts(expected, texts)))


def test_an_eos_with_an_id_of_its_own_counts():
    eos = 2
    tokens = Tokens([[BOS, 5, 6, eos], [7, eos]], skip_bos=BOS)
    assert masks_of(tokens) == [[False, True, True, True], [True, True]]
    assert tokens.columns().tolist() == [1, 2, 3, 0, 1]


def test_an_eos_that_has_the_id_of_bos_does_not_count():
    """It has BOS's norm, so it is left out wherever it stands."""
    rows = [[BOS, 5, 6, BOS], [7, BOS]]
    tokens = Tokens(rows, skip_bos=BOS)
    assert masks_of(tokens) == [[False, True, True, False], [True, False]]
    assert tokens.columns().tolist() == [1, 2, 0]
    # Without skip_bos all tokens count.
    assert Tokens(rows).total == 6


def test_a_last_token_that_is_bos_does_not_count():
    tokens = Tokens([[BOS, 5, BOS], [7, 8]], skip_bos=BOS, ends=[])
    assert masks_of(tokens) == [[False, False, False], [False, True]]


def test_texts_of_which_no_token_counts_are_refused():
    with pytest.raises(InputError, match="no text has a token"):
        Tokens([[BOS]], BOS)


def test_texts_of_a_bos_alone_are_passed_over(lms):
    """Also where nothing comes before them."""
    rows = [[BOS], [BOS], [5, 6, 7], [BOS], [8, 9]]
    tokens = Tokens(rows, BOS)
    source = from_models(tokens, lms, PLACES, ONE)
    parts = list(passes(tokens, source, ONE, at_once=3))
    first, second = parts
    assert len(first["base/0_mlp"]) == 3
    assert len(second["base/0_mlp"]) == 2
    same(join(parts), stack(run_one_by_one(lms, rows, BOS)))


def test_a_process_whose_texts_are_a_bos_alone_has_nothing_to_pass_on(lms):
    tokens = Tokens([[BOS], [5]], BOS)
    source = from_models(tokens, lms, PLACES, ONE)
    first_of_two = Dist(0, 2, CPU)
    assert list(passes(tokens, source, first_of_two)) == []


# --------------------------------------------------------------------------------------- batches


def make_stream(lms, **options):
    """Batches of 4 tokens of ROWS, without BOS."""
    tokens = Tokens(ROWS, BOS)
    source = from_models(tokens, lms, PLACES, ONE)
    return Stream(tokens, source, 4, ONE, **options)


def take(stream, steps):
    return [stream.batch(step) for step in steps]


N_BATCHES = 2 * E // 4  # of two epochs


# How many tokens a buffer may hold, and how many batches of 4 it then has: at most an epoch.
@pytest.mark.parametrize("buffer_tokens, S", [(4, 1), (12, 3), (20, 5), (10**6, 14)])
def test_whole_buffers_hold_every_token_equally_often(lms, expected, buffer_tokens, S):
    stream = make_stream(lms, seed=3, buffer_tokens=buffer_tokens)
    assert stream.S == S
    n_whole = N_BATCHES // S * S  # batches of whole buffers
    batches = take(stream, range(n_whole + S))

    # An independent account of which token is where: by its value.
    values = stack(expected)["base/2_residual"]  # [E, D]
    counts = np.zeros(E, dtype=int)
    for step, batch in enumerate(batches):
        distances = torch.cdist(batch["base/2_residual"], values)  # [B, E]
        places = distances.argmin(1).tolist()
        # All models and places of a batch are of the same tokens.
        same(batch, stack([expected[i] for i in places]))
        if step < n_whole:
            counts[places] += 1  # no token twice in a batch
    assert counts.sum() == n_whole * 4
    assert counts.max() - counts.min() <= 1


def test_two_epochs_of_batches_hold_every_token_twice(lms, expected):
    assert N_BATCHES * 4 == 2 * E
    # A buffer is one batch, so that two epochs are whole buffers.
    stream = make_stream(lms, seed=3, buffer_tokens=4)
    same_rows(take(stream, range(N_BATCHES)), [stack(expected + expected)])


def record(source, calls):
    """The same source, which notes how many texts it is asked for each time."""

    def recorded(texts):
        calls.append(len(texts))
        return source(texts)

    return recorded


def test_a_batch_is_a_function_of_the_step_alone(lms):
    batches = take(make_stream(lms, seed=3, buffer_tokens=12), range(11))
    again = make_stream(lms, seed=3, buffer_tokens=12)
    for step in (10, 0, 4, 5, 3):
        identical(again.batch(step), batches[step])


def test_another_seed_makes_other_batches(lms):
    batch = make_stream(lms, seed=3, buffer_tokens=12).batch(0)
    other = make_stream(lms, seed=4, buffer_tokens=12).batch(0)
    assert not torch.equal(other["base/0_mlp"], batch["base/0_mlp"])


def test_to_resume_computes_one_buffer_and_not_what_went_before(lms):
    calls = []
    resumed = make_stream(lms, seed=3, buffer_tokens=12)
    resumed.source = record(resumed.source, calls)
    resumed.batch(10)
    assert len(calls) <= 2
    assert sum(calls) < len(ROWS)


def number_tokens(texts):
    """A source of 20 tokens a text, whose activations are the token's number: {"x": [n, 1]}."""
    numbers = 20 * texts[:, None] + np.arange(20)  # [texts, 20]
    return {"x": torch.from_numpy(numbers).float().view(-1, 1)}


def test_a_batch_mixes_texts():
    """64 texts of 20 tokens in one buffer, which is an epoch: a batch of 64 has one token of each,
    from all parts of the texts."""
    tokens = Tokens([[2 + i] * 20 for i in range(64)])
    stream = Stream(tokens, number_tokens, 64, ONE, buffer_tokens=1280)
    assert stream.S == 20
    batches = join(take(stream, range(40)))["x"].long().view(40, 64)

    for batch in batches:
        assert (batch // 20).unique().numel() == 64
        assert (batch % 20).unique().numel() > 12
    # Each epoch has every token once, and an order of its own.
    first, second = batches.split(20)
    assert torch.equal(first.flatten().sort().values, torch.arange(1280))
    assert torch.equal(second.flatten().sort().values, torch.arange(1280))
    assert not torch.equal(first[0] // 20, second[0] // 20)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_make_the_same_global_batches(lms, world_size):
    whole = make_stream(lms, seed=1, buffer_tokens=24)
    shares = []
    for rank in range(world_size):
        dist = Dist(rank, world_size, CPU)
        source = from_models(whole.tokens, lms, PLACES, dist)
        shares.append(Stream(whole.tokens, source, 4, dist, seed=1, buffer_tokens=24))

    for step in (0, 3, 7, 8, 20):
        parts = []
        for share in shares:
            part = share.batch(step)
            assert len(part["base/0_mlp"]) == 4 // world_size
            parts.append(part)
        same(join(parts), whole.batch(step))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_pass_on_every_token_once_together(lms, expected, world_size):
    tokens = Tokens(ROWS, BOS)
    source = from_models(tokens, lms, PLACES, ONE)
    parts = []
    for rank in range(world_size):
        parts += passes(tokens, source, Dist(rank, world_size, CPU), 10)
    same_rows(parts, [stack(expected)])


def test_a_batch_is_a_multiple_of_the_processes(lms):
    whole = make_stream(lms)
    with pytest.raises(InputError, match="5 tokens a batch are not a multiple of 2 processes"):
        Stream(whole.tokens, whole.source, 5, Dist(0, 2, CPU))


# --------------------------------------------------------------------------------- sentence ends

ENDS = [19, 20, 27, 33, 42, 48]


@pytest.fixture(scope="module")
def expected_ends(expected):
    """The tokens that end a sentence or a text."""
    ends = []
    for token in expected:
        row = ROWS[token.text]
        if row[token.column] in ENDS or token.column == len(row) - 1:
            ends.append(token)
    return ends


def test_sentence_ends_alone_are_passed_on(lms, expected_ends, monkeypatch):
    monkeypatch.setattr(activation_store, "TOKENS_AT_ONCE", 20)
    # The example is one: it has ends within texts, and many tokens that are no ends.
    inner = [token for token in expected_ends if token.column < len(ROWS[token.text]) - 1]
    assert len(inner) > 5
    assert len(expected_ends) < E / 2

    tokens = Tokens(ROWS, BOS, ENDS)
    assert tokens.total == len(expected_ends)
    source = from_models(tokens, lms, PLACES, ONE)
    parts = list(passes(tokens, source, ONE, at_once=5))
    same(join(parts), stack(expected_ends))
    # Texts may be asked for in any order.
    texts = np.array([7, 2, 9, 4])
    same(source(texts), stack(of_texts(expected_ends, texts)))


def test_two_epochs_of_sentence_ends_hold_each_twice(lms, expected_ends):
    tokens = Tokens(ROWS, BOS, ENDS)
    source = from_models(tokens, lms, PLACES, ONE)
    stream = Stream(tokens, source, 2, ONE, seed=3, buffer_tokens=2)
    batches = take(stream, range(tokens.total))
    same_rows(batches, [stack(expected_ends + expected_ends)])


def test_sentence_ends_come_from_a_disk_by_two_processes_as_from_the_models(lms, tmp_path):
    tokens, kept = open_disk(tmp_path, ends=ENDS)
    source = from_models(tokens, lms, PLACES, ONE)
    options = {"seed": 3, "buffer_tokens": 6}
    whole = Stream(tokens, source, 2, ONE, **options)
    first = Stream(tokens, kept, 2, Dist(0, 2, CPU), **options)
    second = Stream(tokens, kept, 2, Dist(1, 2, CPU), **options)
    for step in (0, 2, 5, 11):
        same(join([first.batch(step), second.batch(step)]), whole.batch(step))


def test_which_tokens_end_a_sentence():
    special = ["<pad>", "<eos>", "<unk>"]
    words = ["end.", "!", "a.b", "?", "...", "end", ".,", "yes!"]
    tokenizer = word_tokenizer(special + words)
    assert activation_store.sentence_ends(tokenizer) == [3, 4, 6, 7, 10]


def test_white_space_may_follow_the_end_of_a_sentence():
    class Vocabulary(list):
        def batch_decode(self, rows):
            return [self[i] for (i,) in rows]

    assert activation_store.sentence_ends(Vocabulary(["a", ".\n", "? ", " .", ". a"])) == [1, 2, 3]


def test_where_no_token_ends_a_sentence_the_last_one_of_a_row_counts():
    """As --tokens last has it; EOS is no exception in the middle."""
    rows = [[5, 1, 7, 1], [4], [1, 9]]
    tokens = Tokens(rows, ends=[])
    assert masks_of(tokens) == [[False, False, False, True], [True], [False, True]]
    assert tokens.total == 3
    assert tokens.digest() != Tokens(rows).digest()


# --------------------------------------------------------------------------------------- on disk


FINGERPRINTS = {"base": "b0", "policy": "p0"}


def open_disk(
    folder,
    rows=ROWS,
    load=make_models,
    fingerprints=FINGERPRINTS,
    places=PLACES,
    ends=None,
):
    """Tokens, and a source that keeps their activations in a folder, 16 tokens a shard."""
    tokens = Tokens(rows, BOS, ends)
    source = from_disk(str(folder), tokens, fingerprints, places, load, ONE, shard_tokens=16)
    return tokens, source


def refuse_to_load():
    raise AssertionError("nothing should be computed again")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder that holds the activations of ROWS."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    open_disk(folder)
    return folder


SHARDS = [f"0000{i}.safetensors" for i in range(4)]


def test_disk_and_models_give_the_same(lms, tmp_path):
    folder = tmp_path / "cache"
    tokens, kept = open_disk(folder)
    assert sorted(os.listdir(folder)) == [*SHARDS, "cache.json"]

    live = from_models(tokens, lms, PLACES, ONE)
    from_lms = take(Stream(tokens, live, 4, ONE, seed=2, buffer_tokens=20), range(30))
    from_folder = take(Stream(tokens, kept, 4, ONE, seed=2, buffer_tokens=20), range(30))
    for found, expected in zip(from_folder, from_lms, strict=True):
        for key in expected:
            assert found[key].dtype == torch.float32
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)

    # Six tensors of width 32, and at most 2,000 bytes of notes in each shard.
    size = sum((folder / name).stat().st_size for name in SHARDS)
    assert size < E * 6 * 32 * 4 + 4 * 2000


def written_at(folder):
    """{shard: when it was written}."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def kill_at_the_third_shard(monkeypatch):
    """Let the third shard be half written, and the run be killed there."""
    write_shard = activation_cache.write_shard
    written = []

    def killed(path, found):
        written.append(path)
        if len(written) == 3:
            with open(path + ".tmp", "wb") as f:
                f.write(b"half")
            raise KeyboardInterrupt
        write_shard(path, found)

    monkeypatch.setattr(activation_cache, "write_shard", killed)


def test_a_killed_run_goes_on(tmp_path, filled):
    folder = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        kill_at_the_third_shard(patch)
        with pytest.raises(KeyboardInterrupt):
            open_disk(folder)
    before = written_at(folder)
    assert sorted(before) == SHARDS[:2]

    # The shards that were there are not written again.
    _, source = open_disk(folder)
    after = written_at(folder)
    for name in before:
        assert after[name] == before[name]
    assert not list(folder.glob("*.tmp"))

    # What it holds is what a run holds that was not killed.
    _, again = open_disk(folder, load=refuse_to_load)
    _, whole = open_disk(filled, load=refuse_to_load)
    activations = source(ALL_TEXTS)
    identical(again(ALL_TEXTS), activations)
    identical(whole(ALL_TEXTS), activations)


def fill_as(rank, folder, monkeypatch):
    """Which shards one of two processes writes, that sees no shard: ["00001", ...]."""
    filled = []
    exists = os.path.exists

    def sees(path):
        return exists(path) and not path.endswith(".safetensors")

    def note(path, found):
        filled.append(os.path.basename(path)[:5])

    with monkeypatch.context() as patch:
        # Neither waits for the other, and nothing is read.
        patch.setattr(Dist, "barrier", lambda self: None)
        patch.setattr(Dist, "together", lambda self, function: function())
        patch.setattr(activation_cache, "map_shard", lambda path, keys, n: None)
        patch.setattr(activation_cache, "write_shard", note)
        patch.setattr(os.path, "exists", sees)
        tokens = Tokens(ROWS, BOS)
        dist = Dist(rank, 2, CPU)
        from_disk(str(folder), tokens, FINGERPRINTS, PLACES, make_models, dist, shard_tokens=16)
    return filled


def test_several_processes_fill_one_folder(tmp_path, monkeypatch):
    # One after the other, each as if no shard was there when it looked.
    assert fill_as(1, tmp_path, monkeypatch) == ["00001", "00003"]
    assert fill_as(0, tmp_path, monkeypatch) == ["00000", "00002"]


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"rows": ROWS[1:]}, "data"),
        ({"ends": ENDS}, "data"),
        ({"fingerprints": {"base": "b1", "policy": "p0"}}, "models"),
        ({"places": PLACES[:1]}, "places"),
    ],
    ids=["rows", "ends", "fingerprints", "places"],
)
def test_a_folder_of_other_activations_is_refused(filled, changes, what):
    words = f"cache already holds other activations .they differ in .*{what}"
    with pytest.raises(InputError, match=words):
        open_disk(filled, load=refuse_to_load, **changes)


def test_a_damaged_shard_is_named(tmp_path):
    open_disk(tmp_path)
    (tmp_path / "00001.safetensors").write_bytes(b"not a shard")
    with pytest.raises(InputError, match="00001.safetensors: cannot be read"):
        open_disk(tmp_path, load=refuse_to_load)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with pytest.raises(InputError, match=f"{name} is not empty and holds no activations"):
            open_disk(tmp_path / name, load=refuse_to_load)


def file_mapped_at(address):
    """The path of the file that is mapped into this process's memory there, or ""."""
    with open("/proc/self/maps") as f:
        for line in f:
            # start-end permissions offset device inode [path]
            span, _, _, _, _, *path = line.split(maxsplit=5)
            start, end = [int(edge, 16) for edge in span.split("-")]
            if start <= address < end:
                return "".join(path).strip()
    return ""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
def test_shards_are_mapped_not_read(tmp_path):
    path = str(tmp_path / "00000.safetensors")
    activation_cache.write_shard(path, {"x": torch.zeros(2**10, 256)})
    shard = activation_cache.map_shard(path, {"x"}, 2**10)
    assert shard["x"].shape == (2**10, 256)
    assert file_mapped_at(shard["x"].data_ptr()) == path
    # A tensor that is read stands in memory of no file.
    assert file_mapped_at(shard["x"].clone().data_ptr()) != path


@pytest.mark.slow
def test_one_process_fills_a_folder_and_any_number_read_it(tmp_path, another):
    folder = tmp_path / "cache"
    holder = another(folder)
    with pytest.raises(InputError, match="another process is working in .*cache;"):
        open_disk(folder, load=refuse_to_load)
    holder.kill()
    holder.join()
    _, source = open_disk(folder)
    assert LOCK_FILE not in os.listdir(folder)

    # Once it is whole, a lock does not matter.
    another(folder)
    _, again = open_disk(folder, load=refuse_to_load)
    identical(again(ALL_TEXTS), source(ALL_TEXTS))


# ----------------------------------------------------------------------------------------- texts


def test_rows_of_demonstrations_are_prompt_response_and_eos():
    rows = [{"prompt": "w5 w6", "response": "w7"}, {"prompt": "w8", "response": "w9 w10 w11"}]
    tokenizer = word_tokenizer()
    assert token_rows(tokenizer, rows) == ([[5, 6, 7, 1], [8, 9, 10, 11, 1]], 0)


def test_rows_of_pairs_are_two_texts_each():
    rows = [{"prompt": "w5", "chosen": "w6", "rejected": "w7 w8"}]
    assert token_rows(word_tokenizer(), rows) == ([[5, 6, 1], [5, 7, 8, 1]], 0)


def test_rows_of_prompts_are_the_text_as_it_is():
    rows = [{"prompt": "w5 w6 w7"}, {"prompt": "w8"}]
    tokenizer = word_tokenizer()
    assert token_rows(tokenizer, rows) == ([[5, 6, 7], [8]], 0)


def test_texts_that_are_too_long_are_cut_and_counted():
    tokenizer = word_tokenizer()
    prompts = [{"prompt": "w5 w6 w7"}, {"prompt": "w8"}]
    assert token_rows(tokenizer, prompts, 2) == ([[5, 6], [8]], 1)

    demonstrations = [
        {"prompt": "w5 w6", "response": "w7"},
        {"prompt": "w8", "response": "w9 w10 w11"},
    ]
    texts, n_cut = token_rows(tokenizer, demonstrations, 3)
    for text in texts:
        assert len(text) <= 3
    assert n_cut == 1


def different(rows):
    return {tuple(row) for row in rows}


def test_no_text_is_on_both_sides():
    # 40 different texts, five times each.
    rows = 5 * [[5, i, 7] for i in range(40)]
    tokenizer = word_tokenizer()
    train, aside = hold_out(rows, 6, tokenizer)
    assert len(train) + len(aside) == 200
    assert len(aside) == 30
    assert len(different(aside)) == 6
    assert not different(train) & different(aside)
    # The same texts every time, and at most a fifth.
    assert hold_out(rows, 6, tokenizer) == (train, aside)
    _, fifth = hold_out(rows, 10**6, tokenizer)
    assert len(different(fifth)) == 8


def test_texts_that_differ_by_white_space_are_one():
    """With a tokenizer that has tokens of blanks: 'a b' and 'a  b' are never on two sides."""
    rows = []
    for letter in "abcdefghij":
        for blank in (" ", "  ", "\n"):
            text = f"{letter} x{blank}y"
            rows.append(list(text.encode()))

    def batch_decode(rows):
        return [bytes(row).decode() for row in rows]

    tokenizer = types.SimpleNamespace(batch_decode=batch_decode)
    train, aside = hold_out(rows, 2, tokenizer)
    assert len(train) == 24
    assert len(aside) == 6
    letters_aside = {row[0] for row in aside}
    assert len(letters_aside) == 2
    for row in train:
        assert row[0] not in letters_aside


def save_random_policy(folder):
    torch.manual_seed(0)
    config = world.model_config()
    config.num_hidden_layers = 3
    policy = Policy(AutoModelForCausalLM.from_config(config), value_head=False)
    save_policy(policy, world.tokenizer(), str(folder))


def test_rows_of_rollouts_are_prompts_with_answers(tmp_path):
    save_random_policy(tmp_path / "model")
    config = types.SimpleNamespace(
        output_dir=str(tmp_path),
        model=str(tmp_path / "model"),
        n_answers=3,
        max_new_tokens=5,
        temperature=1.0,
        seed=0,
        dtype="float32",
        batch_size=4,
        chat_template=False,
    )
    tokenizer = world.tokenizer()
    prompt_rows = [{"prompt": "review the hotel :"}, {"prompt": "review the room :"}]
    prompts = Prompts(encode_prompts(tokenizer, prompt_rows), prompt_rows)
    rows = rollout_rows(config, tokenizer, prompts, ONE)

    assert len(rows) == 6
    for i, row in enumerate(rows):
        prompt = prompts.ids[i // 3]
        answer = row[len(prompt) :]
        assert row[: len(prompt)] == prompt
        # It ends with EOS, or is as long as it may be.
        assert answer[-1] == tokenizer.eos_token_id or len(answer) == 5
        assert tokenizer.eos_token_id not in answer[:-1]
    # The same every time, and plain lists: they are hashed as JSON.
    assert rollout_rows(config, tokenizer, prompts, ONE) == rows
    assert json.dumps(rows)
