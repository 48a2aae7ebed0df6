"""Which experts do tokens choose, and what would that mean for a swarm? See README.md."""
