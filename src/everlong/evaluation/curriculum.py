"""A task that grows while it is learnt."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

LEARNT, SOLVED = 0.9, 0.998  # a stage ends, the training ends
Batch = TypeVar("Batch")


def until_learnt(
    stages: Sequence[int],
    steps: int,
    watch_every: int,
    batch: Callable[[int, int], Batch],
    score: Callable[[int], float],
    hurry: bool = False,
) -> Iterator[Batch]:
    """`batch(stage, step)` for at most so many steps, the model being trained between two of them.

    Every `watch_every` steps `score(stage)` says how much the model knows: from 0.9 on the next
    stage begins, and from 0.998 on the last one ends. With `hurry` a stage also ends where half of
    the steps that were left at its start are spent.
    """
    current, since = 0, 0
    for step in range(steps):
        if step and step % watch_every == 0:
            found = score(stages[current])
            if current == len(stages) - 1:
                if found >= SOLVED:
                    return
            elif found >= LEARNT or (hurry and step - since >= (steps - since) // 2):
                current, since = current + 1, step
        yield batch(stages[current], step)
