#!/usr/bin/env bash
# What half an hour of one card gives: benchmarks, tests and trainings at once, of which all stand still while one times.
#
#   OUT=runs/card TEXTS=../shared/data/text SECONDS_LEFT=1500 scripts/results/card.sh
#
# tests      the GPU suite (scripts/test_gpu.sh), TESTJOBS processes; STEPJOBS others for its second part, at once
# bench      rows that ITEMS names, a command of `linearize bench` a line (default: those of RECIPES), SLOTS at once
# drafts     scripts/speculative.py behind 7,900 tokens, with drafts that are calibrated alone, compiled and not
# peers      fla's log-linear attention beside ours, first to tune, then alone
# precision  10 M tokens of lolcats and gated_delta_window, weights in bfloat16 and in float32
# judge      what scripts/results/judge.sh measures of precision/lolcats-bfloat16, beside the teacher trained as its second stage
# cost       the same of latency and memory, with the card to itself for COSTS seconds at most
# again      scripts/starts.py of AGAIN (RECIPES), calibrated and judged, STARTJOBS at once
# published  the same of RECIPES from the swap alone, PUBLISHEDJOBS at once
#
# PARTS names those that are wanted (all). Everything goes on where it was cut when it is called again with the same OUT.
# The commit is that of the tree, or COMMIT where there is no git. Afterwards, here: scripts/results/join_rows.py,
# recipes_page.py, precision_rows.py, `scripts/starts.py --join`, `scripts/leaderboard.py --starts`.
set -uo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-runs/card} texts=${TEXTS:-../shared/data/text} python=${PYTHON:-python3} model=${MODEL:-smollm2-135m}
device=${DEVICE:-cuda} shape=${SHAPE:-smollm2-135m} length=${LENGTH:-8192} end=$((SECONDS + ${SECONDS_LEFT:-1500}))
mkdir -p "$out/bench" "$out/logs"
out=$(cd "$out" && pwd) beside=$out/bench
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} TRITON_CACHE_AUTOTUNING=1
read -ra recipes <<<"${RECIPES:-$("$python" -c 'from linearize.config import list_recipes; print(*(name for name, _ in list_recipes()))')}"
say() { echo "[$((SECONDS)) s] $*"; }
stands_still() { "$python" scripts/results/turns.py follow "$beside" "$@"; }  # while others time
left() { echo $((end - SECONDS > 1 ? end - SECONDS : 1)); }

items() {
    local recipe
    if [ -n "${ITEMS:-}" ]; then cat "$ITEMS"; return; fi
    for recipe in "${recipes[@]}"; do
        echo "recipes --compile --captured --batch 64,16 --recipes $recipe"
        echo "decode random --compile alone --context $length --batch 64 --prefill , --profile --recipes $recipe"
    done
    for recipe in "${recipes[@]}"; do
        echo "decode random --context $length --batch 1 --prefill 1024,8192,65536 --recipes $recipe"
    done
}

bench() {
    local name line
    while IFS= read -r line; do
        name=bench-$(md5sum <<<"$line" | cut -c1-8)
        [ -f "$out/logs/$name.done" ] && continue
        while [ "$(jobs -rp | wc -l)" -ge "${SLOTS:-3}" ]; do wait -n; done
        [ "$(left)" -gt 30 ] || break
        {
            # shellcheck disable=SC2086
            OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=2 timeout -s INT -k 10 "$(left)" "$python" -m linearize bench $line --only \
                --out "$beside" --device "$device" >"$out/logs/$name.log" 2>&1 && touch "$out/logs/$name.done"
            say "bench $line ended with $?"
        } &
    done < <(items)
    wait
}

trained() {  # NAME RECIPE CHANGES...: a run on the texts, without calibrating longer than it takes
    local name=$1 recipe=$2
    [ -f "$out/$name/done.json" ] && return
    OMP_NUM_THREADS=1 nice -n 5 timeout -s INT -k 20 "$(left)" "$python" -m linearize run "$model" "$recipe" "${@:3}" \
        "data.source=[$texts/books.train.parquet,$texts/teacher.train.parquet]" data.template=rendered 'data.mix={}' \
        eval.ablations=false run.device="$device" run.compile=never --out "$out/$name" >"$out/logs/${name//\//-}.log" 2>&1 &
    local began=$!
    stands_still $began &
    wait $began
    say "$name ended with $?"
}

drafts() {
    local compiled
    trained drafts/swa_sinks swa_sinks eval.max_windows=4
    trained drafts/best_constant best_constant '~stages.align' '~stages.distill' eval.max_windows=4
    for compiled in "" --compile; do
        # shellcheck disable=SC2086
        OMP_NUM_THREADS=2 timeout -k 10 "$(left)" "$python" scripts/speculative.py "$model" \
            --drafts "$out"/drafts/{swa_sinks,best_constant} --context ${CONTEXT:-7900} --batch 64 1 --draft-tokens 4 \
            --temperature ${HEATS:-0} --tokens 96 --repeats 2 --device "$device" $compiled --turn "$beside" \
            --out "$out/speculative.json" >>"$out/logs/speculative.log" 2>&1
        say "drafts $compiled ended with $?"
    done
}

peers() {
    local kernels=("$python" -m linearize bench kernels --only log_linear --warm-up 50 --peer-configurations 4)
    OMP_NUM_THREADS=2 timeout -k 10 "$(left)" "${kernels[@]}" --budget 600 --out "$out/peers-tuned" >"$out/logs/peers-tuned.log" 2>&1
    say "tuning of peers ended with $?"
    OMP_NUM_THREADS=2 timeout -k 10 "$(left)" "$python" scripts/results/turns.py alone "$beside" 90 "${kernels[@]}" --budget 80 \
        --out "$out/peers" >"$out/logs/peers.log" 2>&1
    say "peers ended with $?"
}

precision() {
    local weights
    for weights in bfloat16 float32; do
        trained precision/lolcats-$weights lolcats run.weights=$weights stages.transfer.tokens="${FIRST:-4M}" stages.recover.tokens="${SECOND:-6M}" \
            'stages.*.batch_size=16' 'stages.*.micro_batch=4' data.validation="$texts/books.validation.parquet" eval.max_windows="${WINDOWS:-100}" \
            "eval.texts={wikitext2: $texts/wikitext2.test.parquet}" &
        trained precision/gated_delta_window-$weights gated_delta_window run.weights=$weights stages.align.tokens="${FIRST:-4M}" \
            stages.distill.tokens="${SECOND:-6M}" 'stages.*.batch_size=16' 'stages.*.micro_batch=4' data.validation="$texts/books.validation.parquet" \
            eval.max_windows="${WINDOWS:-100}" "eval.texts={wikitext2: $texts/wikitext2.test.parquet}" &
    done
    wait
}

judging() {  # STEPS... of judge.sh
    mkdir -p "$out/judge"
    ln -sfn ../precision/lolcats-bfloat16 "$out/judge/lolcats"
    PARTS="" DATA=$(dirname "$texts") RUNS=$out/judge OUT=$out/judge/page MODELS=lolcats CONTROL=$out/judge/softmax DEVICE=$device \
        PYTHON=$python LIMIT=$(left) SLOTS=${JUDGES:-4} OMP_NUM_THREADS=1 scripts/results/judge.sh "$@"
}

judge() {
    # the second stage of lolcats, on the teacher as it is
    trained judge/softmax softmax "stages.recover={objective: {next_token: 1.0}, train: [lora], lora: {rank: 8, alpha: 16, \
        targets: [q, k, v, o]}, tokens: ${SECOND:-6M}, batch_size: 16, micro_batch: 4, lr: 1e-4}" eval.max_windows=4
    until [ -f "$out/precision/lolcats-bfloat16/done.json" ] || [ "$(left)" -lt 30 ]; do sleep 2; done
    judging measure >"$out/logs/judge.log" 2>&1 &
    local began=$!
    stands_still $began &
    wait $began
    say "judge ended with $?"
}

cost() {
    export -f judging left
    export out texts device python end
    "$python" scripts/results/turns.py alone "$beside" "${COSTS:-150}" bash -c 'SECONDS=0 end=${COSTS:-150}; judging cost' >"$out/logs/cost.log" 2>&1
    say "cost ended with $?"
}

starts() {  # FILE JOBS FLAGS... of scripts/starts.py
    OMP_NUM_THREADS=1 nice -n 5 "$python" scripts/starts.py --device "$device" --model "$model" --length 1024 --windows 16 \
        --tokens 16384 --source "$texts/books.train.parquet" "$texts/teacher.train.parquet" \
        --texts "wikitext2=$texts/wikitext2.test.parquet" --train 1M --runs "$out/starts" --jobs "$2" --most "$(left)" \
        --whole "$(left)" --out "$out/$1.json" "${@:3}" >>"$out/logs/$1.log" 2>&1
    say "$1 ended with $?"
}

again() { starts mixers-again "${STARTJOBS:-2}" --calibrated-only --judge scripts/leaderboard_brief.yaml --recipes ${AGAIN:-${recipes[*]}}; }
published() { starts mixers-published "${PUBLISHEDJOBS:-3}" --published-only --recipes "${recipes[@]}"; }

tests() {
    JOBS=${TESTJOBS:-12} LIMIT=$(left) OUT=$out/gpu-tests PYTHON=$python scripts/test_gpu.sh folders >"$out/logs/tests.log" 2>&1 &
    JOBS=${STEPJOBS:-4} LIMIT=$(left) OUT=$out/gpu-steps PYTHON=$python scripts/test_gpu.sh steps >"$out/logs/steps.log" 2>&1 &
    wait
    say "tests ended with $?"
}

for part in ${PARTS:-tests drafts peers bench precision again published}; do
    { $part; say "$part is over"; } &
    case $part in tests | again | published) stands_still $! & ;; esac
done
wait
