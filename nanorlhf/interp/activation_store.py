"""Activations of texts for training sparse autoencoders: of one or several models, at several
places, always of the same tokens.

    N texts, E tokens of them that count (an epoch), T of a row, b rows of a forward pass, D hidden
    n tokens of some texts, B tokens of a global batch, S batches of a buffer, W processes

Texts become Tokens. A *source* turns indices of texts into activations {"base/3_mlp": [n, D]},
either with the models (from_models) or from a disk that was filled once (activation_cache.py). A
Stream asks a source for buffers, and deals shuffled batches from them:

    rows of a dataset, rollouts -> Tokens -> from_models or from_disk: a source
    source -> Stream(...).batch(step)   shuffled, without end, for training: [B / W, D]
           -> passes(...)               everything once, in order, for held-out texts: [n, D]

Nothing has a state that could be lost. Which tokens are in a batch is a function of (seed, step),
the same for both sources and for any number of processes. So a run that is resumed at step n
computes the buffer of step n and goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..chat_templates import leave_out_control_tokens
from ..data import canonical
from ..errors import require
from ..hf.activations import activations, place_name
from ..hf.folders import check_model, choose_max_length
from ..packing import micro_batches, pad_rows
from ..runtime.distributed import autocast
from ..runtime.files import digest
from ..runtime.results import parse_ids
from ..runtime.rng import MINIBATCH, ORDER, SPLIT
from ..tokens import encode, encode_prompts
from .sae_files import load_sae, read_config

# Tokens of a forward pass, padding counted.
TOKENS_AT_ONCE = 2**13

Activations = dict[str, Tensor]  # {"name/layer_site": [n, D]}
Source = Callable[[np.ndarray], Activations]  # of indices of texts
Place = tuple[int, str]  # a layer and a site


# ----------------------------------------------------------------------------------------- texts


def token_rows(
    tokenizer, rows: list[dict], max_length: int | None = None, chat: bool = False
) -> tuple[list[list[int]], int]:
    """Rows of a dataset (data.read_rows), of any kind -> token rows, and how many were cut.

    A demonstration is prompt + response + EOS, a pair is two such rows, a prompt is the text as it
    is. Each has at most max_length tokens.
    """
    # A row's columns say which kind it is:
    #     {"prompt"}, {"prompt", "response"} or {"prompt", "chosen", "rejected"}
    fields = [field for field in ("response", "chosen", "rejected") if field in rows[0]]
    texts = []
    n_cut = 0
    # A prompt alone has no answer, so it gets no EOS, and is cut at its end.
    if not fields:
        for ids in encode_prompts(tokenizer, rows, chat):
            text = ids[:max_length]
            texts.append(text)
            if len(text) < len(ids):
                n_cut += 1
        return texts, n_cut

    # A text is what the model reads in one row: a prompt and its answer. All chosen answers of
    # pairs come before all rejected ones.
    encoded = encode(tokenizer, rows, fields, max_length, chat)
    for responses in encoded.responses.values():
        for prompt, response in zip(encoded.prompts, responses):
            texts.append(prompt + response)
    return texts, encoded.n_responses_cut


def tokenize_rows(config, tokenizer, rows: list[dict], model_config, dist) -> list[list[int]]:
    """token_rows() with the flags of texts; says how many were left out, and how many were cut."""
    rows = leave_out_control_tokens(tokenizer, rows, config, dist.print)
    max_length = choose_max_length(config.max_length, model_config)
    texts, n_cut = token_rows(tokenizer, rows, max_length, config.chat_template)
    if n_cut:
        dist.print(f"{n_cut} of {len(texts)} texts cut")
    return texts


def find_skipped(config, tokenizer) -> int | None:
    """The id whose tokens do not count: BOS, which has a norm of its own; none with --keep_bos."""
    if config.keep_bos:
        return None
    return tokenizer.bos_token_id


def hold_out(rows: list[list[int]], n: int, tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Token rows -> rows to train on, and the rows of n texts that are kept apart, at most a fifth.

    No text is on both sides. Texts that differ by white space alone are one text.
    """
    texts = [canonical(text) for text in tokenizer.batch_decode(rows)]
    # Texts are drawn, not rows, so that all rows of one text go to the same side.
    different = list(dict.fromkeys(texts))  # in their order
    n = min(n, len(different) // 5)
    # The key has no seed of the run, so that train_sae.py and probe.py hold out the same texts.
    order = np.random.default_rng(SPLIT).permutation(len(different))
    aside = {different[i] for i in order[:n]}

    train = []
    held_out = []
    for text, row in zip(texts, rows):
        if text in aside:
            held_out.append(row)
        else:
            train.append(row)
    return train, held_out


def sentence_ends(tokenizer) -> list[int]:
    """The ids of the tokens whose text ends in . ! or ? (white space after it aside)."""
    # Tokens are decoded, since a vocabulary spells white space otherwise: ".\n" may stand as ".Ċ".
    every_id = [[i] for i in range(len(tokenizer))]
    ends = []
    for i, text in enumerate(tokenizer.batch_decode(every_id)):
        if text.rstrip().endswith((".", "!", "?")):
            ends.append(i)
    return ends


class Tokens:
    """Token rows, and which of their tokens count: those whose activations are kept, and changed.

    All tokens count; or, given `ends`, those with these ids and the last one of each row. Given
    skip_bos, the id of a BOS, no token with that id counts, wherever it stands: an EOS that shares
    the id has the BOS's huge norm too (two thirds of the variance of a story model's MLP). An EOS
    with an id of its own counts, and so do ids that also serve as padding: what counts is known
    from ids at places within a text's length. InputError: no token counts.
    """

    def __init__(
        self,
        rows: list[list[int]],
        skip_bos: int | None = None,
        ends: Sequence[int] | None = None,
    ):
        self.rows = rows
        self.skip_bos = skip_bos
        self.ends = None if ends is None else sorted(ends)
        self.lengths = np.array([len(row) for row in rows])  # [N]

        # One mask of all rows, one after another, is cut into rows at the end.
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        row_ends = self.lengths.cumsum()  # [N]
        # By default every token counts. With `ends`, the last token of a text counts in any case.
        if ends is None:
            mask = np.full(len(ids), True)
        else:
            mask = np.isin(ids, self.ends)
            mask[row_ends[self.lengths > 0] - 1] = True
        # This comes last, since a BOS does not count even where it is the last token of its text.
        if skip_bos is not None:
            mask[ids == skip_bos] = False

        self.masks = np.split(mask, row_ends[:-1])  # which tokens of each row count
        self.counts = np.array([own_mask.sum() for own_mask in self.masks])  # [N]
        self.total = int(self.counts.sum())  # E
        require(
            self.total,
            "no text has a token whose activations could be kept (--keep_bos keeps BOS, and an EOS "
            "that shares its id)",
        )

    def columns(self) -> np.ndarray:
        """Where in its text each token that counts stands, text by text: [E]."""
        return np.concatenate([np.flatnonzero(mask) for mask in self.masks])

    def batch(self, texts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Indices of texts -> their ids and masks [b, T], 0 and False in the padding."""
        ids = pad_rows([self.rows[text] for text in texts])
        mask = pad_rows([self.masks[text] for text in texts]).bool()
        return ids, mask

    def places(self, texts: np.ndarray) -> np.ndarray:
        """Where the tokens of these texts stand among the E tokens of all texts: [n]."""
        first = self.counts.cumsum() - self.counts  # [N]: where each text's tokens begin
        return join_ranges(first[texts], self.counts[texts])

    def digest(self) -> str:
        """What tells these tokens from others, for a cache on disk."""
        parts = [[digest(row) for row in self.rows], self.skip_bos]
        # Where all tokens count, nothing is said of ends.
        if self.ends is not None:
            parts.append(self.ends)
        return digest(*parts)


def where(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Find each of the N tokens that count. -> its text and its id, [N] each"""
    text_of = np.repeat(np.arange(len(tokens.rows)), tokens.counts)
    ids = []
    for text, column in zip(text_of, tokens.columns()):
        ids.append(tokens.rows[text][column])
    return torch.from_numpy(text_of), torch.tensor(ids)


def join_ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[f, f + 1, .., f + c - 1] for each f of `first` and c of `counts`, one after another."""
    starts = counts.cumsum() - counts  # where each range begins in the result
    return np.arange(counts.sum()) + np.repeat(first - starts, counts)


# --------------------------------------------------------------------------------------- sources


def from_models(
    tokens: Tokens, lms: dict, places: list[Place], dist, dtype: str = "float32"
) -> Source:
    """A source that runs the models {name: lm}, whole on each process and in eval mode.

    InputError, when it is asked: a place that one of the models lacks.
    """
    return partial(run_models, tokens, lms, places, dist, dtype)


def run_models(
    tokens: Tokens, lms: dict, places: list[Place], dist, dtype: str, texts: np.ndarray
) -> Activations:
    """Indices of texts -> {"name/layer_site": [n, D]} float32, the tokens text after text."""
    counts = tokens.counts[texts]
    first = counts.cumsum() - counts  # where each text's tokens begin in the result
    lengths = torch.from_numpy(tokens.lengths[texts])
    out = {}
    # Texts of similar length share a forward pass.
    for batch in micro_batches(lengths, None, TOKENS_AT_ONCE):
        in_batch = batch.numpy()  # [b]
        # No attention mask is needed: a causal model does not look to its right, at padding.
        ids, mask = tokens.batch(texts[in_batch])  # [b, T]
        ids = ids.to(dist.device)
        mask = mask.to(dist.device)
        # The rows of the result where the tokens of this batch go.
        rows = join_ranges(first[in_batch], counts[in_batch])
        rows = torch.from_numpy(rows).to(dist.device)
        # All models read the same ids, so that row n of every result is the same token.
        for name, lm in lms.items():
            with autocast(dist, dtype):
                outputs = activations(lm, ids, places)
            for place, x in outputs.items():  # [b, T, D]
                key = f"{name}/{place_name(place)}"
                # The width D of a place is known from its first forward pass on.
                if key not in out:
                    out[key] = torch.empty(counts.sum(), x.shape[-1], device=dist.device)
                out[key][rows] = x[mask].float()
    return out


def read_activations(tokens: Tokens, lm, place: Place, dist, dtype: str = "float32") -> Tensor:
    """What one model puts out at one place on all N tokens that count: [N, D] float32."""
    every_text = np.arange(len(tokens.rows))
    activations_of = run_models(tokens, {"m": lm}, [place], dist, dtype, every_text)
    return activations_of[f"m/{place_name(place)}"]


# --------------------------------------------------------------------------------------- batches


class Stream:
    """Shuffled batches of activations. batch(step) is a function of (seed, step), whatever was
    asked before.

    The texts, every epoch in an order keyed by (seed, epoch), make one endless row of tokens.
    A buffer is the next S B of them, cut into B strata of S neighbours. Each of its S batches takes
    one token of every stratum, in orders keyed by (seed, buffer):

        S = 2, B = 3        tokens  0 1 | 2 3 | 4 5        batch 0: 1 2 4, batch 1: 0 3 5

    So every token comes once an epoch, and a batch has hardly two of one text. A process has the
    same share B / W of every batch: it computes its own strata alone, and needs nothing from the
    others. At most two texts a process and buffer are computed twice.

    buffer_tokens: about S B, what all processes hold together, in float32 for each model and place.
    InputError: B is not a multiple of W.
    """

    def __init__(
        self,
        tokens: Tokens,
        source: Source,
        batch_size: int,
        dist,
        seed: int = 0,
        buffer_tokens: int = 2**16,
    ):
        require(
            batch_size % dist.world == 0,
            f"{batch_size} tokens a batch are not a multiple of {dist.world} processes",
        )
        self.tokens = tokens
        self.source = source
        self.dist = dist
        self.seed = seed
        self.B = batch_size
        # A buffer is at most an epoch, but at least one batch, even where a batch is the longer.
        self.S = max(1, min(buffer_tokens, tokens.total) // batch_size)
        self.loaded = None  # the number of the buffer that is held
        self.buffer = {}  # this process's strata: {key: [S B / W, D]}
        self.order = None  # [B / W, S]: the row of the buffer that each batch takes of a stratum

    def batch(self, step: int) -> Activations:
        """This process's share of a step's batch: {"name/layer_site": [B / W, D]}."""
        # With S = 3, step 7 is batch 1 of buffer 2. In the order of steps each buffer loads once.
        buffer, j = divmod(step, self.S)
        if self.loaded != buffer:
            self.load(buffer)
        rows = self.order[:, j].to(self.dist.device)  # [B / W]
        return {key: x[rows] for key, x in self.buffer.items()}

    def load(self, buffer: int):
        """Compute this process's strata of a buffer, and the orders in which batches take them."""
        self.buffer = {}  # before the next one takes memory
        # All processes draw the orders of all strata, and keep those of their own.
        rng = np.random.default_rng([MINIBATCH, self.seed, buffer])
        places = np.tile(np.arange(self.S), (self.B, 1))  # [B, S]
        orders = rng.permuted(places, axis=1)  # [B, S]
        strata = self.dist.share(np.arange(self.B))  # [B / W], neighbours
        # Stratum i of this process lies in rows S i .. S i + S - 1 of its buffer.
        first_rows = self.S * np.arange(len(strata))[:, None]
        self.order = torch.from_numpy(orders[strata] + first_rows)  # [B / W, S]

        # Neighbouring strata are one stretch of the endless row. It comes in parts where it crosses
        # the end of an epoch.
        first = (buffer * self.B + strata[0]) * self.S
        last = first + len(strata) * self.S
        parts = list(self.read_stretch(first, last))
        if len(parts) == 1:
            self.buffer = parts[0]
        else:
            for key in parts[0]:
                self.buffer[key] = torch.cat([part[key] for part in parts])
        self.loaded = buffer

    def read_stretch(self, first: int, last: int) -> Iterator[Activations]:
        """The activations of tokens first .. last - 1 of the endless row: {key: [n, D]}, one part
        for each epoch that they touch."""
        E = self.tokens.total
        for epoch in range(first // E, (last - 1) // E + 1):
            rng = np.random.default_rng([ORDER, self.seed, epoch])
            order = rng.permutation(len(self.tokens.rows))  # [N]
            ends = self.tokens.counts[order].cumsum()  # [N]

            # The tokens low .. high - 1 of this epoch, and the texts that they lie in.
            low = max(first - epoch * E, 0)
            high = min(last - epoch * E, E)
            first_text = np.searchsorted(ends, low, side="right")
            last_text = np.searchsorted(ends, high, side="left")
            texts = order[first_text : last_text + 1]

            # The first text may begin before low, and the last one end after high.
            start = int(ends[first_text] - self.tokens.counts[texts[0]])
            wanted = slice(low - start, high - start)
            yield {key: x[wanted] for key, x in self.source(texts).items()}


def passes(tokens: Tokens, source: Source, dist, at_once: int = 2**16) -> Iterator[Activations]:
    """All tokens once, in order, about at_once at a time: {key: [n, D]}.

    Each process goes through its own part of the texts.
    """
    texts = np.array(dist.part(len(tokens.rows)), dtype=np.int64)
    texts = texts[tokens.counts[texts] > 0]  # a text of a BOS alone has nothing to pass on
    # A text goes to the group of at_once tokens in which its last token falls.
    group = (tokens.counts[texts].cumsum() - 1) // at_once
    for i in np.unique(group):
        yield source(texts[group == i])


# ------------------------------------------------------------------ what an autoencoder reads


def open_autoencoder(config, path: str) -> tuple[torch.nn.Module, str, Place]:
    """An autoencoder's folder and the flags -> (autoencoder, model, place).

    The folder says whose activations the autoencoder reads, unless flags say otherwise. InputError:
    neither says it, or model, layer, autoencoder and --features do not fit.
    """
    # train_sae.py notes {"model": "runs/sft", "layer": 3, "site": "mlp", ...}. Flags come first,
    # for folders of SAELens, which lack these notes, and for other models of this width.
    notes = read_config(path).get("metadata") or {}
    model = config.model or notes.get("model", "")
    layer = config.layer
    if layer < 0:
        layer = notes.get("layer")
    site = config.site or notes.get("site", "")
    has_layer = layer is not None and layer >= 0
    require(
        model and site and has_layer,
        f"{path} does not say whose activations it reads: name --model, --layer and --site",
    )

    # These checks need the model's config alone; the caller loads the model.
    model_config = check_model(model).get_text_config()
    last_layer = model_config.num_hidden_layers - 1
    require(layer <= last_layer, f"layer {layer}: {model} has the layers 0 to {last_layer}")
    sae = load_sae(path, width=model_config.hidden_size)
    beyond = [i for i in parse_ids(config.features) if i >= sae.m]
    require(
        not beyond,
        f"--features {', '.join(map(str, beyond))}: {path} has the features 0 to {sae.m - 1}",
    )
    return sae, model, (layer, site)
