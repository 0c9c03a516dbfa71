"""What mkdocs shows: the pages of this checkout as they are, at the places where their links expect one another, the
files that they link to, and a reference that is written from the code.

A name that becomes public, and a command that is added, is on the pages by itself.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "drafters/*/README.md"]
LEFT_OUT = {"docs/pypi.md"}  # is the README in short
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
AROUND = {
    "specformer.generation.drafter": ["Prompts", "Verified"],
    "specformer.generation.call_statistics": ["GenerationStatistics"],
    "specformer.generation.generate": ["SpeculativeOutput"],
    "specformer.generation.target_refusals": ["UnsupportedTargetError"],
}
"""What public functions take, return and raise, by its module."""
OF_MODULES = {f"{module}.{name}" for module, names in AROUND.items() for name in names}


def constant(file: Path, name: str):
    """The literal that a module assigns to `name`."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise KeyError(f"{file} has no {name}.")


def public_names() -> dict[str, str]:
    """Every public name, and where it is defined."""
    homes = constant(ROOT / "__init__.py", "_HOMES")
    homes = {name: f"{module}.{name}" for name, module in homes.items()}
    homes["Proposal"] = "specformer.generation.proposal.Proposal"  # which the contract hands on
    return homes | {name: f"{module}.{name}" for module, names in AROUND.items() for name in names}


def python_reference() -> str:
    lines = ["# Python", "", "What `import specformer` has, and what it takes, returns and raises."]
    for name, place in sorted(public_names().items(), key=lambda item: item[0].lower()):
        heading = f"specformer.{name}" if place not in OF_MODULES else place
        # griffe does not look into generation/, which has no __init__.py, from the package: from the checkout it does
        lines += ["", f"::: {place.removeprefix('specformer.')}", "    options:", f"      heading: {heading}"]
    return "\n".join(lines) + "\n"


def commands() -> dict[str, str]:
    """By command, its module."""
    listed = (ROOT / "scripts" / "cli.py").read_text(encoding="utf-8")
    return dict(re.findall(r'^    "([\w-]+)": Command\(\s*"(\w+)"', listed, flags=re.M))


def command_reference() -> str:
    lines = ["# Command line", "", "`specformer COMMAND --help` has all options of a command."]
    for command, module in commands().items():
        tree = ast.parse((ROOT / "scripts" / f"{module}.py").read_text(encoding="utf-8"))
        options = list(dict.fromkeys(re.findall(r'add_argument\(\s*"(--[\w-]+)"', ast.unparse(tree).replace("'", '"'))))
        lines += ["", f"## specformer {command}", "", as_page(ast.get_docstring(tree) or "")]
        lines += ["", "Options: " + ", ".join(f"`{option}`" for option in options) + "."] if options else []
    return "\n".join(lines) + "\n"


def as_page(docstring: str) -> str:
    """Markdown of a docstring whose words are no Markdown: what looks like HTML is shown."""
    return re.sub(r"^(?!    )(.*)$", lambda line: line[1].replace("<", "&lt;"), docstring, flags=re.M)


def on_files(files: Files, config) -> Files:
    shown = Files([file for file in files if not file.src_uri.endswith((".md", ".svg", ".png"))])
    wanted = {path for pattern in PAGES for path in sorted(ROOT.glob(pattern))}
    wanted = {path.relative_to(ROOT).as_posix() for path in wanted} - LEFT_OUT
    for page in sorted(wanted):
        for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            linked = (ROOT / page).parent.joinpath(link).resolve()
            if not link.startswith("http") and linked.is_file() and linked.suffix != ".md":
                wanted.add(linked.relative_to(ROOT).as_posix())
    for name in sorted(wanted):
        shown.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    shown.append(File.generated(config, "reference/python.md", content=python_reference()))
    shown.append(File.generated(config, "reference/commands.md", content=command_reference()))
    return shown
