#!/bin/bash
# Check the project on a GPU in one command: every part is a process with its own time limit and writes JSON as it goes.
#
#     bench/gpu.sh [OUT] [PARTS]     OUT: folder for results (runs/gpu); PARTS: names below (all of them)
#
# From the environment: TINY=1 rehearses on a CPU with a narrow model; PYTHON; MODEL, the folder of the random 3B model
# (6.2 GB); TOKENIZER, a folder (default: the embedded model's); LIMIT, seconds in all. About 13 minutes on an H100.
cd "$(dirname "$0")/.." || exit 2
out=$(mkdir -p "${1:-runs/gpu}" && cd "${1:-runs/gpu}" && pwd)
parts=${2:-environment tests model memory scoring serving decoding sft_vs_trl dpo_vs_trl}
python=${PYTHON:-.venv/bin/python}
model=${MODEL:-$out/model}
end=$((SECONDS + ${LIMIT:-900}))
flags=(--out "$out" --model "$model" ${TOKENIZER:+--tokenizer "$TOKENIZER"} ${TINY:+--tiny})
steps=(--steps 10 --repeats 1)
[ -n "$TINY" ] && steps+=(--batch_size 2)
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

# part NAME SECONDS COMMAND...: run it within its limit and what is left of all; a failure does not end the script
part() {
  local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS status
  shift 2
  [[ " $parts " == *" $name "* ]] || return 0
  if [ "$left" -lt 10 ]; then
    echo "$name: left out, no time" | tee -a "$out/parts.txt"
    return 0
  fi
  timeout -k 5 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>"$out/$name.err"
  status=$?
  echo "$name: status $status after $((SECONDS - start)) s" | tee -a "$out/parts.txt"
  [ $status -eq 0 ] || tail -c 2500 "$out/$name.err" "$out/$name.log"
}

part environment 60 "$python" -m bench.gpu environment "${flags[@]}"
# Equality needs no quiet machine: it runs beside the parts that measure memory alone.
export GPU_EQUALITY_JSON=$out/equality.json
part tests 150 "$python" -m pytest -q -rs -m gpu -p no:cacheprovider --basetemp "$out/pytest" tests/test_gpu.py &
part equality 150 "$python" -m bench.gpu equality "${flags[@]}"
part model 90 "$python" -m bench.gpu model "${flags[@]}"
part memory 170 "$python" -m bench.gpu memory "${flags[@]}"
wait
part scoring 180 "$python" -m bench.gpu scoring "${flags[@]}"
part serving 90 "$python" -m bench.gpu serving "${flags[@]}"
part decoding 90 "$python" -m bench.gpu decoding "${flags[@]}"
for method in sft dpo; do
  part ${method}_vs_trl 150 "$python" -m bench.train --student "$model" --methods $method "${steps[@]}" \
    --plot "$out/$method.png" --json
  [ -s "$out/${method}_vs_trl.log" ] && tail -n 1 "$out/${method}_vs_trl.log" >"$out/${method}_vs_trl.json"
done
rm -rf "$out/pytest"
exit 0
