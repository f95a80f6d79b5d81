"""Table 2 of the Memformer paper at toy size, and its headline "8.1 x less memory, 3.2 x faster".

Equal parameters, tokens and training on a text (`families.measure`). The headline is measured so:
of the Transformer-XL and the Compressive models that were trained, those count as of equal quality
whose bits per byte, the mean over seeds, are not above the Memformer's. The cheapest of them, in
peak bytes, is compared with the Memformer, or the best one where none is as good: in peak bytes of
reading `rows` streams until every memory is full, in bytes of one stream's state and of what of it
crosses segments, and in FLOPs and processor time a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from everlong import state as states
from everlong.evaluation import families
from everlong.evaluation.cells import cell
from everlong.evaluation.memformer_length import read
from everlong.evaluation.meters import Flops, LiveBytes
from everlong.evaluation.recall import interval
from everlong.evaluation.timing import interleaved, timed, torch_threads
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build, with_parameters
from everlong.provenance import git_sha
from everlong.recipes import Recipe
from everlong.tasks.text import Documents
from everlong.training.config import TrainConfig

Row = dict[str, Any]
MEMFORMER = "memformer, encoder-decoder"
CACHES = (32, 64, 128, 256)
RIVALS = ("transformer_xl", "compressive")
# what is changed of the recipe "families": a text of many documents, a small model, many tokens
CHANGES = (
    'data.source="sotu"',
    "model.hidden_size=64",
    'train.horizon="full"',
    "train.batch_size=8",
    "train.steps=150",
    "train.warmup_steps=15",
)
_COSTS = ("peak_bytes", "state_bytes", "carried_bytes", "flops", "seconds")
HELD_OUT_BYTES = 4096  # of the beginning of each held-out document
ROLES_STEPS = 450  # of the longer training whose slots are looked at


def contenders(recipe: Recipe) -> dict[str, EverlongConfig]:
    """Models by name, of as many parameters as the encoder-decoder has."""
    size = {key: recipe.model[key] for key in ("hidden_size", "num_heads", "num_layers")}
    segment: int = recipe.train["segment_length"]
    slots = {"name": "memformer", "segment_length": segment, "num_slots": 32}
    published = EverlongConfig(
        **{**size, "num_layers": size["num_layers"] - 1}, segment={**slots, "encoder_layers": 1}
    )
    wanted = build(published, 0).num_parameters()

    def layers(names: Sequence[str], **mixers: Row) -> EverlongConfig:
        return EverlongConfig(**size, layers=list(names), mixers=mixers)

    def around(**options: Any) -> EverlongConfig:
        return EverlongConfig(**size, segment={"segment_length": segment, **options})

    found = {MEMFORMER: published, "memformer, causal": around(**slots)}
    for length in CACHES:
        cache = {"segment_length": segment, "memory_length": length}
        found[f"transformer_xl, cache {length}"] = layers(["transformer_xl"], transformer_xl=cache)
    squeezed = {"segment_length": segment, "memory_length": segment, "rate": 4}
    found |= {
        f"compressive, {segment} + {segment}": layers(
            ["compressive"], compressive={**squeezed, "compressed_length": segment}
        ),
        "rmt, 16 tokens": around(name="rmt", num_slots=16),
        "hybrid, 3 gated_deltanet to a window": layers(
            ["gated_deltanet*3", "sliding_attention"], sliding_attention={"window": segment}
        ),
        "no_memory": around(name="no_memory"),
    }
    return {name: with_parameters(config, wanted) for name, config in found.items()}


def shortened(texts: tuple[Documents, Documents]) -> tuple[Documents, Documents]:
    """Of the held-out documents the beginnings, so that each model is scored in seconds."""
    items = []
    for each in texts[1]:
        stop = min(each.stop, each.start + HELD_OUT_BYTES)
        items.append(replace(each, stop=stop, num_bytes=stop - each.start))
    return texts[0], replace(texts[1], items=tuple(items))


def folder_name(name: str) -> str:
    return name.replace(",", "").replace("+", "and").replace(" ", "-")


def measure(
    recipe: Recipe,
    texts: tuple[Documents, Documents],
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None],
) -> list[Row]:
    """A row a contender and seed (`families.measure`); what is finished is read back."""
    rows, configs = [], contenders(recipe)
    for seed in seeds:
        options = TrainConfig(**{**recipe.train, "seed": seed})
        for name, config in configs.items():
            place = folder / f"{folder_name(name)}-{seed}"
            row = families.measure(name, config, recipe.data, texts, options, place)
            say(f"{name}, seed {seed}: {row['bits_per_byte']:.4f} bits per byte")
            rows.append(row)
    return rows


def costs(
    recipe: Recipe, rows: int, rounds: int, folder: Path, say: Callable[[str], None]
) -> list[Row]:
    """What reading costs each contender: peak bytes of `rows` streams from the start until every
    memory is full, bytes of a stream's state, FLOPs and processor seconds a token behind that.

    Fresh weights: none of these depends on them.
    """
    configs, segment = contenders(recipe), recipe.train["segment_length"]
    count = -(-max(CACHES) // segment) + 2
    about = {name: config.to_diff_dict() for name, config in configs.items()}
    about = {"models": _plain(about), "rows": rows, "rounds": rounds, "segments": count}
    say("equal: what reading costs")

    def make() -> list[Row]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(256, (rows, count * segment), generator=generator).split(segment, 1)
        models = {name: build(config, 0).eval() for name, config in configs.items()}
        found, full = {}, {}
        for name, model in models.items():
            with LiveBytes() as live:
                full[name] = read(model, ids[:-1])
            with torch.no_grad(), Flops() as flops:
                model.stream(ids[-1], full[name])
            found[name] = {
                "name": name,
                "peak_bytes": live.peak,
                "state_bytes": states.num_bytes(full[name]) // rows,
                "carried_bytes": carried_bytes(configs[name], full[name]),
                "flops": flops.total / ids[-1].numel(),
                "git": git_sha(),
            }
        with torch_threads(1), torch.no_grad():
            taken: dict[str, list[float]] = {name: [] for name in models}
            for _, order in interleaved(list(models), rounds, 0):
                for name in order:
                    model, state = models[name], full[name]
                    _, spent = timed(lambda: model.stream(ids[-1], state), "cpu")  # noqa: B023
                    taken[name].append(spent.cpu / ids[-1].numel())
        for name, each in taken.items():
            found[name] |= {"seconds": median(each), "all_seconds": each}
        return list(found.values())

    return cell(folder / "costs.json", about, make)


def carried_bytes(config: EverlongConfig, state: Any) -> int | None:
    """Of one stream's state what is carried from segment to segment, in float32: the paper's N D
    against L M D. The rest holds the unfinished segment. None for memories the claim is not about.
    """
    if config.segment is not None and config.segment["name"] == "memformer":
        parts = [
            state["segment"][name] for name in ("slots", "encoding") if name in state["segment"]
        ]
        return sum(states.num_bytes(part) // len(part) for part in parts)
    if config.segment is None and config.layer_names[0] in RIVALS:
        options = config.mixers[config.layer_names[0]]
        places = options["memory_length"] + options.get("compressed_length", 0)
        return 4 * config.num_layers * config.hidden_size * places
    return None


def equal_quality(trained: Sequence[Row], costs: Sequence[Row]) -> dict[str, Row]:
    """By rival: every size with its difference in bits per byte to the Memformer, which of them are
    of equal quality, the one that is compared, and the ratios of its costs to the Memformer's."""
    by_name: dict[str, dict[int, float]] = {}
    for row in trained:
        by_name.setdefault(row["name"], {})[row["seed"]] = row["bits_per_byte"]
    cost = {row["name"]: row for row in costs}
    own, base = by_name[MEMFORMER], cost[MEMFORMER]
    found = {}
    for rival in RIVALS:
        sizes = []
        for name in (name for name in by_name if name.startswith(rival)):
            gaps = [bits - own[seed] for seed, bits in by_name[name].items()]
            sizes.append({"name": name, "gap": mean(gaps), "interval": interval(gaps)})
        fits = [row["name"] for row in sizes if row["gap"] <= 0]
        best = min(sizes, key=lambda row: row["gap"])["name"]
        chosen = min(fits, key=lambda name: cost[name]["peak_bytes"], default=best)
        ratios = {key: cost[chosen][key] / base[key] for key in _COSTS}
        found[rival] = {"sizes": sizes, "equal": fits, "compared": chosen, "ratios": ratios}
    return found


def _plain(models: Mapping[str, Row]) -> Row:
    return {
        name: {k: v for k, v in model.items() if k != "transformers_version"}
        for name, model in models.items()
    }


def roles_recipe(recipe: Recipe) -> Recipe:
    """The longer training of the model whose slots are looked at."""
    return replace(recipe, train={**recipe.train, "steps": ROLES_STEPS})
