"""Attention over paged keys and values as one Pallas kernel, where a platform compiles one.

Whatever these do, `pals.models.walk` does in plain XLA on every platform; `choice` says
which of them a shard uses.
"""
