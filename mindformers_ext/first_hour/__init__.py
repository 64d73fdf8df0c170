"""The first hour on a card: what agrees with what was proved without one, and by how much the estimate missed."""
