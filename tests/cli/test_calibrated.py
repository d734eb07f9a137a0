"""What `quantize --calibrate` says of experts that saw too few tokens."""

import pytest

from blockscale.checkpoint.convert import ConversionReport
from blockscale.checkpoint.rounded import ExpertTokens
from blockscale.cli.conversion import print_report


def layer(number: int, *plain: int) -> ExpertTokens:
    return ExpertTokens(number, 16, 40, 700.0, 512, plain)


def said(capsys, *layers: ExpertTokens, calibrated: int = 1234) -> str:
    report = ConversionReport(
        "src", "dst", "quantize", {"quantize": 1300}, 1000, 500, 1.0, 1,
        calibrated=calibrated, calibration_tokens=65536, calibrated_experts=layers,
    )  # fmt: skip
    print_report(report, as_json=False)
    return " ".join(capsys.readouterr().out.split())


def test_experts_that_saw_too_few_tokens_are_named(capsys):
    out = said(capsys, layer(1), layer(3, 2, 9), layer(4, 5))
    told = "3 experts saw fewer than 512 tokens and were rounded plainly"
    where = "(layer 3: experts 2, 9; layer 4: expert 5)"
    assert f"calibrated 1,234 weights on 65,536 tokens; {told} {where}" in out


def test_long_lists_end_in_dots(capsys):
    out = said(capsys, *(layer(number, *range(9)) for number in range(6)))
    assert "54 experts saw" in out
    assert "layer 3: experts 0, 1, 2, 3, ...; ...)" in out


@pytest.mark.parametrize("layers", [(), (layer(1), layer(2))])
def test_nothing_is_said_where_all_saw_enough(capsys, layers):
    out = said(capsys, *layers)
    assert "calibrated 1,234 weights on 65,536 tokens" in out
    assert "plainly" not in out
    assert "calibrated" not in said(capsys, calibrated=0)
