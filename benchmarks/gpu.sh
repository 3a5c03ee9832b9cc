#!/usr/bin/env bash
# Everything that is worth measuring on one machine with an NVIDIA GPU, in under ten minutes, without network.
#
#     WHEELS=/path/to/wheels benchmarks/gpu.sh
#     benchmarks/gpu.sh --device cpu --size tiny     # tries the script itself out
#
# Needs Python 3.11 or newer with torch, torchvision and numpy. Other packages that are missing are installed from the
# folder WHEELS into a virtual environment under build/ that sees those of the Python it was started with.
# The results go to benchmarks/results/gpu/: JSON lines, and summary.md. PYTHON=COMMAND chooses the Python.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-}
VENV=${VENV:-build/gpu-venv}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Import name and package: what nothing runs without, then what the tests and the peers want.
REQUIRED='torch:torch torchvision:torchvision numpy:numpy fsspec:fsspec xxhash:xxhash psutil:psutil yaml:pyyaml'
WANTED='safetensors:safetensors s3fs:s3fs typer:typer rich:rich jsonargparse:jsonargparse tensorboard:tensorboard
    pytest:pytest pytest_timeout:pytest-timeout hypothesis:hypothesis moto:moto torchdata:torchdata'

missing() {  # prints the packages of $2... that the Python $1 cannot import
    "$1" - "${@:2}" <<'PY'
import importlib.util, sys
print(*[pair.split(":")[1] for pair in sys.argv[1:] if importlib.util.find_spec(pair.split(":")[0]) is None])
PY
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gpu.sh: needs Python 3.11 or newer" >&2; exit 2; }
lacking=$(missing "$PYTHON" $REQUIRED $WANTED)
if [ -n "$lacking" ] && [ -n "$WHEELS" ]; then
    echo "gpu.sh: from $WHEELS: $lacking"
    mkdir -p "$VENV"
    "$PYTHON" -m venv --system-site-packages --without-pip "$VENV"
    # The Python may itself stand in a virtual environment, whose packages a new one does not see by itself.
    "$PYTHON" -I - <<'PY' > "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
import os, sys, sysconfig
library = os.path.dirname(sysconfig.get_path("stdlib"))
print(*[path for path in sys.path if os.path.isdir(path) and ("-packages" in path or not path.startswith(library))], sep="\n")
PY
    "$VENV/bin/python" -m pip --version > /dev/null 2>&1 || "$VENV/bin/python" -m ensurepip > /dev/null
    install=("$VENV/bin/python" -m pip install --quiet --no-index --find-links "$WHEELS")
    for package in $lacking; do
        # One by one: a wheel that is not there keeps no other from being installed. Without its dependencies if these
        # are not all there: some are needed only for what is not run here.
        "${install[@]}" "$package" 2> /dev/null || "${install[@]}" --no-deps "$package" 2> /dev/null ||
            echo "gpu.sh: no wheel of $package that fits" >&2
    done
    PYTHON=$VENV/bin/python
fi

lacking=$(missing "$PYTHON" $REQUIRED)
if [ -n "$lacking" ]; then
    echo "gpu.sh: cannot run without: $lacking" >&2
    echo "Fix: on a machine with network: pip download --only-binary=:all: -d wheels $lacking" >&2
    echo "     then here: WHEELS=wheels benchmarks/gpu.sh" >&2
    exit 2
fi
lacking=$(missing "$PYTHON" $WANTED)
[ -z "$lacking" ] || echo "gpu.sh: without, and without what needs them: $lacking"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m benchmarks.gpu "$@"
