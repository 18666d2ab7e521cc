#!/bin/sh
# Installs the build of torch that fits the machine: never GPU libraries where there is no GPU.
# Usage: install_torch.sh PATH_TO_PYTHON
set -eu
cd "$(dirname "$0")/.."
python=$1
pinned=$(grep '^torch==' requirements/torch.txt)
version=${pinned#torch==}

installed=$("$python" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])' 2>/dev/null || true)
[ "$installed" != "$version" ] || exit 0

pip() { "$python" -m pip install --no-input --quiet --progress-bar off "$@"; }
uv() { "$python" -m uv pip install --quiet --python "$python" "$@"; }

install() {
    if [ "$(uname -s)" != Linux ]; then
        pip --no-deps "$pinned"
    elif nvidia-smi -L >/dev/null 2>&1; then
        uv --torch-backend=auto "$pinned" # with its dependencies: the GPU libraries
    else
        # A configured index may already offer the CPU build. If not, uv knows where PyTorch publishes it.
        pip --no-deps "$pinned+cpu" 2>/dev/null || uv --no-deps --torch-backend=cpu "$pinned"
    fi
}

if ! install; then
    echo "torch $version could not be installed: check the network, or install its build for this machine with" \
        "\"$python -m pip install\" and run the same command again." >&2
    exit 2
fi
