"""What a mixture of memories gains, and what it does not: room for pairs, and a trained toy.

*Room*, without training: P pairs of random keys (length 1) and values (signs) are written by the
delta rule with beta = 1, then all are read. One memory, several that are told which pair is whose,
and one of as many bytes as those: more is kept at the same cost of an update, not at equal bytes.

*Streams* (tasks/streams_of_pairs): one layer, trained. MoM with a memory for each stream, its
router learned or told the streams; MoM as published, 2 of 4; and one memory with keys as wide, or
with keys so wide that it holds as many bytes. All are MoM layers without a shared memory, which
with one memory is a plain gated layer of the delta rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import state as states
from everlong.evaluation.recall import HELD_OUT, Subject, build, check_counts, fit, summary
from everlong.mixers.mom import MoM
from everlong.models.hub import EverlongForCausalLM
from everlong.ops.delta import delta_rule
from everlong.provenance import write_results
from everlong.registry import check_types
from everlong.stack import Block, Stack
from everlong.stateful import Trace
from everlong.tasks.streams_of_pairs import StreamsConfig, make_batch

_TOLD = "MoM, 1 of 2, told the streams"


@dataclass(frozen=True)
class MixtureRun:
    """trials, room_keys, room_values, room_pairs: of the measure without training; memories have
    keys of `room_keys`. The rest is one training a subject and seed, about 20 s on one core;
    `pairs` of each stream in training and at most in the test; it tests at `asked` pairs."""

    trials: int = 100
    room_keys: int = 16
    room_values: int = 16
    room_memories: int = 4
    room_pairs: tuple[int, ...] = (32, 128)
    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1e-2
    hidden_size: int = 32
    num_heads: int = 1
    key_size: int = 4
    value_size: int = 16
    rule: str = "deltanet"
    pairs: int = 8
    test_items: int = 256
    asked: tuple[int, ...] = (2, 4, 8)

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {key: v for key, v in vars(self).items() if key not in ("room_pairs", "asked")}
        check_types(MixtureRun, plain, "mixture")
        for name, value in plain.items():
            if name not in ("steps", "rule", "learning_rate") and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        if self.steps < 0 or self.learning_rate <= 0:
            raise ValueError("steps must be at least 0 and learning_rate above 0")
        for name in ("room_pairs", "asked"):
            check_counts(name, getattr(self, name))
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more of each")
        if max(self.asked) > self.pairs:
            raise ValueError(f"asked is {self.asked}: there are {self.pairs} pairs in a stream")

    @property
    def task(self) -> StreamsConfig:
        return StreamsConfig(num_pairs=self.pairs, num_keys=self.pairs)


def room(pairs: int, memories: int, keys: int, run: MixtureRun, seed: int) -> dict[str, float]:
    """What of `pairs` written pairs is read right: the share of signs, and the mean cosine."""
    generator = torch.Generator().manual_seed(seed)
    shape = run.trials, pairs
    k = F.normalize(torch.randn(*shape, keys, generator=generator), dim=-1)
    v = torch.randn(*shape, run.room_values, generator=generator).sign()
    owner = F.one_hot(torch.randint(memories, shape, generator=generator), memories).float()
    # memories are heads: all see the same key and value, one has beta = 1, the others 0
    keys_of, values_of = (x[:, :, None].expand(-1, -1, memories, -1) for x in (k, v))
    start, no_decay = torch.zeros(run.trials, memories, *k.shape[2:], v.shape[-1]), owner * 0
    _, held = delta_rule(keys_of, keys_of, values_of, no_decay, owner, start)
    read = torch.einsum("npk,npe,nekv->npv", k, owner, held)
    return {
        "accuracy": float((read.sign() == v).float().mean()),
        "cosine": float(F.cosine_similarity(read, v, dim=-1).mean()),
    }


def measure_room(run: MixtureRun, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of name, seed, pairs, accuracy (signs), cosine, and numbers of state."""
    count, keys = run.room_memories, run.room_keys
    subjects = {
        f"1 memory, keys of {keys}": (1, keys),
        f"{count} memories, keys of {keys}, told whose": (count, keys),
        f"1 memory, keys of {count * keys}": (1, count * keys),
    }
    return [
        {"name": name, "seed": seed, "pairs": pairs, **room(pairs, memories, width, run, seed)}
        | {"numbers": memories * width * run.room_values}
        for name, (memories, width) in subjects.items()
        for seed in seeds
        for pairs in run.room_pairs
    ]


def subjects(run: MixtureRun) -> dict[str, Subject]:
    """One layer each; memories of equal bytes stand together."""

    def layer(memories: int, top_k: int, width: int) -> Subject:
        options = {"num_memories": memories, "top_k": top_k, "key_size": width * run.key_size}
        options |= {"value_size": run.value_size, "rule": run.rule, "shared": False}
        return Subject(1, None, {"mom": options}, ("mom",))

    return {
        "one memory": layer(1, 1, 1),
        "MoM, 1 of 2": layer(2, 1, 1),
        _TOLD: layer(2, 1, 1),
        "one memory, keys twice as wide": layer(1, 1, 2),
        "MoM, 2 of 4": layer(4, 2, 1),
        "one memory, keys 4 times as wide": layer(1, 1, 4),
    }


def router(model: EverlongForCausalLM) -> MoM:
    """The first layer's memory."""
    return cast(MoM, cast(Block, cast(Stack, model.body.core).blocks[0]).mixer)


@torch.no_grad()
def tell(model: EverlongForCausalLM, task: StreamsConfig) -> None:
    """The first number of each embedding says the token's stream, and the router reads it alone."""
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    weight = router(model).router.weight
    side = (2.0 * task.streams() - 1) * 3 * embedding.std()
    embedding[: len(side), 0] = side
    weight.zero_()
    weight[:, 0] = torch.tensor([-4.0, 4.0])
    weight.requires_grad_(False)


def train(name: str, run: MixtureRun, seed: int) -> EverlongForCausalLM:
    """Train on items (seed, 0 ...)."""
    model = build(subjects(run)[name], run.task, run, seed)
    if name == _TOLD:
        tell(model, run.task)
    starts = range(0, run.steps * run.batch_size, run.batch_size)
    batches = (make_batch(run.task, seed, range(i, i + run.batch_size)) for i in starts)
    fit(model, batches, run.task.max_length, run.learning_rate)
    return model.eval()


@torch.no_grad()
def test(model: EverlongForCausalLM, run: MixtureRun, pairs: int, seed: int) -> dict[str, float]:
    """On held-out items with `pairs` a stream: the share of questions answered; and how far the
    router keeps the streams apart, the share of choices that go to memories where their stream has
    the majority (1: apart)."""
    task = replace(run.task, num_pairs=pairs)
    batch, trace = make_batch(task, seed + HELD_OUT, range(run.test_items)), Trace()
    logits, _ = model.stream(batch.inputs, None, None, trace)
    chosen = trace.records["routed"][0]
    apart = separation(chosen, task.streams()[batch.inputs], task.num_streams)
    return {"accuracy": float(batch.correct(logits).float().mean()), "separation": apart}


def separation(chosen: Tensor, stream: Tensor, streams: int) -> float:
    """chosen Int [B, T, k], stream Int [B, T] -> the share of choices of a memory's main stream."""
    pair = chosen * streams + stream[..., None]
    counts = pair.flatten().bincount(minlength=streams * (int(chosen.max()) + 1))
    return float(counts.view(-1, streams).amax(1).sum() / chosen.numel())


def measure_streams(
    run: MixtureRun, seeds: Sequence[int], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of name, seed, pairs, accuracy, separation, state_bytes (of the memories) and
    parameters; `say` is told of each training."""
    rows = []
    for name in subjects(run):
        for seed in seeds:
            model = train(name, run, seed)
            held = states.num_bytes({"memory": router(model).init_state(1)["memory"]})
            about = {"state_bytes": held, "parameters": model.num_parameters()}
            found = {pairs: test(model, run, pairs, seed) for pairs in run.asked}
            scores = ", ".join(f"{each['accuracy']:.3f} of {n}" for n, each in found.items())
            apart = found[max(run.asked)]["separation"]
            say(f"{name}, seed {seed}: {scores} pairs a stream; streams apart {apart:.2f}")
            rows += [
                {"name": name, "seed": seed, "pairs": pairs, **each, **about}
                for pairs, each in found.items()
            ]
    return rows


def write(
    path: Path, run: MixtureRun, room: Sequence[Mapping[str, Any]], streams: Sequence[Mapping]
) -> None:
    """Both measures, rows and summary, as JSON with provenance."""
    plan = {"task": asdict(run.task), "run": asdict(run)}
    rows = {"room": list(room), "streams": list(streams)}
    means = {name: summary(found, "pairs") for name, found in rows.items()}
    write_results(path, "everlong bench mixture", plan, summary=means, rows=rows)
