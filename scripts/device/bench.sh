#!/usr/bin/env bash
# `linearize bench kernels` on the GPU; table, JSON and plot land in $OUT, and the peers' autotuning results beside them.
#
#   . scripts/device/setup.sh && scripts/device/bench.sh [arguments of `linearize bench kernels`]
#
# Save $OUT/autotune.tgz as .device/autotune.tgz and carry it: the next machine need not tune the peers again.
set -uo pipefail
export TRITON_PRINT_AUTOTUNING=0
timeout --signal=INT --kill-after=15 "${LIMIT:-570}" \
    python3 -m linearize bench kernels --out "${OUT:?source scripts/device/setup.sh first}" "$@"
code=$?
(cd "$TRITON_CACHE_DIR" && find . -name '*.autotune.json' -print0 | tar --null -czf "$OUT/autotune.tgz" -T -)
exit "$code"
