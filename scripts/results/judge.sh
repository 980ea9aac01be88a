#!/usr/bin/env bash
# Two shipped recipes at a few million tokens, judged beside the teacher and every control: docs/results/judge-h200.*.
#
#   DATA=../shared/data RUNS=runs/judge OUT=docs/results scripts/results/judge.sh convert measure cost page
#
# convert: both, and the teacher trained the same way without surgery. measure: text, recall, decoding and, where TASKS
# names a folder of them, the five tasks. cost: latency and memory, which want the device alone. page: json, md and
# html. What is there is not made again; MILLION, SUITES, MODEL, ITEMS and OVERRIDES make it small for a try.
#
# measure ends within LIMIT seconds, and goes on where it ended: PARTS begin in their order, SLOTS of them at a time on
# each card (processes of one card take turns), and in each the near comes before the far. CONTROL=FOLDER is a control
# of every model's. KNOWN=FILE.json has scores of before, of the teacher and its plain window, which are not measured again.
# FAR=books reads long texts of one of the two alone; RECALL_ROLES are those of the recall of each model.
set -uo pipefail
cd "$(dirname "$0")/../.."
data=${DATA:-../shared/data}/text runs=${RUNS:-runs/judge} out=${OUT:-docs/results} name=${NAME:-judge-h200}
python=${PYTHON:-python3} million=${MILLION:-M} device=${DEVICE:-auto}
suites=${SUITES:-scripts/results} limit=${LIMIT:-300} known=${KNOWN:-}
read -ra parts <<<"${PARTS:-text recall beside decoding tasks far reach beside-reach decoding-teacher}"
texts=(--text "wikitext2=$data/wikitext2.test.parquet" --text "books=$data/books.long.parquet")
long=("${texts[@]}") roles=${RECALL_ROLES:-student,untrained swap,linear branch off}
[ "${FAR:-}" = books ] && long=("${texts[@]:2:2}")
read -ra models <<<"${MODELS:-lolcats gated_delta_window}" # other runs in RUNS may be measured likewise
IFS=, read -ra cards <<<"${CUDA_VISIBLE_DEVICES:-0}"
slots=$((${SLOTS:-5} * ${#cards[@]}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$runs" "$out"

run() { timeout --kill-after=15 "$limit" "$python" -m linearize "$@"; }
convert() {  # NAME [overrides]; the recipe has the same name
    local to=$runs/$1 recipe=$1; shift
    [ -f "$to/done.json" ] && return
    OUT=$to RECIPE=$recipe DATA=${DATA:-../shared/data} PYTHON=$python timeout "$limit" \
        scripts/results/convert.sh eval.ablations=false eval.max_windows=8 eval.batch_size=8 run.device="$device" "$@" \
        ${OVERRIDES:-} $([ -f "$to/recipe.yaml" ] && echo --resume) >"$to.log" 2>&1 ||
        echo "$to failed: $(tail -n 3 "$to.log")"
}
control_of() {  # MODEL: of lolcats as its second stage, by the next token; distilled, the teacher stays what it is
    if [ -f "${CONTROL:-}/done.json" ]; then echo --control "$CONTROL"
    elif [ "$1" = lolcats ] && [ -f "$runs/softmax/done.json" ]; then echo --control "$runs/softmax"; fi
}
with_control() {  # MODEL ROLES: and its controls, also one that lies beside it
    [ -n "$(control_of "$1")" ] || [ -f "$runs/$1-control/done.json" ] && echo "$2,control" || echo "$2"
}
judge() {  # MODEL PART [options]: into a folder of its own, so that parts run side by side
    local model=$1 to=$runs/parts/$1-$2; shift 2
    mkdir -p "$runs/parts"
    if [ -n "$known" ] && [ ! -f "$to/results.json" ]; then
        for role in teacher swa_sinks; do "$python" scripts/join_scores.py "$to" "$known" --role $role >/dev/null; done
    fi
    run eval "$runs/$model" --out "$to" --device "$device" $(control_of "$model") "$@" >"$to.log" 2>&1 ||
        echo "$to ended with $?: $(tail -n 3 "$to.log")"
}
part() {  # CARD MODEL PART [options]: as soon as there is room, for as long as there is time
    local card=$1; shift
    while [ "$(jobs -rp | wc -l)" -ge "$slots" ]; do wait -n; done
    limit=$((until - SECONDS))
    [ "$limit" -lt 20 ] && { echo "no time for $1 $2"; return; }
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        CUDA_VISIBLE_DEVICES=${cards[$((card % ${#cards[@]}))]} judge "$@" &
    else
        judge "$@" &
    fi
}
begin() {  # PART: of every model, or of what the models have in common beside the first
    local index model near=$suites/judge_recall_suite.yaml far=$suites/judge_far_suite.yaml decoding=$suites/judge_decoding_suite.yaml
    local recall=passkey,mqar,niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3
    recall+=,niah_multivalue,niah_multiquery,variable_tracking,babilong_qa1,babilong_qa2,babilong_qa3,phonebook
    local first=${models[0]}
    case $1 in
    beside) part 1 "$first" "$1" --suite "$near" --only "$recall" --roles "$(with_control "$first" teacher,swa_sinks)"; return ;;
    beside-reach) part 1 "$first" "$1" --suite "$far" --only passkey,niah_single_1 --roles teacher,swa_sinks; return ;;
    decoding-teacher) part 0 "$first" "$1" --suite "$decoding" "${texts[@]:0:2}" --roles teacher; return ;;
    esac
    for index in "${!models[@]}"; do
        model=${models[$index]}
        case $1 in
        text) part "$index" "$model" "$1" --suite "$suites/judge_suite.yaml" "${texts[@]}" ;;
        recall) part "$index" "$model" "$1" --suite "$near" --only "$recall" --roles "$roles" ;;
        far) part "$index" "$model" "$1" --suite "$far" --only text "${long[@]}" ;;
        reach) part "$index" "$model" "$1" --suite "$far" --only passkey,niah_single_1 --roles student ;;
        decoding) part "$index" "$model" "$1" --suite "$decoding" "${texts[@]:0:2}" --roles student ;;
        tasks)
            if [ -n "${TASKS:-}" ] && "$python" -c 'import lm_eval' 2>/dev/null; then
                part "$index" "$model" "$1" --suite tasks --tasks all --task-data "$TASKS" --limit "${ITEMS:-400}" \
                    --roles "$(with_control "$model" teacher,student)"
            fi ;;
        *) echo "PARTS: no part $1" >&2; return 2 ;;
        esac
    done
}
join() {  # MODEL
    local part found=()
    # what the models have in common was measured beside the first
    for part in "$1"-{text,recall,decoding,tasks,far,reach,cost} "${models[0]}"-{beside,beside-reach,decoding-teacher}; do
        [ -f "$runs/parts/$part/results.json" ] && found+=("$runs/parts/$part")
    done
    [ ${#found[@]} -eq 0 ] || "$python" scripts/join_scores.py "$runs/$1/eval" "${found[@]}"
}

for step in "$@"; do
    began=$SECONDS
    case $step in
    convert)
        # 16 sequences of 1,024 a step, and the rate that goes with them: docs/results/lolcats-smollm2-135m-h200.md
        same=('stages.recover.batch_size=16' 'stages.recover.lr=5e-4')
        convert lolcats "stages.transfer.tokens=3$million" "stages.transfer.batch_size=16" \
            "stages.recover.tokens=3$million" "${same[@]}" &
        convert gated_delta_window "stages.align.tokens=2$million" stages.align.batch_size=16 "stages.distill.tokens=4$million" &
        convert softmax \
            "stages.recover={objective: {next_token: 1.0}, train: [lora], lora: {rank: 8, alpha: 16}, tokens: 3$million, batch_size: 16, lr: 5e-4}" &
        wait
        ;;
    measure)
        until=$((SECONDS + limit))
        for one in "${parts[@]}"; do begin "$one" || exit 2; done
        wait
        limit=${LIMIT:-300}
        for model in "${models[@]}"; do join $model; done
        ;;
    cost)
        for model in "${models[@]}"; do
            if [ "$model" != "${models[0]}" ]; then  # the teacher's are the same
                "$python" scripts/join_scores.py "$runs/parts/$model-cost" "$runs/parts/${models[0]}-cost" --role teacher
            fi
            judge "$model" cost --suite "$suites/judge_cost_suite.yaml"
        done
        for model in "${models[@]}"; do join $model; done
        ;;
    page)
        have=()
        for model in "${models[@]}"; do join $model; [ -f "$runs/$model/eval/results.json" ] && have+=("$runs/$model"); done
        rm -f "$out/$name.json"
        "$python" scripts/join_scores.py --digits 5 "$out/$name.json" "${have[@]/%//eval}"
        run compare "${have[@]}" --out "$runs/page"
        for kind in md html; do [ -f "$runs/page/page.$kind" ] && cp "$runs/page/page.$kind" "$out/$name.$kind"; done
        ;;
    *) echo "$step: convert, measure, cost or page" >&2; exit 2 ;;
    esac
    echo "$step: $((SECONDS - began)) s"
done
