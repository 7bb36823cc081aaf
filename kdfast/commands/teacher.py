"""kdfast teacher: supervised training of one network; the run's best.safetensors is then a --teacher."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from kdfast.commands.command_line import resolve
from kdfast.commands.config import Teach, parse_options
from kdfast.commands.job import Job, teacher_results
from kdfast.commands.rehearsal import check_fits, rehearse
from kdfast.commands.session import session
from kdfast.engine.random_state import derive
from kdfast.models import ModelSpec, create, parameter_count
from kdfast.recipes.recipe import seeded
from kdfast.recipes.supervised import supervised
from kdfast.runs.summary import describe_chance
from kdfast.text import percent


def run(arguments: Sequence[str]) -> None:
    """Runs the command."""
    teach(cast(Teach, resolve("teacher", arguments)))


def teach(config: Teach) -> Path:
    """Trains a network on labels alone, or continues, and returns the run's folder.

    Raises:
        ValueError: an option, data set or architecture that cannot be used.
        Interrupted, NonFiniteLoss: see kdfast.engine.
    """
    dataset = Path(config.data.dataset).name
    with session(config, f"teacher-{dataset}-{config.model.replace(':', '.')}") as opened:
        job, say = Job(config, opened), opened.console.say
        options = parse_options(config.model_options, "model_options")
        spec = ModelSpec(config.model, len(job.data.classes), options=options)
        with seeded(derive(config.run.seed, "teacher")):
            model = create(spec.name, spec.num_classes, pretrained=config.pretrained, **options)
            check_fits(model, f"model {config.model}", job.prepared.image_size, spec.num_classes, trained=True)
        loaders = job.make_loaders(config.training, None, False, config.run.seed)
        with seeded(0):
            stages = supervised("teacher", copy.deepcopy(model), loaders, config.training, hidden=job.labels_hidden)
            rehearse(stages, job.prepared.image_size, spec.num_classes, opened.world.size)
        job.begin()
        images = f"{job.data.name} ({len(job.data.train):,} training images)"
        say(f"kdfast teacher: {config.model}, {parameter_count(model):,} parameters, on {images}")
        say(f"  folder: {opened.folder}, on {opened.world.device}")
        smoothing = config.label_smoothing
        stages = supervised("teacher", model, loaders, config.training, label_smoothing=smoothing, hidden=job.labels_hidden)
        model = job.train(stages).eval()
        test = job.evaluate(model, loaders)
        if opened.world.main:
            results = job.begin_results(test.images, "last" if job.data.val_is_test else "best")
            results["teacher"] = teacher_results(model, spec, "trained in this run", test)
            if not config.pretrained:
                results["notes"].append("The network starts from random weights.")
            if chance := describe_chance(test.confusion, job.data.classes):
                job.warn(f"The network is {chance}.")
            page = job.record(results, model, spec)
            say(f"test top-1 {percent(test.top1)} %, top-5 {percent(test.top5)} %")
            say(f"weights: {opened.folder / 'best.safetensors'}")
            say(f"report:  {page}")
        opened.world.barrier()
        return opened.folder
