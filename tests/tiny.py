"""What tests have beside the tiny model of `hf_ftplus.testing.tiny`."""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_ftplus.testing.tiny import CHATML, tiny_llama, tiny_tokenizer

__all__ = ["CHATML", "MARKED", "tiny_llama", "tiny_mixtral", "tiny_tokenizer"]

MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
"""CHATML's text, with the turns of the assistant marked."""


def tiny_mixtral(intermediate: int = 64) -> MixtralForCausalLM:
    """A random mixture of four experts, of which each token sees two."""
    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(config).eval()
