"""Megatron's .bin/.idx format and its GPT sample order, without MindSpore, so that data tools start in a moment.

``indexed_dataset`` reads and writes the two files, ``gpt_dataset`` and ``blended_dataset`` turn them into training
samples in megatron-core 0.16.1's order. ``mindformers_ext.data`` registers the loader built on them.
"""
