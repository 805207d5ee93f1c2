"""patarm_jax: a trainer of generative reward models in JAX."""

__version__ = "0.1.0"
