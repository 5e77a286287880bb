"""Tiny text encoders and NLI models in folders: what test_encoders.py and test_diversity_report.py share."""

import pytest
from support import ENCODER_CONFIG, ENCODER_SIZE, NLI_LABELS, encoder_tokenizer, save_encoder
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
    root = tmp_path_factory.mktemp("encoders")
    types = ["input_ids", "token_type_ids", "attention_mask"]
    roberta = RobertaConfig(
        **ENCODER_CONFIG,
        type_vocab_size=1,
        id2label=NLI_LABELS,
        label2id={v: k for k, v in NLI_LABELS.items()},
    )
    bert = BertConfig(
        **ENCODER_CONFIG, id2label=NLI_LABELS, label2id={v: k for k, v in NLI_LABELS.items()}
    )
    return {
        "bert": save_encoder(
            BertModel(BertConfig(**ENCODER_CONFIG)),
            root / "bert",
            encoder_tokenizer(model_input_names=types),
        ),
        "neox": save_encoder(
            GPTNeoXForCausalLM(GPTNeoXConfig(**ENCODER_SIZE)),
            root / "neox",
            encoder_tokenizer(special=False),
        ),
        "roberta": save_encoder(
            RobertaForSequenceClassification(roberta),
            root / "roberta",
            encoder_tokenizer(model_input_names=types[::2]),
        ),
        "bert-nli": save_encoder(
            BertForSequenceClassification(bert),
            root / "bert-nli",
            encoder_tokenizer(model_input_names=types),
        ),
    }
