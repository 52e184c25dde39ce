"""
Builds the documentation site: `python3 .ci/docs/build.py [output folder]`, by default `build/site`.

It needs no network once its packages are installed. Any warning is an error.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
METHODS = {
    "fdpo": "f-DPO",
    "tdpo": "TDPO",
    "mallows": "Mallows-DPO",
    "rainbowpo": "RainbowPO",
    "simper": "SimPER",
    "d2po": "D2PO",
    "dph_rl": "DPH-RL",
    "fdpg": "f-DPG",
    "wro": "WRO",
    "diffusion_dpo": "Diffusion-DPO",
    "dspo": "DSPO",
    "score_as_action": "Score as Action",
}


def pages() -> list[Path]:
    """
    The Markdown pages of the repository, which keep their places in the site, so that their links work as they are.
    """
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for folder in ("trl_ext", "recipes"):
        found += [
            p
            for p in sorted((ROOT / folder).rglob("*.md"))
            if "template" not in p.name and "results" not in p.parts[:-1]
        ]
    return found


def check_blocks(page: Path, text: str) -> None:
    """Raises `ValueError` if a table or list follows a line of text at once: GitHub shows it, the site does not."""
    text = re.sub(r"\A---\n.*?\n---\n", lambda front: "\n" * front[0].count("\n"), text, flags=re.DOTALL)
    is_code, before = False, ""
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        begins = next((mark for mark in ("|", "- ", "1. ") if line.startswith(mark)), None)
        goes_on = not before.strip() or before.startswith((str(begins), " ", "#", "---"))
        if begins is not None and not is_code and not goes_on:
            raise ValueError(
                f"{page.relative_to(ROOT)}:{number}: put an empty line before this table or list: {line[:60]}"
            )
        before = line


def copy_pages(target: Path) -> None:
    from docstrings import notes

    for page in pages():
        text = page.read_text(encoding="utf-8")
        check_blocks(page, text)
        place = target / page.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            linked = (page.parent / link).resolve()
            if link.startswith(("http", "#")) or linked.suffix == ".md":
                continue
            if linked.is_dir():  # a folder has no page
                text = re.sub(rf"\[([^\]]*)\]\({re.escape(link)}\)", r"\1", text)
            elif linked.exists():
                copy = target / linked.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(linked, copy)
        place.write_text(notes(text), encoding="utf-8")


def rooms_with_names() -> dict[str, list[str]]:
    """Room -> its public names."""
    found = {}
    for path in sorted((ROOT / "trl_ext").iterdir()):
        if (path / "__init__.py").exists():
            names = getattr(importlib.import_module(f"trl_ext.{path.name}"), "__all__", [])
            if names:
                found[path.name] = sorted(names)
    return found


def write_api(target: Path) -> list[dict]:
    """A page a room, with what its docstrings say of its public names; the pages for the navigation."""
    import docstrings

    rooms = rooms_with_names()
    order = [*METHODS, *(room for room in rooms if room not in METHODS)]
    listed = []
    for room in [room for room in order if room in rooms]:
        blocks = [f"::: trl_ext.{room}.{name}\n" for name in rooms[room]]
        docstrings.PLACES |= {name: f"trl_ext.{room}.{name}" for name in rooms[room]}
        title = METHODS.get(room, f"trl_ext.{room}")
        page = target / "api" / f"{room}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"# {title}\n\n`trl_ext.{room}`\n\n" + "\n".join(blocks), encoding="utf-8")
        listed.append({title: f"api/{room}.md"})
    return listed


def navigation(target: Path, api: list[dict]) -> list[dict]:
    methods = [{title: f"trl_ext/{name}/README.md"} for name, title in METHODS.items()]
    listed = {
        "README.md",
        "CHANGELOG.md",
        "trl_ext/preference/migration.md",
        *(next(iter(m.values())) for m in methods),
    }
    others = {"trl_ext": [], "recipes": []}
    for page in pages():
        place = str(page.relative_to(ROOT))
        if place not in listed:
            title = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
            others[place.partition("/")[0]].append({(title[1] if title else page.parent.name).replace("`", ""): place})
    return [
        {"Start": "README.md"},
        {"Methods": methods},
        {"Guides": [{"From trl.DPOConfig": "trl_ext/preference/migration.md"}, *others["trl_ext"]]},
        {"Measurements": others["recipes"]},
        {"API": api},
        {"Architecture": "architecture.md"},
        {"Changelog": "CHANGELOG.md"},
    ]


def build(site: Path) -> None:
    """In the environment that has mkdocs and this project."""
    import yaml
    from mkdocs.__main__ import cli

    work = ROOT / "build" / "docs"
    shutil.rmtree(work, ignore_errors=True)
    pages_folder = work / "pages"
    (pages_folder / "assets").mkdir(parents=True)
    copy_pages(pages_folder)
    import architecture

    (pages_folder / "architecture.md").write_text(architecture.page(), encoding="utf-8")
    shutil.copy(HERE / "site.css", pages_folder / "assets")
    settings = {
        "INHERIT": str(HERE / "mkdocs.yml"),
        "docs_dir": str(pages_folder),
        "site_dir": str(site),
        "nav": navigation(pages_folder, write_api(pages_folder)),
    }
    (work / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    cli(["build", "--strict", "--quiet", "--config-file", str(work / "mkdocs.yml")], standalone_mode=False)
    print(f"The site is in {site}.")


def main() -> int:
    sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "recipes")]
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").resolve()
    if os.environ.get("TRL_EXT_DOCS") != "inside":
        from setup_env import prepare

        python = str(prepare("docs"))
        env = dict(os.environ, TRL_EXT_DOCS="inside", HF_HUB_OFFLINE="1", NO_MKDOCS_2_WARNING="1")
        return subprocess.run([python, str(Path(__file__)), str(site)], cwd=ROOT, env=env).returncode
    build(site)
    return 0


if __name__ == "__main__":
    sys.exit(main())
