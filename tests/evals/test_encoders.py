"""nanorlhf.evals.encoders against Hugging Face's own forward of one text at a time.

    N texts or pairs, T tokens, D hidden

The models are tiny and random. ENCODER_TEXTS are seven texts of which five are different.
"""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    ENCODER_CONFIG,
    ENCODER_PAIRS,
    ENCODER_TEXTS,
    NLI_LABELS,
    encoder_tokenizer,
    label_settings,
    save_encoder,
)
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from nanorlhf.errors import InputError
from nanorlhf.evals import encoders
from nanorlhf.evals.encoders import check_nli, nli_scorer, sentence_encoder

# The places of the five different texts in ENCODER_TEXTS.
DIFFERENT = [0, 1, 3, 4, 5]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def encode_alone(folder, text, longest):
    """One text through plain transformers, by its ids: [D]. An empty text is token 1, <pad>."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, truncation=True, max_length=longest).input_ids or [1]
    hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]  # [T, D]
    return hidden.mean(0)


# A limit of 2**13 tokens makes one batch of all texts, a few tokens make several.
@pytest.mark.parametrize(
    "name, tokens", [("bert", 2**13), ("bert", 8), ("neox", 2**13), ("neox", 5), ("roberta", 16)]
)
def test_embeddings_are_those_of_each_text_alone(encoder_folders, name, tokens, monkeypatch):
    monkeypatch.setitem(encoders.TOKENS, "cpu", tokens)
    folder = encoder_folders[name]

    x = sentence_encoder(folder)(ENCODER_TEXTS)  # [N, D]

    assert x.shape == (7, 16)
    assert x.dtype == torch.float32
    assert not x.requires_grad
    close(x, torch.stack([encode_alone(folder, text, 50) for text in ENCODER_TEXTS]))
    # The same texts have the same vectors to the last bit, and different ones are far apart.
    assert torch.equal(x[0], x[2])
    assert torch.equal(x[1], x[6])
    assert torch.pdist(x[DIFFERENT]).min() > 0.1


def test_each_text_goes_through_the_model_once(encoder_folders, monkeypatch):
    forward = BertModel.forward
    batch_sizes = []

    def counted(self, input_ids, **rest):
        batch_sizes.append(len(input_ids))
        return forward(self, input_ids=input_ids, **rest)

    # The encoder asks the model which inputs it takes.
    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(BertModel, "forward", counted)
    encode = sentence_encoder(encoder_folders["bert"])
    # Loading tries the model once.
    batch_sizes.clear()

    first = encode(ENCODER_TEXTS)
    assert sum(batch_sizes) == 5

    # Of these only "a" is new.
    again = encode(["a", *ENCODER_TEXTS[::-1]])
    assert sum(batch_sizes) == 6
    assert torch.equal(again[1:], first.flip(0))


LONG = " ".join("abcdefgh"[i % 8] for i in range(100))


# RoBERTa's positions start behind its padding id: of 20 it can use 18.
@pytest.mark.parametrize("name, room", [("bert", 20), ("roberta", 18)])
def test_long_texts_are_cut_to_the_context(encoder_folders, name, room):
    found = sentence_encoder(encoder_folders[name])([LONG])[0]
    close(found, encode_alone(encoder_folders[name], LONG, room))


def test_long_pairs_are_cut_to_the_context(encoder_folders):
    scores = nli_scorer(encoder_folders["roberta"])([(LONG, LONG), ("a", LONG)])
    assert scores.abs().max() <= 1


def test_an_encoder_without_its_pooler_is_whole(encoder_folders, tmp_path):
    without_pooler = BertModel(BertConfig(**ENCODER_CONFIG), add_pooling_layer=False)
    folder = save_encoder(without_pooler, tmp_path, encoder_tokenizer())
    for name in load_file(tmp_path / "model.safetensors"):
        assert "pooler" not in name

    close(sentence_encoder(folder)(["a b"])[0], encode_alone(folder, "a b", 20))


def test_an_encoder_that_lacks_weights_is_refused(encoder_folders, tmp_path):
    folder = save_encoder(BertModel(BertConfig(**ENCODER_CONFIG)), tmp_path, encoder_tokenizer())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks the weights encoder.layer.1.output.dense.weight"):
        sentence_encoder(folder)


# What a label is worth: a contradiction is diverse, an entailment the opposite.
SIGNS = {"ENTAILMENT": -1, "CONTRADICTION": 1, "NEUTRAL": 0}


@torch.no_grad()
def classify_alone(model, tokenizer, pair, room):
    """One ordered pair through plain transformers -> (the likeliest label, its probability)."""
    # As a batch of one: outside of a batch "" is no second text.
    first, second = pair
    inputs = tokenizer([first], [second], truncation=True, max_length=room, return_tensors="pt")
    logits = model(**inputs).logits[0].double()
    probability, label = logits.softmax(0).max(0)
    return NLI_LABELS[label.item()], probability.item()


@pytest.mark.parametrize("name, room", [("roberta", 18), ("bert-nli", 20)])
def test_nli_scores_by_the_names_of_the_labels(encoder_folders, name, room):
    folder = encoder_folders[name]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    scores = nli_scorer(folder)(ENCODER_PAIRS)

    assert len(scores) == len(ENCODER_PAIRS)
    labels = set()
    for pair, score in zip(ENCODER_PAIRS, scores.tolist()):
        label, probability = classify_alone(model, tokenizer, pair, room)
        labels.add(label)
        assert score == pytest.approx(SIGNS[label] * probability, abs=1e-5)
    # The example has all labels, and the order of a pair matters.
    assert len(labels) == 3
    table = scores.view(6, 6)
    assert not torch.equal(table, table.T)


def test_the_places_of_the_labels_are_read_from_their_names(encoder_folders):
    # contradiction, neutral, entailment
    assert check_nli(encoder_folders["roberta"]) == [1, 2, 0]
    assert check_nli(encoder_folders["bert-nli"]) == [1, 2, 0]


def test_models_that_are_no_nli_models(encoder_folders, tmp_path):
    no_names = "must name the labels contradiction, neutral, entailment, not label_0, label_1"
    with pytest.raises(InputError, match=no_names):
        nli_scorer(encoder_folders["bert"])

    two_labels = label_settings({0: "entailment", 1: "not_entailment"})
    model = RobertaForSequenceClassification(RobertaConfig(**ENCODER_CONFIG, **two_labels))
    folder = save_encoder(model, tmp_path / "two", encoder_tokenizer())
    with pytest.raises(InputError, match="not entailment, not_entailment"):
        check_nli(folder)

    # Names for three labels, and weights for two.
    config_path = tmp_path / "two" / "config.json"
    config = json.loads(config_path.read_text())
    config |= label_settings(NLI_LABELS)
    config_path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"two: classifier.* has the shape \[2\], .* \[3\]"):
        nli_scorer(folder)


def test_a_tokenizer_without_a_padding_token(encoder_folders, tmp_path):
    """Nothing is looked at where the mask is 0; an empty text is a text of token 0."""
    tokenizer = encoder_tokenizer(special=False, pad_token=None)
    folder = save_encoder(BertModel(BertConfig(**ENCODER_CONFIG)), tmp_path, tokenizer)
    x = sentence_encoder(folder)(["a b c", "", "d"])
    close(x[0], encode_alone(folder, "a b c", 20))
    close(x[1], encode_alone(folder, "<s>", 20))


def test_a_folder_that_is_not_there():
    with pytest.raises(InputError, match="no such model folder"):
        sentence_encoder("./lost")
