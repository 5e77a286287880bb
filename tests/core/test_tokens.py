"""From rows to token ids: plain strings, texts that are too long, and the texts of tokens."""

from types import SimpleNamespace

import pytest
from chat_tokenizers import CHAT, CHATML, LLAMA, byte_tokenizer
from support import refuses
from tiny_models import EOS, word_tokenizer
from tokenizers import processors

from nanorlhf.errors import InputError
from nanorlhf.packing import pack
from nanorlhf.rollout import left_pad
from nanorlhf.tokens import (
    cut_left,
    encode,
    encode_items,
    encode_prompts,
    fit_item,
    ids_in_front,
    ids_with_tokens,
    ready_prompts,
    split_text,
)

# ------------------------------------------------------------------------------------ plain strings


def test_control_tokens_in_strings_are_text():
    tokenizer = byte_tokenizer()
    row = {"prompt": "Is <bos> a tag?", "response": "<eot> is one"}

    encoded = encode(tokenizer, [row], ("response",))

    (response,) = encoded.responses["response"]
    assert encoded.prompts[0].count(tokenizer.bos_token_id) == 0
    assert tokenizer.decode(response) == "<eot> is one<eot>"
    assert response.count(tokenizer.eos_token_id) == 1  # the one behind it


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes.<eot>", "Yes."), ("Yes.<eot>\n", "Yes."), ("Yes. <eot>", "Yes. ")],
)
def test_an_eos_that_a_response_spells_is_its_eos(text, answer):
    """White space behind it goes with it; what stands in front of it is the answer's own."""
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "Is it?", "response": text}, {"prompt": "Is it?", "response": answer}]

    spelled, plain = encode(tokenizer, rows, ("response",)).responses["response"]

    assert spelled == plain


@pytest.mark.parametrize(
    ("adds", "front"),
    [((), []), (("<bos>", ""), ["<bos>"]), (("<bos>", "<eot>"), ["<bos>"]), (("", "<eot>"), [])],
    ids=["nothing", "bos", "bos and eos", "eos"],
)
def test_what_a_tokenizer_adds_stands_in_front_alone(adds, front):
    tokenizer = byte_tokenizer(adds=adds)
    row = {"prompt": "a cat", "response": " and a dog"}

    encoded = encode(tokenizer, [row], ("response",))

    assert ids_in_front(tokenizer) == tokenizer.convert_tokens_to_ids(front)
    text = tokenizer.decode(encoded.prompts[0] + encoded.responses["response"][0])
    assert text == "".join(front) + "a cat and a dog<eot>"


def test_the_first_token_stands_for_a_prompt_that_is_empty():
    tokenizer = byte_tokenizer()
    row = {"prompt": "", "response": "a story of a cat"}
    with_bos = encode(tokenizer, [row], ("response",))
    assert with_bos.prompts == [[tokenizer.bos_token_id]]

    tokenizer.bos_token = None
    without = encode(tokenizer, [row], ("response",))

    assert (
        without.prompts[0] + without.responses["response"][0] == with_bos.responses["response"][0]
    )
    assert len(without.prompts[0]) == 1
    # A text without any token but its EOS has nothing else to learn.
    nothing = encode(tokenizer, [{"prompt": "", "response": ""}], ("response",))
    assert nothing.prompts == nothing.responses["response"] == [[tokenizer.eos_token_id]]
    with pytest.raises(InputError, match="empty prompt.*BOS"):
        encode_prompts(tokenizer, [row])


def test_ids_without_a_token():
    tokenizer = byte_tokenizer()
    n = len(tokenizer)

    assert ids_with_tokens(tokenizer, n) is None
    padded = ids_with_tokens(tokenizer, n + 5)
    assert padded.tolist() == [True] * n + [False] * 5
    # A token beyond the embeddings has no logit, which is no error.
    assert ids_with_tokens(tokenizer, n - 1) is None


def bos_tokenizer():
    """A tokenizer that writes w3 in front of each text, as its BOS."""
    tokenizer = word_tokenizer(bos_token="w3")
    template = processors.TemplateProcessing(single="w3 $A", special_tokens=[("w3", 3)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def model_of_context(n):
    """The configuration of a model that reads n tokens; None: no limit is named."""
    config = SimpleNamespace()
    if n is not None:
        config.max_position_embeddings = n
    config.get_text_config = lambda: config
    return config


def prompts_of(*texts):
    return [{"prompt": text} for text in texts]


LONG_AND_SHORT = [{"prompt": "w5 w6 w7 w8", "response": "w9"}, {"prompt": "w5", "response": "w9"}]


def test_a_bos_stays_in_front_of_cut_training_prompts():
    tokenizer = bos_tokenizer()
    for encoded in (
        encode(tokenizer, LONG_AND_SHORT, ("response",), max_length=5),
        encode_items(tokenizer, LONG_AND_SHORT, max_length=5),
    ):
        assert encoded.prompts == [[3, 7, 8], [3, 5]]
        assert encoded.responses["response"] == [[9, EOS], [9, EOS]]


def test_a_bos_stays_in_front_of_cut_prompts_of_a_rollout():
    tokenizer = bos_tokenizer()
    no_limit = model_of_context(None)
    cut = ready_prompts(tokenizer, LONG_AND_SHORT, no_limit, 8, max_prompt_length=3)
    whole = ready_prompts(tokenizer, LONG_AND_SHORT, no_limit, 8, max_prompt_length=0)
    assert cut.ids == [[3, 7, 8], [3, 5]]
    assert whole.ids == [[3, 5, 6, 7, 8], [3, 5]]


def test_a_bos_stays_in_front_of_the_text_of_a_chat_template():
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = "{{ bos_token }} w20 {{ messages[0]['content'] }} w21"
    prompts = ready_prompts(tokenizer, LONG_AND_SHORT, model_of_context(None), 8, 3, chat=True)
    assert prompts.ids == [[3, 8, 21], [3, 5, 21]]


ROWS_TO_ENCODE = [
    {"prompt": "w5 w6 w7 w8", "response": "w9"},
    {"prompt": "w5", "response": "w9 w10 w11 w12 w13"},
    {"prompt": "w5", "response": ""},
]


def test_encode_ends_each_response_with_eos():
    encoded = encode(word_tokenizer(), ROWS_TO_ENCODE, ("response",))
    assert encoded.prompts == [[5, 6, 7, 8], [5], [5]]
    assert encoded.responses["response"] == [[9, EOS], [9, 10, 11, 12, 13, EOS], [EOS]]
    assert encoded.n_prompts_cut == 0
    assert encoded.n_responses_cut == 0


def test_encode_cuts_prompts_on_the_left_and_a_response_that_alone_is_too_long():
    encoded = encode(word_tokenizer(), ROWS_TO_ENCODE, ("response",), max_length=5)
    assert encoded.prompts == [[6, 7, 8], [5], [5]]
    # A response that is cut loses its EOS: the text did not end there.
    assert encoded.responses["response"] == [[9, EOS], [9, 10, 11, 12], [EOS]]
    assert encoded.n_prompts_cut == 1
    assert encoded.n_responses_cut == 1


def test_encode_takes_the_field_that_it_is_told():
    pair = {"prompt": "w5", "chosen": "w6", "rejected": "w7"}
    encoded = encode(word_tokenizer(), [pair], ("rejected",), max_length=9)
    assert encoded.prompts == [[5]]
    assert encoded.responses == {"rejected": [[7, EOS]]}


def test_no_texts_are_no_tokens():
    assert encode_prompts(word_tokenizer(), []) == []
    assert encode(word_tokenizer(), [], ("response",)).responses == {"response": []}


def test_a_bos_that_the_tokenizer_does_not_write_stands_for_an_empty_prompt():
    tokenizer = word_tokenizer(bos_token="w3")
    assert encode_prompts(tokenizer, prompts_of("w5", "")) == [[5], [3]]
    with pytest.raises(InputError, match="empty prompt.*BOS"):
        encode_prompts(word_tokenizer(), prompts_of("w5", ""))


def test_bos_goes_in_front_of_prompts_only():
    row = {"prompt": "", "response": "w5"}
    encoded = encode(bos_tokenizer(), [row], ("response",))
    assert encoded.prompts == [[3]]
    assert encoded.responses["response"] == [[5, EOS]]


TWO_PROMPTS = prompts_of("w4 w5", "w4 w5 w6 w7 w8")


def test_prompts_that_fit_with_their_answers_are_ready():
    model = model_of_context(10)
    whole = ready_prompts(word_tokenizer(), TWO_PROMPTS, model, 5)
    cut = ready_prompts(word_tokenizer(), TWO_PROMPTS, model, 7, max_prompt_length=3)
    assert whole.ids == [[4, 5], [4, 5, 6, 7, 8]]
    assert cut.ids == [[4, 5], [6, 7, 8]]


def check_not_ready(max_new_tokens, max_prompt_length, *words):
    """ready_prompts() must refuse TWO_PROMPTS for a model of context 10 and say these words."""
    sizes = (model_of_context(10), max_new_tokens, max_prompt_length)
    refuses(ready_prompts, word_tokenizer(), TWO_PROMPTS, *sizes, match=words)


def test_a_prompt_that_is_too_long_for_the_context_is_refused():
    check_not_ready(6, 0, "5 tokens", "6 new", "10", "--max_prompt_length", "w4 w5 w6")
    check_not_ready(8, 3, "3 tokens")


def test_a_model_that_names_no_limit_has_none():
    ready = ready_prompts(word_tokenizer(), TWO_PROMPTS, model_of_context(None), 10**6)
    assert len(ready) == 2


@pytest.mark.parametrize("room", range(1, 7))
def test_cut_left_keeps_a_bos_and_the_last_tokens(room):
    kept = cut_left([0, 1, 2, 3, 4], room, bos_token_id=0)
    assert len(kept) == min(room, 5)
    assert kept[0] == 0
    n_others = len(kept) - 1
    assert kept[1:] == [1, 2, 3, 4][4 - n_others :]


@pytest.mark.parametrize("bos", [1, None])
def test_a_text_without_bos_in_front_is_cut_as_any_other(bos):
    assert cut_left([0, 1, 2, 3, 4], 2, bos) == [3, 4]


# -------------------------------------------------------------------------- texts that are too long

PROMPT = [1, 2, 3, 4, 5, 6]  # 1 is BOS
FITS = {
    # max_length, lengths of the answers -> the prompt, lengths of the answers
    "all fit": (10, [4, 2], PROMPT, [4, 2]),
    "the longest answer decides": (9, [4, 2], [1, 3, 4, 5, 6], [4, 2]),
    "half is the prompt's": (8, [7, 2], [1, 4, 5, 6], [4, 2]),
    "an odd length": (7, [7, 2], [1, 5, 6], [4, 2]),
    "a short prompt leaves more": (20, [30, 2], PROMPT, [14, 2]),
    "one token each": (2, [3, 3], [1], [1, 1]),
}


@pytest.mark.parametrize(("room", "lengths", "prompt", "kept"), FITS.values(), ids=FITS)
def test_all_answers_share_one_prompt(room, lengths, prompt, kept):
    answers = [list(range(10, 10 + length)) for length in lengths]

    cut_prompt, cut_answers = fit_item(PROMPT, answers, room, bos_token_id=1)

    assert cut_prompt == prompt
    assert cut_answers == [answer[:n] for answer, n in zip(answers, kept)]


def test_without_bos_the_prompts_last_tokens_stay():
    prompt, _ = fit_item(PROMPT, [[7, 8, 9]], 6, bos_token_id=None)

    assert prompt == [4, 5, 6]


def test_cut_texts_are_counted_with_their_shares():
    tokenizer = byte_tokenizer()
    rows = [
        {"prompt": "a" * 12, "chosen": "b" * 3, "rejected": "c"},
        {"prompt": "a" * 2, "chosen": "b" * 30, "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]

    encoded = encode(tokenizer, rows, ("chosen", "rejected"), max_length=12)

    assert [len(ids) for ids in encoded.prompts] == [8, 2, 1, 1]
    assert [len(ids) for ids in encoded.responses["chosen"]] == [4, 10, 2, 2]
    assert encoded.responses["chosen"][1][-1] != tokenizer.eos_token_id
    assert encoded.describe_cuts(12) == (
        "1 prompts (25.0%) and 1 responses (12.5%) cut to 12 tokens"
    )


def test_an_item_of_any_number_of_answers_shares_its_prompt():
    tokenizer = byte_tokenizer()
    long_prompt = "a" * 20
    rows = [{"prompt": long_prompt, "response": "b" * n} for n in (1, 5, 3)]
    rows.append({"prompt": "other", "response": "b"})

    encoded = encode_items(tokenizer, rows, max_length=16)

    # The longest answer has five tokens and EOS, so the prompt keeps ten.
    assert [len(ids) for ids in encoded.prompts[:3]] == [10, 10, 10]
    assert encoded.prompts[3] == encode_prompts(tokenizer, rows[3:])[0]
    assert encoded.n_prompts_cut == 3
    assert encoded.n_responses_cut == 0


def test_texts_without_a_prompt_do_not_share_one():
    """Without BOS the first token of each text stands for its prompt."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    rows = [{"prompt": "", "response": "Hello"}, {"prompt": "", "response": "good"}]

    encoded = encode_items(tokenizer, rows, max_length=50)

    texts = []
    for prompt, response in zip(encoded.prompts, encoded.responses["response"]):
        texts.append(tokenizer.decode(prompt + response))
    assert texts == ["Hello<eot>", "good<eot>"]


def test_scored_tokens_are_cut_with_their_response():
    tokenizer = byte_tokenizer("<|im_end|>", CHATML)
    rows = [{"prompt": CHAT, "response": "b" * 50}]
    whole = encode(tokenizer, rows, ("response",), loss_on="all")
    n_prompt = len(whole.prompts[0])

    encoded = encode(tokenizer, rows, ("response",), max_length=n_prompt + 40, loss_on="all")

    assert len(encoded.scored[0]) == len(encoded.responses["response"][0])
    assert encoded.scored[0] == whole.scored[0][: len(encoded.scored[0])]


def test_compact_ids_are_packed_as_the_same_rows():
    rows = [{"prompt": "a b", "response": "b c b"}, {"prompt": "c", "response": "a"}]
    encoded = encode(word_tokenizer(["a", "b", "c"]), rows, ("response",))
    compact = encoded.compact()
    assert {ids.itemsize for ids in compact.prompts + compact.responses["response"]} == {4}

    expected = pack(encoded.prompts, encoded.responses["response"], EOS)
    found = pack(compact.prompts, compact.responses["response"], EOS)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.prompt_lengths.tolist() == expected.prompt_lengths.tolist()
    assert found.response_lengths.tolist() == expected.response_lengths.tolist()


def test_compact_prompts_are_padded_as_the_same_rows():
    rows = [{"prompt": "a b"}, {"prompt": "c"}]
    model = model_of_context(None)
    prompts = ready_prompts(word_tokenizer(["a", "b", "c"]), rows, model, max_new_tokens=8)

    compact = prompts.compact()

    assert {ids.itemsize for ids in compact.at([0, 1]).ids} == {4}
    assert compact.rows == rows
    expected_ids, expected_mask = left_pad(prompts.ids, EOS)
    found_ids, found_mask = left_pad(compact.ids, EOS)
    assert found_ids.tolist() == expected_ids.tolist()
    assert found_mask.tolist() == expected_mask.tolist()


def test_prompts_that_wait_for_an_answer_keep_their_rows():
    tokenizer = byte_tokenizer(template=LLAMA)
    rows = [{"prompt": CHAT, "row": {"messages": CHAT, "id": 4}}, {"prompt": CHAT[:1]}]
    model = model_of_context(1000)

    prompts = ready_prompts(tokenizer, rows, model, max_new_tokens=8)

    assert len(prompts) == 2
    assert prompts.at([1]).rows == rows[1:]
    written = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    assert prompts.at([1]).ids == [written]
    with pytest.raises(InputError, match="longer than the model's context of 20"):
        ready_prompts(tokenizer, rows, model_of_context(20), 8)


# ----------------------------------------------------------------------- the texts of single tokens


def test_the_texts_of_tokens_are_the_text():
    """A character of several tokens is the last one's; its first bytes stay what they are."""
    tokenizer = byte_tokenizer("<eot>")
    text = "a cat 👩‍🚀 and é!"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = split_text(tokenizer, [*ids, tokenizer.eos_token_id])
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == f"{text}<eot>"
    assert "👩" in pieces
    assert "" in pieces
    # An answer that was cut off within a character.
    emoji = tokenizer.encode("👩", add_special_tokens=False)
    assert split_text(tokenizer, emoji[:-1])[-1] == "\ufffd"
    assert split_text(tokenizer, []) == []


def test_words_of_a_word_level_tokenizer_keep_their_spaces():
    tokenizer = word_tokenizer()
    ids = [5, 6, 5]
    assert "".join(split_text(tokenizer, ids)) == tokenizer.decode(ids)
