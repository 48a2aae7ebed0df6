"""The swarm without sockets: identity, keys, invites, signed records, roster, allow-list.

Everything here is pure: time and random bytes come in as arguments or from the
``cryptography`` package, and nothing opens a socket or reads a clock.
"""
