"""Sessions of one user: messages in, text out, over a chain of shards."""
