"""Breaks every promise once and shows which test notices: ``make mutations``.

Each mutation is one replacement in a copy of the package, made in the way a promise forbids. The
tests named beside it run against the copy; the first that fails is written into the table of
``docs/mutations.md``. One that survives ends the command with an error.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "mutations.md"
TIMEOUT = 300


@dataclass(frozen=True)
class Mutation:
    """One breakage.

    Attributes:
        promise: line of the contract.
        what: the breakage in words.
        file: below ``lightning_aux/``.
        old: text there, which occurs once.
        new: what stands there instead.
        tests: arguments of pytest.
    """

    promise: str
    what: str
    file: str
    old: str
    new: str
    tests: str


def _contract(number: int) -> str:
    return str(next((ROOT / "tests/contract").glob(f"test_c{number:02}_*.py")).relative_to(ROOT))


TWO = "tests/contract/strategies"
MUTATIONS = [
    Mutation(
        "C1",
        "the teacher runs in training mode",
        "engine/replay.py",
        "            _set_training(modules, False)\n",
        "",
        f"{_contract(1)} {_contract(2)} tests/teachers/test_teacher_modes.py",
    ),
    Mutation(
        "C1",
        "a second pass draws from the user's random stream",
        "engine/replay.py",
        "            drawn.restore()\n",
        "",
        "tests/engine/test_second_pass.py tests/engine/test_copies_and_second_passes.py",
    ),
    Mutation(
        "C1",
        "a head is built from the user's random stream",
        "engine/engine.py",
        "with torch.random.fork_rng(devices=cuda):",
        "if True:",
        f"{_contract(1)} tests/engine/test_heads.py",
    ),
    Mutation(
        "C2",
        "a term counts 0.1 % too much",
        "engine/running.py",
        "added = weights[name] * term",
        "added = 1.001 * weights[name] * term",
        _contract(2),
    ),
    Mutation(
        "C2",
        "the term does not join a dict output",
        "engine/running.py",
        'return {**output, "loss": loss}',
        "return output",
        _contract(2),
    ),
    Mutation(
        "C2",
        "the weight is that of the step before",
        "engine/running.py",
        "weight = objective.weight_at(state.progress[objective.optimizer].steps)",
        "weight = objective.weight_at(max(0, state.progress[objective.optimizer].steps - 1))",
        _contract(2),
    ),
    Mutation(
        "C2",
        "with two optimizers a term joins the backward of the other",
        "engine/running.py",
        "toggled == objective.optimizer",
        "toggled != objective.optimizer",
        "tests/engine/test_manual_optimisation.py",
    ),
    Mutation(
        "C2",
        "running statistics move in a second pass",
        "engine/replay.py",
        "(held, key, copies[id(buffer)])",
        "(held, key, buffer)",
        "tests/engine/test_second_pass.py",
    ),
    Mutation(
        "C3",
        "rows do not go to the process that holds them",
        "engine/distributed.py",
        "return _exchanged(rows[self._order], self._asked, self._answered)",
        "return rows[self._order]",
        f"{TWO}/test_heads_and_gathering.py -k 'ddp and rows'",
    ),
    Mutation(
        "C3",
        "of two visits in one step the first is remembered",
        "objectives/memory.py",
        "right=True) - 1]",
        "right=False)]",
        "tests/objectives/test_memory.py -k 'memory_of_one_process_is'",
    ),
    Mutation(
        "C3",
        "a process that wrote nothing overwrites what others wrote",
        "objectives/memory.py",
        'self._put(visit.route.places, arrived, arrived["seen"])',
        "self._put(visit.route.places, arrived)",
        "tests/objectives/test_memory.py -k 'wrote_nothing'",
    ),
    Mutation(
        "C3",
        "a silent head gets no zero gradient",
        "engine/heads.py",
        "return torch.cat([part.flatten()[:1] for part in parts]).sum() * 0.0",
        "return 0.0",
        "tests/engine/test_heads.py",
    ),
    Mutation(
        "C3",
        "processes do not tell each other about terms that are not finite",
        "engine/finite.py",
        "            dist.all_reduce(codes, op=dist.ReduceOp.MAX)\n",
        "",
        f"{TWO}/test_c13_faults.py -k 'ddp and nan'",
    ),
    Mutation(
        "C4",
        "a teacher's pass uses parameters that the student's has gathered",
        "weights/store.py",
        "        for module in self._gathering:\n            module.reshard()",
        "        return",
        f"{TWO}/test_c03_c04_equals_one_process.py -k 'fsdp2 and not uneven'",
    ),
    Mutation(
        "C4",
        "the student trains on with the teacher's parts",
        "weights/store.py",
        "            torch._foreach_copy_(shards, contents)",
        "            pass",
        f"{TWO}/test_c03_c04_equals_one_process.py -k 'fsdp2 and not uneven'",
    ),
    Mutation(
        "C4",
        "every process begins with a head of its own",
        "engine/distributed.py",
        "        dist.broadcast(tensor.detach(), 0)",
        "        pass",
        f"{TWO}/test_c03_c04_equals_one_process.py -k 'fsdp2 and not uneven'",
    ),
    Mutation(
        "C4",
        "a head is not sharded, so nothing synchronises it",
        "engine/heads.py",
        "        if shards_parameters(strategy):",
        "        if False:",
        f"{TWO}/test_c03_c04_equals_one_process.py -k 'fsdp2 and not uneven'",
    ),
    Mutation(
        "C4",
        "the distance of weights leaves out the other process's part",
        "functional/shards.py",
        "        if placement.is_shard():",
        "        if False:",
        f"{TWO}/test_c10_logging.py -k 'fsdp2 and not uneven'",
    ),
    Mutation(
        "C4",
        "checkpoints hold one process's part",
        "functional/shards.py",
        "tensor.detach().full_tensor() if is_sharded(tensor)",
        "tensor.detach().to_local() if is_sharded(tensor)",
        f"{TWO}/test_c07_c08_checkpoints.py -k 'fsdp2 and not uneven'",
    ),
    Mutation(
        "C5",
        "no fp32 island",
        "functional/precision.py",
        "return tensor.float() if tensor.dtype in HALF else tensor",
        "return tensor",
        f"{_contract(5)} tests/functional tests/engine/test_precision_and_dtypes.py",
    ),
    Mutation(
        "C5",
        "autocast hands the teacher the student's cast weights",
        "engine/replay.py",
        "cache_enabled=False",
        "cache_enabled=True",
        _contract(5),
    ),
    Mutation(
        "C5",
        "averages are kept in half precision",
        "weights/store.py",
        "return value.to(torch.float32, copy=True) if value.dtype in HALF else value.clone()",
        "return value.clone()",
        f"{_contract(5)} tests/teachers",
    ),
    Mutation(
        "C5",
        "what waited for a skipped step happens at the next",
        "engine/stepping.py",
        "            if place is not None:  # what waited for a step that a gradient scaler has "
        "skipped\n                self._deferred[place].clear()\n",
        "",
        f"{_contract(5)} tests/engine/test_skipped_steps.py tests/engine/test_second_fit.py",
    ),
    Mutation(
        "C6",
        "teachers move with every micro-batch",
        "engine/running.py",
        '        record = Record(apart(self._batch_of(args, kwargs)), "student")',
        "        for each in engine.overriding('after_optimizer_step'):\n"
        "            each.after_optimizer_step(now[each.optimizer])\n"
        '        record = Record(apart(self._batch_of(args, kwargs)), "student")',
        _contract(6),
    ),
    Mutation(
        "C6",
        "memories move at once",
        "engine/running.py",
        "            self._stepping.defer(objective.optimizer, acts[name])",
        "            [act() for act in acts[name]]",
        _contract(6),
    ),
    Mutation(
        "C6",
        "a memory forgets what a short row leaves out",
        "objectives/row_storage.py",
        '            "rest": rest.clamp_min(0),',
        '            "rest": torch.zeros_like(rest),',
        "tests/objectives",
    ),
    Mutation(
        "C7",
        "a process goes on with rows of another",
        "objectives/memory.py",
        "each[rank() :: processes()]",
        "each[: len(range(rank(), len(each), processes()))]",
        "tests/objectives/test_memory.py -k 'dealt_out'",
    ),
    Mutation(
        "C7",
        "the clock begins anew",
        "engine/engine.py",
        'saved.get("steps", [',
        '{}.get("steps", [0 *',
        _contract(7),
    ),
    Mutation(
        "C7",
        "the number of updates begins anew",
        "teachers/teacher.py",
        'self.updates = int(state["updates"])',
        "self.updates = 0",
        f"{_contract(7)} tests/teachers",
    ),
    Mutation(
        "C7",
        "the moments of heads begin anew",
        "engine/heads.py",
        "    optimizer.state.update(alone.state)",
        "    return",
        f"{_contract(7)} tests/engine/test_heads.py",
    ),
    Mutation(
        "C8",
        "heads stay in the module",
        "engine/heads.py",
        "        self._module._modules.pop(ATTRIBUTE, None)",
        "        return",
        f"{_contract(8)} tests/engine/test_heads.py",
    ),
    Mutation(
        "C8",
        "heads stay in the optimizer's saved state",
        "engine/heads.py",
        "            with self.aside():\n                return function(*args, **kwargs)",
        "            return function(*args, **kwargs)",
        f"{_contract(8)} tests/engine/test_heads.py",
    ),
    Mutation(
        "C8",
        "the averaged weights stay in the model and are saved",
        "weights/store.py",
        "            if not is_sharded(data):\n                parameter.data = data",
        "            pass",
        f"{_contract(8)} tests/teachers",
    ),
    Mutation(
        "C9",
        "an argument from YAML reaches nothing",
        "objectives/ema_anchor.py",
        "EMATeacher(decay, teacher, warmup, every, start, buffers)",
        "EMATeacher(decay, teacher, warmup, 1, start, buffers)",
        f"{_contract(9)} tests/objectives/test_ema_anchor.py",
    ),
    Mutation(
        "C10",
        "aux/total leaves the terms out",
        "engine/running.py",
        "state.total = state.total + total.detach()",
        "state.total = state.total + loss.detach()",
        _contract(10),
    ),
    Mutation(
        "C10",
        "the logged weight is not the one used",
        "engine/running.py",
        'weights[objective.name] = values[f"aux/{objective.name}/weight"] = weight',
        'weights[objective.name] = weight; values[f"aux/{objective.name}/weight"] = 1.0',
        _contract(10),
    ),
    Mutation(
        "C11",
        "the forward hooks of a compiled module keep nothing",
        "engine/capture.py",
        "            record.add(self._path, Call(arguments, keywords, kept))\n            return",
        "            return",
        f"{_contract(11)} tests/engine/test_compile.py",
    ),
    Mutation(
        "C11",
        "a compiled submodule is not found under its own path",
        "engine/taps.py",
        'return name.replace("_orig_mod.", "").removesuffix("._orig_mod")',
        "return name",
        f"{_contract(11)} tests/engine/test_compile.py",
    ),
    Mutation(
        "C12",
        "hooks on modules stay",
        "engine/capture.py",
        "        for handle in self._handles:\n            handle.remove()",
        "        return",
        _contract(12),
    ),
    Mutation(
        "C12",
        "wrapped methods stay",
        "engine/patches.py",
        "        while self._done:",
        "        while False:",
        _contract(12),
    ),
    Mutation(
        "C12",
        "heads stay in the optimizer after the end",
        "engine/engine.py",
        "self.heads.hide, self.heads.part, ",
        "self.heads.hide, ",
        f"{_contract(12)} tests/engine/test_heads.py",
    ),
    Mutation(
        "C12",
        "the weights are not put back when a teacher's pass raises",
        "weights/store.py",
        "            yield\n        finally:\n            self.restore()",
        "            yield\n            self.restore()\n"
        "        finally:\n            self._kept = None",
        "tests/teachers tests/faults",
    ),
    Mutation(
        "C13",
        "a wrong path is answered without near matches",
        "engine/errors.py",
        '        return "Near matches: " +',
        '        return "" and',
        _contract(13),
    ),
    Mutation(
        "C13",
        "a term that is not finite passes",
        "engine/finite.py",
        "FINE if math.isfinite(x) else kind",
        "FINE if True else kind",
        _contract(13),
    ),
    Mutation(
        "C14",
        "terms are summed in the order of the list",
        "engine/engine.py",
        "        self.objectives.sort(key=lambda each: each.name)",
        "",
        f"{_contract(14)}",
    ),
    Mutation(
        "C7",
        "a generation that begins again keeps the moments of the one before",
        "teachers/restart.py",
        "            optimizer.state.clear()\n",
        "",
        "tests/teachers/test_moving_teachers.py",
    ),
    Mutation(
        "C7",
        "virtual steps leave their moments in the optimizer",
        "engine/rehearsal.py",
        "            optimizer.state.clear()\n            optimizer.state.update(state)\n",
        "",
        "tests/teachers/test_lookahead.py",
    ),
    Mutation(
        "C8",
        "a checkpoint that is saved during a validation has the average for the raw weights",
        "averages/ema_weights.py",
        "return nullcontext() if store is None else store.aside()",
        "return nullcontext()",
        "tests/averages/test_ema_weights.py",
    ),
    Mutation(
        "C1",
        "an average that has not been updated is validated",
        "averages/ema_weights.py",
        " or (source and not source.updates)",
        "",
        "tests/averages/test_ema_weights.py",
    ),
    Mutation(
        "C12",
        "what the user counts in validation is counted in the average",
        "weights/store.py",
        "            counts = evaluating and not buffer.is_floating_point()",
        "            counts = False",
        "tests/averages/test_ema_weights.py",
    ),
    Mutation(
        "C6",
        "an average that is updated every n steps forgets n times as slowly",
        "teachers/ema.py",
        "for step in range(self.moved_at, steps):",
        "for step in range(steps - 1, steps):",
        f"tests/teachers/test_ema_teacher.py {_contract(6)}",
    ),
    Mutation(
        "C2",
        "objectives learn from a teacher that is not there yet",
        "objective.py",
        "        ready = all(teacher.ready for teacher in self._taught_by)",
        "        ready = True",
        f"{_contract(2)} tests/teachers/test_moving_teachers.py",
    ),
    Mutation(
        "C2",
        "the noise of the variational anchor is taken for a distance",
        "objectives/parameter_anchor.py",
        "        return self._noise.onto(aims, group)",
        "        return aims",
        "tests/objectives/test_parameter_anchor.py",
    ),
    Mutation(
        "C2",
        "the optimizer moves the quantised weights",
        "quantized_weights.py",
        "        if pl_module.automatic_optimization:",
        "        if False:",
        "tests/test_quantized_weights.py",
    ),
    Mutation(
        "C8",
        "a checkpoint that is saved within a step has the quantised weights",
        "quantized_weights.py",
        '        self._patches.surround(trainer, "save_checkpoint", self._stand_in.aside)\n',
        "",
        "tests/test_quantized_weights.py",
    ),
    Mutation(
        "C12",
        "a step that ends without a backward leaves the quantised weights in the module",
        "engine/running.py",
        "            if not awaits_backward:\n                engine.give_back_weights()\n",
        "",
        "tests/test_quantized_weights.py",
    ),
    Mutation(
        "C14",
        "candidates for a soup are evaluated with the average of EMAWeights",
        "averages/candidates.py",
        "run: Callable[[Any], Any] = type(loop).run\n            run(loop)",
        "loop.run()",
        "tests/averages/test_candidates.py",
    ),
    Mutation(
        "C13",
        "a write that fails leaves half a file",
        "weights/files.py",
        "        Path(part).unlink(missing_ok=True)\n",
        "        os.replace(part, out)\n",
        "tests/weights/test_files.py",
    ),
    Mutation(
        "C1",
        "another module teaches in training mode, and draws from the user's random stream",
        "engine/another.py",
        "self.capture.recording(record), self._unobserved.evaluated(step.loss.device):",
        "self.capture.recording(record), torch.no_grad():",
        "tests/teachers/test_another_module.py",
    ),
    Mutation(
        "C12",
        "hooks stay on another module after training",
        "engine/another.py",
        "        self._unobserved.restore()\n        self.capture.clear()\n",
        "        self._unobserved.restore()\n",
        "tests/teachers/test_another_module.py",
    ),
    Mutation(
        "C2",
        "classes that top-k left out have the probability of all of them, each",
        "teachers/storage.py",
        "    others = rest - math.log(count - values.shape[-1])",
        "    others = rest",
        "tests/teachers/test_stored_teacher.py",
    ),
    Mutation(
        "C13",
        "stored logits are read for a dataset in another order",
        "teachers/stored.py",
        "            if then and now != then:",
        "            if False:",
        "tests/teachers/test_stored_teacher.py",
    ),
    Mutation(
        "C7",
        "a run is resumed with the logits of another teacher",
        "teachers/stored.py",
        "        if saved not in (None, self._digest):",
        "        if False:",
        "tests/teachers/test_stored_teacher.py",
    ),
    Mutation(
        "C13",
        "logits are stored in the order of the training dataloader",
        "teachers/teaching.py",
        "    return DataLoader(\n        loader.dataset,",
        "    return DataLoader(\n        loader.dataset, shuffle=True,",
        "tests/teachers/test_stored_teacher.py",
    ),
    Mutation(
        "C1",
        "a teacher's pass writes into the buffers of the student",
        "engine/replay.py",
        "with self._buffers_kept(), kept as before, torch",
        "with kept as before, torch",
        "tests/engine/test_copies_and_second_passes.py",
    ),
    Mutation(
        "C1",
        "the gradient of all data is taken with dropout",
        "diagnostics/gradient_direction.py",
        "                place.set(0.0)\n",
        "                pass\n",
        "tests/diagnostics",
    ),
    Mutation(
        "C2",
        "the whole model runs again for each mask",
        "engine/tail.py",
        "            if count:\n",
        "            if False:\n",
        "tests/objectives/test_multi_sample_dropout.py",
    ),
    Mutation(
        "C2",
        "a repetition mixes the batch in another way than the step",
        "engine/passes.py",
        "else began.restore",
        "else partial(seed_everything, seed)",
        "tests/objectives/test_multi_sample_dropout.py",
    ),
    Mutation(
        "C2",
        "a part of a checkpointed function is remembered",
        "engine/tail.py",
        '_checkpointed() == "in part"',
        "False",
        "tests/objectives/test_multi_sample_dropout.py",
    ),
    Mutation(
        "C6",
        "a schedule counts batches in place of optimizer steps",
        "attribute_schedules/driver.py",
        "value = value_at(now.steps)",
        "value = value_at(self.engine.trainer.fit_loop.epoch_loop.total_batch_idx)",
        "tests/attribute_schedules",
    ),
    Mutation(
        "C7",
        "masks of blocks are drawn from the stream of the run",
        "attribute_schedules/stochastic_depth.py",
        "numbers = torch.rand(count, generator=generator, device=like.device)",
        "numbers = torch.rand(count, device=like.device)",
        "tests/attribute_schedules/test_stochastic_depth_schedule.py",
    ),
    Mutation(
        "C7",
        "a resumed run begins its phases again",
        "phases.py",
        'self.began = dict(kept.get("began", {}))',
        "self.began = {}",
        "tests/engine/test_phases.py",
    ),
    Mutation(
        "C8",
        "what the user saves of an optimizer has heads in it",
        "engine/heads.py",
        "            self._step_aside_for_states(optimizer)\n",
        "",
        "tests/engine/test_heads.py",
    ),
    Mutation(
        "C11",
        "a compiled graph is made again for every rate of dropout",
        "attribute_schedules/dropout.py",
        "if rates_taken(value_at, engine) > 1 + _RECOMPILED:",
        "if False:",
        "tests/attribute_schedules/test_rates_compiled.py",
    ),
    Mutation(
        "C12",
        "a number that a schedule drives is not given back",
        "attribute_schedules/driver.py",
        "            each.place.give_back(each.own)\n",
        "            pass\n",
        "tests/attribute_schedules",
    ),
    Mutation(
        "C10",
        "a teacher's distance counts parameters that do not train",
        "weights/store.py",
        "for place, each in enumerate(self._live) if each.requires_grad]",
        "for place, each in enumerate(self._live)]",
        "tests/teachers/test_teacher_distance.py",
    ),
    Mutation(
        "C10",
        "a teacher's distance is to what stands in for the weights",
        "teachers/teacher.py",
        "with self.engine.own_weights():",
        "with nullcontext():",
        "tests/teachers/test_teacher_distance.py",
    ),
    Mutation(
        "C10",
        "a teacher's distance leaves out the first rows of a large tensor",
        "functional/anchors.py",
        "torch.split(tensor, max(1, most * len(tensor) // tensor.numel()))",
        "torch.split(tensor, max(1, most * len(tensor) // tensor.numel()))[1:]",
        "tests/functional/test_anchors.py",
    ),
    Mutation(
        "C10",
        "the logger's configuration repeats what a callback brings along",
        "engine/logging.py",
        "if name not in brought",
        "if name not in ()",
        "tests/wandb/test_offline_run.py",
    ),
    Mutation(
        "C10",
        "a hyperparameter of the user's that is called aux is replaced",
        "engine/logging.py",
        '"lightning_aux" if "aux" in theirs else "aux"',
        '"aux"',
        "tests/wandb/test_offline_run.py",
    ),
    Mutation(
        "C10",
        "a training of a comparison that failed looks finished",
        "cli/training_run.py",
        "exit_code=0 if failure is None else 1",
        "exit_code=0",
        "tests/wandb/test_compare_runs.py",
    ),
]


def survives(mutation: Mutation) -> str | None:
    """Run the mutation's tests on a broken copy; the first test that fails, or ``None``."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        skipped = shutil.ignore_patterns("__pycache__", ".*")
        for name in ("lightning_aux", "tests", "recipes", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=skipped)
        for name in ("pyproject.toml", "README.md", "constraints.txt", "Makefile", "mkdocs.yml"):
            shutil.copy(ROOT / name, copy / name)
        path = copy / "lightning_aux" / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        try:
            ended = subprocess.run(
                [*command, *shlex.split(mutation.tests)],
                cwd=copy,
                env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end within {TIMEOUT} s"
    found = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", ended.stdout, re.MULTILINE)
    return found.group(1) if found else None


def main() -> int:
    """Write the page; 1 if a mutation survived. With ``--missing`` only what it lacks is run."""
    head, _, before = PAGE.read_text().partition("<!-- generated -->")
    kept = before.splitlines() if "--missing" in sys.argv else []
    rows: dict[str, str] = {}
    for mutation in MUTATIONS:
        start = f"| {mutation.promise} | {mutation.what} |"
        rows[start] = next((row for row in kept if row.startswith(start)), "")
    due = [each for each in MUTATIONS if not rows[f"| {each.promise} | {each.what} |"]]
    survived = 0
    with ThreadPoolExecutor(int(os.environ.get("WORKERS", "2"))) as pool:
        for mutation, test in zip(due, pool.map(survives, due), strict=True):
            survived += test is None
            print(f"{mutation.promise}  {mutation.what}: {test or 'SURVIVED'}", flush=True)
            shown = f"`{test}`" if test and "::" in test else test or "**survived**"
            start = f"| {mutation.promise} | {mutation.what} |"
            rows[start] = f"{start} {shown} |"
    table = "\n".join(["| | broken | noticed first by |", "|---|---|---|", *rows.values()])
    PAGE.write_text(f"{head}<!-- generated -->\n\n{table}\n")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
