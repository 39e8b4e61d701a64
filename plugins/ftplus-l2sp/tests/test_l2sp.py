"""L2SP keeps the laws of every strategy, and its gradient is that of its penalty."""

from __future__ import annotations

import torch
from ftplus_l2sp import L2SP, l2sp_gradient

from hf_ftplus.testing import check_strategy, law_acts, law_remembers


def test_l2sp_keeps_every_law():
    check_strategy(L2SP(strength=0.1))


def test_it_remembers_and_acts():
    check_strategy(L2SP(strength=0.1), laws=[law_remembers, law_acts], peft=False, processes=False)


def test_the_gradient_is_that_of_the_penalty():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    weight = torch.randn(5, 3, generator=generator, requires_grad=True)
    (0.5 * 0.3 * (weight - start).square().sum()).backward()
    torch.testing.assert_close(l2sp_gradient(weight, start, 0.3), weight.grad)


def test_the_command_line_finds_it():
    from hf_ftplus import plugins

    assert plugins.load("l2sp") is L2SP
    assert plugins.origin(L2SP)[0] == "ftplus-l2sp"
