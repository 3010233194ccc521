"""Holds the rules of CONTRIBUTING.md that a reader can see in the source: sizes, exceptions, text, purity."""

import ast
import re
import tomllib
from collections.abc import Iterator

from tests.support.source_tree import (
    CODE_FOLDERS,
    PACKAGES,
    ROOT,
    FunctionNode,
    Source,
    functions,
    imported_modules,
    pure_modules,
    sources,
    text_files,
)

MAX_FILE_LINES = 400
MAX_BODY_LINES = 40

LONG_FUNCTIONS = {
    "deploy/cli_generate.py generate": "one line an option: it hands typer's values on and decides nothing",
}

BROAD_EXCEPTS = {
    "cluster/engine.py Engine._run": "outermost loop of the engine's thread: ends its requests and the engine",
    "cluster/handoff.py Puller._work": "outermost loop of a pull thread: the scheduler hears of every failed pull",
    "cluster/rank_process.py RankRunner.run": "outermost loop of a rank: tells rank 0 why it ends",
}

ENVIRONMENT_USERS = {
    "deploy/serve_command.py": "sets variables that are Ray's only options for what they do",
    "deploy/status.py": "sets Ray's variable against usage reports",
    "cluster/torchrun.py": "torchrun tells a process its rank by variables and in no other way",
}

MUTABLE_DATACLASSES = {
    "router/request.py TokenEvent": "one is made for every token, and making a frozen one takes three times as long",
    "shards/batch.py StepBatch": "filled row by row for every step, by its lane alone",
    "router/policy.py Extra": "counters of what was routed to one member, written by the router alone",
    "router/pool.py Seat": "the newest report of one member and those counters, written by the router alone",
    "router/policy.py Price": "two are made for every decision, and making a frozen one takes three times as long",
    "router/pool.py Offer": "two are made for every decision",
    "router/router.py _Asked": "one is made for every decision",
    "router/expected.py _Entry": "a routed prompt, of whose members some may leave",
    "router/admission.py _Share": "counters of one flow, written by the admission alone",
    "router/simulated_fleet.py _Place": "what a simulated fleet keeps of a member",
    "cluster/engine_stats.py EngineStats": "counters of the engine thread alone",
    "cluster/executor.py _Pull": "progress of one pull, written by the leader alone",
    "cluster/speculation.py _Acceptance": "a running mean, of one policy",
    "cluster/speculation.py _Time": "the latest measurements of one policy",
    "cluster/lane_draft.py LaneDraft": "a plan while it is being made, of one lane",
    "cluster/states.py _Checkpoint": "use and neighbours of one kept state, written by its pool alone",
    "cluster/member.py _Generation": "what one generation of ranks has started so far, written by the member alone",
}


def _body_lines(function: FunctionNode) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.body[0].lineno + 1


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def _broad_handlers(source: Source) -> Iterator[str]:
    for name, function in functions(source.tree):
        for node in ast.walk(function):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node):
                last = node.body[-1]
                # Cleaning up and passing the same exception on hides nothing.
                if not (isinstance(last, ast.Raise) and last.exc is None):
                    yield f"{source.path} {name}"


def _is_dataclass_decorator(node: ast.expr) -> bool:
    called = node.func if isinstance(node, ast.Call) else node
    return ast.unparse(called) in ("dataclass", "dataclasses.dataclass")


def _frozen(node: ast.expr) -> bool:
    keywords = node.keywords if isinstance(node, ast.Call) else []
    return any(k.arg == "frozen" and isinstance(k.value, ast.Constant) and k.value.value is True for k in keywords)


def test_files_stay_within_400_lines() -> None:
    long = {s.path: n for s in sources(*CODE_FOLDERS) if (n := len(s.text.splitlines())) > MAX_FILE_LINES}
    assert not long, "split these"


def test_function_bodies_fit_one_screen() -> None:
    long = {
        f"{source.path} {name}": _body_lines(function)
        for source in sources(*CODE_FOLDERS)
        for name, function in functions(source.tree)
        if _body_lines(function) > MAX_BODY_LINES
    }
    assert {name: n for name, n in long.items() if name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= set(long), "these are short now: take them from the list"


def test_every_file_says_first_what_it_is_for() -> None:
    files = [s for s in sources(*PACKAGES, "benchmarks", "training", "tests/support") if s.text.strip()]
    assert [s.path for s in files if not ast.get_docstring(s.tree)] == []


def test_source_is_ascii_and_carries_no_reminders() -> None:
    reminder = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = {}
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        if not text.isascii() or reminder.search(text):
            found[str(path.relative_to(ROOT))] = [
                line for line in text.splitlines() if not line.isascii() or reminder.search(line)
            ][:3]
    assert found == {}


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    machine_path = re.compile(r"(?<![\w.$}>/])/(?:home|Users|root|work|opt/wheels)/")
    found = {str(p.relative_to(ROOT)) for p in text_files() if machine_path.search(p.read_text(encoding="utf-8"))}
    assert found - {"tests/test_structure.py"} == set()


def test_everything_is_caught_only_at_the_outermost_loop_of_a_process() -> None:
    found = {place for source in sources(*PACKAGES) for place in _broad_handlers(source)}
    assert found - set(BROAD_EXCEPTS) == set()
    assert set(BROAD_EXCEPTS) - found == set(), "these are gone: take them from the list"


def test_configuration_never_comes_from_environment_variables() -> None:
    users = {
        source.path
        for source in sources(*PACKAGES)
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {"environ", "getenv"} & _names(node))
    }
    assert users - set(ENVIRONMENT_USERS) == set()


def _names(node: ast.ImportFrom) -> set[str]:
    return {alias.name for alias in node.names}


def test_data_is_frozen_but_for_named_drafts_and_counters() -> None:
    mutable = {
        f"{source.path} {node.name}"
        for source in sources(*PACKAGES)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if _is_dataclass_decorator(decorator) and not _frozen(decorator)
    }
    assert mutable - set(MUTABLE_DATACLASSES) == set()


def test_no_state_of_a_module_is_rebound() -> None:
    found = [s.path for s in sources(*PACKAGES) if any(isinstance(node, ast.Global) for node in ast.walk(s.tree))]
    assert found == []


def test_tests_use_no_mocks_of_our_own_code() -> None:
    found = [s.path for s in sources("tests") if any(m.startswith("unittest.mock") for m in imported_modules(s.tree))]
    assert found == []


def test_tests_are_no_package() -> None:
    assert [str(p) for p in (ROOT / "tests").rglob("__init__.py")] == []


def test_the_layer_contract_and_the_coverage_gate_name_every_pure_module_of_cluster() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pure = set(pure_modules("cluster"))
    contracts = {contract["name"]: contract for contract in config["tool"]["importlinter"]["contracts"]}
    contract = contracts["the pure half of cluster knows neither ray nor torch"]
    gated = set(config["tool"]["coverage"]["report"]["include"])

    assert set(contract["source_modules"]) == pure
    assert gated == {"router/*", *(f"{module.replace('.', '/')}.py" for module in pure)}
