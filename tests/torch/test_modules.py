"""What can be asked of any module."""

from contextlib import ExitStack

from torch import nn

from tokenexit_torch._modules import evaluating


def flags(module):
    return [part.training for part in module.modules()]


def test_contexts_that_overlap_as_those_of_threads_do_put_back_what_the_first_has_found():
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    module[1].eval()
    before = flags(module)
    first, second, third = (ExitStack() for _ in range(3))
    first.enter_context(evaluating(module))
    second.enter_context(evaluating(module[0]))
    third.enter_context(evaluating(module))
    for stack in (first, third, second):
        assert not any(flags(module[0]))
        stack.close()
    assert flags(module) == before


def test_a_context_inside_of_another_puts_back_what_it_has_found():
    module = nn.Linear(1, 1)
    with evaluating(module):
        module.train()
        with evaluating(module):
            assert not module.training
        assert module.training
    assert module.training
