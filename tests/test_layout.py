"""The house rules that a reader relies on: who imports whom, the used-by table, tags in Config, equation tags on losses, departures."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = [name for name in ("clap", "cmcr", "simipu") if (ROOT / f"{name}.py").exists()]
OURS = {*METHODS, "common", "data", "synthetic", "finetune"}
SOURCE = {p.stem: p.read_text() for p in ROOT.glob("*.py")}


def imports(name, top_only=False):
    tree = ast.parse(SOURCE[name])
    nodes = tree.body if top_only else ast.walk(tree)
    nodes = list(nodes)
    plain = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return plain | {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}


def test_arrows_point_one_way():
    allowed = {**{m: {"common", "data"} for m in METHODS}, "finetune": {"common", "data"}, "data": {"synthetic"}, "common": set(), "synthetic": set()}
    for name in OURS:
        assert imports(name) & OURS <= allowed[name], name
    assert "synthetic" not in imports("data", top_only=True)                            # only to write the default world


def test_nothing_else_stands_at_the_top():
    known = {"README.md", "requirements.txt", "pyproject.toml", "LICENSE", "tests", "runs"}
    known |= {f"{name}.py" for name in OURS} | {f"{name}.py" for name in SOURCE if "class Config:" in SOURCE[name]}        # a fork of a method is welcome
    assert {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))} <= known


def test_the_used_by_table_of_common_is_true():
    doc = ast.get_docstring(ast.parse(SOURCE["common"]))
    table = doc[doc.index("used by"):doc.index("Nothing here knows")]
    defined = {n.name for n in ast.parse(SOURCE["common"]).body
               if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    taken = {}                  # by each file
    for user in (*METHODS, "finetune"):
        taken[user] = {a.name for n in ast.walk(ast.parse(SOURCE[user]))
                       if isinstance(n, ast.ImportFrom) and n.module == "common" for a in n.names}
    listed = set()
    for section in re.split(r"\n *(?=§\d)", table)[1:]:
        first, *more = section.splitlines()
        title, pieces, users = re.split(r"\s{2,}", first)
        more = [line for line in more if not line.isupper()]                    # the rooms' titles
        pieces = set(re.findall(r"\w+", " ".join([pieces, *more])))
        listed |= pieces
        assert {user for user in taken if taken[user] & pieces} == set(users.split(", ")) & OURS, title
    assert listed <= defined, listed - defined
    assert set().union(*taken.values()) <= listed, set().union(*taken.values()) - listed


@pytest.mark.parametrize("method", [*METHODS, "finetune"])
def test_each_config_number_is_tagged(method):
    lines = SOURCE[method][SOURCE[method].index("class Config"):].split("\n\n")[0].splitlines()[1:]
    fields = [line for line in lines if re.match(r"    \w+:", line)]
    assert len(fields) > 10
    for line in fields:
        comment = line.partition("  # ")[2]
        assert comment, line
        if re.search(r"(int|float) = ", line) and not re.match(r"    (seed)\b", line):
            assert re.search(r"\[(paper|code|sister|ours)", comment), line


@pytest.mark.parametrize("method", METHODS)
def test_each_loss_line_names_its_source(method):
    found = 0
    for line in SOURCE[method].splitlines():
        if re.match(r"\s+L_?\w* = ", line):
            found += 1
            assert re.search(r"# .*(\[paper|\[figure|\[code|\[ours|Eq\. \d)", line), line
    assert found >= 3


@pytest.mark.parametrize("method", [*METHODS, "finetune"])
def test_departures_are_numbered_and_in_the_readme(method):
    doc = ast.get_docstring(ast.parse(SOURCE[method]))
    numbered = re.findall(r"^ +D(\d+)  ", doc, re.M)
    assert numbered == [str(i + 1) for i in range(len(numbered))] and numbered
    code = SOURCE[method].replace(doc, "")
    assert set(re.findall(r"\bD(\d+)\b", code)) <= set(numbered)
    section = (ROOT / "README.md").read_text().split("## Departures")[1].split("\n## ")[0].split(f"### {method}.py")[1].split("\n### ")[0]
    assert re.findall(r"^- D(\d+)", section, re.M) == numbered


@pytest.mark.parametrize("script", [*METHODS, "finetune"])
def test_the_list_of_names_is_made_once(script):
    """.names goes through all frames: asked for each of a full data set's, it took more than an hour before the first step."""
    assert not re.search(r"\.names\[", SOURCE[script])


def test_no_path_of_a_machine_and_no_left_overs():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "README.md", ROOT / "requirements.txt"]:
        text = path.read_text()
        if path.name == "test_layout.py":
            continue
        for bad in ("/root/", "/home/", "/work/", "strict=False", "find_unused_parameters", "breakpoint()", "pdb", "https://pypi"):
            assert bad not in text, (path.name, bad)
