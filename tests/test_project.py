import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llm_emo import protocols

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = ("scripts/quickstart", "scripts/test", "scripts/check", ".ci/run")
BASH = "/bin/bash"


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def functions(script, tmp_path, **env):
    """Run lines of bash after sourcing the scripts' shared functions, in a bare environment."""
    return subprocess.run(
        [BASH, "-c", f'set -euo pipefail; . "$0"; {script}', str(ROOT / "scripts/environment.sh")],
        env={"PATH": os.defpath, "HOME": str(tmp_path)} | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


# --- what is shipped ------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["prompts", "recipes"])
def test_the_wheel_takes_every_folder_of_shipped_yaml(folder):
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"][folder] == f"llm_emo/{folder}_files"
    assert list((ROOT / folder).rglob("*.yaml"))


def test_yaml_lies_nowhere_but_in_the_shipped_folders_and_the_fixtures():
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.yaml", "*.yml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    roots = {Path(name).parts[0] for name in tracked.stdout.splitlines()}
    assert roots <= {"prompts", "recipes", "tests", ".pre-commit-config.yaml"}


def test_the_licence_is_the_whole_of_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))


# --- constraints ----------------------------------------------------------------------------


def test_every_requirement_is_pinned_to_one_version_that_it_admits():
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(line for extra in ("speech", "track", "dev") for line in extras[extra]),
    ]
    for requirement in map(Requirement, wanted):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_the_pinned_torch_admits_builds_with_and_without_cuda():
    assert pins()["torch"] == "2.13.0"
    assert not [name for name in pins() if re.match(r"nvidia|cuda|triton", name)]
    assert not [version for version in pins().values() if "+" in version]


# --- commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_executable_bash_that_stops_at_the_first_error(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    subprocess.run([BASH, "-n", str(path)], check=True)


def test_the_readme_gives_the_two_commands_and_ci_runs_the_second():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "scripts/quickstart" in readme
    assert "scripts/test" in readme
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-1].startswith("exec ")
    assert lines[-1].endswith('/../scripts/test" "$@"')


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_the_number_of_protocols_is_counted(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"(\d+) protocols", text) == [str(len(protocols.names()))]


def test_contributing_has_four_checklists_of_at_most_six_boxes():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sections = text.split("\n## ")[1:]
    assert [section.splitlines()[0] for section in sections] == [
        "A dataset",
        "A prompt",
        "A recipe",
        "A method or a baseline",
    ]
    assert all(1 <= section.count("- [ ]") <= 6 for section in sections)


def test_pre_commit_runs_local_hooks_only():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"repo: (\S+)", text)) == {"local"}


# --- the environment of the two commands ----------------------------------------------------


def test_every_cache_lies_below_the_one_folder_that_is_named(tmp_path):
    done = functions("use_cache; env", tmp_path, PIP_CACHE_DIR="/elsewhere")
    cache = tmp_path.resolve() / ".cache" / "llm_emo"
    assert f"cache: {cache} " in done.stderr
    exported = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    for name in ("PIP_CACHE_DIR", "HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TMPDIR"):
        assert Path(exported[name]).is_relative_to(cache), name


def test_the_cache_folder_can_be_chosen_and_relative_ones_are_made_absolute(tmp_path):
    done = functions('use_cache; echo "$LLM_EMO_CACHE"', tmp_path, LLM_EMO_CACHE="my cache")
    assert done.stdout.strip() == str(tmp_path.resolve() / "my cache")
    xdg = functions('use_cache; echo "$LLM_EMO_CACHE"', tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert xdg.stdout.strip() == str(tmp_path.resolve() / "llm_emo")


def test_a_cache_folder_that_cannot_be_made_is_one_clear_message(tmp_path):
    (tmp_path / "file").touch()
    done = functions("use_cache", tmp_path, LLM_EMO_CACHE=str(tmp_path / "file"))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: the cache folder {tmp_path / 'file'} cannot be written; "
        "set LLM_EMO_CACHE to another\n"
    )


def python(folder, name, body):
    path = folder / name
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)


def test_a_python_that_is_too_old_or_a_broken_shim_is_passed_over(tmp_path):
    python(tmp_path, "python3", "exit 1")
    python(tmp_path, "python3.13", "exit 127")
    python(tmp_path, "python3.12", f'exec "{sys.executable}" "$@"')
    done = functions("find_python", tmp_path, PATH=str(tmp_path))
    assert done.stdout.strip() == "python3.12"


def test_without_python_the_message_says_what_to_do(tmp_path):
    done = functions("find_python", tmp_path, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "found no Python 3.11 or newer as python3, python3.13, " in done.stderr
    assert "LLM_EMO_PYTHON" in done.stderr


def test_without_ensurepip_the_message_names_the_package(tmp_path):
    python(tmp_path, "python3", 'case "$2" in *ensurepip*) exit 1;; esac')
    done = functions("find_python", tmp_path, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "python3 lacks the modules venv and ensurepip" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_the_environment_is_installed_once_and_again_when_the_pins_change(tmp_path):
    """A stand-in interpreter logs what would be installed."""
    clone = tmp_path / "a clone"
    (clone / "scripts").mkdir(parents=True)
    for name in ("scripts/environment.sh", "pyproject.toml", "constraints.txt"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    (clone / ".venv" / "bin").mkdir(parents=True)
    log = tmp_path / "log"
    python(
        clone / ".venv" / "bin",
        "python",
        f'if [ "${{1:-}}" = -m ]; then printf "%s|" "$@" >>"{log}"; echo >>"{log}"; '
        f'else exec "{sys.executable}" "$@"; fi',
    )

    def install(extras, **env):
        return subprocess.run(
            [BASH, "-c", f'set -eu; . "$0"; environment "{extras}"; echo "$PYTHON"',
             str(clone / "scripts/environment.sh")],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | env,
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )  # fmt: skip

    install("")
    install("")
    assert len(log.read_text().splitlines()) == 1
    install("dev", LLM_EMO_PIP_ARGS="--extra-index-url https://example.invalid/simple")
    last = log.read_text().splitlines()[-1]
    assert last == (
        "-m|pip|install|--extra-index-url|https://example.invalid/simple|"
        f"-c|{clone.resolve()}/constraints.txt|-e|{clone.resolve()}[dev]|"
    )
    install("")
    assert len(log.read_text().splitlines()) == 2
    with (clone / "constraints.txt").open("a") as file:
        file.write("# newer\n")
    assert install("").stdout.strip() == f"{clone.resolve()}/.venv/bin/python"
    assert len(log.read_text().splitlines()) == 3
