"""Tokenizers with chat templates of the kinds that models have, for tests of chats."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The kind of Llama 3: BOS, trimmed contents, two newlines behind a header.
LLAMA = (
    "<bos>{% for m in messages %}<header>{{ m['role'] }}</header>\n\n{{ m['content'] | trim }}<eot>"
    "{% endfor %}{% if add_generation_prompt %}<header>assistant</header>\n\n{% endif %}"
)
# The kind of Gemma: no system prompts, another name for the assistant.
GEMMA = (
    "<bos>{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<eot>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# The kind of Mistral: nothing marks where an answer is to begin but the end of the question.
MISTRAL = (
    "<bos>{% for m in messages %}"
    "{% if m['role'] == 'assistant' %} {{ m['content'] }}<eot>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
# BOS, and a system prompt where the chat has none.
DEFAULT_SYSTEM = (
    "<bos>{% if messages[0]['role'] != 'system' %}system: Be kind.\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eot>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama": (LLAMA, "<eot>"),
    "gemma": (GEMMA, "<eot>"),
    "mistral": (MISTRAL, "<eot>"),
    "default_system": (DEFAULT_SYSTEM, "<eot>"),
}
CONTROL = [
    "<pad>",
    "<bos>",
    "<eot>",
    "<|im_start|>",
    "<|im_end|>",
    "<header>",
    "</header>",
    "<turn>",
]
CORPUS = ["a story of a cat and a dog\n\n", "user: tell me\nassistant: of the cat\n\n"] * 4

CHAT = [
    {"role": "user", "content": "Tell me a story"},
    {"role": "assistant", "content": "Of a cat?"},
    {"role": "user", "content": "Of a dog"},
]


def byte_tokenizer(eos="<eot>", template="", adds=()):
    """A byte-level BPE with merges. adds: what it puts in front of a text and behind it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if adds:
        front, behind = adds
        used = [(token, backend.token_to_id(token)) for token in set(adds) if token]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{front} $A {behind}".strip(), special_tokens=used
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token="<bos>", pad_token="<pad>"
    )
    if template:
        tokenizer.chat_template = template
    return tokenizer
