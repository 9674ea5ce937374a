"""The house rules that can be read off the code: imports run one way, what is quick stays quick, what is unsafe is absent."""

import ast
import os
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

# A module imports from lower floors only, or from its own folder. The first name that fits decides.
FLOORS = {
    "errors": 0, "atomic": 0, "arguments": 0, "output": 0.3,
    "stopping": 0.3, "config_reader": 0.5, "supervisor": 0.5, "ledger": 0.5, "provenance": 0.5,
    "rendezvous": 0.5,
    "config_schema": 0.7, "config_checks": 0.8,
    "config": 1, "distributed": 1, "optim": 1, "microbatch": 1, "checkpoint": 1, "data": 1, "demo_images": 1,
    "convert": 1.5,
    "encoder_file": 0.5,
    "run": 2, "model": 2, "loss": 2, "profiling": 2, "monitor": 2.5, "agreement": 2,
    "launcher": 3, "export": 3, "foreign": 3.5, "onnx_export": 3.5,
    "learner": 4,
    "evaluate.options": 4, "evaluate.features": 4, "evaluate.protocols": 4,
    "train": 5, "evaluate": 5, "plan": 5,
    "demo_picture": 6, "slurm": 6, "check": 6.5, "demo": 7, "version": 7, "manual": 7, "completion": 7, "cli": 8,
}  # fmt: skip

# What must answer at once, or runs in every reading process.
WITHOUT_TORCH = [
    "config", "config_schema", "config_checks", "config_reader",
    "errors", "atomic", "arguments", "stopping", "supervisor", "ledger", "provenance", "run",
    "launcher", "output",
    "rendezvous", "profiling", "version", "manual", "completion",
    "cli", "train", "train.__main__", "slurm", "slurm.settings", "demo_images", "plan.hardware", "plan.options",
    "check.findings",
    "evaluate.options", "evaluate.command",
    "evaluate.embed_options", "evaluate.finetune_options", "evaluate.features.file", "evaluate.features.store",
    "data.manifest", "data.collection", "data.remote", "data.cache", "data.ahead",
    "data.draws", "data.order", "data.images", "convert.sources", "convert.shards",
    "convert.index", "convert.verify", "convert.options",
    "encoder_file",
]  # fmt: skip


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Modules that `name` imports, also inside functions, in full, with the line."""
    for node in ast.walk(tree(name)):
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


def floor(name: str) -> float:
    """Of the longest part of its name that has one."""
    parts = name.split(".")
    return next(FLOORS[room] for end in range(len(parts), 0, -1) if (room := ".".join(parts[:end])) in FLOORS)


def test_every_module_has_a_floor() -> None:
    rooms = {name.split(".")[0] for name in FILES} - {"__init__"}
    assert rooms - set(FLOORS) == set(), "give the new module a floor"
    assert {name.split(".")[0] for name in FLOORS} - rooms <= {"demo_picture"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_imports_run_downwards(name: str) -> None:
    for imported, line in imports(name):
        module = ours(imported)
        if module is None:
            continue
        same_folder = module.split(".")[0] == name.split(".")[0]
        assert same_folder or floor(module) < floor(name), f"{FILES[name]}:{line}: {name} must not import {module}"


def test_the_two_shells_and_the_low_floors() -> None:
    """Said once more by name, as these are the rules that one is tempted to break."""
    graph = {name: {module for imported, _ in imports(name) if (module := ours(imported))} for name in FILES}
    for name, used in graph.items():
        rooms = {module.split(".")[0] for module in used}
        if name.startswith("evaluate"):
            assert "train" not in rooms
        if name.startswith(("evaluate.features.", "evaluate.protocols.")):
            of_evaluate = {module for module in used if module.startswith("evaluate")} - {"evaluate.options"}
            assert {module.rpartition(".")[0] for module in of_evaluate} <= {name.rpartition(".")[0]}
        if name.startswith("train"):
            assert {module for module in used if module.startswith("evaluate")} <= {"evaluate.protocols.knn"}
        if name.startswith("data"):
            assert rooms <= {"errors", "data", "stopping"}
        if name.startswith("convert"):
            assert rooms <= {"errors", "arguments", "convert", "data", "stopping"}
        if (room := name.split(".")[0]) in ("loss", "optim", "microbatch", "model"):
            assert rooms <= {"distributed", room}, f"{name}: the core takes plain arguments, never the Config"
    assert graph["config_schema"] == set()
    assert graph["config_checks"] == {"config_schema", "config_reader", "errors"}
    assert graph["config"] == {"config_schema", "config_checks", "config_reader", "errors"}
    for name in ("config_schema", "config_checks", "config"):
        others = {imported.split(".")[0] for imported, _ in imports(name)} - {"simclr_dist"}
        assert others <= sys.stdlib_module_names, f"{name}: a typo answers at once"


def test_what_must_be_quick_imports_no_torch() -> None:
    code = "import importlib, sys\n"
    for name in WITHOUT_TORCH:
        code += f"importlib.import_module('simclr_dist.{name}'); assert 'torch' not in sys.modules, {name!r}\n"
    code += "import simclr_dist; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there() -> None:
    assert sorted(simclr_dist.__all__) == ["LARS", "NTXentLoss", "ShardDataset", "load_encoder"]
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


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def in_main_block(name: str, line: int) -> bool:
    return any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) and node.lineno <= line <= (node.end_lineno or line)
        for node in tree(name).body
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
            assert name == "cli" or in_main_block(name, call.lineno), place
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", place
        if function.endswith(("load_state_dict_from_url", ".get_state_dict")):
            assert keywords.get("weights_only") == "True", place
        if function.startswith("yaml.") and "load" in function:
            assert (name, keywords.get("Loader")) == ("config_reader", "_Loader"), place
        assert function not in ("eval", "exec", "os.system", "os.popen"), place
        assert keywords.get("shell", "False") == "False", place


def test_a_failure_is_not_passed_over() -> None:
    """No `except:` and no `except Exception:` that goes on; BaseException is caught to record it, and raised again."""
    for name, path in FILES.items():
        for node in ast.walk(tree(name)):
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
        "def f():\n    from simclr_dist.train.loop import train": "imports_run_downwards",
        "from simclr_dist import cli": "imports_run_downwards",
    }
    for number, (code, rule) in enumerate(bad.items()):
        path = tmp_path / f"{number}.py"
        path.write_text(code)
        monkeypatch.setitem(FILES, "evaluate.bad", path)
        with pytest.raises(AssertionError, match=f"{number}.py"):
            globals()[f"test_{rule}"]("evaluate.bad")
