#!/usr/bin/env bash
# Models of 130M parameters on the same books, evaluated by the same suite, one model per GPU at a time:
#
#   bash eval/lm_130m.sh train DATA RUNS       # about 5 minutes a model on an H100
#   bash eval/lm_130m.sh evaluate DATA RUNS    # about 6 minutes a model
#   bash eval/lm_130m.sh needles DATA RUNS     # 2 minutes more of training, on RULER's own form
#   bash eval/lm_130m.sh after DATA RUNS       # RULER again
#   bash eval/lm_130m.sh speed DATA RUNS       # the speed of each, alone on its GPU, for `evaluate`
#   bash eval/lm_130m.sh report DATA RUNS      # all of them side by side, in RUNS/report
#   bash eval/lm_130m.sh cards DATA RUNS       # model_cards/books-MODEL.md
#
# DATA has corpora/, evals/, ruler/ and tokenizers/ (docs/evaluation.md says which files). MODELS names
# the models, TRAIN and EVAL add options, CONFIGS is the folder of their configs. A stage that was
# stopped goes on where it was. CUDA_VISIBLE_DEVICES chooses among GPUs.
set -euo pipefail
stage=$1 data=$2 runs=$3
read -ra models <<< "${MODELS:-mamba-130m mamba2-130m llama-130m nope-130m}"
read -ra train_options <<< "${TRAIN:-}"
read -ra eval_options <<< "${EVAL:---dtype bfloat16}"
configs=${CONFIGS:-configs/model}
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"
else
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null || true)
fi
python=${PYTHON:-python3}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}  # a checkout that is not installed will do
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}

launch() {  # RUN_DIR MODEL OPTIONS...
  local run=$1 model=$2
  shift 2
  local execution=auto
  # A mask made on the host keeps transformers' own classes from being captured whole.
  case $model in llama* | nope*) execution=${OTHERS:-compile} ;; esac
  "$python" -m training.train --config configs/train/books-130m.yaml --run_dir "$run" \
    --model.execution "$execution" "$@" "${train_options[@]}"
}

train() {
  [ -d "$runs/$1/final" ] && return
  launch "$runs/$1" "$1" --model.config "$configs/$1.json" \
    --tokenizer.source "$data/tokenizers/gpt_neox_20b/tokenizer.json" \
    --data.files "[$data/corpora/books_train-*.jsonl.xz]"
}

# The last quarter of the steps once more, with a seventh of the tokens in RULER's form: other seeds,
# other key words. A small model learns what is asked for, and the test is then one of memory.
needles() {
  [ -d "$runs/$1-needles/final" ] && return
  launch "$runs/$1-needles" "$1" --model.config null --model.checkpoint "$runs/$1/final" \
    --tokenizer.source null --tokenizer.eos_token null \
    --data.files "[$data/corpora/books_train-*.jsonl.xz, $runs/needles.jsonl]" \
    --max_steps 275 --optimizer.lr 5e-4 --schedule.warmup_steps 20
}

evaluate() {
  "$python" -m eval.run --model "$runs/$1/final" --suite configs/eval/lm-130m.yaml \
    --variables.data "$data" --output "$runs/$1/report" "${eval_options[@]}"
}

# The rest of the suite shares a GPU with other work and takes these numbers from the samples.
speed() {
  "$python" -m eval.run --model "$runs/$1/final" --suite configs/eval/lm-130m.yaml \
    --variables.data "$data" --output "$runs/$1/speed" --samples "$runs/$1/report/samples" \
    "${eval_options[@]}" --perplexity null --length null --lm_eval null --ruler null \
    --consistency null --generate null
}

after() {
  "$python" -m eval.run --model "$runs/$1-needles/final" --suite configs/eval/lm-130m.yaml \
    --variables.data "$data" --output "$runs/$1-needles/report" "${eval_options[@]}" \
    --length null --lm_eval null --consistency null --efficiency null --generate null
}

report() {
  local before=() later=()
  for model in "${models[@]}"; do
    [ -f "$runs/$model/report/results.json" ] && before+=("$runs/$model/report")
    [ -f "$runs/$model-needles/report/results.json" ] && later+=("$runs/$model-needles/report")
  done
  "$python" -m eval.report "${before[@]}" "${later[@]}" --output "$runs/report"
}

cards() {
  for model in "${models[@]}"; do
    [ -f "$runs/$model/report/results.json" ] || continue
    "$python" -m eval.card "$runs/$model/report/results.json" --name "books-$model"
  done
}

case $stage in
  report | cards) "$stage"; exit ;;
  train | evaluate | needles | after | speed) ;;
  *)
    echo "unknown stage $stage, expected train, evaluate, needles, after, speed, report or cards" >&2
    exit 2
    ;;
esac
if [ "$stage" = needles ] && [ ! -f "$runs/needles.jsonl" ]; then
  "$python" -m eval.ruler.training --tokenizer "$data/tokenizers/gpt_neox_20b/tokenizer.json" \
    --haystack "$data/corpora/books_train-00-of-02.jsonl.xz" --output "$runs/needles.jsonl"
fi
failed=0 waiting=()
for i in "${!models[@]}"; do
  model=${models[$i]}
  mkdir -p "$runs"
  if [ ${#gpus[@]} -gt 1 ]; then
    # As many models at a time as there are GPUs, each on its own.
    gpu=${gpus[$((i % ${#gpus[@]}))]}
    CUDA_VISIBLE_DEVICES=$gpu "$stage" "$model" > "$runs/$model-$stage.log" 2>&1 &
    waiting+=($!)
    if [ $(((i + 1) % ${#gpus[@]})) -eq 0 ]; then
      for job in "${waiting[@]}"; do wait "$job" || failed=1; done
      waiting=()
    fi
  else
    "$stage" "$model" > "$runs/$model-$stage.log" 2>&1 || failed=1
  fi
done
for job in "${waiting[@]}"; do wait "$job" || failed=1; done
for model in "${models[@]}"; do tail -n 40 "$runs/$model-$stage.log"; done
exit $failed
