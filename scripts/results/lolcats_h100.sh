#!/usr/bin/env bash
# What docs/results/lolcats-smollm2-135m-h100.* was made with: the main job on one H100, about 10 M training tokens.
#
#   DATA=../shared/data OUT=runs/lolcats-h100 scripts/results/lolcats_h100.sh [overrides or --resume]
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${DATA:-../shared/data}
python=${PYTHON:-python3}

exec "$python" -m linearize run smollm2-135m lolcats --out "${OUT:-runs/lolcats-h100}" \
    "data.source=[$data/text/books.train.parquet,$data/text/teacher.train.parquet]" \
    data.template=rendered "data.validation=$data/text/books.validation.parquet" \
    "eval.texts={wikitext2: $data/text/wikitext2.test.parquet}" \
    eval.max_windows=200 eval.batch_size=64 'eval.tasks=[all]' "eval.task_data=$data/tasks" \
    stages.transfer.tokens=3M stages.transfer.batch_size=16 \
    stages.recover.tokens=7M stages.recover.batch_size=16 stages.recover.lr=5e-4 "$@"
