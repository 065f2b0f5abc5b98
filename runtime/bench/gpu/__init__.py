"""What scripts/gpu_check.py runs: correctness on a GPU, then measurements against the card's own limits."""
