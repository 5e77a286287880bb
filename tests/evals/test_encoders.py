"""nanorlhf.evals.encoders against Hugging Face's own forward of one text at a time, with tiny random models.

N texts or pairs, T tokens, D hidden
"""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    ENCODER_CONFIG,
    ENCODER_PAIRS,
    ENCODER_TEXTS,
    NLI_LABELS,
    encoder_tokenizer,
    save_encoder,
)
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,  # fmt: skip
)

from nanorlhf.errors import InputError
from nanorlhf.evals import encoders
from nanorlhf.evals.encoders import check_nli, nli_scorer, sentence_encoder


@torch.no_grad()
def alone(folder, text, longest):
    """One text through plain transformers, by its ids: [D]."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer(text, truncation=True, max_length=longest).input_ids or [1]
    return model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)


@pytest.mark.parametrize(
    "name, tokens", [("bert", 2**13), ("bert", 8), ("neox", 2**13), ("neox", 5), ("roberta", 16)]
)
def test_embeddings_are_those_of_each_text_alone(encoder_folders, name, tokens, monkeypatch):
    monkeypatch.setitem(encoders.TOKENS, "cpu", tokens)  # few: several batches
    x = sentence_encoder(encoder_folders[name])(ENCODER_TEXTS)
    assert x.shape == (7, 16) and x.dtype == torch.float32 and not x.requires_grad
    expected = torch.stack([alone(encoder_folders[name], text, 50) for text in ENCODER_TEXTS])
    assert (
        torch.allclose(x, expected, atol=1e-5)
        and torch.equal(x[0], x[2])
        and torch.equal(x[1], x[6])
    )
    assert torch.pdist(x[:-1][[0, 1, 3, 4, 5]]).min() > 0.1


def test_each_text_goes_through_the_model_once(encoder_folders, monkeypatch):
    seen, forward = [], BertModel.forward

    def counted(self, input_ids, **rest):
        seen.append(len(input_ids))
        return forward(self, input_ids=input_ids, **rest)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(BertModel, "forward", counted)
    encode = sentence_encoder(encoder_folders["bert"])
    seen.clear()  # loading tries the model once
    first = encode(ENCODER_TEXTS)
    assert sum(seen) == 5  # different ones
    again = encode(["a", *ENCODER_TEXTS[::-1]])
    assert sum(seen) == 6 and torch.equal(again[1:], first.flip(0))


@pytest.mark.parametrize(
    "name, room", [("bert", 20), ("roberta", 18)]
)  # RoBERTa's positions start behind its padding id
def test_long_texts_are_cut_to_the_context(encoder_folders, name, room):
    long = " ".join("abcdefgh"[i % 8] for i in range(100))
    assert torch.allclose(
        sentence_encoder(encoder_folders[name])([long])[0],
        alone(encoder_folders[name], long, room),
        atol=1e-5,
    )
    if name == "roberta":
        assert nli_scorer(encoder_folders[name])([(long, long), ("a", long)]).abs().max() <= 1


def test_an_encoder_without_its_pooler(encoder_folders, tmp_path):
    save_encoder(
        BertModel(BertConfig(**ENCODER_CONFIG), add_pooling_layer=False),
        tmp_path,
        encoder_tokenizer(),
    )
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("pooler" in name for name in weights)
    assert torch.allclose(
        sentence_encoder(str(tmp_path))(["a b"])[0], alone(str(tmp_path), "a b", 20), atol=1e-5
    )
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks the weights encoder.layer.1.output.dense.weight"):
        sentence_encoder(str(tmp_path))


@pytest.mark.parametrize("name, room", [("roberta", 18), ("bert-nli", 20)])
def test_nli_scores_by_the_names_of_the_labels(encoder_folders, name, room):
    scores = nli_scorer(encoder_folders[name])(ENCODER_PAIRS)
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folders[name]).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(encoder_folders[name]), set()
    for pair, score in zip(ENCODER_PAIRS, scores.tolist(), strict=True):
        with torch.no_grad():
            inputs = tokenizer(
                *([text] for text in pair), truncation=True, max_length=room, return_tensors="pt"
            )  # alone "" is no pair
            logits = model(**inputs).logits[0].double()
        confidence, label = logits.softmax(0).max(0)
        found.add(NLI_LABELS[label.item()])
        sign = {"ENTAILMENT": -1, "CONTRADICTION": 1, "NEUTRAL": 0}[NLI_LABELS[label.item()]]
        assert score == pytest.approx(sign * confidence.item(), abs=1e-5)
    assert len(found) == 3 and not torch.equal(
        scores.view(6, 6), scores.view(6, 6).T
    )  # ordered pairs
    assert check_nli(encoder_folders[name]) == [1, 2, 0]


def test_models_that_are_no_nli_models(encoder_folders, tmp_path):
    with pytest.raises(
        InputError,
        match="must name the labels contradiction, neutral, entailment, not label_0, label_1",
    ):
        nli_scorer(encoder_folders["bert"])
    labels = {0: "entailment", 1: "not_entailment"}
    config = RobertaConfig(
        **ENCODER_CONFIG, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    folder = save_encoder(
        RobertaForSequenceClassification(config), tmp_path / "two", encoder_tokenizer()
    )
    with pytest.raises(InputError, match="not entailment, not_entailment"):
        check_nli(folder)
    settings = json.loads((tmp_path / "two/config.json").read_text())
    (tmp_path / "two/config.json").write_text(
        json.dumps(
            settings | {"id2label": NLI_LABELS, "label2id": {v: k for k, v in NLI_LABELS.items()}}
        )
    )
    with pytest.raises(
        InputError, match="two: cannot be loaded"
    ):  # names for three, weights for two
        nli_scorer(folder)


def test_a_tokenizer_without_a_padding_token(encoder_folders, tmp_path):
    """Nothing is looked at where the mask is 0; an empty text is a text of token 0."""
    folder = save_encoder(
        BertModel(BertConfig(**ENCODER_CONFIG)),
        tmp_path,
        encoder_tokenizer(special=False, pad_token=None),
    )
    x = sentence_encoder(folder)(["a b c", "", "d"])
    assert torch.allclose(x[0], alone(folder, "a b c", 20), atol=1e-5) and torch.allclose(
        x[1], alone(folder, "<s>", 20), atol=1e-5
    )
    with pytest.raises(InputError, match="no such model folder"):
        sentence_encoder("./lost")
