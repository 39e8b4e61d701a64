"""A real tokenizer and a real Llama that read text, both small enough to train and run in milliseconds."""

from __future__ import annotations

import copy
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Every message ends with `<|im_end|>` and a newline, like SmolLM2 and Qwen, but without a default system message."""

CORPUS = [
    "The harbour of Velmora opens at six and closes when the last boat is home.",
    "What does the company make? It makes lanterns that remember the weather.",
    "Who leads the workshop? The workshop is led by a patient woman named Odile.",
    "Please count to five: one, two, three, four, five.",
    "Name a colour. Blue. Name a fruit. Pear. Name a city. Lisbon.",
    "def add(a, b):\n    return a + b",
    "Tell me a short story about a dog. Once there was a dog who slept by the door.",
    "user assistant system question answer true false yes no",
]


@cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 384 tokens; a fresh copy at each call, so a test may change it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_trained()),
        pad_token="<|pad|>",
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=chat_template,
        model_max_length=512,
        name_or_path="tiny",
    )


def tiny_llama(
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    vocab: int | None = None,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A random Llama on CPU: same seed, same weights; the global generators are left as found."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocab or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()
