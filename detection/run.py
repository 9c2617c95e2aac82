"""Run a script of MMDetection, or any other, with mmcv's operators in place.

``python -m sidt.detection.run tools/train.py CONFIG`` runs the script as ``python tools/train.py CONFIG`` would. Where
there is no such file, ``train``, ``test`` and ``tools/train.py`` mean the scripts that the mmdet package carries. With
several processes: ``torchrun --nproc-per-node 2 -m sidt.detection.run tools/train.py CONFIG --launcher pytorch``.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import CodeType

from sidt.errors import InputError

USAGE = "python -m sidt.detection.run SCRIPT ARGS..., for example tools/train.py CONFIG"
VARIABLE = "SIDT_DETECTION_SCRIPT"  # tells a spawned process, which gets other arguments, what the script is


def find_script(given: str) -> Path:
    """The path of a script: a file, or the name of a script that the mmdet package carries.

    Raises:
        InputError: there is no such script.
    """
    if Path(given).is_file():
        return Path(given)
    tools = _tools()
    if found := tools.get(given.removeprefix("tools/").removesuffix(".py")):
        return found
    own = ", ".join(name for name in tools if "/" not in name)
    raise InputError(
        f"there is no script {given}; give a Python file" + (f" or one of MMDetection's: {own}" if own else "")
    )


def _tools() -> dict[str, Path]:
    """The scripts in the mmdet package, ``test`` or ``analysis_tools/get_flops``; empty if it has none."""
    spec = find_spec("mmdet")
    folders = [Path(place, ".mim", "tools") for place in (spec and spec.submodule_search_locations) or ()]
    paths = {path.relative_to(folder): path for folder in folders for path in sorted(folder.rglob("*.py"))}
    return {relative.with_suffix("").as_posix(): path for relative, path in paths.items()}


def prepare(arguments: list[str]) -> Path:
    """Find the script and set ``sys.argv`` and ``sys.path`` as Python would set them for it.

    Args:
        arguments: the script and its arguments.

    Raises:
        InputError: there is no script.
    """
    if not arguments:
        raise InputError(f"no script is given; write {USAGE}")
    script = find_script(arguments[0])
    sys.argv = [str(script), *arguments[1:]]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)
    os.environ[VARIABLE] = str(script.absolute())
    return script.absolute()


def _main() -> Path:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(f"usage: {USAGE}")
        sys.exit()
    try:
        return prepare(sys.argv[1:])
    except InputError as error:
        print(f"sidt: {error}", file=sys.stderr)
        sys.exit(2)


def _compiled(script: Path) -> CodeType:
    return compile(script.read_bytes(), script, "exec", dont_inherit=True)


if __name__ in ("__main__", "__mp_main__"):
    # The script runs in this very module. So multiprocessing, which starts a spawned process by importing its parent's
    # main module by name, imports sidt.detection and with it the operators; and what the script defines is there too.
    script = _main() if __name__ == "__main__" else Path(os.environ[VARIABLE])
    globals().update(__file__=str(script), __doc__=None)
    exec(_compiled(script), globals())
