"""When kernels serve, what they are asked, and, with a GPU at hand, that they equal our forms.

Without one, modules of ours stand in for theirs: each function is the recurrence it is documented
to compute, step by step, with the names, defaults and dtypes it has there.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from everlong.ops import kernels
from everlong.ops.delta import delta_rule, linear_attention
from everlong.ops.dplr import dplr, dplr_reference
from everlong.registry import create_memory
from mixers.test_linear_family import KINDS as LINEAR
from ops.test_dplr import everything

B, T, H, K, V = 3, 21, 2, 6, 4
FORMS = [linear_attention, delta_rule, dplr]
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _seen_anew():
    kernels._installed.cache_clear()
    yield
    kernels._installed.cache_clear()


def inputs_of(form, channels, *, length=T, sizes=(K, V), device="cpu"):
    """Float32 numbers that bfloat16 has too, where kernels are given that."""
    keys, values = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    q, k, a = (draw(B, length, H, keys) for _ in range(3))
    k, a = (x / x.norm(dim=-1, keepdim=True) for x in (k, a))
    v, b = draw(B, length, H, values), -a * draw(B, length, H, 1).sigmoid()
    rows = [x.to(HALF).float() for x in (q, k, v, a, b)]
    g = -draw(B, length, H, *((keys,) if channels else ())).abs()
    beta, state = 2 * draw(B, length, H).sigmoid(), draw(B, H, keys, values)
    middle = {linear_attention: [], delta_rule: [beta], dplr: rows[3:]}[form]
    return [*rows[:3], g, *middle, state]


def called(form, *, by=None, lengths=None):
    """`form`, or the general definition `by`, of the inputs above."""

    def call(q, k, v, g, *rest):
        *rest, state = rest
        if by is None and form is not dplr:
            return form(q, k, v, g, *rest, state, lengths=lengths)
        if form is linear_attention:
            low_rank = None
        elif form is delta_rule:
            strength = rest[0][..., None]
            decay = (g if g.dim() == 4 else g[..., None]).exp()
            v, low_rank = strength * v, (decay * k, -strength * k)
        else:
            low_rank = tuple(rest)
        return (by or form)(q, k, v, g, low_rank, state, lengths=lengths)

    return call


def close(found, wanted, tolerance):
    for place, (got, expected) in enumerate(zip(found, wanted, strict=True)):
        assert got.isfinite().all(), place
        error = float((got - expected).norm() / expected.norm())
        assert error <= tolerance, f"{place}: relative error {error:.1e}"


class Untouchable(ModuleType):
    """Neither imported nor used: no name can be taken from it."""

    def __getattr__(self, name):
        raise AssertionError(f"{self.__name__}.{name} was asked for")


class _Hidden:
    """Finds nothing, and tells on whoever looks for fla."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        assert name.partition(".")[0] != "fla", f"{name} was imported"


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_on_the_cpu_never_meet_it(form, channels, monkeypatch):
    inputs = inputs_of(form, channels)

    def run():
        everything(called(form), inputs)
        called(form)(*(x.to(HALF) for x in inputs[:-1]), inputs[-1])
        with torch.autocast("cpu", HALF):
            called(form)(*inputs)

    monkeypatch.setattr(sys, "meta_path", [_Hidden, *sys.meta_path])
    run()
    assert "fla" not in sys.modules
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, Untouchable(name))
    run()


def test_what_is_served(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def served(dtype, *, exact=torch.float32, length=T, sizes=(K, V), device="cuda", cast=None):
        keys, values = sizes
        torch.set_autocast_enabled("cuda", cast is not None)
        torch.set_autocast_dtype("cuda", cast or autocast[1])
        try:
            with FakeTensorMode():
                q = torch.empty(B, length, H, keys, dtype=exact, device=device)
                v = torch.empty(B, length, H, values, dtype=dtype, device=device)
                state = torch.empty(B, H, keys, values, dtype=exact, device=device)
                return kernels.serve(q, v, state)
        finally:
            torch.set_autocast_enabled("cuda", autocast[0])
            torch.set_autocast_dtype("cuda", autocast[1])

    assert served(HALF)
    assert served(torch.float32, cast=HALF)
    assert served(HALF, sizes=(256, 512))
    assert not served(HALF, device="cpu")
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert not served(dtype)
    assert not served(torch.float32, cast=torch.float16)
    assert not served(HALF, cast=torch.float16)
    assert not served(torch.float64, cast=HALF)  # autocast leaves it alone
    assert not served(HALF, exact=torch.float64)
    assert not served(HALF, length=1)
    assert served(HALF, sizes=(K, 5))
    for sizes in ((258, V), (5, V)):
        assert not served(HALF, sizes=sizes)

    monkeypatch.setitem(sys.modules, "fla.ops", None)  # what Python finds where nothing is
    kernels._installed.cache_clear()
    assert not served(HALF)


def test_a_broken_installation_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("")
    (tmp_path / "fla" / "ops.py").write_text("import no_such_compiler\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    try:
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="no_such_compiler"):
                kernels._installed()
    finally:
        sys.modules.pop("fla", None)


def steps(q, k, v, decay, change, scale, initial_state, output_final_state):
    """S <- change(t, S, decayed S), o = scale * q S; half precision in and out, S in float32."""
    assert {x.dtype for x in (q, k, v)} == {HALF}
    assert v.shape[-1] % 2 == 0
    assert initial_state is None or initial_state.dtype == torch.float32
    assert decay.dtype == torch.float32
    q, k, v = q.float(), k.float(), v.float()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = q.new_zeros(*q[:, 0].shape, v.shape[-1]) if initial_state is None else initial_state
    o = []
    for t in range(q.shape[1]):
        kept = decay[:, t].exp()[..., None] * S
        S = kept + k[:, t, ..., None] * change(t, S, kept)[..., None, :]
        o.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(o, 1).to(HALF), S if output_final_state else None


def chunk_simple_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    assert g.shape == q.shape[:3]
    return steps(
        q, k, v, g[..., None], lambda t, *_: v[:, t].float(),
        scale, initial_state, output_final_state,
    )  # fmt: skip


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    assert g.shape == q.shape
    return steps(
        q, k, v, g, lambda t, *_: v[:, t].float(), scale, initial_state, output_final_state
    )


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False,
):  # fmt: skip
    assert g.shape == q.shape
    assert beta.shape == q.shape[:3]
    assert not use_qk_l2norm_in_kernel

    def change(t, _, kept):
        read = torch.einsum("bhk,bhkv->bhv", k[:, t].float(), kept)
        return beta[:, t, :, None] * (v[:, t].float() - read)

    return steps(q, k, v, g, change, scale, initial_state, output_final_state)


def chunk_gated_delta_rule(q, k, v, g, beta, **options):
    assert g.shape == q.shape[:3]
    return chunk_kda(q, k, v, g[..., None].expand_as(k), beta, **options)


def chunk_dplr_delta_rule(
    q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False
):
    """The state is read along a before it decays, and what was read is written along b."""
    assert gk.shape == q.shape == a.shape == b.shape
    assert {a.dtype, b.dtype} == {HALF}
    assert v.shape[-1] % 2 == 0
    keys = torch.stack([k, b], -1).float()  # written side by side
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S, o = initial_state, []
    for t in range(q.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t].float(), S)
        pair = torch.stack([v[:, t].float(), read], -2)
        S = gk[:, t].exp()[..., None] * S + keys[:, t] @ pair
        o.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t].float(), S))
    return torch.stack(o, 1).to(HALF), S if output_final_state else None


@pytest.mark.parametrize("values", [V, V + 1])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_asked_of_the_kernels(form, channels, ragged, values, monkeypatch):
    name = {
        linear_attention: ["chunk_simple_gla", "chunk_gla"][channels],
        delta_rule: ["chunk_gated_delta_rule", "chunk_kda"][channels],
        dplr: "chunk_dplr_delta_rule",
    }[form]
    ops = Untouchable("fla.ops")
    setattr(ops, name, globals()[name])
    monkeypatch.setitem(sys.modules, "fla.ops", ops)
    monkeypatch.setattr(kernels, "serve", lambda *_: True)
    inputs = inputs_of(form, channels, sizes=(K, values))
    lengths = torch.tensor([T, 8, 0]) if ragged else None
    wanted = everything(called(form, by=dplr_reference, lengths=lengths), inputs)
    found = everything(called(form, lengths=lengths), inputs)
    close(found[1:2], wanted[1:2], 1e-6)  # the state: nothing of it was ever rounded
    close(found, wanted, 1e-2)  # outputs, and gradients of rows, were rounded once
    assert {x.dtype for x in found} == {torch.float32}
    if ragged:
        for b, n in enumerate([T, 8, 0]):
            assert not found[0][b, n:].any()
        assert torch.equal(found[1][2], inputs[-1][2])


LAYERS = [name for name in LINEAR if name != "hgrn"]  # which has no matrix


@pytest.mark.parametrize("name", [*LAYERS, "mom"])
def test_every_layer_is_served_as_it_comes(name, monkeypatch):
    """Under bfloat16 autocast, by its default options."""
    seen = []

    def serve(q, v, state):
        with monkeypatch.context() as autocast:
            autocast.setattr(torch, "is_autocast_enabled", lambda _: True)
            autocast.setattr(torch, "get_autocast_dtype", lambda _: HALF)
            seen.append(rule(*(_OnCuda(x) for x in (q, v, state))))
        return False

    rule = kernels.serve
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setattr(kernels, "serve", serve)
    create_memory(name, hidden_size=256, num_heads=4)(torch.randn(1, 9, 256))
    assert seen
    assert all(seen)


class _OnCuda:
    """What `serve` reads of a tensor."""

    def __init__(self, x):
        self.shape, self.dtype, self.device = x.shape, x.dtype, torch.device("cuda")


def test_outputs_have_the_dtype_of_v(monkeypatch):
    ops = ModuleType("fla.ops")
    ops.chunk_kda = chunk_kda
    monkeypatch.setitem(sys.modules, "fla.ops", ops)
    monkeypatch.setattr(kernels, "serve", lambda *_: True)
    *rows, state = inputs_of(delta_rule, True)
    o, last = delta_rule(*(x.to(HALF) for x in rows), state)
    assert (o.dtype, last.dtype) == (HALF, torch.float32)


NO_KERNELS = not torch.cuda.is_available() or find_spec("fla") is None


@pytest.mark.skipif(NO_KERNELS, reason="needs a CUDA GPU and flash-linear-attention (extra gpu)")
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_are_the_chunks(form, channels, ragged):
    """Values and gradients to bfloat16's rounding, from a state that was carried."""
    n = 150
    inputs = inputs_of(form, channels, length=n, sizes=(64, 32), device="cuda")
    lengths = torch.tensor([n, 70, 0], device="cuda") if ragged else None
    wanted = everything(called(form, lengths=lengths), inputs)  # float32: our chunks
    assert not kernels.serve(inputs[0], inputs[2], inputs[-1])
    with torch.autocast("cuda", HALF):
        assert kernels.serve(inputs[0], inputs[2], inputs[-1])
        found = everything(called(form, lengths=lengths), inputs)
    close(found, wanted, 2e-2)
    assert {x.dtype for x in found} == {torch.float32}
    if ragged:
        assert torch.equal(found[1][2], inputs[-1][2])  # bit for bit
        assert not any(found[0][b, m:].any() for b, m in enumerate([n, 70, 0]))


@pytest.mark.skipif(NO_KERNELS, reason="needs a CUDA GPU and flash-linear-attention (extra gpu)")
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_carry_their_state(form, channels):
    *rows, state = inputs_of(form, channels, length=150, sizes=(64, 32), device="cuda")
    with torch.autocast("cuda", HALF):
        wanted = called(form)(*rows, state)
        found = []
        for piece in zip(*(x.split([64, 70, 15, 1], 1) for x in rows), strict=True):
            o, state = called(form)(*piece, state)
            found.append(o)
    close([torch.cat(found, 1), state], wanted, 2e-2)
