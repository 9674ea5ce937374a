"""The sheet of neighbours: who is on it, by scikit-learn; where they are and in which frame, by the pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from simclr_dist.data.reader import Sample
from simclr_dist.evaluate.result.neighbours import Neighbours, choose_queries, find_neighbours, neighbour_sheet
from simclr_dist.system.errors import ConfigError

GREEN, RED, GRAY = (0x2A, 0x8F, 0x3C), (0xC4, 0x3C, 0x35), (0x99, 0x99, 0x99)
COLUMN, ROW = 102, 133


class Colours:
    """Image i is of the one colour (i, 0, 200)."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, row: int) -> Sample:
        return Sample(torch.tensor([row, 0, 200], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 20), -1, row)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def features(n: int = 50) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(0))


def test_neighbours_are_those_of_scikit_learn() -> None:
    h, query = features(), torch.tensor([3, 40, 7])
    found = find_neighbours(h, query, 5)
    distance, index = NearestNeighbors(n_neighbors=6, metric="cosine").fit(h.double()).kneighbors(h[query].double())
    assert found.nearest.tolist() == index[:, 1:].tolist()
    np.testing.assert_allclose(found.cosine, 1 - distance[:, 1:], atol=1e-6)


def test_a_query_is_not_its_own_neighbour_and_ties_are_in_row_order() -> None:
    found = find_neighbours(torch.ones(5, 2), torch.tensor([2]), 9)
    assert found.nearest.tolist() == [[0, 1, 3, 4]]
    with pytest.raises(ConfigError, match="two images or more"):
        find_neighbours(torch.ones(1, 2), torch.tensor([0]))


def test_queries_are_one_of_each_class_by_seed() -> None:
    label = torch.tensor([2, -1, 0, 1] * 20 + [3])
    drawn = choose_queries(label, 4)
    assert label[drawn].tolist() == [0, 1, 2, 3]
    assert torch.equal(drawn, choose_queries(label, 4))
    assert any(not torch.equal(drawn, choose_queries(label, 4, seed)) for seed in (1, 2))
    assert sorted(label[choose_queries(label, 7)].tolist()) == [0, 0, 1, 1, 2, 2, 3]
    assert len(set(choose_queries(label, 81).tolist())) == 81 == len(choose_queries(label, 500))


def test_queries_without_labels() -> None:
    label = torch.full((1000,), -1)
    drawn = choose_queries(label, 8)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert len(drawn) == 8
    assert drawn.max() > 300
    assert torch.equal(drawn, choose_queries(label, 8))


def test_the_sheet_shows_each_image_in_its_place() -> None:
    query, nearest = torch.tensor([1, 2]), torch.tensor([[4, 7, 6], [5, 3, 8]])
    label = torch.arange(50) % 3
    label[8] = -1
    sheet = pixels(neighbour_sheet(Colours(), Neighbours(query, nearest, torch.zeros(2, 3)), label, classes=["a", "b", "c"]))
    for row in range(2):
        for column, index in enumerate([query[row], *nearest[row]]):
            left, top = 6 + column * COLUMN + (12 if column else 0), 24 + row * ROW
            assert tuple(sheet[top + 48, left + 48]) == (index, 0, 200), "the image, in the middle"
            assert tuple(sheet[top + 48, left + 4]) == (0xEE,) * 3, "an upright image leaves room at its sides"
            own, other = int(label[query[row]]), int(label[index])
            frame = GRAY if other < 0 else GREEN if own == other else RED
            assert tuple(sheet[top - 2, left + 48]) == (frame if column else (255, 255, 255))
    assert sheet.shape == (24 + 2 * ROW + 6, 6 + 4 * COLUMN + 12 + 6, 3)


def test_a_row_with_fewer_neighbours_stays_empty_there() -> None:
    near = Neighbours(torch.tensor([1, 2]), torch.tensor([[4, -1], [5, 3]]), torch.zeros(2, 2))
    sheet = pixels(neighbour_sheet(Colours(), near, torch.zeros(50).long()))
    assert (sheet[24:120, 18 + 2 * COLUMN : 18 + 3 * COLUMN] == 255).all()
    assert not (sheet[24 + ROW : 120 + ROW, 18 + 2 * COLUMN : 18 + 3 * COLUMN] == 255).all()


def test_words_depend_on_labels_and_the_same_input_gives_the_same_bytes() -> None:
    h, unlabelled = features(), torch.full((50,), -1)
    label = torch.arange(50) % 5
    found = find_neighbours(h, choose_queries(label, 3), 4)
    sheets = [
        neighbour_sheet(Colours(), found, label, classes=list("abcde")),
        neighbour_sheet(Colours(), found, label),
        neighbour_sheet(Colours(), found, unlabelled),
        neighbour_sheet(Colours(), found, label, classes=["a name that is far too long for its place", *"bcde"]),
        neighbour_sheet(Colours(), found, label, classes=list("abcde"), title="another"),
    ]
    assert len(set(sheets)) == len(sheets)
    assert neighbour_sheet(Colours(), found, label, classes=list("abcde")) == sheets[0]


def test_few_images() -> None:
    found = find_neighbours(features(2), choose_queries(torch.tensor([-1, -1])))
    assert found.nearest.tolist() == [[1], [0]]
    assert pixels(neighbour_sheet(Colours(), found, torch.tensor([-1, -1]))).shape[0] == 24 + 2 * ROW + 6


def test_names_that_the_font_lacks_are_no_boxes() -> None:
    label = torch.arange(50) % 3
    found = find_neighbours(features(), choose_queries(label, 3), 4)
    shown = neighbour_sheet(Colours(), found, label, classes=["Küche", "\u72ac", "\u0441at"])
    assert shown == neighbour_sheet(Colours(), found, label, classes=["Kuche", "1", "2"])
