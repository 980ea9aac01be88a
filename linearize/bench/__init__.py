"""Speed side by side: our kernels, the peers' and softmax in one process, against what the hardware allows.

A case is one operator at one size; its contenders are the functions that are timed on its inputs. `cases/` holds a file
for each operator. `python -m linearize bench kernels` runs them; see docs/kernels.md for how to read the table.
"""
