"""One forward and backward pass of window_linear at the benchmark's size, after a first one: what a profiler looks at.

    ncu --set full -k regex:"key_states|aligned|query_states" --launch-skip 5 --launch-count 5 -o REPORT \
        python scripts/kernels/one_pass.py
    ncu -i REPORT.ncu-rep --page details --csv
"""

from __future__ import annotations

import torch
from profile_window_linear import call, inputs

tensors = inputs(8, 8192, 16, 64)
gradient = torch.randn_like(tensors[2])
for _ in range(2):
    call(tensors, 64).backward(gradient)
torch.cuda.synchronize()
