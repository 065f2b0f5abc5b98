"""Speculation inside branches: drafts of several tokens a row, verified in one step (docs/speculation.md)."""
