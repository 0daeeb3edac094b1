"""Benchmarks: operators and whole networks against what a user would run otherwise.

`python -m bench --help`.
"""
