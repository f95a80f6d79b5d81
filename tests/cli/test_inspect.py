"""`everlong inspect`: what a memory told of a text, and the page that shows it."""

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import everlong
from everlong import state as states
from everlong.cli.inspect import token_texts
from everlong.evaluation import inspection_page
from everlong.evaluation.inspection import inspect_stream
from everlong.evaluation.inspection_page import About, page
from everlong.evaluation.svg import Line, chart
from everlong.records import RECORDS
from everlong.registry import list_memories, memory_entry

TEXT = (
    b"Call me Ishmael. Some years ago - never mind how long precisely - having little money.\n" * 3
)
HOSTILE = (
    b'</script><script>document.title="bad"</script><img src=x onerror="document.title=1"> {{js}} '
    b"\\u003c <!-- \xe2\x80\xae \xc3\xa9 \xff $& & ]]>\n"
)


def small_model(name, **options):
    """Two layers, 12 wide, of the memory's test sizes."""
    entry = memory_entry(name)
    if entry.room == "segments":
        memory = {"segment": {"name": name, **entry.small, **options}}
    else:
        memory = {"layers": [name], "mixers": {name: {**entry.small, **options}}}
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_heads": 3, "num_layers": 2}
    return everlong.EverlongForCausalLM(everlong.EverlongConfig(**sizes, **memory)).eval()


def ids_of(text):
    return np.array([256, *text])


def data_of(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


def table(packed):
    rows, columns = packed["shape"]
    levels = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).reshape(rows, columns)
    values = packed["low"] + (packed["high"] - packed["low"]) * levels / 254
    return np.where(levels == 255, np.nan, values)


class Elements(HTMLParser):
    """The tags of a page, their addresses, and the text outside scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("name", list_memories())
def test_a_memory_is_read_alike_with_a_trace_and_tells_what_the_table_of_records_says(name):
    model, ids = small_model(name), ids_of(TEXT[:60])
    step = max(model.period, 8)
    found = inspect_stream(model, ids, step, tokens=40, segments=4)
    assert found.left_out == []
    state, logits = model.init_state(1), []
    with torch.no_grad():
        for start in range(0, len(ids), step):
            more, state = model.stream(torch.from_numpy(ids[None, start : start + step]), state)
            logits.append(more[0])
        _, traced = model.stream(torch.from_numpy(ids[None]), None, None, everlong.Trace())
        _, plain = model.stream(torch.from_numpy(ids[None]))
    pairs = zip(states.leaves(traced), states.leaves(plain), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    costs = torch.nn.functional.cross_entropy(
        torch.cat(logits)[:-1], torch.from_numpy(ids[1:]), reduction="none"
    )
    bits = costs.double() / math.log(2)
    np.testing.assert_allclose(found.bits[1:], bits, rtol=1e-6)
    assert np.isnan(found.bits[0])
    assert found.segments[-1].num_bytes == states.num_bytes(state)
    assert sum(each.bits for each in found.segments) == pytest.approx(float(bits.sum()))
    for each in found.positions:
        assert each.values.shape[0] == 40
        assert np.isfinite(each.values).all()
        if each.name in ("read", "decay"):
            assert each.values.min() >= 0
            assert each.values.max() <= 1
    for writes in found.writes:
        for told in ("kept", "faded", "recall"):
            shown = writes.table(told, found.written)
            if shown is not None:
                known = shown[np.isfinite(shown)]
                assert known.min() >= 0
                assert known.max() <= 1 + 1e-6


def test_every_memory_that_should_tell_does():
    told = {}
    for name in list_memories():
        found = inspect_stream(small_model(name), ids_of(TEXT[:40]), 8, tokens=40, segments=9)
        told[name] = {each.name for each in found.positions}
        told[name] |= {key for writes in found.writes for key in writes.found}
    both = inspect_stream(small_model("memformer", encoder_layers=1), ids_of(TEXT[:40]), 4, 40, 9)
    shown = [(each.name, each.values.shape) for each in both.positions]
    pairs = [("encoded", (40, 3)), *[("looked", (40, 4))] * 2]
    assert (shown, both.left_out) == (pairs, [])
    assert set().union(*told.values()) | {"encoded", "looked"} == set(RECORDS)
    assert told["memformer"] == {"read", "kept", "faded", "took"}
    assert told["rmt"] == told["lamemo"] == told["armt"] == {"kept"}
    assert told["hmt"] == {"kept", "recall"}
    assert told["gated_deltanet"] == told["kda"] == {"decay", "strength", "kept", "faded"}
    assert told["titans"] == told["titans_mac"] == {"decay", "surprise", "kept", "faded"}
    assert told["transformer_xl"] == set()


def test_a_memformer_shares_out_its_slots_and_its_reading():
    model, ids = small_model("memformer"), ids_of(TEXT[:31])
    found = inspect_stream(model, ids, 4, tokens=30, segments=9)
    for each in found.positions:
        np.testing.assert_allclose(each.values.sum(1), 1, atol=1e-6)
    (writes,) = found.writes
    assert [index for index, _ in writes.found["took"]] == list(range(8))
    for (_, took), (_, kept) in zip(writes.found["took"], writes.found["kept"], strict=True):
        assert took.shape == (3, 4)
        np.testing.assert_allclose(took.sum(1) + kept, 1, atol=1e-6)
    gated = small_model("memformer", gate=True)
    told = inspect_stream(gated, ids, 4, tokens=30, segments=9).writes[0].found
    for (_, took), (_, kept) in zip(told["took"], told["kept"], strict=True):
        np.testing.assert_allclose(took.sum(1) + kept, 1, atol=1e-6)


def test_what_is_not_one_record_a_token_or_has_no_known_name_is_left_out_and_said(monkeypatch):
    torch.manual_seed(0)
    memory = {"name": "rmt", **memory_entry("rmt").small}
    sizes = {"hidden_size": 12, "num_heads": 3, "num_layers": 1, "layers": ["gated_deltanet"]}
    model = everlong.EverlongForCausalLM(everlong.EverlongConfig(**sizes, segment=memory)).eval()
    mixer = model.body.core.core.blocks[0].mixer
    monkeypatch.setattr(mixer, "_tell", lambda trace, x: trace.record("mine", x))
    assert inspect_stream(model, ids_of(TEXT[:20]), 4, 20, 9).left_out == [
        "mine: no name of everlong.records"
    ]
    monkeypatch.undo()
    found = inspect_stream(model, ids_of(TEXT[:20]), 4, 20, 9)
    assert [line.split(":")[0] for line in found.left_out] == ["decay", "strength"]
    assert found.positions == []
    assert [each.label for each in found.writes] == ["memory", "layer 1"]


def test_a_page_of_too_many_numbers_shows_the_mean_over_layers_and_says_so(monkeypatch):
    found = inspect_stream(small_model("memformer"), ids_of(TEXT[:20]), 4, 21, 9)
    about = About("memformer", "keeps", {}, "here")
    whole = page(found, ["x"] * 21, about, {})
    monkeypatch.setattr(inspection_page, "_CELLS", 50)
    small = page(found, ["x"] * 21, about, {})
    parts = [
        [each["part"] for each in data_of(html)["sources"] if each["name"] == "read"]
        for html in (whole, small)
    ]
    assert parts == [["layer 1", "layer 2"], ["mean of 2 parts"]]
    assert ["only their mean" in html for html in (whole, small)] == [False, True]


def test_what_a_head_keeps_of_a_segment_is_the_product_of_its_decays():
    model = small_model("gated_deltanet")
    ids = ids_of(TEXT[:15])
    heard, mixer = [], model.body.core.blocks[1].mixer
    mixer.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    found = inspect_stream(model, ids, 8, tokens=16, segments=2)
    left = mixer.decay(heard[0]).exp().prod(1)[0].detach()
    writes = next(each for each in found.writes if each.label == "layer 2")
    assert writes.unit == "head"
    np.testing.assert_allclose(1 - writes.table("faded", 2)[:, 0], left, atol=1e-6)


def test_the_surprise_of_titans_is_the_error_before_it_learns():
    memory = everlong.create_memory("titans", size="small", hidden_size=12, num_heads=3)
    x, trace = torch.randn(1, 9, 12), everlong.Trace()
    _, state = memory(x[:, :4])
    memory(x, trace=trace)
    (surprise,) = trace.records["surprise"]
    assert surprise.shape == (1, 9, 3)
    _, written, _ = memory._written(x[:, 4:8], state, None, torch.float32)
    k, v = written["keys"][0, 0, :, None], written["values"][0, 0]
    first, second = (weight[0] for weight in state["weights"])
    said = k + torch.nn.functional.gelu(k @ first) @ second
    torch.testing.assert_close(surprise[0, 4], (v - said[:, 0]).norm(dim=-1))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tiny_run):
    """The page of a tiny Memformer that read a hostile text, and that text's file."""
    folder = tmp_path_factory.mktemp("inspect")
    text = folder / "a <b>&.txt"
    text.write_bytes(HOSTILE + TEXT)
    assert everlong_main("inspect", tiny_run, "--text", text, "--out", folder / "page.html") == 0
    return folder / "page.html", text


def everlong_main(*words):
    from everlong.cli import main

    return main([str(word) for word in words])


def test_a_token_cannot_end_the_data():
    """A tokenizer's token may be a whole tag."""
    found = inspect_stream(small_model("memformer"), ids_of(b"ab"), 8, tokens=2, segments=1)
    bad = "</script><script>"
    html = page(found, [bad, bad], About("m", "k", {"run": bad}, "made"), {})
    assert html.count("</script>") == 2
    assert data_of(html)["tokens"] == [bad, bad]


def test_a_page_holds_all_and_needs_nothing(hostile):
    file, text = hostile
    html, length = file.read_text("utf-8"), len(text.read_bytes()) + 1
    found = Elements(html)
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert found.links == ["data:,"]
    assert not re.search(r"https?://|@import|url\(", html)
    assert text.name in " ".join(found.texts)
    data = data_of(html)
    assert len(data["tokens"]) == len(data["bits"]) == length
    assert "".join(data["tokens"]).startswith('⟨bos⟩</script><script>document.title="bad"')
    assert data["segments"][1][:2] == [8, 16]
    places = {name: table(each) for name, each in data["places"][0]["tables"].items()}
    total = sum(places.values())
    written = length // 8
    np.testing.assert_allclose(total[:, :written], 1, atol=0.02)
    assert np.isnan(total[:, written:]).all()
    sources = {each["name"]: table(each["table"]) for each in data["sources"]}
    assert np.isnan(sources["read"][0]).all()  # nothing predicts the first token
    np.testing.assert_allclose(sources["read"][1:].sum(1), 1, atol=0.02)
    assert sources["took"].shape == (length, 2)
    titles = "Bytes of state", "Surprise", "Bits per byte", "Learning rate", "Gradient norm"
    assert all(f"<figcaption>{title}" in html for title in titles)


def test_the_page_says_what_it_leaves_out(call, tiny_run, tmp_path):
    assert "--tokens" in call("inspect", "--help")[1]
    (tmp_path / "text").write_bytes(TEXT)
    words = "inspect", tiny_run, "--text", tmp_path / "text", "--out", tmp_path / "page.html"
    code, out, _ = call(*words, "--tokens", 20)
    html = (tmp_path / "page.html").read_text("utf-8")
    assert (code, "page.html" in out) == (0, True)
    assert f"the first 20 of {len(TEXT) + 1}" in html
    assert len(data_of(html)["tokens"]) == 20


def test_an_extended_model_is_read_in_its_own_tokens_and_a_silent_memory_says_so(call, tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    (tmp_path / "text").write_bytes(TEXT)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    for name, options in (("armt", {"num_slots": 3}), ("no_memory", {})):
        config = LlamaConfig(
            vocab_size=len(fast), num_attention_heads=2, bos_token_id=0, eos_token_id=None, **sizes
        )
        model = everlong.extend(LlamaForCausalLM(config), name, segment_length=16, **options)
        model.save_pretrained(tmp_path / name)
        fast.save_pretrained(tmp_path / name)
        code, _, err = call("inspect", tmp_path / name, "--text", tmp_path / "text")
        assert code == 0, err
        html = (tmp_path / name / "inspect.html").read_text("utf-8")
        data = data_of(html)
        assert data["tokens"][:5] == ["<s>", "C", "a", "l", "l"]
        assert "no training curves" in html
        parts = [(each["part"], each["tables"]["kept"]["shape"]) for each in data["places"]]
        segments = -(-(len(TEXT) + 1) // 16)
        silent = "records nothing" in html
        expected = [(f"layer {layer}", [3, segments]) for layer in (1, 2)]
        assert (parts, silent) == (([], True) if name == "no_memory" else (expected, False))
    code, _, err = call("inspect", tmp_path / "armt", "--text", tmp_path / "text")
    assert (code, "inspect.html exists" in err) == (2, True)
    code, out, err = call("evaluate", tmp_path / "armt", "--text", tmp_path / "text")
    assert (code, "bits per byte" in out) == (0, True), err


def test_what_cannot_be_inspected_is_one_line(refused, tiny_run, tmp_path):
    text, empty, out = tmp_path / "text", tmp_path / "empty", tmp_path / "page.html"
    text.write_bytes(TEXT)
    empty.touch()
    assert "no run at" in refused("inspect", tmp_path / "gone", "--text", text)
    assert "gone" in refused("inspect", tiny_run, "--text", tmp_path / "gone")
    assert "is empty" in refused("inspect", tiny_run, "--text", empty)
    assert "one file" in refused("inspect", tiny_run, "--text", "sotu")
    assert "--text" in refused("inspect", tiny_run)
    assert "--tokens is 0" in refused("inspect", tiny_run, "--text", text, "--tokens", 0)
    assert "give another file" in refused(
        "inspect", tiny_run, "--text", text, "--out", tmp_path / "no" / "page.html"
    )
    out.write_text("mine")
    assert "exists" in refused("inspect", tiny_run, "--text", text, "--out", out)
    assert out.read_text() == "mine"


def test_a_page_that_fails_leaves_no_file(call, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(TEXT)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("everlong.evaluation.inspection.inspect_stream", stop)
    words = "inspect", tiny_run, "--text", tmp_path / "text", "--out", tmp_path / "page.html"
    assert call(*words)[0] == 130
    assert not (tmp_path / "page.html").exists()


def test_tokens_are_shown_as_characters_and_what_does_not_print_is_spelled():
    ids = np.array([256, *"é a\n\t".encode(), 0xFF, 0xE2, 0x80, *"\u202e".encode(), 257])
    spelled = ["\\t", "\\xff", "\\xe2", "\\x80", "\\u202e"]
    expected = ["⟨bos⟩", "é", "·", " ", "a", "\n", *spelled, "·", "·", "⟨⟩"]
    assert token_texts(ids, None) == expected


def test_a_chart_has_gaps_round_ticks_and_escaped_names():
    svg = chart(
        "a < b", "x", [Line("<i>", [0, 1, 2, 3], [1.0, 2.0, math.nan, 4.0]), Line("", [0], [0])]
    )
    assert svg.count("<polyline") == 1
    assert svg.count("<circle") == 2
    assert "<i>" not in svg
    assert ">0</text>" in svg
    long = chart("t", "x", [Line("", range(100_000), [5.0] * 100_000)])
    assert len(long) < 20_000
    assert chart("t", "x", [Line("", [0], [math.nan])]) == ""


KEYS = """<script>
const press = (id, key) => document.getElementById(id).dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const tell = (name, value) => document.body.setAttribute("data-" + name, value);
const text = (id) => document.getElementById(id).textContent;
tell("start", text("token-now"));
for (let i = 0; i < 9; i++) press("tokens", "ArrowRight");
tell("right", text("token-now"));
tell("followed", text("grid-now"));
press("tokens", "PageDown");
tell("page", text("token-now"));
press("tokens", "End");
tell("end", document.querySelector("#tokens [aria-selected]").id);
document.getElementById("t3").click();
tell("click", document.getElementById("tokens").getAttribute("aria-activedescendant"));
press("grid", "ArrowRight"); press("grid", "ArrowDown");
tell("grid", text("grid-now"));
document.querySelectorAll("#measure button")[1].click();
tell("measure", text("grid-now"));
document.querySelector(".bars i:nth-child(2)").click();
tell("colour", document.getElementById("colour").selectedOptions[0].textContent
  + document.getElementById("unit").value);
tell("painted", [...document.querySelectorAll("#tokens span")].filter(
  (span) => Number(span.style.getPropertyValue("--a")) > 0).length);
const canvas = document.getElementById("grid");
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
tell("drawn", pixels.some((value) => value > 0));
tell("wide", document.documentElement.scrollWidth <= window.innerWidth);
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")
def test_the_page_works_in_a_browser_by_keys_and_clicks(hostile, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(hostile[0].read_text("utf-8").replace("</body>", KEYS + "</body>"), "utf-8")
    options = "--headless=new --no-sandbox --disable-gpu --window-size=500,900 --dump-dom"
    logging = "--enable-logging=stderr --virtual-time-budget=2000"
    done = subprocess.run(
        [
            "chromium",
            *options.split(),
            *logging.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", done.stdout)[0]))
    assert re.fullmatch(r"&lt; token 1, segment 1: \S+ bits", found["start"].replace("<", "&lt;"))
    assert "token 10, segment 2" in found["right"]
    assert "Segment 2, tokens 8 to 15" in found["followed"]
    assert "token 16, segment 3" in found["page"]
    last = len(hostile[1].read_bytes())
    assert (found["end"], found["click"]) == (f"t{last}", "t3")
    assert "Segment 2" in found["grid"]
    assert "slot 2, kept" in found["grid"]
    assert "slot 2, overwritten" in found["measure"]
    assert found["colour"] == "read2"
    assert int(found["painted"]) > 20
    assert (found["drawn"], found["wide"]) == ("true", "true")
    assert "<title>memformer: what it kept</title>" in done.stdout
