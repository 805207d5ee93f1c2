"""The schedule of a sampler: which prompt comes into which place when, and which row begins what.

Runs on the host, between runs of the compiled loop. Longest prompts first, so that short ones do not pay for long ones:
prompts are read in buckets of length, and when the long ones are through, and when rows run out, places shrink. Prompts
that begin alike come one after another: the first is read whole, the others take its keys as far as they go along with
it. The schedule decides when a completion is drawn, never what is drawn.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import jax
import numpy as np
from jax.experimental import multihost_utils

from patarm_jax.arrays import Beginnings, Params, Prompts
from patarm_jax.model.sharding import (
    batch_shards,
    fetch,
    local_part,
    place_batch,
    process_in,
)
from patarm_jax.padding import WIDTH_MULTIPLE, bucket
from patarm_jax.rollout import sampler
from patarm_jax.rollout.beginnings import dealt, families_of
from patarm_jax.rollout.draw import SamplingParams, row_sampling
from patarm_jax.rollout.engine import (
    FEW,
    Engine,
    place_width,
    places_for,
    prompts_at_a_time,
    sizes_for,
    with_more_pages,
)
from patarm_jax.rollout.sampler import Admission

# The share of the rows, one in so many, that must have ended before waiting ones take their places.
REFILL_SHARE = 8


@dataclass(frozen=True)
class Request:
    """One prompt to be completed G times."""

    tokens: Sequence[int] | np.ndarray
    sample_id: int  # sampling keys are folded from it, so it must not depend on the batch
    sampling: SamplingParams | None = None  # how its completions are drawn; None: as the engine draws


@dataclass(frozen=True)
class Group:
    """The G completions of one request; numpy's."""

    index: int  # the request's place among this process's
    tokens: np.ndarray  # [G, Tc] int32
    lengths: np.ndarray  # [G] int32, the end token included
    logprobs: np.ndarray  # [G, Tc] float32
    truncated: np.ndarray  # [G] bool
    named: np.ndarray  # [G, Tc, n] float32, the log-probs of the n tokens that the request names
    read: int  # tokens of the prompt that were read for it alone


@dataclass(frozen=True)
class Finished:
    """The G completions of this process's requests, in their order; numpy's."""

    tokens: np.ndarray  # [n, G, Tc] int32
    lengths: np.ndarray  # [n, G] int32, the end token included
    logprobs: np.ndarray  # [n, G, Tc] float32
    truncated: np.ndarray  # [n, G] bool
    # One array for each request, [G, Tc, n] float32: the log-probs of its n named tokens at every step; 0 past the end.
    named: tuple[np.ndarray, ...] = ()
    read: int = 0  # tokens of all prompts that were read, where it is known; what prompts share counts once
    row_steps: int = 0  # rows × steps computed, over all devices, where it is known: to compare with the lengths' sum


@dataclass
class _Device:
    """What one of the devices that share the batch has to do, and where it stands."""

    waiting: deque[int]  # requests whose prompt is not in yet
    prompts: list[int | None]  # place → request
    rows: list[tuple[int, int] | None]  # row → (request, rollout) that is written on it
    ready: deque[tuple[int, int]] = field(default_factory=deque)  # (request, rollout) whose prompt is in
    left: dict[int, int] = field(default_factory=dict)  # request whose prompt is in → rollouts that have not ended
    kept: dict[int, int] = field(default_factory=dict)  # place → request whose keys lie there, though it may have ended

    def free_places(self) -> list[int]:
        return [place for place, request in enumerate(self.prompts) if request is None]

    def free_rows(self) -> list[int]:
        return [row for row, work in enumerate(self.rows) if work is None]


def complete(engine: Engine, params: Params, requests: Sequence[Request], key: jax.Array) -> Finished:
    """Draws G completions of each request.

    Args:
        engine: from `make_engine`.
        params: the network's weights.
        requests: this process's; all processes have equally many.
        key: of this run; the same key, row and weights give the same completions, in whatever company.

    Returns:
        the completions.
    """
    schedule = _Schedule(engine, params, requests, key)
    groups = sorted(_groups(schedule), key=lambda group: group.index)
    return replace(stacked(groups), row_steps=schedule.row_steps)


def stacked(groups: Sequence[Group]) -> Finished:
    """The completions of groups, in the order given."""
    tokens, lengths, logprobs, truncated = (
        np.stack([getattr(group, name) for group in groups]) for name in ("tokens", "lengths", "logprobs", "truncated")
    )
    return Finished(
        tokens=tokens,
        lengths=lengths,
        logprobs=logprobs,
        truncated=truncated,
        named=tuple(group.named for group in groups),
        read=sum(group.read for group in groups),
    )


def completed_groups(engine: Engine, params: Params, requests: Sequence[Request], key: jax.Array) -> Iterator[Group]:
    """Draws G completions of each request and gives each group as soon as it has ended, the longest prompts first.

    Arguments as of `complete`. What is drawn is the same; no more is held than is being written.
    """
    return _groups(_Schedule(engine, params, requests, key))


def _groups(schedule: "_Schedule") -> Iterator[Group]:
    while schedule.unfinished():
        yield from schedule.turn()


class _Schedule:
    """One run. Every process holds the whole schedule; each feeds and reads its own devices alone."""

    def __init__(self, engine: Engine, params: Params, requests: Sequence[Request], key: jax.Array) -> None:
        self.engine, self.params, self.key, self.requests = engine, params, key, requests
        self.shards = batch_shards(engine.mesh)
        process, processes = process_in(engine.mesh)
        self.first = len(requests) * process  # a request's number, over all processes
        self.lengths = _everyones([len(request.tokens) for request in requests], processes)
        families = families_of([request.tokens for request in requests] if engine.shares else [])
        alone = [0] * len(requests)
        self.family = _everyones(families.number.tolist() or list(range(len(requests))), processes)
        self.shared = _everyones(families.shared.tolist() or alone, processes)
        self.sampling = [_allowed(request.sampling or engine.sampling, engine.sampling) for request in requests]
        longest = [max(len(one.stop_ids) for one in self.sampling), max(len(one.named_ids) for one in self.sampling)]
        stops, named = _everyones(longest, processes).reshape(-1, 2).max(axis=0).tolist()
        each = self.shards // processes
        self.mine = range(process * each, (process + 1) * each)
        shares = [share for process in range(processes) for share in self._shares(process, each)]
        prompts, rows = places_for(engine, max(map(len, shares)))
        self.devices = [_Device(deque(share), [None] * prompts, [None] * rows) for share in shares]
        self.width = place_width(engine, int(self.lengths.max()))
        self.least = rows / 2**engine.halvings
        self.sizes = sizes_for(engine, prompts, self.width, rows, stops, named)
        self.slots = engine.start(self.sizes)
        self.row_steps = self.steps = 0
        self.writing: dict[int, Group] = {}  # this process's requests whose prompts are in
        self.ended: list[Group] = []  # in this turn

    def _shares(self, process: int, devices: int) -> list[list[int]]:
        """The requests of each device of a process: families together, longest prompt first, alike work for all."""
        count = len(self.requests)
        numbers = range(process * count, (process + 1) * count)
        families: dict[int, list[int]] = {}
        for number in sorted(numbers, key=lambda number: -int(self.lengths[number])):
            families.setdefault(int(self.family[number]), []).append(number)
        return dealt(list(families.values()), devices)

    def unfinished(self) -> bool:
        """Whether there is anything left to write, on whatever device."""
        return any(device.waiting or device.left for device in self.devices)

    def turn(self) -> list[Group]:
        """Fills the places, writes for a while, and gives this process's groups that have ended."""
        self.ended = []
        self._bring_in()
        self._shrink()
        self._advance()
        return self.ended

    # ------------------------------------------------------------------------------------------------------ prompts

    def _bring_in(self) -> None:
        """Reads prompts as long as there are places, on all devices together."""
        while True:
            found = [self._next(device) for device in self.devices]
            whole, behind = ([each[which] for each in found] for which in (0, 1))
            if not any(whole) and not any(behind):
                return
            self._read(*((whole, False) if any(whole) else (behind, True)))

    def _next(self, device: _Device) -> tuple[list[int], list[int]]:
        """The waiting requests that places are free for: those to be read whole, and those whose beginning is there.

        One whose family another begins comes when that one is in.
        """
        there = {int(self.family[request]) for request in device.kept.values() if self.shared[request]}
        whole, behind, begun = [], [], set()
        for request in islice(device.waiting, len(device.free_places())):
            family = int(self.family[request])
            if self.shared[request] and family in there:
                behind.append(request)
            elif family not in begun:
                whole.append(request)
                begun.add(family)
        return whole, behind

    def _read(self, wanted: list[list[int]], is_behind: bool) -> None:
        """Reads the first of the requests that are wanted of each device, as many as are read at a time."""
        read = self.lengths - self.shared if is_behind else self.lengths
        wanted = [sorted(requests, key=lambda one: -int(read[one])) for requests in wanted]
        longest = max(int(read[requests[0]]) for requests in wanted if requests)
        width = bucket(longest)
        if is_behind:  # so many widths as there are of beginnings would be too many programs
            width = max(WIDTH_MULTIPLE, 1 << (longest - 1).bit_length())
        if self.engine.batch_invariant:
            wanted = [[one for one in requests if bucket(int(read[one])) == width] for requests in wanted]
        number = self._number(width, max(map(len, wanted)), is_behind)
        wanted = [requests[:number] for requests in wanted]
        tokens = np.zeros((len(self.mine), number, width), np.int32)
        ids, lengths, shared, like = np.zeros((4, *tokens.shape[:2]), np.int32)
        lengths += 1
        place = np.full(tokens.shape[:2], len(self.devices[0].prompts), np.int32)
        sampling = [self.engine.sampling] * lengths.size
        for shard, device in enumerate(self.devices):
            sources = {int(self.family[request]): source for source, request in device.kept.items()}
            free = self._free_places(device)
            for n, (request, where) in enumerate(zip(wanted[shard], free, strict=False)):
                device.waiting.remove(request)
                device.prompts[where] = device.kept[where] = request
                device.left[request] = self.engine.group
                device.ready.extend((request, rollout) for rollout in range(self.engine.group))
                if shard in self.mine:
                    given, index = self.requests[request - self.first], shard - self.mine.start
                    if is_behind:
                        shared[index, n] = self.shared[request]
                        like[index, n] = sources[int(self.family[request])]
                    rest = given.tokens[shared[index, n] :]
                    self.writing[request] = self._unwritten(request - self.first, len(rest))
                    tokens[index, n, : len(rest)] = rest
                    lengths[index, n], ids[index, n], place[index, n] = len(rest), given.sample_id, where
                    sampling[index * number + n] = self.sampling[request - self.first]
        flat = tuple(x.reshape(-1, *x.shape[2:]) for x in (tokens, lengths, ids))
        drawn_so = row_sampling(sampling, self.sizes.stops, self.sizes.named)
        begin = Beginnings(like, shared.reshape(-1)) if is_behind else None
        prompts, drawn_so, where, begin = place_batch(self.engine.mesh, (flat, drawn_so, place, begin))
        self.slots = self.engine.bring_in(self.params, self.slots, Prompts(*prompts), drawn_so, where, self.key, begin)

    def _number(self, width: int, wanted: int, is_behind: bool) -> int:
        """How many prompts of a width are read at a time."""
        many = prompts_at_a_time(width, len(self.devices[0].prompts), self.width if is_behind else 0)
        is_writing = any(work is not None for device in self.devices for work in device.rows)
        few = self.engine.batch_invariant or is_behind or (is_writing and wanted < many)
        return max(1, many // FEW) if few else many

    def _free_places(self, device: _Device) -> list[int]:
        """Those first whose keys nobody waits for."""
        next_ones = islice(device.waiting, len(device.prompts) + 1)
        awaited = {int(self.family[request]) for request in next_ones if self.shared[request]}

        def is_awaited(place: int) -> bool:
            return place in device.kept and int(self.family[device.kept[place]]) in awaited

        return sorted(device.free_places(), key=is_awaited)

    # --------------------------------------------------------------------------------------------------------- rows

    def _advance(self) -> None:
        """Lets waiting rollouts begin on free rows, draws for a while, and takes what has ended."""
        engine, size = self.engine, len(self.devices[0].rows)
        begins = np.zeros((len(self.mine), size), bool)
        seat, ids = np.zeros((2, len(self.mine), size), np.int32)
        for shard, device in enumerate(self.devices):
            for row in device.free_rows():
                if not device.ready:
                    break
                request, rollout = device.rows[row] = device.ready.popleft()
                if shard in self.mine:
                    index = shard - self.mine.start
                    begins[index, row] = True
                    seat[index, row] = device.prompts.index(request) * engine.group + rollout
                    sample_id = self.requests[request - self.first].sample_id
                    ids[index, row] = sampler.completion_id(sample_id, rollout, engine.group, engine.vote_stride)
        admission = Admission(*place_batch(engine.mesh, (begins, seat, ids)))
        enough = np.asarray(self._enough(size), np.int32)
        self.slots = engine.advance(self.params, self.slots, admission, self.key, enough)
        done, drawn, steps = fetch((self.slots.done, self.slots.drawn, self.slots.steps))
        self.row_steps += (int(steps) - self.steps) * done.size
        self.steps = int(steps)
        self._take(done, drawn)
        if done.sum() < enough:
            self.slots = with_more_pages(engine, self.slots)

    def _enough(self, size: int) -> int:
        """How many rows, over all devices, must be done before it is worth looking again."""
        everything = size * len(self.devices)
        idle = sum(len(device.free_rows()) for device in self.devices)
        if any(device.ready or device.waiting for device in self.devices):
            return min(everything, idle + max(1, everything // REFILL_SHARE))
        half = everything - everything // 2
        return everything if size // 2 < self.least or size == 1 else max(half, idle + 1)

    def _take(self, done: np.ndarray, drawn: np.ndarray) -> None:
        tokens, logprobs, named, stopped = (
            local_part(x) for x in (self.slots.tokens, self.slots.logprobs, self.slots.named, self.slots.stopped)
        )
        for shard, device in enumerate(self.devices):
            for row, work in enumerate(device.rows):
                if work is None or not done[shard, row]:
                    continue
                request, rollout = work
                device.rows[row] = None
                device.left[request] -= 1
                if shard in self.mine:
                    index, group = shard - self.mine.start, self.writing[request]
                    group.tokens[rollout] = tokens[index, row]
                    group.logprobs[rollout] = logprobs[index, row]
                    group.named[rollout] = named[index, row, :, : group.named.shape[-1]]
                    group.lengths[rollout] = drawn[shard, row]
                    group.truncated[rollout] = not stopped[index, row]
                if not device.left[request]:
                    del device.left[request]
                    device.prompts[device.prompts.index(request)] = None
                    if shard in self.mine:
                        self.ended.append(self.writing.pop(request))

    def _unwritten(self, index: int, read: int) -> Group:
        size, most, named = self.engine.group, self.sizes.width, len(self.sampling[index].named_ids)
        return Group(
            index,
            tokens=np.zeros((size, most), np.int32),
            lengths=np.zeros(size, np.int32),
            logprobs=np.zeros((size, most), np.float32),
            truncated=np.zeros(size, bool),
            named=np.zeros((size, most, named), np.float32),
            read=read,
        )

    # ------------------------------------------------------------------------------------------------------- places

    def _shrink(self) -> None:
        """Narrows prompts once the long ones are through, and halves rows once nothing waits for them.

        The one or the other, and one step after another, so that there are few sizes.
        """
        size, prompts = len(self.devices[0].rows), len(self.devices[0].prompts)
        if any(device.waiting or device.ready for device in self.devices):
            unread = (int(self.lengths[r]) for device in self.devices for r in (*device.left, *device.waiting))
            if (width := place_width(self.engine, max(unread))) <= self.width // 2:
                self._resize(size, prompts, width)
            return
        busy = max(sum(work is not None for work in device.rows) for device in self.devices)
        while size > 1 and busy <= size // 2 and size // 2 >= self.least:
            size //= 2
            self._resize(size, min(prompts, size), self.width)

    def _resize(self, size: int, prompts: int, width: int) -> None:
        """Moves what is being written, and its prompts, to the front."""
        rows = np.full((self.shards, size), len(self.devices[0].rows), np.int32)
        places, seat = np.zeros((self.shards, prompts), np.int32), np.zeros((self.shards, size), np.int32)
        for shard, device in enumerate(self.devices):
            living = list(device.left)
            places[shard, : len(living)] = [device.prompts.index(request) for request in living]
            writing = [(row, work) for row, work in enumerate(device.rows) if work is not None]
            rows[shard, : len(writing)] = [row for row, _ in writing]
            seat[shard, : len(writing)] = [living.index(r) * self.engine.group + g for _, (r, g) in writing]
            device.prompts = [*living, *[None] * (prompts - len(living))]
            device.kept = dict(enumerate(living))
            device.rows = [*(work for _, work in writing), *[None] * (size - len(writing))]
        mine = slice(self.mine.start, self.mine.stop)
        keep, kept, sits = place_batch(self.engine.mesh, (rows[mine], places[mine], seat[mine]))
        self.slots, self.width = self.engine.resize(self.slots, keep, kept, sits, width), width


def _allowed(asked: SamplingParams, engine: SamplingParams) -> SamplingParams:
    """What is asked; ValueError for a limit that rows have no room for."""
    if asked.max_new_tokens > engine.max_new_tokens:
        raise ValueError(
            f"a request may have {asked.max_new_tokens} new tokens, and a row holds {engine.max_new_tokens}"
        )
    return asked


def _everyones(numbers: list[int], processes: int) -> np.ndarray:
    """The numbers of all processes, one process after another."""
    if processes == 1:
        return np.asarray(numbers)
    return np.asarray(multihost_utils.process_allgather(np.asarray(numbers, np.int32))).reshape(-1)
