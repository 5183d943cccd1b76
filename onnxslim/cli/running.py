"""What commands that make a model do: read, run, check, tell, and only then save."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxslim.cli import terminal
from onnxslim.cli.words import DataWords, Job, limits
from onnxslim.errors import OnnxSlimError, SaveError, UsageError

if TYPE_CHECKING:
    from onnxslim.compat.slim import Request
    from onnxslim.engine.base import Pass, Progress
    from onnxslim.engine.pipeline import Report, Result
    from onnxslim.ir.model import Model
    from onnxslim.recipes.data import Batches
    from onnxslim.recipes.recipe import Recipe
    from onnxslim.report.html import Document
    from onnxslim.runtime.metric import Metric
    from onnxslim.validation.verdict import Verdict

REPORTS = (".html", ".json")


def process(
    job: Job,
    words: DataWords,
    chain: Sequence[Pass] = (),
    *,
    recipe: Path | None = None,
    asked: Request | None = None,
) -> Result:
    """Run passes, or a recipe file, on a model.

    Args:
        job, words: options of the command; what was given wins over what the recipe file says.
        chain: the passes, without a recipe file.
        recipe: the recipe file.
        asked: what else OnnxSlim's options ask for.
    """
    _warn_of_rivals()
    _require_places(job, recipe)
    wanted = _recipe(job, words, chain, recipe)
    if job.save_recipe is not None and asked is not None:
        _require_in_recipe(asked)
    from onnxslim.ir.model import load

    model = load(job.source)
    for note in asked.notes if asked else ():
        terminal.log(f"warning: {note}")
    model = asked.edit(model) if asked else model
    opened = wanted.data.read(model) if wanted.data else None
    metric = named_metric(job.metric)
    for note in opened.notes if opened else ():
        terminal.note(note, job.quiet)
    with terminal.progress(job.quiet) as progress:
        result = _rewritten(job, wanted, model, opened, metric, asked, progress)
        verdict = _verdict(job, wanted, model, result, opened, metric, progress)
    _warn_of_idle_passes(result.report, job.quiet)
    told = _document(job, wanted, model, result, opened, verdict)
    _tell(job, told)
    if verdict is not None:
        verdict.require(**wanted.check)
    _save(job, wanted, model, result, told)
    return result


def _recipe(job: Job, words: DataWords, chain: Sequence[Pass], file: Path | None) -> Recipe:
    from onnxslim.recipes.recipe import Recipe

    check = limits(job.check)
    if file is None:
        return Recipe(passes=tuple(chain), data=words.source(), check=dict(check), **job.settings())
    base = Recipe.load(file)
    return replace(base, data=words.source(base.data), check={**base.check, **check}, **job.settings())


def _rewritten(
    job: Job,
    recipe: Recipe,
    model: Model,
    opened: Batches | None,
    metric: Metric | None,
    asked: Request | None,
    progress: Progress | None,
) -> Result:
    feeds = asked.feeds(model) if asked else None
    data: Any = opened.data if opened else None
    result = recipe.rewrite(
        model,
        data if feeds is None else [feeds],
        libraries=job.custom_ops or (),
        jobs=job.jobs,
        progress=progress,
        metric=metric or (opened.metric if opened else None),
    )
    return asked.finish(model, result, feeds) if asked else result


def _verdict(
    job: Job,
    recipe: Recipe,
    model: Model,
    result: Result,
    opened: Batches | None,
    metric: Metric | None,
    progress: Progress | None,
) -> Verdict | None:
    """Figures for the requirements, and for a report; where only a report wants them, they may be missing."""
    if not recipe.check and job.report is None:
        return None
    from onnxslim.runtime.targets import Target
    from onnxslim.validation.compare import validate

    try:
        return validate(
            model,
            result.model,
            opened.data if opened else None,
            [Target.named(recipe.target).with_libraries(job.custom_ops or ())],
            labels=opened.labels if opened else None,
            metric=metric,
            rounds=30 if job.report or "latency" in recipe.check else 0,
            progress=progress,
        )
    except OnnxSlimError as error:
        if recipe.check:
            raise
        terminal.log(f"warning: the report has no comparison of the models: {error}")
        return None


def named_metric(name: str | None) -> Metric | None:
    """What --metric names."""
    from onnxslim.recipes import data

    return None if name is None else data.metric(name)


def _document(
    job: Job,
    recipe: Recipe,
    model: Model,
    result: Result,
    opened: Batches | None,
    verdict: Verdict | None,
) -> Document:
    """All there is to tell; the layers are looked at only for a report that is kept."""
    from onnxslim.report import html

    settings = recipe.to_dict()
    if job.report is None:
        return html.brief(model, result.model, result.report, verdict, recipe=settings)
    data = opened.data if opened else None
    return html.document(model, result.model, result.report, verdict, recipe=settings, data=data)


def _tell(job: Job, told: Document) -> None:
    for shown in (told.report, told.verdict):
        if shown is not None and not job.json:
            terminal.show(shown, job.quiet)
    if job.json:
        print(told.to_json())
    if told.verdict is not None:
        warn_of_made_up_inputs(told.verdict)


def _save(job: Job, recipe: Recipe, model: Model, result: Result, told: Document) -> None:
    from onnxslim.formats import size

    if job.save_recipe is not None:
        recipe.save(job.save_recipe)
    if job.output is None:
        terminal.note("nothing was saved: give OUT to save the result", job.quiet)
    else:
        result.save(job.output, external_data=True if job.external_data else None)
        before, after = model.stats().bytes, result.model.stats().bytes
        terminal.note(
            f"saved {job.output}: {size(after)}, {100 * after / before:.1f} % of {size(before)}", job.quiet
        )
    if job.report is not None:
        told.save(job.report)


# ------------------------------------------------------------------------------------ before any work


def _require_places(job: Job, recipe: Path | None) -> None:
    """Fail early if a file could not be written in the end, or would replace another one."""
    taken: Mapping[Path, str] = {
        path.resolve(): what
        for path, what in ((job.source, "the model"), (job.output, "the model"), (recipe, "the recipe"))
        if path is not None
    }
    if job.save_recipe is not None and job.save_recipe.resolve() in taken:
        raise UsageError(
            f"--save-recipe {job.save_recipe} would overwrite {taken[job.save_recipe.resolve()]}"
        )
    require_report(job.report, taken)
    for path in (job.output, job.save_recipe):
        if path is not None:
            _require_writable(path)


def require_report(path: Path | None, taken: Mapping[Path, str]) -> None:
    """Fail early if a report could not be written, or would replace one of these files, called so."""
    if path is None:
        return
    if path.resolve() in taken:
        raise UsageError(f"--report {path} would overwrite {taken[path.resolve()]}")
    if path.suffix not in REPORTS:
        raise UsageError(f"--report {path}: a report is an .html or a .json file")
    _require_writable(path)


def _require_in_recipe(asked: Request) -> None:
    named = ("input_shapes", "inputs", "outputs", "size_threshold", "model_check", "model_check_inputs")
    for name in named:
        if getattr(asked, name):
            raise UsageError(f"--save-recipe: a recipe cannot hold --{name.replace('_', '-')}")


def _warn_of_rivals() -> None:
    """Say so if this package shares its name, and maybe its files, with another one."""
    from importlib.metadata import packages_distributions

    owners = sorted(set(packages_distributions().get("onnxslim", ())))
    if len(owners) > 1:
        terminal.log(
            f"warning: {' and '.join(owners)} both install the package 'onnxslim'; uninstall all of them, "
            "then install the one you want"
        )


def _warn_of_idle_passes(report: Report, quiet: bool) -> None:
    from onnxslim.report.text import outcome

    for step in report.steps:
        for skip in step.changes.skipped:
            if skip.warning:
                terminal.log(f"warning: pass {step.name}, '{skip.node}': {skip.reason}")
        line = outcome(step)
        if step.error:
            terminal.log(f"warning: pass {step.description} {line}")
        elif line:
            terminal.note(f"pass {step.description} {line}", quiet)


def warn_of_made_up_inputs(verdict: Verdict) -> None:
    if verdict.made_up:
        terminal.log(
            "warning: the models were compared on made-up inputs; give --data to compare them on real ones"
        )


def _require_writable(path: Path) -> None:
    """Fail before any work is done if a file could not be written in the end."""
    folder = path.absolute().parent
    if path.is_dir():
        raise SaveError(f"cannot write '{path}': it is a folder")
    if not folder.is_dir():
        raise SaveError(f"cannot write '{path}': there is no folder '{folder}'")
    if not os.access(folder, os.W_OK):
        raise SaveError(f"cannot write '{path}': the folder '{folder}' is not writable")
