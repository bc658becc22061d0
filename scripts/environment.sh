# Shared by quickstart, test and check: source it, then call `environment EXTRAS`.
#
# Everything lands in two places: .venv in the clone, and one cache folder, which is named in
# the output. Settings, all optional:
#
#   LLM_EMO_CACHE      the cache folder; default: ${XDG_CACHE_HOME:-$HOME/.cache}/llm_emo
#                      (macOS: ~/Library/Caches/llm_emo)
#   LLM_EMO_PYTHON     the Python that makes .venv; default: the first 3.11 or newer of
#                      python3, python3.13, python3.12, python3.11
#   LLM_EMO_PIP_ARGS   further options for `pip install`, split at spaces
#
# On Linux, PyPI's torch brings several GB of CUDA packages. Without an NVIDIA GPU, let pip
# prefer the build without them:
#
#   LLM_EMO_PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" scripts/quickstart
#
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf) hold as usual. Nothing else
# is contacted.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# The folder of the clone, wherever the caller stands.
ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv

# Point every tool's cache below the one folder.
use_cache() {
    local cache=${LLM_EMO_CACHE:-}
    if [ -z "$cache" ]; then
        [ -n "${XDG_CACHE_HOME:-}${HOME:-}" ] || fail "no HOME; set LLM_EMO_CACHE to a folder"
        case $(uname -s) in  # where the program itself looks
            Darwin) cache=${XDG_CACHE_HOME:-$HOME/Library/Caches}/llm_emo ;;
            *) cache=${XDG_CACHE_HOME:-$HOME/.cache}/llm_emo ;;
        esac
    fi
    mkdir -p -- "$cache/tmp" 2>/dev/null && [ -w "$cache/tmp" ] \
        || fail "the cache folder $cache cannot be written; set LLM_EMO_CACHE to another"
    cache=$(CDPATH='' cd -- "$cache" && pwd -P)
    export LLM_EMO_CACHE=$cache
    export PIP_CACHE_DIR=$cache/pip PRE_COMMIT_HOME=$cache/pre-commit
    export HF_HOME=$cache/huggingface HF_HUB_DISABLE_TELEMETRY=1
    export TORCH_HOME=$cache/torch TORCHINDUCTOR_CACHE_DIR=$cache/torchinductor
    export TRITON_CACHE_DIR=$cache/triton MPLCONFIGDIR=$cache/matplotlib
    export XDG_CACHE_HOME=$cache/xdg TMPDIR=$cache/tmp
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    say "cache: $cache (and $VENV); nothing is written elsewhere unless you name it"
}

# Print the command of a Python that can make the environment.
find_python() {
    local candidate lacking=
    for candidate in ${LLM_EMO_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        # A shim may be found and yet not run: ask, do not look.
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        lacking=$candidate
    done
    [ -z "$lacking" ] || fail "$lacking lacks the modules venv and ensurepip; on Debian or" \
        "Ubuntu install them with: apt install python3-venv (or, for one version, python3.12-venv)"
    fail "found no Python 3.11 or newer as ${LLM_EMO_PYTHON:-python3, python3.13, python3.12 or" \
        "python3.11}; install one, or name it with LLM_EMO_PYTHON"
}

# Is this a Linux machine without an NVIDIA GPU where nobody chose where torch comes from?
would_fetch_cuda() {
    [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 \
        && [ -z "${LLM_EMO_PIP_ARGS:-}${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]
}

# environment EXTRAS: make .venv hold the program with these extras ("" or "dev"). PYTHON is
# then its interpreter.
environment() {
    local extras=$1 target=$ROOT stamps=$VENV/.llm_emo wanted python
    use_cache
    PYTHON=$VENV/bin/python
    if ! "$PYTHON" -c 'import sys' 2>/dev/null; then
        python=$(find_python)
        say "making $VENV with $("$python" --version 2>&1)"
        "$python" -m venv --clear "$VENV" || fail "could not make $VENV"
    fi
    [ -z "$extras" ] || target="$ROOT[$extras]"
    # A clone that moved has another ROOT, and its editable install points nowhere.
    wanted=$("$PYTHON" - "$ROOT" <<'PY'
import hashlib, pathlib, sys

root = sys.argv[1]
digest = hashlib.sha256(f"{root}\n{sys.version}\n".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(pathlib.Path(root, name).read_bytes())
print(digest.hexdigest())
PY
)
    [ "$(cat "$stamps-${extras:-base}" 2>/dev/null || true)" != "$wanted" ] || return 0
    say "installing llm_emo${extras:+[$extras]} into $VENV (once; later starts skip this)"
    if would_fetch_cuda; then
        say "note: no NVIDIA GPU here, but PyPI's torch brings several GB of CUDA packages;"
        say "      LLM_EMO_PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' avoids them"
    fi
    rm -f -- "$stamps-${extras:-base}"
    # shellcheck disable=SC2086  # LLM_EMO_PIP_ARGS is a list of options
    "$PYTHON" -m pip install ${LLM_EMO_PIP_ARGS:-} \
        -c "$ROOT/constraints.txt" -e "$target" >&2 \
        || fail "pip could not install llm_emo; its message is above. Offline or behind a mirror?" \
            "See the settings at the top of scripts/environment.sh"
    printf '%s\n' "$wanted" >"$stamps-${extras:-base}"
    printf '%s\n' "$wanted" >"$stamps-base"  # which every extra includes
}
