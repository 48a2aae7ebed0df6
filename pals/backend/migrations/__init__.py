"""Alembic's migrations of the membership database; they run when the backend starts."""
