#!/usr/bin/env bash
# A conversion on the texts that results are made with: books and the teacher's own text, judged on WikiText-2 as well.
#
#   DATA=../shared/data RECIPE=lolcats OUT=runs/lolcats scripts/results/convert.sh [overrides or --resume]
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${DATA:-../shared/data}/text
python=${PYTHON:-python3}

exec "$python" -m linearize run "${MODEL:-smollm2-135m}" "${RECIPE:?a recipe}" --out "${OUT:-runs/$RECIPE}" \
    "data.source=[$data/books.train.parquet,$data/teacher.train.parquet]" data.template=rendered \
    "data.validation=$data/books.validation.parquet" "eval.texts={wikitext2: $data/wikitext2.test.parquet}" \
    eval.max_windows=100 eval.batch_size=64 "$@"
