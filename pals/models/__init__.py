"""Model families as pure JAX, and the files they are read from.

``config``, ``snapshot``, ``safetensors``, ``hub`` and ``gguf`` import no jax, so that a
process without a shard can read a model's config and tokenizer cheaply.
"""
