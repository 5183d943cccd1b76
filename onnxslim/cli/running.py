"""What commands that make a model do: a recipe out of words, run; the result told, and only then saved."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim.cli import guard, terminal
from onnxslim.cli.words import DataWords, ModelWords, ReportFile, limits, plug
from onnxslim.errors import OnnxSlimError, SaveError, UsageError, ValidationError
from onnxslim.report import require_form
from onnxslim.runtime import isolated

if TYPE_CHECKING:
    from onnxslim.compat.slim import Request
    from onnxslim.engine.base import Pass
    from onnxslim.engine.pipeline import Report
    from onnxslim.recipes.data import Batches, Data
    from onnxslim.recipes.recipe import Outcome, Recipe
    from onnxslim.report.html import Document
    from onnxslim.runtime.metric import Metric
    from onnxslim.validation.verdict import Verdict


def process(
    job: ModelWords,
    words: DataWords,
    chain: Sequence[Pass] = (),
    *,
    recipe: Path | None = None,
    trust: bool = False,
    asked: Request | None = None,
    save_plan: Path | None = None,
    input_shapes: Sequence[str] = (),
) -> Outcome:
    """Run passes, or a recipe file, on a model.

    Args:
        job, words: options of the command; what was given wins over what the recipe file says.
        chain: the passes, without a recipe file.
        recipe: the recipe file.
        trust: whether that may name files outside its folder.
        asked: what else OnnxSlim's options ask for.
        save_plan: where the plan of the last pass that has one goes.
        input_shapes: sizes to count for, in words.
    """
    _warn_of_rivals()
    plug(job.ep_library)
    _require_places(job, recipe, save_plan)
    require_sheet(words)
    isolated.start()
    wanted = _recipe(job, words, chain, recipe, trust, input_shapes)
    _require_keepable(job, wanted, asked)
    for note in asked.notes if asked else ():
        terminal.log(f"warning: {note}")
    outcome = _run(job, words, wanted, asked)
    if outcome.unmeasured:
        terminal.log(f"warning: the report has no comparison of the models: {outcome.unmeasured}")
    _warn_of_doubtful_results(outcome, job.quiet)
    told = outcome.document(layers=bool(job.reports())) if job.json or job.reports() else None
    _tell(job, outcome, told)
    _save(job, wanted, outcome, told, save_plan)
    return outcome


def _recipe(
    job: ModelWords,
    words: DataWords,
    chain: Sequence[Pass],
    file: Path | None,
    trust: bool,
    input_shapes: Sequence[str],
) -> Recipe:
    from onnxslim.recipes.recipe import Recipe
    from onnxslim.shapes.given import by_name

    base = Recipe(passes=tuple(chain)) if file is None else Recipe.load(file, trust=trust)
    data = words.source(base.data)
    return replace(
        base,
        data=data,
        test=_test(job, data) or base.test,
        check={**base.check, **limits(job.check)},
        input_shapes={**base.input_shapes, **by_name(input_shapes)},
        **job.settings(),
    )


def _test(job: ModelWords, data: Data | None) -> Data | None:
    """What --test names, read as the data is."""
    if job.test is None:
        return None
    if data is None:
        raise UsageError("--test says nothing without --data")
    return replace(data, path=job.test)


def _run(
    job: ModelWords,
    words: DataWords,
    recipe: Recipe,
    asked: Request | None,
) -> Outcome:
    from onnxslim.recipes.recipe import Work

    metric = named_metric(job.metric)
    libraries = tuple(job.custom_ops or ())
    reported, journal = bool(job.reports()), guard.journal
    work = Work(recipe, job.source, libraries, job.jobs, metric, reported, journal, job.simulate)
    feeds = asked.feeds(work.original) if asked else None
    if feeds is not None:
        work.feed([feeds])
    tell_data(work.opened, words, job.quiet)
    with terminal.progress(job.quiet, None if job.quiet else work.forecast()) as progress:
        outcome = work.run(progress)
    if asked is None:
        return outcome
    return replace(outcome, report=asked.checked(outcome.original, outcome.model, outcome.report, feeds))


def require_sheet(words: DataWords) -> None:
    """Fail early if the picture of the inputs could not be written."""
    if words.show_inputs is not None:
        require_writable(words.show_inputs)


def tell_data(opened: Batches | None, words: DataWords, quiet: bool) -> None:
    """Say how the data was understood, and show it if that was asked for."""
    for note in opened.notes if opened else ():
        terminal.note(note, quiet)
    if opened and words.show_inputs:
        terminal.note(f"{words.show_inputs}: {opened.show(words.show_inputs)}", quiet)


def named_metric(name: str | None) -> Metric | None:
    """What --metric names."""
    from onnxslim.recipes import data

    return None if name is None else data.metric(name)


def _tell(job: ModelWords, outcome: Outcome, told: Document | None) -> None:
    if job.json and told is not None:
        print(told.to_json())
    else:
        for shown in (outcome.report, outcome.verdict):
            if shown is not None:
                terminal.show(shown, job.quiet)
    if outcome.verdict is not None:
        warn_of_made_up_inputs(outcome.verdict)


def _save(
    job: ModelWords, recipe: Recipe, outcome: Outcome, told: Document | None, plan: Path | None
) -> None:
    """Save all that was asked for; a file that cannot be written takes none of the others with it.

    Raises:
        ValidationError: the result is not what it has to be; only the report, which says so, is saved.
        OnnxSlimError, OSError: what could not be written.
    """
    failed: list[OnnxSlimError | OSError] = []

    def attempt(save: Callable[[], None]) -> None:
        try:
            save()
        except (OnnxSlimError, OSError) as error:
            failed.append(error)

    if told is not None:
        for each in job.reports():
            attempt(partial(told.save, each.path, each.form))
    try:
        outcome.require()
    except ValidationError:
        _log_all(failed)
        raise
    attempt(lambda: _save_model(job, outcome))
    if job.save_recipe is not None:
        kept = job.save_recipe
        attempt(lambda: recipe.save(kept))
    if plan is not None:
        place = plan
        attempt(lambda: _save_plan(outcome.report, place))
    _log_all(failed[1:])
    if failed:
        raise failed[0]


def _log_all(errors: Sequence[Exception]) -> None:
    for error in errors:
        terminal.log(f"error: {error}")


def _save_model(job: ModelWords, outcome: Outcome) -> None:
    from onnxslim.formats import size

    if job.output is None:
        terminal.note("nothing was saved: give OUT to save the result", job.quiet)
        return
    outcome.save(job.output, external_data=True if job.external_data else None)
    before, after = outcome.original.stats().bytes, outcome.model.stats().bytes
    terminal.note(
        f"saved {job.output}: {size(after)}, {100 * after / before:.1f} % of {size(before)}", job.quiet
    )
    left = outcome.save_check(job.output)
    if left is not None:
        target, files = outcome.target.stands_for, f"{job.output.name}, {left.name} and {left.stem}.npz"
        call = f"onnxslim validate --resume {shlex.quote(left.name)}"
        terminal.note(
            f"to check it on {target}, take {files} there: {call}",
            job.quiet,
        )


def _save_plan(report: Report, path: Path) -> None:
    from onnxslim.engine.plans import PassPlan
    from onnxslim.ir.files import write_text

    told = [getattr(step.changes.figures, "plan", None) for step in report.steps]
    plans = [plan for plan in told if isinstance(plan, PassPlan)]
    if not plans:
        raise UsageError("--save-plan: nothing was changed, so there is no plan")
    write_text(path, plans[-1].to_json())


# ------------------------------------------------------------------------------------ before any work


def _require_places(job: ModelWords, recipe: Path | None, plan: Path | None) -> None:
    """Fail early if a file could not be written in the end, or would replace another one."""
    taken: Mapping[Path, str] = {
        path.resolve(): what
        for path, what in ((job.source, "the model"), (job.output, "the model"), (recipe, "the recipe"))
        if path is not None
    }
    for word, file in (("--save-recipe", job.save_recipe), ("--save-plan", plan)):
        if file is not None and file.resolve() in taken:
            raise UsageError(f"{word} {file} would overwrite {taken[file.resolve()]}")
    require_reports(job.reports(), taken)
    for path in (job.output, job.save_recipe, plan):
        if path is not None:
            require_writable(path)


def require_reports(reports: Sequence[ReportFile], taken: Mapping[Path, str]) -> None:
    """Fail early if a report could not be written, or would replace another, or one of these files."""
    used = dict(taken)
    for each in reports:
        place = each.path.resolve()
        if place in used:
            raise UsageError(f"{each.word} {each.path} would overwrite {used[place]}")
        used[place] = f"the report of {each.word}"
        require_form(each.path, each.form)
        require_writable(each.path)


def _require_keepable(job: ModelWords, recipe: Recipe, asked: Request | None) -> None:
    """Fail early if --save-recipe could not keep all that is asked for."""
    if job.save_recipe is None:
        return
    for name in ("model_check", "model_check_inputs"):
        if asked is not None and getattr(asked, name):
            raise UsageError(f"--save-recipe: a recipe cannot hold --{name.replace('_', '-')}")
    recipe.text(job.save_recipe.absolute().parent)


def _warn_of_rivals() -> None:
    """Say so if this package shares its name, and maybe its files, with another one."""
    from importlib.metadata import packages_distributions

    owners = sorted(set(packages_distributions().get("onnxslim", ())))
    if len(owners) > 1:
        terminal.log(
            f"warning: {' and '.join(owners)} both install the package 'onnxslim'; uninstall all of them, "
            "then install the one you want"
        )


def _warn_of_doubtful_results(outcome: Outcome, quiet: bool) -> None:
    # What ends the command is told at its end, and once.
    ending = {id(step) for step in outcome.undone if outcome.recipe.on_error != "keep"}
    for step in outcome.report.steps:
        for skip in step.changes.skipped:
            if skip.warning:
                terminal.log(f"warning: pass {step.name}, '{skip.node}': {skip.reason}")
        if step.outcome and not step.error and id(step) not in ending:
            terminal.note(f"pass {step.description} {step.outcome}", quiet)
    for warning in outcome.report.warnings:
        terminal.log(f"warning: {warning}")


def warn_of_made_up_inputs(verdict: Verdict) -> None:
    if verdict.made_up:
        terminal.log(
            "warning: the models were compared on made-up inputs; give --data to compare them on real ones"
        )


def make_folder(path: Path) -> None:
    """Make a folder for what will be written, if it is not there.

    Raises:
        SaveError: it cannot be made, or nothing can be written there.
    """
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder '{path}': {error.strerror or error}") from None
    require_writable(path / "figures.json")


def require_writable(path: Path) -> None:
    """Fail before any work is done if a file could not be written in the end."""
    folder = path.absolute().parent
    if path.is_dir():
        raise SaveError(f"cannot write '{path}': it is a folder")
    if not folder.is_dir():
        raise SaveError(f"cannot write '{path}': there is no folder '{folder}'")
    try:
        # Rights alone do not tell: a file system may be read-only, full, or not one of files at all.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        raise SaveError(f"cannot write '{path}': the folder '{folder}' is not writable ({why})") from None
