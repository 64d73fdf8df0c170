"""A run and its callbacks: what MindFormers' Trainer lacks."""
