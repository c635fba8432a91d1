"""speed.py: which seconds and tokens count, and that DeepSpeed's collectives are timed, waited for or not."""

from types import SimpleNamespace

import pytest

from training.speed import Speed, _TimedBackend, peak_memory_bytes


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def step(speed, clock, tokens, seconds, apart=0.0):
    with speed.step(tokens):
        clock.now += seconds
        with speed.communication():
            clock.now += apart


def test_the_first_step_counts_only_while_it_is_the_only_one():
    clock = Clock()
    speed = Speed(2, blocks=True, clock=clock)
    assert speed.read() == {}
    step(speed, clock, 100, 9.0, apart=1.0)
    assert speed.read() == {"tokens_per_s": 10.0, "communication_share": 0.1}
    clock.now += 50  # grading and checkpoints
    for tokens in (300, 500):
        step(speed, clock, tokens, 1.5, apart=0.5)
    assert speed.read() == {"tokens_per_s": 200.0, "communication_share": 0.25}


@pytest.mark.parametrize(("world_size", "blocks"), [(1, True), (2, False)])
def test_no_share_is_told_where_nobody_is_waited_for_or_it_cannot_be_seen(world_size, blocks):
    clock = Clock()
    speed = Speed(world_size, blocks, clock)
    step(speed, clock, 100, 1.0, apart=1.0)
    assert speed.read() == {"tokens_per_s": 50.0}


def test_waiting_outside_of_steps_is_not_counted():
    clock = Clock()
    speed = Speed(2, blocks=True, clock=clock)
    step(speed, clock, 1, 1.0)
    with speed.communication():
        clock.now += 100
    step(speed, clock, 1, 1.0)
    assert speed.read() == {"tokens_per_s": 1.0, "communication_share": 0.0}


def test_collectives_of_the_backend_are_timed_and_all_else_is_left_as_it_is():
    clock = Clock()

    class Handle:
        done = False

        def wait(self):
            clock.now += 3.0
            self.done = True

        def is_completed(self):
            return self.done

    def all_reduce(tensor, async_op=False):
        clock.now += 1.0
        return Handle() if async_op else None

    backend = SimpleNamespace(all_reduce=all_reduce, get_world_size=lambda group=None: 2, name="torch")
    speed = Speed(2, blocks=True, clock=clock)
    timed = _TimedBackend(backend, speed)
    assert timed.name == "torch" and timed.get_world_size() == 2
    with speed.step(10):
        assert timed.all_reduce(None) is None
        handle = timed.all_reduce(None, async_op=True)
        clock.now += 5.0  # computing meanwhile
        handle.wait()
        assert handle.is_completed()
    assert speed.read() == {"tokens_per_s": 1.0, "communication_share": 0.5}


def test_the_peak_keeps_what_was_held_once():
    before = peak_memory_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert peak_memory_bytes() >= before and peak_memory_bytes() > 32 << 20
