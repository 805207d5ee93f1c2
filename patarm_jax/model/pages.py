"""Where the keys of rows lie that are being written: in pages of a pool, which a row takes as it grows.

Memory and time follow what rows have written, and not what they may write. A row's pages hold its keys in its own order
from the first on, so that what is read of it depends on nobody beside it. (Pages of keys and values are vLLM's,
arXiv 2309.06180; here they are given out and taken back within the compiled loop.)

Axis letters: W devices that share the rows · b rows and P pages of one of them · B = W·b ·
              J pages that a row may have · S keys of a page
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from patarm_jax.model.sharding import BATCH_AXES, constrain

# Keys of a page: what a TPU's registers are wide. A row leaves half a page empty, on the average.
PAGE = 128
# Pages that there are for each row at first; where they run out there are twice as many.
FIRST_PAGES = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """Who has which page; rows and pages are counted within their device."""

    table: jax.Array  # [W, b, J] int32, the pages of each row, in its order; those that it has not taken mean nothing
    owner: jax.Array  # [W, P] int32, whose each page is; b: nobody's
    order: jax.Array  # [W, P] int32, which page of its row each is


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """How many keys rows hold, and where; of rows that have one page each, in their order, there is no table."""

    count: jax.Array  # [B] int32; 0: none
    table: jax.Array | None = None  # [B, J]
    owner: jax.Array | None = None  # [W·P]
    order: jax.Array | None = None  # [W·P]

    def written(self, pages: int, size: int) -> jax.Array:
        """[P]: how many keys each of the pages of a device holds."""
        if self.owner is None or self.order is None:
            return jnp.minimum(self.count, size)
        rows = self.count.shape[0]
        of_row = self.count[jnp.minimum(self.owner, rows - 1)] - self.order * size
        return jnp.where(self.owner < rows, jnp.clip(of_row, 0, size), 0)


def page_size(most: int, multiple: int = 1) -> int:
    """Keys of a page of rows that hold so many at most; a kernel may want a multiple of its blocks."""
    return min(PAGE, most + -most % multiple)


def most_pages(most: int) -> int:
    """The pages that a row needs which holds so many keys."""
    return -(-most // PAGE)


def first_pages(most: int) -> int:
    """The pages that there are for each row at first."""
    return min(FIRST_PAGES, most_pages(most))


def new_pages(shards: int, rows: int, pages: int, most: int) -> Pages | None:
    """All pages free; None where each row has its only one from the beginning."""
    if (each := most_pages(most)) == 1:
        return None
    free = jnp.zeros((shards, pages), jnp.int32)
    return _pinned(Pages(jnp.zeros((shards, rows, each), jnp.int32), free + rows, free))


def has_room(pages: Pages | None, age: jax.Array, size: int) -> jax.Array:
    """Whether there are pages for all rows that begin one.

    Args:
        pages: as they are.
        age: [W, b], keys that each row holds before it takes the next one; −1: it takes none any more.
        size: S.
    """
    if pages is None or pages.owner.shape[1] >= pages.table.shape[1] * pages.table.shape[2]:
        return jnp.bool_(True)
    return (_free(pages, age).sum(axis=1) >= _begins(age, size).sum(axis=1)).all()


def assigned(pages: Pages, age: jax.Array, size: int) -> Pages:
    """The pages, with a new one for every row that begins one; those of rows that have ended, or begin anew, are free.

    Arguments as of `has_room`, which must hold.
    """
    free, begins = _free(pages, age), _begins(age, size)
    rows = age.shape[1]

    def of_device(free: jax.Array, begins: jax.Array, age: jax.Array, pages: Pages) -> Pages:
        # The n-th row that begins a page takes the n-th that is free: the first ones stay in use, and lie together.
        page = jnp.searchsorted(jnp.cumsum(free), jnp.cumsum(begins)).astype(jnp.int32)
        taken = jnp.where(begins, page, free.shape[0])
        who, number = jnp.arange(rows, dtype=jnp.int32), jnp.maximum(age, 0) // size
        owner = jnp.where(free, rows, pages.owner).at[taken].set(who, mode="drop")
        order = pages.order.at[taken].set(number, mode="drop")
        of_row = jnp.where(begins, number, pages.table.shape[1])
        return Pages(pages.table.at[who, of_row].set(page, mode="drop"), owner, order)

    return _pinned(jax.vmap(of_device)(free, begins, age, pages))


def _free(pages: Pages, age: jax.Array) -> jax.Array:
    """[W, P]: nobody's, or of a row that holds no key, because it has ended or begins anew."""
    rows = age.shape[1]
    holds = jnp.take_along_axis(age, jnp.minimum(pages.owner, rows - 1), axis=1) > 0
    return (pages.owner >= rows) | ~holds


def _begins(age: jax.Array, size: int) -> jax.Array:
    return (age >= 0) & (age % size == 0)


def places(pages: Pages | None, age: jax.Array, size: int, count: int) -> tuple[jax.Array, jax.Array]:
    """The page [W, b] and the place on it of each row's next key; of a row that takes none page `count`."""
    at = jnp.maximum(age, 0)
    if pages is None:
        page = jnp.broadcast_to(jnp.arange(age.shape[1], dtype=jnp.int32), age.shape)
    else:
        page = jnp.take_along_axis(pages.table, (at // size)[..., None], axis=2)[..., 0]
    return jnp.where(age < 0, count, page), at % size


def held(pages: Pages | None, age: jax.Array) -> Held:
    """What rows hold that have just taken a key, their age being as before."""
    count = (age + 1).reshape(-1)
    if pages is None:
        return Held(count)
    return Held(count, pages.table.reshape(len(count), -1), pages.owner.reshape(-1), pages.order.reshape(-1))


def of_rows(pages: Pages | None, rows: jax.Array) -> Pages | None:
    """The pages of the rows [W, b] that are kept, under their new numbers; the old number of rows: one that is free."""
    if pages is None:
        return None

    def of_device(pages: Pages, rows: jax.Array) -> Pages:
        before, kept = pages.table.shape[0], rows.shape[0]
        number = jnp.full(before + 1, kept, jnp.int32).at[rows].set(jnp.arange(kept, dtype=jnp.int32))
        number = number.at[before].set(kept)
        return Pages(jnp.take(pages.table, rows, axis=0, mode="clip"), number[pages.owner], pages.order)

    return _pinned(jax.vmap(of_device)(pages, rows))


def more(pages: Pages, count: int) -> Pages:
    """As many pages on each device; the new ones are free."""
    new = ((0, 0), (0, count - pages.owner.shape[1]))
    nobody = pages.table.shape[1]
    wide = replace(pages, owner=jnp.pad(pages.owner, new, constant_values=nobody), order=jnp.pad(pages.order, new))
    return _pinned(wide)


def _pinned(pages: Pages) -> Pages:
    """Each device's part on it."""
    return jax.tree.map(lambda x: constrain(x, BATCH_AXES), pages)
