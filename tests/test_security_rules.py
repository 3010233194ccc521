"""Holds the rules that keep strangers' bytes from becoming code, on the syntax tree of every package."""

import ast

from tests.support.source_tree import PACKAGES, Source, imported_modules, sources

CODE_LOADERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "ray.cloudpickle.loads",
}
PICKLING_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}
FORBIDDEN_FLAGS = {"shell", "trust_remote_code", "allow_pickle"}


def _calls(source: Source) -> list[ast.Call]:
    return [node for node in ast.walk(source.tree) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    loaders = {
        f"{source.path}: {module}"
        for source in sources(*PACKAGES)
        for module in imported_modules(source.tree)
        if CODE_LOADERS & set(module.split("."))
    }
    calls = {
        f"{source.path}:{call.lineno}: {ast.unparse(call.func)}"
        for source in sources(*PACKAGES)
        for call in _calls(source)
        if ast.unparse(call.func) in FORBIDDEN_CALLS
    }
    assert loaders | calls == set()


def test_ranks_exchange_no_pickled_objects() -> None:
    found = {
        f"{source.path}:{call.lineno}"
        for source in sources(*PACKAGES)
        for call in _calls(source)
        if isinstance(call.func, ast.Attribute) and call.func.attr in PICKLING_COLLECTIVES
    }
    assert found == set()


def test_no_shell_and_no_code_from_checkpoints() -> None:
    found = {
        f"{source.path}:{call.lineno}: {keyword.arg}"
        for source in sources(*PACKAGES)
        for call in _calls(source)
        for keyword in call.keywords
        if keyword.arg in FORBIDDEN_FLAGS and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
    }
    assert found == set()


def test_proofs_are_compared_in_constant_time() -> None:
    compared = {
        f"{source.path}:{node.lineno}"
        for source in sources("cluster", "deploy")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
        for side in (node.left, *node.comparators)
        if any(word in ast.unparse(side).lower() for word in ("secret", "hmac", "api_key", "proof", "digest()"))
    }
    assert compared == set()
