"""Drives CMake (see CMakeLists.txt); everything else about the package is in pyproject.toml.

The environment variable EFFKERN_BUILD says what to build: `cpu`, `cuda` (which includes the CPU
library) or `none`. Without it: the CPU library, and the CUDA library where nvcc is found.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_torch_headers():
    """The include directory of the installed torch, found without importing it: build isolation
    hides site-packages from `import`, but sysconfig knows where those of an environment are."""
    environments = [sys.prefix, os.environ.get("VIRTUAL_ENV") or sys.prefix, sys.base_prefix]
    folders = [
        sysconfig.get_path(key, vars={"base": prefix, "platbase": prefix})
        for prefix in environments
        for key in ("platlib", "purelib")
    ]
    for folder in [*folders, site.getusersitepackages()]:
        include = Path(folder, "torch", "include")
        if (include / "torch" / "csrc" / "stable").is_dir():
            return include
    return None


def choose_build():
    """(what to build, torch's include directory, why nothing is built)."""
    wanted = os.environ.get("EFFKERN_BUILD", "").lower()
    if wanted not in ("", "cpu", "cuda", "none"):
        sys.exit(f"effkern: EFFKERN_BUILD is {wanted!r}; it must be cpu, cuda or none")
    if wanted == "none":
        return "none", None, "EFFKERN_BUILD=none"
    headers = find_torch_headers()
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    if not sys.platform.startswith("linux"):
        missing = "the libraries are built on Linux only"
    elif headers is None:
        missing = (
            "no PyTorch 2.10 or newer was found; install torch first, or use --no-build-isolation"
        )
    elif not any(shutil.which(name.split()[0]) for name in compilers if name):
        missing = "no C++ compiler was found; install g++ or clang++"
    else:
        return wanted or "auto", headers, None
    if wanted:
        sys.exit(f"effkern: EFFKERN_BUILD={wanted}, but {missing}")
    return "none", None, missing


def find_tool(name):
    """A program of the running environment (its bin folder need not be on PATH), or one on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return shutil.which(name, path=path) or sys.exit(
        f"effkern: {name} was not found; pip install {name}"
    )


class CMakeBuild(build_ext):
    """Builds the shared libraries into the package's folder `lib`."""

    def run(self):
        in_place = self.inplace or self.editable_mode
        package = ROOT / "effkern" if in_place else Path(self.build_lib).resolve() / "effkern"
        folder = ROOT / "build" / "cmake" if in_place else Path(self.build_temp).resolve()
        stage = folder / "stage"
        shutil.rmtree(stage, ignore_errors=True)
        build, headers, missing = choose_build()
        if build == "none":
            print(f"effkern: no library is built ({missing}); reference and Triton will serve")
            (stage / "lib").mkdir(parents=True)
            info = {name: {"built": False, "reason": missing} for name in ("cpu", "cuda")}
            (stage / "lib" / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        else:
            self.run_cmake(folder, stage, build, headers)
        shutil.rmtree(package / "lib", ignore_errors=True)
        shutil.copytree(stage / "lib", package / "lib")

    def run_cmake(self, folder, stage, build, headers):
        cmake = find_tool("cmake")
        options = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "TORCH_INCLUDE_DIR": headers,
            "EFFKERN_CUDA": "OFF" if build == "cpu" else "ON",
            "EFFKERN_WERROR": "ON" if os.environ.get("EFFKERN_WERROR") else "OFF",
        }
        configure = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        try:
            subprocess.run(configure, check=True)
            cuda = json.loads((folder / "build_info.json").read_text())["cuda"]
            if build == "cuda" and not cuda["built"]:
                sys.exit(f"effkern: EFFKERN_BUILD=cuda, but {cuda['reason']}")
            subprocess.run([cmake, "--build", folder], check=True)
            subprocess.run([cmake, "--install", folder, "--prefix", stage], check=True)
        except subprocess.CalledProcessError:
            sys.exit("effkern: the build failed; the lines above say why")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class PlatformWheel(bdist_wheel):
    """Tags the wheel for any Python: the libraries know nothing of Python's ABI."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


# The extension has no source of its own: because of it setuptools calls CMakeBuild.
setup(
    ext_modules=[Extension("effkern.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
