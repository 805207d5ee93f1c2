"""Every attention kernel gives what plain JAX gives, in values and gradients; and each is taken where it fits.

Pallas kernels run here in interpret mode; that they are programs for their hardware is shown by lowering them for it.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from patarm_jax.config.sections import MeshSection, ModelSection
from patarm_jax.model import flash, kernels
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.attention import Streams
from patarm_jax.model.for_sampling import for_sampling
from patarm_jax.model.kernels import PORTABLE, Kernel, choose, hardware_of, kernels_in_use
from patarm_jax.model.sharding import MESH_AXES, make_mesh
from patarm_jax.model.transformer import abstract_params, forward, init_params, prefill
from patarm_jax.types import UserError
from tests.lowering import triton_kernels
from tests.toys import TINY

PALLAS, SPLASH = Kernel("pallas", interpret=True), Kernel("splash", interpret=True)
KEY = jax.random.key(7)
# Splash needs heads of 128, the others do not.
WIDE = Architecture(**TINY | {"head_dim": 128})


def arrays(rows, length, heads, kv_heads, size):
    shapes = ((rows, length, heads, size), (rows, length, kv_heads, size), (rows, length, kv_heads, size))
    return [jax.random.normal(jax.random.fold_in(KEY, i), shape) for i, shape in enumerate(shapes)]


def shared(lengths, width, group, each):
    return Streams(jnp.array(lengths), None, width, group), width + group * each


def packed(*sequences):
    width = sum(sequences[0])
    assert all(sum(each) == width for each in sequences)
    starts = [np.repeat(np.cumsum([0, *each[:-1]]), each) for each in sequences]
    return Streams(jnp.full(len(sequences), width), jnp.asarray(np.stack(starts), jnp.int32), width, 0), width


def causal(rows, width):
    return Streams(jnp.full(rows, width), None, width, 0), width


CASES = {
    "causal": causal(2, 200),
    "causal, one block": causal(1, 7),
    "packed": packed([70, 1, 150, 79], [300]),
    "shared": shared([100, 37], 100, 3, 40),
    "shared, group of one": shared([150, 1], 150, 1, 20),
    "shared, completions across blocks": shared([64], 64, 2, 150),
}


def real(streams, length):
    """Tokens that mean something, [R, S, 1, 1]."""
    position = jnp.arange(length)
    return ((position < streams.lengths[:, None]) | (position >= streams.width))[..., None, None]


def assert_same(kernel, streams, length, heads=4, kv_heads=2, size=128):
    q, k, v = arrays(streams.lengths.shape[0], length, heads, kv_heads, size)
    weight = jnp.where(real(streams, length), jax.random.normal(KEY, q.shape), 0.0)

    def total(kernel, q, k, v):
        out = kernels.attend(q, k, v, streams, kernel)
        return (out * weight).sum(), jnp.where(real(streams, length), out, 0.0)

    gradient = jax.jit(jax.grad(total, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    found = (jax.tree.leaves(gradient(each, q, k, v)) for each in (PORTABLE, kernel))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("kernel", [PALLAS, SPLASH], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_jax_with_its_gradients(kernel, case):
    assert_same(kernel, *CASES[case])


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(5, 1, 16), (3, 3, 32), (8, 4, 64)])
def test_pallas_does_other_heads(heads, kv_heads, size):
    assert_same(PALLAS, *CASES["shared"], heads, kv_heads, size)


@pytest.mark.parametrize("kernel", [pytest.param(PALLAS, id="pallas"), pytest.param(SPLASH, id="splash")])
@pytest.mark.long
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_group_and_length(kernel, data):
    group, width, each = (data.draw(st.integers(1, most)) for most in (8, 150, 40))
    lengths = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=3))
    assert_same(kernel, *shared(lengths, width, group, each), 2, 1, 16 if kernel is PALLAS else 128)


def assert_near(kernel, streams, length, dtype):
    """Gradients in bfloat16 are those of plain JAX in `dtype`, as near as three digits let them: sums are float32's."""
    single = arrays(streams.lengths.shape[0], length, 4, 2, 128)

    def total(kernel, *x):
        return jnp.where(real(streams, length), kernels.attend(*x, streams, kernel).astype(jnp.float32) ** 2, 0).sum()

    gradient = jax.jit(jax.grad(total, argnums=(1, 2, 3)), static_argnums=0)
    plain = gradient(PORTABLE, *(x.astype(dtype) for x in single))
    half = gradient(kernel, *(x.astype(jnp.bfloat16) for x in single))
    for one, other in zip(plain, half, strict=True):
        assert other.dtype == jnp.bfloat16
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        assert float(jnp.abs(one - other).mean() / jnp.abs(one).mean()) < 0.02


@pytest.mark.parametrize("kernel", [PALLAS, SPLASH], ids=lambda kernel: kernel.name)
def test_bfloat16_is_near_float32(kernel):
    assert_near(kernel, *CASES["shared"], jnp.float32)


def test_cudnn_is_asked_for_causal_rows(monkeypatch):
    """The library's own plain implementation stands in for the one that needs a GPU."""
    library = jax.nn.dot_product_attention
    asked = []

    def plain(*x, implementation, **options):
        asked.append(implementation)
        return library(*x, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    assert_same(Kernel("cudnn"), *CASES["causal"])
    assert asked == ["cudnn"]


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("name", "case"), [("cudnn", "causal"), *(("pallas", case) for case in CASES)])
def test_on_the_hardware_itself(name, case):
    assert_near(Kernel(name), *CASES[case], jnp.bfloat16)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_blocks_are_visited_if_and_only_if_they_are_read(data):
    """For the three forms, in which what is read of a row is one piece but for the prompt."""
    rows = [CASES["packed"], CASES["shared"], CASES["causal"], shared([9], 60, 8, 5)]
    streams, length = data.draw(st.sampled_from(rows))
    queries, keys = data.draw(st.sampled_from([(4, 4), (8, 4), (4, 8)]))
    position, begins = kernels.layout_of(length, streams)
    start = np.broadcast_to(begins if streams.starts is None else streams.starts, (len(streams.lengths), length))
    prefix = np.where(position >= streams.width, streams.lengths[:, None], 0)
    stop = np.broadcast_to(position + 1, start.shape)
    whole = -(-length // 8) * 8
    reads = [np.pad(x, ((0, 0), (0, whole - length))) for x in (prefix, start, stop)]
    key = np.arange(whole)
    read = (key < reads[0][..., None]) | ((reads[1][..., None] <= key) & (key < reads[2][..., None]))
    needed = read.reshape(len(read), whole // queries, queries, whole // keys, keys).any(axis=(2, 4))

    visits = flash.visits_of(flash.Reads(*map(jnp.asarray, reads)), queries, keys)
    head, first, last = (np.asarray(x)[..., None] for x in visits)
    block = np.arange(whole // keys)
    np.testing.assert_array_equal((block < head) | ((first <= block) & (block < last)), needed)
    first, last = (np.asarray(x)[:, None] for x in flash.readers_of(visits, whole // keys))
    block = np.arange(whole // queries)[:, None]
    assert not (needed & ~((first <= block) & (block < last))).any()


@pytest.mark.parametrize("kernel", [PALLAS, SPLASH], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("section", [MeshSection(data=2, fsdp=2, tensor=2), MeshSection(fsdp=8)], ids=str)
def test_on_many_devices_each_does_its_rows_and_heads(kernel, section):
    streams, length = shared([20, 3, 11, 7, 20, 1, 5, 9], 20, 2, 6)
    q, k, v = arrays(8, length, 4, 2, 128)
    gradient = jax.grad(lambda *x: jnp.sin(kernels.attend(*x, streams, kernel)).sum(), argnums=(0, 1, 2))
    alone = jax.jit(gradient)(q, k, v)
    with jax.set_mesh(make_mesh(section)):
        together = jax.jit(gradient)(q, k, v)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("kernel", [PALLAS, SPLASH], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.long), "full"])
def test_the_network_is_the_same_with_any_kernel(kernel, remat):
    params = init_params(WIDE, KEY)
    prompt = jax.random.randint(KEY, (2, 30), 0, WIDE.vocab_size)
    completion = jax.random.randint(KEY, (2, 3, 8), 0, WIDE.vocab_size)

    def loss(params, kernel):
        out = forward(params, WIDE, prompt, jnp.array([30, 17]), completion, remat=remat, kernel=kernel)
        return jnp.sin(out.completion).sum()

    one, other = (jax.jit(jax.grad(loss), static_argnums=1)(params, each) for each in (PORTABLE, kernel))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(a).max())))


@pytest.mark.parametrize("kernel", [PALLAS, SPLASH], ids=lambda kernel: kernel.name)
def test_prompts_are_read_alike(kernel):
    params = for_sampling(init_params(WIDE, KEY))
    tokens, lengths = jax.random.randint(KEY, (2, 30), 0, WIDE.vocab_size), jnp.array([30, 17])
    (state, cache), (other_state, other) = (
        prefill(params, WIDE, tokens, lengths, kernel=each) for each in (PORTABLE, kernel)
    )
    np.testing.assert_allclose(state, other_state, atol=1e-5)
    inside = (jnp.arange(30) < lengths[:, None])[:, None]
    for name, mask in (("keys", inside[:, :, None]), ("values", inside[..., None])):
        for one, two in zip(getattr(cache, name), getattr(other, name), strict=True):
            np.testing.assert_allclose(jnp.where(mask, one, 0), jnp.where(mask, two, 0), atol=1e-5)


# -------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("hardware", "form", "dtype", "head_dim", "chosen"),
    [
        ("cpu", "causal", "bfloat16", 128, "portable"),
        ("gpu", "causal", "bfloat16", 128, "cudnn"),
        ("gpu", "packed", "bfloat16", 128, "pallas"),
        ("gpu", "shared", "bfloat16", 128, "pallas"),
        ("gpu", "shared", "bfloat16", 80, "portable"),
        ("gpu", "causal", "bfloat16", 80, "cudnn"),
        ("gpu", "causal", "float32", 128, "portable"),
        ("other gpu", "causal", "bfloat16", 128, "portable"),
        ("other gpu", "packed", "bfloat16", 128, "portable"),
        ("tpu", "causal", "bfloat16", 128, "splash"),
        ("tpu", "shared", "float32", 128, "splash"),
        ("tpu", "packed", "bfloat16", 64, "portable"),
    ],
)
def test_what_fits_is_chosen(hardware, form, dtype, head_dim, chosen):
    assert choose("auto", form, hardware, dtype, head_dim) == Kernel(chosen)
    assert choose("portable", form, hardware, dtype, head_dim) == PORTABLE


@pytest.mark.parametrize(
    ("platform", "capability", "hardware"),
    [("gpu", "9.0", "gpu"), ("gpu", "12.0", "gpu"), ("gpu", "7.5", "other gpu"), ("gpu", "gfx942", "other gpu"),
     ("tpu", None, "tpu"), ("cpu", None, "cpu")],
)  # fmt: skip
def test_what_a_device_is(platform, capability, hardware):
    assert hardware_of(SimpleNamespace(platform=platform, compute_capability=capability)) == hardware


def test_a_kernel_that_cannot_is_refused_with_all_its_reasons():
    with pytest.raises(UserError, match="cudnn has no mask for packed rows and computes in bfloat16, not float32"):
        choose("cudnn", "packed", "gpu", "float32", 128)
    with pytest.raises(UserError, match=r"splash needs a TPU, not gpu and needs heads of 128·n, not 64.*auto"):
        choose("splash", "causal", "gpu", "bfloat16", 64)


def test_what_is_chosen_is_said():
    said = kernels_in_use(ModelSection(), WIDE, make_mesh(MeshSection()), "causal", "shared")
    assert said == "attention: portable for causal rows, portable for shared rows (cpu, bfloat16, heads of 128)"


# ------------------------------------------------------------------------------------------------- for absent hardware


@pytest.mark.parametrize("form", ["packed", "shared"])
@pytest.mark.parametrize(("platform", "kernel"), [("cuda", "pallas"), ("tpu", "splash")])
def test_the_networks_gradient_is_a_program_for_hardware_that_is_not_here(platform, kernel, form):
    """Three kernels for a layer's gradient: forward, and backward for queries and for keys."""
    params = abstract_params(WIDE)
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    completion = jax.ShapeDtypeStruct((8, 4, 32), jnp.int32) if form == "shared" else None
    starts = jax.ShapeDtypeStruct((8, 256), jnp.int32) if form == "packed" else None
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32) if form == "shared" else None

    def loss(params, tokens, starts, lengths, completion):
        options = {"starts": starts, "dtype": jnp.bfloat16, "remat": "none", "kernel": Kernel(kernel)}
        return forward(params, WIDE, tokens, lengths, completion, **options).prompt.astype(jnp.float32).sum()

    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu") if platform == "cuda" else None
    mesh = AbstractMesh((2, 2, 2), MESH_AXES, (AxisType.Auto,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(params, tokens, starts, lengths, completion)
        lowered = traced.lower(lowering_platforms=(platform,))
    if platform == "cuda":
        assert len(triton_kernels(lowered)) == 3
    else:
        assert len(re.findall(r"custom_call @tpu_custom_call", lowered.as_text())) == 3
