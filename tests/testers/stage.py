"""Tests of every training stage: the loss falls, only declared parameters change, the published state is loaded again,
and predictions; with tiny towers and a drawn batch."""

import pytest
import torch
import torch.nn.functional as F
from common import SIZE, D, randomise, tiny_config

from ovsam.modeling.clip import CLIP_SIDES
from ovsam.modeling.sam import SAM_SIDES
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Towers

WORDS, OBJECTS = 6, 3


def draw_words() -> WordTable:
    """Six random words, the last of them novel, and four keywords, one for each of the first words."""
    generator = torch.Generator().manual_seed(0)
    embeds = F.normalize(torch.randn(WORDS + 4, D, generator=generator), dim=-1)
    has_keyword = torch.zeros(WORDS, 4, dtype=torch.bool)
    has_keyword[range(4), range(4)] = True
    return WordTable(embeds[:WORDS], embeds[WORDS:], has_keyword, torch.tensor([True] * 5 + [False]))


def draw_batch(size=SIZE, pictures=2):
    """Rectangles, each coloured by its word, on grey noise."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(90, 120, (pictures, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(pictures, OBJECTS, size, size, dtype=torch.bool)
    word_ids = torch.full((pictures, OBJECTS), -1)
    for b in range(pictures):
        for o in range(OBJECTS - 1):  # one place stays empty
            side = size // 4 + 8 * b
            y, x = (int(v) for v in torch.randint(0, size // 2 - side, (2,), generator=generator))
            masks[b, o, y + o * size // 2 : y + o * size // 2 + side, x : x + side] = True
            word_ids[b, o] = (b * 2 + o) % 5
            image[b, :, masks[b, o]] = (word_ids[b, o] * 40 + torch.tensor([10, 40, 70]))[:, None].byte()
    return {
        "image": image,
        "masks": masks,
        "word_ids": word_ids,
        "known": torch.ones(pictures, WORDS, dtype=torch.bool),
    }


def towers(composition="dual", sam="edgetam", clip="dual_encoder", **more):
    torch.manual_seed(0)
    config = tiny_config(sam=sam, clip=clip, adapters=False)
    sides = (
        SAM_SIDES[sam](config.sam_config),
        CLIP_SIDES[config.clip_config.model_type](config.clip_config, part="vision"),
    )
    return Towers(*(randomise(side) for side in sides), composition=composition, **more)


class StageTester:
    trained: tuple[str, ...]  # prefixes of the parameters that the stage trains
    learning_rate = 2e-3

    def make(self, words: WordTable):
        """The stage at tiny size."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def words(cls):
        return draw_words()

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls):
        return draw_batch()

    @pytest.mark.slow
    def test_the_loss_falls_and_only_declared_parameters_change(self, words, batch):
        stage = self.make(words).train()
        before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
        torch.manual_seed(0)
        parameters = [p for p in stage.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0)
        history, reached = [], set()
        for _ in range(8):
            torch.manual_seed(
                len(history) % 2
            )  # boxes and clicks take turns, so that compared losses have the same prompts
            loss = stage(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            reached |= {n for n, p in stage.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            optimizer.step()
            history.append(float(loss.detach()))
        assert sum(history[-2:]) < 0.95 * sum(history[:2]), history
        after = stage.state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert {name for name in changed | reached if not name.startswith(self.trained)} == set()
        for prefix in self.trained:
            assert any(name.startswith(prefix) for name in changed), f"{prefix} learned nothing"
        assert {name for name, p in stage.named_parameters() if p.requires_grad} - reached == set()

    def test_it_goes_on_from_its_published_state_and_predicts(self, words, batch):
        stage = self.make(words)
        published = {name: tensor.clone() for name, tensor in stage.published_state().items()}
        other = self.make(words)
        randomise(other, 1)
        other.load_published(published)
        for name, tensor in other.published_state().items():
            assert torch.equal(tensor, published[name]), name
        found = stage.eval().predict(**batch)
        assert len(found) == 2
        for masks, ids, scores in found:
            assert masks.dtype == torch.bool and len(masks) == len(ids) == len(scores)
