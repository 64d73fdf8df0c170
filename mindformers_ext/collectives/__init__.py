"""Collectives over shared memory, and what a rank on CPU knows about itself."""
