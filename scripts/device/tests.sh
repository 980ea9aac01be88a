#!/usr/bin/env bash
# The kernels' tests on the GPU, in bfloat16 too; the whole output goes to $OUT/kernels-h100-tests.txt, its end here.
#
#   . scripts/device/setup.sh && scripts/device/tests.sh [pytest's arguments; default: tests/kernels]
#
# LIMIT: seconds for all of it (480). EACH: seconds for one test (150). JOBS: processes (8).
# A kernel that writes where it must not takes the tests behind it in its process along, so those that failed run again
# in fresh processes; what fails there too fails by itself.
set -uo pipefail
log=${OUT:?source scripts/device/setup.sh first}/kernels-h100-tests.txt
limit=${LIMIT:-480} started=$SECONDS
[ $# -gt 0 ] || set -- tests/kernels
state=$DEVICE_HOME/pytest
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

run() { # SECONDS ARGUMENTS...
    timeout --signal=INT --kill-after=15 "$1" python3 -m pytest -q -n "${JOBS:-8}" --timeout "${EACH:-150}" \
        --timeout-method thread -o cache_dir="$state" --durations 8 "${@:2}" 2>&1 | tee -a "$log"
}

python3 - >"$log" <<'PYTHON'
import platform
from datetime import datetime, timezone

import torch
import triton

print("kernel tests,", datetime.now(timezone.utc).isoformat(timespec="seconds"))
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
PYTHON
echo "\$ python -m pytest -q -n ${JOBS:-8} $*" >>"$log"
run "$limit" "$@" | tail -n 60
code=${PIPESTATUS[0]}
left=$((limit - (SECONDS - started)))
if [ "$code" -eq 1 ] && [ "$left" -gt 30 ]; then
    printf '\n== the failed ones again, in fresh processes ==\n' | tee -a "$log"
    run "$left" "$@" --last-failed --tb=short | tail -n 120
    code=${PIPESTATUS[0]}
fi
exit "$code"
