"""Dry run: check, compile, cost and explain any rank of a cluster on a machine without an Ascend card."""
