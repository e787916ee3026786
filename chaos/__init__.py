"""Faults at random on the real service, and three ledgers that must agree afterwards; `scripts/chaos --help`."""
