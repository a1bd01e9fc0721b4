#!/usr/bin/env bash
# Measures this library on one NVIDIA GPU, in less than eight minutes.
#
#   scripts/bench/gpu.sh [--dry-run] [--out FOLDER]
#
# Needs python3 (or the interpreter in $PYTHON) with jax for CUDA, optax, flax and pytest. torch and
# timm take part where they are installed. Nothing is installed, and this checkout is the package.
#
# --out FOLDER   where to write; by default $OUT, or runs/gpu without that variable. The files of an
#                earlier run there are replaced:
#   results.jsonl  one JSON line per measurement, written as soon as it is made, and one per section
#   table.md       the same figures as Markdown tables
#   tests.log      what the GPU tests printed
#   log.txt        what everything else printed on standard error
# --dry-run      tiny sizes and two rounds, on the CPU: shows that everything works, in a few minutes
#
# Sections, in the order of their importance, each with its part of the 470 seconds:
#   tests                              80 s  OPTIM_ZOO_TEST_DEVICE=gpu pytest tests/gpu
#   updates of BERT-large, float32    130 s  gpu_updates.py: lamb, lars and adamw, of this library,
#                                            of optax and of torch, taking turns
#   copy bandwidth                     25 s  gpu_bandwidth.py
#   updates of BERT-large, bfloat16    75 s
#   updates of BERT-base, float32      50 s
#   updates of BERT-base, bfloat16     40 s
#   job step of BERT-base, bfloat16    70 s  gpu_job_step.py: with and without each wrapper
# A section may also use the time that those before it left. It is stopped at its limit. A section
# that fails or is stopped is reported in one line, and the others run; the exit status is then 1.
# It is 2, and nothing runs, without a GPU that JAX can use.
#
# torch.compile of timm's Lamb takes minutes, so all four of these programs are compiled from the
# start, in the background; before the first times are taken, the script waits for them.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  echo "usage: scripts/bench/gpu.sh [--dry-run] [--out FOLDER]" >&2
  exit 2
}

dry_run=false
out=${OUT:-runs/gpu}
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    --out) (($# > 1)) || usage; out=$2; shift ;;
    *) usage ;;
  esac
  shift
done

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 # the rest of the memory is torch's
if $dry_run; then
  export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
  test_device=cpu torch_device=cpu
  trees=(bert-tiny)
  few=(--rounds 2) job=(--size tiny) copy=(--megabytes 16)
  slower=5 # times the limits, for two slow cores
else
  export JAX_PLATFORMS=cuda,cpu
  if ! "$python" -c 'import jax; raise SystemExit(jax.default_backend() != "gpu")'; then
    echo "gpu.sh needs a GPU that JAX can use, found none; --dry-run runs on the CPU" >&2
    exit 2
  fi
  test_device=gpu torch_device=cuda
  trees=(bert-large bert-base)
  few=() job=() copy=()
  slower=1
fi

mkdir -p "$out"
results=$out/results.jsonl log=$out/log.txt
rm -f "$out"/{results.jsonl,table.md,tests.log,log.txt}
touch "$results" "$log"

sockets=$(mktemp -d)
compilers=()
stop() {
  if ((${#compilers[@]})); then kill "${compilers[@]}" 2>/dev/null || true; fi
  rm -rf "$sockets"
}
trap stop EXIT

failed=0
deadline=0 # in seconds since this script started, as $SECONDS

# last_line FILE: its last line, without what JSON would have to escape.
last_line() {
  tail -n 1 "$1" | tr -d '"\\[:cntrl:]' | cut -c 1-300
}

# section NAME SECONDS FILE COMMAND...: runs a command with a time limit, its output added to FILE.
# @LIMIT in the command stands for the limit in seconds.
section() {
  local name=$1 file=$3 began=$SECONDS status=0 said="" result=ok
  deadline=$((deadline + $2 * slower))
  shift 3
  local limit=$((deadline - SECONDS))
  timeout --kill-after=5 "$limit" "${@//@LIMIT/$limit}" >>"$file" 2>>"$log" || status=$?
  if [[ $file == */tests.log ]]; then said=$(last_line "$file"); fi
  if ((status)); then
    failed=1 result=failed
    if ((status == 124 || status == 137)); then result=stopped; fi
    if [[ -z $said ]]; then said=$(last_line "$log"); fi
    echo "$name: $result with exit status $status after $((SECONDS - began)) s: $said" >&2
  else
    echo "$name: ok after $((SECONDS - began)) s${said:+: $said}"
  fi
  # A command may have been stopped in the middle of a line.
  if [[ -n $(tail -c 1 "$results") ]]; then echo >>"$results"; fi
  local line='{"what": "%s", "section": "%s", "measured": "section", "status": "%s", '
  line+='"exit_code": %d, "seconds": %d, "limit_s": %d, "summary": "%s"}\n'
  # shellcheck disable=SC2059
  printf "$line" "$name" "$name" "$result" "$status" $((SECONDS - began)) "$limit" "$said" \
    >>"$results"
  "$python" scripts/bench/gpu_table.py "$results" >"$out/table.md" || failed=1
}

# updates TREE DTYPE SECONDS [SOCKET...]: the section of one tree, which waits for the sockets.
updates() {
  local name=$1-$2 compiled=()
  if ((${#compilers[@]})); then compiled=(--compiled-timm "$sockets/$name"); fi
  section "updates $1 $2" "$3" "$results" "$python" scripts/bench/gpu_updates.py --tree "$1" \
    --dtype "$2" --seconds @LIMIT "${few[@]}" "${compiled[@]}" ${4:+--wait-for "${@:4}"}
}

waited_for=()
if "$python" -c 'import importlib.util as u; raise SystemExit(not u.find_spec("torch"))'; then
  for tree in "${trees[@]}"; do
    for dtype in float32 bfloat16; do
      JAX_PLATFORMS=cpu "$python" scripts/bench/torch_peer.py --tree "$tree" --dtype "$dtype" \
        --device "$torch_device" --address "$sockets/$tree-$dtype" >>"$log" 2>&1 &
      compilers+=($!)
      waited_for+=("$sockets/$tree-$dtype")
    done
  done
fi

# The options in pyproject.toml belong to plugins that need not be installed.
section tests 80 "$out/tests.log" env OPTIM_ZOO_TEST_DEVICE="$test_device" \
  "$python" -m pytest -o addopts= -p no:cacheprovider -q -ra tests/gpu
updates "${trees[0]}" float32 130 "${waited_for[@]}"
section "copy bandwidth" 25 "$results" "$python" scripts/bench/gpu_bandwidth.py \
  --seconds @LIMIT "${few[@]}" "${copy[@]}"
updates "${trees[0]}" bfloat16 75
if ((${#trees[@]} > 1)); then
  updates "${trees[1]}" float32 50
  updates "${trees[1]}" bfloat16 40
fi
if $dry_run; then export JAX_DISABLE_MOST_OPTIMIZATIONS=1; fi # compiles in half the time
section "job step" 70 "$results" "$python" scripts/bench/gpu_job_step.py --seconds @LIMIT \
  "${few[@]}" "${job[@]}"

echo "$SECONDS s in all: $out/table.md"
exit "$failed"
