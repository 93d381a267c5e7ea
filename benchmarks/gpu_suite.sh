#!/usr/bin/env bash
# Build, test, sanitize and benchmark on a machine with an NVIDIA GPU, from a checkout and without network access.
#
#   OUT=results bash benchmarks/gpu_suite.sh                              all stages
#   OUT=results STAGES="build tests sam_step" bash benchmarks/gpu_suite.sh    selected stages
#   python3 -m benchmarks.gpu_targets results                             the targets again, on any machine
#
# Every stage has the folder OUT/STAGE with its log, its results and its status. Folders of several runs, also of
# several machines, can be put together in one OUT; the targets are then those of all of them.
#
# OUT      folder for the results (default: build/gpu)
# STAGES   stages to run, in this order (default: all):
#          build
#          tests nccl memcheck racecheck synccheck trainer
#          sam_step train_small late spectrum_small spectrum_large train_large sam_bfloat16 throughput experiment
#          eigenpairs train_compiled tracking estimators epoch data_path spectrum_probes classes sam_compiled profile
# PEERS    folder with other implementations (optional): sam.py (the reference SAM), and packages installed with
#          pip install --target: pyhessian, curvlinops, pytorch_optimizer
# FASHION  folder with the archives of Fashion-MNIST (optional), for throughput and experiment
# PYTHON   interpreter with torch and pybind11 (default: python3)
# LIMIT    time limit of each stage in seconds (default: 240); the summary marks stages that exceed it
# TOTAL    time limit of all stages together in seconds (default: none); later stages are skipped
# BUNDLE   path of a .tgz archive of OUT, rewritten after every stage (optional)
# SIZES    full (default), or small to rehearse the benchmarks on a CPU
# WORKERS  processes of the tests (default: 6; needs pytest-xdist unless it is 0)
set -uo pipefail
cd "$(dirname "$0")/.."
BASE=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-240}
TOTAL=${TOTAL:-1000000}
BUNDLE=${BUNDLE:-}
WORKERS=${WORKERS:-6}
STAGES=${STAGES:-build tests nccl sam_step train_small late spectrum_small memcheck racecheck synccheck trainer \
  spectrum_large train_large sam_bfloat16 throughput experiment eigenpairs train_compiled tracking estimators epoch \
  data_path spectrum_probes classes sam_compiled profile}
mkdir -p "$BASE"
[ -d "${PEERS:-}" ] || echo "no other implementations are compared: PEERS is not a folder"
# Unbuffered output, so that the log of a stage that exceeds its limit is complete. Plugins of pytest that happen to
# be installed could warn, and warnings are errors in the tests.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PEERS=${PEERS:-} FASHION=${FASHION:-} PYTHONPATH=$PWD${PEERS:+:$PEERS}${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

status() { # status NAME TEXT: note the outcome of a stage, for the summary
  mkdir -p "$BASE/$1"
  printf '%-16s %s\n' "$1" "$2" > "$BASE/$1/status"
}

stage() { # stage NAME COMMAND...: run a command under the time limit, in a fresh folder of results
  local name=$1 outcome=ok begin=$SECONDS code=0 limit=$LIMIT left=$((TOTAL - SECONDS))
  shift
  if [ "$left" -lt 10 ]; then
    # Results of an earlier run stay.
    [ -e "$BASE/$name/status" ] || status "$name" "skipped: the total of $TOTAL s is used up"
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
  status "$name" "stopped before its end"
  rm -f "$BASE/$name"/*.json
  OUT="$BASE/$name" timeout --kill-after=10 "$limit" "$@" > "$BASE/$name/log" 2>&1 || code=$?
  [ "$code" -eq 0 ] || outcome="FAILED ($code)"
  [ "$code" -ne 124 ] && [ "$code" -ne 137 ] || outcome="TIMED OUT after $limit s"
  status "$name" "$(printf '%-28s %4d s' "$outcome" $((SECONDS - begin)))"
  tail -n 25 "$BASE/$name/log"
  cat "$BASE/$name/status"
  [ -z "$BUNDLE" ] || tar -czf "$BUNDLE" -C "$BASE" --exclude=runs .
  return "$code"
}

tests() { # tests NAME PROCESSES FILES...: run the tests of some files that need a GPU
  local name=$1 processes=$2
  shift 2
  [ "$processes" = 0 ] || set -- -p xdist --numprocesses "$processes" --dist worksteal "$@"
  OMP_NUM_THREADS=1 stage "$name" "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu --durations=5 \
    --continue-on-collection-errors "$@"
}

if ! command -v nvidia-smi > /dev/null; then
  echo "nvidia-smi not found: this script requires an NVIDIA GPU and its driver" >&2
  exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm --format=csv \
  > "$BASE/gpu.csv"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)

for name in $STAGES; do
  case $name in
    build)
      # Into the checkout, without pip, whose metadata would need packages that may be missing. FASTSAM_CUDA=ON makes
      # the build fail, instead of building for the CPU only, if nvcc is not found.
      CUDAARCHS=$capability stage build bash -euc '
        cmake -S . -B build/gpu-native -DFASTSAM_CUDA=ON -DPython_EXECUTABLE="$1" \
          -Dpybind11_DIR="$("$1" -m pybind11 --cmakedir)"
        cmake --build build/gpu-native --parallel
        cmake --install build/gpu-native --prefix .
        "$1" -c "import fastsam; info = fastsam.build_info(); print(info); assert info[\"cuda\"]"
      ' build "$(command -v "$PYTHON")" || break
      ;;
    tests)
      # The marks of the kernel tests are in their conftest.py.
      tests tests "$WORKERS" python_tests/kernels/test_{sam,lanczos,noise}.py \
        $(grep -rl --include='test_*.py' 'mark\.gpu' python_tests | grep -v -e /test_one_rank -e longtail/test_gpu)
      ;;
    nccl) tests nccl 0 python_tests/test_one_rank.py ;;
    trainer) tests trainer "$WORKERS" python_tests/longtail/test_gpu.py ;;
    memcheck | racecheck | synccheck)
      if command -v compute-sanitizer > /dev/null; then
        # Torch's caching allocator packs small tensors into 2 MiB blocks, which hides out-of-bounds accesses.
        # Only kernels with fastsam in their mangled name are checked: torch's would take most of the time. Errors of
        # calls to the driver are not reported, because torch asks for functions that a driver may lack; fastsam
        # checks its own launches.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 stage "$name" compute-sanitizer --tool "$name" \
          --kernel-name kns=fastsam --report-api-errors no --error-exitcode 9 "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu \
          python_tests/kernels/test_{sam,lanczos,noise}.py
      else
        status "$name" "skipped: compute-sanitizer is not installed"
      fi
      ;;
    profile)
      if command -v ncu > /dev/null; then
        stage profile ncu --clock-control none --set full --kernel-name regex:"norm_kernel|perturb_kernel|check_kernel|update_kernel" \
          --launch-count 8 --export "$BASE/profile/sam_step" -f "$PYTHON" -m benchmarks.gpu profile
      else
        status profile "skipped: ncu is not installed"
      fi
      ;;
    *)
      stage "$name" "$PYTHON" -m benchmarks.gpu "$name"
      ;;
  esac
done

echo
cat "$BASE/gpu.csv"
cat "$BASE"/*/status | tee "$BASE/summary.txt"
"$PYTHON" -m benchmarks.gpu_targets "$BASE"
[ -z "$BUNDLE" ] || tar -czf "$BUNDLE" -C "$BASE" --exclude=runs .
