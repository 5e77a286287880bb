"""Models that read finished texts: sentence encoders, and NLI models that say whether one text contradicts or entails another.

    N texts or pairs of texts, b of a batch, T tokens, D hidden

Both are plain functions. Each different text (or pair) goes through the model once, however often and in however many calls it is
asked for, in batches of similar length.
"""

import inspect

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForSequenceClassification

from ..diversity import nli_scores
from ..errors import InputError
from ..hf.folders import check_model, context_length
from ..models import load_tokenizer, pretrained
from ..packing import micro_batches

TOKENS = {"cpu": 2**13, "cuda": 2**17}  # of one forward pass
LABELS = ("contradiction", "neutral", "entailment")  # in the order of nli_scores


def sentence_encoder(path, device="cpu"):
    """Any HF encoder (or causal LM), by folder or hub name -> encode(list of N texts) -> [N, D], float32 on the CPU.

        x = mean over a text's tokens of the last hidden states

    Special tokens count, as in sentence-transformers, whose folders load here. A text is cut to the model's context; one without any
    token becomes its padding token. Reimers & Gurevych 2019, 1908.10084.
    Pitfall: a model that was not trained on sentences puts all of them close together.
    """
    check_model(path)
    model, tokenizer = pretrained(AutoModel, path, new_head=True).to(device), load_tokenizer(path, needs_eos=False)

    def mean_pooled(inputs):
        hidden = model(**inputs).last_hidden_state  # [b, T, D]
        mask = inputs["attention_mask"][..., None]  # [b, T, 1]
        return (hidden * mask).sum(1) / mask.sum(1)  # [b, D]

    return reader(model, tokenizer, mean_pooled)


def nli_scorer(path, device="cpu"):
    """An MNLI model, by folder or hub name -> score(list of N pairs: premise, hypothesis) -> [N], float32 on the CPU.

    The score is diversity.nli_scores of its three probabilities. A pair that is too long is cut, the longer text first.
    """
    order = check_nli(path)
    model, tokenizer = pretrained(AutoModelForSequenceClassification, path).to(device), load_tokenizer(path, needs_eos=False)
    return reader(model, tokenizer, lambda inputs: nli_scores(model(**inputs).logits.float().softmax(-1)[:, order]))


def check_nli(path):
    """Where contradiction, neutral and entailment stand among an NLI model's labels, by their names in its config; InputError without."""
    places = {str(name).lower(): int(i) for i, name in check_model(path).id2label.items()}
    if set(places) != set(LABELS):
        raise InputError(f"{path}: no NLI model: its config must name the labels {', '.join(LABELS)}, not {', '.join(places)}")
    return [places[label] for label in LABELS]


def reader(model, tokenizer, output):
    """output({input_ids [b, T], attention_mask, ...}) -> [b, ...] as a function of any list of texts or pairs of texts."""
    known, limit, accepted = {}, longest(model, tokenizer), inspect.signature(model.forward).parameters

    @torch.no_grad()
    def read(things):
        new = [thing for thing in dict.fromkeys(things) if thing not in known]
        if new:
            columns = zip(*new) if isinstance(new[0], tuple) else [new]
            encoded = tokenizer(*map(list, columns), truncation=True, max_length=limit, return_attention_mask=True)
            fields = {name: lists for name, lists in encoded.items() if name in accepted}
            empty = {"input_ids": [tokenizer.pad_token_id or 0], "attention_mask": [1]}
            fields = {name: [x or empty.get(name, [0]) for x in lists] for name, lists in fields.items()}
            lengths = torch.tensor([len(ids) for ids in fields["input_ids"]])
            for rows in micro_batches(lengths, 0, TOKENS[model.device.type]):
                inputs = {}
                for name, lists in fields.items():
                    chosen = [torch.tensor(lists[i]) for i in rows]
                    # [b, T], zeros on the right, where the mask lets no one look
                    inputs[name] = pad_sequence(chosen, batch_first=True).to(model.device)
                known.update(zip((new[i] for i in rows), output(inputs).cpu()))
        return torch.stack([known[thing] for thing in things])

    return read


def longest(model, tokenizer):
    """The most tokens that a model reads. RoBERTa counts its positions from the padding id on, so its last ones are out of reach."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    unused = max((table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), default=0)
    return min((context_length(model.config) or 10**9) - unused, tokenizer.model_max_length)
