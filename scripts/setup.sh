#!/bin/sh
# Builds the environment in .venv from the lock. Safe to interrupt: the stamp that says "done" is written last, and a
# half-built environment is thrown away on the next run.
set -eu
cd "$(dirname "$0")/.."

# Nothing of the caller's Python may leak in.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV || true
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1

venv=.venv
stamp=$venv/aero-set-up
unfinished=$venv/aero-unfinished

# A venv holds absolute paths, so the folder is part of the key.
key=$({ pwd; cat pyproject.toml requirements/lock.txt requirements/torch.txt scripts/setup.sh scripts/install_torch.sh; } | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 2
}

# A candidate counts only when it runs: version managers leave launchers on the PATH for versions they do not have.
fits='import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))'

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c "$fits" 2>/dev/null || fail "PYTHON=$PYTHON is not a working Python 3.10 or 3.11."
        echo "$PYTHON"
        return
    fi
    without_venv=
    for name in python3.11 python3.10 python3 python; do
        old_ifs=$IFS
        IFS=:
        for folder in $PATH; do
            candidate=${folder:-.}/$name
            [ -x "$candidate" ] && "$candidate" -c "$fits" 2>/dev/null || continue
            if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                IFS=$old_ifs
                echo "$candidate"
                return
            fi
            without_venv=$candidate
        done
        IFS=$old_ifs
    done
    [ -z "$without_venv" ] ||
        fail "$without_venv cannot make virtual environments: install its venv package (python3-venv on Debian and Ubuntu)."
    fail "AERO needs Python 3.10 or 3.11, which is not on the PATH: install one, or run make with PYTHON=/path/to/python3.11."
}

if [ -f "$unfinished" ] || { [ -e "$venv" ] && ! "$venv/bin/python" -c "$fits" 2>/dev/null; }; then
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    python=$(find_python)
    say "Setting up in $venv with $("$python" --version 2>&1): some minutes, about 2.5 GB."
    mkdir "$venv"
    : >"$unfinished"
    "$python" -m venv "$venv"
else
    say "The dependencies have changed: bringing $venv up to date."
    : >"$unfinished"
    rm -f "$stamp"
fi

pip() { "$venv/bin/python" -m pip "$@" --no-input --quiet --progress-bar off; }

pip install --require-hashes --no-deps --only-binary :all: -r requirements/lock.txt ||
    fail "The dependencies could not be installed: check the network and pip's settings, then run the same command again."
sh scripts/install_torch.sh "$venv/bin/python"
pip install --no-deps --no-build-isolation --editable .
"$venv/bin/python" -m pip check >/dev/null || {
    "$venv/bin/python" -m pip check >&2 || true
    fail "The environment does not fit together: run make clean, then the same command again."
}

echo "$key" >"$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$unfinished"
say "The environment is ready."
