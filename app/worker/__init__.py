"""Faces no one: moves jobs from `jobs` through `fetch` and back."""
