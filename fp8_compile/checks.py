"""What both entrances check: options, patterns that match nothing, models in which nothing is converted."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .errors import NothingConvertedError, NothingConvertedWarning, OptionError, UnmatchedPatternWarning
from .options import COMMON, RECOMMENDED, Fp8Options, check_choice, check_inductor, expanded, inductor_settings
from .patterns import check_unmatched, folded
from .recipes import RECIPES, recipes_in, recommended
from .schemes import DEFAULT_METHOD, Scheme, own_options, owner_of, scheme_for, scheme_named


def parse_options(options: Fp8Options | Mapping[str, Any] | None, mode: str | None = None) -> Fp8Options:
    """Check the options that a user gave, names and values.

    Args:
        options: an instance, a flat dict, or None for the defaults. Keys of a dict are looked up among the attributes
            of `Fp8Options`, then among the options of the method, then among Inductor's settings.
        mode: ``torch.compile``'s own ``mode``, which it passes separately.

    Raises:
        OptionError: a name or a value is not valid, or an option belongs to another method.
        PatternError: an entry of ``ignored_layers`` or ``layers`` is malformed.
    """
    if options is None:
        parsed = Fp8Options()
    elif isinstance(options, Fp8Options):
        parsed = options
    elif isinstance(options, Mapping):
        parsed = _from_flat_dict(options)
    else:
        raise OptionError(f"options={options!r}: expected a dict or Fp8Options")
    if mode is not None:
        if parsed.mode not in (None, mode):
            raise OptionError(f"mode is given twice: {mode!r} and, in the options, {parsed.mode!r}")
        parsed = replace(parsed, mode=mode)
    if parsed.disabled_passes:
        from .passes.pipeline import DISABLEABLE  # loads Inductor, which importing the package shall not

        for name in parsed.disabled_passes:
            check_choice("disabled_passes", name, DISABLEABLE)
    static = False
    for pattern in parsed.askable:
        try:
            scheme = scheme_for(parsed, pattern)
            scheme.check_given(parsed.asked_of(pattern)[1])
        except OptionError as error:
            raise error if pattern is None else type(error)(f"layers: {pattern!r}: {error}") from error
        static |= scheme.input_scale_missing
    given = "activation_scales" if parsed.activation_scales else "uncalibrated"
    if not static and (parsed.activation_scales or parsed.uncalibrated != Fp8Options.uncalibrated):
        raise OptionError(
            f"{given} is of use with activation_scheme='static', where input_scale does not say it already"
        )
    return parsed


def _from_flat_dict(options: Mapping[str, Any]) -> Fp8Options:
    common = {key: value for key, value in options.items() if key in COMMON}
    given = common.get("method")
    method = given if isinstance(given, str) else DEFAULT_METHOD
    own = own_options(method)
    others = {key: value for key, value in options.items() if key not in COMMON}
    of_method = {key: value for key, value in others.items() if key in own}
    settings = {key: value for key, value in others.items() if key not in own}
    for name, flat in (("method_options", of_method), ("inductor", settings)):
        nested = common.get(name, {})
        if not isinstance(nested, Mapping):
            raise OptionError(f"{name}={nested!r}: expected a dict")
        for key in flat.keys() & nested.keys():
            raise OptionError(f"{key} is given twice: {flat[key]!r} and, in {name}, {nested[key]!r}")
        common[name] = {**nested, **flat}
    known = inductor_settings() if settings else {}
    for key in settings:
        owner = owner_of(key)
        if key not in known and owner is not None:
            remedy = f"not to {method!r}" if given else f"which must be given with it: method={owner!r}"
            raise OptionError(f"{key} belongs to method {owner!r}, {remedy}")
    # Before the rest, because an unknown key must be called unknown whatever the inner backend is.
    check_inductor(settings, [*COMMON, *own])
    return Fp8Options(**common)


def with_recipe(options: Fp8Options, model: nn.Module, stacklevel: int) -> Fp8Options:
    """``options`` with the patterns of the recipes for ``model`` in the place of `RECOMMENDED`.

    Args:
        stacklevel: of a warning that there is none, counted from the caller of this function.
    """
    if RECOMMENDED not in options.ignored_layers:
        return options
    if not recipes_in(model) and not recommended(model):
        warn_of_no_recipe([type(model).__name__], stacklevel=stacklevel + 1)
    return replace(options, ignored_layers=expanded(options.ignored_layers, recommended(model)))


def warn_of_no_recipe(kinds: Sequence[str], stacklevel: int) -> None:
    """Say that ``ignored_layers="recommended"`` keeps nothing in models of these classes."""
    warnings.warn(
        f"ignored_layers: 'recommended': there is no recipe for {', '.join(kinds) or 'a function'}, and no repeated "
        f"blocks are known, so it keeps nothing; there are recipes for {', '.join(RECIPES)}",
        UnmatchedPatternWarning,
        stacklevel=stacklevel + 1,
    )


def check_agreement(options: Fp8Options, scheme: Scheme, entry: str | None = None) -> None:
    """Refuse options that differ from those that a weight was quantized with.

    What was not given agrees, and so does what makes no difference to constants (``Scheme.call_options``).

    Args:
        entry: of ``layers``, that names the weight's layer.

    Raises:
        OptionError: names both.
    """
    remedy = "leave the option out, or load the weights anew with it"
    method, given = options.asked_of(entry)
    if method not in (None, scheme.method):
        raise OptionError(f"method={method!r}: the weights were quantized with method={scheme.method!r}; {remedy}")
    for name in given:
        if name not in scheme.options:
            raise OptionError(
                f"{name} belongs to method {owner_of(name)!r}, and the weights were quantized with {scheme.method!r}"
            )
    defaults = own_options(scheme.method)
    own_choices = {name: value for name, value in scheme.common_options.items() if value != defaults[name]}
    scheme.check_given({**own_choices, **given})
    asked = scheme_named(scheme.method, {**scheme.options, **given})
    if options.uncalibrated == "dynamic" and asked.input_scale_missing and not scheme.static:
        asked = asked.with_input_scale(None)  # what such a layer was quantized with
    for name in given:
        own, value = scheme.options[name], asked.options[name]
        if value != own and (name not in scheme.call_options or name not in asked.call_options):
            raise OptionError(f"{name}={value!r}: the weights were quantized with {name}={own!r}; {remedy}")


def warn_of_unmatched(
    patterns: Mapping[str, str], paths: Sequence[str], what: str, *, count: int, stacklevel: int
) -> None:
    """Complain of ``patterns`` that named none of the linears at ``paths``.

    Args:
        patterns: with the option that each is an entry of.
        what: where those are, for the message: "this model".
        count: how many linears these are; one may have several paths.

    Raises:
        PatternError: see `check_unmatched`.
    """
    for pattern, option in patterns.items():
        check_unmatched(pattern, paths, option)
        warnings.warn(
            f"{option}: {pattern!r} matched none of the {count} linears of {what}: {', '.join(folded(paths))}",
            UnmatchedPatternWarning,
            stacklevel=stacklevel + 1,
        )


def warn_of_unused_scales(options: Fp8Options, names: Collection[str], what: str, stacklevel: int) -> None:
    """Complain of ``activation_scales`` that name none of the layers at ``names``.

    Raises:
        OptionError: under ``strict``.
    """
    unused = sorted(options.activation_scales.keys() - set(names))
    if not unused or not names:
        return
    shown = ", ".join(map(repr, unused[:5])) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
    message = f"activation_scales: {shown} name no layer of {what}"
    if options.strict:
        raise OptionError(message)
    warnings.warn(message, UnmatchedPatternWarning, stacklevel=stacklevel + 1)


def complain_of_nothing(reasons: Counter[str], what: str, *, strict: bool, stacklevel: int) -> None:
    """Say that nothing was converted of what was asked for, and why.

    Args:
        reasons: how many stay for each reason.
        what: they are, for the message: "linears of this graph".

    Raises:
        NothingConvertedError: under ``strict``.
    """
    counted = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    message = f"none of the {sum(reasons.values())} {what} was quantized: {counted}"
    if strict:
        raise NothingConvertedError(message)
    warnings.warn(message, NothingConvertedWarning, stacklevel=stacklevel + 1)
