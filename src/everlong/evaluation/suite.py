"""Every task that a trained model can be asked, by name: accuracy at each length, bytes of state.

A row is one task at one length, or of that the questions of one group.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import NormalDist, fmean
from typing import Any

from everlong.errors import UserError
from everlong.evaluation.asking import Reply, ask
from everlong.evaluation.codec import Codec
from everlong.evaluation.token_tasks import TOKEN_TASKS, share_right
from everlong.registry import suggest
from everlong.tasks.questions import TooLong, list_tasks, text_task

Row = dict[str, Any]
_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Asked:
    """samples: items at each length, items 0, 1, ... of the stream `seed`."""

    lengths: tuple[int, ...] = (512, 2048)
    samples: int = 100
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths are {list(self.lengths)}: give lengths of 1 or more")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths are {list(self.lengths)}: give each of them once")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")


def task_names() -> list[str]:
    """All tasks of this module: of tokens, then of text."""
    return [*TOKEN_TASKS, *list_tasks()]


def choose(patterns: Sequence[str], known: Sequence[str], beside: Sequence[str] = ()) -> list[str]:
    """The known names that the patterns (shell wildcards) give, each once, in order.

    `UserError` for a pattern without one, which lists all names, those `beside` them first.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in known if fnmatchcase(name, pattern)]
        if not names:
            every = [*beside, *known]
            raise UserError(
                f"no task {pattern!r}{suggest(pattern, every)} (tasks: {', '.join(every)})"
            )
        found |= dict.fromkeys(names)
    return list(found)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson for a share of `count` independent items.

    Where an item gives a share itself it is too wide rather than too narrow: no variable from 0 to
    1 has a greater variance than one that is either.
    """
    spread = _Z95 * (share * (1 - share) / count + _Z95**2 / (4 * count**2)) ** 0.5
    middle, scale = share + _Z95**2 / (2 * count), 1 + _Z95**2 / count
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return min(share, max(0.0, low)), max(share, min(1.0, high))  # the share, despite rounding


def measure(
    model: Any, codec: Codec, task: str, asked: Asked, say: Callable[[str], None] = lambda _: None
) -> Iterator[Row]:
    """The rows of one task, length by length; `say` is told of each length that is begun.

    Of a text task: task, length, group (None: all), samples, `exact` (said in greedy generation)
    and `ranked` (the answers are the likeliest candidates) with their intervals, `chance` of the
    latter, `constant` (what the most frequent answer gets at the other items),
    `found` (mean share of the answers that are said), `first_by_role` (shares of the candidates
    ranked first), `trace_by_role` (nats above what the text does not hold), tokens and
    state_bytes. Of a token task: `exact` alone, the share of its targets. A length in which some
    item has no room gives one row with `missing`, the reason.
    """
    model.eval()
    text = None if task in TOKEN_TASKS else _TextOf(task, codec, asked)
    for length in asked.lengths:
        say(f"{task}, length {length:,}")
        if text is None:
            yield _token_row(model, task, length, asked)
        else:
            yield from text.rows(model, length)


def _token_row(model: Any, name: str, length: int, asked: Asked) -> Row:
    task = TOKEN_TASKS[name]
    row: Row = {"task": name, "length": length, "group": None}
    try:
        config = task.config(length)
    except ValueError as error:
        return row | {"missing": str(error)}
    known = model.config.vocab_size
    if config.vocab_size > known:
        return row | {"missing": f"has {config.vocab_size} ids, and the model {known}"}
    right, tokens, size = [], 0, 0
    for indices in _batches(asked):
        batch = task.make_batch(config, asked.seed, indices)
        shares, tokens, size = share_right(model, batch)
        right += shares
    share = fmean(right)
    return row | {
        "samples": asked.samples,
        "exact": share,
        "exact_interval": wilson(share, asked.samples),
        "chance": config.chance,
        "tokens": [tokens, tokens],
        "state_bytes": size,
    }


class _TextOf:
    """A text task at any length: what pieces of text count, and what items need, is found once."""

    def __init__(self, name: str, codec: Codec, asked: Asked):
        self.task, self.codec, self.asked = text_task(name), codec, asked
        self.count = codec.counter()
        self.needed = self.task.needed_by_all(asked.samples, asked.seed, self.count)

    def rows(self, model: Any, length: int) -> Iterator[Row]:
        row: Row = {"task": self.task.name, "length": length}
        if self.needed > length:
            yield row | {"group": None, "missing": f"needs {self.needed:,} tokens or more"}
            return
        replies: list[Reply] = []
        for indices in _batches(self.asked):
            place = length, self.asked.seed
            try:
                items = [self.task.behind_bos(*place, index, self.count) for index in indices]
            except TooLong as error:
                yield row | {"group": None, "missing": str(error)}
                return
            replies += ask(model, self.codec, items)
        yield row | _summary(None, replies)
        for group in self.task.groups if len(self.task.groups) > 1 else ():
            of_group = [reply for reply in replies if reply.question.group == group]
            if of_group:
                yield row | _summary(group, of_group)


def _batches(asked: Asked) -> Iterator[range]:
    for start in range(0, asked.samples, asked.batch_size):
        yield range(start, min(start + asked.batch_size, asked.samples))


def _constant(answers: Sequence[tuple[str, ...]]) -> float:
    """How often the most frequent answer of the others is that of an item that has it."""
    most = max(Counter(answers).values())
    return (most - 1) / (len(answers) - 1) if len(answers) > 1 else 0.0


def _summary(group: str | None, replies: Sequence[Reply]) -> Row:
    exact, ranked = (fmean(getattr(r, key) for r in replies) for key in ("exact", "ranked"))
    tokens, count = [reply.tokens for reply in replies], len(replies)
    first = [r.question.role(word) for r in replies for word in r.first]
    traces: dict[str, list[float]] = {}
    for reply in replies:
        for role, nats in reply.traces().items():
            traces.setdefault(role, []).append(nats)
    return {
        "group": group,
        "samples": count,
        "exact": exact,
        "exact_interval": wilson(exact, count),
        "ranked": ranked,
        "ranked_interval": wilson(ranked, count),
        "chance": fmean(reply.question.chance for reply in replies),
        "constant": _constant([reply.question.answers for reply in replies]),
        "found": fmean(reply.found for reply in replies),
        "first_by_role": {role: first.count(role) / len(first) for role in sorted(set(first))},
        "trace_by_role": {role: fmean(each) for role, each in sorted(traces.items())},
        "tokens": [min(tokens), max(tokens)],
        "state_bytes": max(reply.state_bytes for reply in replies),
    }
