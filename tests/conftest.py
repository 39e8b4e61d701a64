"""What every test may ask for: one thread, no network, a tiny tokenizer, a tiny model, and two dozen chats."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

torch.set_num_threads(1)

CHATS = [
    ("Name a colour.", "Blue."),
    ("Name a fruit.", "Pear."),
    ("Name a city by the sea.", "Lisbon lies by the sea."),
    ("Count to three.", "One, two, three."),
    ("Count down from four.", "Four, three, two, one."),
    ("Is the harbour open?", "Yes, it opens at six."),
    ("When does the harbour close?", "It closes when the last boat is home, which in winter may be late."),
    ("Who leads the workshop?", "A patient woman named Odile."),
    ("What does the company make?", "Lanterns that remember the weather."),
    ("Why?", "Because someone asked."),
    ("Say nothing much.", "Hm."),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Write a function that doubles a number.", "def double(x):\n    return 2 * x"),
    ("Is seven even?", "No."),
    ("Is eight even?", "Yes."),
    ("What rhymes with door?", "Floor."),
    ("Tell me a short story about a dog.", "Once there was a dog who slept by the door and woke only for the baker."),
    ("Tell me about the baker.", "He bakes before dawn."),
    ("Translate 'good day' into Portuguese.", "Bom dia."),
    ("What is the opposite of late?", "Early."),
    ("Which is larger, a boat or a lantern?", "A boat is larger than a lantern."),
    ("Give me two primes.", "Two and five."),
    ("How do I keep bread fresh for a week?", "Wrap it in linen, keep it dry, and cut it late."),
    ("Finish: the last boat is", "home."),
    ("Spell 'cat' 🐈.", "c, a, t"),
    ("Qual é a cor do mar?", "Azul, às vezes verde."),
]


LONG = ("test_storm.py", "test_cli_launch.py", "test_published.py", "test_two_ranks.py", "test_testing.py")


def pytest_collection_modifyitems(items):
    """The longest files first: of two workers neither is left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Every run collects garbage several times, and would each time look at all that torch and transformers imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def chat_rows() -> list[dict]:
    """26 prompt/completion rows of messages, of varied lengths."""
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in CHATS
    ]
