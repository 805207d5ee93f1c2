"""Qwen3 and Qwen2: the network, its shardings, its weights on disk."""
