"""Faces PostgreSQL: the tables, every change of a job's state, and what clients read. Imports no HTTP library."""
