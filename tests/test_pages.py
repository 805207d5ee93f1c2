"""Pages of kept keys: given out once, taken back, and what rows draw over them is what they draw over one page each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from patarm_jax.config.sections import MeshSection
from patarm_jax.model import attention, flash_decode, kernels, pages
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.for_sampling import for_sampling
from patarm_jax.model.kernels import PORTABLE, Kernel, key_block
from patarm_jax.model.pages import Held, assigned, has_room, more, most_pages, new_pages, of_rows, page_size
from patarm_jax.model.sharding import MESH_AXES, make_mesh
from patarm_jax.model.transformer import init_params
from patarm_jax.padding import WIDTH_MULTIPLE
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import make_engine, network_of
from patarm_jax.rollout.schedule import Request, complete
from tests.toys import TINY

PALLAS = Kernel("pallas", interpret=True)
ROOMY = Architecture(**TINY | {"head_dim": 16})
SIZE = 4


def mesh_of(shards):
    """A mesh of so many devices, which share the rows."""
    return jax.make_mesh((shards, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:shards])


# -------------------------------------------------------------------------------------------------------- book-keeping


class Plainly:
    """The pages of one device, kept by hand."""

    def __init__(self, rows, count):
        self.free, self.of = set(range(count)), [[] for _ in range(rows)]

    def step(self, age):
        for row, own in enumerate(self.of):
            if age[row] <= 0:
                self.free |= set(own)
                own.clear()
        for row, own in enumerate(self.of):
            if age[row] >= 0 and age[row] % SIZE == 0:
                own.append(min(self.free))
                self.free.remove(own[-1])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_pages_are_given_out_as_by_hand(data):
    rows, each = data.draw(st.integers(1, 5)), 3
    count = data.draw(st.integers(rows, rows * each))
    monkey, most = pages.PAGE, SIZE * each
    pages.PAGE = SIZE
    try:
        taken = new_pages(2, rows, count, most)
        plainly = [Plainly(rows, count) for _ in range(2)]
        age = np.full((2, rows), -1, np.int32)
        step = jax.jit(assigned, static_argnums=2)
        for _ in range(data.draw(st.integers(1, 40))):
            for place in np.ndindex(2, rows):  # each goes on, ends, or begins
                ends = data.draw(st.integers(0, 9)) == 0
                age[place] = (
                    0 if age[place] < 0 and not ends else -1 if ends or age[place] + 1 == most else age[place] + 1
                )
            fits = []
            for one, mine in zip(plainly, age, strict=True):
                kept = sum(len(own) for own, old in zip(one.of, mine, strict=True) if old > 0)
                fits.append(count - kept >= sum(old >= 0 and old % SIZE == 0 for old in mine))
            assert bool(has_room(taken, jnp.asarray(age), SIZE)) == all(fits)
            if not all(fits):
                return
            taken = step(taken, jnp.asarray(age), SIZE)
            for shard, one in enumerate(plainly):
                one.step(age[shard])
                for row, own in enumerate(one.of):
                    assert np.asarray(taken.table)[shard, row, : len(own)].tolist() == own
                    for number, page in enumerate(own):
                        assert (taken.owner[shard, page], taken.order[shard, page]) == (row, number)
    finally:
        pages.PAGE = monkey


def test_rows_that_are_kept_keep_their_pages_under_their_new_numbers(monkeypatch):
    monkeypatch.setattr(pages, "PAGE", SIZE)
    taken = new_pages(1, 4, 6, 3 * SIZE)
    for age in (0, 1, 2, 3, 4):
        taken = assigned(taken, jnp.array([[age, -1, age, age]]), SIZE)
    kept = of_rows(taken, jnp.array([[2, 4]]))  # and a free one
    assert kept.table[0, 0, :2].tolist() == taken.table[0, 2, :2].tolist() == [1, 4]
    assert kept.owner.tolist() == [[2, 0, 2, 2, 0, 2]]
    wide = more(kept, 8)
    assert wide.owner.tolist() == [[2, 0, 2, 2, 0, 2, 2, 2]]
    again = assigned(wide, jnp.array([[5, 0]]), SIZE)
    assert again.table[0, 1, 0] == 0 and again.owner.tolist() == [[1, 0, 2, 2, 0, 2, 2, 2]]


# ------------------------------------------------------------------------------------------------------------- reading


def scattered(seed, rows, heads, queries, width, size, each, spare=3, count=()):
    """Keys of rows on pages in any order, some of them nobody's, and the same as one array for each row."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, size * each + 1, rows).astype(np.int32)
    drawn[0], drawn[-1] = size * each, 0
    count = np.array(count, np.int32) if count else drawn
    total = rows * each + spare
    where = rng.permutation(total)[: rows * each].reshape(rows, each)
    owner, order = np.full(total, rows), np.zeros(total, np.int64)
    for row in range(rows):
        for number in range(-(-count[row] // size)):
            owner[where[row, number]], order[where[row, number]] = row, number
    q = rng.normal(size=(rows, heads, queries, width)).astype(np.float32)
    k = rng.normal(size=(total, heads, width, size)).astype(np.float32)
    v = rng.normal(size=(total, heads, size, width)).astype(np.float32)
    held = Held(*(jnp.asarray(x, jnp.int32) for x in (count, where, owner, order)))
    whole_k = np.concatenate([k[where[:, number]] for number in range(each)], axis=3)
    whole_v = np.concatenate([v[where[:, number]] for number in range(each)], axis=2)
    pools = (jnp.asarray(q), (jnp.asarray(k),), (jnp.asarray(v),), held)
    return pools, tuple(map(jnp.asarray, (q, whole_k, whole_v, count)))


def in_parts(arguments, *ends):
    """The same pages in several parts of a pool."""
    q, (k,), (v,), held = arguments
    return q, tuple(jnp.split(k, ends)), tuple(jnp.split(v, ends)), held


def plain(q, keys, values):
    """One query [H] over keys [S, H] and values [S, H], in float64."""
    scores = keys.astype(np.float64) @ q.astype(np.float64) / np.sqrt(q.size)
    weights = np.exp(scores - scores.max(initial=-np.inf))
    return weights @ values.astype(np.float64) / weights.sum() if len(keys) else np.zeros(q.size)


def assert_reads(kernel, arguments, q, k, v, count, atol=2e-6):
    """That pages are read as rows [B, K, H, T] and [B, K, T, H] of so many keys are."""
    out, lse = jax.jit(kernels.read_pages, static_argnums=4)(*arguments, kernel)
    assert bool(jnp.isfinite(out).all() & jnp.isfinite(lse).all())
    q, k, v = map(np.asarray, (q, k, v))
    for row, keys in enumerate(np.asarray(count)):
        for head, query in np.ndindex(*q.shape[1:3]):
            expected = plain(q[row, head, query], k[row, head][:, :keys].T, v[row, head][:keys])
            np.testing.assert_allclose(out[row, head, query], expected, atol=atol)
        if not keys:
            assert float(lse[row].max()) < -1e29


@pytest.mark.parametrize("kernel", [PORTABLE, PALLAS], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("bytes_at_a_time", [1, 40_000, 1 << 30])
def test_pages_in_any_order_are_read_as_one_array(kernel, bytes_at_a_time, monkeypatch):
    monkeypatch.setattr(attention, "PAGES_BYTES", bytes_at_a_time)
    monkeypatch.setattr(attention, "WHOLE_BYTES", 0 if bytes_at_a_time < 1 << 30 else 1 << 30)
    arguments, (q, k, v, count) = scattered(1, 5, 2, 3, 16, flash_decode.KEYS, 3)
    out, lse = jax.jit(kernels.read_pages, static_argnums=4)(*arguments, kernel)
    expected, expected_lse = attention.read_pages(q, (k,), (v,), Held(count))
    if kernel == PORTABLE:
        for ends in ((2,), (1, 7), (5, 6, 17)):
            again = jax.jit(attention.read_pages)(*in_parts(arguments, *ends))
            np.testing.assert_array_equal(again[0], out)
            np.testing.assert_array_equal(again[1], lse)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse[:-1], expected_lse[:-1], atol=1e-5)
    assert not np.asarray(out[-1]).any() and float(lse[-1].max()) < -1e29  # of a row without keys


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    queries=st.integers(1, 20),
    size=st.sampled_from([64, 128]),
    each=st.integers(1, 5),
    pallas=st.booleans(),
)
def test_pages_are_read_as_a_plain_softmax_reads_them(seed, queries, size, each, pallas):
    arguments, (q, k, v, count) = scattered(seed, 3, 2, queries, 16, size, each)
    assert_reads(PALLAS if pallas else PORTABLE, arguments, q, k, v, count)


@pytest.mark.parametrize("kernel", [PORTABLE, PALLAS], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 256])
def test_no_key_one_key_and_whole_pages(kernel, count):
    arguments, (q, k, v, _) = scattered(count, 1, 1, 2, 16, 128, 2, count=[count])
    assert_reads(kernel, arguments, q, k, v, [count])
    assert_reads(kernel, (q, (k,), (v,), Held(jnp.array([count], jnp.int32))), q, k, v, [count])


def test_many_queries_are_cut_and_long_rows_are_shared_out():
    """More queries than a program takes, and rows that four programs share, most of which have nothing to do."""
    assert flash_decode.MOST_QUERIES < 80
    arguments, (q, k, v, count) = scattered(3, 3, 1, 80, 16, 128, 16)
    assert_reads(PALLAS, arguments, q, k, v, count)


def test_a_page_without_whole_blocks_is_refused_and_the_cache_has_none():
    arguments, _ = scattered(0, 1, 1, 1, 16, 65, 1)
    with pytest.raises(ValueError, match=r"65 places.*blocks of 64"):
        kernels.read_pages(*arguments, PALLAS)
    assert [page_size(most, key_block(PALLAS)) for most in (1, 64, 65, 4096)] == [64, 64, 128, 128]
    assert [page_size(most) for most in (65, 4096)] == [65, 128] and [most_pages(n) for n in (128, 129)] == [1, 2]
    assert WIDTH_MULTIPLE % flash_decode.KEYS == 0 == pages.PAGE % flash_decode.KEYS  # prompts lie in whole blocks too


def test_a_rows_numbers_are_its_own(monkeypatch):
    """To the bit, wherever its pages lie and whatever is read with them."""
    monkeypatch.setattr(attention, "PAGES_BYTES", 20_000)
    monkeypatch.setattr(attention, "WHOLE_BYTES", 0)
    (q, (k,), (v,), held), _ = scattered(2, 6, 2, 3, 16, 8, 4)
    read = jax.jit(attention.read_pages)
    out, lse = read(q, (k,), (v,), held)
    order = np.random.default_rng(0).permutation(len(k))
    back = np.argsort(order)
    moved = Held(held.count, jnp.asarray(back)[held.table], held.owner[order], held.order[order])
    again = read(q, (k[order],), (v[order],), moved)
    np.testing.assert_array_equal(out, again[0])
    np.testing.assert_array_equal(lse, again[1])


# ------------------------------------------------------------------------------------------------------------- drawing


def requests():
    rng = np.random.default_rng(0)
    return [Request(rng.integers(6, 96, n, np.int32), row) for row, n in enumerate((5, 70, 9, 3, 12, 33))]


def engine_for(width, mesh, kernel=PORTABLE):
    network = network_of(ROOMY, "float32", of_rows=kernel)
    return make_engine(network, mesh, 4, SamplingParams(tuple(range(4)), width), 8)


def lively():
    return for_sampling(jax.tree.map(lambda x: x * 4, init_params(ROOMY, jax.random.key(1))))


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(None, id="one device", marks=pytest.mark.long),
        pytest.param(MeshSection(data=2, fsdp=2, tensor=2), id="eight devices"),
    ],
)
def test_what_is_drawn_is_the_same_on_any_pages(section, monkeypatch):
    """Rows that are taken over and halved, prompts that are narrowed, pages that run out again and again."""
    params, mesh = lively(), make_mesh(section) if section else mesh_of(1)
    one = complete(engine_for(70, mesh), params, requests(), jax.random.key(2))
    assert one.lengths.max() > 40 and len(set(one.lengths.reshape(-1).tolist())) > 8
    monkeypatch.setattr(pages, "PAGE", 8)
    monkeypatch.setattr(pages, "FIRST_PAGES", 1)
    other = complete(engine_for(70, mesh), params, requests(), jax.random.key(2))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
