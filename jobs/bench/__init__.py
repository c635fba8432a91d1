"""Benchmarks: one file per benchmark, each reproduces numbers the README states."""
