"""`everlong bench`: measurements of this machine, as a table and as JSON with provenance."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

_Folder = Annotated[Path, Parameter(validator=validators.Path(file_okay=False))]


def replay(*, out: _Folder = Path("runs/bench")) -> None:
    """Memory replay against back-propagation through time and gradient checkpointing.

    Parameters
    ----------
    out
        The folder that replay.json and replay.png are written to.
    """
    from rich.table import Table

    from everlong.cli.progress import console, size
    from everlong.evaluation import replay_cost

    config = replay_cost.ReplayCost()
    rows = replay_cost.measure(config, _say)
    table = Table(box=None, pad_edge=False)
    names = ("net on the state path", "segments", "method", "forwards", "backwards")
    for name in (*names, "saved", "peak", "time / BPTT", "theory", "gradient difference"):
        table.add_column(name, justify="left" if name in names[::2] else "right")
    for row in rows:
        table.add_row(
            row["form"],
            str(row["segments"]),
            "BPTT" if row["method"] == "full" else row["method"],
            str(row["forwards"]),
            str(row["backwards"]),
            size(row["saved_bytes"]),
            size(row["live_bytes"]),
            f"{row['times_bptt']:.2f}",
            f"{row['theory']:.2f}" if "theory" in row else "",
            f"{row['gradient_difference']:.1e}",
        )
    console().print(table)
    files = out / "replay.json", out / "replay.png"
    replay_cost.write(config, rows, *files, "everlong bench replay")
    print(f"written to {out}")


def recall(
    recipe: str = "recall",
    *,
    family: str | None = None,
    changes: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    out: _Folder = Path("runs/bench"),
) -> None:
    """Train the recall task, over seeds: both forms of Memformer and their controls, or a family.

    Parameters
    ----------
    recipe
        A recipe with a [task] section.
    family
        Compare the memories of a family instead: recurrence or linear. What is finished in the
        folder is not trained again. Or test-time: what rules that learn at test time overwrite,
        follow and hold, without any training, in seconds; it takes no recipe and no --set.
    changes
        section.key=value, over what the recipe says; may be repeated.
    out
        The folder that recall.json (or recall-FAMILY.json and its picture) is written to.
    """
    from everlong import recipes
    from everlong.cli.recall import TEST_TIME, bench_family, bench_recall, bench_test_time

    if family == TEST_TIME:
        bench_test_time(recipe, changes, out)
        return
    if family is not None:
        bench_family(recipes.load(recipe, changes), family, out, _say)
        return
    bench_recall(recipes.load(recipe, changes), out / "recall.json", _say)


def bytes(
    *names: str,
    tier: Literal["smoke", "laptop", "gpu"] = "laptop",
    seeds: tuple[int, ...] = (0, 1, 2),
    out: _Folder = Path("runs/bench"),
) -> None:
    """Recall against bytes of state: pairs, overwritten pairs, a passkey, copying, updates.

    One small model a memory and seed, trained on all five at once; as many trainings at once as
    there are cores. What is finished in the folder is not trained again.

    Parameters
    ----------
    names
        Memories from `everlong list`; all of them if left out.
    tier
        smoke is a minute and only shows that all runs; laptop three quarters of an hour on two
        cores, half of that on four, without the memories whose step takes long; gpu trains larger
        models of all of them longer, on CUDA.
    seeds
        One training each, of every memory; --seeds 0 --seeds 1 for two.
    out
        The folder that bytes.json and bytes.png are written to, beside what is finished.
    """
    from everlong.cli.recall_bytes import bench_bytes

    bench_bytes(names, tier, seeds, out, _say)


def copy(*, seeds: tuple[int, ...] = (0, 1, 2), out: _Folder = Path("runs/bench")) -> None:
    """Copy a source across segments: RMT against Transformer-XL, with and without a curriculum.

    Parameters
    ----------
    seeds
        One training each, of every subject; --seeds 0 --seeds 1 for two.
    out
        The folder that copy.json is written to.
    """
    from everlong.cli.recall import accuracy_table
    from everlong.evaluation import copying
    from everlong.evaluation.recall import check_counts, summary
    from everlong.provenance import git_sha

    git_sha()  # that of the code which is loaded now
    check_counts("seeds", seeds)
    config = copying.CopyRun()
    rows = copying.measure(config, seeds, _say)
    accuracy_table(summary(rows, "symbols"), "symbols", "accuracy, by symbols of the source")
    copying.write(out / "copy.json", config, rows)
    print(f"written to {out}")


def delayed(*, seeds: tuple[int, ...] = (0, 1, 2), out: _Folder = Path("runs/bench")) -> None:
    """Recall the first symbol after a delay: Stable Hadamard Memory, its ablations, and a GRU.

    Parameters
    ----------
    seeds
        One training each, of every subject; --seeds 0 --seeds 1 for two.
    out
        The folder that delayed.json is written to.
    """
    from everlong.cli.recall import accuracy_table
    from everlong.evaluation import delayed as bench
    from everlong.evaluation.recall import check_counts, summary
    from everlong.provenance import git_sha

    git_sha()  # that of the code which is loaded now
    check_counts("seeds", seeds)
    config = bench.DelayedRun()
    rows = bench.measure(config, seeds, _say)
    accuracy_table(summary(rows, "delay"), "delay", "accuracy, by delay in tokens")
    bench.write(out / "delayed.json", config, rows)
    print(f"written to {out}")


def overwriting(*, seeds: tuple[int, ...] = (0, 1, 2), out: _Folder = Path("runs/bench")) -> None:
    """Recall of keys that are written twice: sums, decays and corrections in one layer's place.

    Parameters
    ----------
    seeds
        One training each, of every rule; --seeds 0 --seeds 1 for two.
    out
        The folder that overwriting.json is written to, beside what is finished.
    """
    from everlong.cli.recall import accuracy_table
    from everlong.evaluation import overwriting as bench
    from everlong.evaluation.recall import check_counts, summary

    check_counts("seeds", seeds)
    config = bench.OverwritingRun()
    rows = bench.measure(config, seeds, out / "overwriting", _say)
    accuracy_table(summary(rows, "asked"), "asked", "accuracy, by what is asked for")
    bench.write(out / "overwriting.json", config, rows)
    print(f"chance {config.task().chance:.3f}; written to {out}")


def hybrid(
    *kinds: str,
    recipe: str = "hybrid_language",
    changes: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    out: _Folder = Path("runs/bench"),
) -> None:
    """What attention in one layer of four adds to linear layers: recall, and bits per byte.

    Recall of four times as many pairs as a key is wide by every linear kind, pure and with one
    attention layer in four; then one kind on a text at several ratios, at equal parameters. What is
    finished in the folder is not trained again.

    Parameters
    ----------
    kinds
        Linear kinds for the recall; all of them if left out.
    recipe
        The text, its training and the model's width; its first layer is the kind that reads.
    changes
        section.key=value, over what the recipe says; may be repeated.
    seeds
        One training each; --seeds 0 --seeds 1 for two.
    out
        The folder that hybrid.json and hybrid.png are written to, beside what is finished.
    """
    from everlong import recipes
    from everlong.cli.families import bench_hybrid

    bench_hybrid(recipes.load(recipe, changes), kinds, seeds, out, _say)


def mixture(*, seeds: tuple[int, ...] = (0, 1, 2), out: _Folder = Path("runs/bench")) -> None:
    """Mixture-of-Memories: room for pairs at equal cost and equal bytes; streams to keep apart.

    Parameters
    ----------
    seeds
        One training each, of every subject; --seeds 0 --seeds 1 for two.
    out
        The folder that mixture.json is written to.
    """
    from everlong.cli.recall import accuracy_table
    from everlong.evaluation import mixture as bench
    from everlong.evaluation.recall import check_counts, summary
    from everlong.provenance import git_sha

    git_sha()  # that of the code which is loaded now
    check_counts("seeds", seeds)
    config = bench.MixtureRun()
    room = bench.measure_room(config, seeds)
    accuracy_table(summary(room, "pairs"), "pairs", "signs read right, by pairs written")
    streams = bench.measure_streams(config, seeds, _say)
    accuracy_table(summary(streams, "pairs"), "pairs", "accuracy, by pairs of each of 2 streams")
    bench.write(out / "mixture.json", config, room, streams)
    print(f"written to {out}")


def language(
    *names: str,
    recipe: str = "families",
    changes: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    out: _Folder = Path("runs/bench"),
) -> None:
    """Bits per byte against bytes of state at equal parameters and equal tokens.

    Every memory is trained as its own recipe's model (or as --memory NAME on the default), by the
    given recipe's [data] and [train]. What is finished in the folder is not trained again.

    Parameters
    ----------
    names
        Memories from `everlong list`; all bounded ones if left out (the others cost more and more).
    recipe
        What the parameters of its model are matched to, the text, and the training.
    changes
        section.key=value, over what the recipe says; may be repeated.
    seeds
        One training each; --seeds 0 --seeds 1 for two.
    out
        The folder that language.json and language.png are written to, beside the runs.
    """
    from everlong import recipes
    from everlong.cli.families import bench_language

    bench_language(recipes.load(recipe, changes), names, seeds, out, _say)


def cost(
    *names: str,
    peers: Annotated[bool, Parameter(negative=())] = False,
    patience: float = 90.0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    out: _Folder = Path("runs/bench"),
) -> None:
    """Time, peak memory, FLOPs and bytes of state against stream length, memory by memory.

    Each memory alone, width 256, 4 heads, default options, one stream, float32: calls of 512 to
    16,384 tokens read and trained, bounded ones trained to 65,536 by replay and decoding to
    1,000,000; then as language models of equal parameters. What is finished in the folder is not
    measured again. All of them take about an hour of one core.

    Parameters
    ----------
    names
        Memories from `everlong list`; all of them if left out.
    peers
        Time scans, memories that learn at test time and whole models instead, beside those of
        others: transformers, and what the extra `peers` brings.
    patience
        Seconds that a memory may read on for to reach 1,000,000 tokens; it decodes where it came.
    device
        Where it is measured: auto takes the best there is.
    out
        The folder that cost.json and cost.png, or those of the peers, are written to.
    """
    from everlong.cli.cost import bench_cost, bench_peers, refuse_names

    if peers:
        refuse_names(names)
        bench_peers(device, out, _say)
        return
    bench_cost(names, device, patience, out, _say)


def reliability(
    *parts: Literal["cuts", "fuzz", "kills", "soak", "checkpoints"],
    examples: int = 500,
    cases: int = 10_000,
    kills: int = 20,
    tokens: int = 10_000_000,
    damages: int = 1_300,
    seed: int = 0,
    out: _Folder = Path("runs/bench"),
) -> None:
    """Count how often everlong breaks; about an hour and a half of one core.

    What is finished in the folder is read from there.

    Parameters
    ----------
    parts
        All of them if left out.
    examples
        Of random cuts, masks and resets, for each memory.
    cases
        Random recipes and command lines.
    kills
        SIGKILLs of a training, each resumed.
    tokens
        Of the stream that each of two models reads.
    damages
        To checkpoints, finished models and state files.
    seed
        Of all that is random.
    out
        The folder that reliability.json is written to, beside what is finished.
    """
    from everlong.cli.reliability import bench_reliability
    from everlong.evaluation.reliability import ReliabilityRun

    run = ReliabilityRun(examples, cases, kills, tokens, damages, seed)
    bench_reliability(parts, run, out, _say)


def memformer(
    *parts: str,
    seeds: tuple[int, ...] = (0, 1, 2),
    out: _Folder = Path("runs/bench"),
) -> None:
    """What the Memformer paper claims, measured here again (docs/memformer_paper.md).

    What is finished in the folder is not measured again.

    Parameters
    ----------
    parts
        Of length, pixels, language, equal, roles; all of them if left out.
    seeds
        One training each, where a part trains; --seeds 0 --seeds 1 for two.
    out
        The folder that memformer.json is written to, beside what is finished.
    """
    from everlong.cli.memformer_claims import bench_memformer

    bench_memformer(parts, seeds, out, _say)


def decoding(
    *names: str, threads: tuple[int, ...] = (1, 2), out: _Folder = Path("runs/bench")
) -> None:
    """Decoding of models of 30 million parameters, and of every bounded memory along its stream.

    Against the time in which torch reads the weights once, and against Transformer-XL with a cache
    of 1,600 tokens; batch 1, float32, on the processor.

    Parameters
    ----------
    names
        Models, such as memformer, rmt, gated_deltanet, titans; all of them if left out.
    threads
        Of torch, for the models; --threads 1 for processor time alone.
    out
        The folder that decoding.json is written to.
    """
    from everlong.cli.decoding import bench_decoding

    bench_decoding(names, threads, out, _say)


def training(
    *names: str, threads: tuple[int, ...] = (1, 2), out: _Folder = Path("runs/bench")
) -> None:
    """How near training comes to the speed at which this machine multiplies matrices.

    Whole steps of models of four layers and width 512, float32: forward, loss, backward by three
    methods, optimiser. Processor time with one thread, the clock on the wall with more.

    Parameters
    ----------
    names
        Models, such as memformer, hybrid, titans; all of them if left out.
    threads
        Of torch; --threads 1 for processor time alone.
    out
        The folder that training-speed.json is written to.
    """
    from everlong.cli.training_speed import bench_training

    bench_training(names, threads, out, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
