#!/usr/bin/env bash
# Create or complete a virtual environment with this package in editable form.
#
#   scripts/venv.sh FOLDER [EXTRAS]        scripts/venv.sh .venv dev,eval,page,serve
#
# Torch: a machine with an NVIDIA GPU, or a Mac, gets the ordinary build; any other gets the CPU build, because the
# ordinary one brings gigabytes of CUDA along. A torch that is in the environment already stays.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
extras=${2:+[$2]}
python=${PYTHON:-python3}
torch=${TORCH:-2.13.0} # of the CPU build, whose exact version is what tells it from the ordinary one

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "linearize needs Python 3.11 or newer, $python is $("$python" -V 2>&1); set PYTHON=python3.12 or the like" >&2
    exit 1
}
"$venv/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$venv/bin/python" -m pip "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if nvidia-smi -L >/dev/null 2>&1 || [ "$(uname -s)" = Darwin ]; then
        pip install "torch>=2.11"
    else
        # --no-deps: torch's own dependencies come with the package below, from the ordinary index.
        pip install --no-deps "torch==$torch+cpu" --index-url https://download.pytorch.org/whl/cpu \
            --retries 0 --timeout 15 ||
            pip install "torch==$torch" || pip install "torch>=2.11"
    fi
fi
pip install -e ".$extras"
