"""Faults on purpose, against real worker processes; what each shows stands in PROMISES.md."""
