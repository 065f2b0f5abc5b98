"""Decoding in branches: requests, KV blocks, scheduling, sampling, text, executors, command line."""
