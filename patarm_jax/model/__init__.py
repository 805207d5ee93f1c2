"""Qwen3: the network, its shardings, its weights on disk."""
