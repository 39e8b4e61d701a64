"""What trains under DeepSpeed on two processes of CPUs is what DDP trains; what does not is refused (test_cli_launch.py).

Needs `pip install deepspeed`, which CI does not have: `DS_ACCELERATOR=cpu pytest tests/distributed/test_deepspeed.py`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import two

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed"),
]
SCRIPT = Path(__file__).with_name("zero.py")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    return two.launch(SCRIPT, "0", tmp_path_factory.mktemp("ddp"))[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_replay_and_distill_train_as_under_ddp(parallel, tmp_path, stage):
    first = two.launch(SCRIPT, str(stage), tmp_path)[0]
    assert {name.partition("/")[0] for name in first} == ({"replay"} if stage == 3 else {"replay", "distill"})
    for name, weight in first.items():
        assert (weight - parallel[name]).abs().max() < 1e-6, name
