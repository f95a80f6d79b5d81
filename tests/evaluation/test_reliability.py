"""The count of failures counts: each part finds what is broken on purpose, and nothing else."""

import contextlib
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from everlong.cli import main, reliability, runs
from everlong.errors import UserError
from everlong.evaluation.reliability import (
    Doors,
    ReliabilityRun,
    cuts,
    fuzz,
    kills,
    measure,
    page,
    soak,
)
from everlong.evaluation.reliability import checkpoints as damaged
from everlong.evaluation.reliability.cases import Case, make
from everlong.evaluation.reliability.damages import DAMAGES
from everlong.evaluation.reliability.guarded import call, no_training
from everlong.evaluation.reliability.hostile import MARKER
from everlong.training import checkpoints
from laws import toys

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def quiet(line):
    pass


# Cuts


def counted(toy, examples=25):
    return cuts.count(toys.toy_case(toy).build(), toys.WIDTH, True, examples, seed=0)


def test_an_honest_memory_fails_no_example():
    found = counted(toys.SegmentMean)
    assert (found.examples, found.failures) == (25, [])
    assert 0 < found.worst < 1e-12


@pytest.mark.parametrize(
    "liar",
    [
        toys.ForgetsPartialSegment,
        toys.LetsPaddingIn,
        toys.MultipliesByMask,
        toys.CountsMaskedPositions,
        toys.IgnoresReset,
        toys.ResetsToZero,
        toys.MixesRows,
        toys.GrowsOnce,
    ],
)
def test_a_broken_memory_is_found_and_the_count_goes_on(liar):
    found = counted(liar)
    assert found.examples == 25
    assert 1 < len(found.failures) <= 25
    assert "mask=" in found.failures[0], "what brings it back"


class Crashes(toys.SegmentMean):
    def run(self, x, state, lengths, trace):
        if x.shape[1] > 3:
            raise RuntimeError("shape")
        return super().run(x, state, lengths, trace)


def test_a_memory_that_crashes_is_counted():
    assert "RuntimeError: shape" in counted(Crashes).failures[0]


def test_a_call_of_nothing_is_refused():
    assert cuts.refuses_empty(toys.toy_case().build(), toys.WIDTH)
    assert not cuts.refuses_empty(lambda x: x, toys.WIDTH)


# Random recipes and command lines


VOCABULARY = {
    "train": [("--set", True), ("--dry-run", False), ("", True)],
    "env": [],
    "bench copy": [],
}


def test_a_case_is_made_of_its_number_alone():
    one, other = ([make(5, number, VOCABULARY) for number in range(40)] for _ in range(2))
    assert one == other
    assert len({case.words for case in one}) > 20
    assert one != [make(6, number, VOCABULARY) for number in range(40)]
    assert not any("\0" in word for case in one for word in case.words), "no shell can say it"
    assert {case.kind for case in one} == {"recipe", "command"}


def test_every_command_and_option_is_in_the_vocabulary():
    known = reliability.vocabulary()
    assert {"train", "generate", "list", "bench cost"} <= known.keys()
    assert "bench reliability" not in known, "it would begin workers of its own"
    assert ("--set", True) in known["train"]
    assert ("--dry-run", False) in known["train"]
    assert ("", True) in known["train"]


def outcome_of(run, words=("x",)):
    return fuzz.run_case(run, Case("command", words))


def trains(words):
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    return 0


def two_lines(words):
    sys.stderr.write("everlong: this\nand that\n")
    return 2


def one_line(words):
    sys.stderr.write("everlong: no such thing\n")
    return 2


def test_a_traceback_and_a_refusal_without_its_line_are_failures():
    found = outcome_of(lambda words: 1 // 0)
    assert found["outcome"] == "raised"
    assert "ZeroDivisionError" in found["place"]
    assert found["words"] == ("x",)
    assert "place" in outcome_of(two_lines)
    assert "place" in outcome_of(lambda words: 2)
    assert "place" not in outcome_of(one_line)
    assert "place" not in outcome_of(lambda words: sys.exit(1))
    assert outcome_of(one_line)["outcome"] == "exit 2"


def test_nothing_trains_and_nothing_lasts(monkeypatch):
    with no_training():
        assert outcome_of(trains)["outcome"] == "would train"
    assert outcome_of(trains)["outcome"] == "exit 0"
    monkeypatch.setattr(fuzz, "CPU_S", 0.05)

    def lasts(words):
        while True:
            pass

    assert outcome_of(lasts)["outcome"] == "limit"
    assert signal.getsignal(signal.SIGPROF) is signal.SIG_DFL


def test_random_recipes_end_in_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the whale and the sea " * 100)
    with no_training():
        lines = [fuzz.run_case(main, make(1, n, reliability.vocabulary())) for n in range(0, 40, 2)]
    assert not [line for line in lines if "place" in line]
    assert {line["outcome"] for line in lines} >= {"exit 0", "exit 2"}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("[train]\nsteps = " + "9" * 5000, "not valid TOML"),
        ("[train]\nsteps = " + "[" * 5000, "not valid TOML"),
        ("[model]\nhidden_size = 1180591620717411303424", "hidden_size is"),
        ("[model]\nnum_layers = 100000000000", "num_layers is"),
        ('[model]\nlayers = ["attention*100000000000"]', "behind the star"),
        ("[model.segment]\nnum_slots = 9223372036854775807", "num_slots is"),
        ("[model]\nhidden_size = 1073741824", "not enough memory"),
    ],
)
def test_what_random_recipes_found_is_refused(text, meant, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('base = "smoke"\n' + text)
    outcome = call(main, ["train", str(file), "--dry-run"])
    assert outcome.refused, outcome
    assert meant in outcome.said


def test_only_a_lack_of_memory_is_told_as_one(monkeypatch):
    def fails(error):
        def env():
            raise error

        monkeypatch.setattr("everlong.cli.env.env", env)
        return call(main, ["env"])

    assert "not enough memory" in fails(MemoryError()).said
    assert "not enough memory" in fails(torch.OutOfMemoryError("CUDA out of memory")).said
    assert fails(RuntimeError("value cannot be converted without overflow")).kind == "raised"


WORKER = """
import json, os, sys, time
folder, seed, first, last = sys.argv[1:]
with open(f"{folder}/cases-{seed}.jsonl", "a") as log:
    for number in range(int(first), int(last)):
        if number == 2:
            os.kill(os.getpid(), 9)
        if number == 4:
            time.sleep(60)
        log.write(json.dumps({"case": number, "kind": "recipe", "outcome": "exit 0"}) + "\\n")
        log.flush()
"""


def test_a_worker_that_dies_or_hangs_is_counted_and_the_next_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "PATIENCE_S", 0.5)
    (tmp_path / "kept").mkdir()
    doors = Doors(main, [], [sys.executable, "-c", WORKER])
    found = fuzz.measure(6, 0, tmp_path, doors, quiet)
    assert (found["tried"], found["failed"]) == (6, 2)
    assert [each["place"] for each in found["failures"]] == ["died by SIGKILL", "hung"]
    assert fuzz.measure(6, 0, tmp_path, doors, quiet) == found, "read back"
    broken = Doors(main, [], [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="the worker failed"):
        fuzz.measure(7, 0, tmp_path, broken, quiet)


# Kills


TRAINER = """
import json, os, shutil, sys, time
from pathlib import Path
words = sys.argv[1:]
forgets = words.pop(0) == "forgets"
resumed = "--resume" in words
run = Path(words[words.index("--resume" if resumed else "--out") + 1])
if not resumed:
    steps = int(next(w for w in words if w.startswith("train.steps=")).split("=")[1])
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(str(steps))
    (run / "metrics.jsonl").write_text("")
steps, value, first = int((run / "config.json").read_text()), 0, 1
if resumed:
    last = max(run.glob("checkpoint-*"))
    first = int(last.name[-8:]) + 1
    value = 0 if forgets else int((last / "weights").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [l for l in lines if json.loads(l)["step"] < first]
    (run / "aside").write_text("".join(l + chr(10) for l in kept))
    os.replace(run / "aside", run / "metrics.jsonl")
def save(folder, value):
    aside = folder.with_name("." + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    (aside / "weights").write_text(str(value))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
if not resumed:
    save(run / "checkpoint-00000000", 0)
for step in range(first, steps + 1):
    time.sleep(0.004)
    value = value * 31 % 1000003 + step
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": value, "seconds": time.time()}) + chr(10))
    if step % 2 == 0 or step == steps:
        save(run / f"checkpoint-{step:08d}", value)
save(run / "model", value)
(run / "results.json").write_text(json.dumps({"rows": [{"bits_per_byte": value}]}))
time.sleep(0.3)
"""


@pytest.mark.parametrize("kind", ["remembers", "forgets"])
def test_a_training_that_resumes_to_other_bits_is_found(kind, tmp_path):
    train = [sys.executable, "-c", TRAINER, kind]
    found = kills.measure(3, 0, tmp_path / "kills", train, quiet)
    assert (found["tried"], len(found["rows"])) == (3, 3)
    assert [row["step"] >= row["wanted_step"] for row in found["rows"]] == [True] * 3
    assert bool(found["failed"]) == (kind == "forgets"), found["differences"]
    if kind == "forgets":
        names = " ".join(found["differences"])
        assert all(name in names for name in ("checkpoint-", "model/", "metrics", "results.json"))


# Soak


class Stream(nn.Module):
    """The stateful face of a model, and nothing behind it."""

    def __init__(self, kept=0, grows=False, bad_at=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.kept, self.grows, self.bad_at = kept, grows, bad_at
        self.leak, self.calls = [], 0

    def init_state(self, rows):
        return torch.zeros(rows, 4)

    def stream(self, ids, state):
        self.calls += 1
        self.leak.append(b"x" * self.kept)
        logits = torch.zeros(*ids.shape, 3)
        if self.calls == self.bad_at:
            logits[0, 7, 1] = torch.nan
        return logits, torch.cat([state, state[:, :1]], 1) if self.grows else state


def test_a_stream_that_keeps_nothing_is_flat():
    found = soak.read(Stream(), 50_000, seed=0)
    assert found["failures"] == []
    assert (found["calls"], found["tokens"], found["state_bytes"]) == (50, 50_000, 16)
    assert [mark["tokens"] for mark in found["marks"]][-1] == 50_000


@pytest.mark.parametrize(
    ("broken", "meant"),
    [
        ({"kept": 1 << 20}, "resident memory grew by"),
        ({"grows": True}, "the state had"),
        ({"bad_at": 33}, "not finite"),
    ],
)
def test_a_stream_that_leaks_grows_or_breaks_is_found(broken, meant):
    failures = soak.read(Stream(**broken), 50_000, seed=0)["failures"]
    assert len(failures) == 1
    assert meant in failures[0]


# Damaged and hostile files


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return damaged._furnish(main, tmp_path_factory.mktemp("damaged") / "folder")


# What is not refused yet is in the table of docs/reliability.md.
HELD = [
    "a checkpoint's file cut short",
    "bits of a checkpoint flipped",
    "a checkpoint's file removed",
    "files of checkpoints swapped",
    "JSON of a checkpoint edited",
    *(kind for kind, each in DAMAGES.items() if each.door != "resume"),
]


@pytest.mark.parametrize("kind", HELD)
def test_damage_is_refused_in_one_line(kind, kept, tmp_path):
    for seed in range(2):
        told, outcome, wrong = damaged.one(main, kept, tmp_path / "place", kind, str(seed))
        assert not wrong, (told, wrong, outcome.trace)


def damage(kind, kept, place, run=main):
    return damaged.one(run, kept, place, kind, "0")[2]


def test_a_reader_that_does_not_look_is_found(kept, tmp_path, monkeypatch):
    place = tmp_path / "place"
    monkeypatch.setattr(runs, "_check_sums", lambda folder: None)
    assert "without complaint" in damage("bits of finished weights flipped", kept, place)
    monkeypatch.setattr(checkpoints, "verify", lambda path: None)
    kind = "bits of a checkpoint flipped"
    wrong = [damaged.one(main, kept, place, kind, str(seed))[2] for seed in range(6)]
    assert "it was read without complaint" in wrong

    def loses(words):
        for each in (place / "RUN").glob("checkpoint-*"):
            (each / "manifest.json").unlink()
        return one_line(words)

    monkeypatch.undo()
    lost = damage("bits of a checkpoint flipped", kept, place, loses)
    assert lost.startswith("the checkpoint before is lost")


def test_a_reader_that_waits_for_ever_is_found(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(damaged, "CPU_S", 0.05)

    def waits(words):
        while True:
            pass

    wrong = damage("bits of a checkpoint flipped", kept, tmp_path / "place", waits)
    assert wrong == "it did not come to an end"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_reader_of_pickles_is_found(elsewhere, kept, tmp_path):
    file = tmp_path / "place" / "state.safetensors"

    def reads(words):
        if elsewhere:  # where nothing is watched, a pickle still writes its file
            code = f"import pickle; pickle.load(open({str(file)!r}, 'rb'))"
            subprocess.run([sys.executable, "-c", code], capture_output=True)
            return one_line(words)
        # as torch.save writes it, pickle alone does not read it
        with file.open("rb") as data, contextlib.suppress(pickle.UnpicklingError):
            pickle.load(data)
        return one_line(words)

    kind, place = "a pickle for a state file", tmp_path / "place"
    wrong = {damaged.one(reads, kept, place, kind, str(seed))[2] for seed in range(4)}
    assert (MARKER if elsewhere else "pickle.load was called") in wrong


# The command


def test_the_command_counts_once_and_prints_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cuts, "list_memories", lambda: ["hgrn", "attention"])
    small = {"layers": ["hgrn"], "mixers": {"hgrn": {}}}
    monkeypatch.setattr(soak, "MODELS", {"hgrn": small})
    words = ["bench", "reliability", "cuts", "soak", "--examples", "2", "--tokens", "1000"]
    words += ["--out", str(tmp_path)]
    assert main(words) == 0
    assert "random calls, masks and resets" in capsys.readouterr().out
    written = json.loads((tmp_path / "reliability.json").read_text())
    assert list(written["parts"]) == ["cuts", "soak"]
    assert written["parts"]["cuts"]["tried"] == 4
    assert written["config"] == {"examples": 2, "seed": 0, "tokens": 1000}
    assert "environment" in written
    cell = tmp_path / "reliability" / "cuts.json"
    before = cell.stat().st_mtime_ns
    assert main(words) == 0
    assert cell.stat().st_mtime_ns == before
    assert main([*words, "--seed", "1"]) == 2
    assert "other options" in capsys.readouterr().err


def test_options_that_count_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kills is 0"):
        ReliabilityRun(kills=0)
    with pytest.raises(ValueError, match="no part 'cut'"):
        measure(["cut"], ReliabilityRun(), tmp_path, Doors(main, [], []))


def test_without_hypothesis_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(UserError, match=r"everlong\[dev\]"):
        counted(toys.SegmentMean)


def test_the_page_is_the_result():
    text = PAGE.read_text()
    for name, table in page.tables(json.loads(RESULT.read_text())).items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        found = text.partition(start)[2].partition(end)[0]
        assert found == table, f"put evaluation.reliability.page.tables(...)[{name!r}] there"
