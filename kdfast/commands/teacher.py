"""kdfast teacher: supervised training of one network; the run's best.safetensors is then a --teacher."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdfast import files, report
from kdfast.commands.config import Teach, parse_options
from kdfast.commands.session import environment, load_data, loader_maker, preparation, session
from kdfast.engine import evaluate
from kdfast.engine.random_state import derive
from kdfast.models import ModelSpec, create, parameter_count
from kdfast.recipes.recipe import each, keeping_the_last, seeded
from kdfast.recipes.supervised import supervised
from kdfast.runs import artifact


def teach(config: Teach) -> Path:
    """Trains a network on labels alone, or continues, and returns the run's folder.

    Raises:
        ValueError: an option, data set or architecture that cannot be used.
        Interrupted, NonFiniteLoss: see kdfast.engine.
    """
    dataset = Path(config.data.dataset).name
    with session(config, f"teacher-{dataset}-{config.model.replace(':', '.')}") as opened:
        data, notes = load_data(config.data, config.run.seed, opened.world, opened.console.rich, opened.stop)
        prepared = preparation(data, config.data)
        options = parse_options(config.model_options, "model_options")
        spec = ModelSpec(config.model, len(data.classes), options=options)
        with seeded(derive(config.run.seed, "teacher")):
            model = create(spec.name, spec.num_classes, pretrained=config.pretrained, **options)
        loaders = loader_maker(data, config.data, prepared, config.run.seed, opened.world, opened.console.say)
        batches = loaders(config.training, None, False, config.run.seed)
        opened.begin()
        opened.console.say(
            f"kdfast teacher: {config.model}, {parameter_count(model):,} parameters, on {data.name} ({len(data.train):,} training images)"
        )
        opened.console.say(f"  folder: {opened.folder}, on {opened.world.device}")
        hidden = config.data.label_fraction < 1
        stages = supervised("teacher", model, batches, config.training, label_smoothing=config.label_smoothing, hidden=hidden)
        kept = "last" if data.val_is_test else "best"
        model = opened.run.complete(each(stages, keeping_the_last) if data.val_is_test else stages).eval()
        evaluation = evaluate(model, batches.test, data.classes, opened.world)
        if opened.world.main:
            artifact.save(opened.folder / "best.safetensors", model.state_dict(), spec, data.classes, prepared)
            facts: Mapping[str, Any] = {k: v for k, v in asdict(evaluation).items() if k != "images"}
            results = {
                "recipe": "supervised",
                "preset": "default",
                "dataset": data.name,
                "classes": list(data.classes),
                "test_images": evaluation.images,
                "label_fraction": config.data.label_fraction,
                "val_is_test": data.val_is_test,
                "kept": kept,
                "teacher": {"model": config.model, "parameters": parameter_count(model), "source": "trained in this run", **facts},
                "student": None,
                "arms": {"alone": [], "distilled": []},
                "confusion": {"alone": None, "distilled": None},
                "paired": None,
                "notes": notes + ([] if config.pretrained else ["The network starts from random weights."]),
                "environment": environment(opened.world),
                "seconds_total": round(opened.clock.seconds, 1),
            }
            files.write_json(opened.folder / "results.json", results)
            page = report.write_report(opened.folder)
            (opened.folder / "checkpoint.pt").unlink(missing_ok=True)
            opened.console.say(f"test top-1 {100 * evaluation.top1:.2f} %, top-5 {100 * evaluation.top5:.2f} %")
            opened.console.say(f"weights: {opened.folder / 'best.safetensors'}")
            opened.console.say(f"report:  {page}")
        opened.world.barrier()
        return opened.folder
