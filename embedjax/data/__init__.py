"""Records -> numpy batches. Only batches.py imports grain (and so jax)."""
