"""Every recipe's loss against its formula in float64, the order of its stages, and the settings that it refuses."""

import json
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast import recipes, reference
from kdfast.data import make_loaders
from kdfast.engine import Options, Run, Training
from kdfast.engine.stage import as_means
from kdfast.losses import CRDLoss
from kdfast.models import ModelSpec, Taps, create, save_weights
from kdfast.recipes import at, conkd, crd, dih, fitnets, kd, lskd, mhkd, plus, remembered, self_distillation, supervised, takd, tofd
from kdfast.recipes.features import fingerprint
from kdfast.recipes.recipe import Setup, Trained
from tests.engine.small import CPU, equal, hide_labels, loaders, noise

TESTED = set[str]()  # recipes whose loss a test of this file compares with its formula


def checks_loss_of(*names):
    TESTED.update(names)
    return lambda test: test


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_a_test_of_its_loss(name):
    assert name in TESTED, f"write a test of {name}'s loss, with @checks_loss_of({name!r})"


TRAINING = Training(epochs=5, batch_size=16, lr=0.1, schedule="constant")
STAGES = ("layer1", "layer2", "layer3")
ce = F.cross_entropy


def setup(student="resnet8", teacher="resnet14", **changes):
    made = Setup(
        data=noise(),
        training=TRAINING,
        teacher_training=TRAINING,
        student_spec=ModelSpec(student, 3),
        teacher_spec=ModelSpec(teacher, 3),
        student_pretrained=False,
        teacher_pretrained=False,
        labels_hidden=False,
        seed=0,
        make_loaders=lambda training, augment, all_labels, seed: loaders(training),
        say=lambda line: None,
    )
    return replace(made, **changes)


def network(name="resnet14", seed=0):
    torch.manual_seed(seed)
    return create(name, 3)


def batch_of(stage):
    batch = next(iter(stage.data.train))
    return batch._replace(images=batch.images.double())


def in_double(stage):
    """Puts the stage's modules into float64 and evaluation mode, so that the same batch gives the same numbers twice."""
    for module in (*stage.train, *stage.frozen, *stage.memory):
        module.double().eval()
    return stage


def seen(model, images):
    """Logits, the outputs of the stages, then the input of the classifier."""
    logits, tensors = Taps(model, (*STAGES, "linear:input"))(images)
    return logits, *tensors


def kl(student, teacher, T):
    """T^2 KL(teacher || student), mean over the batch."""
    p = (teacher / T).softmax(1)
    return T * T * (p * (p.log() - (student / T).log_softmax(1))).sum(1).mean()


def gradients(loss, stage):
    parameters = [p for module in stage.train for p in module.parameters()]
    return torch.cat([found.flatten() for found in torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)])


def assert_same(stage, batch, expected):
    """Compares value and gradient; a gradient of zeros or in reverse order would not pass."""
    terms = as_means(stage.loss(stage.forward(batch), batch), len(batch.labels))
    loss = torch.stack([term.value.double() for term in terms.values()]).sum()
    gradient, true = gradients(loss, stage), gradients(expected, stage)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    scale = true.abs().max()
    assert scale > 0
    assert (gradient - true).abs().max() <= 2e-5 * scale
    assert (gradient.flip(0) - true).abs().max() > 1e-2 * scale


def begin(recipe, settings):
    """A teacher, a recipe's first stage of distillation in float64, a batch of it, and the modules that it trains."""
    teacher = network()
    stage = in_double(next(recipe.RECIPE.distil(setup(), settings, teacher)))
    return teacher, stage, batch_of(stage), stage.train


def finished(generator, metrics=()):
    """Runs a generator's stages without training; returns its result."""
    result = None
    while True:
        try:
            stage = generator.send(result)
        except StopIteration as end:
            return end.value
        outputs = stage.forward(next(iter(stage.data.val)))
        result = SimpleNamespace(metrics={f"val/top1/{name.removeprefix('logits/')}": 0.5 for name in outputs})


# ---- logits, contrast, self-distillation -----------------------------------------------------------------------------


def standardize(logits):
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


@checks_loss_of("kd", "lskd", "conkd")
@pytest.mark.parametrize("recipe", [kd, lskd, conkd], ids=lambda module: module.RECIPE.name)
def test_logits(recipe):
    settings = recipe.Settings()
    teacher, stage, batch, (student, *_) = begin(recipe, settings)
    logits, *_, features = seen(student, batch.images)
    pair = logits, teacher(batch.images)
    expected = settings.ce_weight * ce(logits, batch.labels)
    expected = expected + settings.kd_weight * kl(*(pair if recipe is kd else map(standardize, pair)), settings.temperature)
    if recipe is conkd:
        expected = expected + 0.15 * reference.supcon_loss(stage.train[1](features), batch.labels, temperature=0.07)
    assert_same(stage, batch, expected)


@checks_loss_of("self_distillation")
def test_self_distillation():
    _, stage, batch, (student, projection) = begin(self_distillation, self_distillation.Settings(alpha=0.3))
    logits, _, shallow, deep, _ = seen(student, batch.images)
    feature = (F.interpolate(shallow, deep.shape[2:], mode="bilinear") - projection.projection(deep.detach())).pow(2).mean()
    assert_same(stage, batch, 0.3 * feature + 0.7 * ce(logits, batch.labels))


# ---- attention transfer ----------------------------------------------------------------------------------------------


def attention(features):
    energy = features.pow(2).mean(1).flatten(1)
    return energy / energy.norm(dim=1, keepdim=True)


@checks_loss_of("at")
@pytest.mark.parametrize("kd_weight", [0.0, 0.7])
def test_at(kd_weight):
    teacher, stage, batch, (student,) = begin(at, at.Settings(kd_weight=kd_weight))
    logits, *ours = seen(student, batch.images)
    target, *theirs = seen(teacher, batch.images)
    maps = sum((attention(s) - attention(t)).pow(2).mean() for s, t in zip(ours[:3], theirs[:3]))
    assert_same(stage, batch, ce(logits, batch.labels) + 1000 * maps + kd_weight * kl(logits, target, 4.0))


# ---- contrastive representation distillation -------------------------------------------------------------------------


@checks_loss_of("crd")
@pytest.mark.parametrize("kd_weight", [0.0, 0.9])
def test_crd(kd_weight):
    settings = crd.Settings(kd_weight=kd_weight, negatives=7, contrast_weight=0.6, contrast_temperature=0.2, embedding=5)
    teacher, stage, batch, (student, *_) = begin(crd, settings)
    (contrast,) = stage.memory
    assert stage.couples_rows
    learned = {id(parameter) for module in (student, contrast) for parameter in module.parameters()}
    assert {id(parameter) for parameter in stage.parameters()} == learned
    assert stage.loss(stage.forward(batch), batch).keys() == ({"ce+kd"} if kd_weight else {"ce"}), "validation has no contrast"
    contrast.train()
    logits, *_, features = seen(student, batch.images)
    target, *_, theirs = seen(teacher, batch.images)
    alike = CRDLoss(64, 64, 80, labels=noise().train.labels, feat_dim=5, nce_k=7, nce_t=0.2, nce_m=0.5).double()
    alike.load_state_dict(contrast.state_dict())
    alike.embed_s, alike.embed_t = contrast.embed_s, contrast.embed_t
    torch.manual_seed(3)
    expected = ce(logits, batch.labels) + kd_weight * kl(logits, target, 4.0) + 0.6 * alike(features, theirs.detach(), batch.index)
    torch.manual_seed(3)
    assert_same(stage, batch, expected)


def test_crd_takes_a_teacher_whose_head_has_layers():
    teacher = create("resnet14", 3, head="mlp").eval()
    stage = next(crd.distil(setup(), crd.Settings(negatives=7), teacher))
    assert stage.memory[0].embed_t.linear.in_features == 128, "what its last layer reads"


def test_crds_hidden_labels_are_classes_of_their_own():
    hidden = hide_labels(torch.arange(80) % 4 > 0)
    labels = hidden.train.labels
    made = setup(data=hidden, labels_hidden=True, make_loaders=lambda training, *_: make_loaders(hidden, batch_size=16))
    (contrast,) = next(crd.distil(made, crd.Settings(negatives=500), network())).memory
    drawn, shown = contrast._draw_negatives(torch.arange(80)), labels >= 0
    alike = shown[drawn] & shown[:, None] & (labels[drawn] == labels[:, None])
    assert not alike.any()
    assert set(drawn[1].tolist()) == set(range(80)) - {1}, "an image without a label has all others for negatives"


# ---- FitNets ---------------------------------------------------------------------------------------------------------


@checks_loss_of("fitnets")
def test_fitnets_hint_then_logits():
    teacher = network()
    stages = fitnets.distil(setup(), fitnets.Settings(hint_epochs=2), teacher)
    stage = in_double(next(stages))
    assert (stage.name, stage.training.epochs, stage.partial, stage.best) == ("hint", 2, True, "val/hint")
    batch, (student, hint) = batch_of(stage), stage.train
    expected = (hint.regressor(seen(student, batch.images)[2]) - seen(teacher, batch.images)[2]).pow(2).mean()
    assert_same(stage, batch, expected)
    stage = in_double(stages.send(None))
    assert stage.name == "distil"
    assert stage.train == (student,)
    logits = student(batch.images)
    assert_same(stage, batch, 0.1 * ce(logits, batch.labels) + 0.9 * kl(logits, teacher(batch.images), 4.0))


def test_fitnets_joint():
    settings = fitnets.Settings(procedure="joint", hint_weight=100.0, ce_weight=1.0, kd_weight=0.0)
    teacher, stage, batch, (student, hint) = begin(fitnets, settings)
    logits, _, middle, *_ = seen(student, batch.images)
    expected = ce(logits, batch.labels) + 100 * (hint.regressor(middle) - seen(teacher, batch.images)[2]).pow(2).mean()
    assert_same(stage, batch, expected)


def test_fitnets_without_a_regressor():
    named = {"student_hint": "layer1", "teacher_hint": "layer1"}
    teacher = network()
    stage = in_double(next(fitnets.distil(setup(), fitnets.Settings(regressor=False, **named), teacher)))
    assert stage.training.epochs == 1  # a fifth
    batch, (student, _) = batch_of(stage), stage.train
    assert_same(stage, batch, (seen(student, batch.images)[1] - seen(teacher, batch.images)[1]).pow(2).mean())


# ---- teacher assistants ----------------------------------------------------------------------------------------------


@checks_loss_of("takd")
def test_takd_hops_along_the_chain():
    teacher = network("resnet20")
    stages = takd.distil(setup(teacher="resnet20"), takd.Settings(assistants=("resnet14", "resnet8")), teacher)
    chain, before = [], teacher
    for stage in stages:
        assert stage.frozen == (before,)
        chain.append((stage.name, sum(p.numel() for p in stage.train[0].parameters())))
        before = stage.train[0]
        in_double(stage)
        batch = batch_of(stage)
        logits = stage.train[0](batch.images)
        assert_same(stage, batch, 0.1 * ce(logits, batch.labels) + 0.9 * kl(logits, stage.frozen[0](batch.images), 4.0))
    sizes = [sum(p.numel() for p in network(name).parameters()) for name in ("resnet14", "resnet8", "resnet8")]
    assert chain == [*zip(("assistant1", "assistant2", "distil"), sizes)]


def test_takd_finds_an_assistant_midway():
    assert takd.midway(ModelSpec("resnet8", 100), 1_736_564) == "resnet32"
    assert takd.midway(ModelSpec("resnet20", 10), 855_770) == "resnet32"
    with pytest.raises(ValueError, match=r"assistants must be named: there is none of resnet8's family between 78,042 and 80,000"):
        takd.midway(ModelSpec("resnet8", 10), 80_000)


# ---- intermediate classifiers ----------------------------------------------------------------------------------------


def headed(settings, teacher=None, **changes):
    return finished(dih.train_heads(setup(**changes), settings, Trained(teacher or network(), ModelSpec("resnet14", 3)))).model


def test_dih_trains_its_heads_on_the_sum_of_their_cross_entropies():
    teacher = network()
    stage = in_double(next(dih.train_heads(setup(), dih.Settings(), Trained(teacher, ModelSpec("resnet14", 3)))))
    batch, (heads,) = batch_of(stage), stage.train
    assert stage.frozen == (teacher,)
    assert [head[1].in_features for head in heads] == [16 * 64, 32 * 16, 64 * 4]
    _, *maps, _ = seen(teacher, batch.images)
    assert_same(stage, batch, sum(ce(F.linear(m.flatten(1), h[1].weight, h[1].bias), batch.labels) for m, h in zip(maps, heads)))


@checks_loss_of("dih")
@pytest.mark.parametrize("alpha", [(0.1,), (0.3, 0.0, 0.2, 0.6)], ids=str)
def test_dih_student_follows_all_classifiers(alpha):
    settings = dih.Settings(alpha=alpha)
    teacher = headed(settings)
    stage = in_double(next(dih.distil(setup(), settings, teacher)))
    batch, (student,) = batch_of(stage), stage.train
    target, *maps, _ = seen(teacher.model, batch.images)
    opinions = [target, *(head(m) for head, m in zip(teacher.heads, maps))]
    logits = student(batch.images)
    weights = alpha * 4 if len(alpha) == 1 else alpha
    expected = sum((1 - a) * ce(logits, batch.labels) + a * kl(logits, t, 5.0) for a, t in zip(weights, opinions) if a)
    assert_same(stage, batch, expected)


def test_dih_uses_heads_of_a_run_again(tmp_path):
    teacher, settings = network(), dih.Settings(heads=tmp_path)
    made = headed(dih.Settings(), teacher)
    stage = next(dih.train_heads(setup(), dih.Settings(), Trained(teacher, ModelSpec("resnet14", 3))))
    assert stage.metadata["teacher"] == fingerprint(teacher)
    path = tmp_path / "stages" / supervised.HEADS / "best.safetensors"
    with pytest.raises(ValueError, match="holds none: it is not a run of recipe dih"):
        headed(settings, teacher)
    save_weights(nn.ModuleList([made.heads]), path, stage.metadata)
    again = headed(settings, teacher)
    assert equal(made.heads.state_dict(), again.heads.state_dict())
    with pytest.raises(ValueError, match="holds another teacher's heads"):
        headed(settings, network(seed=1))
    with pytest.raises(ValueError, match="holds heads of other stages"):
        headed(replace(settings, teacher_stages=("layer1",)), teacher)
    with pytest.raises(ValueError, match="heads belong to one teacher: name it with --teacher"):
        next(dih.train_heads(setup(), settings, None))


# ---- multi-head ------------------------------------------------------------------------------------------------------


@checks_loss_of("mhkd")
@pytest.mark.parametrize("pull", [False, True])
def test_mhkd(pull):
    settings = mhkd.Settings(pull_teacher_heads=pull)
    teacher, stage, batch, (student, ours, theirs) = begin(mhkd, settings)
    logits, *student_maps = seen(student, batch.images)
    target, *teacher_maps = seen(teacher, batch.images)
    assert len(ours) == len(theirs) == 2

    def distillation(s, t):
        return 0.9 * ce(s, batch.labels) + 0.1 * kl(s, t, 4.0)

    expected = distillation(logits, target)
    for j in range(2):
        s, t = ours[j](student_maps[j]), theirs[j](teacher_maps[j])
        expected = expected + ce(t, batch.labels) + 0.5 * distillation(s, t if pull else t.detach())
    assert_same(stage, batch, expected)


# ---- task-oriented features ------------------------------------------------------------------------------------------


@checks_loss_of("tofd")
def test_tofd():
    given, spec = network(), ModelSpec("resnet14", 3)
    heads = in_double(next(tofd.train_heads(setup(), tofd.Settings(), Trained(given, spec))))
    batch = batch_of(heads)
    _, first, second, *_ = seen(given, batch.images)
    chain = heads.train[0]
    assert_same(heads, batch, sum(ce(head(m)[1], batch.labels) for head, m in zip(chain, (first, second))))
    assert [len(head.convolutions) for head in chain] == [2, 1]

    teacher = finished(tofd.train_heads(setup(), tofd.Settings(), Trained(network(), spec))).model
    stage = in_double(next(tofd.distil(setup(), tofd.Settings(), teacher)))
    batch, (student, ours, oriented) = batch_of(stage), stage.train
    stage.data.train.set_epoch(2)  # the third

    def opinions(model, heads):
        logits, first, second, _, last = seen(model, batch.images)
        pairs = [head(m) for head, m in zip(heads, (first, second))]
        return [*(f for f, _ in pairs), last], [*(z for _, z in pairs), logits]

    (features, logits), (their_features, their_logits) = opinions(student, ours), opinions(teacher.model, teacher.heads)
    T, expected = 1 + 3 / 250 * 3, 0.0
    for W, f, g, s, t in zip(oriented.maps, features, their_features, logits, their_logits):
        soft = -((t / T).softmax(1) * (s / T).log_softmax(1)).sum(1).mean()
        expected = expected + 0.05 * (f @ W.weight.T - g.detach()).pow(2).sum().sqrt() + ce(s, batch.labels) + soft
        for A in (W.weight @ W.weight.T, W.weight.T @ W.weight):
            expected = expected + 0.03 * (A - torch.eye(len(A))).pow(2).sum().sqrt()
    assert_same(stage, batch, expected)


# ---- further terms ---------------------------------------------------------------------------------------------------


def test_a_student_without_a_linear_layer_takes_terms_that_read_its_logits():
    student = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages = kd.follow("distil", setup(), kd.Settings(), student, ModelSpec("resnet8", 3), network().eval())
    stage = next(plus.plus(stages, [plus.Term.parse("lskd")], network().eval(), labels_hidden=False))
    batch = next(iter(stage.data.train))
    assert stage.loss(stage.forward(batch), batch).keys() == {"ce+kd", "plus lskd"}


def test_a_teacher_whose_answer_is_known_is_not_asked_again():
    class Asked(nn.Module):
        def forward(self, images):
            raise AssertionError("asked twice")

    teacher = finished(dih.train_heads(setup(), dih.Settings(), Trained(network(), ModelSpec("resnet14", 3)))).model
    stage = next(plus.plus(dih.distil(setup(), dih.Settings(), teacher), [plus.Term.parse("kd")], Asked(), labels_hidden=False))
    stage.set_modes(training=False)
    batch = next(iter(stage.data.val))
    outputs = stage.forward(batch)
    assert torch.equal(outputs["plus teacher"], teacher.model(batch.images))
    assert stage.loss(outputs, batch).keys() == {"ce+kd", "plus kd"}


# ---- a teacher that is asked once ---------------------------------------------------------------------------------


def trained(folder, recipe, settings, teacher, augment):
    """Trains with these images; returns the validation losses and the number of images that the teacher saw."""
    made = setup(make_loaders=lambda training, *_: make_loaders(noise(), batch_size=training.batch_size, train_transform=augment))
    seen = []
    asked = getattr(teacher, "model", teacher)
    handle = asked.register_forward_hook(lambda module, images, logits: seen.append(len(images[0])))
    folder.mkdir()
    torch.manual_seed(0)
    Run(folder, CPU, Options()).complete(recipe.distil(made, settings, teacher))
    handle.remove()
    return [json.loads(line)["val/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()], sum(seen)


@pytest.mark.parametrize("recipe", [kd, conkd, dih], ids=lambda module: module.RECIPE.name)
def test_a_teacher_is_asked_once_about_images_that_stay_the_same(recipe, tmp_path, monkeypatch):
    settings = recipe.Settings()
    teacher = headed(settings) if recipe is dih else network().eval()
    losses, images = trained(tmp_path / "remembered", recipe, settings, teacher, "none")
    assert images == 80 + 18, "each training and validation image once"
    assert trained(tmp_path / "again", recipe, settings, teacher, "none")[0] == losses
    assert trained(tmp_path / "augmented", recipe, settings, teacher, "digits")[1] == 5 * 80 + 18, "what changes is asked every time"
    monkeypatch.setattr(remembered, "LARGEST", 0)
    every, images = trained(tmp_path / "every time", recipe, settings, teacher, "none")
    assert images == 5 * (80 + 18) + 2 * min(16, 18), "too many to keep; a first batch of each split showed it"
    assert losses == pytest.approx(every, rel=1e-4)


# ---- refused settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names())
def test_settings_out_of_range_are_named(name):
    settings = recipes.get(name).settings
    numbers = {field.name for field in fields(settings) if type(field.default) in (int, float)} - {"label_smoothing"}
    assert numbers
    for number in numbers:
        with pytest.raises(ValueError, match=f"^{number} must .*, got -1"):
            settings(**{number: -1})


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        pytest.param(crd, {"bank_momentum": 1.5}, "bank_momentum must be from 0 to 1, got 1.5", id="above the range"),
        pytest.param(kd, {"temperature": math.nan}, "temperature must be positive, got nan", id="NaN"),
        pytest.param(fitnets, {"hint_epochs": 0}, "hint_epochs must be at least 1, got 0", id="a field that may be None"),
        pytest.param(
            dih, {"alpha": (0.1, 1.5)}, "alpha must be from 0 to 1, one for all or one a classifier, got 0.1, 1.5", id="one of two"
        ),
        pytest.param(dih, {"alpha": ()}, "alpha must be from 0 to 1, one for all or one a classifier, got none", id="none"),
    ],
)
def test_a_setting_out_of_range_is_named(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        recipe.Settings(**options)


UNFIT = [
    pytest.param(at, {"student_stages": ("layer9",)}, "no module 'layer9'; the nearest names are", id="no such module"),
    pytest.param(at, {"student_stages": ("layer1",)}, r"equally many stages, got 1 \(layer1\) and 3", id="one stage and three"),
    pytest.param(at, {"student_stages": ("linear",)}, r"linear must put out a feature map .*, got \[B, 3\]", id="no feature map"),
    pytest.param(fitnets, {"teacher_hint": "layer"}, "no module 'layer'; the nearest names are", id="no such module for a hint"),
    pytest.param(fitnets, {"regressor": False, "student_hint": "layer1"}, "without a regressor teacher_shape must be", id="no regressor"),
    pytest.param(mhkd, {"head_padding": 0}, "head_padding 0 needs maps of at least 5 x 5 pixels, and layer2 puts out 4 x 4", id="padding"),
]


@pytest.mark.parametrize(("recipe", "options", "message"), UNFIT)
def test_stages_that_do_not_match_are_named(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        next(recipe.distil(setup(), recipe.Settings(**options), network()))


def test_a_network_that_does_not_name_its_stages_needs_them_named():
    with pytest.raises(ValueError, match="teacher_stages must be named"):
        next(at.distil(setup(), at.Settings(), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))))


def test_dih_needs_an_alpha_for_each_classifier_and_one_above_0():
    with pytest.raises(ValueError, match="alpha must be above 0 for at least one classifier"):
        next(dih.distil(setup(), dih.Settings(alpha=(0.0,)), headed(dih.Settings())))
    with pytest.raises(ValueError, match="1 value or 4"):
        next(dih.train_heads(setup(), dih.Settings(alpha=(0.1, 0.2)), Trained(network(), ModelSpec("resnet14", 3))))


@pytest.mark.parametrize(("size", "name"), [(64, "resnet8"), (96, "resnet18"), (32, "vgg11_cifar"), (32, "wrn_16_2")])
def test_feature_recipes_fit_other_sizes_and_families(size, name):
    """Heads and taps follow from a dummy image: one batch through forward and loss, without training."""
    made = setup(name, name)
    made = replace(made, data=replace(made.data, image_size=size))
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 2])
    batch = next(iter(made.make_loaders(TRAINING, None, False, 0).train))._replace(images=images, labels=labels, index=labels)
    torch.manual_seed(0)
    teacher = create(name, 3).eval()
    stages = [
        next(at.distil(made, at.Settings(), teacher)),
        next(fitnets.distil(made, fitnets.Settings(), teacher)),
        next(mhkd.distil(made, mhkd.Settings(), teacher)),
        next(crd.distil(made, crd.Settings(negatives=8), teacher)),
        next(dih.train_heads(made, dih.Settings(), Trained(teacher, made.teacher_spec))),
        next(tofd.train_heads(made, tofd.Settings(), Trained(teacher, made.teacher_spec))),
    ]
    for stage in stages:
        stage.set_modes(training=True)
        terms = as_means(stage.loss(stage.forward(batch), batch), 2)
        assert all(term.value.isfinite() for term in terms.values())


def test_terms_know_the_number_of_their_labels(monkeypatch):
    """If no label is hidden, nothing is counted: with torchrun the count would make all processes wait."""
    monkeypatch.setattr("kdfast.recipes.recipe.mean_over_processes", lambda value: pytest.fail("counted"))
    settings = mhkd.Settings()
    for hidden in (False, True):
        if hidden:
            monkeypatch.undo()
        made = setup(labels_hidden=hidden)
        teacher = tofd.StageClassifiers(network(), (), "teacher_stages", 8, 3)
        for stage in (
            next(mhkd.distil(made, settings, network())),
            next(tofd.distil(made, tofd.Settings(), teacher)),
            next(kd.distil(made, kd.Settings(kd_weight=0.0), network())),
            next(kd.distil(made, kd.Settings(), network())),
            next(self_distillation.distil(made, self_distillation.Settings(), None)),
        ):
            batch = next(iter(stage.data.train))
            if hidden:
                batch = batch._replace(labels=torch.where(torch.arange(16) < 5, batch.labels, -100))
            terms = as_means(stage.loss(stage.forward(batch), batch), 16)
            labelled = [name for name in terms if "ce" in name or name.startswith("teacher")]
            assert labelled
            rows = {name: 5 if hidden and name in labelled else 16 for name in terms}
            assert {name: int(term.rows) for name, term in terms.items()} == rows


def test_a_recipe_has_a_name_for_folders_and_a_default_preset():
    made = recipes.get("kd")
    with pytest.raises(ValueError, match=r"name must be letters, digits and _.*got 'a/b'"):
        replace(made, name="a/b")
    with pytest.raises(ValueError, match="Recipe kd: presets must have one called default, got none"):
        replace(made, presets={})


@pytest.mark.parametrize("recipe", [kd, conkd, crd], ids=lambda module: module.RECIPE.name)
def test_a_forward_pass_is_one_graph(recipe):
    """torch.compile takes a stage's forward pass whole, before and after the teacher was asked."""
    torch._dynamo.reset()
    stage = next(recipe.distil(setup(), recipe.Settings(), network("resnet8").eval()))
    stage.set_modes(training=True)
    batch = next(iter(stage.data.train))
    forward = torch.compile(stage.forward, backend="eager", fullgraph=True)
    for _ in range(2):
        outputs = forward(batch)
        assert outputs.keys() == stage.forward(batch).keys()
        assert outputs["logits"].requires_grad
        assert not outputs["teacher"].requires_grad
        stage.prepare()
