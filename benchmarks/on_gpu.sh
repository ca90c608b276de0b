#!/usr/bin/env bash
# All that only a machine with GPUs can tell, into one folder: on_gpu.json, on_gpu.md, on_gpu.log.
#   benchmarks/on_gpu.sh --wheels wheels          where there is a network: what such a machine may lack
#   WHEELS=wheels benchmarks/on_gpu.sh results    on it; WHEELS: only where this package's needs are not installed
#   benchmarks/on_gpu.sh --cpu rehearsal          tiny models, on the CPU
# PYTHON: what runs. PYTHON_VERSION: of that machine, 3.12. BUDGET_S: seconds of measuring at most, 500.
set -euo pipefail
programs=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-python3}
usage() {
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

case "${1:-}" in
    --wheels)
        [ $# = 2 ] || usage
        platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
        "$python" -m pip download --quiet --dest "$2" --only-binary=:all: --implementation cp \
            --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]/#/--platform=}" \
            fire matplotlib rapidfuzz rich safetensors tiktoken pytest pytest-xdist filelock
        rm -f "$2"/numpy-*.whl # PyTorch's machine has it
        du -sh "$2"
        exit
        ;;
    --cpu)
        [ $# = 2 ] || usage
        shift
        export CUDA_VISIBLE_DEVICES=""
        rehearse=true
        ;;
    -* | "") usage ;;
    *)
        [ $# = 1 ] || usage
        rehearse=false
        ;;
esac

mkdir -p "$1"
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # Beside what is there, and before it: nothing of the machine's own changes.
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" "$programs/on_gpu.py" --out="$1/on_gpu.json" --budget_s="${BUDGET_S:-500}" --rehearse="$rehearse" | tee "$1/on_gpu.md"
