"""What attaching costs per training step, against the same term written by hand.

``make bench`` prints the ratios; nothing here passes or fails by a time. Both trainings run in one
process, in turns; the ratio is that of the median turns, and the spread that of the turns. Metrics
are logged as often as Lightning does by default (every 50 steps), by both: one metric costs about a
millisecond, so logging in every step would be all that is measured.
"""

import copy
import time
from statistics import median, quantiles

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_aux as aux
from recipes.digits import DigitsData, ImageClassifier

ROUNDS = 15
STEPS = 320
WARM_UP = 16


class StepTimer(L.Callback):
    """Wall time of the training steps after a warm-up, in seconds per step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == WARM_UP:
            self.began = time.perf_counter()

    def on_train_end(self, trainer, pl_module):
        self.per_step = (time.perf_counter() - self.began) / (STEPS - WARM_UP)


class FeatureNorm(aux.Objective):
    """One feature term: the mean square of the features."""

    def __init__(self, path, weight=1e-3):
        super().__init__(weight=weight, reads=(path,))
        self.path = path

    def loss(self, step):
        return step.features(self.path).pow(2).mean()


class ByHand(ImageClassifier):
    """The same term written into the module, logged as users do: on the steps Lightning logs."""

    path = "encoder"

    def training_step(self, batch, batch_idx):
        kept = []
        handle = self.get_submodule(self.path).register_forward_hook(
            lambda module, args, out: kept.append(out)
        )
        loss = super().training_step(batch, batch_idx)
        handle.remove()
        term = kept[0].pow(2).mean()
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log_dict({"term": term.detach(), "total": (loss + 1e-3 * term).detach()})
        return loss + 1e-3 * term


class DistilledByHand(ImageClassifier):
    """Self-distillation from an average, as it is usually written: a deep copy and a loop."""

    def on_fit_start(self):
        object.__setattr__(self, "teacher", copy.deepcopy(self).eval().requires_grad_(False))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        with torch.no_grad():
            target = self.teacher(x).softmax(-1)
        term = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss + term

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for average, live in zip(self.teacher.parameters(), self.parameters(), strict=True):
                average.lerp_(live, 0.001)


def seconds_per_step(module_class, callbacks, folder):
    L.seed_everything(0, verbose=False)
    timer = StepTimer()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[timer, *callbacks],
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module_class(), DigitsData(batch_size=64))
    return timer.per_step


def ratio(ours, theirs, folder):
    """Median of ours over median of theirs, and the quartiles of the ratios turn by turn."""
    seconds = {ours: [], theirs: []}
    for turn in range(ROUNDS):
        for each in (ours, theirs) if turn % 2 else (theirs, ours):
            seconds[each].append(seconds_per_step(each[0], each[1](), folder))
    turns = [own / other for own, other in zip(seconds[ours], seconds[theirs], strict=True)]
    low, _, high = quantiles(turns, n=4)
    return median(seconds[ours]) / median(seconds[theirs]), low, high


def report(what, result):
    middle, low, high = result
    print(f"\n{what}: {middle:.3f} ({ROUNDS} turns, quartiles {low:.3f} to {high:.3f})")


def test_feature_term(tmp_path):
    ours = (ImageClassifier, lambda: [FeatureNorm(ByHand.path)])
    theirs = (ByHand, list)
    report("one feature term, attached / by hand", ratio(ours, theirs, tmp_path))


def test_self_distillation(tmp_path):
    ours = (ImageClassifier, lambda: [aux.EMATeacher(), aux.SelfDistillation()])
    theirs = (DistilledByHand, list)
    report("self-distillation, attached / by hand", ratio(ours, theirs, tmp_path))


def test_nothing_but_a_teacher(tmp_path):
    ours = (ImageClassifier, lambda: [aux.EMATeacher()])
    theirs = (ImageClassifier, list)
    report("EMA teacher alone / plain training", ratio(ours, theirs, tmp_path))
