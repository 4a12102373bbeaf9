# SPDX-License-Identifier: Apache-2.0
"""What was built: its machine code, the symbols that it needs, and what the build says when it can't."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import auditwheel
import pytest
import torch

from vllm_mqa_sm90 import HEADS, ops

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = [(heads, rows) for heads in HEADS for rows in (1, 2, 3, 4, 6, 8)]  # of the widest group


def launch_registers(heads: int, rows: int) -> int:
    """At the launch, per thread of an SM's one CTA of 512 or 384; warpgroups then trade them (setmaxnreg)."""
    return 65536 // (512 if heads * rows <= 128 and rows <= 4 else 384) // 8 * 8


def tool(name: str) -> str:
    """A CUDA binary tool from PATH or from its wheel."""
    sites = [*sys.path, sysconfig.get_path("purelib")]
    found = shutil.which(name) or shutil.which(name, path=":".join(f"{site}/nvidia/cu13/bin" for site in sites))
    assert found, f"no {name}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return found


def output_of(*command: object, **options: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, **options).stdout


def cuobjdump(*arguments: str) -> str:
    # cuobjdump looks for nvdisasm in PATH.
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    return output_of(tool("cuobjdump"), *arguments, ops._LIBRARY, env={**os.environ, "PATH": path})


def by_kernel(text: str, heading: str) -> dict[str, str]:
    """What follows each kernel's heading."""
    parts = re.split(heading, text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def variant_of(kernel: str) -> tuple[int, int] | None:
    found = re.search(r"paged_mqa_logits_kernel.*ConfigILi(\d+)ELi(\d+)E", kernel)
    return (int(found[1]), int(found[2])) if found else None


@pytest.fixture(scope="module")
def sass() -> dict[str, str]:
    return by_kernel(cuobjdump("--dump-sass"), r"Function : (\S+)")


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, int]]:
    found = by_kernel(cuobjdump("--dump-resource-usage"), r"Function (\S+?):")
    return {
        kernel: {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        for kernel, text in found.items()
    }


def test_every_variant_is_there(sass: dict[str, str]) -> None:
    assert sorted(filter(None, map(variant_of, sass))) == sorted(VARIANTS)
    assert sum("plan_kernel" in kernel for kernel in sass) == 1
    # CTAs of a row, and of an SM.
    selections = [re.search(r"selection_kernelILi(\d+)ELi(\d+)E", kernel) for kernel in sass]
    assert sorted(f"{found[1]}/{found[2]}" for found in selections if found) == ["1/1", "1/2", "1/3", "16/1", "2/1", "4/1", "4/2", "8/1"]


def test_scores_are_computed_by_fp8_warpgroup_mma(sass: dict[str, str]) -> None:
    for kernel, code in sass.items():
        assert ("QGMMA" in code) == (variant_of(kernel) is not None), kernel


def test_no_kernel_touches_local_memory(sass: dict[str, str], resources: dict[str, dict[str, int]]) -> None:
    """But for selection's `look_further`, which few rows need: it may save some registers."""
    for kernel, code in sass.items():
        usual = code
        if "selection_kernel" in kernel:
            [further] = set(re.findall(r"CALL\.REL\S* 0x(\w+)", code))
            usual = code.partition(f"/*{further}*/")[0]
            assert "EXIT" in usual and "RET" not in usual, kernel
        assert not re.findall(r"\b(?:STL|LDL)\b.*", usual), kernel
    for kernel, used in resources.items():
        assert used["LOCAL"] == 0 and used["STACK"] <= (16 if "selection_kernel" in kernel else 0), kernel


def test_what_earlier_kernels_wrote_is_read_after_the_wait_for_them(sass: dict[str, str]) -> None:
    """By loads that see it: kernels whose start overlaps the end of the one before wait, before they read anything."""
    for kernel, code in sass.items():
        assert not re.findall(r"\bLDG\S*CONSTANT.*", code), kernel
        overlaps = variant_of(kernel) is not None or "selection_kernel" in kernel
        assert ("ACQBULK" in code) == overlaps, kernel
        if overlaps:
            assert not re.findall(r"\b(?:LDG|LD|ATOMG|RED|STG|ST|UBLKCP|UTMALDG)\b.*", code.partition("ACQBULK")[0]), kernel


def test_registers_fit_an_sm(sass: dict[str, str], resources: dict[str, dict[str, int]]) -> None:
    for kernel, used in resources.items():
        if variant := variant_of(kernel):
            assert used["REG"] <= launch_registers(*variant), kernel
            assert "USETMAXREG" in sass[kernel], kernel


def test_machine_code_is_for_sm_90a_alone() -> None:
    assert set(re.findall(r"arch = (\S+)", cuobjdump("--dump-resource-usage"))) == {"sm_90a"}
    assert "Fatbin ptx code" not in cuobjdump("--list-ptx", "--list-elf")


def test_needs_only_the_stable_abi() -> None:
    """Every symbol that no libc or libstdc++ has is of PyTorch's stable C interface; no CUDA library is needed."""
    undefined = [line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", ops._LIBRARY).splitlines()]
    foreign = [name for name in undefined if "@" not in name and not name.startswith(("_ITM_", "__gmon_start__"))]
    assert foreign
    assert [name for name in foreign if not re.match(r"(aoti_torch|torch)_", name)] == []
    needed = re.findall(r"NEEDED.*\[(.*?)\]", output_of("readelf", "-d", ops._LIBRARY))
    allowed = r"lib(torch|torch_cpu|stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so.*|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def copy_sources(tree: Path) -> Path:
    """What a build starts from in `tree`; the folder beside it that has a stand-in for hatchling."""
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("*.svg"))
    (tree / "vllm_mqa_sm90").mkdir()
    interface = tree / "site" / "hatchling" / "builders" / "hooks" / "plugin" / "interface.py"
    interface.parent.mkdir(parents=True)
    interface.write_text("class BuildHookInterface: pass\n")
    return tree / "site"


def build_in(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    """csrc/build.py of `tree`, in an interpreter that sees what PYTHONPATH has alone."""
    program = (
        "import runpy, sysconfig; sysconfig.get_path = lambda *_: 'nowhere';"
        "runpy.run_path('csrc/build.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tree, capture_output=True, text=True, env=environment
    )


def run_build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """A build that finds a stand-in for hatchling, what lies in `tmp_path`, and what the environment names."""
    site = copy_sources(tmp_path)
    return build_in(tmp_path, **{"PYTHONPATH": str(site), "PATH": str(tmp_path), **environment})


def test_no_nvcc_is_one_error_that_says_what_to_install(tmp_path: Path) -> None:
    done = run_build(tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "found no nvcc of CUDA 13.0 or newer in CUDA_HOME, in PATH or as a wheel." in line
    assert "pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-runtime==13.0.*'" in line


def test_an_old_nvcc_is_passed_over_by_name(tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    done = run_build(tmp_path, CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{nvcc} is release 12.4" in line


# Compiles into an empty file, and says in $LOG that it did.
NVCC = """#!/bin/sh
case "$*" in
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
*) for word in "$@"; do out=$word; done; echo "$out" >>"$LOG"; : >"$out" ;;
esac
"""


def make_site(site: Path, torch: str = "2.11.0") -> Path:
    """Installed packages as a build finds them, new as in each isolated build of pip's."""
    for name, text in {
        "torch/version.py": f"__version__ = '{torch}'\n",
        "torch/include/torch/headeronly/version.h": f'#define TORCH_VERSION "{torch}"\n',
        "cutlass_library/source/include/cute/tensor.hpp": "",
        "cutlass_library/source/include/cutlass/version.h": "#define CUTLASS_MAJOR 4\n",
        "nvidia/cu13/bin/nvcc": NVCC,
        **dict.fromkeys(TOOLKIT_FILES, ""),
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (site / "nvidia/cu13/bin/nvcc").chmod(0o755)
    return site


TOOLKIT_FILES = [
    f"nvidia/cu13/{part}"
    for part in (
        "nvvm/bin/cicc", "include/crt/host_config.h", "include/cuda_runtime.h", "include/cccl/cuda/std/utility"
    )
]  # fmt: skip


def test_nothing_is_compiled_again_unless_something_changed(tmp_path: Path) -> None:
    tools, log, tree = tmp_path / "tools", tmp_path / "log", tmp_path / "tree"
    tools.mkdir()
    hatchling, sources = copy_sources(tree), tree / "csrc"
    ninja = shutil.which("ninja") or Path(sysconfig.get_path("scripts"), "ninja")
    for name in "sh", "cat":
        (tools / name).symlink_to(shutil.which(name))
    (tools / "ninja").symlink_to(ninja)
    (tools / "g++").write_text('#!/bin/sh\nfor word in "$@"; do out=$word; done; : >"$out"\n')
    (tools / "g++").chmod(0o755)

    def compiled(site: Path) -> int:
        log.write_text("")
        done = build_in(tree, PYTHONPATH=f"{site}:{hatchling}", PATH=str(tools), LOG=str(log))
        assert done.returncode == 0, done.stdout + done.stderr
        return len(log.read_text().splitlines())

    everything = compiled(make_site(tmp_path / "first"))
    assert everything == len(list(sources.glob("*/*.cu"))) + 2  # the bindings and the library
    shutil.rmtree(tmp_path / "first")
    assert compiled(make_site(tmp_path / "second")) == 0
    assert compiled(make_site(tmp_path / "third", torch="2.12.0")) == everything
    (sources / "plan" / "plan.cu").touch()
    assert compiled(tmp_path / "third") == 2
    (sources / "shared" / "params.h").touch()
    assert compiled(tmp_path / "third") == everything


def load_build() -> types.ModuleType:
    """csrc/build.py, with a stand-in for hatchling."""
    interface = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = object
    parents = ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin")
    with pytest.MonkeyPatch.context() as patch:
        for name in parents:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, interface.__name__, interface)
        spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_the_platform_is_the_one_that_auditwheel_finds(tmp_path: Path) -> None:
    info = "vllm_mqa_sm90-0.dist-info"
    wheel = tmp_path / "vllm_mqa_sm90-0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(ops._LIBRARY, "vllm_mqa_sm90/_C.abi3.so")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: vllm-mqa-sm90\nVersion: 0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-linux_x86_64\n")
        archive.writestr(f"{info}/RECORD", "vllm_mqa_sm90/_C.abi3.so,,\n")
    said = output_of(sys.executable, "-m", "auditwheel", "show", wheel)
    # PyTorch's libraries are not in any policy: what the versions of symbols allow is said apart.
    (platform,) = re.findall(r"constrains the platform tag to\s+\"(\w+)\"", said)
    assert load_build().platform_tag(ops._LIBRARY) == platform


def test_platforms_have_the_libstdcxx_that_auditwheels_policies_say() -> None:
    policies = json.loads((Path(auditwheel.__file__).parent / "policy" / "manylinux-policy.json").read_text())
    newest = {
        int(policy["name"].split("_")[2]): max(
            int(version.split(".")[2]) for version in policy["symbol_versions"]["x86_64"]["GLIBCXX"] if version.count(".") > 1
        )
        for policy in policies
        if policy["name"].startswith("manylinux_2_") and "x86_64" in policy["symbol_versions"]
    }
    table = load_build()._GLIBCXX_OF_GLIBC
    assert {glibc: newest[glibc] for glibc in table} == table


def test_headers_come_from_one_wheel_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pip that has what it is asked for, and once more by one that fails."""
    build = load_build()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    asked = []

    def pip(command: list[str], **options: object) -> SimpleNamespace:
        asked.append((command[1:], options["env"]))
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "torch.whl"), "w") as archive:
            archive.writestr("torch/include/torch/a.h", "a")
            archive.writestr("torch/lib/libtorch.so", "large")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://index")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setattr(build.subprocess, "run", pip)
    headers = build.fetch_headers(build.TORCH_WHEEL, "torch/include")
    ((command, env),) = asked
    assert command[:5] == ["-m", "pip", "download", "-q", "--no-deps"] and command[-1] == "torch==2.11.0"
    assert env["PIP_INDEX_URL"] == "https://index"
    assert (headers / "torch" / "a.h").read_text() == "a" and not (headers.parent / "lib").exists()
    assert [path.name for path in (tmp_path / "build" / "headers").iterdir()] == ["torch-2.11.0"]

    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("asked again"))
    assert build.fetch_headers(build.TORCH_WHEEL, "torch/include") == headers


def test_headers_that_cannot_be_had_are_one_error(tmp_path: Path) -> None:
    """Whether this Python has a pip or not, and without asking an index."""
    tools = make_site(tmp_path / "tools") / "nvidia" / "cu13"
    pip = tmp_path / "site" / "pip" / "__main__.py"
    pip.parent.mkdir(parents=True)
    pip.write_text("raise SystemExit('No module named pip')\n")
    pip.with_name("__init__.py").touch()  # before an installed one
    for name in "g++", "ninja":
        (tmp_path / name).touch(0o755)
    done = run_build(tmp_path, CUDA_HOME=str(tools))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot build: could not download torch==2.11.0" in line and "No module named pip" in line
    assert "`pip install --no-deps torch==2.11.0`, and build with --no-build-isolation" in line
    assert not list((tmp_path / "build" / "headers").iterdir())


def test_an_isolated_build_needs_pip_where_headers_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    build = load_build()
    monkeypatch.setattr(build, "find_nvcc", lambda: (Path("nvcc"), []))
    hook = build.BuildHook()
    for headers, needed in (([Path("a"), Path("b")], []), ([Path("a"), None], ["pip"]), ([None, None], ["pip"])):
        monkeypatch.setattr(build, "find_headers", lambda headers=headers: headers)
        assert hook.dependencies() == needed


@pytest.mark.skipif(not torch.__version__.startswith("2.11.0"), reason="headers are those of PyTorch 2.11.0")
def test_fetched_headers_are_those_of_the_installed_pytorch() -> None:
    """Where a build has fetched them, as tests/run.sh makes it do: the stable ABI's are the same for every platform."""
    fetched = ROOT / "build" / "headers" / "torch-2.11.0" / "torch" / "include" / "torch"
    if not fetched.is_dir():
        pytest.skip("no build has fetched headers here")
    installed = Path(torch.__file__).parent / "include" / "torch"
    for part in "headeronly", "csrc/stable", "csrc/inductor/aoti_torch/c":
        files = [path.relative_to(installed) for path in (installed / part).rglob("*.h")]
        assert files
        assert [name for name in files if (fetched / name).read_bytes() != (installed / name).read_bytes()] == []


def test_readme_links_nowhere_outside_of_the_repository() -> None:
    text = (ROOT / "README.md").read_text()
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert re.findall(r"\]\((?!https?:|#).*?\)", text) == []
    assert "described in csrc/README.md" in text  # what was a link
