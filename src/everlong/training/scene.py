"""What surrounds a segment and must be there again in its replay: random numbers, autocast."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Generator, Tensor


def generators() -> list[Generator]:
    """torch's default generators in use: the CPU's, and every started accelerator's."""
    found = [torch.default_generator, *torch.cuda.default_generators, *torch.xpu.default_generators]
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


def read_generators() -> list[Tensor]:
    return [generator.get_state() for generator in generators()]


def write_generators(states: list[Tensor]) -> None:
    # An accelerator first used after `states` was read has no entry: it keeps its place.
    for generator, state in zip(generators(), states, strict=False):
        generator.set_state(state)


def draw_seeds(count: int) -> list[int]:
    """One seed a segment, from the CPU's default generator."""
    return torch.randint(2**62, (count,)).tolist()


def _autocast_now() -> list[dict]:
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [
        {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in kinds
        if torch.is_autocast_enabled(kind)
    ]


@contextmanager
def no_autocast() -> Iterator[None]:
    """Backward passes run outside autocast, wherever the caller stands."""
    with ExitStack() as stack:
        for setting in _autocast_now():
            stack.enter_context(torch.autocast(setting["device_type"], enabled=False))
        yield


class Scene:
    """The random numbers and the autocast settings under which each segment runs, every time.

    Without `seeds` the first run of a segment draws from the generators as they stand, and later
    runs start where the first did. With `seeds` each segment starts from its own seed. `leave`
    puts the generators where one run over the segments leaves them.
    """

    def __init__(self, seeds: Sequence[int] | None = None) -> None:
        self.casts = _autocast_now()
        self.seeds = seeds
        self.starts: dict[int, list[Tensor]] = {}
        self.end = read_generators()

    @contextmanager
    def segment(self, t: int) -> Iterator[None]:
        first = self._start(t)
        with ExitStack() as stack:
            for setting in self.casts:
                stack.enter_context(torch.autocast(**setting))
            if self.casts:  # a cast made earlier may be of other weights, or of another graph
                torch.clear_autocast_cache()
            yield
        if first:
            self.end = read_generators()

    def _start(self, t: int) -> bool:
        if self.seeds is not None:
            for generator in generators():
                generator.manual_seed(self.seeds[t])
            return False
        if t in self.starts:
            write_generators(self.starts[t])
            return False
        self.starts[t] = read_generators()
        return True

    def leave(self) -> None:
        write_generators(self.end)
