# Sourced by scripts/test and scripts/demo: one virtual environment, made once, kept until pyproject.toml changes.
# shellcheck shell=bash

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${NEXACTOR_VENV:-$root/.venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
die() { printf '\033[31merror:\033[0m %s\n' "$*" >&2; exit 2; }

# The first Python >= 3.11 that runs; PYTHON overrides.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    die "no Python >= 3.11 found (tried ${PYTHON:-python3, python3.13, python3.12, python3.11}); set PYTHON=/path/to/python"
}

make_venv() {
    [ -x "$venv/bin/python" ] && return
    local python
    python=$(find_python)
    say "creating $venv with $("$python" --version)"
    # --seed: pip is needed inside too, for torch and for `nexactor policy get`.
    if command -v uv >/dev/null && uv venv --quiet --seed --python "$(command -v "$python")" "$venv"; then
        return
    fi
    "$python" -m venv "$venv" || die "cannot create a virtual environment (on Debian: apt-get install python3-venv)"
}

# install_once NAME COMMAND...: run COMMAND unless it succeeded before with the same words and pyproject.toml.
install_once() {
    local stamp="$venv/.installed-$1" key
    shift
    key=$({ cat pyproject.toml; echo "$@"; } | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return; fi
    "$@" || return
    echo "$key" >"$stamp"
}

# Packages by uv where it is there and works (it knows nothing of pip's configuration), else by pip.
install() {
    say "installing $*"
    if command -v uv >/dev/null && uv pip install --quiet --python "$venv/bin/python" "$@"; then
        return
    fi
    "$venv/bin/python" -m pip install --quiet "$@"
}
