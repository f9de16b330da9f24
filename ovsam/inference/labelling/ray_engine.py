"""A labelling job on a Ray cluster: images are read and decoded by tasks, models are actors, one on each GPU.

The batches are those of a local job, and the driver writes the journal, so that the label files have the same bytes.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ovsam.errors import InputError
from ovsam.inference.labelling.job import Ask, Asker, Outcome, open_item
from ovsam.inference.labelling.journal import from_record, to_record
from ovsam.inference.labelling.sources import Item

if TYPE_CHECKING:
    import numpy as np

MOST_BLOCKS = 5000  # parts in which a job is given to the cluster; a part is done by one task


class _Actor:
    def __init__(self, load: Callable[[], Ask]):
        self.asker = Asker(load())

    def __call__(self, rows: "dict[str, np.ndarray]") -> dict[str, list]:
        answers = []
        for content in rows["content"]:
            items, images = pickle.loads(content)
            found = self.asker(items, images)
            answers.append(json.dumps([one if isinstance(one, str) else to_record(one) for one in found]))
        return {"place": list(rows["place"]), "answer": answers}


def _decode(row: dict[str, Any]) -> dict[str, Any]:
    items = pickle.loads(row["content"])
    return {"place": row["place"], "content": pickle.dumps((items, [open_item(item) for item in items]))}


def run_ray(
    todo: Sequence[Sequence[Item]], load: Callable[[], Ask], actors: int | None = None
) -> Iterator[tuple[Sequence[Item], list[Outcome]]]:
    """Each batch with its outcomes, as they come. A worker that dies is started again, and its batches are asked again.

    Args:
        todo: batches of images; every machine must be able to read them.
        load: loads the model in an actor, a picklable function of no arguments.
        actors: how many models; by default as many as the cluster has GPUs, or one without.

    Raises:
        InputError: Ray is not installed, or its cluster cannot be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError('The engine ray needs Ray, which `pip install "ovsam[ray]"` brings.') from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False)
        except ConnectionError as error:
            raise InputError(f"The Ray cluster cannot be reached ({error}); start it, or unset RAY_ADDRESS.") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0))
    rows = [{"place": place, "content": pickle.dumps(list(batch))} for place, batch in enumerate(todo)]
    answers = (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS))
        .map(_decode, num_cpus=0.5)  # other than the actors', or Ray would let them decode
        .map_batches(
            _Actor,
            fn_constructor_args=(load,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors or max(1, gpus)),
            num_gpus=1 if gpus else 0,
            max_restarts=-1,
            max_task_retries=-1,
        )
    )
    for row in answers.iter_rows():
        found = [one if isinstance(one, str) else from_record(one) for one in json.loads(row["answer"])]
        yield todo[row["place"]], found
