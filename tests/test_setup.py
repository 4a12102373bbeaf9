# SPDX-License-Identifier: Apache-2.0
"""examples/quickstart.sh: what it recovers from, with stand-ins for uv, pip and what they install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# uv: says what it does, makes a venv without pip, and installs what has a name. $TROUBLE: "WORDS: what happens".
UV = """#!/bin/bash
echo "uv $*" >>"$LOG"
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
# As an installer that was killed: a package that has its folder, and not its files.
half() { mkdir -p "$(site .venv/bin/python)/torch-2.11.0.dist-info"; }
trouble() { [[ "uv $*" == *"${TROUBLE%%: *}"* && $TROUBLE == *": "* ]] && [[ $TROUBLE == *": $what" ]]; }
what=offline trouble "$@" && { echo "error sending request" >&2; exit 2; }
what=fails trouble "$@" && { echo "No space left on device" >&2; exit 2; }
what=killed trouble "$@" && { [ "$2" = install ] && half; kill -9 $PPID; exit 9; }
what=stopped trouble "$@" && { kill -INT $PPID; exit 2; }
case "$1 $2" in
venv*) "$PYTHON" -m venv --without-pip .venv ;;
"pip compile") cat >/dev/null; [[ $TROUBLE != *": offline" ]] ;;
"pip install")
  for word in "$@"; do
    case $word in
    pip) printf '%s' "$PIP" >"$(site .venv/bin/python)/pip.py" ;;
    torch*) [ -e "$(site .venv/bin/python)/torch-2.11.0.dist-info" ] || { half; touch "$(site .venv/bin/python)/torch.py"; } ;;
    *.whl) printf '#!/bin/sh\\necho "command $*" >>"$LOG"\\n' >.venv/bin/vllm-mqa-sm90; chmod +x .venv/bin/vllm-mqa-sm90 ;;
    esac
  done
esac
"""
# rm, as where a compiler writes into a folder while its files are removed.
RM = """#!/bin/sh
/bin/rm "$@" || exit
case "$TROUBLE: $*" in *compilers*tmp.*|*compilers*.venv/setup)
  for path; do :; done
  mkdir -p "$path"; touch "$path/made.o"; echo "rm: cannot remove '$path': Directory not empty" >&2; exit 1
esac
"""
PIP = """
import os, signal, sys
open(os.environ["LOG"], "a").write("pip " + " ".join(sys.argv[1:]) + "\\n")
if os.environ["TROUBLE"] == "pip wheel: killed":
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(9)
if os.environ["TROUBLE"] == "pip wheel: fails":
    sys.exit("the compiler failed")
folder = sys.argv[sys.argv.index("-w") + 1]
os.makedirs(folder)
open(folder + "/package.whl", "w")
"""


class Clone:
    """A clone of the repository, with a PATH that has the stand-ins first and no GPU."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log, tools = folder / "clone", folder / "log", folder / "tools"
        shutil.copytree(ROOT / "examples", self.path / "examples")
        (self.path / "csrc").mkdir()
        (self.path / "vllm_mqa_sm90").mkdir()
        (self.path / "pyproject.toml").touch()
        tools.mkdir()
        for name, text in (("uv", UV), ("g++", "#!/bin/sh\n"), ("nvidia-smi", "#!/bin/sh\nexit 9\n"), ("rm", RM)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(self.log), "PIP": PIP, "TROUBLE": ""}
        self.env["PYTHON"] = getattr(sys, "_base_executable", sys.executable)

    def run(self, trouble: str = "") -> tuple[int, list[str], str]:
        """Exit status, what was called, and what was said."""
        self.log.write_text("")
        command, env = ["bash", "examples/quickstart.sh", "--timeout", "9"], {**self.env, "TROUBLE": trouble}
        done = subprocess.run(command, cwd=self.path, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, self.log.read_text().splitlines(), done.stderr

    def assert_runs(self) -> list[str]:
        status, called, said = self.run()
        assert (status, called[-1]) == (0, "command demo --timeout 9"), said
        assert not (self.path / ".venv" / "setup").exists()
        return called


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def installs(called: list[str]) -> list[str]:
    return [line for line in called if line.startswith("uv pip install")]


def test_once_set_up_nothing_is_done_again(clone: Clone) -> None:
    called = clone.assert_runs()
    assert installs(called)[0] == "uv pip install --python .venv/bin/python pip torch>=2.11"
    assert clone.assert_runs() == ["command --version", "command demo --timeout 9"]


@pytest.mark.parametrize("file", ["csrc/new.cu", "vllm_mqa_sm90/new.py", "pyproject.toml"])
def test_other_sources_are_built(clone: Clone, file: str) -> None:
    clone.assert_runs()
    (clone.path / file).write_text("other")
    assert any(line.startswith("pip wheel") for line in clone.assert_runs())
    assert len(clone.assert_runs()) == 2
    (clone.path / "vllm_mqa_sm90" / "_C.abi3.so").write_text("made by the build")
    assert len(clone.assert_runs()) == 2


@pytest.mark.parametrize("point", ["uv venv", "pip torch", "pip wheel", "package.whl"])
def test_a_killed_set_up_goes_on(clone: Clone, point: str) -> None:
    status, _, _ = clone.run(f"{point}: killed")
    assert status == -9
    (part,) = [*clone.path.glob(".venv/lib/python3*/site-packages")] or [clone.path]
    (part / "part.py").touch()
    clone.assert_runs()
    assert (part / "part.py").exists()
    (site,) = clone.path.glob(".venv/lib/python3*/site-packages")
    # What was installed in part would count as installed.
    assert (site / "torch.py").exists()
    assert len(clone.assert_runs()) == 2


def test_compilers_of_a_killed_run_may_still_be_at_work(clone: Clone) -> None:
    clone.run("pip wheel: killed")
    assert list(clone.path.glob(".venv/setup/tmp.*"))
    status, called, said = clone.run("compilers")
    assert (status, called[-1]) == (0, "command demo --timeout 9"), said
    assert list(clone.path.glob(".venv/setup/made.o"))
    assert clone.run()[1] == ["command --version", "command demo --timeout 9"]


@pytest.mark.parametrize("point", ["pip torch", "package.whl"])
def test_killed_while_it_installs_into_a_venv_of_others(clone: Clone, point: str) -> None:
    """What is older than the set-up stays; what is newer is installed once more."""
    (site,) = venv(clone).glob("lib/python3*/site-packages")
    (site / "mine.py").touch()
    (site / "mine-1.0.dist-info").mkdir()
    status, _, _ = clone.run(f"{point}: killed")
    assert status == -9
    called = clone.assert_runs()
    assert not any(line.startswith("uv venv") for line in called)
    assert (site / "torch.py").exists() and (site / "mine.py").exists() and (site / "mine-1.0.dist-info").exists()
    assert len(clone.assert_runs()) == 2


def test_killed_while_it_downloads(clone: Clone) -> None:
    (site,) = venv(clone).glob("lib/python3*/site-packages")
    (site / "mine-1.0.dist-info").mkdir()
    (clone.path / ".venv" / "setup").mkdir()
    (clone.path / ".venv" / "setup" / "installing").touch()
    clone.assert_runs()
    assert (site / "mine-1.0.dist-info").exists() and (site / "torch.py").exists()


@pytest.mark.parametrize("point", ["uv venv", "pip torch", "package.whl"])
def test_ctrl_c_says_that_it_goes_on(clone: Clone, point: str) -> None:
    status, called, said = clone.run(f"{point}: stopped")
    assert (status, said) == (130, "quickstart.sh: stopped; run it again, and it goes on from here\n")
    assert not any("demo" in line for line in called)
    clone.assert_runs()


@pytest.mark.parametrize("point", ["uv venv", "pip torch", "pip wheel", "package.whl"])
def test_a_set_up_that_failed_goes_on(clone: Clone, point: str) -> None:
    status, called, said = clone.run(f"{point}: fails")
    assert status == 1 and "see above" in said and "offline, or" not in said
    assert not any("demo" in line for line in called)
    clone.assert_runs()


@pytest.mark.parametrize("point", ["pip torch", "package.whl"])
def test_offline_is_called_offline(clone: Clone, point: str) -> None:
    status, _, said = clone.run(f"{point}: offline")
    assert status == 1
    assert said.splitlines()[-1].startswith("quickstart.sh: this machine is offline, or the package index does not answer")
    clone.assert_runs()


@pytest.mark.parametrize("fails", [False, True])
def test_offline_without_uv(clone: Clone, tmp_path: Path, fails: bool) -> None:
    """Python's pip, against an index that is not there. A uv that fails is none, as a version manager's is that belongs to
    another Python."""
    (tmp_path / "tools" / "uv").write_text("#!/bin/sh\nexit 127\n")
    if not fails:
        (tmp_path / "tools" / "uv").unlink()
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "uv").exists()]
    clone.env["PATH"] = os.pathsep.join([str(tmp_path / "tools"), *folders])
    for name in "curl", "wget":
        (tmp_path / "tools" / name).symlink_to("/bin/false")
    clone.env |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    clone.env |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    status, _, said = clone.run()
    assert status == 1 and "could not download uv, see above: is this machine offline?" in said
    assert "install python3" not in said


def venv(clone: Clone) -> Path:
    """A venv of others, without pip."""
    subprocess.run([clone.env["PYTHON"], "-m", "venv", "--without-pip", ".venv"], cwd=clone.path, check=True)
    return clone.path / ".venv"


def test_a_venv_without_pip_is_used(clone: Clone) -> None:
    (venv(clone) / "mine").touch()
    called = clone.assert_runs()
    assert not any(line.startswith("uv venv") for line in called)
    assert (clone.path / ".venv" / "mine").exists()


@pytest.mark.parametrize("broken", ["bin/python", "pyvenv.cfg"])
def test_half_a_venv_is_made_whole(clone: Clone, broken: str) -> None:
    (venv(clone) / broken).unlink()
    assert any(line.startswith("uv venv -q --allow-existing") for line in clone.assert_runs())


def test_a_venv_whose_python_is_gone_is_made_again(clone: Clone) -> None:
    clone.assert_runs()
    shutil.rmtree(clone.path / ".venv" / "bin")
    assert any(line.startswith("uv venv") for line in clone.assert_runs())


def test_a_venv_of_another_python_is_named(clone: Clone) -> None:
    python = venv(clone) / "bin" / "python"
    python.unlink()
    python.write_text("""#!/bin/sh
case "$*" in --version) echo Python 3.8.1;; *version_info*) exit 1;; esac
""")
    python.chmod(0o755)
    status, called, said = clone.run()
    assert status == 1 and not installs(called)
    assert ".venv has Python 3.8.1, expected Python 3.10 to 3.13" in said and "remove .venv, or move it away" in said
