#!/usr/bin/env bash
# Renders rooms and trains VGGT, the teacher and Spa3R, in all variants, on one GPU; packs the results for transport.
#
#   examples/rooms/gpu.sh OUT                          about 9 minutes on a GPU with 16 CPU cores
#   DEVICE=cpu REHEARSE=1 examples/rooms/gpu.sh OUT    the same steps on a CPU, a few of each
#   FROZEN=embedded examples/rooms/gpu.sh OUT          VGGT and teacher from the package, all time for Spa3R
#
# The clock ends every step, so that the slowest machine finishes in time, with fewer steps. OUT receives files of at most
# 16 MiB (`collect.py unpack` restores the models) and the log of every process. Run folders stay in $WORK.
set -uo pipefail
out=${1:?give the folder for the results}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
work=${WORK:-/tmp/rooms_gpu}
cores=$(nproc --all)
mkdir -p "$out" "$work/run" "$work/logs"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [[ -n ${REHEARSE:-} ]]; then
  rooms=16 pictures=12 frozen_pictures=12 frozen_minutes=0.05 large_minutes=0.1 arms_minutes=0.1
  large_steps=3 arm_steps=3 seeds="0" arms="geometry" at_once=2 every=2 renderers=2
else
  rooms=${ROOMS:-6000} pictures=${PICTURES:-96} frozen_pictures=${FROZEN_PICTURES:-96}
  frozen_minutes=${FROZEN_MINUTES:-2.2} large_minutes=${LARGE_MINUTES:-5} arms_minutes=${ARMS_MINUTES:-2}
  large_steps=${LARGE_STEPS:-100000} arm_steps=${ARM_STEPS:-1000} seeds=${SEEDS:-0 1 2}
  arms=${ARMS:-both geometry semantic mask25 mask75 pluecker} at_once=${AT_ONCE:-6} every=100
  renderers=${RENDERERS:-$((cores > 4 ? cores - 3 : cores))}
fi

start=$SECONDS
say() { printf '%4d s  %s\n' $((SECONDS - start)) "$*"; }
spa3r() { # size arm seed steps minutes: one run; what it prints goes to a log
  local name=spa3r-$1-$2-$3
  "$python" "$here/train_spa3r.py" "$work/rooms" "$work/run" "$work/run/$name" --size "$1" --arm "$2" --seed "$3" \
    --steps "$4" --minutes "$5" --pictures "$pictures" --every "$every" --device "$device" \
    > "$work/logs/$name.txt" 2>&1 || say "$name failed: $(tail -n 1 "$work/logs/$name.txt")"
}

"$python" "$here/render.py" "$work/rooms" --rooms "$rooms" --arrays --processes "$renderers" \
  > "$work/logs/render.txt" 2>&1 &
rendering=$!
while [[ ! -f $work/rooms/ready.npy ]] && kill -0 $rendering; do sleep 0.2; done
say "rooms are being rendered"
frozen() { # program minutes
  "$python" "$here/train_$1.py" "$work/rooms" "$work/run" --limit "$rooms" --device "$device" --minutes "$2" \
    --pictures "$frozen_pictures" --steps 100000 --muon 0.01 --every $((every * 5)) > "$work/logs/$1.txt" 2>&1 ||
    say "$1 failed: $(tail -n 1 "$work/logs/$1.txt")"
}
if [[ ${FROZEN:-} == embedded ]]; then
  "$python" "$here/collect.py" frozen embedded "$work/run" > "$work/logs/frozen.txt" 2>&1
  say "VGGT and teacher are those of the package"
else
  frozen vggt "$frozen_minutes" &
  vggt=$!
  frozen teacher "$frozen_minutes" &
  wait $vggt $!
  say "VGGT: $(tail -n 1 "$work/run/vggt.jsonl")"
  say "teacher: $(tail -n 1 "$work/run/teacher.jsonl")"
fi

jobs=()
for seed in $seeds; do
  spa3r large both "$seed" "$large_steps" "$large_minutes" &
  jobs+=($!)
done
export -f spa3r say
export python here work pictures every device start
for seed in $seeds; do for arm in $arms; do echo "small $arm $seed $arm_steps $arms_minutes"; done; done |
  xargs -P "$at_once" -L 1 bash -c 'spa3r "$@"' spa3r
say "variants are trained"
wait "${jobs[@]}"
say "large models are trained"
for log in "$work"/run/spa3r-*/many.jsonl; do say "$(basename "$(dirname "$log")"): $(tail -n 1 "$log")"; done
"$python" "$here/collect.py" pack "$work/run" "$out"
cat "$work"/logs/*.txt > "$out/log.txt"
say "done"
