#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, from a bare checkout, without a network: build, tests, sanitizers, benchmarks.
#
#   OUT=results bash benchmarks/gpu_suite.sh                     every stage
#   OUT=results STAGES="build tests" bash benchmarks/gpu_suite.sh    some of them
#
# OUT      folder for logs and JSON results (default: build/gpu)
# STAGES   some of: build tests sam_step memcheck racecheck train_step spectrum classes epoch profile
# PEERS    folder with other implementations (optional): sam.py (the reference SAM), and packages installed with
#          pip install --target: pyhessian, pytorch_optimizer
# PYTHON   interpreter with torch, pybind11 and scikit-build-core installed (default: python3)
# MINUTES  most minutes for one stage (default: 8); a stage that is cut short says so
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
MINUTES=${MINUTES:-8}
STAGES=${STAGES:-build tests sam_step memcheck racecheck train_step spectrum classes epoch profile}
mkdir -p "$OUT"
summary=()
[ -d "${PEERS:-}" ] || summary+=("peers      none: PEERS is not a folder")
export OUT PEERS=${PEERS:-} PYTHONPATH=${PEERS:-}${PYTHONPATH:+:$PYTHONPATH}

stage() { # stage NAME COMMAND...: runs it under the time limit and remembers how it went
  local name=$1 status=ok begin=$SECONDS code=0
  shift
  timeout --kill-after=10 $((MINUTES * 60)) "$@" > "$OUT/$name.log" 2>&1 || code=$?
  [ "$code" -eq 0 ] || status="FAILED ($code)"
  [ "$code" -ne 124 ] && [ "$code" -ne 137 ] || status="CUT SHORT after $MINUTES minutes"
  summary+=("$(printf '%-10s %-28s %4d s' "$name" "$status" $((SECONDS - begin)))")
  tail -n 25 "$OUT/$name.log"
}

missing() { summary+=("$(printf '%-10s %s' "$1" "left out: $2")"); }

if ! command -v nvidia-smi > /dev/null; then
  echo "no NVIDIA driver on this machine: nvidia-smi is not there" >&2
  exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm --format=csv \
  > "$OUT/gpu.csv"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)

for name in $STAGES; do
  case $name in
    build)
      CUDAARCHS=$capability stage build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable .
      ;;
    tests)
      stage tests "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu \
        python_tests/kernels python_tests/optim python_tests/curvature
      ;;
    memcheck | racecheck)
      if command -v compute-sanitizer > /dev/null; then
        stage "$name" compute-sanitizer --tool "$name" --error-exitcode 9 \
          "$PYTHON" -m pytest -p no:cacheprovider -q -k "cuda and not host" python_tests/kernels
      else
        missing "$name" "compute-sanitizer is not installed"
      fi
      ;;
    sam_step | spectrum | classes | train_step | epoch)
      stage "$name" "$PYTHON" -m benchmarks.gpu "$name"
      ;;
    profile)
      if command -v ncu > /dev/null; then
        stage profile ncu --clock-control none --set full --launch-count 40 --export "$OUT/sam_step" -f \
          "$PYTHON" -m benchmarks.gpu profile
      else
        missing profile "ncu is not installed"
      fi
      ;;
    *)
      missing "$name" "there is no such stage"
      ;;
  esac
done

echo
cat "$OUT/gpu.csv"
printf '%s\n' "${summary[@]}"
