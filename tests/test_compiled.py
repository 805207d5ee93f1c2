"""What compiled programs do, counted in their text: no more than what an analysis of the network says they must."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.bench import hlo
from patarm_jax.bench.ahead import counted
from patarm_jax.bench.case import Bench
from patarm_jax.bench.shapes import SHAPES, layer_weights, step_flops
from patarm_jax.bench.tasks import policy_case, sft_case
from patarm_jax.config.recipes import BenchConfig
from patarm_jax.config.sections import MeshSection
from patarm_jax.model.attention import CAUSAL_PARTS, QUERY_BLOCK
from patarm_jax.model.kernels import Kernel
from patarm_jax.model.sharding import MESH_AXES, make_mesh
from patarm_jax.model.transformer import abstract_params, forward, init_params
from patarm_jax.rollout.draw import RARE
from patarm_jax.train.losses import HEAD_TOKENS

FLOAT = 4


def on_one_device(**shape) -> Bench:
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=types, devices=jax.devices()[:1])
    return Bench(BenchConfig(**shape), SHAPES["tiny"], mesh)


def compiled(function, *arguments, **settings) -> str:
    return jax.jit(function, **settings).lower(*arguments).compile().as_text()


def flops_of(text: str) -> float:
    return sum(launch.times * launch.flops for launch in hlo.launches(text))


def causal_reads(length: int) -> int:
    """Scores of the portable attention in a row: each part of the queries looks at all keys up to its end."""
    step = QUERY_BLOCK * max(2, -(-length // (QUERY_BLOCK * CAUSAL_PARTS)))
    ends = [min(start + step, length) for start in range(0, length, step)]
    return sum((end - start) * end for start, end in zip(range(0, length, step), ends, strict=True))


def in_chunks(tokens: int) -> int:
    """The head's last chunk is filled up."""
    return tokens + -tokens % min(HEAD_TOKENS, tokens)


# ------------------------------------------------------------------------------------------------------ the counting


def test_a_matmul_and_its_bytes():
    a, b = jnp.ones((64, 128)), jnp.ones((128, 32))
    (launch,) = hlo.launches(compiled(jnp.matmul, a, b))
    assert (launch.flops, launch.times) == (2 * 64 * 128 * 32, 1)
    assert launch.bytes == FLOAT * (64 * 128 + 128 * 32 + 64 * 32)


def test_matmuls_of_a_batch_count_for_each_of_its_members():
    a, b = jnp.ones((5, 64, 128)), jnp.ones((5, 128, 32))
    assert flops_of(compiled(jnp.matmul, a, b)) == 5 * 2 * 64 * 128 * 32


def test_loops_within_loops_count_as_often_as_they_go_round():
    w = jnp.ones((64, 64))

    def inner(x, _):
        return x @ w, None

    def outer(x, _):
        return jnp.sin(jax.lax.scan(inner, x, length=3)[0]), None

    text = compiled(lambda x: jax.lax.scan(outer, x, length=5)[0], w)
    assert flops_of(text) == 5 * 3 * 2 * 64**3


def test_a_loop_without_an_end_counts_once_and_says_so():
    w = jnp.ones((64, 64))
    text = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ w, x), w)
    launches = [launch for launch in hlo.launches(text) if launch.flops]
    assert [(launch.times, launch.in_open_loop) for launch in launches] == [(1, True)]


def test_of_what_is_sliced_or_updated_in_place_only_the_slice_counts():
    rows, width = 4096, 256

    def written(x, at):
        row = jax.lax.dynamic_slice_in_dim(x, at, 1)
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.sin(row), at + 1, axis=0)

    text = compiled(written, jnp.ones((rows, width)), jnp.int32(3), donate_argnums=0)
    assert sum(launch.bytes for launch in hlo.launches(text)) < 16 * width * FLOAT
    whole = compiled(lambda x: jnp.sin(x), jnp.ones((rows, width)))
    assert sum(launch.bytes for launch in hlo.launches(whole)) == 2 * rows * width * FLOAT


@pytest.mark.parametrize(("name", "branch"), [("often", "dear"), (RARE, "cheap")])
def test_of_a_condition_the_dearer_branch_counts_unless_it_is_named_rare(name, branch):
    w = jnp.ones((64, 64))

    def both(x, flag):
        with jax.named_scope(name):
            return jax.lax.cond(flag, lambda x: x @ w @ jnp.sin(w @ x), jnp.cos, x)

    assert bool(flops_of(compiled(both, w, True))) == (branch == "dear")


def test_kernels_of_others_count_by_what_is_known_of_them():
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[8,16]) -> f32[8] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %k = f32[8]{0} custom-call(%a), custom_call_target="triton", metadata={op_name="jit(f)/flash/pallas_call"}
}
"""
    (plain,) = hlo.launches(text)
    assert (plain.kind, plain.bytes, plain.flops) == ("triton", 8 * 16 * FLOAT + 8 * FLOAT, 0)
    (known,) = hlo.launches(text, {"flash/pallas": lambda sizes: (7.0, sizes[0] / 2)})
    assert (known.bytes, known.flops) == (8 * 16 * FLOAT / 2, 7.0)


def test_what_devices_tell_each_other():
    mesh = jax.make_mesh((8,), ("devices",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.device_put(jnp.ones((64, 32)), split)
    text = compiled(lambda x: x.sum(axis=0), x, out_shardings=whole)
    told = [(launch.kind, launch.told) for launch in hlo.launches(text) if launch.told]
    assert told == [("all-reduce", 32 * FLOAT)]


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.launches("HloModule m")
    text = compiled(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"), jnp.ones((1, 8, 64, 64)), jnp.ones((8, 8, 3, 3)))
    with pytest.raises(ValueError, match="convolutions"):
        hlo.launches(text)


# ---------------------------------------------------------------------------------------------------- whole programs


@pytest.mark.parametrize(
    "remat", ["full", "attention", *(pytest.param(remat, marks=pytest.mark.long) for remat in ("none", "dots"))]
)
def test_a_step_of_sft_computes_what_it_must(remat):
    rows, length = 4, 256
    learner, batch = sft_case(on_one_device(rows=rows, length=length, remat=remat))
    text = learner.update.lower(learner.shape, learner.frozen, batch).compile().as_text()
    predicted = in_chunks(rows * (length - 1))
    least = step_flops(SHAPES["tiny"], rows * length, rows * causal_reads(length), predicted, remat)
    assert flops_of(text) == pytest.approx(least, rel=0.001)


def test_a_bench_counts_what_the_program_does_that_it_times():
    """Where that is one program: on eight devices each does its part."""
    shape = dict(rows=8, length=64, remat="none")
    flops, moved = counted(on_one_device(**shape), "sft")
    least = step_flops(SHAPES["tiny"], 8 * 64, 8 * causal_reads(64), in_chunks(8 * 63), "none")
    assert flops == pytest.approx(least, rel=0.001)
    weights = FLOAT * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(SHAPES["tiny"])))
    assert moved > 7 * weights  # AdamW reads weights, moments and gradient, and writes all but the last
    assert counted(on_one_device(**shape), "sample") is None


@pytest.mark.parametrize("kernel", ["pallas", pytest.param("splash", marks=pytest.mark.long)])
def test_attention_is_kept_or_computed_again_as_remat_says(kernel):
    """Of kernels too: with attention kept, the backward pass computes the layers' matmuls again and nothing else."""
    wide, tokens = replace(SHAPES["tiny"], head_dim=128, num_hidden_layers=2), 128
    how = partial(forward, arch=wide, kernel=Kernel(kernel, interpret=True))
    given = jax.eval_shape(lambda: init_params(wide, jax.random.key(0))), jnp.zeros((1, tokens), jnp.int32)

    def flops(remat):
        gradient = jax.grad(lambda params, prompt: how(params, prompt=prompt, remat=remat).prompt.sum())
        return flops_of(jax.jit(gradient).lower(*given).compile().as_text())

    again = layer_weights(wide) - 2 * wide.hidden_size * wide.intermediate_size
    assert flops("attention") - flops("none") == 2 * tokens * again
    assert flops("full") > flops("attention")


def test_what_layers_hand_on_is_split_over_tensor_and_changes_nothing():
    shape = dict(responses=4, prompt=64, group=2, new=32, remat="full")
    learnt, texts = [], []
    spread = Bench(BenchConfig(**shape), SHAPES["tiny"], make_mesh(MeshSection(data=2, fsdp=2, tensor=2)))
    for bench in (on_one_device(**shape), spread):
        learner, batch = policy_case(bench)
        state = learner.new_state(init_params(bench.arch, jax.random.key(0), bench.mesh))
        compiled = learner.update.lower(state, None, batch).compile()
        texts.append(compiled.as_text())
        learnt.append(learner.update(state, None, batch)[0].params)
    of_row, of_all = "f32[4,1,{},256]".format, 64 + 2 * 32  # layers, rows of a device, tokens, width
    assert of_row(of_all // 2) in texts[1] and of_row(of_all) not in texts[1]
    for mine, theirs in zip(*map(jax.tree.leaves, learnt), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.long), 2])
def test_an_update_computes_each_prompt_once_for_its_group(micro_batches):
    prompts, width, group, new = 4, 64, 4, 32
    shape = dict(responses=prompts, prompt=width, group=group, new=new, micro_batches=micro_batches)
    learner, batch = policy_case(on_one_device(**shape, remat="full"))
    text = learner.update.lower(learner.shape, learner.frozen, batch).compile().as_text()
    written = group * new
    own = width * width + written * width + group * new * new  # each is shorter than a block of queries
    tokens, predicted = prompts * (width + written), in_chunks(prompts * written)
    least = step_flops(SHAPES["tiny"], tokens, prompts * own, predicted, "full")
    assert flops_of(text) == pytest.approx(least, rel=0.03)
