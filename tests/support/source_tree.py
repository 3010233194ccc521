"""The repository's own files, parsed once, for tests that hold rules on the source."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("router", "shards", "cluster", "deploy")
CODE_FOLDERS = (*PACKAGES, "tests", "benchmarks", "training")
TEXT_FOLDERS = (*CODE_FOLDERS, "docs", "k8s", ".ci")
IMPURE = frozenset({"torch", "ray", "grpc", "google", "msgpack", "numpy", "safetensors", "psutil", "pydantic"})
"""Libraries that a pure module does not import, directly or through other modules of ours."""

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One Python file that people write."""

    path: str
    """Below the repository root, with slashes."""
    text: str
    tree: ast.Module


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file of these folders, without generated ones."""
    paths = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in p.name]
    texts = [(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in paths]
    return tuple(Source(path=path, text=text, tree=ast.parse(text)) for path, text in texts)


def text_files() -> Iterator[Path]:
    """Every file that people write, in the root and in the folders of the product."""
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cpp", ".h", ".proto", ".jinja", ".typed", ""}
    folders = [ROOT / folder for folder in TEXT_FOLDERS]
    found = [*ROOT.iterdir(), *(p for folder in folders for p in folder.rglob("*"))]
    for path in sorted(found):
        # .git is a file where the tree is one of several work trees; .coverage is a database.
        written = path.suffix in kinds and path.name not in (".git", ".coverage") and "_pb2" not in path.name
        if path.is_file() and written and "__pycache__" not in path.parts:
            yield path


def functions(tree: ast.Module) -> Iterator[tuple[str, FunctionNode]]:
    """Each function with its dotted name inside the file, such as `Engine._run` or `make.inner`."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from walk(child, f"{prefix}{child.name}." if named else prefix)

    return walk(tree, "")


def imported_modules(tree: ast.Module) -> frozenset[str]:
    """Dotted names that a file imports anywhere in it; `from a import b` counts as both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def pure_modules(package: str) -> tuple[str, ...]:
    """Modules of a package that import none of the IMPURE libraries, not through other modules of ours either."""
    imports = {
        source.path.removesuffix(".py").replace("/", "."): imported_modules(source.tree)
        for source in sources(*PACKAGES)
    }

    def is_pure(module: str, seen: frozenset[str]) -> bool:
        names = imports[module]
        if any(name.split(".")[0] in IMPURE or "protos" in name for name in names):
            return False
        return all(is_pure(name, seen | {name}) for name in names if name in imports and name not in seen)

    own = [name for name in imports if name.startswith(f"{package}.") and name.count(".") == 1]
    return tuple(name for name in own if not name.endswith("__init__") and is_pure(name, frozenset({name})))
