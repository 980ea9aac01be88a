#!/usr/bin/env bash
# What half an hour of one card says of the best recipes: learned features in their delta rule, another family, ablations.
#
#   OUT=runs/record DATA=../shared/data SECONDS_LEFT=1500 scripts/results/record.sh
#
# held       gated_delta_window at 12 M tokens with weights in place of shares and learned features, aligned at ten times the rate
# family     OTHER (another real teacher): its layers by `linearize select`, then both best recipes at OTHER_BUDGET
# ablations  scripts/ablations.yaml at BUDGET each, JOBS at once; ONLY names some of them
# constant   best_constant with learned features and weights in place of shares
# hybrid     best_hybrid likewise
# judged     constant and hybrid, each as soon as it is trained: recall, text, tasks (scripts/results/judge.sh)
#
# PARTS names those that are wanted (all but held). A card's memory decides the order: constant and hybrid run beside each
# other and are judged; held, family and ablations follow each other, and those two. What is done is not made again when it is called with the same OUT. Layers of MODEL
# that see far are LAYERS, those that `select` chose for smollm2-135m.
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

learned=("mixer.combine={name: weighted, per: head}" "mixer.feature_map={name: hedgehog, dim: 64, per: query_head}" stages.align.lr=1e-2)
held() {
    local same=(eval.ablations=true "stages.align.tokens=3$million" "stages.distill.tokens=9$million"
        stages.distill.lr_mixers=1e-3 stages.distill.objective.next_token=0.1 "${learned[@]}")
    WINDOWS=100 trained held-features "$model" gated_delta_window "${same[@]}" &
    WINDOWS=100 trained held-positions "$model" gated_delta_window "${same[@]}" mixer.position.recurrent=true &
    wait
}
constant() {
    trained best_constant-features "$model" best_constant "layers={use: {longer: [$layers]}}" eval.ablations=true "${learned[@]}"
    judged best_constant-features
}
hybrid() {
    trained best_hybrid-features "$model" best_hybrid "layers={keep: [$layers]}" eval.ablations=true "${learned[@]}"
    judged best_hybrid-features
}

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
            trained "other-$recipe" "$other" "$(chosen)" --budget "${OTHER_BUDGET:-8M-tokens}" eval.ablations=true "${learned[@]}"
        } &
    done
    wait
}

ablations() {
    # shellcheck disable=SC2086
    timeout -k 20 "$(left)" "$python" scripts/ablate.py "${PLAN:-scripts/ablations.yaml}" --model "$model" --budget "${BUDGET:-2M-tokens}" --jobs "${JOBS:-4}" \
        ${ONLY:+--only "$ONLY"} ${SUITE:+--suite "$SUITE"} \
        --stop-after $(($(left) - 40)) --text "wikitext2=$texts/wikitext2.test.parquet" --text "books=$texts/books.long.parquet" \
        --runs "$out/ablations" --out "$out/ablations.json" "data.mix={$texts/books.train.parquet: 0.6, $texts/teacher.train.parquet: 0.4}" \
        data.template=rendered data.validation="$texts/books.validation.parquet" run.device="$device" $small >>"$out/logs/ablations.log" 2>&1
    say "ablations ended with $?"
}

judged() {  # NAME; what the models have in common is measured beside constant
    wanted judged && [ -f "$out/$1/done.json" ] || return
    PARTS="${JUDGE_PARTS:-recall text tasks far reach}$([ "$1" = best_constant-features ] && echo " beside")" TASKS=$data/tasks ITEMS=${ITEMS:-300} DATA=$data \
        RUNS=$out OUT=$out/page MODELS=$1 DEVICE=$device PYTHON=$python LIMIT=$(left) SLOTS=${JUDGES:-2} FAR=books RECALL_ROLES="student,linear branch off" \
        scripts/results/judge.sh measure >>"$out/logs/judged-$1.log" 2>&1
    say "$1 is judged: $?"
}

wanted() { case " ${PARTS:-constant hybrid judged family ablations} " in *" $1 "*) true ;; *) false ;; esac; }
for part in constant hybrid; do
    if wanted $part; then { $part; say "$part is over"; } & fi
done
wait
for part in held family ablations; do
    if wanted $part; then $part; say "$part is over"; fi
done
