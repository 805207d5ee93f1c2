"""The tasks of `patarm bench`: the very programs that training runs, on made-up tokens and random weights."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from patarm_jax.arrays import Params, Rollouts, SFTBatch
from patarm_jax.bench.attention import attend, decode
from patarm_jax.bench.case import Bench, Result
from patarm_jax.bench.measure import clock, time_calls, timed
from patarm_jax.bench.shapes import cache_bytes, forward_flops, layer_weights
from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.config.sections import KLSection
from patarm_jax.model.for_sampling import for_sampling
from patarm_jax.model.sharding import REPLICATED_RULES, ROLLOUT_RULES, place_batch
from patarm_jax.model.transformer import init_params
from patarm_jax.recipes.programs import RolloutPrograms, grpo_learner, make_rollout_programs, sft_learner
from patarm_jax.rollout.batches import completion_width, rollouts_of
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import Engine, make_engine, network_for
from patarm_jax.rollout.schedule import Finished, Request, complete
from patarm_jax.run.learner import Batch, Learner
from patarm_jax.train.steps import TrainState

# ----------------------------------------------------------------------------------------------------------- training


def sft(bench: Bench) -> Result:
    """One SFT step on `rows` sequences of `length` tokens, all of them predicted."""
    c = bench.config
    timing = time_calls(sft_update(bench), c.repeats)
    reads = c.rows * c.length * (c.length + 1) // 2
    flops = 3 * forward_flops(bench.arch, c.rows * c.length, reads, c.rows * (c.length - 1))
    shape = f"{c.rows} × {c.length}, {'packed' if c.packing else 'plain'} rows"
    return Result(task="sft", shape=shape, timing=timing, tokens=c.rows * c.length, flops=flops)


def sft_update(bench: Bench) -> Callable[[], object]:
    """A call that takes one SFT step."""
    learner, batch = sft_case(bench)
    return _updates(learner, _state(bench, learner), batch)


def policy_update(bench: Bench) -> Callable[[], object]:
    """A call that takes one policy update on completions of full length."""
    learner, batch = policy_case(bench)
    return _updates(learner, _state(bench, learner), batch)


def _updates(learner: Learner[Batch], state: TrainState, batch: Batch) -> Callable[[], object]:
    def step() -> object:
        nonlocal state
        state, metrics = learner.update(state, learner.frozen, batch)
        return state, metrics

    return step


def sampling(bench: Bench) -> Callable[[], object]:
    """A call that samples G completions of every prompt, each time the same."""
    run, params = _rollouts(bench), init_params(bench.arch, jax.random.key(bench.config.seed), bench.mesh)
    params = for_sampling(params)
    return lambda: run.sample(params, bench.config.seed)


def grpo_config(bench: Bench) -> GRPOConfig:
    """How an update computes."""
    c, default = bench.config, GRPOConfig()
    update = replace(default.update, kl=KLSection(coef=c.kl_coef))
    return replace(default, model=bench.section, update=update, micro_batches=c.micro_batches)


def sft_config(bench: Bench) -> SFTConfig:
    """How a step computes."""
    c = bench.config
    return SFTConfig(model=bench.section, micro_batches=c.micro_batches, packing=c.packing)


def sft_case(bench: Bench) -> tuple[Learner[SFTBatch], SFTBatch]:
    """What takes an SFT step, and the batch it takes it on."""
    c = bench.config
    learner = sft_learner(sft_config(bench), bench.arch, bench.mesh)
    tokens, last = bench.tokens(c.rows, c.length), c.length - 1
    read = np.tile(np.arange(last, dtype=np.int32), (c.rows, 1))
    counts = np.full(c.rows, last, np.int32)
    batch = SFTBatch(tokens, starts=np.zeros_like(tokens), read=read, targets=tokens[:, 1:], counts=counts)
    return learner, place_batch(bench.mesh, batch)


def policy_case(bench: Bench) -> tuple[Learner[Rollouts], Rollouts]:
    """What takes a policy update, and the completions of full length that it takes it on."""
    learner = grpo_learner(grpo_config(bench), bench.arch, bench.mesh)
    return learner, _learnt_from(bench, make_requests(bench), _full_length(bench))


def grpo(bench: Bench) -> Result:
    """One GRPO step: sampling, then an update on what was sampled, with made-up rewards."""
    c, step = bench.config, grpo_step(bench)
    timing = time_calls(step, c.repeats)
    written = float(np.mean([each.lengths.sum() for each in step.finished[-c.repeats :]]))
    medians = {name: float(np.median(each[-c.repeats :])) for name, each in step.phases.items() if each}
    shape = f"{c.responses} × {c.prompt}, G {c.group}, {written / c.responses / c.group:.0f} of {c.new}"
    return Result(task="grpo", shape=shape, timing=timing, tokens=c.responses * c.prompt + int(written), phases=medians)


Timed = TypeVar("Timed")


@dataclass
class GRPOStep:
    """A call that samples with the newest weights and updates them."""

    bench: Bench
    run: "_Rollouts"
    learner: Learner[Rollouts]
    programs: RolloutPrograms
    state: TrainState
    reference: Params | None
    judge: "_Judging | None" = None  # reads what was sampled, where a policy is trained
    finished: list[Finished] = field(default_factory=list)
    judged: list[Finished] = field(default_factory=list)
    phases: dict[str, list[float]] = field(
        default_factory=lambda: {"sample": [], "judge": [], "logprobs": [], "update": []}
    )

    def __call__(self) -> object:
        """One step; gives its metrics."""
        policy, number = self.programs.to_rollout(self.state.params, None), len(self.finished)
        self.finished.append(self._timed("sample", lambda: self.run.sample(policy, number)))
        if (judge := self.judge) is not None:
            self.judged.append(self._timed("judge", lambda: judge(self.finished[-1], number)))
        batch = _learnt_from(self.bench, self.run.requests, self.finished[-1])
        if self.reference is not None:
            score = partial(self.programs.logprobs, self.reference, None, batch)
            batch = replace(batch, ref_logprobs=self._timed("logprobs", score))
        update = partial(self.learner.update, self.state, self.learner.frozen, batch)
        self.state, metrics = self._timed("update", update)
        return metrics

    def _timed(self, phase: str, call: Callable[[], Timed]) -> Timed:
        result, seconds = timed(call)
        self.phases[phase].append(seconds)
        return result


def grpo_step(bench: Bench) -> GRPOStep:
    """A GRPO step with its programs and its state."""
    config = grpo_config(bench)
    learner = grpo_learner(config, bench.arch, bench.mesh)
    programs = make_rollout_programs(config, bench.arch, bench.mesh)
    state = _state(bench, learner)
    # A copy in any case: the update donates the state's own buffers.
    reference = jax.tree.map(jnp.copy, state.params) if bench.config.kl_coef else None
    return GRPOStep(
        bench=bench, run=_rollouts(bench), learner=learner, programs=programs, state=state, reference=reference
    )


def policy(bench: Bench) -> Result:
    """One step of a policy: sampling, a judgement of each response by a judge of the same size, then an update."""
    c, step = bench.config, policy_step(bench)
    timing = time_calls(step, c.repeats)
    medians = {name: float(np.median(each[-c.repeats :])) for name, each in step.phases.items() if each}
    written, judged = (
        float(np.mean([one.lengths.sum() for one in each[-c.repeats :]])) for each in (step.finished, step.judged)
    )
    responses = c.responses * c.group
    prompts = sum(one.read for one in step.judged) / len(step.judged)
    whole = responses * (c.prompt + c.question) + float(np.mean([one.lengths.sum() for one in step.finished]))
    shared = 1 - prompts / whole
    shape = (
        f"{c.responses} × {c.prompt}, G {c.group}, {written / responses:.0f} of {c.new}; judge "
        f"{judged / responses:.0f} of {c.judgement}, of whose prompts {shared:.0%} were shared"
    )
    read = c.responses * c.prompt + responses * (c.prompt + c.question) + int(written)
    return Result("policy", shape, timing, tokens=read + int(written) + int(judged), phases=medians)


def policy_step(bench: Bench) -> GRPOStep:
    """A GRPO step whose samples are judged before it learns from them; the rewards are made up."""
    return replace(grpo_step(bench), judge=_judging(bench))


@dataclass(frozen=True)
class _Judging:
    bench: Bench
    engine: Engine
    params: Params
    prompts: Sequence[Request]

    def __call__(self, finished: Finished, number: int) -> Finished:
        """One judgement of each response, behind its prompt, itself and a question."""
        question = self.bench.tokens(self.bench.config.question)
        asked = [
            np.concatenate([prompt.tokens, written[:length], question])
            for prompt, group, lengths in zip(self.prompts, finished.tokens, finished.lengths, strict=True)
            for written, length in zip(group, lengths, strict=True)
        ]
        requests = [Request(tokens.astype(np.int32), row) for row, tokens in enumerate(asked)]
        return complete(self.engine, self.params, requests, jax.random.key(number))


def _judging(bench: Bench) -> _Judging:
    c = bench.config
    params = SamplingParams(_stops(bench), c.judgement)
    network = network_for(bench.section, bench.arch, bench.mesh, c.batch_invariant)
    engine = make_engine(network, bench.mesh, 1, params, c.decode_rows, c.halvings)
    return _Judging(bench, engine, sampled_weights(bench, c.seed + 1), make_requests(bench))


def logprobs(bench: Bench) -> Result:
    """Log-probs of G completions of each prompt, which is computed once for them."""
    c = bench.config
    programs = make_rollout_programs(grpo_config(bench), bench.arch, bench.mesh)
    params = jax.tree.map(lambda x: x.astype(c.dtype), init_params(bench.arch, jax.random.key(c.seed), bench.mesh))
    batch = _learnt_from(bench, make_requests(bench), _full_length(bench))
    timing = time_calls(lambda: programs.logprobs(params, None, batch), c.repeats)
    written = c.responses * c.group * c.new
    own = c.responses * c.group * c.new * (c.new + 1) // 2
    reads = c.responses * c.prompt * (c.prompt + 1) // 2 + written * c.prompt + own
    flops = forward_flops(bench.arch, c.responses * c.prompt + written, reads, written)
    return Result(
        task="logprobs",
        shape=f"{c.responses} × {c.prompt}, G {c.group} × {c.new}",
        timing=timing,
        tokens=written,
        flops=flops,
    )


# ----------------------------------------------------------------------------------------------------------- sampling


def sample(bench: Bench) -> Result:
    """G completions of each prompt, of at most `new` tokens, or `longest`; with `mean_new` of geometric lengths."""
    c, run = bench.config, _rollouts(bench)
    params = sampled_weights(bench, c.seed)
    finished: list[Finished] = []

    def call() -> None:
        finished.append(run.sample(params, len(finished)))

    timing = time_calls(call, c.repeats)
    written = float(np.mean([each.lengths.sum() for each in finished[-c.repeats :]]))
    steps = float(np.mean([each.row_steps for each in finished[-c.repeats :]])) / run.rows
    item = jnp.dtype(c.dtype).itemsize
    each = (layer_weights(bench.arch) + bench.arch.vocab_size * bench.arch.hidden_size) * item
    prompts = min(c.responses, -(-run.rows // c.group)) * c.prompt
    own = written / (c.responses * c.group) / 2 * run.rows
    read = steps * (each + (prompts + own) * cache_bytes(bench.arch, item))
    mean = written / (c.responses * c.group)
    shape = f"{c.responses} × {c.prompt}, G {c.group}, {mean:.0f} of {c.new}, {run.rows} rows"
    return Result(task="sample", shape=shape, timing=timing, tokens=int(written), read=read)


@dataclass(frozen=True)
class _Rollouts:
    engine: Engine
    requests: list[Request]
    rows: int

    def sample(self, params: Params, number: int) -> Finished:
        return complete(self.engine, params, self.requests, jax.random.key(number))


def _rollouts(bench: Bench) -> _Rollouts:
    c, engine = bench.config, make_sampler(bench)
    most = SamplingParams(engine.sampling.stop_ids, min(c.longest or c.new, c.new))
    requests = [replace(request, sampling=most) for request in make_requests(bench)]
    every = c.responses * c.group
    rows = c.decode_rows if c.batch_invariant else min(c.decode_rows or every, every)
    return _Rollouts(engine, requests, rows)


def make_sampler(bench: Bench) -> Engine:
    """What samples G completions of each prompt."""
    c = bench.config
    params = SamplingParams(_stops(bench), c.new)
    network = network_for(bench.section, bench.arch, bench.mesh, c.batch_invariant)
    return make_engine(network, bench.mesh, c.group, params, c.decode_rows, c.halvings)


def _stops(bench: Bench) -> tuple[int, ...]:
    """Random weights give every token about the same chance: so many ids end a completion after mean_new tokens."""
    mean = bench.config.mean_new
    return tuple(range(round(bench.arch.vocab_size / mean))) if mean else (-1,)


def sampled_weights(bench: Bench, seed: int) -> Params:
    """Random weights as the sampler takes them."""
    c = bench.config
    rules = ROLLOUT_RULES if c.mesh.rollout == "tensor" else REPLICATED_RULES
    cast_down = jax.jit(lambda params: for_sampling(jax.tree.map(lambda x: x.astype(c.dtype), params)))
    weights: Params = cast_down(init_params(bench.arch, jax.random.key(seed), bench.mesh, rules))
    return weights


def make_requests(bench: Bench) -> list[Request]:
    """The prompts, made up."""
    prompts = bench.tokens(bench.config.responses, bench.config.prompt)
    prompts[:, : bench.config.alike] = prompts[0, : bench.config.alike]
    return [Request(tokens, row) for row, tokens in enumerate(prompts)]


# ------------------------------------------------------------------------------------------------------------- pieces


def load(bench: Bench) -> Result:
    """Weights from a Hugging Face folder, in the disk's cache, onto the devices."""
    from patarm_jax.model import weights  # the only task that needs the library of their files

    c = bench.config
    with tempfile.TemporaryDirectory() as folder:
        params = init_params(bench.arch, jax.random.key(c.seed), bench.mesh)
        size = sum(x.size for x in jax.tree.leaves(params))
        weights.save(params, bench.arch, Path(folder) / "model")
        del params
        timing = time_calls(lambda: weights.load(Path(folder) / "model", bench.mesh), c.repeats)
    return Result("load", f"{size / 1e6:,.0f}M weights, bfloat16", timing, read=2 * size)


def compile_update(bench: Bench) -> Result:
    """Tracing and compiling the SFT step anew, and once more from the disk's cache where there is one."""
    learner, batch = sft_case(bench)

    def anew() -> None:
        jax.clear_caches()
        learner.update.lower(learner.shape, learner.frozen, batch).compile()

    kept = jax.config.values["jax_compilation_cache_dir"]
    _keep_programs_in(None)
    timing = time_calls(anew, max(1, bench.config.repeats // 3))
    _keep_programs_in(kept)
    clock(anew)
    phases = {"from the disk": clock(anew)} if kept else {}
    return Result("compile", f"sft {bench.config.rows} × {bench.config.length}", timing, phases=phases)


def _keep_programs_in(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # it would remember whether there was one


TASKS: dict[str, Callable[[Bench], Result]] = {
    "sft": sft,
    "sample": sample,
    "logprobs": logprobs,
    "grpo": grpo,
    "policy": policy,
    "attention": attend,
    "decode": decode,
    "load": load,
    "compile": compile_update,
}


def _state(bench: Bench, learner: Learner) -> TrainState:
    return learner.new_state(init_params(bench.arch, jax.random.key(bench.config.seed), bench.mesh))


def _full_length(bench: Bench) -> Finished:
    """Made-up completions, all of `new` tokens."""
    c = bench.config
    return Finished(
        tokens=bench.tokens(c.responses, c.group, c.new),
        lengths=np.full((c.responses, c.group), c.new, np.int32),
        logprobs=np.zeros((c.responses, c.group, c.new), np.float32),
        truncated=np.ones((c.responses, c.group), bool),
    )


def _learnt_from(bench: Bench, requests: list[Request], finished: Finished) -> Rollouts:
    """What was sampled, with made-up advantages."""
    c = bench.config
    width = completion_width(int(finished.lengths.max()), c.new)
    advantages = place_batch(bench.mesh, bench.rng.normal(size=finished.lengths.shape).astype(np.float32))
    return replace(rollouts_of(bench.mesh, requests, finished, c.prompt, width), advantages=advantages)
