#!/usr/bin/env bash
# Build, test, sanitize and benchmark on a machine with an NVIDIA GPU, from a checkout and without network access.
#
#   OUT=results bash benchmarks/gpu_suite.sh                         all stages
#   OUT=results STAGES="build tests" bash benchmarks/gpu_suite.sh    selected stages
#
# OUT      folder for logs and JSON results (default: build/gpu)
# STAGES   stages to run: build tests trainer sam_step memcheck racecheck train_step spectrum
#          classes epoch data_path profile (default: all)
# PEERS    folder with other implementations (optional): sam.py (the reference SAM), and packages installed with
#          pip install --target: pyhessian, pytorch_optimizer
# PYTHON   interpreter with torch, pybind11 and scikit-build-core (default: python3)
# MINUTES  time limit of each stage in minutes (default: 8); the summary marks stages that exceed it
# TOTAL    time limit of all stages together in minutes (default: none); later stages are skipped
# BUNDLE   path of a .tgz archive of OUT, rewritten after every stage (optional)
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
MINUTES=${MINUTES:-8}
TOTAL=${TOTAL:-1000000}
BUNDLE=${BUNDLE:-}
STAGES=${STAGES:-build tests trainer sam_step memcheck racecheck train_step spectrum classes epoch data_path profile}
mkdir -p "$OUT"
summary=()
[ -d "${PEERS:-}" ] || summary+=("peers      none: PEERS is not a folder")
# Unbuffered output, so that the log of a stage that exceeds its limit is complete.
export OUT PEERS=${PEERS:-} PYTHONPATH=${PEERS:-}${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

stage() { # stage NAME COMMAND...: run a command under the time limit and add its result to the summary
  local name=$1 status=ok begin=$SECONDS code=0 limit=$((MINUTES * 60))
  shift
  [ "$limit" -le $((TOTAL * 60 - SECONDS)) ] || limit=$((TOTAL * 60 - SECONDS))
  if [ "$limit" -lt 10 ]; then
    missing "$name" "the total of $TOTAL minutes is used up"
    return 1
  fi
  timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1 || code=$?
  [ "$code" -eq 0 ] || status="FAILED ($code)"
  [ "$code" -ne 124 ] && [ "$code" -ne 137 ] || status="TIMED OUT after $limit s"
  summary+=("$(printf '%-10s %-28s %4d s' "$name" "$status" $((SECONDS - begin)))")
  tail -n 25 "$OUT/$name.log"
  printf '%s\n' "${summary[@]}" > "$OUT/summary.txt"
  [ -z "$BUNDLE" ] || tar -czf "$BUNDLE" -C "$OUT" .
  return "$code"
}

missing() { summary+=("$(printf '%-10s %s' "$1" "skipped: $2")"); }

if ! command -v nvidia-smi > /dev/null; then
  echo "nvidia-smi not found: this script requires an NVIDIA GPU and its driver" >&2
  exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm --format=csv \
  > "$OUT/gpu.csv"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)

for name in $STAGES; do
  case $name in
    build)
      # FASTSAM_CUDA=ON makes the build fail, instead of building for the CPU only, if nvcc is not found.
      CUDAARCHS=$capability stage build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index \
        --config-settings=cmake.define.FASTSAM_CUDA=ON --editable . || break
      ;;
    tests)
      stage tests "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu \
        python_tests/kernels python_tests/optim python_tests/curvature python_tests/longtail/test_upload.py
      ;;
    trainer)
      stage trainer "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu python_tests/longtail/test_gpu.py
      ;;
    memcheck | racecheck)
      if command -v compute-sanitizer > /dev/null; then
        # Torch's caching allocator packs small tensors into 2 MiB blocks, which hides out-of-bounds accesses.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$name" compute-sanitizer --tool "$name" --error-exitcode 9 \
          "$PYTHON" -m pytest -p no:cacheprovider -q -k "cuda and not host" python_tests/kernels
      else
        missing "$name" "compute-sanitizer is not installed"
      fi
      ;;
    sam_step | spectrum | classes | train_step | epoch | data_path)
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
      missing "$name" "unknown stage"
      ;;
  esac
done

echo
cat "$OUT/gpu.csv"
printf '%s\n' "${summary[@]}"
