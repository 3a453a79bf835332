"""How the command line ends: by a sentence where a value is wrong, by frames where the program is."""

import dis
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sparse_callbacks.tasks import composition_errors, multirun
from sparse_callbacks.tasks.known_names import known_names, root_names

FRAMES = "HYDRA_FULL_ERROR"
PLAIN = "SPARSE_CALLBACKS_PLAIN_ERRORS"
"""Set beside FRAMES where the frames are wanted by `plain_errors`, and not by a person; child processes inherit both."""
ONE_CHOICE = ("method", "schedule", "model", "data", "optim", "trainer")
"""Groups of which a run has one choice; it may have several loggers."""
SAID = "_sentence_of_the_refusal"
_ARGUMENT_ERRORS = (ValueError, TypeError, ImportError, MisconfigurationException)
REFUSALS: dict[str, tuple[type[Exception], ...]] = {
    "sparse_callbacks": (ValueError, TypeError, ImportError, OSError, RuntimeError, MisconfigurationException),
    **dict.fromkeys(("pytorch_lightning", "lightning_fabric", "lightning"), _ARGUMENT_ERRORS),
}
"""By package the errors that it raises, by a `raise`, where a value is wrong."""


def wants_frames() -> bool:
    """Whether the user has asked for frames, by HYDRA_FULL_ERROR=1."""
    return os.environ.get(FRAMES, "0") not in ("", "0") and PLAIN not in os.environ


@contextmanager
def plain_errors(conf: Path) -> Iterator[None]:
    """A context, or a decorator, for Hydra's main: a refusal prints its sentence alone and exits with 1.

    Args:
        conf: the folder of the configuration.
    """
    if wants_frames():
        yield
        return
    arguments = sys.argv[1:]
    before = {name: os.environ.get(name) for name in (FRAMES, PLAIN)}
    # Hydra prints errors in words of its own and ends the process, unless frames are asked for: then it raises them
    os.environ.update({FRAMES: "1", PLAIN: "1"})
    try:
        _refuse_hyphens(arguments, conf)
        _refuse_lists(arguments)
        _refuse_flags_between(arguments)
        yield
    except Exception as error:
        text = refusal(error, conf, arguments)
        if text is None:
            traceback.print_exception(error)
        else:
            print(text, file=sys.stderr)
        sys.exit(1)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def refusal(error: Exception, conf: Path, arguments: Sequence[str]) -> str | None:
    """The sentence of an error that a value or a name has caused; None for a fault of a program, which needs its frames.

    Args:
        error: the error, as it was caught.
        conf: the folder of the configuration.
        arguments: the arguments of the command line.
    """
    if (said := vars(error).get(SAID)) is not None:
        return str(said)
    module = _raised_in(error)
    if isinstance(error, HydraException | OmegaConfBaseException) or module.startswith("hydra._internal."):
        return composition_errors.sentence(error, conf, arguments)
    if isinstance(error, YAMLError):
        return f"A file of the configuration cannot be read: {error}"
    if several := re.match(r"You provided multiple `(\w+?)_dataloader`", str(error)):
        return (
            f"The data module has several {several[1]} loaders, and a run has one {several[1]}/acc. Return one loader, such as that of a "
            "torch.utils.data.ConcatDataset."
        )
    if isinstance(error, REFUSALS.get(module.partition(".")[0], ())):
        return str(error)
    return None


def end_refused(error: Exception, text: str, folder: Path) -> None:
    """End a single run with a sentence alone; a job of a multirun goes on to raise its error, which the others may outlive.

    Args:
        error: the error of the run.
        text: its sentence.
        folder: the folder of the run, where the failure is noted.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        # where jobs have processes of their own, the way from there loses the frames that `refusal` looks at
        vars(error)[SAID] = text
        return
    # Hydra would write which overrides the job had, twice, before anybody could print a sentence
    multirun.note_failure(folder, error)
    print(text, file=sys.stderr)
    sys.exit(1)


def _raised_in(error: BaseException) -> str:
    """The module with the `raise` that an error comes from; empty where Python itself has raised it."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    # an index that is out of range, or a call with a wrong argument, is a fault of the code that stands there
    if trace.tb_frame.f_code.co_code[trace.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return ""
    return str(trace.tb_frame.f_globals.get("__name__", ""))


def _refuse_hyphens(arguments: Sequence[str], conf: Path) -> None:
    """Refuse `--sparsity=0.9` and `--epochs 3` before the parser of the arguments prints its usage."""
    known = root_names(conf)
    flags = get_args_parser()._option_string_actions  # argparse lists them nowhere else
    for place, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        is_key = name.partition(".")[0].partition("@")[0] in known
        # a flag may be cut short
        if not argument.startswith("-") or (
            not is_key and any(flag.startswith(argument.partition("=")[0]) for flag in flags)
        ):
            continue
        # `--sparsity 0.9` has the value in the next argument
        value = value if equals else "".join(text for text in arguments[place + 1 : place + 2] if "=" not in text)
        if is_key:
            raise ValueError(f"{argument} begins with hyphens, and choices have none. Write {name}={value or 'VALUE'}.")
        key = name.replace("-", "_")
        found = composition_errors.unknown_key(key, value, known_names(conf, arguments))
        raise ValueError(f"{argument} is not an option, and choices have no hyphens: {found}")


def _refuse_lists(arguments: Sequence[str]) -> None:
    """Refuse `method=[rigl,set]`, whose keys Hydra would mix."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if group in ONE_CHOICE and value.startswith("[") and "," in value:
            raise ValueError(
                f"{argument} is several choices, and a run has one. Write python train.py -m {group}={value.strip('[]')} for a run "
                "with each."
            )


def _refuse_flags_between(arguments: Sequence[str]) -> None:
    """Refuse `seed=0 -m method=set,rigl`: the parser of the arguments wants all choices in one row, and would print its usage."""
    flags = get_args_parser()._option_string_actions
    places = [place for place, text in enumerate(arguments) if text.startswith("-") and text.partition("=")[0] in flags]
    takes = {
        place + 1
        for place in places
        if flags[arguments[place].partition("=")[0]].nargs != 0 and "=" not in arguments[place]
    }
    choices = [place for place in range(len(arguments)) if place not in places and place not in takes]
    between = [place for place in places if choices and choices[0] < place < choices[-1]]
    if between:
        moved = [place for place in range(len(arguments)) if place in places or place in takes]
        written = " ".join(map(shlex.quote, (arguments[place] for place in [*moved, *choices])))
        raise ValueError(
            f"{arguments[between[0]]} stands between choices. Write it before them: python train.py {written}"
        )
