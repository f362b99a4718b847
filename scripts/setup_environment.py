"""Makes the environment that `make demo` and `make test` run in; a second call returns at once.

    python3 scripts/setup_environment.py [--venv .venv] [--torch torch] [--copy]

Creates the virtual environment, installs torch, then what pyproject.toml names, then effkern, in
place unless --copy is given. What was done is remembered in the environment: it is made again when
Python or the wanted torch changed, and effkern is built again when its sources or pyproject.toml
did. Needs nothing but Python's standard library; what pip is told by its own configuration holds.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
STEPS = 4
HEARTBEAT = 15  # seconds between signs of life while pip says nothing


def main():
    """Run the steps that are due."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", default=".venv", help="folder of the environment")
    parser.add_argument(
        "--torch", default="torch>=2.10", help="the PyTorch to install, as pip reads it"
    )
    parser.add_argument(
        "--copy", action="store_true", help="install a copy of effkern, not in place"
    )
    arguments = parser.parse_args()
    check_tools()

    venv = ROOT / arguments.venv
    python = venv / "bin" / "python"
    stamps = Stamps(venv / "effkern-stamps.json")
    environment = fingerprint([], [arguments.torch, sys.version, str(venv)])
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources += [ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "pyproject.toml"]
    if arguments.copy:
        sources += (ROOT / "effkern").rglob("*.py")
    settings = [os.environ.get(name, "") for name in ("EFFKERN_BUILD", "EFFKERN_WERROR", "CXX")]
    package = fingerprint(sources, [environment, *settings])

    if not (python.exists() and stamps.hold("environment", environment)):
        create_environment(venv, python, arguments.torch)
        stamps.write("environment", environment)
    built = arguments.copy or (ROOT / "effkern" / "lib" / "build_info.json").exists()
    if not (built and stamps.hold("package", package)):
        install_effkern(venv, python, arguments.copy)
        stamps.write("package", package)
    report_libraries(python, arguments.copy)


def check_tools():
    """One line for each thing that is missing, and no traceback."""
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:2]))
        stop(f"Python {version} is too old; install 3.10 or newer and say make PYTHON=python3.11")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            stop(f"Python's {module} is missing; install it (Debian: apt install python3-venv)")
    compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    found = any(shutil.which(compiler) for compiler in compilers if compiler)
    if not found and os.environ.get("EFFKERN_BUILD") != "none":
        stop("no C++ compiler was found; install one (Debian: apt install g++)")


def create_environment(venv, python, torch):
    """Steps 1 and 2: the environment and torch, which effkern is built against."""
    version = ".".join(map(str, sys.version_info[:3]))
    say(1, f"creating {venv.name} with Python {version}")
    run([sys.executable, "-m", "venv", "--clear", str(venv)], venv, "creating the environment")
    say(2, f"installing {torch} (several GB with its CUDA libraries; TORCH=... picks another)")
    pip(python, venv, "installing torch", torch)


def install_effkern(venv, python, copy):
    """Steps 3 and 4: what builds effkern; then effkern, and what it and its tests need."""
    say(3, "installing what builds effkern")
    pip(python, venv, "installing the build requirements", *build_requirements())
    say(4, "building effkern, installing it and what its tests need")
    where = [f"{ROOT}[dev]"] if copy else ["--editable", f"{ROOT}[dev]"]
    pip(python, venv, "installing effkern", "--verbose", "--no-build-isolation", *where)


def build_requirements():
    """[build-system] requires of pyproject.toml; tomllib is younger than the oldest Python here."""
    text = (ROOT / "pyproject.toml").read_text()
    return ast.literal_eval(re.search(r"^requires = (\[[^\]]*\])", text, re.MULTILINE).group(1))


def pip(python, venv, what, *arguments):
    """`pip install`, showing what it downloads, builds and installs."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    run([*command, *arguments], venv, what)


def run(command, venv, what):
    """Run `command`, keep all it says in the log, show the lines that tell how far it is."""
    telling = re.compile(
        r"\s*(Downloading .*MB|Installing collected|Building |\[\d+/\d+\] |effkern: )"
    )
    log = Path(str(venv) + ".log")
    process = subprocess.Popen(
        command,
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line.decode(errors="replace").rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    started = time.monotonic()
    tail = []
    with log.open("a") as file:
        while True:
            try:
                line = lines.get(timeout=HEARTBEAT)
            except queue.Empty:
                print(f"      ... {time.monotonic() - started:.0f} s", flush=True)
                continue
            if line is None:
                break
            file.write(line + "\n")
            tail = [*tail, line][-30:]
            if telling.match(line):
                print("      " + line.strip()[:110], flush=True)
    if process.wait() != 0:
        print("\n".join(tail))
        stop(f"{what} failed; the lines above say why, and {log.name} has all of them")


def report_libraries(python, copy):
    """Say which libraries there are, and why one is not."""
    module = ROOT / "effkern" / "backends" / "build_info.py"
    folder = ROOT / "effkern" / "lib"
    if copy:
        script = "import sysconfig; print(sysconfig.get_path('platlib'))"
        folder = Path(subprocess.check_output([str(python), "-c", script]).decode().strip())
        folder = folder / "effkern" / "lib"
    spec = importlib.util.spec_from_file_location("build_info", str(module))
    build_info = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_info)
    for line in build_info.describe(folder):
        print(line, flush=True)


class Stamps:
    """What has been done, each with the fingerprint of what it was done from."""

    def __init__(self, path):
        self.path = path

    def hold(self, name, value):
        """Whether `name` was done from `value`."""
        return self._read().get(name) == value

    def write(self, name, value):
        """Remember that `name` was done from `value`."""
        self.path.write_text(json.dumps({**self._read(), name: value}))

    def _read(self):
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def fingerprint(files, words):
    """One digest of the files' names and contents, and of `words`."""
    digest = hashlib.sha256("\n".join(words).encode())
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def say(step, text):
    """One step begins."""
    print(f"[{step}/{STEPS}] {text}", flush=True)


def stop(text):
    """End with one line."""
    sys.exit("effkern: " + text)


if __name__ == "__main__":
    main()
