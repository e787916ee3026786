"""Faces clients: HTTP in. Takes batches in, shows what is stored, and never fetches anything itself."""
