"""Checkpoints that every rank writes its own part of, and that load into any other layout.

A checkpoint is a folder `step_000100/` with `rank_0000.safetensors` ... (the parts), `layout.json` (which part of which
parameter lies where, with checksums) and `meta.json` (where the training stood). `latest` beside the folders names the
newest whole one. Replaces MindFormers 1.9.0's rank_N/*.safetensors, which are read into another layout only after a
merge or with strategy files, carry no checksum, and may be half written; it can go when upstream has these.
"""
