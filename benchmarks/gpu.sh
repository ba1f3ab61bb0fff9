#!/usr/bin/env bash
# Tests and benchmarks on one CUDA device, within 8 minutes; tables and logs go to one folder.
#
#   benchmarks/gpu.sh OUT                    with what is installed
#   benchmarks/gpu.sh --wheels FOLDER OUT    first installs what is missing, from wheels in FOLDER only
#   benchmarks/gpu.sh --rehearse OUT         every step with a tiny model on the CPU, and CUDA paths on fake tensors
#   benchmarks/gpu.sh --only rate,prefill OUT  only these steps
#
# The most important rows come first. Every step has its own time limit, and none runs past the end: a failure of one
# costs no other. OUT/summary.txt has a line for each step. The exit status is 1 if a step failed.
set -uo pipefail
wheels="" rehearse="" only=""
while [[ ${1:-} == --* ]]; do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
    --rehearse) rehearse=1; shift ;;
    --only) only=${2:?--only needs names of steps}; shift 2 ;;
    *) echo "unknown option $1: --wheels FOLDER, --only NAMES and --rehearse are known" >&2; exit 2 ;;
  esac
done
out=${1:?give the folder for the results}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
limit=470 times=1
[[ -z $rehearse ]] || limit=2400 times=10 # a busy CPU only has to show that each step runs
mkdir -p "$out"
out=$(cd "$out" && pwd)
: > "$out/summary.txt"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}"
failed=0

step() { # name seconds command...: what it prints goes to OUT/name.txt
  local name=$1 seconds=$((times * $2)) left=$((limit - SECONDS)) start=$SECONDS status=0
  shift 2
  [[ -z $only || ,$only, == *,$name,* ]] || return 0
  ((left < seconds)) && seconds=$left
  if ((seconds < 5)); then
    status="not run: no time left"
  else
    timeout --kill-after=5 "$seconds" "$@" > "$out/$name.txt" 2> "$out/$name.log" && status="ok" ||
      status="failed with status $? (124: over its limit of $seconds s)"
  fi
  [[ $status == ok ]] || failed=1
  printf '%4d s  %-18s %3d s  %s\n' "$SECONDS" "$name" $((SECONDS - start)) "$status" | tee -a "$out/summary.txt"
}

install() { # from wheels only; nothing that is installed is changed
  local package module missing=()
  for package in torch torchvision transformers huggingface_hub safetensors numpy pillow av einops typer jinja2 pyyaml \
    accelerate peft datasets embreex pytest xformers flash_attn; do
    module=$package
    [[ $package == pillow ]] && module=PIL
    [[ $package == pyyaml ]] && module=yaml
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" || missing+=("$package")
  done
  echo "missing: ${missing[*]:-nothing}"
  for package in "${missing[@]}"; do
    "$python" -m pip install --no-index --find-links "$wheels" "$package" ||
      "$python" -m pip install --no-index --find-links "$wheels" --no-deps "$package" || echo "no wheel of $package"
  done
}

if [[ -n $rehearse ]]; then
  export CUDA_VISIBLE_DEVICES=
  tiny=(--tiny) many=(--views 2 3) few=(--views 2) tests=(--collect-only) step_of=(--tiny --views 3)
else
  tiny=() many=(--views 32 100 8 200 300) few=(--views 32 100) tests=() step_of=(--views 12 --scenes 2 --repeats 5)
fi
gpu() { local name=$1 seconds=$2; shift 2; step "$name" "$seconds" "$python" "$here/gpu.py" "$@" "${tiny[@]}"; }

if [[ -n $wheels ]]; then
  export -f install
  export python wheels
  step install 40 bash -c install
fi
gpu rate 25 rate "$out"
gpu encode_sdpa 70 encode "$out" --attn sdpa "${many[@]}"
step tests 110 "$python" -m pytest -m gpu -q --rootdir "$here/.." "$here/../tests/test_gpu.py" "${tests[@]}"
gpu encode_flash 60 encode "$out" --attn flash_attention_2 "${many[@]}"
gpu encode_xformers 60 encode "$out" --attn xformers "${many[@]}"
gpu encode_compiled 60 encode "$out" --attn sdpa --compile "${few[@]}"
step pretrain_step 60 "$python" "$here/pretrain_step.py" "${step_of[@]}"
gpu prefill 50 prefill "$out" "${few[@]}"
gpu encode_merged 40 encode "$out" --attn sdpa "${few[@]}" \
  --approximation '{"global_attention": "merged", "global_merge_ratio": 0.9}'
gpu encode_subset 40 encode "$out" --attn sdpa "${few[@]}" \
  --approximation '{"global_attention": "subset", "global_num_views": 16}'
[[ -z $rehearse ]] || gpu fake 60 fake "$out" --views 4
exit $failed
