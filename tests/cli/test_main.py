"""The command itself: help, errors of one line, the quiet commands, and what a shell does to it."""

import inspect
import os
import resource
import subprocess
import sys
from functools import partial

import pytest

import everlong
from everlong import registry
from everlong.cli import main

COMMANDS = ("train", "evaluate", "inspect", "generate", "list", "show", "env", "bench")


def shell(command, **options):
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=120, **options
    )


def everlong_command(words):
    return f"{sys.executable} -m everlong {words}"


def test_help_names_every_command_in_half_a_second_and_loads_no_torch(tmp_path):
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = shell(everlong_command("--help"), cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(command in done.stdout for command in COMMANDS)
    loaded = shell(
        f"{sys.executable} -X importtime -m everlong --help 2>&1 >/dev/null", cwd=tmp_path
    )
    assert "cyclopts" in loaded.stdout
    assert "torch" not in loaded.stdout
    assert min(times) < 0.5  # of a core: a busy machine does not count


@pytest.mark.parametrize("command", [*COMMANDS, "bench replay", "bench recall", "bench cost"])
def test_every_command_has_help(command, call):
    code, out, err = call(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "Usage: everlong" in out


def test_version(call):
    assert call("--version")[:2] == (0, everlong.__version__ + "\n")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("trian", "train"),
        ("train --recipes x", "--"),
        ("train smoke --device tpu", "cpu"),
        ("train smok", "smoke"),
        ("train --data ./gone", "./gone"),
        ("train --data sotuu", "'sotu'"),
        ("train --set train.step=1", "steps"),
        ("train --set model.segment.slots=1 --dry-run", "num_slots"),
        ("train --set model.hidden_size=wide --dry-run", "hidden_size"),
        ("train --set train.horizon=replya --dry-run", "replay"),
        ("train --memory memformr", "memformer"),
        ("train --tokenizer ./gone", "gone"),
        ("train --resume ./gone", "gone"),
        ("train recall --data moby_dick", "--data"),
        ("train recall --device cpu", "--device"),
        ("train recall --set train.steps=3", "task.steps"),
        ("train recall --set task.seeds=5", "seeds is 5"),
        ("train recall --set task.seeds=[]", "seeds is []"),
        ('train recall --set task.seeds=["a"]', "seeds is ['a']"),
        ("train recall --set task.distractors=3", "distractors is 3"),
        ("train recall --set task.steps=abc", "steps must be a whole number"),
        ("train recall --set task.batch_size=0", "batch_size is 0"),
        ("train recall --set task.num_symbols=abc", "num_symbols must be a whole number"),
        ("train recall --set task.form=3", "form 3"),
        ("train --set train.betas=5", "betas are 5"),
        ('train --set train.betas=["a","b"]', "betas are ['a', 'b']"),
        ("train --set train.learning_rate=abc", "learning_rate must be a number"),
        ("train --set train.clip=abc", "clip must be a number"),
        ("train --set train.weight_decay=abc", "weight_decay must be a number"),
        ("train --set train.weight_decay=inf", "weight_decay must be a number"),
        ("train --set train.seed=abc", "seed is 'abc'"),
        ("train --set train.seed=-1", "seed is -1"),
        ("train --set train.seed=9223372036854775808", "seed is"),
        ("train --set model.layers=5 --dry-run", "layers must be a list"),
        ("train --set model.mixers=3 --dry-run", "mixers must be a table"),
        ("train --set model.eos_token_id=abc --dry-run", "eos_token_id must be a token id"),
        ("train --set model.segment.segment_length=abc --dry-run", "segment_length must be"),
        ("evaluate ./gone", "gone"),
        ("generate ./gone --prompt x", "gone"),
        ("generate", "RUN"),
        ("show memformr", "memformer"),
        ("list *nothing*", "nothing"),
        ("bench replya", "replay"),
        ("bench recall default", "recall"),
        ("bench cost memformr", "memformer"),
        ("bench cost rmt --peers", "rmt"),
        ("bench cost --device tpu", "cpu"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_meant(words, meant, refused):
    assert meant in refused(*words.split())


def test_a_device_that_is_not_there_is_refused(refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "cuda" in refused("train", "smoke", "--device", "cuda", "--dry-run")


def test_list_is_the_registry(call):
    code, out, _ = call("list")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert sorted(lines) == registry.list_memories()
    assert "grows" in lines["attention"]
    for name, line in lines.items():
        assert ("grows" in line) != registry.memory_entry(name).bounded


def test_list_takes_a_pattern(call):
    assert {line.split()[0] for line in call("list", "*g_attention")[1].splitlines()[1:]} == {
        "sliding_attention",
    }


def test_show_gives_options_defaults_paper_and_bytes(call):
    code, out, _ = call("show", "memformer")
    assert code == 0
    for words in ("arXiv 2010.06891", "num_slots = 64", "hidden_size = (the model's)", "Bytes of"):
        assert words in out


def test_env_says_what_a_bug_report_needs(call):
    code, out, _ = call("env")
    assert code == 0
    found = dict(line.split(": ", 1) for line in out.splitlines())
    assert found["everlong"] == everlong.__version__
    assert {"git", "python", "platform", "torch", "cuda", "mps"} <= {*found}


def test_the_replay_benchmark_prints_a_table_and_writes_it(call, tmp_path, monkeypatch):
    from everlong.evaluation import replay_cost

    sizes = {"hidden_size": 16, "num_heads": 2, "num_slots": 2, "segment_length": 4}
    small = partial(replay_cost.ReplayCost, counts=(2,), rounds=1, batch_size=1, **sizes)
    monkeypatch.setattr(replay_cost, "ReplayCost", small)
    code, out, _ = call("bench", "replay", "--out", tmp_path)
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:7]] == [
        [form, "2", method]
        for form in ("whole", "quarter")
        for method in ("BPTT", "checkpoint", "replay")
    ]
    assert {file.name for file in tmp_path.iterdir()} == {"replay.json", "replay.png"}


def test_the_cost_benchmark_prints_tables_and_writes_them(call, tmp_path, monkeypatch):
    from everlong.evaluation import cost_bench

    sizes = {"hidden_size": 16, "num_heads": 2, "lengths": (4, 8), "unbounded_length": 4}
    more = {"replayed": (16,), "positions": (16, 24), "segment": 8, "size": "small", "matmul": 32}
    model = {"parameters": 30_000, "model_layers": 1, "model_length": 4}
    times = {"rounds": 1, "least": 1, "decoded": 1, "pairs": 1, "near": 4}
    small = partial(cost_bench.CostRun, **sizes, **more, **model, **times)
    monkeypatch.setattr(cost_bench, "CostRun", small)
    words = ("bench", "cost", "rmt", "attention", "--device", "cpu", "--out", tmp_path)
    code, out, err = call(*words, "--patience", "0")
    assert code == 0, err
    assert "attention, 2 of 2, is measured" in err
    lines = out.splitlines()
    assert max(map(len, lines)) <= 160
    assert [line.split()[0] for line in lines[:6]] == ["memory", "rmt", "attention"] * 2
    assert "left out: rmt, decode 24: patience of 0.0 s was over after 16 tokens" in out
    assert "decoding far over decoding near, " in out
    assert "bounded memories at twice the length: read " in out
    assert "processor time on cpu" in out
    assert {file.name for file in tmp_path.iterdir()} == {"cost", "cost.json", "cost.png"}


def test_the_scans_are_timed_beside_their_peers(call, tmp_path, monkeypatch):
    from everlong.cli import cost
    from everlong.evaluation import cost_peers

    monkeypatch.setattr(cost, "_bench_models", lambda *words: None)
    sizes = {"length": 8, "num_heads": 1, "head_size": 4}
    small = partial(cost_peers.PeersRun, rounds=1, threads=(1,), **sizes)
    monkeypatch.setattr(cost_peers, "PeersRun", small)
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)  # as if it were not installed
    code, out, err = call("bench", "cost", "--peers", "--device", "cpu", "--out", tmp_path)
    assert code == 0, err
    assert "transformers qwen3_next, chunks" in out
    assert "dplr, a decay a channel" in out
    assert "everlong[peers]" in out
    assert [file.name for file in tmp_path.iterdir()] == ["cost-peers.json"]


def test_our_value_errors_are_the_users_and_any_other_is_a_bug(call, monkeypatch):
    monkeypatch.setattr("everlong.cli.env.env", lambda: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["env"])


def test_what_a_builtin_raises_in_our_own_frames_is_a_bug_too(monkeypatch):
    ours = {"__name__": "everlong.somewhere"}
    for body in ("int('x')", "'\\udcff'.encode()", "raise UnicodeError('no')"):
        exec(f"def broken():\n {body}", ours)
        monkeypatch.setattr("everlong.cli.env.env", ours["broken"])
        with pytest.raises(ValueError):  # noqa: PT011 (whichever it is)
            main(["env"])


def test_a_value_error_we_raise_is_one_line(refused, monkeypatch):
    ours = {"__name__": "everlong.somewhere"}
    exec("def broken():\n raise ValueError('turn left')", ours)
    monkeypatch.setattr("everlong.cli.env.env", ours["broken"])
    assert refused("env") == "everlong: turn left"


def test_an_empty_path_is_not_the_current_folder(refused, tmp_path, monkeypatch):
    (tmp_path / "private").write_text("not to be read" * 100)
    monkeypatch.chdir(tmp_path)
    assert "names no text" in refused("train", "--data", "", "--dry-run")


def test_a_closed_standard_output_or_input_is_said(tiny_run):
    done = shell(everlong_command("env") + " >&-")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "output is closed" in done.stderr
    done = shell(everlong_command(f"generate {tiny_run} --stdin") + " <&-")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "input is closed" in done.stderr


def test_ctrl_c_ends_with_130(call, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("everlong.cli.env.env", stop)
    code, _, err = call("env")
    assert (code, err) == (130, "everlong: interrupted\n")


def test_a_reader_that_leaves_ends_it_quietly(tiny_run, tmp_path):
    command = everlong_command(f"generate {tiny_run} --prompt x --max-new-tokens 3000")
    done = shell(f"({command}; echo $? >code) | head -c 1 >/dev/null", cwd=tmp_path)
    assert done.stderr == ""
    assert (tmp_path / "code").read_text() == "0\n"


def test_nothing_is_written_to_a_full_standard_output_in_silence(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = shell(everlong_command("env") + " >/dev/full", cwd=tmp_path)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_benchmark_is_a_command():
    from everlong import cli
    from everlong.cli import bench

    functions = {
        name
        for name, found in vars(bench).items()
        if inspect.isfunction(found) and not name.startswith("_")
    }
    assert functions == set(cli._BENCHES)
