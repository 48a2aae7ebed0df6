"""One shard on this machine: compiled steps over a KV cache, numpy in and out."""
