"""The network between members: wire protocol machines, routing, and the libp2p shells."""
