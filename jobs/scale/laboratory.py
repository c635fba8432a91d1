"""What an experiment is given: the recipe, its folder, how large it may be, and the tasks it is about."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from cluster.errors import ConfigError
from jobs import provenance
from jobs.recipe import Recipe
from jobs.scale.cells import Cell, CellBook, Measured, measure_on_tune
from jobs.scale.material import Material
from jobs.scale.trial import Workbench, train_cell

Size = Literal["quick", "small", "full"]
_NUM_HASH_CHARS = 16


class Laboratory(NamedTuple):
    """One experiment's surroundings."""

    recipe: Recipe
    out: pathlib.Path
    size: Size
    """quick: minutes on two cores, tasks made easy enough to be learned in them. small: what two cores can in a quarter of an hour. full: more."""
    load: Callable[[], Sequence[Material]]
    """The tasks, read when an experiment needs them."""
    save: Callable[[Sequence[Material]], tuple[pathlib.Path, str]]
    """Tasks -> the folder where trials read them, and their hash."""
    say: Callable[[str], object]
    names_store: bool = False
    """Whether the words say which store: then its calls, and what it serves, are what an experiment is about."""

    def pick(self, **sizes: Any) -> Any:
        """What belongs to this size; `full` is as `small` where it is not given."""
        return sizes.get(self.size, sizes["small"])

    @property
    def base(self) -> str:
        """Of the specialists; a scratch one where the recipe names none."""
        return self.recipe.select.base or "scratch-micro"

    def check_base(self) -> None:
        """Raises ConfigError where the recipe names candidates instead of one base."""
        if self.recipe.select.candidates:
            raise ConfigError(
                f"select.candidates={list(self.recipe.select.candidates)}: an experiment has one base; next: select.base=NAME"
            )

    def cells(self, experiment: str, data: str, parameters: Sequence[Mapping[str, Any]]) -> list[Cell]:
        """The grid's cells: parameters with what else decides a result."""
        config = json.dumps(self.recipe.model_dump(mode="json", exclude={"store", "work"}), sort_keys=True)
        recipe = hashlib.sha256(config.encode()).hexdigest()[:_NUM_HASH_CHARS]
        code = provenance.machine()["source_sha256"][:_NUM_HASH_CHARS]
        return [
            Cell(experiment=experiment, parameters=dict(one), code=code, data=data, recipe=recipe) for one in parameters
        ]

    def train(
        self, experiment: str, material: Sequence[Material], parameters: Sequence[Mapping[str, Any]]
    ) -> list[Measured]:
        """Train and grade every cell on Ray Tune, those that are not finished yet."""
        folder, data = self.save(material)
        bench = Workbench(self.recipe, folder)

        def measure(one: dict[str, Any]) -> dict[str, Any]:
            return train_cell(bench, one)

        finetune = self.recipe.finetune
        resources = {"cpu": finetune.cpus_per_worker, "gpu": min(1, finetune.gpus_per_worker)}
        cells = self.cells(experiment, data, parameters)
        return measure_on_tune(cells, measure, CellBook(self.out), resources, self.say)
