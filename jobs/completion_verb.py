"""`understudy completion bash|zsh`: a script that lets the shell complete verbs, flags and the recipe's keys.

The script is made once and asks no Python at a TAB. shtab writes what argparse knows; added here are the keys of each
verb's recipe sections, and what may follow their `=`: recipes' names, else files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

SHELLS = ("bash", "zsh")
_BASH_WORDS = """{name}() {{
  compgen -W "{keys}" -- "$1"
}}"""
_ZSH_WORDS = """{name}() {{
  if [[ $PREFIX == *=* ]]; then
    compset -P 1 '*='
    [[ $IPREFIX == *recipe= ]] && compadd -- {recipes}
    _files
  else
    compadd -S '' -- {keys}
    _files
  fi
}}"""
_BASH_END = """
# A key is completed up to its `=`, at which bash cuts words.
_understudy() {{
  local cut=$(( COMP_CWORD - 1 ))
  [[ "${{COMP_WORDS[COMP_CWORD]}}" == "=" ]] && cut=$COMP_CWORD
  if [[ "${{COMP_WORDS[cut]}}" == "=" ]]; then
    local begun=""
    (( cut < COMP_CWORD )) && begun="${{COMP_WORDS[COMP_CWORD]}}"
    COMPREPLY=()
    compopt -o filenames
    if [[ "${{COMP_WORDS[cut-1]}}" == "recipe" ]]; then
      mapfile -t COMPREPLY < <(compgen -W "{recipes}" -- "$begun"; compgen -f -X '!*.toml' -- "$begun")
    else
      mapfile -t COMPREPLY < <(compgen -f -- "$begun")
    fi
    return 0
  fi
  _shtab_understudy "$@"
  [[ ${{#COMPREPLY[@]}} -gt 0 && "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace
  return 0
}}
complete -o bashdefault -F _understudy understudy
"""


def add_verb(verbs: Any, build_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Add `completion` to the verbs of the command line.

    Args:
        build_parser: makes the whole command line, which the script is of.
    """
    completion = verbs.add_parser(
        "completion",
        help="print a script that completes verbs, flags and recipe keys in bash or zsh",
        description='bash: eval "$(understudy completion bash)" in ~/.bashrc. zsh: understudy completion zsh > '
        "FOLDER/_understudy, with fpath=(FOLDER $fpath) before compinit in ~/.zshrc.",
        sections=(),
        examples=["understudy completion bash", "understudy completion zsh"],
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=lambda options: print(write_completion(build_parser(), options.shell), end=""))


def write_completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one shell, to be evaluated by it."""
    import shtab

    from jobs.recipe import RECIPES

    recipes = " ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    for name, one in _leaves(parser, "_understudy_words"):
        for action in one._actions:
            if not action.option_strings and action.nargs in ("*", "+"):
                action.complete = _complete_words(name, one, recipes)  # type: ignore[attr-defined]
            elif action.type is not None and "path" in getattr(action.type, "__name__", "").lower():
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell)
    return script + (_BASH_END.format(recipes=recipes) if shell == "bash" else "")


def _complete_words(name: str, parser: argparse.ArgumentParser, recipes: str) -> dict[str, Any]:
    from cluster.config import describe_fields
    from jobs.recipe import Recipe

    sections = getattr(parser, "sections", ())
    known = [key for key, *_ in describe_fields(Recipe) if key.split(".")[0] in sections or key in sections]
    # Items of a list are named by a number; the first is what a person begins with.
    keys = " ".join(f"{key.replace('.N.', '.0.')}=" for key in ["recipe", *known])
    preamble = {
        "bash": _BASH_WORDS.format(name=name, keys=keys),
        "zsh": _ZSH_WORDS.format(name=name, keys=keys, recipes=recipes),
    }
    return {"bash": name, "zsh": name, "preamble": preamble}


def _leaves(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb and action with a name for its function."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, one in action.choices.items():
                yield from _leaves(one, f"{name}_{verb}")
