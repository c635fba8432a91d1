"""What a worker of a fine-tune does with its time and memory: tokens a second, the share spent on the other workers, the peak.

Tokens are those of examples, not of padding. A step's time holds the making of its batch, forward and backward passes,
the exchange with other workers and the optimiser; grading and checkpoints lie outside. The first step of a process is
left out where others follow, because it loads what the later ones have. A collective's time includes waiting for the
slowest worker; it is measured where collectives block the caller, as gloo's do, and not on GPUs, where they run beside
the computing.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

SPEED_FACTS = ("tokens_per_s", "communication_share", "peak_memory_bytes", "predicted_memory_bytes")
"""Among a run's last metrics: what it cost and not what it learned, so that it differs between equal runs."""
_COLLECTIVES = frozenset(
    {
        "all_gather",
        "all_gather_base",
        "all_gather_coalesced",
        "all_gather_into_tensor",
        "all_reduce",
        "all_reduce_coalesced",
        "broadcast",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
    }
)
"""Methods of deepspeed.comm's backend that move tensors between workers."""


class Speed:
    """One worker's stopwatch. Used by one thread; autograd's own calls it while that one waits for them."""

    def __init__(self, world_size: int, blocks: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin to count.

        Args:
            blocks: whether a collective returns once it is done, so that its time can be taken here.
            clock: seconds.
        """
        self._is_shared, self._clock = world_size > 1 and blocks, clock
        self._num_steps = self._num_tokens = 0
        self._seconds = self._apart_s = self._apart_in_step_s = 0.0

    @contextlib.contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Time an optimiser step.

        Args:
            num_tokens: that all workers together learn from in it.
        """
        self._apart_in_step_s = 0.0
        begin = self._clock()
        yield
        seconds = self._clock() - begin
        if self._num_steps == 1:
            self._num_tokens, self._seconds, self._apart_s = 0, 0.0, 0.0
        self._num_steps += 1
        self._num_tokens += num_tokens
        self._seconds += seconds
        self._apart_s += self._apart_in_step_s

    @contextlib.contextmanager
    def communication(self) -> Iterator[None]:
        """Time what a step waits for other workers."""
        begin = self._clock()
        try:
            yield
        finally:
            self._apart_in_step_s += self._clock() - begin

    def read(self) -> dict[str, float]:
        """{tokens_per_s} of all workers together, with several also {communication_share} from 0 to 1; {} before a step."""
        if not self._seconds:
            return {}
        found = {"tokens_per_s": self._num_tokens / self._seconds}
        return found | ({"communication_share": self._apart_s / self._seconds} if self._is_shared else {})


def time_collectives(speed: Speed) -> None:
    """Have DeepSpeed's collectives of this process, blocking ones and the waits for the others, count as communication."""
    import deepspeed.comm.comm as comm

    comm.cdb = _TimedBackend(comm.cdb, speed)


def peak_memory_bytes() -> int:
    """The most that this process held: of a GPU what torch allocated there, else resident memory as the kernel saw it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    # Not getrusage: its maximum outlives exec, so that a worker would begin with its parent's.
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class _TimedBackend:
    """deepspeed.comm's backend, its collectives timed."""

    def __init__(self, backend: Any, speed: Speed) -> None:
        self._backend, self._speed = backend, speed

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return self._timed(found) if name in _COLLECTIVES else found

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with self._speed.communication():
                handle = collective(*args, **options)
            return handle if handle is None else _TimedHandle(handle, self._speed)

        return run


class _TimedHandle:
    """A collective under way."""

    def __init__(self, handle: Any, speed: Speed) -> None:
        self._handle, self._speed = handle, speed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def wait(self, *args: Any, **options: Any) -> Any:
        with self._speed.communication():
            return self._handle.wait(*args, **options)
