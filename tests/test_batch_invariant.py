"""In bfloat16 too, what is drawn for a prompt and what a response scores is the same to the bit in any company."""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.cli import main
from patarm_jax.config.sections import MeshSection, ModelSection
from patarm_jax.model import attention
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.for_sampling import for_sampling
from patarm_jax.model.pages import Held
from patarm_jax.model.sharding import ROLLOUT_RULES, make_mesh
from patarm_jax.model.transformer import init_params
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import make_engine, network_of
from patarm_jax.rollout.probabilities import Unscored, expected_scores, make_logprobs
from patarm_jax.rollout.scalar import make_scorer, scores
from patarm_jax.rollout.schedule import Request, complete
from tests.test_beginnings import ALONE, ARCH
from tests.toys import TINY, hf_model, small_world, tiny_tokenizer_folder

KEY = jax.random.key(5)
STOPS = (5, 6, 7, 8)
ROWS = 4


@cache
def network(mesh, scalar=False):
    """The shape of a network of random weights, which are large enough that all that was read counts."""
    arch = Architecture(**TINY | {"num_hidden_layers": 1}, scalar_head=True) if scalar else ARCH
    params = for_sampling(init_params(arch, jax.random.key(0), mesh, ROLLOUT_RULES))
    wide = jax.tree.map(lambda x: x * 8 if x.ndim > 1 and x.shape[-1] > 8 else x, params)
    return arch, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)


@cache
def engine(mesh):
    return make_engine(network_of(ARCH, "bfloat16", batch_invariant=True), mesh, 2, SamplingParams(STOPS, 140), ROWS)


def some_requests():
    """Prompts in four buckets, some of which are read in two blocks; some of their completions need a second page."""
    rng = np.random.default_rng(0)
    lengths, limits = (20, 320, 60, 100, 20, 350, 90, 30, 120, 64), (4, 140, 9, 12, 140, 5, 30, 8, 17, 3)
    prompts = [rng.integers(9, 96, length).astype(np.int32) for length in lengths]
    each = enumerate(zip(prompts, limits, strict=True))
    return [Request(prompt, 7 * n, SamplingParams(STOPS if n % 2 else (), limit)) for n, (prompt, limit) in each]


def drawn(mesh, requests):
    found = complete(engine(mesh), network(mesh)[1], requests, KEY)
    every = zip(requests, found.tokens, found.lengths, found.logprobs, strict=True)
    return {one.sample_id: tuple(x.tobytes() for x in arrays) for one, *arrays in every}


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.long)])
def test_completions_are_the_same_in_any_company_and_order(devices):
    mesh = ALONE if devices == 1 else make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    requests = some_requests()
    whole = drawn(mesh, requests)
    assert drawn(mesh, requests[::-1]) == whole
    for some in (requests[1:2], requests[3:8], [requests[n] for n in (9, 0, 4)]):
        alone = drawn(mesh, some)
        assert alone == {name: whole[name] for name in alone}


def test_prompts_that_begin_alike_are_read_as_if_each_was_alone():
    begin = np.random.default_rng(1).integers(9, 96, 100).astype(np.int32)
    ends = [np.full(n, 11, np.int32) for n in (3, 20, 28)]
    requests = [Request(np.concatenate([begin, end]), n) for n, end in enumerate(ends)]
    whole = drawn(ALONE, requests)
    for request in requests:
        assert drawn(ALONE, [request]) == {request.sample_id: whole[request.sample_id]}


@pytest.mark.parametrize("pages, width", [(3, 512), (3, 768), (2, 256), (150, 512)])
def test_keys_behind_what_a_page_holds_change_no_bit(pages, width, monkeypatch):
    """However wide pages are; and many of them, of which few are read at a time."""
    if pages > 100:
        monkeypatch.setattr(attention, "WHOLE_BYTES", 1)
    rng = np.random.default_rng(pages)
    held = np.minimum(rng.integers(0, width + 1, pages), 700).astype(np.int32)
    q = jnp.asarray(rng.normal(size=(pages, 2, 4, 16)), jnp.bfloat16)
    k = jnp.asarray(rng.normal(size=(pages, 2, 16, width)), jnp.bfloat16)
    v = jnp.asarray(rng.normal(size=(pages, 2, width, 16)), jnp.bfloat16)

    def read(q, k, v):
        read_pages = jax.jit(partial(attention.read_pages, blockwise=True))
        return read_pages(q, (k,), (v,), Held(jnp.asarray(held[: len(q)])))

    wider = [(0, 0)] * 4
    wider[3] = (0, 512)
    found = read(q, k, v)
    more = read(q, jnp.pad(k, wider, constant_values=9.0), jnp.pad(v, [*wider[:2], wider[3], (0, 0)]))
    for one, other in zip(found, more, strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(attention, "KEY_BLOCK", width)  # all of them at once
    for one, other in zip(found, read(q[:3], k[:3], v[:3]), strict=True):
        np.testing.assert_allclose(one[:3], other, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.long)])
def test_scores_of_reward_models_are_the_same_in_any_company_and_order(devices):
    mesh = ALONE if devices == 1 else make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    arch, params = network(mesh, scalar=True)
    scorer = make_scorer(arch, mesh, ModelSection(dtype="bfloat16"))
    rng = np.random.default_rng(2)
    read = [rng.integers(9, 96, n).astype(np.int32) for n in (30, 500, 64, 90, 65, 200, 700, 41)]
    whole = dict(scores(scorer, params, mesh, read, batch_invariant=True))
    assert len(set(whole.values())) == len(read)
    for some in ([3], [7, 2, 5], [6, 0]):
        found = dict(scores(scorer, params, mesh, [read[n] for n in some], batch_invariant=True))
        assert [found[place] for place in range(len(some))] == [whole[n] for n in some]


def test_expected_scores_are_the_same_in_any_company_and_order():
    arch, params = network(ALONE)
    logprobs = make_logprobs(arch, ALONE, ModelSection(dtype="bfloat16"))
    rng = np.random.default_rng(3)
    behind = tuple((9 + n,) if n < 10 else (10, 9) for n in range(11))
    ones = [Unscored(rng.integers(9, 96, n).astype(np.int32), behind) for n in (40, 300, 64, 65, 90, 30, 260)]
    whole = list(expected_scores(logprobs, params, ALONE, ones, batch_invariant=True))
    assert len({one.score for one in whole}) == len(ones)
    for some in ([4], [6, 0, 3], [1, 5]):
        again = expected_scores(logprobs, params, ALONE, [ones[n] for n in some], batch_invariant=True)
        assert list(again) == [whole[n] for n in some]
    usual = list(expected_scores(logprobs, params, ALONE, ones))
    np.testing.assert_allclose([one.score for one in usual], [one.score for one in whole], rtol=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("invariant")
    hf_model(seed=2, vocab_size=512, max_position_embeddings=2048).save_pretrained(
        tiny_tokenizer_folder(root / "judge")
    )
    small_world(root)
    return root


def judged(folder, rows, *more):
    """What `patarm judge` writes for the first rows of a file."""
    every = [
        {"prompt": f"Topic {n}? " * (1 + 5 * n), "chosen": f"good {n}", "rejected": f"bad {n} " * 9, "domain": "chat"}
        for n in range(6)
    ]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every[:rows]))
    (folder / "judged.jsonl").unlink(missing_ok=True)
    command = ["judge", str(folder / "judge"), "--input", str(folder / "some.jsonl"), "--votes", "2"]
    command += ["--output", str(folder / "judged.jsonl"), "--model.dtype", "bfloat16"]
    command += ["--sampling.max_new_tokens", "20", "--sampling.batch_invariant", "true", *more]
    if code := main(command):
        return code
    return [json.loads(line)["judgements"] for line in (folder / "judged.jsonl").read_text().splitlines()]


def test_a_judged_row_does_not_depend_on_the_rows_behind_it(folder):
    rows = "--sampling.rows", "64"
    every = judged(folder, 6, *rows)
    texts = [one["text"] for row in every for judgements in row.values() for one in judgements]
    assert len(set(texts)) == 6 * 2 * 2
    assert judged(folder, 2, *rows) == every[:2]


def test_without_a_number_of_rows_it_is_refused(folder, capsys):
    assert judged(folder, 2, "--sampling.rows", "0") == 2
    assert "batch_invariant is true and rows, beside it, is 0" in capsys.readouterr().err


def test_a_server_is_not_asked_for_it(folder, capsys):
    endpoint = "--endpoint.url", "http://localhost:9/v1", "--endpoint.model", "judge"
    command = ["judge", "--input", str(folder / "some.jsonl"), "--output", str(folder / "served.jsonl"), *endpoint]
    assert main([*command, "--sampling.batch_invariant", "true"]) in (1, 2)
    assert "sampling.batch_invariant is on, and a server puts its own batches together" in capsys.readouterr().err
