"""Checks of a recipe against its method: the number of sources, the names of parameters, and their values.

All checks use the recipe alone, before any file is opened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from paft_merge.methods import REQUIRED, Method, Parameter
from paft_merge.recipe.diagnostics import IGNORED, Report
from paft_merge.recipe.normalized import OutputModule, OutputSlice, Source, all_levels
from paft_merge.recipe.resolution import TRIM_RULES, Condition, Level, Setting, SettingError, coerce, rivals
from paft_merge.recipe.schema import Language
from paft_merge.recipe.yaml_source import did_you_mean, show


def find_method(name: str, methods: Mapping[str, Method], report: Report) -> Method | None:
    """The method that `merge_method` names; None, with an error in `report`, if it is unknown."""
    if name not in methods:
        fix = did_you_mean(name, methods) or f"known: {', '.join(sorted(methods))}"
        report.error(report.located.spot(("merge_method",)), f"unknown merge method {show(name)}", fix)
    return methods.get(name)


def check_space(language: Language, method: Method, report: Report, faulty: Collection[str]) -> None:
    """Check that the method, the space that it works in and the output go together."""
    if {"space", "output", "kind", "rank"} & set(faulty):
        return
    space, output = language.space or "weight", language.output
    if method.core_only and space not in ("core", "ctm"):
        what = f"{method.name} merges adapters in their core space; it has no meaning on deltas of low rank themselves"
        report.error(report.located.spot(("merge_method",)), what, "add space: core and output: {kind: adapter}")
    if space == "weight":
        return
    spot = report.located.spot(("space",))
    if output is None or output.kind != "adapter":
        fix = "add output: {kind: adapter}, and for a checkpoint merge BASE+OUT, or write space: weight"
        report.error(spot, f"space: {space} makes an adapter", fix)
    elif space == "ctm" and not isinstance(output.rank, int):
        what = "space: ctm merges in subspaces of the rank of the output"
        report.error(spot, what, "write a number as rank in output, such as rank: 16")


def check(
    modules: tuple[OutputModule, ...],
    method: Method,
    methods: Mapping[str, Method],
    report: Report,
    faulty: Collection[str],
) -> None:
    """Note in `report` everything that the method does not support or would ignore.

    Args:
        modules: the normalized recipe.
        method: its method.
        methods: all methods, to name those that an ignored parameter belongs to.
        report: receives errors and warnings.
        faulty: keys with errors already reported, whose consequences are not reported again.
    """
    slices = [output for module in modules for output in module.slices]
    if not {"model", "base_model"} & set(faulty):
        _check_base_given(slices, method, report)
        for output in slices:
            _check_sources(output, method, report)
    for module in modules:
        _check_ends(module, report)
    if "layer_range" not in faulty:
        for output in slices:
            _check_lengths(output, report)
    for level in all_levels(modules):
        _check_names(level, method, methods, report)
        _check_rivals(level, method, report)
    for output in slices:
        for source in output.sources:
            _check_source_level(source, output, method, report)
        if "parameters" not in faulty:
            _check_required(output, method, report)
        if not report.errors:
            _check_together(output, method, report)


def _check_base_given(slices: Sequence[OutputSlice], method: Method, report: Report) -> None:
    if method.base == "required" and any(output.base is None for output in slices):
        what = f"missing, and {method.name} merges differences from a base"
        report.error(report.located.spot(("base_model",)), what, "add base_model: ...")


def _check_sources(output: OutputSlice, method: Method, report: Report) -> None:
    """Check that the models of a slice are distinct, include a required base, and are of a supported number."""
    refs = [source.ref for source in output.sources]
    has_base = output.base in refs and method.base != "ignored"
    for i, source in enumerate(output.sources):
        if source.ref in refs[:i]:
            first = output.sources[refs.index(source.ref)].spot
            report.error(source.spot, f"{source.ref} is already listed at {first.path or first}", "list it once")
        same = [ref for ref in refs[:i] if ref != source.ref and ref.stream == source.ref.stream]
        if any(ref.label for ref in (*same, source.ref)) and same:
            what = f"{source.ref} has the label {source.ref.stream} of {same[0]}, so both would drop the same entries"
            report.error(source.spot, what, "give each source a different label")
    if method.base != "ignored" and output.base and not has_base:
        what = f"base_model {output.base} is not among the sources of this slice, and {method.name} needs it there"
        report.error(output.spot, what, "add it to sources, with its layer_range")
    elif (method.base != "required" or has_base) and not _has_patterns(output):
        _check_count(len(refs) - has_base, output, method, report)


def _has_patterns(output: OutputSlice) -> bool:
    """Whether some source stands for several (`checkpoint-*`)."""
    refs = [source.ref for source in output.sources]
    return any("*" in path for ref in refs for path in (ref.path, *(path for path, _ in ref.adapters)))


def _check_count(count: int, output: OutputSlice, method: Method, report: Report) -> None:
    least, most = method.min_sources, method.max_sources
    if count >= least and (most is None or count <= most):
        return
    wanted = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
    besides = "" if method.base == "ignored" else " besides the base"
    implicit = any(source.implicit for source in output.sources) and method.base == "ignored"
    note = " with the base_model, which is not listed and counts as one" if implicit else ""
    report.error(
        output.spot, f"{method.name} takes {wanted} source{'s' * (wanted[-2:] != ' 1')}{besides}, got {count}{note}"
    )


def _check_ends(module: OutputModule, report: Report) -> None:
    """Reject a last slice with more sources than the first: mergekit would leave them out of the last norm and the head."""
    first, last = module.slices[0].sources, module.slices[-1].sources
    if len(last) > len(first):
        used = ", ".join(str(source.ref) for source in last[: len(first)])
        what = f"the last slice has {len(last)} sources and the first {len(first)}"
        what += f", so mergekit would make the last norm and the head of {used} alone"
        fix = "give the first and the last slice equally many sources"
        report.error(module.slices[-1].spot, what, fix, "SLICES_UNEVEN")


def _check_lengths(output: OutputSlice, report: Report) -> None:
    counts = [end - first for first, end in (source.layers for source in output.sources if source.layers)]
    if len(set(counts)) > 1:
        what = f"the layer_range of each source has another length: {', '.join(map(str, counts))}"
        report.error(output.spot, what, "make every layer_range of this slice equally long")


def _check_names(level: Level, method: Method, methods: Mapping[str, Method], report: Report) -> None:
    """Warn of parameters that the method does not have."""
    known = [p.name for p in method.parameters]
    for name, setting in level.settings.items():
        if name in known:
            continue
        owners = [other.name for other in methods.values() if other.parameter(name)]
        if owners:
            what = f"{method.name} does not use {name}{IGNORED}"
            fix = f"it belongs to {', '.join(owners[:3])}; remove it"
            report.warn(setting.spot, what, fix, "IGNORED")
        else:
            fix = did_you_mean(name, [*known, "trim"]) or f"{method.name} has {', '.join(known) or 'no parameters'}"
            report.warn(setting.spot, f"unknown parameter {name}{IGNORED}", fix)


def _check_values(setting: Setting, parameter: Parameter, report: Report) -> None:
    for condition in setting.conditions:
        for value in condition.scalars:
            try:
                coerce(parameter, value)
            except SettingError as refusal:
                report.error(condition.spot, refusal.what, refusal.fix)


def _check_rivals(level: Level, method: Method, report: Report) -> None:
    """Reject two ways to trim on one level. If all conditions have filters, `resolve` checks tensor by tensor."""
    given = [name for name in rivals(method) if name in level.settings and level.settings[name].conditions]
    open_ended = [name for name in given if level.settings[name].always or _last_is_open(level.settings[name])]
    if len(given) > 1 and open_ended:
        spot = level.settings[given[1]].spot
        report.error(
            spot, f"{' and '.join(given)} are both given here", f"keep one of {', '.join(TRIM_RULES)} at a level"
        )


def _last_is_open(setting: Setting) -> bool:
    return any(condition.filter in (None, "*") for condition in setting.conditions)


def _check_source_level(source: Source, output: OutputSlice, method: Method, report: Report) -> None:
    """Check the parameters of one source: valid values, no shared parameters, and none at all for the base."""
    own = source.levels[0] if source.levels and source.levels[0].kind == "source" else None
    is_base = method.base != "ignored" and source.ref == output.base
    for parameter, setting in _given(own, method):
        if parameter.scope == "shared":
            _check_misplaced(parameter, setting, output, method, report)
        elif is_base:
            what = f"ignored, because the base has no {parameter.name} in {method.name}"
            report.warn(setting.spot, what, "remove it", "IGNORED")
        else:
            _check_values(setting, parameter, report)
    for level in output.levels:
        for parameter, setting in _given(level, method):
            _check_values(setting, parameter, report)


def _given(level: Level | None, method: Method) -> Iterator[tuple[Parameter, Setting]]:
    for name, setting in level.settings.items() if level else ():
        parameter = method.parameter(name)
        if parameter:
            yield parameter, setting


def _check_misplaced(
    parameter: Parameter, setting: Setting, output: OutputSlice, method: Method, report: Report
) -> None:
    """Reject a shared parameter under one source, where mergekit ignores it.

    It is only a warning if the value is in force anyway, or if the parameter has no effect at all.
    """
    what = f"{parameter.name} is one value for all sources of {method.name} and is ignored under a single source"
    if parameter.inert:
        report.warn(setting.spot, f"{what}; it has no effect in any place", "remove it", "IGNORED")
    elif _constant(setting.always, parameter) == _in_force(output.levels, parameter):
        report.warn(setting.spot, f"{what}; it has this value anyway", "move it to the recipe's parameters", "IGNORED")
    else:
        report.error(setting.spot, what, "move it to the recipe's parameters, or remove it", "MISPLACED")


def _constant(condition: Condition | None, parameter: Parameter) -> Any:
    """The value of a condition; an object that equals nothing if it is missing, faulty or a gradient."""
    if condition is None or isinstance(condition.value, tuple):
        return object()
    try:
        return coerce(parameter, condition.value)
    except SettingError:
        return object()


def _in_force(levels: Sequence[Level], parameter: Parameter) -> Any:
    setting = next((s for level in levels if (s := level.settings.get(parameter.name))), None)
    return parameter.default if setting is None else _constant(setting.always, parameter)


def _check_required(output: OutputSlice, method: Method, report: Report) -> None:
    """Check that required parameters are set. Filters that miss a tensor are found once tensors are known."""
    for parameter in method.parameters:
        if parameter.default is not REQUIRED:
            continue
        if parameter.scope == "shared":
            if not _is_given(output.levels, parameter):
                what = f"Missing required parameter {parameter.name} of {method.name}"
                report.error(output.spot, what, f"write parameters: {{{parameter.name}: ...}} at the top")
            continue
        for source in output.sources:
            is_base = method.base != "ignored" and source.ref == output.base
            if not is_base and not _is_given(source.levels, parameter):
                _report_missing(source, parameter, method, report)


def _check_together(output: OutputSlice, method: Method, report: Report) -> None:
    """Check that values which hold for every tensor go together; others are checked once tensors are known."""
    sources = [source for source in output.sources if method.base == "ignored" or source.ref != output.base]
    each = [
        {p.name: _in_force(source.levels, p) for p in method.parameters if p.scope == "source"} for source in sources
    ]
    shared = {p.name: _in_force(output.levels, p) for p in method.parameters if p.scope == "shared"}
    if (
        not method.streamed
        or _has_patterns(output)
        or any(type(value) is object for values in (shared, *each) for value in values.values())
    ):
        return
    try:
        method.build(each, shared, range(len(sources)))
    except ValueError as error:
        what, _, fix = str(error).partition("; ")
        report.error(output.spot, what, fix, "PARAM_RANGE")


def _report_missing(source: Source, parameter: Parameter, method: Method, report: Report) -> None:
    what = f"Missing required parameter {parameter.name} for {source.ref}"
    empty = next((s for level in source.levels if (s := level.settings.get(parameter.name)) and not s.conditions), None)
    if empty:
        report.error(empty.spot, "is an empty list", "write a number, a list of numbers, or conditions {value, filter}")
    elif source.implicit:
        what += f", which {method.name} merges although no list names it"
        report.error(source.spot, what, f"list it under models with its {parameter.name}")
    else:
        report.error(source.spot, what, f"write parameters: {{{parameter.name}: ...}} here or at the top")


def _is_given(levels: Sequence[Level], parameter: Parameter) -> bool:
    settings = (level.settings.get(parameter.name) for level in levels)
    return any(setting.conditions for setting in settings if setting)
