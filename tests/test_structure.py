"""Rules of the tree that no type checker knows: who may import whom, how long things may get, what must not be written down."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

import kvlode

ROOT = Path(kvlode.__file__).resolve().parent
PACKAGES = ("format", "gds", "engine", "tools", "adapters")
ALLOWED = {
    "format": {"format"},
    "gds": {"gds", "format"},
    "engine": {"engine", "gds", "format"},
    "tools": {"tools", "adapters", "engine", "gds", "format"},
    "adapters": {"adapters", "engine", "gds", "format"},
}
"""Package -> packages of kvlode that it may import. The command and the adapters may also use the public names of the root.

The command stands above the adapters: `kvlode demo` shows what a user of one of them has. No other tool needs an engine."""
USERS_OF_ADAPTERS = {"tools/demo_steps.py"}
MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
LONGER_MODULES: dict[str, str] = {}
"""Modules over the limit, each with the reason why splitting it would read worse."""
LONGER_FUNCTIONS: dict[str, str] = {}
"""Functions over the limit as "module.py:name", each with its reason."""

# The format is pure: bytes in, values out. What reads files, clocks or devices, or brings in torch, has no business there.
NOT_IN_FORMAT = {"asyncio", "ctypes", "fcntl", "io", "mmap", "multiprocessing", "pathlib", "random", "rocksdict", "shutil", "socket"}
NOT_IN_FORMAT |= {"subprocess", "tempfile", "time", "torch"}
OS_NAMES_IN_FORMAT = {"strerror", "PathLike", "fspath"}
"""What format/ may use of ``os``: naming an errno is no I/O."""

# Words of somebody's machine. Written in pieces so that this file does not contain them.
FORBIDDEN = [re.escape(word) for word in ("/wor" + "k/", "/ro" + "ot/", "/home" + "/", "/tmp" + "/plan", "/opt/" + "wheels")]
FORBIDDEN += [r"\b" + word + r"\b" for word in ("TO" + "DO", "FIX" + "ME", "X" + "XX")]
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".c", ".h", ".json", ".cfg", ".yml", ".yaml", ""}


def modules() -> list[Path]:
    """The package's modules: the root's __init__.py and everything below the five packages."""
    return [ROOT / "__init__.py", *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(path: Path) -> list[tuple[int, str]]:
    """Every import of a module, also those inside functions, as (line, absolute dotted name)."""
    found: list[tuple[int, str]] = []
    package = ("kvlode", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            found += [(node.lineno, f"{stem}.{alias.name}") for alias in node.names]
    return found


def kvlode_package(dotted: str) -> str | None:
    """Which of kvlode's packages a dotted name belongs to; "" for the root itself, ``None`` for foreign names."""
    parts = dotted.split(".")
    if parts[0] != "kvlode":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in PACKAGES else ""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_from_the_layers_below_it(package: str) -> None:
    allowed = ALLOWED[package] | ({""} if package in ("tools", "adapters") else set())
    wrong = [
        f"{name_of(path)}:{line} imports {dotted}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, dotted in imported(path)
        if kvlode_package(dotted) is not None and kvlode_package(dotted) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_demo_among_the_tools_uses_adapters() -> None:
    users = {
        name_of(path)
        for path in (ROOT / "tools").rglob("*.py")
        if any(kvlode_package(dotted) == "adapters" for _, dotted in imported(path))
    }
    assert users <= USERS_OF_ADAPTERS, users - USERS_OF_ADAPTERS


def test_fsck_reads_with_format_and_gds_alone() -> None:
    wrong = [
        f"{name_of(path)}:{line} imports {dotted}"
        for path in sorted((ROOT / "tools").glob("fsck*.py")) + sorted((ROOT / "tools" / "fsck").rglob("*.py"))
        for line, dotted in imported(path)
        if kvlode_package(dotted) == "engine" or dotted.split(".")[0] == "rocksdict"
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_the_package_are_relative() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "kvlode")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "kvlode" for alias in node.names))
    ]
    assert not wrong, "\n".join(wrong)


def test_format_does_no_io_and_needs_no_torch() -> None:
    wrong = []
    for path in sorted((ROOT / "format").rglob("*.py")):
        wrong += [f"{name_of(path)}:{line} imports {dotted}" for line, dotted in imported(path) if dotted.split(".")[0] in NOT_IN_FORMAT]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "_os"):
                wrong += [f"{name_of(path)}:{node.lineno} uses os.{node.attr}"] if node.attr not in OS_NAMES_IN_FORMAT else []
        wrong += [call for function in ("open", "print", "input") for call in calls_of(path, function)]
    assert not wrong, "\n".join(wrong)


def calls_of(path: Path, function: str, *, outside: str = "") -> list[str]:
    """Where a module calls a builtin function, except inside functions named ``outside``."""
    inside = {
        node
        for parent in ast.walk(tree_of(path))
        if isinstance(parent, ast.FunctionDef) and parent.name == outside
        for node in ast.walk(parent)
    }
    return [
        f"{name_of(path)}:{node.lineno} calls {function}()"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function and node not in inside
    ]


def test_no_module_uses_pickle_or_python_hash() -> None:
    """Identity and storage must not depend on the process: ``hash()`` is salted, pickle executes what it reads."""
    wrong = []
    for path in modules():
        wrong += [f"{name_of(path)}:{line} imports {dotted}" for line, dotted in imported(path) if dotted.split(".")[0] == "pickle"]
        wrong += calls_of(path, "hash", outside="__hash__")
    assert not wrong, "\n".join(wrong)


def catches_all(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or (isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException"))


def test_no_handler_swallows_everything() -> None:
    wrong = []
    for path in modules():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler) and catches_all(node) and all(isinstance(line, ast.Pass) for line in node.body):
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong, "except: pass at\n" + "\n".join(wrong)


def test_modules_stay_short_enough_to_hold_one_idea() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in modules()}
    over = {name: lines for name, lines in lengths.items() if lines > MODULE_LINES_MAX and name not in LONGER_MODULES}
    assert not over, f"over {MODULE_LINES_MAX} lines: {over}"
    assert all(lengths.get(name, 0) > MODULE_LINES_MAX for name in LONGER_MODULES), "an exception that is no longer needed"


def functions(path: Path) -> list[tuple[str, int]]:
    """Every function of a module as ("module.py:name", number of lines, its decorators and docstring included)."""
    return [
        (f"{name_of(path)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def test_functions_stay_short_enough_to_read_at_once() -> None:
    lengths = dict(item for path in modules() for item in functions(path))
    over = {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES_MAX and name not in LONGER_FUNCTIONS}
    assert not over, f"over {FUNCTION_LINES_MAX} lines: {over}"
    assert all(lengths.get(name, 0) > FUNCTION_LINES_MAX for name in LONGER_FUNCTIONS), "an exception that is no longer needed"


def texts() -> list[Path]:
    """Everything that a person wrote into the checkout; generated and hidden folders (except .ci) are left out."""
    found = []
    for path in sorted(ROOT.iterdir()):
        if path.is_file() and path.suffix in TEXT_SUFFIXES and not path.name.startswith("."):
            found.append(path)
        elif path.is_dir() and (path.name in (*PACKAGES, "tests", "docs", "benchmarks", ".ci")):
            found += [inner for inner in sorted(path.rglob("*")) if inner.is_file() and inner.suffix in TEXT_SUFFIXES]
    return [path for path in found if "__pycache__" not in path.parts]


def test_no_text_mentions_somebodys_machine_or_leaves_work_undone() -> None:
    pattern = re.compile("|".join(FORBIDDEN))
    wrong = [
        f"{name_of(path)}:{number}: {line.strip()[:120]}"
        for path in texts()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def documented_by_contract() -> set[str]:
    """Methods that the host contract describes; what implements them need not repeat it."""
    protocols = [thing for thing in vars(kvlode.contract).values() if isinstance(thing, type) and getattr(thing, "_is_protocol", False)]
    return {name for protocol in protocols for name, method in vars(protocol).items() if (getattr(method, "__doc__", "") or "").strip()}


def test_every_public_name_is_documented() -> None:
    names = getattr(kvlode, "__all__", [])
    assert names, "the root __init__.py lists the public names in __all__"
    missing = [name for name in names if not (getattr(kvlode, name).__doc__ or "").strip()]
    contract = documented_by_contract()
    for name in names:
        thing = getattr(kvlode, name)
        if isinstance(thing, type) and thing.__module__.startswith("kvlode"):
            missing += [
                f"{name}.{attribute}"
                for attribute, value in vars(thing).items()
                if not attribute.startswith("_") and attribute not in contract and callable(value) and not (value.__doc__ or "").strip()
            ]
    assert not missing, f"without a docstring: {missing}"


def test_the_checkout_is_imported_once_under_its_own_name() -> None:
    """The root has an __init__.py: pytest must not import it a second time under the name of the checkout's folder."""
    twice = [
        name
        for name, module in sys.modules.items()
        if not name.startswith("kvlode") and str(getattr(module, "__file__", None) or "") == str(ROOT / "__init__.py")
    ]
    assert not twice
