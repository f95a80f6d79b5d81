"""The memories that learn at test time: choices, presets, and the layers they contain."""

import pytest
import torch

import everlong
from everlong import state as states
from laws.cases import memory_case
from laws.checks import check

D, H = 12, 2
PRESETS = ("titans", "moneta", "yaad", "memora", "omeganet", "atlas")
VARIANTS = {
    "linear": ("miras", {"depth": 1}),
    "deep": ("miras", {"depth": 3}),
    "norm": ("miras", {"norm": True}),
    "no convolution": ("miras", {"conv_size": 0, "gate": False}),
    "free keys": ("miras", {"depth": 1, "bias": "dot", "unit_keys": False}),
    "wide values": ("miras", {"key_size": 3, "value_size": 5}),
    "chunks of one": ("miras", {"chunk_size": 1}),
    "odd chunks": ("miras", {"chunk_size": 5, "window": 7}),
    "l1": ("miras", {"bias": "l1", "step_size": 0.02}),
    "shift": ("miras", {"bias": "shift"}),
    "dot": ("miras", {"bias": "dot", "channel_steps": True}),
    "nothing fades": ("miras", {"retention": "none"}),
    "elastic": ("miras", {"retention": "elastic"}),
    "momentum": ("miras", {"algorithm": "momentum", "window": 2, "max_surprise": 0.5}),
    "decay first": ("titans", {"depth": 1, "decay_first": True}),
    "published titans": ("titans", {"max_surprise": None}),
    "dual map": ("moneta", {"map": "dual"}),
    "coordinates": ("yaad", {"form": "coordinate"}),
    "cubes": ("omeganet", {"degree": 3, "key_size": 2}),
    "muon every position": ("atlas", {"every": 1}),
    "muon every chunk": ("atlas", {"every": None}),
}


def make(name, **options):
    torch.manual_seed(0)
    memory = everlong.create_memory(name, hidden_size=D, num_heads=H, **options).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return memory


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("law", ["1 any cut", "2 reference", "3 causal", "4 mask", "5 bounded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_obeys(variant, law, tmp_path):
    name, options = VARIANTS[variant]
    check(law, memory_case(name, **options), tmp_path)


NORMED = {"norm": True, "channel_steps": True}
OMEGA = {"key_size": 16, "degree": 2, "window": 8, "step_size": 0.1}
CHOICES = {
    "titans": {"algorithm": "momentum", "step_size": 0.05, "max_surprise": 1.0},
    "moneta": {**NORMED, "bias": "lp", "retention": "lq", "step_size": 0.01, "max_surprise": 1.0},
    "yaad": {**NORMED, "bias": "huber"},
    "memora": {**NORMED, "retention": "softmax"},
    "omeganet": OMEGA,
    "atlas": {**OMEGA, "algorithm": "muon", "every": 4},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_choices(name):
    """`miras` with the choices of the page, under the same parameters, gives the same bits."""
    preset = everlong.create_memory(name, hidden_size=24, num_heads=1)
    general = everlong.create_memory("miras", hidden_size=24, num_heads=1, **CHOICES[name])
    general.load_state_dict(preset.state_dict())
    x = noise(2, 19).float()[..., None] * noise(24, seed=2).float()
    (a, state), (b, other) = preset(x), general(x)
    assert torch.equal(a, b)
    for one, two in zip(states.leaves(state), states.leaves(other), strict=True):
        assert torch.equal(one, two)


def as_layer(kind, **options):
    """A linear layer of `kind`, and Miras with the same maps, whose memory starts at 0."""
    layer = make(kind, **options)
    corrects = kind != "linear_attention"
    miras = make(
        "miras",
        depth=1,
        residual=False,
        chunk_size=1 if corrects else 4,
        bias="l2" if corrects else "dot",
        retention="l2" if kind == "gated_deltanet" else "none",
        decay_first=kind == "gated_deltanet",
        step_size=1.0,
        conv_size=4 if corrects else 0,
        unit_keys=corrects,
        gate=kind == "gated_deltanet",
        key_size=layer.sizes[0],
        value_size=layer.sizes[1],
    )
    with torch.no_grad():
        miras.qkv.weight.copy_(layer.qkv.weight)
        miras.out.weight.copy_(layer.out.weight)
        miras.norm.weight.copy_(layer.norm.weight)
        miras.norm.eps = layer.norm.eps * layer.sizes[0]  # its q is not divided by sqrt(K)
        miras.start[0].zero_()
        if corrects:
            miras.convolution.weight.copy_(layer.convolution.weight)
        if miras.gate is not None:
            miras.gate.weight.copy_(layer.gate.weight)
    return layer, miras


def set_gate(miras, name, weight, bias):
    """Rows of the map of gates, [H, W, ...] of the gate `name`."""
    widths = list(miras.gates.widths.values())
    first = sum(widths[: list(miras.gates.widths).index(name)])
    with torch.no_grad():
        rows = miras.gates.map.weight.view(H, -1, D), miras.gates.map.bias.view(H, -1)
        rows[0][:, first], rows[1][:, first] = weight, bias


def assert_same_layer(layer, miras, x):
    (a, state), (b, other) = layer(x), miras(x)
    torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other["weights"][0], state["memory"], rtol=1e-9, atol=1e-9)


def test_deltanet_is_one_of_them():
    layer, miras = as_layer("deltanet")
    set_gate(miras, "write", layer.beta.weight, 0.0)
    assert_same_layer(layer, miras, noise(2, 21, D))


def test_linear_attention_is_one_of_them():
    layer, miras = as_layer("linear_attention", feature_map="identity")
    set_gate(miras, "write", 0.0, 50.0)  # every step is 1
    assert_same_layer(layer, miras, noise(2, 20, D))  # whole chunks: the state is that of now


def test_gated_deltanet_is_one_of_them(monkeypatch):
    """Its decay is no sigmoid: both are given the same one, which the input sets."""
    layer, miras = as_layer("gated_deltanet")
    set_gate(miras, "write", layer.beta.weight, 0.0)
    weight = noise(H, D, seed=5)
    set_gate(miras, "keep", weight, 1.0)
    decay = lambda x: torch.nn.functional.logsigmoid(x @ weight.T + 1)  # noqa: E731
    monkeypatch.setattr(layer, "decay", decay)
    assert_same_layer(layer, miras, noise(2, 21, D))
    options = {k: v for k, v in vars(miras.config).items() if k not in ("hidden_size", "num_heads")}
    late = make("miras", **{**options, "decay_first": False})
    late.load_state_dict(miras.state_dict())
    assert (late(noise(2, 21, D))[0] - layer(noise(2, 21, D))[0]).abs().max() > 1e-3


def test_moneta_at_two_and_two_is_yaad_without_outliers_and_titans_without_momentum():
    """p = q = 2 has gradient 2 e and W = A: the squared error, at steps half as large."""
    common = {"depth": 2, "residual": True}
    moneta = make("miras", **common, bias="lp", exponent=2.0, retention="lq", power=2.0)
    x = noise(2, 21, D)
    wanted = make("miras", **common, step_size=0.2)
    huber = make("miras", **common, bias="huber", step_size=0.2)
    titans = make("miras", **common, algorithm="momentum", step_size=0.2)
    for other in (wanted, huber, titans):
        other.load_state_dict(
            {
                **other.state_dict(),
                **{k: v for k, v in moneta.state_dict().items() if "gates" not in k},
            }
        )
        shared = list(moneta.gates.widths)  # keep, write
        for name in shared:
            first = shared.index(name)
            rows = moneta.gates.map.weight.view(H, -1, D)[:, first]
            set_gate(other, name, rows, moneta.gates.map.bias.view(H, -1)[:, first])
    set_gate(huber, "level", 0.0, 1e6)
    set_gate(titans, "momentum", 0.0, -1e3)
    y = wanted(x)[0]
    torch.testing.assert_close(huber(x)[0], y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(titans(x)[0], y, rtol=1e-9, atol=1e-9)
    # |e| and sign(e) are smooth where e is near 0
    torch.testing.assert_close(moneta(x)[0], y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_ten_thousand_positions_stay_finite_and_alive(name):
    """float32, the sizes and gates of a fresh layer; the memory has not faded to nothing."""
    torch.manual_seed(0)
    size = {"chunk_size": 16, "expansion": 2}
    memory = everlong.create_memory(name, hidden_size=32, num_heads=2, **size).eval()
    state = None
    with torch.no_grad():
        for piece in range(10):
            generator = torch.Generator().manual_seed(piece)
            x = torch.randn(1, 1000, 32, generator=generator)
            y, state = memory(x, state)
            assert y.isfinite().all()
    held = list(state["weights"])
    for w in memory.config.kept.read(held, held):
        assert w.isfinite().all()
        assert 1e-2 < float(w.abs().max()) < 1000
    four = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(99)).repeat(1, 64, 1)
    with torch.no_grad():
        _, after = memory(four, state)
        moved = torch.stack(
            [(a - b).norm() for a, b in zip(after["weights"], state["weights"], strict=True)]
        )
    scale = torch.stack([w.norm() for w in state["weights"]])
    assert (moved > 0.02 * scale).all(), "what comes again and again changes the memory"


@pytest.mark.parametrize("name", PRESETS)
def test_the_state_is_float32_under_autocast_and_a_masked_call_moves_no_bit(name):
    memory = everlong.create_memory(name, "small", hidden_size=24, num_heads=3)
    x = noise(2, 9).float()[..., None] * noise(24, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = memory(x)
        nothing, after = memory(x.fill_(float("nan")), state, torch.zeros(2, 9))
    assert y.isfinite().all()
    assert not nothing.any()
    for path, leaf in states.flatten(state).items():
        assert leaf.dtype in (torch.float32, torch.int64), path
    for one, two in zip(states.leaves(state), states.leaves(after), strict=True):
        assert torch.equal(one, two)


def test_bytes_of_state_are_what_the_page_says():
    memory = everlong.create_memory("titans", hidden_size=32, num_heads=2, chunk_size=8)
    state = memory.init_state(1)
    network = 2 * (16 * 64 + 64 * 16)  # two heads, two layers
    pending = 7 * 2 * (16 + 16 + 3)  # C - 1 places: key, value, and three gates
    tail = 3 * 3 * 32
    assert states.num_bytes(state) == 4 * (2 * network + pending + tail) + 8
    assert states.num_bytes(memory(torch.randn(1, 13, 32))[1]) == states.num_bytes(state)


def test_recall_reads_and_writes_nothing():
    memory = make("titans", chunk_size=4)
    x = noise(2, 8, D)
    _, state = memory(x)
    whole = memory.recall(x, state["weights"])
    assert whole.shape == (2, 8, D)
    for t in range(8):  # each position alone
        torch.testing.assert_close(
            memory.recall(x[:, t : t + 1], state["weights"]), whole[:, t : t + 1]
        )
    with torch.no_grad():
        fresh = memory.recall(x, memory.init_state(2)["weights"])
    assert (fresh - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("miras", {"bias": "hubber"}, "did you mean 'huber'"),
        ("miras", {"retention": "l3"}, "retention is 'l3'"),
        ("miras", {"algorithm": "adam"}, "algorithm is 'adam'"),
        ("miras", {"step_size": 0.0}, "step_size is 0.0"),
        ("miras", {"max_surprise": -1.0}, "max_surprise is -1.0"),
        ("miras", {"decay_first": True}, "depth=1"),
        ("miras", {"decay_first": True, "depth": 1, "retention": "softmax"}, 'retention="l2"'),
        ("miras", {"every": 4}, 'algorithm="muon"'),
        ("miras", {"degree": 30}, "smaller key_size or degree"),
        ("omeganet", {"key_size": 0}, "key_size must be at least 1"),
        ("titans_mag", {"memory": {1: 2}}, "table of options"),
        ("miras", {"algorithm": "muon", "every": 3}, "divisor of chunk_size"),
        ("miras", {"retention": "softmax", "algorithm": "momentum"}, 'algorithm="gd"'),
        ("miras", {"retention": "lq", "power": 3.0}, "another power"),
        ("miras", {"depth": 0}, "depth must be at least 1"),
        ("titans", {"chunk_size": 0}, "chunk_size must be at least 1"),
        ("titans", {"depth": 2, "decay_first": True}, "depth=1"),
        ("moneta", {"map": "duall"}, "did you mean 'dual'"),
        ("yaad", {"form": "vectors"}, "did you mean 'vector'"),
        ("atlas", {"every": 5}, "divisor of chunk_size"),
    ],
)
def test_what_cannot_be_meant_is_refused(name, options, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are looked for below)
        everlong.create_memory(name, hidden_size=D, num_heads=H, **options)
    assert words in str(error.value)


def test_published_and_safe_titans_differ_where_surprise_is_large():
    safe, published = make("titans"), make("titans", max_surprise=None)
    x = noise(2, 40, D)
    surprised = 30 * torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        torch.testing.assert_close(safe(1e-3 * x)[0], published(1e-3 * x)[0])
        for memory in (safe, published):
            memory.qkv.weight[-D:] = surprised
        assert (safe(x)[0] - published(x)[0]).abs().max() > 1e-3


def test_a_state_of_other_options_is_refused():
    x = noise(2, 5, D)
    _, state = make("titans", chunk_size=8)(x)
    for other in (
        {"chunk_size": 4},
        {"chunk_size": 8, "depth": 1},
        {"chunk_size": 8, "conv_size": 0},
    ):
        with pytest.raises(ValueError, match="other options"):
            make("titans", **other)(x, state)
    with pytest.raises(ValueError, match="other options"):
        make("miras", chunk_size=8)(x, state)


def test_features_made_in_inference_mode_are_no_trap():
    memory, x = make("omeganet", key_size=2), noise(2, 9, D)
    with torch.inference_mode():
        memory(x)
    memory(x)[0].sum().backward()
    assert memory.qkv.weight.grad.isfinite().all()
