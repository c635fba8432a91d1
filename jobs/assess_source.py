"""A folder of an agent's Python source -> the places that call a language model, and what their code says of each.

Reads syntax trees alone: nothing is imported or run. Known are the calls of OpenAI's and Anthropic's SDKs, LiteLLM,
LangChain, CrewAI, pydantic-ai and MetaGPT's own `aask`. A literal, or a name that the module gives a literal, is seen;
whatever is computed is called so. How often a place is reached, and what it is asked, no source code says.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from cluster.errors import InputError
from cluster.records import Record

CANNOT_SHOW = (
    "How often each place is reached, and so its share of the calls: only traffic shows that.",
    "How long prompts become once they are filled, how alike the answers are, and whether a small model says the same.",
    "Calls through wrappers, other languages, other SDKs or plain HTTP; prompts and models that are computed or configured.",
)
MAX_FILE_BYTES = 2_000_000
_SKIPPED = frozenset({".git", ".venv", "venv", "node_modules", "__pycache__", "site-packages", "build", "dist"})


class SourceSite(Record):
    """One place that calls a language model, or that makes an agent which does."""

    path: str
    """Relative to the folder."""
    line: int
    function: str
    """Qualified name of the function or class that it is in; `module` outside of any."""
    library: str
    model: str | None
    """None where it is computed, or left to a default."""
    prompt: str
    """literal, literal with N slots, or computed; with the characters that are seen."""
    tools: tuple[str, ...]
    """Names that are seen."""
    tools_are: str
    """none, literal or computed."""
    answers: str
    """What the code asks for: tool calls, JSON, or open."""
    temperature: float | None


class _Rule(NamedTuple):
    """How one library's call is recognised: the last names of a dotted callee, and a module that the file imports."""

    library: str
    callee: tuple[str, ...]
    module: str
    prompts: tuple[str, ...]
    """Keywords that hold prompt text; a number is the place of a positional argument."""


_CHAT = ("messages", "input", "prompt", "instructions", "system")
_RULES = (
    _Rule("openai", ("chat", "completions", "create"), "", _CHAT),
    _Rule("openai", ("chat", "completions", "parse"), "", _CHAT),
    _Rule("openai", ("responses", "create"), "openai", _CHAT),
    _Rule("openai", ("responses", "parse"), "openai", _CHAT),
    _Rule("openai", ("ChatCompletion", "create"), "openai", _CHAT),
    _Rule("openai", ("ChatCompletion", "acreate"), "openai", _CHAT),
    _Rule("openai", ("completions", "create"), "openai", _CHAT),
    _Rule("anthropic", ("messages", "create"), "anthropic", _CHAT),
    _Rule("anthropic", ("messages", "stream"), "anthropic", _CHAT),
    _Rule("litellm", ("litellm", "completion"), "", _CHAT),
    _Rule("litellm", ("litellm", "acompletion"), "", _CHAT),
    _Rule("litellm", ("completion",), "litellm", _CHAT),
    _Rule("litellm", ("acompletion",), "litellm", _CHAT),
    _Rule("langchain", ("from_messages",), "langchain", ("messages", "0")),
    _Rule("langchain", ("from_template",), "langchain", ("template", "0")),
    _Rule("langchain", ("PromptTemplate",), "langchain", ("template",)),
    _Rule("langchain", ("LLMChain",), "langchain", ("prompt",)),
    _Rule("langchain", ("create_react_agent",), "lang", ("prompt",)),
    _Rule("crewai", ("Agent",), "crewai", ("role", "goal", "backstory")),
    _Rule("crewai", ("Task",), "crewai", ("description", "expected_output")),
    _Rule("pydantic-ai", ("Agent",), "pydantic_ai", ("system_prompt", "instructions")),
    _Rule("metagpt", ("aask",), "metagpt", ("0", "msg", "system_msgs")),
    _Rule("metagpt", ("_aask",), "metagpt", ("0", "prompt", "system_msgs")),
)


def find_source_sites(folder: pathlib.Path) -> tuple[list[SourceSite], int]:
    """All places below a folder, in order of file and line, and how many files could not be parsed.

    Raises:
        InputError: the folder has no Python file.
    """
    files = [path for path in sorted(folder.rglob("*.py")) if not _SKIPPED & set(path.relative_to(folder).parts)]
    if not files:
        raise InputError(
            f"{folder}: no Python file; allowed: a folder of an agent's Python source, or files of captured calls; next: "
            "understudy assess calls.jsonl"
        )
    sites, num_unread = [], 0
    for path in files:
        try:
            tree = ast.parse(path.read_bytes()) if path.stat().st_size <= MAX_FILE_BYTES else None
        except (SyntaxError, ValueError, RecursionError):
            tree = None
        if tree is None:
            num_unread += 1
            continue
        sites += _FileReader(str(path.relative_to(folder)), tree).sites()
    return sites, num_unread


class _FileReader:
    """Reads one file's tree."""

    def __init__(self, path: str, tree: ast.Module) -> None:
        self._path, self._tree = path, tree
        self._constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self._imported = set(_imported(tree))

    def sites(self) -> list[SourceSite]:
        found = [self._site(node, rule, where) for node, where in _calls(self._tree) if (rule := self._rule_of(node))]
        return sorted(found, key=lambda one: one.line)

    def _rule_of(self, node: ast.Call) -> _Rule | None:
        names = _dotted(node.func)
        for rule in _RULES:
            is_called = names[-len(rule.callee) :] == rule.callee
            if is_called and (not rule.module or any(name.startswith(rule.module) for name in self._imported)):
                return rule
        return None

    def _site(self, node: ast.Call, rule: _Rule, where: str) -> SourceSite:
        given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        given |= {str(place): value for place, value in enumerate(node.args)}
        prompts = [self._resolve(given[name]) for name in rule.prompts if name in given]
        tools = self._resolve(given["tools"]) if "tools" in given else given.get("functions")
        names = tuple(_tool_names(tools)) if tools is not None else ()
        model = self._resolve(given.get("model") or given.get("llm"))
        temperature = self._resolve(given.get("temperature"))
        return SourceSite(
            path=self._path,
            line=node.lineno,
            function=where or "module",
            library=rule.library,
            model=model.value if isinstance(model, ast.Constant) and isinstance(model.value, str) else None,
            prompt=_describe_prompt(prompts),
            tools=names,
            tools_are="none" if tools is None else "literal" if names else "computed",
            answers=_answers(given, tools),
            temperature=_number(temperature),
        )

    def _resolve(self, node: ast.expr | None) -> ast.expr | None:
        """What a name stands for, where the module says so once."""
        return self._constants.get(node.id, node) if isinstance(node, ast.Name) else node


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _calls(tree: ast.AST, where: str = "") -> Iterator[tuple[ast.Call, str]]:
    """Every call with the qualified name of what it is in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield node, where
        is_named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from _calls(node, f"{where}.{node.name}".strip(".") if is_named else where)


def _dotted(node: ast.expr) -> tuple[str, ...]:
    """`a.b.c` as its names; what is before the last call or index is left out."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        names.append(node.id)
    return tuple(reversed(names))


def _describe_prompt(prompts: list[ast.expr | None]) -> str:
    """Whether the text is in the code, how much of it, and how many places are filled in."""
    literal = slots = 0
    for prompt in prompts:
        for node in ast.walk(prompt) if prompt is not None else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                literal += len(node.value)
            slots += isinstance(node, ast.FormattedValue | ast.Name | ast.Call)
    if not prompts or not literal:
        return "computed"
    return f"{literal} characters" + (f", {slots} slots" if slots else "")


def _tool_names(tools: ast.expr) -> Iterator[str]:
    """Values of `name` in literal tool schemas, and names of functions in a literal list."""
    for node in ast.walk(tools):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            yield from (
                value.value
                for key, value in pairs
                if isinstance(key, ast.Constant)
                and key.value == "name"
                and isinstance(value, ast.Constant)
                and isinstance(value.value, str)
            )
    if isinstance(tools, ast.List | ast.Tuple):
        yield from (one.id for one in tools.elts if isinstance(one, ast.Name))


def _answers(given: dict[str, ast.expr], tools: ast.expr | None) -> str:
    structured = ("response_format", "text_format", "output_type", "result_type", "output_json", "output_pydantic")
    if any(name in given for name in structured):
        return "JSON"
    return "tool calls or open" if tools is not None else "open"


def _number(node: ast.expr | None) -> float | None:
    is_number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
    return float(node.value) if is_number else None  # type: ignore[union-attr]
