"""Checkpoint in, engine directory out."""
