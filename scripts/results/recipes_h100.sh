#!/usr/bin/env bash
# Every recipe on one GPU: kernels compile in parallel, then training steps, then prefill and decoding.
#
#   OUT=runs/recipes-h100 [SHAPE=smollm2-135m] [PROCESSES=14] [BATCH=16] [BUDGET=240] [STEPS="warm train decode"] \
#       scripts/results/recipes_h100.sh [options of `bench recipes`]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${OUT:-runs/recipes-h100}
shape=${SHAPE:-smollm2-135m}
steps=${STEPS:-warm train decode}
mkdir -p "$out"

# a process compiles on one core, whatever the machine has
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

if [[ $steps == *warm* ]]; then
    "$python" -c 'from linearize.bench.subjects import subjects; print("\n".join(subjects()))' |
        xargs -P "${PROCESSES:-14}" -n 1 "$python" -m linearize bench recipes --warm --shape "$shape" --out "$out" \
            --batch "${BATCH:-16}" --recipes 2>&1 | tee "$out/warm.txt" || echo "not everything compiled: see $out/warm.txt"
fi
if [[ $steps == *train* ]]; then
    "$python" -m linearize bench recipes --shape "$shape" --batch "${BATCH:-16}" --budget "${BUDGET:-240}" \
        --out "$out" "$@"
fi
if [[ $steps == *decode* ]]; then
    "$python" -m linearize bench decode random --shape "$shape" --recipes all --budget "${BUDGET:-240}" --out "$out"
fi
