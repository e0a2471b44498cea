"""The specification, run against a real PostgreSQL."""
