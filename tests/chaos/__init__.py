"""Faults on purpose, and what must hold in spite of them. `make chaos` runs it; docs/reliability.md is about it."""
