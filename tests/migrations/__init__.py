"""The Alembic revisions and `metadata.create_all()`."""
