"""From logits to tokens, in NumPy: what `apar.runtime.sampler` is made of."""
