"""nanorlhf.interp.activation_store: what is in a batch, against the models run on one text at a time.

N texts, E tokens that count, B tokens of a batch, S batches of a buffer, W processes, D hidden
"""

import json
import os
import types

import numpy as np
import pytest
import torch
from support import DEPTH, tiny_family, word_tokenizer

from nanorlhf import data, world
from nanorlhf.errors import InputError
from nanorlhf.interp import activation_store
from nanorlhf.interp.activation_store import (
    Stream,
    Tokens,
    from_disk,
    from_models,
    hold_out,
    passes,
    token_rows,
)
from nanorlhf.models import Policy, save_policy
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.locks import LOCK_FILE
from train_sae import rollout_rows

CPU = torch.device("cpu")
ONE = Dist(0, 1, CPU)
PLACES = [(0, "mlp"), (2, "residual"), (1, "attention")]
BOS = 1
LENGTHS = [3, 9, 1, 4, 4, 7, 2, 12, 5, 1, 6, 9]
ROWS = [
    [BOS if i % 3 == 0 else 5 + (7 * i) % 50, *(3 + (11 * i + 5 * j) % 57 for j in range(1, n))]
    for i, n in enumerate(LENGTHS)
]
ROWS[4][2] = BOS  # a BOS that is text: it also pads the rows of some models
ROWS[5][-1] = 0  # and a padding id that is text


def models():
    return {"base": tiny_family("neox"), "policy": tiny_family("neox", seed=1)}


@pytest.fixture(scope="module")
def lms():
    return models()


@torch.no_grad()
def one_by_one(lms, rows, skip_bos=None):
    """[(text, column, {key: [D]})] of all tokens that count, from Hugging Face's hidden states and hooks of this test's own."""
    out = []
    for text, row in enumerate(rows):
        found = {}
        for name, lm in lms.items():
            layers = lm.gpt_neox.layers
            kept = {}
            hooks = [layers[0].mlp.register_forward_hook(lambda m, a, y: kept.update(mlp=y)),
                     layers[1].attention.register_forward_hook(lambda m, a, y: kept.update(attention=y[0])),
                     layers[2].register_forward_hook(lambda m, a, y: kept.update(residual=y))]  # fmt: skip
            lm(torch.tensor([row]))
            for hook in hooks:
                hook.remove()
            keys = (("0_mlp", "mlp"), ("2_residual", "residual"), ("1_attention", "attention"))
            found |= {f"{name}/{key}": kept[site][0] for key, site in keys}
        for column in range(len(row)):
            if skip_bos is None or row[column] != skip_bos:
                out.append((text, column, {key: x[column] for key, x in found.items()}))
    return out


def stacked(tokens):
    return {key: torch.stack([x[key] for *_, x in tokens]) for key in tokens[0][2]}


def same(got, expected):
    assert got.keys() == expected.keys()
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-4)


def tally(parts):
    """The multiset of the rows [n, D] of batches, all keys side by side: rounded, sorted."""
    keys = sorted(parts[0])
    rows = torch.cat([torch.cat([part[key] for key in keys], 1) for part in parts])  # [n, keys D]
    return rows[torch.from_numpy(np.lexsort(rows.round(decimals=3).numpy().T[::-1]))]


@pytest.mark.parametrize("skip_bos", [None, BOS])
def test_padding_and_by_option_bos_never_enter(lms, skip_bos, monkeypatch):
    monkeypatch.setattr(
        activation_store, "TOKENS_AT_ONCE", 20
    )  # several forward passes, with padding
    tokens, expected = Tokens(ROWS, skip_bos), one_by_one(lms, ROWS, skip_bos)
    assert tokens.total == len(expected) == sum(LENGTHS) - (5 if skip_bos is not None else 0)
    source = from_models(tokens, lms, PLACES, ONE)
    parts = list(passes(tokens, source, ONE, at_once=15))
    assert len(parts) > 2
    same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, stacked(expected))
    some = np.array([7, 0, 9, 4])  # any order
    same(source(some), stacked([x for text in some for x in expected if x[0] == text]))


def test_an_eos_counts_unless_it_has_the_id_of_bos():
    """An EOS that is BOS has its norm, so it is left out wherever it stands; one with an id of its own counts."""
    own, shared = (
        Tokens([[BOS, 5, 6, 2], [7, 2]], skip_bos=BOS),
        Tokens([[BOS, 5, 6, BOS], [7, BOS]], skip_bos=BOS),
    )
    assert [mask.tolist() for mask in own.masks] == [[False, True, True, True], [True, True]]
    assert [mask.tolist() for mask in shared.masks] == [[False, True, True, False], [True, False]]
    assert Tokens([[BOS, 5, 6, BOS], [7, BOS]]).total == 6
    assert own.columns().tolist() == [1, 2, 3, 0, 1] and shared.columns().tolist() == [1, 2, 0]
    last = Tokens([[BOS, 5, BOS], [7, 8]], skip_bos=BOS, ends=[])
    assert [mask.tolist() for mask in last.masks] == [[False, False, False], [False, True]]


def test_texts_of_a_bos_alone_are_passed_over(lms):
    """Also where nothing comes before them, or nothing at all is left for a process."""
    rows = [[BOS], [BOS], [5, 6, 7], [BOS], [8, 9]]
    tokens, expected = Tokens(rows, BOS), one_by_one(lms, rows, BOS)
    source = from_models(tokens, lms, PLACES, ONE)
    parts = list(passes(tokens, source, ONE, at_once=3))
    assert [len(part["base/0_mlp"]) for part in parts] == [3, 2]
    same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, stacked(expected))
    assert list(passes(Tokens([[BOS], [5]], BOS), source, Dist(0, 2, CPU))) == []


def streams(lms, **kwargs):
    tokens = Tokens(ROWS, BOS)
    return Stream(tokens, from_models(tokens, lms, PLACES, ONE), 4, ONE, **kwargs)


@pytest.mark.parametrize("buffer_tokens", [4, 12, 20, 10**6])
def test_an_epoch_of_batches_holds_every_token_once(lms, buffer_tokens):
    stream, expected = streams(lms, seed=3, buffer_tokens=buffer_tokens), one_by_one(lms, ROWS, BOS)
    E = len(expected)  # 58: two epochs are 29 batches of 4
    assert 2 * E % 4 == 0 and stream.S == max(1, min(buffer_tokens, E) // 4)
    n = 2 * E // 4
    whole = n // stream.S * stream.S  # batches of whole buffers
    batches = [stream.batch(step) for step in range(max(n, whole + stream.S))]
    if n % stream.S == 0:
        torch.testing.assert_close(
            tally(batches[:n]), tally([stacked(expected + expected)]), rtol=1e-4, atol=2e-3
        )
    # An independent account of which token is where: by its value.
    values = torch.stack([x["base/2_residual"] for *_, x in expected])
    index = [torch.cdist(batch["base/2_residual"], values).argmin(1).tolist() for batch in batches]
    counts = np.bincount(sum(index[:whole], []), minlength=E)
    assert counts.sum() == whole * 4 and counts.max() - counts.min() <= 1
    for batch, rows in zip(batches, index):
        same(
            batch, stacked([expected[i] for i in rows])
        )  # all models and places of the same tokens


def test_a_batch_is_a_function_of_seed_and_step(lms):
    calls, stream = [], streams(lms, seed=3, buffer_tokens=12)
    source = stream.source
    stream.source = lambda texts: calls.append(len(texts)) or source(texts)
    forwards = [stream.batch(step) for step in range(11)]
    again = streams(lms, seed=3, buffer_tokens=12)
    for step in (10, 0, 4, 5, 3):
        batch = again.batch(step)
        assert all(torch.equal(batch[key], forwards[step][key]) for key in batch)
    other = streams(lms, seed=4, buffer_tokens=12).batch(0)
    assert not torch.equal(other["base/0_mlp"], forwards[0]["base/0_mlp"])
    resumed, calls[:] = streams(lms, seed=3, buffer_tokens=12), []
    resumed.source = stream.source
    resumed.batch(10)
    assert len(calls) <= 2 and sum(calls) < len(
        ROWS
    )  # cheap: of one buffer, not of all that went before


def test_a_batch_mixes_texts():
    """64 texts of 20 tokens in one buffer, which is an epoch: a batch of 64 has one token of each, from all parts of the texts."""
    tokens = Tokens([[2 + i] * 20 for i in range(64)])

    def source(texts):
        return {
            "x": torch.stack(
                [torch.from_numpy(np.repeat(texts, 20)), torch.arange(20).repeat(len(texts))], 1
            ).float()
        }

    stream = Stream(tokens, source, 64, ONE, buffer_tokens=1280)
    assert stream.S == 20
    batches = torch.stack(
        [stream.batch(step)["x"].long() for step in range(40)]
    )  # [40, 64, (text, column)]
    for text, column in batches.transpose(1, 2):
        assert text.unique().numel() == 64 and column.unique().numel() > 12
    for epoch in batches.split(20):
        assert torch.equal(
            (20 * epoch[..., 0] + epoch[..., 1]).flatten().sort().values, torch.arange(1280)
        )
    assert not torch.equal(
        batches[0, :, 0], batches[20, :, 0]
    )  # the next epoch has an order of its own


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_make_the_same_global_batches(lms, world_size):
    whole, texts = streams(lms, seed=1, buffer_tokens=24), []
    tokens = whole.tokens
    shares = []
    for rank in range(world_size):
        dist = Dist(rank, world_size, CPU)
        source = from_models(tokens, lms, PLACES, dist)
        shares.append(
            Stream(
                tokens,
                lambda t, source=source: texts.append(len(t)) or source(t),
                4,
                dist,
                seed=1,
                buffer_tokens=24,
            )
        )
    for step in (0, 3, 7, 8, 20):
        parts = [share.batch(step) for share in shares]
        same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, whole.batch(step))
        assert all(len(part["base/0_mlp"]) == 4 // world_size for part in parts)
    ranks = [
        list(passes(tokens, whole.source, Dist(rank, world_size, CPU), 10))
        for rank in range(world_size)
    ]
    torch.testing.assert_close(
        tally(sum(ranks, [])), tally([whole.source(np.arange(len(ROWS)))]), rtol=1e-4, atol=2e-3
    )
    with pytest.raises(InputError, match="5 tokens a batch are not a multiple of 2 processes"):
        Stream(tokens, whole.source, 5, Dist(0, 2, CPU))


# ------------------------------------------------------------------------------------------------------------------ sentence ends


ENDS = [19, 20, 27, 33, 42, 48]


def ends_only(found):
    """What one_by_one found, without the tokens that end neither a sentence nor a text."""
    return [x for x in found if ROWS[x[0]][x[1]] in ENDS or x[1] == len(ROWS[x[0]]) - 1]


def test_sentence_ends_alone(lms, tmp_path, monkeypatch):
    """Once an epoch each, in any order of texts, from the models or from a disk, which is not mistaken for that of all tokens."""
    monkeypatch.setattr(activation_store, "TOKENS_AT_ONCE", 20)
    tokens, expected = Tokens(ROWS, BOS, ENDS), ends_only(one_by_one(lms, ROWS, BOS))
    inner = [x for x in expected if x[1] < len(ROWS[x[0]]) - 1]
    assert tokens.total == len(expected) and len(inner) > 5 and len(expected) < 58 / 2
    source = from_models(tokens, lms, PLACES, ONE)
    parts = list(passes(tokens, source, ONE, at_once=5))
    same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, stacked(expected))
    some = np.array([7, 2, 9, 4])
    same(source(some), stacked([x for text in some for x in expected if x[0] == text]))
    disk(tmp_path)
    with pytest.raises(InputError, match="differ in data"):
        disk(tmp_path, ends=ENDS)
    kept = disk(tmp_path / "ends", ends=ENDS)[1]
    whole = Stream(tokens, source, 2, ONE, seed=3, buffer_tokens=6)
    shares = [
        Stream(tokens, kept, 2, Dist(rank, 2, CPU), seed=3, buffer_tokens=6) for rank in range(2)
    ]
    for step in (0, 2, 5, 11):
        parts = [share.batch(step) for share in shares]
        same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, whole.batch(step))
    epochs = Stream(tokens, source, 2, ONE, seed=3, buffer_tokens=2)
    batches = [epochs.batch(step) for step in range(tokens.total)]
    torch.testing.assert_close(
        tally(batches), tally([stacked(expected + expected)]), rtol=1e-4, atol=2e-3
    )  # two epochs


def test_which_tokens_end_a_sentence():
    tokenizer = word_tokenizer(
        ["<pad>", "<eos>", "<unk>", "end.", "!", "a.b", "?", "...", "end", ".,", "yes!"]
    )
    assert activation_store.sentence_ends(tokenizer) == [3, 4, 6, 7, 10]


# ----------------------------------------------------------------------------------------------------------------------- on disk


def disk(folder, rows=ROWS, load=models, fingerprints=None, places=PLACES, ends=None, **kwargs):
    tokens = Tokens(rows, BOS, ends)
    fingerprints = fingerprints or {"base": "b0", "policy": "p0"}
    return tokens, from_disk(
        str(folder), tokens, fingerprints, places, load, ONE, shard_tokens=16, **kwargs
    )


def refuse():
    raise AssertionError("nothing should be computed again")


@pytest.mark.parametrize(
    "store, tolerance", [("float32", 1e-4), ("float16", 2e-2), ("bfloat16", 1e-1)]
)
def test_disk_and_models_give_the_same(lms, tmp_path, store, tolerance):
    tokens, source = disk(tmp_path / "cache", store=store)
    shards = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert shards == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
        "00003.safetensors",
        "cache.json",
    ]
    live, kept = (
        Stream(tokens, s, 4, ONE, seed=2, buffer_tokens=20)
        for s in (from_models(tokens, lms, PLACES, ONE), source)
    )
    batches = [[stream.batch(step) for step in range(0, 30)] for stream in (live, kept)]
    for a, b in zip(*batches):
        for key in a:
            assert b[key].dtype == torch.float32
            torch.testing.assert_close(b[key], a[key], rtol=tolerance, atol=tolerance)
    if store == "float32":
        torch.testing.assert_close(tally(batches[1]), tally(batches[0]), rtol=1e-4, atol=2e-3)
    size = sum((tmp_path / "cache" / name).stat().st_size for name in shards[:-1])
    assert size < 58 * 6 * 32 * {"float32": 4, "float16": 2, "bfloat16": 2}[store] + 4 * 2000


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    write, written = activation_store.write_shard, []

    def killed(path, found, store):
        written.append(path)
        if len(written) == 3:
            with open(path + ".tmp", "wb") as f:
                f.write(b"half")
            raise KeyboardInterrupt
        write(path, found, store)

    monkeypatch.setattr(activation_store, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        disk(tmp_path / "cache")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.safetensors")}
    assert sorted(before) == ["00000.safetensors", "00001.safetensors"]
    monkeypatch.setattr(activation_store, "write_shard", write)
    tokens, source = disk(tmp_path / "cache")
    assert {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in before} == before
    _, again = disk(tmp_path / "cache", load=refuse)
    _, whole = disk(tmp_path / "other")
    texts = np.arange(len(ROWS))
    for a, b, c in zip(*(s(texts).values() for s in (source, again, whole))):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_several_processes_fill_one_folder(tmp_path, monkeypatch):
    tokens, filled = Tokens(ROWS, BOS), []
    monkeypatch.setattr(Dist, "barrier", lambda self: None)
    monkeypatch.setattr(Dist, "together", lambda self, function: function())
    monkeypatch.setattr(activation_store, "map_shard", lambda path, keys, n: None)
    listed = os.path.exists
    for rank in (1, 0):  # one after the other, each as if no shard was there when it looked
        monkeypatch.setattr(
            os.path, "exists", lambda path: listed(path) and not path.endswith(".safetensors")
        )
        monkeypatch.setattr(
            activation_store,
            "write_shard",
            lambda path, found, store: filled.append((rank, os.path.basename(path)[:5])),
        )
        from_disk(
            str(tmp_path),
            tokens,
            {"base": "b0"},
            PLACES,
            models,
            Dist(rank, 2, CPU),
            shard_tokens=16,
        )
        monkeypatch.setattr(os.path, "exists", listed)
    assert filled == [(1, "00001"), (1, "00003"), (0, "00000"), (0, "00002")]


def test_a_folder_of_something_else(tmp_path):
    folder = tmp_path / "cache"
    disk(folder)
    for kwargs, word in [(dict(rows=ROWS[1:]), "data"), (dict(fingerprints={"base": "b1", "policy": "p0"}), "models"),
                         (dict(places=PLACES[:1]), "places"), (dict(store="float16"), "store")]:  # fmt: skip
        with pytest.raises(
            InputError, match=f"cache already holds other activations .they differ in .*{word}"
        ):
            disk(folder, load=refuse, **kwargs)
    (folder / "00001.safetensors").write_bytes(b"not a shard")
    with pytest.raises(InputError, match="00001.safetensors: cannot be read"):
        disk(folder, load=refuse)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with pytest.raises(InputError, match=f"{name} is not empty and holds no activations"):
            disk(tmp_path / name, load=refuse)
    with pytest.raises(InputError, match="float32, float16, bfloat16, not 'int8'"):
        disk(tmp_path / "new", load=refuse, store="int8")


def test_numbers_too_large_for_float16(tmp_path):
    def large():
        lms = models()
        lms["base"].gpt_neox.layers[0].mlp.dense_4h_to_h.weight.data.mul_(1e7)
        return lms

    with pytest.raises(
        InputError,
        match="base/0_mlp has a number that float16 cannot hold; store bfloat16 or float32",
    ):
        disk(tmp_path / "cache", load=large, store="float16")


def test_shards_are_mapped_not_read(tmp_path):
    path = str(tmp_path / "00000.safetensors")
    activation_store.write_shard(path, {"x": torch.zeros(2**16, 256)}, "float32")  # 64 MB
    pages = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc")
    before = pages()
    shard = activation_store.map_shard(path, {"x"}, 2**16)
    assert shard["x"].shape == (2**16, 256) and pages() - before < 2**24


# ------------------------------------------------------------------------------------------------------------------------- texts


def test_rows_of_datasets():
    tokenizer = word_tokenizer()
    sft = [{"prompt": "w5 w6", "response": "w7"}, {"prompt": "w8", "response": "w9 w10 w11"}]
    assert token_rows(tokenizer, sft) == ([[5, 6, 7, 1], [8, 9, 10, 11, 1]], 0)
    pairs = [{"prompt": "w5", "chosen": "w6", "rejected": "w7 w8"}]
    assert token_rows(tokenizer, pairs) == ([[5, 6, 1], [5, 7, 8, 1]], 0)
    prompts = [{"prompt": "w5 w6 w7"}, {"prompt": "w8"}]
    assert token_rows(tokenizer, prompts) == ([[5, 6, 7], [8]], 0)
    assert token_rows(tokenizer, prompts, 2) == ([[5, 6], [8]], 1)
    rows, cut = token_rows(tokenizer, sft, 3)
    assert all(len(row) <= 3 for row in rows) and cut == 1


def test_no_text_is_on_both_sides():
    rows, tokenizer = [[5, i % 40, 7] for i in range(200)], word_tokenizer()
    train, aside = hold_out(rows, 6, tokenizer)
    assert (
        len(train) + len(aside) == 200 and len({tuple(r) for r in aside}) == 6 and len(aside) == 30
    )
    assert not {tuple(r) for r in train} & {tuple(r) for r in aside}
    assert (
        hold_out(rows, 6, tokenizer) == (train, aside)
        and len({tuple(r) for r in hold_out(rows, 10**6, tokenizer)[1]}) == 8
    )
    with pytest.raises(InputError, match="no text has a token"):
        Tokens([[BOS]], BOS)


def test_texts_that_differ_by_white_space_are_one():
    """With a tokenizer that has tokens of blanks: 'a b' and 'a  b' are never on two sides."""
    texts = [f"{letter} x{blank}y" for letter in "abcdefghij" for blank in (" ", "  ", "\n")]
    tokenizer = types.SimpleNamespace(
        batch_decode=lambda rows: ["".join(map(chr, row)) for row in rows]
    )
    rows = [[ord(c) for c in text] for text in texts]
    train, aside = hold_out(rows, 2, tokenizer)
    first = [{chr(row[0]) for row in side} for side in (train, aside)]
    assert not first[0] & first[1] and len(first[1]) == 2 and (len(train), len(aside)) == (24, 6)


def test_rows_of_rollouts(tmp_path):
    torch.manual_seed(0)
    tokenizer = world.tokenizer()
    save_policy(Policy(tiny_world(), value_head=False), tokenizer, str(tmp_path / "model"))
    config = types.SimpleNamespace(output_dir=str(tmp_path), model=str(tmp_path / "model"), n_answers=3, max_new_tokens=5, temperature=1.0,
                                   seed=0, dtype="float32", batch_size=4)  # fmt: skip
    prompts = data.encode_prompts(tokenizer, ["review the hotel :", "review the room :"])
    rows = rollout_rows(config, tokenizer, prompts, ONE)
    assert len(rows) == 6
    for i, row in enumerate(rows):
        prompt, eos = prompts[i // 3], tokenizer.eos_token_id
        assert (
            row[: len(prompt)] == prompt
            and (row[-1] == eos or len(row) == len(prompt) + 5)
            and eos not in row[len(prompt) : -1]
        )
    assert rollout_rows(config, tokenizer, prompts, ONE) == rows
    assert json.dumps(rows)  # plain lists: they are hashed as JSON


def tiny_world():
    from transformers import AutoModelForCausalLM

    config = world.model_config()
    config.num_hidden_layers = DEPTH
    return AutoModelForCausalLM.from_config(config)


def test_only_the_last_token_of_each_text():
    """--tokens last: no id ends a sentence, so that a row's last token alone counts; EOS is no exception in the middle."""
    tokens = Tokens([[5, 1, 7, 1], [4], [1, 9]], ends=[])
    assert [mask.tolist() for mask in tokens.masks] == [
        [False, False, False, True],
        [True],
        [False, True],
    ]
    assert tokens.total == 3 and tokens.digest() != Tokens([[5, 1, 7, 1], [4], [1, 9]]).digest()


@pytest.mark.slow
def test_a_folder_of_activations(tmp_path, another, monkeypatch):
    """Only one process fills it; any number read it once it is whole."""
    folder = tmp_path / "cache"
    holder = another(folder)
    with pytest.raises(InputError, match="another process is working in .*cache;"):
        disk(folder, load=refuse)
    holder.kill()
    holder.join()
    _, source = disk(folder)
    assert LOCK_FILE not in os.listdir(folder)
    another(folder)
    _, again = disk(folder, load=refuse)
    texts = np.arange(len(ROWS))
    assert all(a.equal(b) for a, b in zip(source(texts).values(), again(texts).values()))
