"""Results as the commands have them, made up but for their types."""

from blockscale.evaluate.compare import WindowScore, summarize
from blockscale.evaluate.diagnose import rank
from blockscale.evaluate.run import Evaluation, Text
from blockscale.evaluate.sensitivity import Sensitivity
from blockscale.evaluate.tasks.answers import TaskScore
from blockscale.evaluate.windows import Estimate
from blockscale.ops import GemmRecord
from blockscale.ops.gemm_audit_records import Codes, Deviation, Peak
from blockscale.search.costs import Cost
from blockscale.search.run import Point, SearchResult, UnitChoice

WINDOWS = [
    WindowScore(
        begin=64 * number, tokens=63, nll=200.0 + number, reference_nll=199.0, kl=0.5 + number, agreed=60
    )
    for number in range(5)
]
LOADING = {"runtime": "auto", "device": "cpu", "dtype": "torch.float32", "precision": []}


def evaluation(model="fp8", reference="plain", windows=WINDOWS):
    if reference is None:
        windows = [WindowScore(each.begin, each.tokens, each.nll) for each in windows]
    text = Text("text.txt", context=64, stride=64)
    return Evaluation(model, reference, text, LOADING, summarize(windows))


def costed(problems, tensors):
    """A diagnosis in which the first tensors cost less and less."""
    modules = list(dict.fromkeys(each.name.removesuffix(".weight") for each in tensors))
    costs = [Sensitivity(name, 10.0 ** (-1 - place), 20.0 + place) for place, name in enumerate(modules)]
    return rank(problems, tensors, costs)


def gemm(site):
    """Of a GEMM whose weight's source is not known."""
    peak = Peak(0.25, (1, 2), 1.0, None, 3)
    close, far = Deviation(4, 1e-9, 3, 1e-10, 0, peak), Deviation(4, 7e-4, 2, 6e-4, 0, peak)
    codes = Codes(200, 50, 1, 0, 100, 2, 3, 0, 12.5)
    return GemmRecord(site, "fp8_gemm_nt", None, 256, 128, 4, 40, 10, close, far, None, None, codes)


_ESTIMATES = [Estimate.around(value, 0.01, 100) for value in (0.61, 0.62, -0.01)]
TASKS = (
    TaskScore(
        task="arc_easy",
        metric="acc",
        questions=100,
        shots=0,
        shots_from_questions=False,
        score=_ESTIMATES[0],
        reference=_ESTIMATES[1],
        difference=_ESTIMATES[2],
    ),
    TaskScore("gsm8k", "exact_match,strict-match", 50, 5, shots_from_questions=True, score=_ESTIMATES[0]),
)


POINTS = (
    Point("small", 1_000_000_000, 0.2, 0.21),
    Point("beaten", 1_500_000_000, 0.3),
    Point("middle", 1_200_000_000, 0.1),
    Point("large", 2_000_000_000, 0.0),
)
UNITS = tuple(
    UnitChoice(
        name=f"model.layers.{number}.mlp.gate_proj+up_proj",
        role="dense_mlp",
        tensors=2,
        format="bf16" if number == 2 else "fp8",
        source_bytes=500_000_000,
        costs=(
            Cost("fp8", 250_000_000, 0.01 * (number + 1), 0.01 * (number + 1), 31.0),
            Cost("fp8:1x128", 260_000_000, 0.05 - 0.01 * number, 0.06, 32.0),
        ),
    )
    for number in range(4)
)


def search_result(units=UNITS, measured=None, warnings=()):
    """Of 2 GB, for 1.3 GB at most."""
    recipe = {"precision": {"default": "fp8", "model.layers.2.mlp.*": "bf16"}}
    return SearchResult(
        model="model",
        source_bytes=2_000_000_000,
        target_bytes=1_300_000_000,
        sequences=2,
        tokens=512,
        chosen=POINTS[2],
        bound_kl=0.1,
        measured=measured,
        points=POINTS,
        units=units,
        recipe=recipe,
        warnings=warnings,
    )
