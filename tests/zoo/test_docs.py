"""The page about the zoo says what is true."""

import re

from restpoint.zoo.cli import _parser
from restpoint.zoo.files import PACKAGE_CHECKPOINTS

PAGE = (PACKAGE_CHECKPOINTS.parent / "docs" / "zoo.md").read_text()


def test_the_examples_run(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(block, names)
    assert names["model"].get_classifier().out_features == 5
    assert names["backbone"].feature_info.channels() == [64, 128, 256]


def test_the_commands_are_understood():
    for line in re.findall(r"^restpoint (.*)$", PAGE, flags=re.M):
        assert _parser().parse_args(line.replace("'", "").split()).run
