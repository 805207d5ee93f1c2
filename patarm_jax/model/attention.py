"""Attention over keys that lie in several places, merged exactly.

A completion attends to the prompt its group shares and to its own past. Each part is computed where its keys lie, and
the parts are merged through their log-sum-exp, so the shared keys are never copied to the G rows that read them.

Axis letters: B rows · T query tokens · S key positions · N query heads · K key-value heads · Q = N/K · H head width.
"""

import jax
import jax.numpy as jnp

# The logit of a key that may not be read. Finite, so that a row without any readable key gives zeros and no NaN.
MASKED = -1e30
# Queries per step of the causal pass: bounds the [T, S] scores in memory, and skips keys after the step's last query.
QUERY_CHUNK = 512

# Normalised output [B, T, N, H] float32 and log-sum-exp of the logits [B, T, N] float32.
Partial = tuple[jax.Array, jax.Array]


def partial_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> Partial:
    """Softmax attention over one set of keys, with what is needed to merge it with others.

        z_s = q·k_s / √H,   lse = log Σ_s exp z_s,   out = Σ_s exp(z_s − lse) v_s

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], N a multiple of K.
        v: [B, S, K, H].
        mask: [B or 1, T or 1, S] bool, True where a query may read a key.

    Returns:
        out [B, T, N, H] and lse [B, T, N], both float32; where no key may be read, out is 0 and lse about −1e30.
    """
    b, t, n, h = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, n // kv, h) * (h**-0.5)
    logits = jnp.einsum("btkqh,bskh->bkqts", grouped, k, preferred_element_type=jnp.float32)
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, MASKED)
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bkqts,bskh->btkqh", (weights / safe).astype(v.dtype), v, preferred_element_type=jnp.float32)
    lse = jnp.moveaxis((peak + jnp.log(safe))[..., 0], -1, 1)
    return out.reshape(b, t, n, h), lse.reshape(b, t, n)


def merge(a: Partial, b: Partial) -> jax.Array:
    """Attention over the union of two disjoint sets of keys: Σᵢ outᵢ·exp(lseᵢ) / Σᵢ exp(lseᵢ), [B, T, N, H]."""
    share = jax.nn.sigmoid(a[1] - b[1])[..., None]  # exp(lse_a) / (exp(lse_a) + exp(lse_b))
    return share * a[0] + (1.0 - share) * b[0]


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> Partial:
    """Each query reads the keys up to its own position, [B, T, …] against [B, T, …].

    Right-padded rows need no further mask: a real token never reads past itself.
    """
    length = q.shape[1]
    parts = [
        # Recomputed in the backward pass, so that no chunk keeps its scores.
        jax.checkpoint(_causal_chunk, static_argnums=3)(q[:, start : start + QUERY_CHUNK], k, v, start)
        for start in range(0, length, QUERY_CHUNK)
    ]
    out, lse = (jnp.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    return out, lse


def _causal_chunk(q: jax.Array, k: jax.Array, v: jax.Array, start: int) -> Partial:
    stop = start + q.shape[1]
    mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    return partial_attention(q, k[:, :stop], v[:, :stop], mask[None])


def prompt_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> Partial:
    """Every query reads the first `lengths[b]` keys: [B, T, N, H] against [B, S, K, H]."""

    def chunk(q: jax.Array) -> Partial:
        return partial_attention(q, k, v, jnp.arange(k.shape[1]) < lengths[:, None, None])

    b, t, n, h = q.shape
    if t <= QUERY_CHUNK:
        return jax.checkpoint(chunk)(q)
    pad = -t % QUERY_CHUNK
    chunks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, -1, QUERY_CHUNK, n, h).swapaxes(0, 1)
    out, lse = jax.lax.map(jax.checkpoint(chunk), chunks)  # all alike, so that one is compiled
    return out.swapaxes(0, 1).reshape(b, -1, n, h)[:, :t], lse.swapaxes(0, 1).reshape(b, -1, n)[:, :t]


def shared_prompt_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_lengths: jax.Array, prompt_width: int, group: int
) -> jax.Array:
    """Attention of a prompt and the G completions that share it, laid in one row.

    Args:
        q: [R, S, N, H] with S = Tp + G·Tc: the prompt first, then its completions one after another.
        k: [R, S, K, H].
        v: [R, S, K, H].
        prompt_lengths: [R].
        prompt_width: Tp.
        group: G, 0 when there are no completions.

    Returns:
        [R, S, N, H] float32: the prompt causal in itself, each completion reading all of the prompt and its own past.
    """
    prompt, _ = causal_attention(q[:, :prompt_width], k[:, :prompt_width], v[:, :prompt_width])
    if not group:
        return prompt
    qc, kc, vc = (x[:, prompt_width:] for x in (q, k, v))
    read = prompt_attention(qc, k[:, :prompt_width], v[:, :prompt_width], prompt_lengths)
    own_out, own_lse = causal_attention(*(_split_group(x, group) for x in (qc, kc, vc)))
    own = own_out.reshape(qc.shape), own_lse.reshape(qc.shape[:3])
    return jnp.concatenate([prompt, merge(read, own)], axis=1)


def _split_group(x: jax.Array, group: int) -> jax.Array:
    """[R, G·Tc, …] → [R·G, Tc, …]."""
    return x.reshape(x.shape[0] * group, x.shape[1] // group, *x.shape[2:])


def cached_attention(
    q: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    prompt_lengths: jax.Array,
    start: jax.Array,
) -> jax.Array:
    """Attention of newly decoded tokens to the cached prompt and their own cached past.

    Args:
        q: [R, G, T, N, H], the tokens at completion positions start … start + T − 1.
        prompt_k: [R, Tp, K, H], read once for the whole group.
        prompt_v: [R, Tp, K, H].
        own_k: [R, G, Tc, K, H], with the new tokens' keys already written.
        own_v: [R, G, Tc, K, H].
        prompt_lengths: [R].
        start: [] int32.

    Returns:
        [R, G, T, N, H] float32.
    """
    r, g, t, n, h = q.shape
    read = prompt_attention(q.reshape(r, g * t, n, h), prompt_k, prompt_v, prompt_lengths)
    mask = jnp.arange(own_k.shape[2]) <= start + jnp.arange(t)[:, None]
    own_k, own_v = (x.reshape(r * g, *x.shape[2:]) for x in (own_k, own_v))
    own_out, own_lse = partial_attention(q.reshape(r * g, t, n, h), own_k, own_v, mask[None])
    own = own_out.reshape(r, g * t, n, h), own_lse.reshape(r, g * t, n)
    return merge(read, own).reshape(q.shape)
