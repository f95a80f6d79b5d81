"""The tables of docs/memformer_paper.md: `python benchmarks/memformer_paper.py` prints them.

Nothing is measured here: memformer.json is of `everlong bench memformer`, replay.json of
`everlong bench replay`. The paper is arXiv 2010.06891 v2.
"""

import json
from collections.abc import Iterable
from math import log
from pathlib import Path
from typing import Any

from everlong.evaluation.markdown import marked, table

RESULTS = Path(__file__).parent / "results"
NEAR = 1.5  # a ratio up to so many times the paper's, or its part, agrees
NONE = 0.05  # a ratio so near to 1, or on its other side, shows nothing of what the paper reports
Row = dict[str, Any]

# Table 1: perplexity a pixel, beside our subjects
PIXELS = {
    "LSTM": 1.698,
    "decoder, whole digit": 1.569,
    "transformer_xl, cache 8": 1.650,
    "transformer_xl, cache 24": 1.618,
    "transformer_xl, cache 56": 1.611,
    "memformer, 64 slots": 1.594,
    "memformer, 16 slots": 1.604,
    "memformer, 1 slot": 1.627,
    "memformer, no slots": 1.745,
    "memformer, temperature 1": 1.612,
    "memformer, no forgetting": 1.630,
    "memformer, one writer head": 1.626,
}
MULTI = 1.555  # of 4 + 8 layers, which the paper sets against other models; ablations have 2 + 6
# Table 3: memory and speed against BPTT
REPLAY = {"replay": (7229 / 16177, 0.90), "checkpoint": (9885 / 16177, 0.48)}
COUNTS = (4, 8, 16, 64)
OURS, CAUSAL, XL, VANILLA = "memformer", "memformer, causal", "transformer_xl", "vanilla"
PUBLISHED = "memformer, encoder-decoder"


def read(name: str) -> Row:
    return json.loads((RESULTS / f"{name}.json").read_text())


def spread(value: float, interval: float | None, digits: int = 3, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" + (f" ± {interval:.{digits}f}" if interval else "")


def by_name(rows: Iterable[Row], *keys: str) -> dict[Any, Row]:
    """Rows by their name, or by (name, KEY)."""
    return {
        tuple(row[key] for key in ("name", *keys)) if keys else row["name"]: row for row in rows
    }


def length() -> str:
    """FLOPs and time a token, and the peak of reading, against the length."""
    rows = by_name(read("memformer")["length"]["length"]["rows"], "length")
    names, told = list(dict.fromkeys(name for name, _ in rows)), []
    units = "MFLOP / µs / MB"
    for count in dict.fromkeys(count for _, count in rows):
        own = [rows[name, count] for name in names]
        ratio = rows[VANILLA, count]["flops"] / rows[OURS, count]["flops"]
        told.append(
            [
                f"{count:,}",
                *(
                    f"{row['flops'] / 1e6:.2f} / {row['seconds'] * 1e6:.0f} / "
                    f"{row['peak_bytes'] / 1e6:.1f}"
                    for row in own
                ),
                f"{ratio:.2f}",
            ]
        )
    return table(
        ["tokens read", *(f"{name}, {units}" for name in names), "vanilla : memformer, FLOPs"], told
    )


def size() -> str:
    """Peaks against the places of the memory."""
    rows = by_name(read("memformer")["length"]["size"]["rows"], "places")
    told = []
    for places in dict.fromkeys(places for _, places in rows):
        xl, causal, ours = (rows[name, places] for name in (XL, CAUSAL, OURS))
        told.append(
            [
                f"{places:,}",
                *(
                    f"{row['read_bytes'] / 1e6:.0f} / {row['train_bytes'] / 1e6:.0f}"
                    for row in (xl, causal, ours)
                ),
                *(f"{xl[key] / ours[key]:.1f}" for key in ("read_bytes", "train_bytes", "flops")),
            ]
        )
    models = (f"{name}, reading / training MB" for name in (XL, CAUSAL, OURS))
    head = ["places", *models, "reading", "training", "FLOPs"]
    return table([*head[:4], *(f"{each}, {XL} : {OURS}" for each in head[4:])], told)


def equal() -> str:
    """What reading costs at which quality."""
    told = read("memformer")
    bits = by_name(told["language"]["summary"])
    rows = sorted(told["equal"]["costs"], key=lambda row: bits[row["name"]]["bits_per_byte"])
    return table(
        ["memory", "bits per byte", "peak MB", "bytes of state", "of which cross segments",
         "MFLOP a token", "µs a token"],
        (
            [
                row["name"],
                spread(bits[row["name"]]["bits_per_byte"], bits[row["name"]]["interval"]),
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['state_bytes']:,}",
                "" if row["carried_bytes"] is None else f"{row['carried_bytes']:,}",
                f"{row['flops'] / 1e6:.2f}",
                f"{row['seconds'] * 1e6:.0f}",
            ]
            for row in rows
        ),
    )  # fmt: skip


def ratios() -> str:
    """The headline: the rival of equal quality against the Memformer."""
    found = read("memformer")["equal"]["rivals"]
    columns = ("peak_bytes", "state_bytes", "carried_bytes", "flops", "seconds")
    return table(
        ["rival", "compared", "as good or better", "peak memory", "state", "crossing segments",
         "FLOPs", "time"],
        (
            [
                rival,
                row["compared"],
                f"{len(row['equal'])} of {len(row['sizes'])} sizes",
                *(f"{row['ratios'][key]:.2f} x" for key in columns),
            ]
            for rival, row in found.items()
        ),
    )  # fmt: skip


def replay() -> str:
    """Table 3 over horizons."""
    rows = {(row["form"], row["segments"], row["method"]): row for row in read("replay")["rows"]}
    told = [["paper", "not stated", *(f"{REPLAY[m][0]:.2f} / {REPLAY[m][1]:.2f}" for m in REPLAY)]]
    for form in ("whole", "quarter"):
        for count in COUNTS:
            full = rows[form, count, "full"]
            cells = []
            for method in REPLAY:
                row = rows[form, count, method]
                memory = row["live_bytes"] / full["live_bytes"]
                cells.append(f"{memory:.2f} / {1 / row['cpu_times_bptt']:.2f}")
            told.append([{"whole": CAUSAL, "quarter": OURS}[form], str(count), *cells])
    return table(
        [
            "form",
            "segments",
            *(f"{m}, memory / speed" for m in ("replay", "gradient checkpointing")),
        ],
        told,
    )


def pixels() -> str:
    """Table 1 beside the paper's."""
    told = read("memformer")["pixels"]
    return table(
        [
            "subject",
            "perplexity a pixel, paper",
            "ours",
            "against 16 slots",
            "slots wiped",
            "state",
        ],
        (
            [
                row["name"],
                f"{PIXELS[row['name']]:.3f}" if row["name"] in PIXELS else "",
                spread(row["perplexity"], row["interval"]),
                spread(row["gap"], row["gap_interval"], 3, "+"),
                "" if row["slots_wiped"] is None else f"{row['slots_wiped']:.3f}",
                f"{row['state_bytes']:,} B",
            ]
            for row in told["summary"]
        ),
    )


def language() -> str:
    """Table 2's shape."""
    told = read("memformer")["language"]["summary"]
    gaps = text_gaps()
    return table(
        ["memory", "bits per byte", f"against {PUBLISHED}", "wiping it costs", "bytes of state"],
        (
            [
                row["name"],
                spread(row["bits_per_byte"], row["interval"]),
                spread(*gaps[row["name"]], 3, "+"),
                "" if row["gain"] is None else f"{row['gain']:+.3f}",
                f"{row['state_bytes']:,}",
            ]
            for row in told
        ),
    )


def roles() -> str:
    """Figure 6 in numbers."""
    told = read("memformer")["roles"]["summary"]
    return table(
        ["model", "write", "keep", "mix", "fed", "mean self-weight", "mean norm of v", "where fed"],
        (
            [
                row["model"],
                {"start": "a document's first", "middle": "mid-document"}[row["where"]],
                *(
                    spread(row[key], row[f"{key}_interval"], 2)
                    for key in ("keep", "mix", "fed", "self_weight")
                ),
                *(
                    "" if row.get(key) is None else spread(row[key], row[f"{key}_interval"], 2)
                    for key in ("speed", "fed_speed")
                ),
            ]
            for row in told
        ),
    )


def text_gaps(base: str = PUBLISHED) -> dict[str, tuple[float, float | None]]:
    """Of every memory its bits per byte minus those of `base`, seed by seed: mean and interval."""
    from everlong.evaluation.recall import interval

    found: dict[str, dict[int, float]] = {}
    for row in read("memformer")["language"]["rows"]:
        found.setdefault(row["name"], {})[row["seed"]] = row["bits_per_byte"]
    gaps = {}
    for name, bits in found.items():
        each = [value - found[base][seed] for seed, value in bits.items()]
        gaps[name] = sum(each) / len(each), interval(each)
    return gaps


def by_sign(paper: float, gap: float, interval: float | None) -> str:
    """Whether a difference has the sign of the paper's, and is further from 0 than chance."""
    if interval is None or abs(gap) <= interval:
        return "not told apart"
    return "agrees" if gap * paper > 0 else "disagrees"


def by_ratio(paper: float, ours: float) -> str:
    """Of ratios to 1: whether ours is near the paper's, or how far it goes the same way."""
    if 1 / NEAR <= ours / paper <= NEAR:
        return "agrees"
    if paper == 1:
        return "disagrees"
    way = log(ours) / log(paper)
    if abs(ours - 1) <= NONE or way < 0:
        return "not seen"
    return "weaker here" if way < 1 else "stronger here"


def by_horizon(paper: float, ours: dict[int, float]) -> str:
    """The paper does not say how many segments its ratio is of: those of ours that are near it."""
    near = [count for count, ratio in ours.items() if by_ratio(paper, ratio) == "agrees"]
    return f"agrees at {' and '.join(map(str, near))}" if near else "agrees at none"


def claims() -> str:
    """Every claim with the paper's number, ours and the verdict, by rules."""
    rows = [*_cost_claims(), *_replay_claims(), *_pixel_claims(), *_text_claims(), *_role_claims()]
    return table(["claim", "paper", "ours", "verdict"], rows)


def _cost_claims() -> list[list[str]]:
    told = read("memformer")
    rows = by_name(told["length"]["length"]["rows"], "length")
    counts = sorted({count for _, count in rows})
    first, last = rows[OURS, counts[0]], rows[OURS, counts[-1]]
    grown = last["flops"] / first["flops"]
    peak = last["peak_bytes"] / first["peak_bytes"]
    longest = rows[VANILLA, counts[-1]]["flops"] / last["flops"]
    cached = rows[XL, counts[-1]]["flops"] / last["flops"]
    sizes = by_name(told["length"]["size"]["rows"], "places")
    largest = max(places for _, places in sizes)
    xl, ours = sizes[XL, largest], sizes[OURS, largest]
    trained = xl["train_bytes"] / ours["train_bytes"]
    found = [
        ["linear time: FLOPs a token, longest over shortest stream", "1", f"{grown:.2f}",
         by_ratio(1, grown)],
        ["constant memory: peak, longest over shortest stream", "1", f"{peak:.2f}",
         by_ratio(1, peak)],
        [f"vanilla over Memformer, FLOPs at {counts[-1]:,} tokens", "about 57", f"{longest:.1f}",
         by_ratio(57, longest)],
        [f"{XL} over Memformer, FLOPs at {counts[-1]:,} tokens", "about 1.6", f"{cached:.1f}",
         by_ratio(11 / 7, cached)],
        [f"{XL} over Memformer, training memory at {largest:,} places", "about 6.5",
         f"{trained:.1f}", by_ratio(20.9 / 3.2, trained)],
    ]  # fmt: skip
    for rival, row in told["equal"]["rivals"].items():
        for name, key, paper in (("memory", "peak_bytes", 8.1), ("time", "seconds", 3.2)):
            ratio = row["ratios"][key]
            found.append(
                [f"inference {name} of {rival} at equal quality, over Memformer's", f"{paper} x",
                 f"{ratio:.2f} x ({row['compared']})", by_ratio(paper, ratio)]
            )  # fmt: skip
    return found


def _replay_claims() -> list[list[str]]:
    rows = {(row["form"], row["segments"], row["method"]): row for row in read("replay")["rows"]}
    found = []
    for method, (memory, speed) in REPLAY.items():
        name = {"replay": "replay", "checkpoint": "gradient checkpointing"}[method]
        own = [(rows["quarter", count, method], rows["quarter", count, "full"]) for count in COUNTS]
        ratios = [row["live_bytes"] / full["live_bytes"] for row, full in own]
        held = dict(zip(COUNTS, ratios, strict=True))
        fast = [1 / row["cpu_times_bptt"] for row, _ in own]
        told = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        found.append(
            [f"{name}: memory over BPTT's, {COUNTS[0]} to {COUNTS[-1]} segments", f"{memory:.2f}",
             told, by_horizon(memory, held)]
        )  # fmt: skip
        found.append(
            [f"{name}: speed over BPTT's", f"{speed:.2f}", f"{min(fast):.2f} to {max(fast):.2f}",
             by_ratio(speed, sum(fast) / len(fast))]
        )  # fmt: skip
    return found


def _pixel_claims() -> list[list[str]]:
    rows = by_name(read("memformer")["pixels"]["summary"])
    base = "memformer, 16 slots"

    def claim(words: str, name: str, paper: float) -> list[str]:
        row = rows[name]
        ours = spread(row["gap"], row["gap_interval"], 3, "+")
        return [words, f"{paper:+.3f}", ours, by_sign(paper, row["gap"], row["gap_interval"])]

    best = min(
        (name for name in rows if name.startswith(XL) and name in PIXELS),
        key=lambda name: rows[name]["perplexity"],
    )
    best_paper = min(PIXELS[name] for name in PIXELS if name.startswith(XL))
    whole, full = "pixels: {} worse than the Memformer", "decoder, whole digit"
    return [
        claim(whole.format(f"best {XL}"), best, best_paper - MULTI),
        claim(whole.format("decoder"), full, PIXELS[full] - MULTI),
        claim(whole.format("LSTM"), "LSTM", PIXELS["LSTM"] - MULTI),
        *(
            claim(f"pixels: {name.partition(', ')[2]} against 16 slots", name,
                  PIXELS[name] - PIXELS[base])
            for name in PIXELS
            if name.startswith(OURS) and name != base
        ),
    ]  # fmt: skip


def _text_claims() -> list[list[str]]:
    """Signs alone: the paper's perplexities are of words."""
    gaps = text_gaps()
    best = min((name for name in gaps if name.startswith(XL)), key=lambda name: gaps[name][0])
    squeezed = next(name for name in gaps if name.startswith("compressive"))
    sizes = [name for name in gaps if name.startswith(XL)]  # the smallest cache first
    grow = text_gaps(sizes[-1])[sizes[0]]
    return [
        [f"text: best {XL} worse than the Memformer", "+0.93 perplexity",
         f"{spread(*gaps[best], 3, '+')} bits ({best})", by_sign(1, *gaps[best])],
        ["text: Compressive worse than the Memformer", "+0.49 perplexity",
         f"{spread(*gaps[squeezed], 3, '+')} bits", by_sign(1, *gaps[squeezed])],
        [f"text: the smallest cache of {XL} worse than the largest", "+3.27 perplexity",
         f"{spread(*grow, 3, '+')} bits", by_sign(1, *grow)],
    ]  # fmt: skip


def _role_claims() -> list[list[str]]:
    told = {(row["model"], row["where"]): row for row in read("memformer")["roles"]["summary"]}
    start, middle = told["trained", "start"], told["trained", "middle"]
    fed, size = middle["fed_speed"], middle["speed"]
    keeps = middle["keep"]
    return [
        ["mid-document, slots that keep", "0.60 to 0.80",
         spread(keeps, middle["keep_interval"], 2),
         "agrees" if 0.6 <= keeps <= 0.8 else "disagrees"],
        ["mid-document, slots fed from tokens only", "0.05 to 0.10",
         spread(middle["fed"], middle["fed_interval"], 2),
         "agrees" if 0.05 <= middle["fed"] <= 0.1 else "disagrees"],
        ["at the start, slots fed from tokens", "almost all",
         spread(start["fed"], start["fed_interval"], 2),
         "agrees" if start["fed"] >= 0.8 else "disagrees"],
        ["norm of v: slots that are overwritten over the mean", f"{3.20 / 1.15:.1f}",
         "none is" if fed is None else f"{fed / size:.2f}",
         "none is" if fed is None else by_ratio(3.20 / 1.15, fed / size)],
    ]  # fmt: skip


TABLES = {
    "claims": claims,
    "length": length,
    "size": size,
    "ratios": ratios,
    "equal": equal,
    "replay": replay,
    "pixels": pixels,
    "language": language,
    "roles": roles,
}


if __name__ == "__main__":
    print(marked(TABLES))
