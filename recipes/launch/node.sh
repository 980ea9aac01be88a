#!/bin/sh
# One machine, a process for each card:  recipes/launch/node.sh MODEL RECIPE [key=value ...] [--out FOLDER] [--resume]
# PROCESSES=2 takes fewer. A long checkpoint has five minutes after Ctrl-C.
set -eu
processes=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$processes" -gt 0 ] || processes=1
exec torchrun --standalone --nproc-per-node "$processes" --shutdown-timeout 300 -m linearize run "$@"
