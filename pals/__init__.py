"""Pals: a private peer-to-peer LLM inference engine.

Importing this package imports neither jax, libp2p nor litestar.
"""

__version__ = "0.1.0"
