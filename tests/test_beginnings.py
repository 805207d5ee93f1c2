"""Prompts that begin alike are read once as far as they do, and draw what each of them draws alone."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from patarm_jax.config.sections import MeshSection
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.cache import PromptCache
from patarm_jax.model.for_sampling import for_sampling
from patarm_jax.model.sharding import MESH_AXES, ROLLOUT_RULES, make_mesh
from patarm_jax.model.transformer import init_params, prefill, prefill_behind
from patarm_jax.rollout.beginnings import dealt, families_of
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import make_engine, network_of
from patarm_jax.rollout.schedule import Request, complete
from tests.toys import TINY

ARCH = Architecture(**TINY | {"num_hidden_layers": 1})
KEY = jax.random.key(7)
CHOICE = SamplingParams((5, 6, 7, 8), 12)
ALONE = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])

PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=8)


@cache
def lively(mesh=None):
    """Random weights large enough that the next token depends on what was read."""
    params = init_params(ARCH, jax.random.key(0), mesh, ROLLOUT_RULES)
    return for_sampling(jax.tree.map(lambda x: x * 8 if x.ndim > 1 and x.shape[-1] > 8 else x, params))


@cache
def engine(mesh, rows, shares):
    return make_engine(network_of(ARCH, "float32"), mesh, 2, CHOICE, rows, halvings=0, shares=shares)


def drawn(requests, mesh=ALONE, rows=0, shares=True):
    return complete(engine(mesh, rows, shares), lively(mesh), requests, KEY)


def alike(rng, families, members, begin=80, longest=20):
    """Prompts of families that begin alike, in no order, and some that are alone."""
    prompts = []
    for _ in range(families):
        beginning = rng.integers(3, 96, begin + int(rng.integers(0, 9)))
        ends = [rng.integers(3, 96, int(n)) for n in rng.integers(1, longest, members)]
        prompts += [np.concatenate([beginning, end]) for end in ends]
    prompts += [rng.integers(3, 96, n) for n in (5, 90)]
    order = rng.permutation(len(prompts))
    return [Request(prompts[i].astype(np.int32), 3 * int(i)) for i in order]


def assert_same(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ families


def tokens_read(prompts, families):
    """What is read of prompts that are divided so: of each family its beginning once."""
    total = 0
    for number in set(families.number.tolist()):
        members = np.flatnonzero(families.number == number)
        shared = int(families.shared[members[0]])
        total += shared + sum(len(prompts[i]) - shared for i in members)
    return total


@given(PROMPTS)
def test_members_share_what_they_say_and_have_a_token_behind_it(prompts):
    found = families_of(prompts, least=2)
    for number in set(found.number.tolist()):
        members = np.flatnonzero(found.number == number)
        shared = set(found.shared[members].tolist())
        assert len(shared) == 1 and (shared == {0}) == (len(members) == 1)
        (most,) = shared
        assert most == 0 or most >= 2
        assert len({tuple(prompts[i][:most]) for i in members}) == 1
        assert all(len(prompts[i]) > most for i in members)


@given(PROMPTS)
def test_no_division_reads_fewer_tokens(prompts):
    """Against every division of the prompts in their lexical order."""
    ordered = sorted(prompts)

    def shared_by(run):
        width = min(map(len, run)) - 1
        same = next((n for n in range(width) if len({one[n] for one in run}) > 1), width)
        return same if same >= 2 else 0

    least = [0]
    for end in range(1, len(ordered) + 1):
        runs = (ordered[begin:end] for begin in range(end))
        costs = (least[begin] + sum(map(len, run)) - shared_by(run) * (len(run) - 1) for begin, run in enumerate(runs))
        least.append(min(costs))
    assert tokens_read(prompts, families_of(prompts, least=2)) == least[-1]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4))
def test_everybody_is_dealt_once_and_nobody_has_more_than_his_share(sizes, shares):
    numbers = iter(range(sum(sizes)))
    families = [[next(numbers) for _ in range(size)] for size in sizes]
    found = dealt(families, shares)
    assert sorted(member for share in found for member in share) == list(range(sum(sizes)))
    assert max(map(len, found)) == -(-sum(sizes) // shares)


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("width", [pytest.param(7, marks=pytest.mark.long), 70])  # one block of queries, and two
def test_a_rest_behind_kept_keys_is_the_whole_prompt(width):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 96, (3, 40 + width)).astype(np.int32)
    lengths, begun = np.array([40 + width, 11, 40]), np.array([40, 10, 1])  # a rest of all, of one, and of most tokens
    last, whole = prefill(lively(), ARCH, tokens, lengths)
    # What lies behind a beginning in its place is another's, and must not be read.
    other = prefill(lively(), ARCH, rng.integers(3, 96, tokens.shape).astype(np.int32), lengths)[1]

    def beginning(mine, others, axis):
        at = jnp.arange(mine.shape[axis]).reshape(-1, *[1] * (mine.ndim - 1 - axis))
        return jnp.where(at < begun.reshape(-1, *[1] * (mine.ndim - 1)), mine, others)

    keys = tuple(beginning(*each, 3) for each in zip(whole.keys, other.keys, strict=True))
    values = tuple(beginning(*each, 2) for each in zip(whole.values, other.values, strict=True))
    rest = np.zeros((3, int((lengths - begun).max())), np.int32)
    for row, (begin, end) in enumerate(zip(begun, lengths, strict=True)):
        rest[row, : end - begin] = tokens[row, begin:end]
    found, kept = prefill_behind(
        lively(), ARCH, rest, lengths - begun, PromptCache(keys, values, jnp.asarray(begun)), 40 + width
    )
    np.testing.assert_allclose(found, last, atol=2e-5)
    np.testing.assert_array_equal(kept.lengths, lengths)
    for mine, theirs in zip(kept.keys, whole.keys, strict=True):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(mine[row, ..., :length], theirs[row, ..., :length], atol=2e-5)
    for mine, theirs in zip(kept.values, whole.values, strict=True):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(mine[row, :, :length], theirs[row, :, :length], atol=2e-5)


# ------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("rows", [pytest.param(0, marks=pytest.mark.long), 5])  # all at once, and refilled
def test_shared_beginnings_draw_what_unshared_ones_draw(rows):
    requests = alike(np.random.default_rng(1), families=3, members=6)
    shared, unshared = drawn(requests, rows=rows), drawn(requests, rows=rows, shares=False)
    assert_same(shared, unshared)
    whole = sum(len(request.tokens) for request in requests)
    assert unshared.read == whole
    once = tokens_read([request.tokens for request in requests], families_of([r.tokens for r in requests]))
    # Where rows are refilled, a family's keys may be gone before the last of it comes.
    assert shared.read == once if rows == 0 else once <= shared.read < whole
    assert len(set(shared.lengths.reshape(-1).tolist())) > 5, "rows must end unevenly"


@pytest.mark.long
def test_one_of_a_family_draws_what_it_draws_alone():
    requests = alike(np.random.default_rng(2), families=1, members=5)
    together = drawn(requests)
    np.testing.assert_array_equal(drawn(requests[3:4]).tokens[0], together.tokens[3])


def test_the_same_prompt_twice_is_read_once_but_for_its_last_token():
    tokens = np.random.default_rng(3).integers(3, 96, 100).astype(np.int32)
    requests = [Request(tokens, 0), Request(tokens, 1), Request(tokens[:-1], 2)]
    shared = drawn(requests)
    assert_same(shared, drawn(requests, shares=False))
    assert shared.read == 98 + 2 + 2 + 1


def test_families_are_shared_on_eight_devices_as_on_one():
    requests = alike(np.random.default_rng(4), families=4, members=4)
    requests = requests[:16]
    everywhere = drawn(requests, mesh=make_mesh(MeshSection(data=2, fsdp=2, tensor=2)), rows=8)
    assert_same(everywhere, drawn(requests))
    assert everywhere.read < sum(len(request.tokens) for request in requests)
