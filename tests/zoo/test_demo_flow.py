"""The demonstration's second part draws what pretrained flows learned."""

from PIL import Image

from restpoint.zoo import demo_flow


def test_it_draws_and_says_how_good_a_flow_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_flow, "GRID", 24)
    monkeypatch.setattr(demo_flow, "SAMPLES", 20)
    demo_flow.main(tmp_path / "new" / "flow.png", demo_flow.NAMES[:1])
    said = capsys.readouterr().out
    assert "ffjord_small.checkerboard: 9,224 parameters" in said
    assert "the true density's own 3.466" in said
    assert str(tmp_path) in said
    with Image.open(tmp_path / "new" / "flow.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(maxcolors=2**20)) > 50
