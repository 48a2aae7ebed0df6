"""The membership service's core: it stores and orders what members sign.

It holds hashes, public keys and signed records, and can add nobody by itself. Synchronous
SQLAlchemy, called from worker threads; `pals.api.membership` is its HTTP shell.
"""
