"""Another scheduler than the pipeline's, by its name in diffusers."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from ..errors import OptionError
from .denoisers import PipelineError

SUFFIX = "Scheduler"


def scheduler_class(name: str) -> Any:
    """The class of diffusers of this name, which may leave out "Scheduler".

    Raises:
        OptionError: there is none, or it needs a package that is not installed.
    """
    import diffusers

    full = name if name.endswith(SUFFIX) else name + SUFFIX
    known = [each for each in dir(diffusers) if each.endswith(SUFFIX)]
    if full not in known:
        near = difflib.get_close_matches(full, known, n=3, cutoff=0.5)
        raise OptionError(f"scheduler={name!r}: diffusers has none of this name; near: {', '.join(near) or 'none'}")
    found = getattr(diffusers, full)
    try:
        found.from_config  # noqa: B018 # a placeholder raises here
    except ImportError as error:
        raise OptionError(f"scheduler={name!r}: {' '.join(str(error).split())}") from error
    return found


def set_scheduler(name: str, pipe: Any) -> None:
    """Give ``pipe`` this scheduler with the settings of its own one.

    A model that predicts a flow draws noise with a scheduler for another prediction, which diffusers does not refuse.

    Raises:
        PipelineError: the pipeline's model is not made for it.
    """
    kind = scheduler_class(name)
    before = pipe.scheduler
    config = dict(before.config)
    takes_flow = "use_flow_sigmas" in inspect.signature(kind.__init__).parameters
    flow = _of_flow(type(before), config)
    if not takes_flow and flow != _of_flow(kind, {}):
        what = "a flow" if flow else "no flow"
        raise PipelineError(
            f"scheduler={name!r}: the model of {type(pipe).__name__} predicts {what}, for which it is not made"
        )
    if takes_flow and flow:
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        config.setdefault("flow_shift", config.get("shift", 1.0))
    steps = inspect.signature(kind.set_timesteps).parameters
    if config.get("use_dynamic_shifting") and "mu" not in steps:
        raise PipelineError(f"scheduler={name!r}: {type(pipe).__name__} shifts its steps by size (mu), which it cannot")
    pipe.scheduler = kind.from_config(config)


def _of_flow(kind: type, config: dict[str, Any]) -> bool:
    return kind.__name__.startswith("Flow") or bool(config.get("use_flow_sigmas"))
