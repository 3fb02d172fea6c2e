"""The page about irregular series says what is true."""

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "series.md").read_text(encoding="utf-8")


def test_the_examples_run():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(block, names)
    assert names["curves"].shape == (8, 50, 3)
    assert names["solution"].converged.all()
