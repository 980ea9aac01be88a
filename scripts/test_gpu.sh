#!/usr/bin/env bash
# The tests that a GPU runs, in one command; `make test-gpu` calls it.
#
#   scripts/test_gpu.sh [folders] [steps]      both without a name
#
#   folders   tests/kernels, tests/decode and tests/mixers, whole: kernels compiled and not interpreted, in float32, float16
#             and bfloat16, with the cases that are slow in the interpreter; kernels' and mixers' memory is poisoned (NaN
#             in what torch.empty gives). Kernels first, of them the newest; what needs no card last.
#   steps     every other test of the marker `gpu`: recorded training steps, texts that a teacher writes, the server
#
# PYTHON: python with the package's `dev` extra. JOBS: processes (one a core). CARDS: which (all; processes take them in turn).
# LIMIT: seconds after which it ends, whatever is left; called again at the same commit it goes on with what has not passed.
# OUT: folder of the results (runs/gpu-tests): results.tsv and failures.txt (tracebacks) as they come, whatever ends it,
# gpu-tests.txt with a line a test, log-*.txt.
# ANYWHERE=1: also without a GPU, interpreted (to try the script).
# TESTS: other paths, and what else pytest takes, in place of the three folders.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
jobs=${JOBS:-$(nproc)}
limit=${LIMIT:-0}
began=$(date +%s)
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
out=${OUT:-runs/gpu-tests}/$commit
mkdir -p "$out"

if [ -z "${CARDS:-}" ]; then
    CARDS=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}
fi
export LINEARIZE_GPU_SUITE=$out LINEARIZE_GPU_CARDS=$CARDS OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
export PYTHONPATH=tests:.${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
[ -n "${ANYWHERE:-}" ] || "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "no CUDA device that torch sees; on a machine without one, make test and make slow interpret the kernels" >&2
    exit 2
}
watch=()
"$python" -c 'import pytest_timeout' 2>/dev/null && watch=(--timeout 600 --timeout-method thread)

suite() { # NAME ARGUMENTS...
    local name=$1 most=0
    if [ "$limit" -gt 0 ]; then
        most=$((limit - ($(date +%s) - began) - 8))
        [ "$most" -gt 20 ] || { echo "$name: no time left"; return 0; }
    fi
    # outcomes of what is left are appended while it runs, so processes that start late read this copy
    grep -E '^(PASSED|SKIPPED)' "$out/results.tsv" 2>/dev/null | cut -f3- | sort -u >"$out/before.txt"
    timeout --signal=INT --kill-after=5 "$most" "$python" -m pytest -q -p gpu_suite -n "$jobs" --dist load --maxschedchunk 1 \
        "${watch[@]}" -p no:cacheprovider --tb=short -W ignore "${@:2}" >"$out/log-$name.txt" 2>&1
    local code=$?
    tail -n 3 "$out/log-$name.txt" | cut -c1-300
    # nothing is left to run, or the time was over
    case $code in 5 | 124 | 130 | 137) [ -s "$out/results.tsv" ] ;; *) return $code ;; esac
}

status=0
parts=${*:-folders steps}
for part in $parts; do
    case $part in
    folders)
        # the ahead-of-time check compiles for cards that are not there
        # shellcheck disable=SC2086
        suite folders -m "" ${TESTS:-tests/kernels tests/decode tests/mixers --deselect tests/kernels/test_aot.py \
            --deselect tests/kernels/test_shared_memory.py} || status=$?
        ;;
    steps) suite steps -m gpu tests --ignore tests/kernels --ignore tests/decode --ignore tests/mixers || status=$? ;;
    *) echo "test_gpu.sh [folders] [steps]" >&2; exit 2 ;;
    esac
done

[ -f "$out/results.tsv" ] || exit "$status"
{
    echo "commit $commit, $(date -u +%Y-%m-%d), $jobs processes, cards $CARDS: scripts/test_gpu.sh $parts"
    "$python" -c 'import platform, torch, triton; name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"; print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")'
    "$python" tests/gpu_suite.py "$out"
} >"$out/gpu-tests.txt"
head -n 40 "$out/gpu-tests.txt" | grep -v '^PASSED' | cut -c1-300
! grep -q '^FAILED' "$out/gpu-tests.txt" || status=1
exit "$status"
