#!/usr/bin/env bash
# install.sh base|dev : make .venv and install aoi_ssl in it, editable, with the versions of constraints.txt.
# Does nothing when that has been done and nothing that decides the installation has changed since.
# Settings: PYTHON (interpreter), VENV (folder), TORCH_INDEX (package index that has the torch build you want).
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-base}
venv=${VENV:-.venv}
say() { printf '%s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

case $kind in
    base) target=. ;;
    dev) target='.[dev]' ;;
    *) fail "unknown kind '$kind': expected base or dev" ;;
esac

digest() { # of everything that decides what is installed
    { cat settings.ini setup.py pyproject.toml constraints.txt tools/install.sh; printf '%s\n' "$PWD" "${TORCH_INDEX:-}"
      [ -z "${PYTHON:-}" ] || command -v "$PYTHON"; } | cksum
}
done_() { [ -x "$venv/bin/aoi" ] && [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$(digest)" ]; }
if done_ dev || { [ "$kind" = base ] && done_ base; }; then exit 0; fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer; found $(${PYTHON:-python3} --version 2>&1 || true). Install one, or name it: make PYTHON=/path/to/python3.11"
}

# A run that was broken off leaves no stamp, so that the next one starts here again.
rm -f "$venv/.installed-base" "$venv/.installed-dev"
start=$SECONDS
python=$(find_python)
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "Making the environment $venv with $("$python" --version) ($python)."
    "$python" -m venv --clear "$venv" || fail "could not make $venv. On Debian and Ubuntu: apt-get install python3-venv"
fi
"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$venv has $("$venv/bin/python" --version); aoi_ssl needs 3.11 or newer. Remove it: make clean"

pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
torch=$(grep -E '^torch==' constraints.txt)
if ! "$venv/bin/python" -c "import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null; then
    if [ -n "${TORCH_INDEX:-}" ]; then
        say "Installing $torch from the index named by TORCH_INDEX."
        "${pip[@]}" install -qq --no-deps --index-url "$TORCH_INDEX" "$torch"
    elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        # No GPU: the CPU build is enough, but the default index may only have the one with CUDA.
        if "${pip[@]}" install --quiet --dry-run --report - "$torch" -c constraints.txt 2>/dev/null | grep -q '"name": "nvidia-'; then
            say "Note: there is no GPU here, yet pip's index offers only the CUDA build of torch (several GB more)."
            say "      To have the CPU build, stop now and run make with TORCH_INDEX=<the CPU index named on PyTorch's 'Get started' page>."
        fi
    fi
fi
say "Installing aoi_ssl${target#.} and what it needs, pinned by constraints.txt (once; a few minutes)."
"${pip[@]}" install -qq --constraint constraints.txt --editable "$target"
"${pip[@]}" check >/dev/null || { "${pip[@]}" check >&2 || true; fail "the installed packages do not fit together"; }
digest > "$venv/.installed-$kind.tmp"
mv "$venv/.installed-$kind.tmp" "$venv/.installed-$kind"
say "Installed in $((SECONDS - start)) s."
