"""`minicos completion`: a script that completes verbs, options and their values in a shell."""

import argparse
from collections.abc import Iterator

from minicos.cli import options

HELP = "Print a script that completes minicos in bash, zsh or fish."
EXAMPLES = """\
  minicos completion bash >> ~/.bashrc  # then open a new terminal
  minicos completion zsh >> ~/.zshrc
  minicos completion fish >> ~/.config/fish/config.fish
"""
BASH = """\
_minicos() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then words="{verbs}"
  else case "$verb $prev" in
{values}
    *) case "$verb" in
{options}
    esac;;
  esac; fi
  COMPREPLY=( $(compgen -W "$words" -- "$cur") )
}}
complete -o default -F _minicos minicos
"""
ZSH = """\
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""


def add(verbs: argparse._SubParsersAction) -> None:
    parser = options.add_parser(verbs, "completion", HELP, EXAMPLES, run)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    parser.set_defaults(verbs=verbs)


def run(args: argparse.Namespace) -> None:
    known = dict(args.verbs.choices)
    if args.shell == "fish":
        print("\n".join(_fish(known)))
        return
    print(ZSH * (args.shell == "zsh") + _bash(known), end="")


def _bash(verbs: dict[str, argparse.ArgumentParser]) -> str:
    values, flags = [], []
    for verb, parser in verbs.items():
        every = [flag for names, _ in _options(parser) for flag in names]
        positional = [word for action in parser._actions for word in _words(action, flag=False)]
        flags.append(f'      {verb}) words="{" ".join([*positional, *every])}";;')
        for names, words in _options(parser):
            if words:
                found = "|".join(f'"{verb} {name}"' for name in names)
                values.append(f'    {found}) words="{" ".join(words)}";;')
    return BASH.format(verbs=" ".join(verbs), values="\n".join(values), options="\n".join(flags))


def _fish(verbs: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    yield f'complete -c minicos -n __fish_use_subcommand -xa "{" ".join(verbs)}"'
    for verb, parser in verbs.items():
        for names, words in _options(parser):
            known = f' -xa "{" ".join(words)}"' if words else ""
            for name in names:
                if name.startswith("--"):
                    where = f'-n "__fish_seen_subcommand_from {verb}"'
                    yield f"complete -c minicos {where} -l {name.removeprefix('--')}{known}"


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[list[str], list[str]]]:
    """The names of each option of a verb, and its possible values if they are few."""
    for action in parser._actions:
        if action.option_strings:
            yield list(action.option_strings), _words(action, flag=True)


def _words(action: argparse.Action, flag: bool) -> list[str]:
    if bool(action.option_strings) != flag:
        return []
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    if action.dest in ("puzzle", "kind") and action.type in (None, str):
        from minicos.puzzles import FAMILIES

        return list(FAMILIES)
    return []
