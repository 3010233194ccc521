"""Prints the tests of router/ and of the pure half of cluster/: `python -m tests.support.pure_tests`, from the root."""

from tests.support.source_tree import ROOT, pure_modules


def pure_tests() -> list[str]:
    """Their paths: all of tests/router, and test_<module>.py and test_<module>_*.py of each pure module of cluster."""
    folder = ROOT / "tests" / "cluster"
    names = [module.removeprefix("cluster.") for module in pure_modules("cluster")]
    found = {path for name in names for path in (folder / f"test_{name}.py", *folder.glob(f"test_{name}_*.py"))}
    # The messages of plan_codec and reports are tested as a peer gets them.
    found.add(folder / "test_wire.py")
    return ["tests/router", *sorted(str(path.relative_to(ROOT)) for path in found if path.exists())]


if __name__ == "__main__":
    print(*pure_tests())  # noqa: T201 (its whole purpose)
