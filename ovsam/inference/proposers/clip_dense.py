"""`clip-dense`: CLIP's dense map of each text query (MaskCLIP, Zhou et al. 2022), without training.

Every cell of the dense map is scored for every query; the connected cells of a query are one proposal, whose point is
the cell of highest score and whose box is their extent; both are prompts for the SAM side. Objects of one class that
touch are one proposal. The score of a proposal does not come from the map, since the level of cosines differs between
queries, but from the decoder's predicted IoU and the class name of the decoded mask.
"""

import torch
import torch.nn.functional as F

from ovsam.errors import InputError
from ovsam.inference.proposers.base import Proposals, Question
from ovsam.ops.components import connected_cells

LEAST_SHARE = 0.5  # between the mean (0) and the maximum (1) of a query in the image: lower cells are background
MOST = 100  # maximum number of proposals


@torch.no_grad()
def clip_dense(question: Question) -> Proposals:
    """Raises InputError without text queries, or if the model has no CLIP image tower."""
    model, features = question.model, question.features
    if features.clip is None:
        raise InputError("The proposer clip-dense needs a CLIP image tower; this model has none: use grid instead.")
    if question.text_embeds is None:
        raise InputError("The proposer clip-dense needs text queries: pass some, or a vocabulary.")
    dense = model.clip.dense(features.clip)[0].float()  # [D, h, w]
    heat = torch.einsum("kd,dhw->khw", question.text_embeds.float().to(dense.device), dense)  # [K, h, w] cosines
    mean = heat.flatten(1).mean(1)
    if question.everything:  # each cell counts for the query of highest score
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
