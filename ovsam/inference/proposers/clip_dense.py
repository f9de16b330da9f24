"""`clip-dense`: CLIP's own map of where each word is (MaskCLIP, Zhou et al. 2022), nothing trained.

Every cell of the dense map is scored against every word; the connected cells of a word are a place, whose best cell is
the point and whose extent the box that the SAM side is prompted with. Things of one word that touch are one place.
How good a place is, the map cannot say by itself (a cosine's level differs from word to word): the decoder's predicted
IoU and the name of the decoded mask do.
"""

import torch
import torch.nn.functional as F

from ovsam.errors import InputError
from ovsam.inference.proposers.base import Proposals, Question
from ovsam.ops.components import connected_cells

LEAST_SHARE = 0.5  # of the way from a word's mean in the image to its maximum: cells below are background
MOST = 100  # places


@torch.no_grad()
def clip_dense(question: Question) -> Proposals:
    """Raises InputError without words, or where the model has no CLIP image tower."""
    model, features = question.model, question.features
    if features.clip is None:
        raise InputError("The proposer clip-dense needs a CLIP image tower; this model has none: use grid instead.")
    if question.text_embeds is None:
        raise InputError("The proposer clip-dense looks for words: pass some, or a vocabulary.")
    dense = model.clip.dense(features.clip)[0].float()  # [D, h, w]
    heat = torch.einsum("kd,dhw->khw", question.text_embeds.float().to(dense.device), dense)  # [K, h, w] cosines
    mean = heat.flatten(1).mean(1)
    if question.everything:  # each cell is its best word's
        heat = heat.masked_fill(~F.one_hot(heat.argmax(0), len(heat)).permute(2, 0, 1).bool(), -1.0)
    peak = heat.flatten(1).amax(1)
    places = connected_cells(heat > (mean + LEAST_SHARE * (peak - mean))[:, None, None])  # [K, h, w]
    height, width = heat.shape[1:]
    found = []
    for word in peak.argsort(descending=True)[:MOST].tolist():
        for place in places[word].unique().tolist():
            if place:
                inside = places[word] == place
                row, column = divmod(int(heat[word].masked_fill(~inside, -1).argmax()), width)
                rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
                box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
                found.append((float(heat[word, row, column]), [column, row, column + 1, row + 1], box))
    found = sorted(found, reverse=True)[:MOST]
    cells = torch.tensor([width, height, width, height])
    best_cells = question.boxes_from_clip(torch.tensor([cell for _, cell, _ in found]).reshape(-1, 4) / cells)
    return Proposals(
        boxes=question.boxes_from_clip(torch.tensor([box for *_, box in found]).reshape(-1, 4) / cells),
        points=(best_cells[:, :2] + best_cells[:, 2:]) / 2,
    )
