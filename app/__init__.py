"""Fetchpool: a self-hosted REST service for asynchronous fetch jobs."""

__version__ = "0.1.0"
