"""Faces the web: one fetch, its transport, the address guard and bounded decoding; knows nothing of jobs or storage."""
