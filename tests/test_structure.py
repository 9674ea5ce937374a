"""The rules of the house that can be read off the code: imports run one way, what is quick stays quick, nothing is unsafe."""

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import simclr_dist

PACKAGE = Path(simclr_dist.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")
}

# The house, bottom-up: a room imports from itself and from those before it. `simclr_dist/__main__.py`, and the `__main__` of a
# room, are doors: they open straight into `cli`.
ROOMS = (
    "system", "config", "data", "method", "convert", "run", "encoder", "evaluate", "train", "launch", "preflight", "cli",
)  # fmt: skip

# What must answer at once, or runs in every reading process.
WITHOUT_TORCH = [
    "system", "config", "run.folder", "run.claim", "run.loggers", "run.status", "run.restarts", "run.steps", "run.summary",
    "run.commands",
    "launch", "cli", "encoder.names",
    "train.__main__", "train.inputs", "train.profiling", "train.session",
    "preflight.demo.images", "preflight.plan.hardware", "preflight.plan.settings", "preflight.check.findings",
    "evaluate.__main__", "evaluate.settings", "evaluate.sources", "evaluate.space",
    "evaluate.features.file", "evaluate.features.store", "evaluate.compare", "evaluate.status", "evaluate.result.picture",
    "data.manifest", "data.collection", "data.remote", "data.views.draws", "data.order", "data.portions",
    "data.pixels.images", "preflight.shared_memory",
    "convert.sources.find", "convert.settings", "convert.shards", "convert.index", "convert.verify",
]  # fmt: skip


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax tree."""
    return list(ast.walk(tree(path)))


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Modules that `name` imports, also inside functions, in full, with the line."""
    for node in nodes(FILES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def ours(imported: str) -> str | None:
    """The module of the package that an imported name is, or is in; None for the package itself and for others."""
    parts = imported.split(".")
    if parts[0] != "simclr_dist":
        return None
    for end in range(len(parts), 1, -1):
        if ".".join(parts[1:end]) in FILES:
            return ".".join(parts[1:end])
    assert parts[1:] == ["__version__"], f"{imported} is not there"
    return None


def room(name: str) -> str:
    return name.split(".")[0]


def is_door(name: str) -> bool:
    return name.split(".")[-1] == "__main__"


def test_the_house_has_twelve_rooms_and_nothing_beside_them() -> None:
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert entries == {*ROOMS, "__init__.py", "__main__.py", "py.typed", "demo.yaml"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_imports_run_one_way(name: str) -> None:
    for imported, line in imports(name):
        module = ours(imported)
        if module is None or (is_door(name) and room(module) == "cli"):
            continue
        place = f"{FILES[name]}:{line}: {name} must not import {module}"
        assert room(name) in ROOMS, place
        assert ROOMS.index(room(module)) <= ROOMS.index(room(name)), place


def test_no_circle_of_modules() -> None:
    """Also within a room; what is imported inside a function counts."""
    graph = {name: {module for imported, _ in imports(name) if (module := ours(imported))} for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for module in graph[name] - {name}:
                visit(module, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_what_one_is_tempted_to_break() -> None:
    graph = {name: {module for imported, _ in imports(name) if (module := ours(imported))} for name in FILES}
    for name, used in graph.items():
        rooms = {room(module) for module in used} - {room(name)}
        if room(name) == "method":
            assert rooms <= {"system"}, f"{name}: the core takes plain arguments, never the Config"
        if room(name) == "data":
            assert rooms <= {"system"}, name
        if room(name) == "convert":
            assert rooms <= {"system", "config", "data"}, name
        if name.startswith(("evaluate.features.", "evaluate.protocols.")):
            of_evaluate = {module for module in used if room(module) == "evaluate"}
            of_evaluate -= {"evaluate.settings", "evaluate.space", "evaluate.rows"}
            assert {module.rpartition(".")[0] for module in of_evaluate} <= {name.rpartition(".")[0]}
        if name != "system.files":
            assert "fcntl" not in {imported.split(".")[0] for imported, _ in imports(name)}, f"{name}: locks have one home"
        if room(name) == "train":
            assert {module for module in used if room(module) == "evaluate"} <= {"evaluate.protocols.knn"}
        if room(name) != "cli":
            # What a batch script types is no verb; and others' checkpoints hold the arguments of their training.
            asks = any(imported.split(".")[0] == "argparse" for imported, _ in imports(name))
            assert not asks or name in ("launch.slurm.rescue", "encoder.weights"), f"{name}: what is typed is cli's"
        if room(name) == "config":
            others = {imported.split(".")[0] for imported, _ in imports(name)} - {"simclr_dist", "yaml"}
            assert others <= sys.stdlib_module_names, f"{name}: a typo answers at once"


def test_what_must_be_quick_imports_no_torch() -> None:
    code = "import importlib, sys\n"
    for name in (name for start in WITHOUT_TORCH for name in FILES if f"{name}.".startswith(f"{start}.")):
        code += f"importlib.import_module('simclr_dist.{name}'); assert 'torch' not in sys.modules, {name!r}\n"
    code += "import simclr_dist; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there() -> None:
    assert sorted(simclr_dist.__all__) == ["LARS", "NTXentLoss", "ShardDataset", "load_encoder", "train"]
    for name in simclr_dist.__all__:
        assert callable(getattr(simclr_dist, name))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        simclr_dist.nonsense  # noqa: B018


def test_a_folder_of_the_clones_name_beside_a_script_does_not_hide_the_package(tmp_path: Path) -> None:
    (tmp_path / "simclr_dist").mkdir()
    script = tmp_path / "script.py"
    script.write_text("import sys; import simclr_dist; sys.exit(simclr_dist.__version__)")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == simclr_dist.__version__


def test_every_room_has_a_name() -> None:
    assert not {name.split(".")[-1] for name in FILES} & {"utils", "util", "common", "helpers", "helper", "misc"}


NO_NOUNS = {"told", "found", "asked", "here", "known", "made", "own"}


def test_functions_are_short() -> None:
    """A page shows a whole one."""
    for path in FILES.values():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 59, f"{path}:{node.lineno}: {node.name}"


def test_docstrings_begin_with_a_short_sentence() -> None:
    """What a function does is told in at most twelve words; reasons, shapes and errors come behind it."""
    for path in FILES.values():
        for node in nodes(path):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0]
                assert len(first.split()) <= 12, f"{path}: {first}"


def test_names_are_nouns_of_the_field() -> None:
    for path in FILES.values():
        for node in nodes(path):
            stored = isinstance(getattr(node, "ctx", None), ast.Store)
            name = getattr(node, "id", None) if stored else getattr(node, "arg", None)
            assert name not in NO_NOUNS, f"{path}:{node.lineno}: {name}"


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    for node in nodes(FILES[name]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def in_main_block(name: str, line: int) -> bool:
    return any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) and node.lineno <= line <= (node.end_lineno or line)
        for node in tree(FILES[name]).body
    )


@pytest.mark.parametrize("name", FILES)
def test_nothing_unsafe(name: str) -> None:
    where = FILES[name]
    for imported, line in imports(name):
        assert imported.split(".")[0] not in ("pickle", "cPickle", "dill", "shelve", "marshal"), f"{where}:{line}: {imported}"
    for function, call in calls(name):
        place = f"{where}:{call.lineno}: {function}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if function in ("sys.exit", "exit", "quit"):
            assert room(name) == "cli" or in_main_block(name, call.lineno), place
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", place
        if function.endswith(("load_state_dict_from_url", ".get_state_dict")):
            assert keywords.get("weights_only") == "True", place
        if function.startswith("yaml.") and "load" in function:
            assert (name, keywords.get("Loader")) == ("config.strict_yaml", "_Loader"), place
        assert function not in ("eval", "exec", "os.system", "os.popen"), place
        assert keywords.get("shell", "False") == "False", place


def test_a_failure_is_not_passed_over() -> None:
    """No `except:` and no `except Exception:` that goes on; BaseException is caught to record it, and raised again."""
    for path in FILES.values():
        for node in nodes(path):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                broad = caught in ("", "Exception", "BaseException")
                assert not broad or any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), f"{path}:{node.lineno}"


def test_the_rules_see_what_they_forbid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The checks above on a file that breaks each of them."""
    bad = {
        "import pickle": "nothing_unsafe",
        "import torch\ntorch.load('x')": "nothing_unsafe",
        "import sys\ndef f():\n    sys.exit(1)": "nothing_unsafe",
        "import yaml\nyaml.load('x', Loader=yaml.SafeLoader)": "nothing_unsafe",
        "def f():\n    from simclr_dist.train.loop import train": "imports_run_one_way",
        "from simclr_dist.cli import main": "imports_run_one_way",
        "def f():\n" + "    pass\n" * 59: "functions_are_short",
        '"""Read a file of which nobody has said before this line what it is for."""': "docstrings_begin_with_a_short_sentence",
        "found = 1": "names_are_nouns_of_the_field",
    }
    for number, (code, rule) in enumerate(bad.items()):
        path = tmp_path / f"{number}.py"
        path.write_text(code)
        monkeypatch.setitem(FILES, "evaluate.bad", path)
        check = globals()[f"test_{rule}"]
        with pytest.raises(AssertionError, match=f"{number}.py"):
            check(*["evaluate.bad"] * len(inspect.signature(check).parameters))
