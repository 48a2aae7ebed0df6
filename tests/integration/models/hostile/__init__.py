"""Model folders that lie, each loaded in a process of its own as a shard would."""
