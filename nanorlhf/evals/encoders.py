"""Models that read finished texts: sentence encoders, and NLI models that say whether one text
contradicts or entails another.

    N texts or pairs of texts, b of a batch, T tokens, D hidden

Both are functions of a list of texts or pairs. Each different text (or pair) goes through the model
once, however often and in however many calls it is asked for, in batches of similar length.
"""

import inspect
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

from ..diversity import nli_scores
from ..errors import InputError
from ..hf.folders import check_model, readable_length
from ..models import load_tokenizer, pretrained
from ..packing import micro_batches, pad_rows

# Tokens of one forward pass, padding counted.
TOKENS = {"cpu": 2**13, "cuda": 2**17}
# The labels of an NLI model, in the order of nli_scores.
LABELS = ("contradiction", "neutral", "entailment")


def sentence_encoder(path: str, device="cpu") -> "Reader":
    """Load any HF encoder or causal LM: encode(list of N texts) -> [N, D], float32 on the CPU.

        x = mean over a text's tokens of the last hidden states

    path: a folder or a hub name. Special tokens count, as in sentence-transformers, whose folders
    load here. A text is cut to the model's context; a text without any token becomes its padding
    token. Reimers & Gurevych 2019, 1908.10084.
    Pitfall: a model that was not trained on sentences puts all of them close together.
    """
    check_model(path)
    model = pretrained(transformers.AutoModel, path, new_head=True).to(device)
    tokenizer = load_tokenizer(path, needs_eos=False)

    def mean_pooled(inputs):
        hidden = model(**inputs).last_hidden_state  # [b, T, D]
        mask = inputs["attention_mask"][..., None]  # [b, T, 1]
        return (hidden * mask).sum(1) / mask.sum(1)  # [b, D]

    return Reader(model, tokenizer, mean_pooled)


def nli_scorer(path: str, device="cpu") -> "Reader":
    """Load an MNLI model: score(list of N pairs: premise, hypothesis) -> [N], float32 on the CPU.

    path: a folder or a hub name. The score is diversity.nli_scores of the model's three
    probabilities. A pair that is too long is cut, the longer text first.
    """
    order = check_nli(path)
    model = pretrained(transformers.AutoModelForSequenceClassification, path).to(device)
    tokenizer = load_tokenizer(path, needs_eos=False)

    def score(inputs):
        logits = model(**inputs).logits.float()  # [b, 3]
        probs = logits.softmax(-1)[:, order]  # in the order of LABELS
        return nli_scores(probs)  # [b]

    return Reader(model, tokenizer, score)


def check_nli(path: str) -> list[int]:
    """Where contradiction, neutral and entailment stand among an NLI model's labels.

    They are known by their names in its config. InputError: the labels are others.
    """
    places = {}
    for i, name in check_model(path).id2label.items():
        places[str(name).lower()] = int(i)
    if set(places) != set(LABELS):
        raise InputError(
            f"{path}: no NLI model: its config must name the labels {', '.join(LABELS)}, "
            f"not {', '.join(places)}"
        )
    return [places[label] for label in LABELS]


class Reader:
    """A function of any list of texts, or of pairs of texts, that remembers what it has read.

    output: {input_ids [b, T], attention_mask [b, T], ...} -> [b, ...]
    """

    def __init__(self, model, tokenizer, output: Callable):
        self.model = model
        self.tokenizer = tokenizer
        self.output = output
        self.limit = longest(model, tokenizer)
        self.known = {}  # {text or pair: output}

    @torch.no_grad()
    def __call__(self, things: list[str] | list[tuple[str, str]]) -> Tensor:
        """N texts or pairs -> [N, ...], on the CPU."""
        new = []
        for thing in dict.fromkeys(things):  # each once
            if thing not in self.known:
                new.append(thing)
        if new:
            self.read(new)
        return torch.stack([self.known[thing] for thing in things])

    def read(self, new):
        """Run the model on texts or pairs that are not known yet."""
        fields = self.tokenize(new)
        lengths = torch.tensor([len(ids) for ids in fields["input_ids"]])
        for rows in micro_batches(lengths, 0, TOKENS[self.model.device.type]):
            inputs = {}
            for name, lists in fields.items():
                # Zeros on the right, where the mask lets no token look.
                padded = pad_rows([lists[i] for i in rows])  # [b, T]
                inputs[name] = padded.to(self.model.device)
            results = self.output(inputs).cpu()
            for i, result in zip(rows, results):
                self.known[new[i]] = result

    def tokenize(self, new) -> dict[str, list[list[int]]]:
        """Texts or pairs -> {field: a list for each}: the fields that the model's forward takes."""
        # The tokenizer takes one list of texts, or one of premises and one of hypotheses.
        columns = [new]
        if isinstance(new[0], tuple):
            premises, hypotheses = zip(*new)
            columns = [list(premises), list(hypotheses)]
        encoded = self.tokenizer(
            *columns, truncation=True, max_length=self.limit, return_attention_mask=True
        )

        # A text without any token becomes its end alone, or else one token of padding, which is
        # read like a real one. Padding may have an embedding of zeros, which has no direction.
        only_id = self.tokenizer.eos_token_id
        if only_id is None:
            only_id = self.tokenizer.pad_token_id or 0
        of_empty = {"input_ids": [only_id], "attention_mask": [1]}
        accepted = inspect.signature(self.model.forward).parameters
        fields = {}
        for name, lists in encoded.items():
            if name not in accepted:
                continue
            fields[name] = []
            for values in lists:
                fields[name].append(values or of_empty.get(name, [0]))
        return fields


def longest(model, tokenizer) -> int:
    """The most tokens that a model reads, and that its tokenizer gives."""
    context = readable_length(model) or 10**9  # a config may name no limit
    return min(context, tokenizer.model_max_length)
