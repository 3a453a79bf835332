"""What Hydra and OmegaConf refuse, in one sentence that says what to write instead."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from sparse_callbacks.core.error_text import first_line
from sparse_callbacks.core.pattern_arguments import ELSEWHERE
from sparse_callbacks.core.similar_names import close, meant
from sparse_callbacks.tasks.known_names import Names, known_names, nearest_key
from sparse_callbacks.tasks.library_names import libraries_of


def sentence(error: Exception, conf: Path, arguments: Sequence[str]) -> str:
    """The sentence of an error of Hydra or OmegaConf.

    Args:
        error: the error, of composing the configuration or of making something that it describes.
        conf: the folder of the configuration.
        arguments: the arguments of the command line.
    """
    if isinstance(error, InstantiationException):
        return _not_made(error)
    if isinstance(error, OverrideParseException):
        names = known_names(conf, arguments)
        if "=" not in error.override:
            return without_value(error.override, arguments, names)
        following = list(arguments)[list(arguments).index(error.override) + 1 :] if error.override in arguments else []
        if error.override.endswith(",") and following and "=" not in following[0]:
            return without_value(following[0], arguments, names)
        return unreadable(error.override, _reason(error))
    if isinstance(error, MissingConfigException) and error.options:
        return unknown_choice(str(error.missing_cfg_file), error.options, arguments)
    text = str(error)
    for pattern, words in _FORMS:
        if match := pattern.search(text):
            return words(match, known_names(conf, arguments), arguments)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {first_line(error)}"
    cause = error.__cause__
    beside = f": {first_line(cause)}" if isinstance(cause, OmegaConfBaseException) else ""
    return f"{text.strip().splitlines()[0] if text.strip() else 'The configuration cannot be composed'}{beside}"


def without_value(word: str, arguments: Sequence[str], names: Names) -> str:
    """The sentence about an argument without a value, such as those of `method rigl`, `method = rigl` and `method= rigl`.

    Args:
        word: the argument.
        arguments: the arguments of the command line.
        names: the known names.
    """
    place = list(arguments).index(word) if word in arguments else len(arguments)
    before = arguments[place - 1] if 0 < place < len(arguments) else ""
    after = [*arguments[place + 1 : place + 3], "", ""]
    if before.endswith("=") and before != "=":
        return f"{before} {word} has a space behind the =. Write {before}{word}."
    parts = [word, *after[: 2 if after[0] == "=" else 1]]
    value = parts[-1].removeprefix("=")
    # what follows may be an argument of its own
    if (word in names.keys or word in names.groups) and value and "=" not in value and not value.startswith("-"):
        return f"{' '.join(parts)} has spaces in the place of one =. Write {word}={value}."
    key, equals, begun = before.partition("=")
    if equals and re.search(r"[\\/]|,$", begun):
        return f"{word} has no value. If it belongs to the text before it, write \"{key}='{begun} {word}'\", with both kinds of quotes."
    key, _, value = word.partition(":")
    if value and (key in names.keys or key in names.groups):
        return f"{word} has no =. Write {key}={value.strip()}."
    groups = [
        group for group, choices in names.groups.items() if word in choices and group not in ("sweep", "shrinkbench")
    ]
    meant_by = f" Did you mean {groups[0]}={word}?" if groups else " Write KEY=VALUE, such as sparsity=0.9."
    return f"{word} has no value.{meant_by} python train.py --help lists what there is."


def unreadable(override: str, reason: str) -> str:
    """The sentence about an argument that is not in Hydra's grammar.

    Args:
        override: the argument.
        reason: what the grammar says.
    """
    key, _, value = override.partition("=")
    if value.startswith("~"):
        return f"{override} cannot be read: behind = the shell does not replace ~. Write {key}=$HOME{value[1:]}."
    if re.fullmatch(r"\([\d., ]*\)", value):
        return f"{override}: a list has square brackets. Write {key}=[{value[1:-1].replace(' ', '')}]."
    if joined := re.split(r"[,;] ?(?=[\w.@/]+=)", override)[1:]:
        apart = " ".join([override[: override.index(joined[0])].rstrip(",; "), *joined])
        return f"{override} is several choices in one. Write {apart}, with a space between them."
    if re.fullmatch(r"[a-z_]+\(.*\)", value):
        return (
            f"{override}: a value with parentheses needs quotes of its own inside those of the shell. "
            f"Write \"{key}='{value}'\"."
        )
    opened = [pair for pair in ("[]", "{}", "()") if value.count(pair[0]) != value.count(pair[1])]
    if opened:
        return f"{override} cannot be read: a bracket of {opened[0]} is open or closed alone. Write both."
    return (
        f"{override} cannot be read ({reason}). A text with spaces, brackets, commas, colons or = in it needs quotes of "
        f"its own inside those of the shell, such as \"{key or 'KEY'}='{value.strip()}'\"."
    )


def unknown_choice(path: str, options: Sequence[str], arguments: Sequence[str]) -> str:
    """The sentence about a choice that its group does not have.

    Args:
        path: the path of the configuration that is not there, with its group.
        options: the choices that there are.
        arguments: the arguments of the command line.
    """
    group, _, choice = path.rpartition("/")
    named = f"{group}={choice}"
    # a choice may be a path itself, of which Hydra takes the folders for the group
    if typed := [text for text in arguments if _asked_for(text) == path]:
        named = typed[0]
        key, _, choice = named.partition("=")
        group = key.partition("@")[0]
    return f"{named} is not known.{_meant_choice(group, choice, options)} Choices of {group}: {', '.join(options)}."


def _asked_for(text: str) -> str:
    """The path of the configuration that an argument chooses, with its group."""
    key, _, choice = text.partition("=")
    return f"{key.partition('@')[0]}/{choice}"


def _meant_choice(group: str, choice: str, options: Sequence[str]) -> str:
    """What somebody has meant by a choice: a network of a library, images or a table of their own, or a choice like it."""
    if group == "data" and Path(choice).exists():
        own = "image_folder data.root" if Path(choice).is_dir() else "tabular data.path"
        return f" Did you mean data={own}={choice}?"
    if group == "model" and (libraries := libraries_of(choice)):
        written = " or ".join(f"model={library} model.name={choice}" for library in libraries)
        return f" Did you mean {written}?"
    if group == "logger" and choice in ("none", "off", "no"):
        return " For none write logger=[]."
    return meant(choice, options)


def _reason(error: OverrideParseException) -> str:
    lines = [line for line in str(error.message).splitlines() if line.strip() and "hydra.cc" not in line]
    # without the names of the grammar's own symbols
    return lines[-1].strip().partition(" expecting ")[0] if lines else "it is not in Hydra's grammar"


def _not_made(error: InstantiationException) -> str:
    """The sentence of what a constructor has refused, behind the group that described it."""
    lines = str(error).splitlines()
    key = next((line.partition(": ")[2] for line in lines if line.startswith("full_key: ")), "")
    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    # without a cause it is a target that is not there
    said = lines[0] if isinstance(cause, InstantiationException) else str(cause) or type(cause).__name__
    own = type(cause).__module__ == "builtins" and key in said  # our sentences name the key themselves
    return said if own or not key else f"{key}: {said}"


def _unknown_key(match: re.Match[str], names: Names, arguments: Sequence[str]) -> str:
    key = match[1]
    typed = next((text for text in arguments if text.lstrip("+~").partition("=")[0] == key), key)
    value = typed.partition("=")[2]
    swept = [
        text for text in arguments if text.partition("=")[0] in (key.partition(".")[0], "experiment") and "," in text
    ]
    if key in names.elsewhere and swept and {"-m", "--multirun"} & set(arguments):
        # Hydra first composes the configuration without what is swept
        return (
            f"{key} is a key of some choices alone. For a multirun over {swept[0]} write \"{key}=choice('{value}')\"."
        )
    return unknown_key(key, value, names)


def unknown_key(key: str, value: str, names: Names) -> str:
    """The sentence about a key that the configuration does not have.

    Args:
        key: the key, with dots.
        value: the value that it was given, as it was typed; empty for a key that is to be deleted.
        names: the known names.
    """
    name = key.partition("@")[0]
    parent, _, leaf = name.rpartition(".")
    beside = [other for other in names.keys if parent and other.rpartition(".")[0] == parent]
    # of a data module of somebody's own, or of timm's networks, whose arguments no file lists
    options = f"{parent}.options"
    if options in names.keys and close(leaf, [other.rpartition(".")[2] for other in beside]) is None:
        written = f"'{options}={{{leaf}: {value or 'VALUE'}}}'"
        return f"{key} is not a key. If it is an argument of what the {parent} is made of, write {written}."
    choices = names.elsewhere.get(name, ())
    if parent == "method" and "method._target_" in names.keys and leaf in ELSEWHERE:
        return f"{key} is not a key of the method that the run has, which {ELSEWHERE[leaf]} Leave it out, or choose one of these."
    if f"{parent}.base.{leaf}" in names.keys:
        written = f"{parent}.base.{leaf}" + (f"={value}" if value else "")
        return (
            f"{key} is not a key of the {parent} that the run has, and its base has one of this name. Write {written}."
        )
    if choices and close(leaf, [other.rpartition(".")[2] for other in beside]) is None:
        there = ", ".join(f"{parent}={choice}" for choice in choices)
        return f"{key} is not a key of the {parent} that the run has. It is one of {there}: choose one of these, or leave it out."
    if parent in names.empty:
        return f"{key} is not a key, as {parent} has no value yet. Write '{parent}={{{leaf}: {value or 'VALUE'}}}'."
    if (found := nearest_key(name, names)) is not None:
        return f"{key} is not a key. Did you mean {found}{f'={value}' if value else ''}?"
    if beside:
        return f"{key} is not a key. Keys of {parent}: {', '.join(other.rpartition('.')[2] for other in beside)}."
    roots = [other for other in names.keys if not parent and "." not in other]
    return f"{key} is not a key. Keys: {', '.join(sorted({*roots, *names.groups}))}; python train.py --help says more."


def _without_plus(match: re.Match[str], names: Names, arguments: Sequence[str]) -> str:
    key = match[1]
    typed = next((text.lstrip("+") for text in arguments if text.lstrip("+").partition("=")[0] == key), f"{key}=VALUE")
    return f"{key} has a value already, so nothing is added. Write {typed}, without a sign before it."


def _several(match: re.Match[str], names: Names, arguments: Sequence[str]) -> str:
    key, _, values = match[1].partition("=")
    said = f"{match[1]} is several values, and one run takes one."
    if re.search(r"[\\/ ]", values):
        return (
            f"{said} For one text with a comma in it write \"{key}='{values}'\", with both kinds of quotes; for a run with each, "
            f"python train.py -m and the texts in quotes of their own."
        )
    number = "" if key.endswith("seed") or not re.fullmatch(r"-?\d+,\d+", values) else values.replace(",", ".")
    decimal = f" If it is one number, write {key}={number}." if number else ""
    return f"{said}{decimal} Write python train.py -m {match[1]} for a run with each, or {key}=[{values}] for a list."


def _no_choice(match: re.Match[str], names: Names, arguments: Sequence[str]) -> str:
    typed = [text for text in arguments if text.partition("=")[0] in names.groups]
    plain = [text for text in typed if re.fullmatch(r"\w+=(null|None|\d[\d.e-]*|true|false)", text, re.IGNORECASE)]
    named = plain[0] if plain else ", ".join(typed)
    group = named.partition("=")[0]
    for_none = " For none write logger=[]." if group == "logger" else ""
    return f"{named} does not choose anything.{for_none} Choices of {group}: {', '.join(names.groups.get(group, []))}."


_FORMS: list[tuple[re.Pattern[str], Callable[[re.Match[str], Names, Sequence[str]], str]]] = [
    (re.compile(r"Could not override '([^']*)'"), _unknown_key),
    (re.compile(r"Override ([^= ]*)\S* looks like a config group override"), _unknown_key),
    (re.compile(r"Could not delete from config\. '([^']*)' does not exist"), _unknown_key),
    (re.compile(r"Could not delete '([^'=]*)\S*'\. No match"), _unknown_key),
    (re.compile(r"An item is already at '([^']*)'"), _without_plus),
    (re.compile(r"Multiple values for (\S*)\."), _without_plus),
    (re.compile(r"(\S*) appears more than once in the final defaults list"), _without_plus),
    (re.compile(r"Ambiguous value for argument '([^\n]*)'"), _several),
    (re.compile(r"Sweep parameters '([^\n]*)' requires"), _several),
    (re.compile(r"Config group override must be a string or a list"), _no_choice),
]
