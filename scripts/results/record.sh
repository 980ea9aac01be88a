#!/usr/bin/env bash
# What half an hour of one card says of the best recipes: a second seed, weights in place of shares, another family, ablations.
#
#   OUT=runs/record DATA=../shared/data SECONDS_LEFT=1500 scripts/results/record.sh
#
# held       gated_delta_window at 12 M tokens with weights in place of shares, aligned at ten times the rate; with learned features, too
# constant   best_constant likewise, and with LoLCATs' mixer (features of each key head) behind the same windows
# hybrid     best_hybrid with another seed
# family     OTHER (another real teacher): its layers by `linearize select`, then both best recipes at OTHER_BUDGET
# ablations  scripts/ablations.yaml at BUDGET each, JOBS at once
# judged     what of constant and hybrid is there: recall within 2,048 tokens, text and tasks (scripts/results/judge.sh)
#
# PARTS names those that are wanted (all), which begin at once but for `judged`, the last. What is done is not made again
# when it is called with the same OUT. Layers of MODEL that see far are LAYERS, those that `select` chose for smollm2-135m.
set -uo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-runs/record} data=${DATA:-../shared/data} python=${PYTHON:-python3} model=${MODEL:-smollm2-135m}
other=${OTHER:-gemma3-270m} device=${DEVICE:-auto} million=${MILLION:-M} end=$((SECONDS + ${SECONDS_LEFT:-1500}))
layers=${LAYERS:-7,14,15,18,21,23} texts=$data/text small=${SMALL:-}
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
say() { echo "[$((SECONDS)) s] $*"; }
left() { echo $((end - SECONDS > 1 ? end - SECONDS : 1)); }

trained() {  # NAME MODEL RECIPE CHANGES...
    local name=$1
    [ -f "$out/$name/done.json" ] && return
    # shellcheck disable=SC2086
    timeout -s INT -k 20 "$(left)" "$python" -m linearize run "${@:2:2}" "data.mix={$texts/books.train.parquet: 0.6, $texts/teacher.train.parquet: 0.4}" \
        data.template=rendered data.validation="$texts/books.validation.parquet" "eval.texts={wikitext2: $texts/wikitext2.test.parquet}" \
        eval.max_windows="${WINDOWS:-64}" run.device="$device" "${@:4}" $small --out "$out/$name" \
        $([ -f "$out/$name/recipe.yaml" ] && echo --resume) >>"$out/logs/$name.log" 2>&1
    say "$name ended with $?"
}

weights=("mixer.combine={name: weighted, per: head}" stages.align.lr=1e-2)
features=("mixer.feature_map={name: hedgehog, dim: 64, per: query_head}")
hedgehog=("mixer.feature_map={name: hedgehog, dim: 32, per: kv_head}" "~mixer.gate" mixer.update.name=additive mixer.normalizer.name=running_sum mixer.position.recurrent=true
    mixer.window.overlap=false "mixer.combine={name: shared_normalizer, window_weight_init: 0.9, complement: true}" stages.align.lr=1e-2)
held() {
    local same=(eval.ablations=true "stages.align.tokens=1$million" "stages.distill.tokens=11$million" stages.distill.lr_mixers=1e-3 stages.distill.objective.next_token=0.1)
    trained held-weights "$model" gated_delta_window "${same[@]}" "${weights[@]}" &
    trained held-features "$model" gated_delta_window "${same[@]}" "${weights[@]}" "${features[@]}" &
    wait
}
constant() {
    local same=("layers={use: {longer: [$layers]}}" eval.ablations=true)
    trained best_constant-weights "$model" best_constant "${same[@]}" "${weights[@]}" &
    trained best_constant-hedgehog "$model" best_constant "${same[@]}" "${hedgehog[@]}" &
    wait
}
hybrid() { trained best_hybrid-1 "$model" best_hybrid "layers={keep: [$layers]}" eval.ablations=true run.seed=1; }

chosen() { compgen -G "$out/select-$recipe/$recipe-keep*-passkey.yaml" | head -n 1; }  # of what select wrote for $recipe
family() {
    local recipe give
    for recipe in best_constant best_hybrid; do
        give=$([ "$recipe" = best_constant ] && echo "--give longer")
        {
            # shellcheck disable=SC2086
            [ -n "$(chosen)" ] || timeout -s INT -k 20 "$(left)" "$python" -m linearize select "$other" "$recipe" $give --by passkey \
                --length "${SELECT_LENGTH:-1024}" --out "$out/select-$recipe" data.template=rendered "data.mix={$texts/books.train.parquet: 1}" \
                run.device="$device" $small >>"$out/logs/select-$recipe.log" 2>&1
            [ -n "$(chosen)" ] || { say "select for $recipe failed"; exit; }
            trained "other-$recipe" "$other" "$(chosen)" --budget "${OTHER_BUDGET:-8M-tokens}" eval.ablations=true
        } &
    done
    wait
}

ablations() {
    # shellcheck disable=SC2086
    timeout -k 20 "$(left)" "$python" scripts/ablate.py "${PLAN:-scripts/ablations.yaml}" --model "$model" --budget "${BUDGET:-2M-tokens}" --jobs "${JOBS:-4}" \
        --stop-after $(($(left) - 40)) --text "wikitext2=$texts/wikitext2.test.parquet" --text "books=$texts/books.long.parquet" \
        --runs "$out/ablations" --out "$out/ablations.json" "data.mix={$texts/books.train.parquet: 0.6, $texts/teacher.train.parquet: 0.4}" \
        data.template=rendered data.validation="$texts/books.validation.parquet" run.device="$device" $small >>"$out/logs/ablations.log" 2>&1
    say "ablations ended with $?"
}

judged() {
    local one found=()
    for one in best_constant-weights best_constant-hedgehog best_hybrid-1; do [ -f "$out/$one/done.json" ] && found+=("$one"); done
    [ ${#found[@]} -gt 0 ] || { say "judged: nothing is trained"; return; }
    PARTS="recall beside text tasks" TASKS=$data/tasks ITEMS=${ITEMS:-300} DATA=$data RUNS=$out OUT=$out/page MODELS="${found[*]}" DEVICE=$device PYTHON=$python \
        LIMIT=$(left) SLOTS=${JUDGES:-4} scripts/results/judge.sh measure >>"$out/logs/judged.log" 2>&1
    say "judged ended with $?"
}

began=()
for part in ${PARTS:-held constant hybrid family ablations judged}; do
    if [ "$part" = judged ]; then last=judged; continue; fi
    { $part; say "$part is over"; } &
    case $part in constant | hybrid) began+=($!) ;; esac
done
if [ -n "${last:-}" ]; then
    [ ${#began[@]} -eq 0 ] || wait "${began[@]}"
    judged
fi
wait
