#!/bin/sh
# One machine, a process for each card:  recipes/launch/node.sh MODEL RECIPE [key=value ...] [--out FOLDER] [--resume]
# PROCESSES=2 takes fewer. A long checkpoint has five minutes after Ctrl-C.
set -eu
processes=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$processes" -gt 0 ] || processes=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300
exec torchrun --standalone --nproc-per-node "$processes" -m linearize run "$@"
