"""Least-Loaded Expert Parallelism for serving. Importing this package starts nothing."""

__version__ = "0.1.0"
