#!/usr/bin/env bash
# The main job at a small budget on the real teacher: convert, train, evaluate, export; then reload, generate, judge.
# Run by `make demo`, inside its virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."

linearize=${LINEARIZE:-.venv/bin/linearize}
out=${OUT:-runs/demo}

resume=
if [ -f "$out/checkpoint/config.json" ]; then
    echo "$out holds a finished demo; it is replaced (the same recipe and seed give it again)"
    rm -rf "$out"
elif [ -f "$out/recipe.yaml" ]; then
    resume=--resume
fi

# Which layers have the longer window decides more here than all of the training. The recipe spaces them evenly, since it
# names no model; these are what `linearize select` chose for this one (docs/guide.md, "Choosing the layers that stay softmax").
layers="layers.use.longer=[7,14,15,18,21,23]"

show() { printf '\n$ %s\n' "linearize $*"; }

show run smollm2-135m demo "'$layers'" --out "$out" $resume
"$linearize" run smollm2-135m demo "$layers" --out "$out" $resume

prompt="The old house stood at the end of the road, and"
show generate "$out/checkpoint" --prompt "\"$prompt\"" --max-new-tokens 48 --temperature 0.7
"$linearize" generate "$out/checkpoint" --prompt "$prompt" --max-new-tokens 48 --temperature 0.7

show eval "$out" --suite quick
"$linearize" eval "$out" --suite quick
