"""`everlong bench cost --peers`, its third part: whole language models beside ours."""

import json
import sys

import pytest
import torch

from everlong.cli import cost
from everlong.evaluation import model_contests, model_peers
from everlong.evaluation.model_contests import Missing, contests
from everlong.evaluation.model_forms import num_bytes
from everlong.evaluation.model_peers import ModelsRun, measure, write

TINY = ModelsRun(
    width=16, heads=2, layers=4, segment=4, slots=2, length=8, positions=(8, 16), rounds=1
)
ELSEWHERE = ("memformer", "recurrent_memory_transformer_pytorch", "titans_pytorch")
TRANSFORMERS = ["GPT2", "Mamba2", "Rwkv", "Qwen3Next"]


@pytest.fixture(scope="module")
def found():
    """Transformers' own, with the extra not there."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ELSEWHERE:
            patch.setitem(sys.modules, name, None)
        return measure(TINY)


def test_every_model_is_trained_and_decodes_beside_ours(found):
    rows, _ = found
    peers = list(dict.fromkeys(row["beside"] for row in rows))
    assert peers == [f"transformers {name}" for name in TRANSFORMERS]
    for peer in peers:
        forms = list(dict.fromkeys(row["form"] for row in rows if row["beside"] == peer))
        assert forms[0] == peer
        assert len(forms) == (3 if peer.endswith("GPT2") else 2)
        theirs = [row for row in rows if row["form"] == peer]
        assert [(row["kind"], row["length"]) for row in theirs] == [
            ("train", 8),
            ("decode", 8),
            ("decode", 16),
        ]
        for row in rows:
            if row["beside"] == peer:
                assert row["parameters"] == pytest.approx(theirs[0]["parameters"], rel=0.01)
                assert row["decode_difference"] < 1e-4
                assert ("times_theirs" in row) == (row["form"] != peer)


def test_times_theirs_is_their_time_over_ours():
    row = {"kind": "train", "length": 8, "beside": "a"}
    theirs = {**row, "form": "a", "took_cpu": 6.0, "all_took_cpu": [5.0, 6.0, 8.0]}
    ours = {**row, "form": "b", "took_cpu": 2.0, "all_took_cpu": [2.0, 2.0, 2.0]}
    _, found = model_peers._compared([theirs, ours], TINY)
    assert found["times_theirs"] == {"times": 3.0, "range": [2.5, 4.0]}
    assert found["tokens_per_second"] == 5e5


def test_a_cache_grows_and_a_state_does_not(found):
    held = {}
    for row in found[0]:
        if row["kind"] == "decode":
            held.setdefault(row["form"], []).append(row["state_bytes"])
    full = 4 * 2 * 16 * 4  # layers, keys and values, width, bytes of a number
    assert held["transformers GPT2"] == [8 * full, 16 * full]
    for form in ("transformers Mamba2", "transformers Rwkv", "ours, gated_deltanet"):
        assert len(set(held[form])) == 1
    shared = torch.zeros(8)
    assert num_bytes({"a": [shared, shared], "b": (shared[:2], 7)}) == 32 + 8


def test_a_missing_package_is_one_line_that_names_the_extra(found):
    _, missing = found
    assert [line.split(" is not timed")[0].replace("-", "_") for line in missing] == list(ELSEWHERE)
    for line in missing:
        assert 'pip install "everlong[peers]"' in line
        assert "\n" not in line


def test_a_model_that_does_not_decode_what_it_says_is_no_peer(monkeypatch):
    def broken(config):
        model = model_contests._gpt2(config)
        model.read = lambda ids: type(model).read(model, ids[:, 1:])
        return model

    monkeypatch.setattr(model_peers, "contests", lambda config: [lambda: [broken(config)]])
    with pytest.raises(AssertionError, match="GPT2: decoding differs by"):
        measure(TINY)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_those_of_the_extra_decode_what_they_say_of_the_whole_text(index):
    try:
        models = list(contests(TINY))[index]()
    except Missing as missing:
        pytest.skip(str(missing))
    for model in models:
        (state, _) = model_peers._states(model, TINY)
        assert model_peers._difference(model, state, TINY) < 1e-4
        model_peers._train(model, torch.zeros(1, 9, dtype=torch.long))
        trained = [p.grad for p in model.net.parameters() if p.grad is not None]
        assert sum(grad.numel() for grad in trained) >= model.parameters
        assert all(bool(grad.isfinite().all()) for grad in trained)


def test_printed_and_written(found, tmp_path, monkeypatch, capsys):
    rows, missing = found
    monkeypatch.setattr(model_peers, "ModelsRun", lambda: TINY)
    monkeypatch.setattr(model_peers, "measure", lambda config, say: found)
    cost._bench_models("cpu", tmp_path, print)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 160
    assert [line.split("  ")[0] for line in printed.splitlines()[1:4]] == [
        "transformers GPT2",
        "ours, attention",
        "ours, gated_deltanet",
    ]
    assert missing[0] in printed
    read = json.loads((tmp_path / "model-peers.json").read_text())
    assert read["command"] == "everlong bench cost --peers"
    assert read["rows"] == json.loads(json.dumps(rows))
    assert read["config"]["positions"] == [8, 16]
    write(tmp_path / "again.json", TINY, rows, missing)
    cost._bench_models("cuda", tmp_path, print)
    assert "--device cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"positions": ()}, "positions is"),
        ({"positions": (130,)}, "positions: 130 is no multiple of segment, 128"),
        ({"length": 100}, "length: 100 is no multiple"),
        ({"layers": 6}, "layers is 6"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        ModelsRun(**options)
