"""Benchmarks: one file per benchmark, each reproduces numbers that README.md here states."""
