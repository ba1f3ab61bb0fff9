#!/usr/bin/env bash
# The rooms recipe from scratch: renders the rooms, trains the small VGGT, its teacher and three Spa3R, measures them, and
# puts the first into the package. Every step goes on where it was stopped. Works in ./rooms_data and ./rooms_run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
threads=${THREADS:-2}

"$python" "$here/render.py" rooms_data --rooms 5000
[[ -f rooms_run/vggt/model.safetensors ]] || "$python" "$here/train_vggt.py" rooms_data rooms_run --threads "$threads"
[[ -f rooms_run/teacher/model.safetensors ]] || "$python" "$here/train_teacher.py" rooms_data rooms_run --threads "$threads"
for seed in 0 1 2; do
  "$python" -m spa3r pretrain "$here/pretrain.yaml" --training.seed "$seed" --data.seed "$seed" \
    --training.output_dir "rooms_run/spa3r-$seed"
done
"$python" "$here/evaluate.py" rooms_run/spa3r-{0,1,2} | tee rooms_run/metrics.txt
"$python" "$here/package.py" rooms_run/spa3r-0

cp rooms_run/{vggt.jsonl,teacher.jsonl,metrics.txt} "$here/results/"
for seed in 0 1 2; do cp "rooms_run/spa3r-$seed/log.jsonl" "$here/results/spa3r-$seed.jsonl"; done
