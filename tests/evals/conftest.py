"""Tiny text encoders and NLI models, for test_encoders.py and test_diversity_report.py."""

import pytest
from tiny_models import (
    ENCODER_CONFIG,
    ENCODER_SIZE,
    NLI_LABELS,
    encoder_tokenizer,
    label_settings,
    save_encoder,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory):
    """{name: folder} of two sentence encoders, bert and neox, and two NLI models."""
    root = tmp_path_factory.mktemp("encoders")
    # BERT tells the two sentences of a pair apart by token types; RoBERTa has none.
    of_bert = encoder_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    of_roberta = encoder_tokenizer(model_input_names=["input_ids", "attention_mask"])
    of_neox = encoder_tokenizer(special=False)

    bert = BertModel(BertConfig(**ENCODER_CONFIG))
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**ENCODER_SIZE))
    labels = label_settings(NLI_LABELS)
    roberta_config = RobertaConfig(**ENCODER_CONFIG, type_vocab_size=1, **labels)
    roberta = RobertaForSequenceClassification(roberta_config)
    bert_config = BertConfig(**ENCODER_CONFIG, **labels)
    bert_nli = BertForSequenceClassification(bert_config)
    return {
        "bert": save_encoder(bert, root / "bert", of_bert),
        "neox": save_encoder(neox, root / "neox", of_neox),
        "roberta": save_encoder(roberta, root / "roberta", of_roberta),
        "bert-nli": save_encoder(bert_nli, root / "bert-nli", of_bert),
    }
