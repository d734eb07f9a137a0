"""The pages of the commands: which sections each has the data for."""

from __future__ import annotations

from collections.abc import Sequence

from blockscale.checkpoint.convert import ConversionReport
from blockscale.evaluate.compare import WindowScore
from blockscale.evaluate.diagnose import Diagnosis
from blockscale.evaluate.run import Evaluation
from blockscale.qat.history import TrainingResult
from blockscale.report import diagnosis, evaluation, provenance, search, sizes, training
from blockscale.report.content import Code, Facts, Note, Page, Section
from blockscale.report.histogram import read_histograms
from blockscale.report.wording import spelled
from blockscale.search.run import SearchResult
from blockscale.version import __version__
from blockscale.wording import size


def quantize_page(report: ConversionReport, revision: str | None = None) -> Page:
    """What a conversion made, and of what.

    Args:
        report: what `quantize_checkpoint` returned.
        revision: of the source, a Hub repository.
    """
    before, after = sizes.counts_of(report.source, revision), sizes.counts_of(report.destination)
    small, large = sizes.total(after), sizes.total(before)
    entries = [
        ("before", size(large), report.source),
        ("after", size(small), f"{large / small:.2f} times smaller" if small else ""),
        ("quantized", f"{report.tensors.get('quantize', 0):,}", "tensors"),
        ("kept as they were", f"{report.tensors.get('copy', 0):,}", "tensors"),
    ]
    if not report.already_complete:
        rate = f"{size(report.input_bytes / report.seconds)}/s" if report.seconds > 0 else ""
        entries.append(("time", f"{report.seconds:,.1f} s", rate))
    sections = [
        _warnings(report.warnings),
        sizes.section(before, after),
        provenance.recipe_section(report.destination),
        provenance.files_section(report.destination),
        provenance.versions_section(("torch", "safetensors")),
    ]
    return _page(f"Quantized: {report.destination}", Facts(tuple(entries)), sections)


def evaluate_page(result: Evaluation, windows: Sequence[WindowScore], revision: str | None = None) -> Page:
    """Figures of a model, alone or against a reference.

    Args:
        result: the figures.
        windows: those of each window.
        revision: of the model, a Hub repository.
    """
    loading = {key: value for key, value in result.loading.items() if key in _LOADING and value}
    sections = [
        evaluation.text_section(result, windows),
        evaluation.task_section(result.tasks) if result.tasks else None,
        evaluation.gemm_section(result.gemms) if result.gemms else None,
        *_model_sections(result.model, result.reference, revision),
        provenance.versions_section(("torch", "transformers"), loading),
    ]
    against = "" if result.reference is None else f" against {result.reference}"
    return _page(f"Evaluated: {result.model}{against}", evaluation.summary(result), sections)


def diagnose_page(result: Diagnosis, model: str, reference: str) -> Page:
    """What is wrong with a checkpoint, what is lost where, and the worst tensors; these are read again."""
    histograms = read_histograms(model, reference, diagnosis.worst_names(result))
    kept = spelled({"exclude": list(result.keep)})
    advice = (Code("Recipe that keeps the costliest, for --recipe", kept),) if result.keep else ()
    costs = any(tensor.cost is not None for tensor in result.tensors)
    sections = [
        *diagnosis.sections(result, histograms),
        *_model_sections(model, reference, None, *advice),
        provenance.versions_section(("torch", "transformers") if costs else ("torch",)),
    ]
    return _page(f"Diagnosed: {model} against {reference}", diagnosis.summary(result), sections)


def search_page(result: SearchResult) -> Page:
    """What a search looked at and what it chose."""
    sections = [
        _warnings(result.warnings),
        search.curve_section(result),
        search.costs_section(result.units),
        search.units_section(result.units) if result.units else None,
        Section("Recipe", (Code("Recipe, for --recipe", spelled(result.recipe)),)),
        provenance.versions_section(("torch", "transformers")),
    ]
    return _page(f"Searched: {result.model}", search.summary(result), sections)


def train_page(result: TrainingResult) -> Page:
    """What a training did, step by step, and what became of the checkpoint."""
    quantized = result.training["recipe"] is not None
    sections = [
        training.course_section(result),
        training.options_section(result),
        sizes.section(sizes.counts_of(result.training["model"]), sizes.counts_of(result.out)),
        provenance.recipe_section(result.out) if quantized else None,
        provenance.files_section(result.out),
        provenance.versions_section(("torch", "transformers")),
    ]
    return _page(f"Trained: {result.out}", training.summary(result), sections)


_LOADING = ("runtime", "device", "dtype", "compute", "precision")


def _model_sections(
    model: str, reference: str | None, revision: str | None, *advice: Code
) -> list[Section | None]:
    before = None if reference is None else sizes.counts_of(reference)
    return [
        sizes.section(before, sizes.counts_of(model, revision)),
        provenance.recipe_section(model, revision, *advice),
        provenance.files_section(model, revision),
    ]


def _warnings(texts: Sequence[str]) -> Section | None:
    return Section("Warnings", tuple(Note(text, warning=True) for text in texts)) if texts else None


def _page(title: str, summary: Facts, sections: Sequence[Section | None]) -> Page:
    return Page(title, summary, tuple(section for section in sections if section is not None), __version__)
