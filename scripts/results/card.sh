#!/usr/bin/env bash
# What half an hour of one card gives, in the order in which it is missed: benchmarks alone on it, then tests and trainings.
#
#   OUT=runs/card TEXTS=../shared/data/text BENCH=600 DRAFTS=150 REST=800 scripts/results/card.sh
#
# bench    BENCH seconds: training, decoding and prompts of RECIPES (all), SLOTS processes at once, of which all others
#          stand still while one times. Nothing else is begun meanwhile, so that rows are of a card that is not shared.
# drafts   DRAFTS seconds: scripts/speculative.py behind 7,900 tokens, with drafts that are calibrated alone.
# rest     REST seconds: the GPU suite (scripts/test_gpu.sh), and scripts/starts.py of STARTS from the published start
#          as well as the calibrated one, JOBS at once.
#
# Everything goes on where it was cut when it is called again with the same OUT. MODEL and the three lengths may be small.
# The commit is that of the tree, or COMMIT where there is no git. Afterwards, here: scripts/results/join_rows.py,
# recipes_page.py, `scripts/starts.py --join`, `scripts/leaderboard.py --starts`.
set -uo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-runs/card} texts=${TEXTS:-../shared/data/text} python=${PYTHON:-python3} model=${MODEL:-smollm2-135m}
slots=${SLOTS:-8} jobs=${JOBS:-3} device=${DEVICE:-cuda} shape=${SHAPE:-smollm2-135m} began=$SECONDS
mkdir -p "$out/bench" "$out/logs"
out=$(cd "$out" && pwd)
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=2 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
read -ra recipes <<<"${RECIPES:-$("$python" -c 'from linearize.config import list_recipes; print(*(name for name, _ in list_recipes()))')}"
say() { echo "[$((SECONDS - began)) s] $*"; }

items() {  # a line each: training, the compiled step, one text and prompts
    local recipe bench="$python -m linearize bench" same="--only --out $out/bench --device $device --shape $shape"
    for recipe in "${recipes[@]}"; do
        echo "$bench recipes $same --compile --captured --batch 64,16 --recipes $recipe"
        echo "$bench decode random $same --compile alone --context 8192 --batch 64 --prefill , --profile --recipes $recipe"
    done
    for recipe in "${recipes[@]}"; do
        echo "$bench decode random $same --context 8192 --batch 1 --prefill 1024,8192,65536 --recipes $recipe"
    done
}

bench() {  # SECONDS
    local until=$((SECONDS + $1)) number=0 line
    while IFS= read -r line; do
        number=$((number + 1))
        [ -f "$out/logs/bench-$number.done" ] && continue
        while [ "$(jobs -rp | wc -l)" -ge "$slots" ]; do wait -n; done
        [ "$SECONDS" -ge $((until - 20)) ] && break
        {
            # shellcheck disable=SC2086
            timeout -s INT -k 10 $((until - SECONDS)) $line >"$out/logs/bench-$number.log" 2>&1 && touch "$out/logs/bench-$number.done"
            say "${line##*bench } ended with $?"
        } &
    done < <(items)
    wait
}

drafts() {  # SECONDS
    local until=$((SECONDS + $1)) name without=()
    for name in swa_sinks best_constant; do
        [ "$name" = best_constant ] && without=('~stages.align' '~stages.distill')
        [ -f "$out/drafts/$name/done.json" ] || timeout -k 10 $((until - SECONDS)) "$python" -m linearize run "$model" "$name" \
            "${without[@]}" "data.source=[$texts/books.train.parquet,$texts/teacher.train.parquet]" data.template=rendered \
            'data.mix={}' eval.max_windows=4 eval.ablations=false run.device="$device" --out "$out/drafts/$name" \
            >"$out/logs/draft-$name.log" 2>&1
    done
    for compiled in "" --compile; do
        # shellcheck disable=SC2086
        timeout -k 10 $((until - SECONDS)) "$python" scripts/speculative.py "$model" --drafts "$out"/drafts/{swa_sinks,best_constant} \
            --context 7900 --batch 64 1 --draft-tokens 4 --temperature 0 --tokens 96 --repeats 2 --device "$device" $compiled \
            --out "$out/speculative.json" >>"$out/logs/speculative.log" 2>&1
    done
    say "drafts ended with $?"
}

rest() {  # SECONDS
    local seconds=$1
    {
        LIMIT=$seconds OUT=$out/gpu-tests PYTHON=$python scripts/test_gpu.sh steps folders >"$out/logs/gpu-tests.log" 2>&1
        say "tests ended with $?"
    } &
    {
        # shellcheck disable=SC2086
        OMP_NUM_THREADS=1 "$python" scripts/starts.py --device "$device" --model "$model" --length 1024 --windows 16 --tokens 16384 \
            --source "$texts/books.train.parquet" "$texts/teacher.train.parquet" --texts "wikitext2=$texts/wikitext2.test.parquet" \
            --train 1M --runs "$out/starts" --jobs "$jobs" --most "$seconds" --whole "$seconds" --out "$out/mixers.json" \
            --recipes ${STARTS:-${recipes[*]}} >"$out/logs/starts.log" 2>&1
        say "starts ended with $?"
    } &
    wait
}

for part in "bench ${BENCH:-600}" "drafts ${DRAFTS:-150}" "rest ${REST:-800}"; do
    [ "${part##* }" -gt 0 ] && $part
done
