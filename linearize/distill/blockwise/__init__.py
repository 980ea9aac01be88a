"""Attention transfer block by block, for models that fit nowhere: see `docs/blocks.md`.

The teacher's residual stream before every block of layers goes to the disk once (`writing`), with a block's weights in
memory at a time (`parts`). A converted layer learns from the teacher's stream alone, so that blocks train apart, on any
number of workers (`training`), and are joined to the result that one process with the whole model would have had
(`joining`). The run folder is that of `linearize run`, which goes on from there.
"""
