# SPDX-License-Identifier: Apache-2.0
"""Builds vllm_mqa_sm90/_C.abi3.so: the hatchling build hook, and by hand `python csrc/build.py`.

Needs no GPU. The compiler's output, with each kernel's registers and spills, stays beside the
objects in build/*.log. The environment variables read are CUDA_HOME, CXX and MAX_JOBS.

Of PyTorch and of CUTLASS a build needs headers alone. Where they are not installed, each is unpacked from one
wheel, without what that package needs to run, and stays in build/headers.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path("vllm_mqa_sm90", "_C.abi3.so")
ARCH = "-gencode=arch=compute_90a,code=sm_90a"  # wgmma is in no other architecture: machine code alone, no PTX

# PyTorch 2.13 and later need CUDA 13, and 13.0 is the oldest compiler whose machine code for these
# kernels was checked (tests/test_build.py). The CUDA runtime is linked statically, so the compiler
# need not be the one that PyTorch was built with.
MIN_NVCC = (13, 0)
MIN_TORCH = (2, 11)
# Building against the oldest PyTorch yields a binary that every later one loads too. The wheel is the smallest that has
# the headers: those of the stable ABI are the same, byte for byte, as in the wheel for Linux (tests/test_build.py).
TORCH_WHEEL = ("torch==2.11.0", "--platform=macosx_11_0_arm64", "--python-version=3.12", "--abi=cp312")
CUTLASS_WHEEL = ("nvidia-cutlass==4.2.0.0",)
NVCC_REQUIREMENTS = tuple(
    f"{name}==13.0.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-nvvm")
)
# The parts of a CUDA toolkit that a build uses; as wheels they come from five packages.
TOOLKIT_PARTS = ("bin/nvcc", "nvvm/bin/cicc", "include/crt/host_config.h", "include/cuda_runtime.h",
                 "include/cccl/cuda/std/utility")  # fmt: skip


def site_packages() -> list[Path]:
    """Where installed packages may lie: the import path, then the running interpreter's own site.

    pip isolates a build by the import path alone, so the second reaches the environment that the
    wheel is built for, and what is there (gigabytes, with PyTorch) is not downloaded again.
    """
    return [Path(entry) for entry in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]) if entry]


def torch_headers(site: Path) -> Path | None:
    """The include folder of a PyTorch that is recent enough, or None."""
    version = site / "torch" / "version.py"
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.is_file() else None
    return version.parent / "include" if found and tuple(map(int, found.groups())) >= MIN_TORCH else None


def cutlass_headers(site: Path) -> Path | None:
    """The include folder of CUTLASS in the `nvidia-cutlass` package, or None."""
    include = site / "cutlass_library" / "source" / "include"
    return include if (include / "cute" / "tensor.hpp").is_file() else None


def find_headers() -> list[Path | None]:
    """PyTorch's and CUTLASS's include folders, of what is installed."""
    sites = site_packages()
    return [next(filter(None, map(of_site, sites)), None) for of_site in (torch_headers, cutlass_headers)]


def fetch_headers(wheel: tuple[str, ...], folder: str) -> Path:
    """`folder` of that wheel in build/headers, where it stays. Ends the build with one line if it cannot be had."""
    requirement = wheel[0]
    unpacked = ROOT / "build" / "headers" / requirement.replace("==", "-")
    if unpacked.is_dir():
        return unpacked / folder
    print(f"vllm-mqa-sm90: downloading {requirement}, for its headers", flush=True)
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        done = subprocess.run([*command, *wheel[1:], requirement], env=index_of_uv(), capture_output=True, text=True)
        require(done.returncode == 0, f"could not download {requirement}: {(done.stderr.strip() or '?').splitlines()[-1]}. "
                f"Offline, install it before: `pip install --no-deps {requirement}`, and build with --no-build-isolation.")  # fmt: skip
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            archive.extractall(Path(scratch, "all"), [name for name in archive.namelist() if name.startswith(folder + "/")])
        Path(scratch, "all").rename(unpacked)
    return unpacked / folder


def index_of_uv() -> dict[str, str]:
    """The environment, with the index that uv was told where pip was told none."""
    given = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
    return {**({"PIP_INDEX_URL": given} if given else {}), **os.environ}


def nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    """(major, minor) of a CUDA compiler, None if it does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def find_nvcc() -> tuple[Path | None, list[str]]:
    """nvcc from CUDA_HOME, else PATH, else the `nvidia-cuda-nvcc` wheel; and what was passed over."""
    candidates = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home, "bin", "nvcc"))
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    for site in site_packages():
        toolkit = site / "nvidia" / "cu13"
        if all((toolkit / part).is_file() for part in TOOLKIT_PARTS):
            candidates.append(toolkit / "bin" / "nvcc")
    rejected = []
    for nvcc in candidates:
        version = nvcc_version(nvcc)
        if version is not None and version >= MIN_NVCC:
            return nvcc, rejected
        what = "does not run" if version is None else "is release {}.{}".format(*version)
        rejected.append(f"{nvcc} {what}")
    return None, rejected


def require(found: object, what: str) -> None:
    """Ends the build with one line if a requirement is missing."""
    if not found:
        sys.exit(f"vllm-mqa-sm90: cannot build: {what}")


def link_tools(folder: Path, nvcc: Path, torch: Path, cutlass: Path) -> None:
    """Links `cuda`, `torch` and `cutlass` in `folder`, and `versions`, a file written only when they are others.

    ninja compiles again what had another command, and pip puts what an isolated build needs into a new
    place each time: so the commands name the links. It also compiles what is older than `versions`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in ("cuda", nvcc.parent.parent), ("torch", torch), ("cutlass", cutlass):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    nvcc_says = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    headers = torch / "torch" / "headeronly" / "version.h", cutlass / "cutlass" / "version.h"
    found = "\n".join([nvcc_says, *(file.read_text() for file in headers)])
    versions = folder / "versions"
    if not versions.is_file() or versions.read_text() != found:
        versions.write_text(found)


def write_ninja_file(path: Path, nvcc: Path, cxx: str) -> None:
    """One rule for kernels, one for the bindings, one for the link; paths are relative to ROOT."""
    build = path.parent.relative_to(ROOT)
    tools = build / "tools"
    nvcc = tools / "cuda" / nvcc.parent.name / nvcc.name
    common = [str(nvcc), "-ccbin", cxx, "-std=c++20", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden",
              # nvcc of one release beside headers of another, as installations of wheels have it
              "-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK", "-I", "csrc"]  # fmt: skip
    kernel = [*common, ARCH, "--expt-relaxed-constexpr",
              "-Xptxas=-v,--warn-on-spills", "-isystem", str(tools / "cutlass")]  # fmt: skip
    # TORCH_TARGET_VERSION keeps the binding to the stable ABI of 2.11; USE_CUDA declares its CUDA part.
    target = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}" + "0" * 12
    binding = [*common, f"-DTORCH_TARGET_VERSION={target}", "-DUSE_CUDA", "-isystem", str(tools / "torch")]
    # libtorch brings libtorch_cpu and, where PyTorch has CUDA, libtorch_cuda; the process has all of them loaded. To
    # name them, empty libraries of their names do.
    stubs = {name: f"{build}/stubs/{name}.so" for name in ("libtorch", "libtorch_cpu")}
    link = [str(nvcc), "-ccbin", cxx, "-shared", ARCH, "-cudart", "static", "-L", f"{build}/stubs",
            "-L", str(tools / "cuda" / "lib"),  # the wheels' folder, which nvcc 13.0 does not look into
            # libstdc++ first: libtorch_cpu exports some of its symbols too
            "-Xlinker=--no-as-needed", "-lstdc++", "-ltorch", "-ltorch_cpu", "-Xlinker=--exclude-libs,ALL"]  # fmt: skip

    lines = [f"builddir = {build}"]
    for rule, command in ("kernel", kernel), ("binding", binding):
        # The log is kept beside the object; ninja shows it only if the compiler fails.
        lines += [f"rule {rule}",
                  f"  command = {shlex.join(command)} -c $in -o $out > $out.log 2>&1 "
                  "|| (cat $out.log; exit 1)", f"  description = {rule} $in"]  # fmt: skip
    lines += ["rule link", f"  command = {shlex.join(link)} $in -o $out", "  description = link $out"]
    # Not what the compiler says it read: the toolkit's headers are new in each isolated build.
    headers = [header.relative_to(ROOT) for header in sorted((ROOT / "csrc").glob("*/*.*h"))]
    used = " ".join(map(str, [tools / "versions", *headers]))
    objects = []
    for source in sorted(path for path in (ROOT / "csrc").glob("*/*") if path.suffix in (".cu", ".cpp")):
        name = source.relative_to(ROOT)
        objects.append(f"{build}/{name.parent.name}-{source.stem}.o")
        rule = "kernel" if source.suffix == ".cu" else "binding"
        lines.append(f"build {objects[-1]}: {rule} {name} | {used}")
    lines += ["rule stub", f"  command = {shlex.quote(cxx)} -shared -nostdlib -Wl,-soname,$soname -x c /dev/null -o $out"]
    for name, stub in stubs.items():
        lines += [f"build {stub}: stub", f"  soname = {name}.so"]
    lines.append(f"build {LIBRARY}: link {' '.join(objects)} | {' '.join(stubs.values())}")
    path.write_text("\n".join(lines) + "\n")


def build() -> None:
    """Compiles what changed; leaves LIBRARY in the source tree."""
    cxx, (nvcc, rejected) = shutil.which(os.environ.get("CXX", "g++")), find_nvcc()
    # On PATH may be a version manager's stand-in for that of another Python.
    ninja = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
    require(nvcc, "found no nvcc of CUDA {}.{} or newer in CUDA_HOME, in PATH or as a wheel{}. Install the CUDA "
            "toolkit, or `pip install {}`.".format(*MIN_NVCC, "".join(f"; {each}" for each in rejected),
                                                   " ".join(f"'{each}'" for each in NVCC_REQUIREMENTS)))  # fmt: skip
    require(cxx, "found no C++ compiler. Install g++ (Debian, Ubuntu: `apt-get install g++`), or name one in CXX.")
    require(ninja, "found no ninja. `pip install ninja`.")
    torch, cutlass = find_headers()
    torch = torch or fetch_headers(TORCH_WHEEL, "torch/include")
    cutlass = cutlass or fetch_headers(CUTLASS_WHEEL, "cutlass_library/source/include")
    print(f"vllm-mqa-sm90: nvcc {nvcc}, PyTorch {torch}; compiling takes about a minute on two cores", flush=True)

    ninja_file = ROOT / "build" / "build.ninja"
    link_tools(ninja_file.parent / "tools", nvcc, torch, cutlass)
    write_ninja_file(ninja_file, nvcc, cxx)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run([ninja, "-C", str(ROOT), "-f", str(ninja_file), *jobs])
    require(done.returncode == 0, "the compiler failed, see above.")


# The newest libstdc++ symbols, GLIBCXX_3.4.x, that every system with glibc 2.y has: {y: x}, of the manylinux policies
# (auditwheel 6; tests/test_build.py asks the installed one).
_GLIBCXX_OF_GLIBC = {28: 24, 31: 28, 34: 29, 35: 30, 36: 30, 37: 30, 38: 30, 39: 33, 40: 33, 41: 33}


def platform_tag(library: Path) -> str:
    """The oldest manylinux platform whose glibc and libstdc++ have every symbol that the library asks for."""
    symbols = subprocess.run(["objdump", "-T", library], check=True, capture_output=True, text=True).stdout
    glibc = max(map(int, re.findall(r"\bGLIBC_2\.(\d+)", symbols)), default=0)
    glibcxx = max(map(int, re.findall(r"\bGLIBCXX_3\.4\.(\d+)", symbols)), default=0)
    fits = (minor for minor, newest in _GLIBCXX_OF_GLIBC.items() if minor >= glibc and newest >= glibcxx)
    minor = next(fits, None)
    machine = sysconfig.get_platform().removeprefix("linux-")
    return f"manylinux_2_{minor}_{machine}" if minor else f"linux_{machine}"


class BuildHook(BuildHookInterface):
    """Puts the compiled library into the wheel, or beside the sources of an editable install."""

    def dependencies(self) -> list[str]:
        """What an isolated build must install: only what is not found."""
        missing = [] if all(find_headers()) else ["pip"]
        return missing + ([] if find_nvcc()[0] else list(NVCC_REQUIREMENTS))

    def initialize(self, version: str, build_data: dict) -> None:
        build()
        # The stable ABI of PyTorch and no Python.h: one binary for every Python 3.
        build_data["tag"] = f"py3-none-{platform_tag(ROOT / LIBRARY)}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(str(LIBRARY))


if __name__ == "__main__":
    build()
