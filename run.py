"""The command line: picks a verb and a recipe, changes single fields of it, calls one function.

    python run.py VERB …        one of the verbs below; `python run.py VERB --help` lists every flag

Exit codes: 0 done; 2 a mistake in what was asked (one message, no traceback); 1 a failure of the world (a full disk, a
corrupt file); 75 training was told to stop by a signal, saved, and can be continued by the same command.
"""

import ast
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import RunError, UserError, out_of_memory
from models import RECIPES

#: Verb -> the word that comes first after it, if there is one. Each is a file in commands/, imported when it is asked
#: for and not before: help must come at once.
VERBS = {
    "demo": "",
    "prepare": "RECIPE",
    "plan": "RECIPE",
    "train": "RECIPE",
    "series": "",
    "verify": "",
    "trace": "",
    "mixtures": "RECIPE",
    "logits": "",
    "generate": "",
    "evaluate": "",
    "analyze": "KIND",
    "report": "",
    "import": "",
    "export": "",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        if argv == ["_compile"]:  # `commands.plan.COMPILE`: a process of plan --verify
            from models import families
            from training.ahead import serve

            return serve(families())
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
            return 0
        verb, words = argv[0], argv[1:]
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}{_nearest(verb, VERBS)}; verbs are {', '.join(VERBS)}")
        command = importlib.import_module(f"commands.{_module(verb)}")
        if VERBS[verb] == "KIND" and words[:1] in (["-h"], ["--help"]):
            print(command.overview())
            return 0
        result = command.run(_flags(verb, command, words))
        value, code = result if isinstance(result, tuple) else (result, 0)
        if as_json and value is not None:  # of several processes one has something to say
            print(json.dumps(value))
        return code
    except UserError as e:
        return _fail(e, 2, as_json)
    except RunError as e:
        return _fail(e, 1, as_json)
    except OSError as e:  # a full disk, a missing right: nothing that a traceback would explain better
        return _fail(e, 1, as_json)
    except SystemExit as e:  # tyro has printed help, or what is wrong with a flag
        if as_json and e.code:
            print(json.dumps({"error": "a flag is wrong; see stderr", "exit_code": e.code}))
        return int(e.code or 0)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        if (told := out_of_memory(e)) is None:
            raise
        return _fail(told, 1, as_json)


def _flags(verb: str, command: Any, words: list[str]) -> Any:
    """The flags of a verb from the words after it, beginning with its recipe or kind if it takes one."""
    from commands.flags import from_recipe, parse

    first, prog = VERBS[verb], f"run.py {verb}"
    if first == "RECIPE":
        config, words = _recipe(verb, words)
        prog += f" {config.recipe}"
        default = command.default(config) if hasattr(command, "default") else from_recipe(command.Args, config)
        return parse(command.Args, prog, command.__doc__, words, default)
    if first == "KIND":
        kind, words = (words[0], words[1:]) if words else ("", words)
        settings = command.settings_of(kind)
        return parse(command.Args[settings], f"{prog} {kind}", settings.__doc__, words)
    return parse(command.Args, prog, command.__doc__, words)


def _recipe(verb: str, words: list[str]) -> tuple[Any, list[str]]:
    """The config of the recipe that the first word names, and the other words."""
    from models import recipe_in_file, recipes

    known = ", ".join([*RECIPES, "FILE.py:FUNCTION"])
    if words and not words[0].startswith("-"):
        name, words = words[0], words[1:]
        if ".py:" in name:
            return recipe_in_file(name), words
        if name not in RECIPES:
            raise UserError(f"unknown recipe {name!r}{_nearest(name, RECIPES)}; recipes are {known}")
    elif any(word in ("-h", "--help") for word in words):
        print(f"RECIPE is one of {known}; the defaults shown are those of amber_tiny\n", file=sys.stderr)
        name = "amber_tiny"
    else:
        raise UserError(f"{verb}: the recipe is missing; write run.py {verb} RECIPE …, with one of {known}")
    return recipes()[name](), words


def _nearest(word: str, known: Any) -> str:
    from commands.flags import nearest  # a mistake may take its time

    return nearest(word, known)


def _fail(error: Exception, code: int, as_json: bool) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"error": str(error), "exit_code": code}))
    return code


def _module(verb: str) -> str:
    """Module of a verb in commands/; Python keeps one of the words for itself."""
    return "import_" if verb == "import" else verb


def _overview() -> str:
    """The verbs, each with the first paragraph of its file: read, not imported."""
    lines = [__doc__ or "", "verbs:"]
    for verb, first in VERBS.items():
        path = Path(__file__).resolve().parent / "commands" / f"{_module(verb)}.py"
        what = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
        lines.append(f"  {f'{verb} {first}':18} {what}")
    return "\n".join([*lines, "", "recipes: " + ", ".join(RECIPES) + ", or FILE.py:FUNCTION of your own"])


if __name__ == "__main__":
    sys.exit(main())
