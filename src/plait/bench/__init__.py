"""Benchmarks that anyone can run: each checks its numbers first, then times, and says what it ran on."""
