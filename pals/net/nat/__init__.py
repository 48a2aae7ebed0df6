"""Being reached from behind a NAT: addresses, port forwards, hole punching, relays."""
