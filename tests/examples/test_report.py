"""The page on CamVid results: its parts on results made up here, the whole on two real frames."""

import copy
import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import shell
from examples.camvid import common, data, evaluate, frontier, leavers, page, report
from examples.camvid.leavers import Outcome, Tally, Tokens
from tests.examples.strips import CAMVID, TOKENS, needs_data
from tokenexit import TokenExitError

NASTY = '<script>alert("x")</script> & $\\frac{ $ _'


def entry(kind: str, miou: float, work: float, sky: float | None = 0.9) -> dict[str, object]:
    iou = dict.fromkeys(data.CLASSES, miou) | {"Sky": sky}
    return {"kind": kind, "schedule": {}, "miou": miou, "iou": iou, "miou_by_sequence": {"Seq": miou},
            "token_blocks": work, "multiply_adds": 1e10 * work, "agreement": 0.99}  # fmt: skip


def timed(device: str, **speeds: float) -> dict[str, object]:
    return {
        "conditions": {"rounds": 3, "images": 4, "threads": 2, "device": device},
        "settings": {
            name.replace("_", " "): {"images_per_second": [value - 1, value, value + 1], "speedup": [1.0, value / 5, 3.0]}
            for name, value in speeds.items()
        },
    }  # fmt: skip


def made_up(**timing: dict[str, object]) -> dict[str, object]:
    return {
        "schema": 1,
        "inputs": {"model": "net", "sha256": "abc", "split": "val", "images": 2, "fit_after": [6], "fit_images": None,
                   "fit_steps": 9, "device": "cpu"},
        "fit": None,
        "about": {"arguments": ["--data", "here"], "versions": {"torch": "9.9"}, "device": "cpu", "dtype": "float32",
                  "threads": 2, "cores": 2, "patch_tokens": 4, "blocks": 12},
        "settings": {
            "dense": entry("dense", 0.7, 1.0),
            "truncated 6": entry("truncated", 0.60, 0.5),
            "truncated 8": entry("truncated", 0.68, 0.66),
            "cells 0.8": entry("neighbours, cells of 3, exits 6:1", 0.71, 0.62, sky=0.86),
        },
        "timing": timing,
    }  # fmt: skip


def tokens() -> Tokens:
    """One image of 2 x 4 patches: each outcome once among those that left after 6, and three that did not."""
    return Tokens(
        exiting=torch.tensor([[[1, 2, 3, 4], [5, 6, 7, 8]]]),
        dense=torch.tensor([[[1, 2, 0, 0], [0, 0, 7, 8]]]),
        truth=torch.tensor([[[1, 0, 0, 4], [9, 0, 7, data.IGNORE]]]),
        depth=torch.tensor([[[6, 6, 6, 6], [6, 12, 12, 8]]]),
    )


def content(files: dict[str, dict[str, object]], file: str, setting: str) -> page.Content:
    found, shape = tokens(), (16, 32)
    one = torch.arange(16 * 32).reshape(shape) % 12
    picture = leavers.Picture(f"frame {NASTY}", np.full((*shape, 3), 200, np.uint8), one, one % 11, one % 7, at=0)
    return page.Content(files=files, file=file, setting=setting, split="val", blocks=12,
                        tallies=leavers.tally(found, (6, 8, 12)), tokens=found, pictures=(picture,))  # fmt: skip


class Reader(HTMLParser):
    """Refuses tags that do not match, and gathers what there is."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_tokens_are_counted_by_exit_and_by_who_is_right() -> None:
    found = tokens().outcome[0]
    expected = [Outcome.AS_DENSE, Outcome.BOTH_WRONG, Outcome.LOST, Outcome.GAINED,
                Outcome.OTHER, Outcome.LOST, Outcome.AS_DENSE, Outcome.AS_DENSE]  # fmt: skip
    assert found.flatten().tolist() == expected
    assert leavers.tally(tokens(), (6, 8, 12)) == (
        Tally(after=6, tokens=5, changed=3, lost=1, gained=1),
        Tally(after=8, tokens=1, changed=0, lost=0, gained=0),
        Tally(after=12, tokens=2, changed=1, lost=1, gained=0),
    )


def test_another_class_where_there_is_no_label_is_neither_right_nor_wrong() -> None:
    one = torch.tensor([[[3]]])
    found = Tokens(exiting=one, dense=one + 1, truth=torch.full_like(one, data.IGNORE), depth=one)
    assert found.outcome.item() == Outcome.OTHER


def test_a_patch_has_the_label_of_most_of_its_pixels() -> None:
    label = torch.tensor([[[1, 1, 11, 11], [2, 3, 11, 5], [4, 4, 7, 11], [2, 2, 11, 7]]])
    assert leavers.majority(label, (2, 2)).tolist() == [[[1, 11], [2, 7]]]


def test_the_exit_table_has_shares_of_the_row_and_of_all() -> None:
    reader = Reader(page.exit_table(leavers.tally(tokens(), (6, 8, 12)), 12))
    rows = [reader.text[start : start + 5] for start in range(4, len(reader.text), 5)]
    assert rows == [
        ["left after 6", "5 (62.50 %)", "3 (60.00 %)", "1 (20.00 %)", "1 (20.00 %)"],
        ["left after 8", "1 (12.50 %)", "0 (0.00 %)", "0 (0.00 %)", "0 (0.00 %)"],
        ["ran all 12", "2 (25.00 %)", "1 (50.00 %)", "1 (50.00 %)", "0 (0.00 %)"],
        ["all", "8 (100.00 %)", "4 (50.00 %)", "2 (25.00 %)", "1 (12.50 %)"],
    ]
    assert "0 (" not in page.exit_table([Tally(6, 0, 0, 0, 0)], 12).split("left after 6")[1]


def test_wrong_tokens_are_told_apart_by_colour_and_the_others_stay_grey() -> None:
    photo = np.tile(np.array([10, 100, 190], np.uint8), (8, 48, 1))
    drawn = page.wrong_map(photo, torch.tensor([[-1, 0, 1, 2, 3, 4]]))
    assert (drawn.reshape(8, 6, 8, 3).std(axis=(0, 2)) == 0).all()
    colours = [tuple(drawn[4, 8 * at + 4].tolist()) for at in range(6)]
    assert colours[0] == (55, 55, 55)
    assert len(set(colours)) == 6
    red, _, blue = colours[1 + Outcome.LOST]
    assert red > 2 * blue
    red, _, blue = colours[1 + Outcome.GAINED]
    assert blue > 2 * red


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ({"truncated 6": 0.60, "truncated 8": 0.66}, "truncated 8"),  # both near: the better
        ({"truncated 6": 0.50, "truncated 8": 0.90}, "truncated 6"),  # neither: the nearer
        ({"truncated 6": 0.60, "truncated 8": 0.90}, "truncated 6"),
        ({}, None),
    ],
)
def test_a_setting_stands_beside_a_truncation_of_its_cost(work: dict[str, float], expected: str | None) -> None:
    results = made_up()
    for name in ("truncated 6", "truncated 8"):
        if name in work:
            results["settings"][name]["multiply_adds"] = 1e10 * work[name]
        else:
            del results["settings"][name]
    assert frontier.truncation_beside(results, "cells 0.8") == expected


def test_classes_are_compared_with_dense() -> None:
    results = made_up()
    results["settings"]["truncated 8"]["iou"]["Sky"] = None
    table = page.class_table(results, "cells 0.8")
    sky, building = (table.split(f"</i>{name}</td>")[1].split("</tr>")[0] for name in ("Sky", "Building"))
    assert sky == ('<td>90.00</td><td>-</td><td>-</td><td>86.00</td><td class="down" style="--strength:80%">-4.00</td>')
    assert building.endswith('<td class="up" style="--strength:20%">+1.00</td>')
    assert Reader(table).text.count("truncated 8") == 1
    assert "cells" not in page.class_table(results, "dense")


def drawn(files: dict[str, dict[str, object]], **options: object) -> Image.Image:
    file = io.BytesIO()
    frontier.draw(files, file, **options)
    return Image.open(file)


def test_the_frontier_has_a_panel_for_work_and_one_for_each_batch_and_device() -> None:
    one = made_up(**{"1": timed("cpu", dense=5.0, cells_0=9.0)})
    two = made_up(**{"1": timed("gpu", dense=50.0), "8": timed("gpu", dense=80.0)})
    found = frontier.panels({"one": one, "two": two}, ["multiply_adds"])
    assert {label: list(by_file) for label, by_file in found.items()} == {
        "multiply-adds per image, 10⁹": ["one", "two"],
        "images/s, batch 1 (cpu, threads: 2)": ["one"],
        "images/s, batch 1 (gpu, threads: 2)": ["two"],
        "images/s, batch 8 (gpu, threads: 2)": ["two"],
    }
    assert found["multiply-adds per image, 10⁹"]["one"]["cells 0.8"] == (pytest.approx(6.2), pytest.approx(71.0))
    assert found["images/s, batch 1 (cpu, threads: 2)"]["one"] == {"dense": (5.0, 70.0)}  # cells 0 has no accuracy
    wide, narrow = drawn({"one": one, "two": two}), drawn({"one": made_up()})
    assert wide.width == 4 * narrow.width


@pytest.mark.parametrize("kind", ["neighbours, cells of 5, exits 6:1", "found", "something new", NASTY])
def test_every_kind_is_drawn_whatever_its_name(kind: str) -> None:
    results = made_up()
    results["settings"]["one more"] = entry(kind, 0.65, 0.9)
    added = np.asarray(drawn({"net": results}).convert("RGB")).astype(int)
    moved = copy.deepcopy(results)
    moved["settings"]["one more"]["miou"] = 0.62
    assert (added != np.asarray(drawn({"net": moved}).convert("RGB"))).any()


def test_what_is_far_below_dense_does_not_flatten_the_rest_but_a_ring_is_never_cut_off() -> None:
    files = {"net": made_up()}
    assert frontier._bottom(files, None, None) is None
    assert frontier._bottom(files, None, 10.5) is None
    assert frontier._bottom(files, None, 5.0) == 65.0
    assert frontier._bottom(files, ("net", "truncated 6"), 5.0) == 59.0


def test_a_plot_shows_both_kinds_of_work(tmp_path: Path) -> None:
    report.plot(made_up(), tmp_path / "deep" / "frontier.png")
    with Image.open(tmp_path / "deep" / "frontier.png") as picture:
        assert picture.width == 2 * drawn({"net": made_up()}).width
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    assert drawn({"net": made_up()}, ink="white", paper="none").getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("with_timing", [True, False])
def test_the_page_is_well_formed_in_one_file_and_escaped(with_timing: bool) -> None:
    timing = {"1": timed(NASTY, dense=5.0, truncated_8=7.0)} if with_timing else {}
    results, other = made_up(**timing), made_up()
    results["settings"][NASTY] = entry(NASTY, 0.69, 0.6)
    for part in ("inputs", "about"):
        results[part] = {name: NASTY if isinstance(value, str) else value for name, value in results[part].items()}
    results["about"]["versions"] = {NASTY: NASTY}
    text = page.render(content({"a<b": results, "other": other}, "a<b", NASTY))
    reader = Reader(text)
    assert not {"script", "link", "iframe"} & set(reader.seen)
    sources = [value for name, value in reader.attributes if name in ("src", "srcset", "href")]
    assert len(sources) == 2 + 6  # the frontier for light and for dark, and six views of one image
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert "url(" not in text
    assert "@import" not in text
    assert any(NASTY in words for words in reader.text)
    assert any(words == f"frame {NASTY}" for words in reader.text)
    assert any("$" not in words and "images of val" in words for words in reader.text)
    assert ("x1.40" in text) == with_timing
    for word in ("prefers-color-scheme: dark", "left after 6", "blocks run", "wrong tokens", "Bicyclist", "a&lt;b"):
        assert word in text


def test_files_are_labelled_by_name_and_by_path_where_names_clash() -> None:
    one, two, three = Path("a/r.json"), Path("b/r.json"), Path("c.json")
    assert report.labelled([one, two, three]) == {"a/r.json": one, "b/r.json": two, "c": three}


def test_the_results_of_the_network_are_found(tmp_path: Path) -> None:
    source = tmp_path / "net.npz"
    source.write_bytes(b"weights")
    own, other = made_up(), made_up()
    own["inputs"]["sha256"] = common.digest(source)
    files = {"other": other, "own": own}
    assert report.of_network(files, source, "cells 0.8") == "own"
    with pytest.raises(shell.UsageError, match=r"`--setting` must be one of \['dense', .*got 'cells'"):
        report.of_network(files, source, "cells")
    with pytest.raises(shell.UsageError, match=r"`--json` must have results of .*net.npz'.*other of abc"):
        report.of_network({"other": other}, source, "dense")
    with pytest.raises(shell.UsageError, match=r"must exist"):
        report.of_network(files, tmp_path / "none", "dense")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"dense": {}}}', '{"settings": {}, "timing": {}}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(shell.UsageError, match=r"`--json` must .*results"):
        report.read_results(path)


def test_results_of_other_images_share_no_axis(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("one", "two")}
    for path in paths.values():
        path.write_text(json.dumps(made_up()))
    assert list(report.read_all(paths)) == ["one", "two"]
    other = made_up()
    other["inputs"]["images"] = 3
    paths["two"].write_text(json.dumps(other))
    with pytest.raises(shell.UsageError, match=r"same images, got one with 2 of val, two with 3 of val"):
        report.read_all(paths)


@needs_data
def test_a_page_on_real_frames_with_fitted_exits(
    ready_for_strips: Path, strips: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        given = ["--data", str(CAMVID), "--init", str(ready_for_strips), "--device", "cpu", "--limit", "2"]
        results = ["--json", str(tmp_path / "results.json")]
        fit = ["--fit-after", "8", "--fit-images", "1", "--fit-steps", "2", "--exits", "8:0", "--rounds", "0"]
        monkeypatch.setattr(sys, "argv", ["evaluate", *given, *results, *fit, "--only", "PAUMER keeps 0.3"])
        evaluate.main()
        setting = "PAUMER keeps 0.3, exits 8"
        out = ["--setting", setting, "--images", "2", "--out", str(tmp_path / "new" / "page.html")]
        monkeypatch.setattr(sys, "argv", ["report", *given, *results, *out])
        report.main()
        found = report.content_of(report.arguments())
    finally:
        torch.set_num_threads(threads)
    assert [one.after for one in found.tallies] == [8, 12]
    assert sum(one.tokens for one in found.tallies) == 2 * TOKENS
    assert found.tallies[0].tokens == 2 * round(0.7 * TOKENS)
    # The very heads that were measured: pixels agree with dense as often as they did.
    agreement = np.mean([(shown.exiting == shown.dense).double().mean().item() for shown in found.pictures])
    measured = json.loads((tmp_path / "results.json").read_text())["settings"][setting]
    assert agreement == pytest.approx(measured["agreement"], abs=1e-6)
    assert 0 < found.tallies[0].changed < 50
    text = (tmp_path / "new" / "page.html").read_text()
    assert sum(name == "src" for name, _ in Reader(text).attributes) == 1 + 2 * 6
    (tmp_path / "results.exits").rename(tmp_path / "elsewhere")
    with pytest.raises(TokenExitError, match="results.exits"):
        report.content_of(report.arguments())
