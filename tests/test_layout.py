"""The house rules a reader relies on.

Who imports whom, tags in Config and on losses, numbered departures, the width of the page,
names, and one skeleton for the training scripts.
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = [name for name in ("clap", "cmcr", "simipu") if (ROOT / f"{name}.py").exists()]
SCRIPTS = [*METHODS, *(name for name in ("finetune", "segment", "depth")
                       if (ROOT / f"{name}.py").exists())]
OURS = {*SCRIPTS, "common", "data", "synthetic"}
SOURCE = {p.stem: p.read_text() for p in ROOT.glob("*.py")}

COLUMNS = 100
FORWARD_ROWS = {"CLAP": 48, "CMCR": 58, "SimIPU": 32}    # one half of a screen beside the paper
BANNERS = ["# data", "# model, optimiser", "# resume", "# train", "# results"]
VAGUE = {"found", "told", "mine", "wanted", "kept", "there"}
TOOLS = {"figures", "profiling"}                         # tests/<name>.py that the scripts load


def imports(name, top_only=False):
    tree = ast.parse(SOURCE[name])
    nodes = tree.body if top_only else ast.walk(tree)
    nodes = list(nodes)
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def split_source(name):
    """-> module docstring, and the source below it."""
    tree = ast.parse(SOURCE[name])
    below = SOURCE[name].splitlines()[tree.body[0].end_lineno:]
    return ast.get_docstring(tree), "\n".join(below)


def departures(doc):
    """The departures of a docstring, in its order. -> [(number, how many lines it takes)]"""
    result = []
    indent = None                                        # of the departure that is being read
    for line in doc.splitlines():
        begins = re.match(r"( +)D(\d+)  ", line)
        blanks = len(line) - len(line.lstrip())
        if begins:
            indent = len(begins[1])
            result.append([begins[2], 1])
        elif indent is not None and line.strip() and blanks > indent:
            result[-1][1] += 1
        else:
            indent = None
    return [tuple(entry) for entry in result]


def function(name, path):
    """The syntax tree of a function, e.g. function("clap", "CLAP.forward")."""
    node = ast.parse(SOURCE[name])
    for part in path.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return node


def test_arrows_point_one_way():
    allowed = {
        **{script: {"common", "data"} for script in SCRIPTS},
        "data": {"synthetic"},
        "common": set(),
        "synthetic": set(),
    }
    for name in OURS:
        assert imports(name) & OURS <= allowed[name], name
    # data.py imports it only to write the default world.
    assert "synthetic" not in imports("data", top_only=True)


def test_nothing_else_stands_at_the_top():
    known = {"README.md", "requirements.txt", "pyproject.toml", "LICENSE", "tests", "runs"}
    known |= {f"{name}.py" for name in OURS}
    forks = {name for name in SOURCE if "class Config:" in SOURCE[name]}
    known |= {f"{name}.py" for name in forks}
    assert {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))} <= known


def test_scripts_load_only_the_known_tools():
    """What a reader may skip is in tests/ and is loaded by name, never imported."""
    for name in OURS:
        loaded = re.findall(r"load_tool\(\"(\w+)\"", SOURCE[name])
        assert set(loaded) <= TOOLS, name
        assert not imports(name) & TOOLS, name
    for tool in TOOLS:
        assert (ROOT / "tests" / f"{tool}.py").is_file(), tool


def test_the_used_by_table_of_common_is_true():
    doc = ast.get_docstring(ast.parse(SOURCE["common"]))
    table = doc[doc.index("used by"):doc.index("Nothing here knows")]
    defined = {n.name for n in ast.parse(SOURCE["common"]).body
               if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    taken = {}                  # by each file
    for user in SCRIPTS:
        taken[user] = {a.name for n in ast.walk(ast.parse(SOURCE[user]))
                       if isinstance(n, ast.ImportFrom) and n.module == "common" for a in n.names}
    listed = set()
    for section in re.split(r"\n *(?=§\d)", table)[1:]:
        first, *more = section.splitlines()
        title, pieces, users = re.split(r"\s{2,}", first)
        more = [line for line in more if not line.isupper()]                    # the rooms' titles
        pieces = set(re.findall(r"\w+", " ".join([pieces, *more])))
        listed |= pieces
        using = {user for user in taken if taken[user] & pieces}
        if users.startswith("all"):     # or "all but" one
            users = ", ".join({*SCRIPTS} - {users.removeprefix("all but ")})
        users = set(users.split(", "))
        assert using == users & OURS, title
    assert listed <= defined, listed - defined
    assert set().union(*taken.values()) <= listed, set().union(*taken.values()) - listed


@pytest.mark.parametrize("method", SCRIPTS)
def test_each_config_number_is_tagged(method):
    source = SOURCE[method]
    config = source[source.index("class Config"):].split("\n\n\n")[0]
    fields = [line for line in config.splitlines()[1:] if re.match(r"    \w+:", line)]
    assert len(fields) > 10
    for line in fields:
        comment = line.partition("  # ")[2]
        assert comment, line
        if re.search(r"(int|float) = ", line) and not re.match(r"    (seed)\b", line):
            assert re.search(r"\[(paper|code|sister|ours)", comment), line


@pytest.mark.parametrize("method", METHODS)
def test_each_loss_line_names_its_source(method):
    losses = 0
    for line in SOURCE[method].splitlines():
        if re.match(r"\s+L_?\w* = ", line):
            losses += 1
            assert re.search(r"# .*(\[paper|\[figure|\[code|\[ours|Eq\. \d)", line), line
    assert losses >= 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_departures_are_numbered_short_and_marked_in_the_code(script):
    """D1, D2, ... without a gap, each of two lines at most, and marked where it departs."""
    doc, code = split_source(script)
    listed = departures(doc)
    numbers = [number for number, _ in listed]
    assert numbers == re.findall(r"^ +D(\d+)  ", doc, re.M)
    assert numbers == [str(i + 1) for i in range(len(numbers))] and numbers

    in_code = set(re.findall(r"\bD(\d+)\b", code))
    assert in_code - set(numbers) == set(), "in the code, but not listed"
    assert set(numbers) - in_code == set(), "listed, but not in the code"
    assert [entry for entry in listed if entry[1] > 2] == [], "(number, lines), 2 at most"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_list_of_names_is_made_once(script):
    """.names visits all frames: asked for each of a full data set's, it took over an hour."""
    assert not re.search(r"\.names\[", SOURCE[script])


def test_no_line_is_longer_than_100_columns():
    too_long = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > COLUMNS:
                too_long.append(f"{path.relative_to(ROOT)}:{number}: {len(line)} columns")
    assert not too_long, f"{len(too_long)} lines, e.g. " + ", ".join(too_long[:5])


@pytest.mark.parametrize("method", METHODS)
def test_forward_fits_half_a_screen(method):
    """Rows of 100 columns, the def line and the docstring included."""
    name = next(name for name in FORWARD_ROWS if name.lower() == method)
    forward = function(method, f"{name}.forward")
    lines = SOURCE[method].splitlines()[forward.lineno - 1:forward.end_lineno]
    rows = sum(max(-(-len(line) // COLUMNS), 1) for line in lines)
    most = FORWARD_ROWS[name]
    assert rows <= most, f"{name}.forward: {rows} rows, at most {most}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_training_scripts_have_one_skeleton(script):
    """So that `diff clap.py simipu.py` shows the methods."""
    train = function(script, "train")
    lines = SOURCE[script].splitlines()[train.lineno - 1:train.end_lineno]
    assert [line.strip() for line in lines if line[4:] in BANNERS] == BANNERS


@pytest.mark.parametrize("name", sorted(OURS))
def test_no_name_is_vague(name):
    """A variable, an argument or a function is named for what it is."""
    vague = []
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = node.id
        elif isinstance(node, ast.arg):
            bound = node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound = node.name
        else:
            continue
        if bound in VAGUE:
            vague.append(f"{name}.py:{node.lineno}: {bound}")
    assert not vague, ", ".join(vague)


def test_no_path_of_a_machine_and_no_left_overs():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    paths += [ROOT / "README.md", ROOT / "requirements.txt"]
    forbidden = ("/root/", "/home/", "/work/", "strict=False", "find_unused_parameters",
                 "breakpoint()", "pdb", "https://pypi")
    for path in paths:
        text = path.read_text()
        if path.name == "test_layout.py":
            continue
        for bad in forbidden:
            assert bad not in text, (path.name, bad)
