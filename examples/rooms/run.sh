#!/usr/bin/env bash
# The rooms recipe from scratch: renders the rooms, trains the small VGGT, its teacher and three Spa3R, and variants of a
# smaller one; then a small VLM, alone and with Spa3R in several ways; measures all of them, and puts the first of each into
# the package. Every step goes on where it was stopped. Works in ./rooms_data, ./rooms_arrays and ./rooms_run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
threads=${THREADS:-2}
seeds=${SEEDS:-0 1 2}

"$python" "$here/render.py" rooms_data --rooms 5000
[[ -f rooms_run/vggt/model.safetensors ]] || "$python" "$here/train_vggt.py" rooms_data rooms_run --threads "$threads"
[[ -f rooms_run/teacher/model.safetensors ]] || "$python" "$here/train_teacher.py" rooms_data rooms_run --threads "$threads"
# Single views, then few, then many: with many from the start, walls are learned and furniture is not.
stage() { "$python" -m spa3r pretrain "$here/pretrain.yaml" --training.seed "$seed" --data.seed "$seed" "$@"; }
for seed in $seeds; do
  out=rooms_run/spa3r-$seed
  stage --training.output_dir "$out-single" --data.views "[1, 1]" --training.max_steps 300 --evaluation.every 300 \
    --training.learning_rate 2e-3 --training.muon_learning_rate 0.02
  stage --training.output_dir "$out-few" --model.init_from "$out-single" --data.views "[2, 4]" \
    --training.max_steps 1400 --evaluation.every 500 --training.learning_rate 2e-3 --training.muon_learning_rate 0.02
  stage --training.output_dir "$out" --model.init_from "$out-few"
done
"$python" "$here/evaluate.py" $(printf "rooms_run/spa3r-%s " $seeds) | tee rooms_run/metrics.txt
"$python" "$here/package.py" spa3r rooms_run/spa3r-0
"$python" "$here/more_views.py" $(printf "rooms_run/spa3r-%s " $seeds) | tee rooms_run/more_views.txt
# The paper's comparisons of pretraining. A GPU does all of this in minutes: gpu.sh.
"$python" "$here/render.py" rooms_arrays --rooms 2000 --arrays
for seed in $seeds; do
  for arm in both geometry semantic mask25 mask75 pluecker; do
    out=rooms_run/spa3r-small-$arm-$seed
    [[ -f $out/model.safetensors ]] || "$python" "$here/train_spa3r.py" rooms_arrays rooms_run "$out" --size small \
      --arm "$arm" --seed "$seed" --steps 800 --pictures 96 --threads "$threads"
  done
done
"$python" "$here/compare_fields.py" rooms_run | tee rooms_run/compare_fields.txt

[[ -f rooms_data/conversations.jsonl ]] || "$python" "$here/conversations.py" rooms_data --rooms 5000
[[ -f rooms_run/vlm/model.safetensors ]] || "$python" "$here/train_vlm.py" rooms_data rooms_run --threads "$threads"
# The same data and steps for all: the VLM alone, with VGGT's tokens, with Spa3R's latents in two ways.
tune() {
  [[ -f "rooms_run/$1-$seed/model.safetensors" ]] || "$python" "$here/train_spa3_vlm.py" rooms_data rooms_run \
    "rooms_run/$1-$seed" --seed "$seed" --threads "$threads" "${@:2}"
  "$python" -m spa3r eval rooms --model "rooms_run/$1-$seed" --rooms 500 -o "rooms_run/answers/$1-$seed"
}
for seed in $seeds; do
  tune vlm --spatial-source none
  tune vggt --spatial-source backbone
  tune append --integration append
  tune spa3_vlm
done
"$python" "$here/answers.py" rooms_run/answers | tee rooms_run/answers.txt
"$python" "$here/package.py" vlm rooms_run/vlm-0
"$python" "$here/package.py" spa3_vlm rooms_run/spa3_vlm-0

"$python" "$here/unseen_objects.py" --spa3-vlm $(printf "rooms_run/spa3_vlm-%s " $seeds) \
  --vggt $(printf "rooms_run/vggt-%s " $seeds) --vlm $(printf "rooms_run/vlm-%s " $seeds) |
  tee rooms_run/unseen_objects.txt

# What the package holds now, and the demo shows.
alone=$("$python" -c "from spa3r.checkpoints import VLM; print(VLM)")
"$python" -m spa3r eval rooms --rooms 500 -o rooms_run/answers/embedded
"$python" -m spa3r eval rooms --rooms 500 --model "$alone" -o rooms_run/answers/embedded_vlm
"$python" "$here/package.py" scores rooms_run/answers/embedded rooms_run/answers/embedded_vlm
"$python" -m spa3r eval compare rooms_run/answers/embedded_vlm rooms_run/answers/embedded |
  sed "/flipped/,\$d" | tee rooms_run/embedded.txt
cp rooms_run/answers/embedded/table.md "$here/results/eval_rooms.md"
cp rooms_run/{vggt,teacher,vlm_vision,vlm_looking,vlm_places,vlm}.jsonl "$here/results/"
cp rooms_run/{metrics,more_views,compare_fields,answers,unseen_objects,embedded}.txt "$here/results/"
for seed in $seeds; do
  cat "rooms_run/spa3r-$seed"{-single,-few,}/log.jsonl > "$here/results/spa3r-$seed.jsonl"
  for name in vlm vggt append spa3_vlm; do cp "rooms_run/$name-$seed/log.jsonl" "$here/results/$name-$seed.jsonl"; done
  for name in vggt spa3_vlm; do cp "rooms_run/$name-$seed/align.jsonl" "$here/results/align-$name-$seed.jsonl"; done
done
