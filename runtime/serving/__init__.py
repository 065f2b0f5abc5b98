"""Serving: Triton Inference Server around the engine, and the gateway in front of it."""
