"""A new token's attention over its prompt and its own pages equals a plain softmax, by every kernel and on any mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from patarm_jax.arrays import Seats
from patarm_jax.config.sections import MeshSection, ModelSection
from patarm_jax.model import flash_decode, kernels
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.cache import CacheSizes, init_cache
from patarm_jax.model.for_sampling import for_sampling
from patarm_jax.model.kernels import PORTABLE, Kernel, kernel_for
from patarm_jax.model.pages import PAGE, Held, first_pages
from patarm_jax.model.seated import seated_attention
from patarm_jax.model.sharding import MESH_AXES, make_mesh
from patarm_jax.model.transformer import abstract_params, decode, init_params
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import make_engine, network_of
from patarm_jax.rollout.sampler import Network
from patarm_jax.rollout.schedule import Request, complete
from patarm_jax.types import UserError
from tests.lowering import triton_kernels
from tests.test_pages import mesh_of, plain, scattered
from tests.toys import TINY

PALLAS = Kernel("pallas", interpret=True)
ROOMY = Architecture(**TINY | {"head_dim": 16})
ALONE = mesh_of(1)


# ------------------------------------------------------------------------------------------------------------- seats


def seated(seed, shards=1, prompts=3, group=4, rows=7, kv_heads=2, queries=2, width=16, longest=64, places=128):
    """The arguments of `seated_attention`: some rows write nothing, some seats and prompts have nobody."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    lengths = rng.integers(1, longest + 1, shards * prompts).astype(np.int32)
    seat = np.stack([rng.permutation(prompts * group)[:rows] for _ in range(shards)]).astype(np.int32)
    age = rng.integers(0, places, (shards, rows)).astype(np.int32)
    age[:, :2] = 0, places - 1
    age[:, 2] = -1
    row = np.full((shards, prompts * group), rows, np.int32)
    for shard in range(shards):
        sitting = age[shard] >= 0
        row[shard, seat[shard][sitting]] = np.arange(rows)[sitting]
    total, heads = shards * rows, kv_heads * queries
    prompt = normal(shards * prompts, kv_heads, width, longest), normal(shards * prompts, kv_heads, longest, width)
    own = (normal(total, kv_heads, width, places),), (normal(total, kv_heads, places, width),)
    return normal(total, heads, width), prompt, lengths, own, Held(age.reshape(-1) + 1), Seats(seat, row, age)


def plainly_seated(q, prompt, lengths, own, held, seats):
    (shards, rows), prompts = seats.seat.shape, len(lengths) // len(seats.seat)
    group, kv_heads = seats.row.shape[1] // prompts, own[0][0].shape[1]
    out = np.zeros(q.shape)
    for index in range(shards * rows):
        shard, row = divmod(index, rows)
        mine = shard * prompts + seats.seat[shard, row] // group
        places = range(held.count[index])
        for head in range(q.shape[1]):
            k = head // (q.shape[1] // kv_heads)
            keys = np.concatenate([prompt[0][mine, k][:, : lengths[mine]].T, own[0][0][index, k][:, places].T])
            values = np.concatenate([prompt[1][mine, k][: lengths[mine]], own[1][0][index, k][places]])
            out[index, head] = plain(q[index, head], keys, values)
    return out


@pytest.mark.parametrize("kernel", [PORTABLE, PALLAS], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    "case", [{"seed": 0}, {"seed": 1, "group": 1, "rows": 3}, {"seed": 2, "queries": 5, "shards": 2}], ids=str
)
def test_a_token_reads_its_prompt_and_its_own_past(kernel, case):
    arguments = seated(**case)
    with jax.set_mesh(mesh_of(case.get("shards", 1))):
        found = np.asarray(jax.jit(seated_attention, static_argnums=6)(*arguments, kernel))
    writing = arguments[-1].age.reshape(-1) >= 0
    np.testing.assert_allclose(found[writing], plainly_seated(*arguments)[writing], atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kernel", [PORTABLE, PALLAS], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("section", [MeshSection(data=2, fsdp=2, tensor=2), MeshSection(fsdp=8)], ids=str)
def test_on_many_devices_each_does_its_rows_and_heads(kernel, section):
    arguments = seated(4, shards=section.data * abs(section.fsdp))
    alone = plainly_seated(*arguments)
    with jax.set_mesh(make_mesh(section)):
        together = jax.jit(seated_attention, static_argnums=6)(*arguments, kernel)
    writing = arguments[-1].age.reshape(-1) >= 0
    np.testing.assert_allclose(alone[writing], np.asarray(together)[writing], atol=2e-6)


def test_rows_that_are_done_read_nothing_any_more():
    """Of two rows one ends at once; the other's age grows."""
    seen = []

    def decode_step(params, tokens, cache, seats):
        jax.debug.callback(lambda age: seen.append(age.reshape(-1).tolist()), seats.age)
        return jnp.where(jnp.arange(4) == tokens[:, None], 0.0, -1e9), cache  # what was drawn first, again and again

    first = jnp.log(jnp.array([1e-30, 0.5, 0.5, 1e-30]))  # 1 ends, 2 does not
    network = Network(
        init=lambda shards, sizes: jnp.int32(0),
        prefill=lambda params, tokens, lengths: (jnp.broadcast_to(first, (tokens.shape[0], 4)), None),
        place=lambda cache, prompts, place: cache,
        decode=decode_step,
        resize=lambda cache, rows, prompts, width: cache,
    )
    engine = make_engine(network, ALONE, 8, SamplingParams((1,), 4), halvings=0)
    written = complete(engine, None, [Request(np.array([3], np.int32), 0)], jax.random.key(0))
    ended = written.lengths[0] == 1
    assert ended.any() and not ended.all()
    jax.effects_barrier()
    assert sorted(seen) == sorted([-1 if end else age for end in ended] for age in range(3))


def test_a_kernel_draws_what_plain_jax_draws():
    """Rows that are taken over and halved, a page that is no whole number of blocks, prompts that are narrowed."""
    rng, stops = np.random.default_rng(0), tuple(range(6))
    requests = [Request(rng.integers(6, 96, n, np.int32), row) for row, n in enumerate((5, 70, 9, 3, 12))]
    params = for_sampling(jax.tree.map(lambda x: x * 4, init_params(ROOMY, jax.random.key(1))))

    def draw(kernel):
        engine = make_engine(network_of(ROOMY, "float32", of_rows=kernel), ALONE, 4, SamplingParams(stops, 70), 8)
        return complete(engine, params, requests, jax.random.key(2))

    one, other = draw(PORTABLE), draw(PALLAS)
    assert one.lengths.max() > 40 and len(set(one.lengths.reshape(-1).tolist())) > 8
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


# -------------------------------------------------------------------------------------------------- hardware


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("queries", "pages"), [(4, 1), (5, 8), (20, 2), (20, 6), (32, 16), (80, 32)])
@pytest.mark.parametrize("width", [64, 128])
def test_on_the_hardware_itself(queries, pages, width):
    (q, (k,), (v,), held), _ = scattered(queries, 8, 2, queries, width, PAGE, pages)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    read = jax.jit(kernels.read_pages, static_argnums=4)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = read(wide[0], (wide[1],), (wide[2],), held, PORTABLE)
    found = read(q, (k,), (v,), held, Kernel("pallas"))
    np.testing.assert_allclose(found[0], expected[0], atol=0.02)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("most", [64, 1024])
@pytest.mark.parametrize("group", [1, 8, 20])
def test_a_step_is_a_program_for_a_gpu_that_is_not_here(group, most):
    """Two kernels in a layer: one for what rows have written, one for their prompts."""
    arch, kernel, rows, prompts = replace(ROOMY, head_dim=128), Kernel("pallas"), 8 * group, 8
    sizes = CacheSizes(4, prompts // 4, 128, rows // 4, most, (rows // 4 * first_pages(most),))
    cache = jax.eval_shape(lambda: init_cache(arch, sizes, 64, jnp.bfloat16))
    seats = Seats(*(jax.ShapeDtypeStruct((4, n // 4), jnp.int32) for n in (rows, prompts * group, rows)))
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((2, 2, 2), MESH_AXES, (AxisType.Auto,) * 3, abstract_device=device)

    def step(params, tokens, cache, seats):
        return decode(params, arch, tokens, cache, seats, dtype=jnp.bfloat16, kernel=kernel)

    with jax.sharding.use_abstract_mesh(mesh):
        arguments = abstract_params(arch, sampling=True), jax.ShapeDtypeStruct((rows,), jnp.int32), cache, seats
        lowered = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert len(triton_kernels(lowered)) == 2 * arch.num_hidden_layers


def test_weakly_typed_places_are_places():
    """`jnp.full(2, 5)`, whose numbers would be of two types within the kernel."""
    (q, (k,), (v,), _), _ = scattered(0, 2, 1, 4, 64, 128, 2)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("rows",), (AxisType.Auto,), abstract_device=device)

    def read(q, k, v):
        return flash_decode.read_pool(q, (k,), (v,), Held(jnp.full(2, 5), jnp.zeros((2, 2), int)))

    with jax.sharding.use_abstract_mesh(mesh):
        assert len(triton_kernels(jax.jit(read).trace(q, k, v).lower(lowering_platforms=("cuda",)))) == 1


def test_what_is_asked_for_whole_rows_leaves_written_ones_to_what_fits(monkeypatch):
    monkeypatch.setattr(kernels, "hardware_of", lambda device: "gpu")
    wide = replace(ROOMY, head_dim=128)
    chosen = {asked: kernel_for(ModelSection(attention=asked), wide, ALONE, "written").name
              for asked in ("auto", "cudnn", "pallas", "portable")}  # fmt: skip
    assert chosen == {"auto": "pallas", "cudnn": "pallas", "pallas": "pallas", "portable": "portable"}
    monkeypatch.setattr(kernels, "hardware_of", lambda device: "tpu")
    assert kernel_for(ModelSection(attention="splash"), wide, ALONE, "written") == PORTABLE
    with pytest.raises(UserError, match=r"pallas needs an NVIDIA GPU.*not tpu"):
        kernel_for(ModelSection(attention="pallas"), wide, ALONE, "written")
