"""A folder with a base config in which `lightning-aux compare` is run, for its tests."""

import csv
import json

import yaml

from lightning_aux.cli import main

BASE = {
    "model": {"class_path": "tests.cli.toy.ToyModel"},
    "data": {"class_path": "tests.cli.toy.ToyData"},
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "log_every_n_steps": 1},
}


def toy(name, **init_args):
    return {"class_path": f"tests.cli.toy.{name}", "init_args": init_args}


class Workplace:
    """A folder with a base config; `compare` writes a compare file there and runs it."""

    def __init__(self, path):
        self.path = path
        self.output = path / "out"
        self.content = {"base": "base.yaml", "seeds": [0, 1], "metric": "test_error", "mode": "min"}
        self.write_base(BASE)

    def write_base(self, base):
        (self.path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(self, **content):
        file = self.path / "compare.yaml"
        file.write_text(yaml.safe_dump({**self.content, **content}, sort_keys=False))
        return ["compare", f"--config={file}", "--output", str(self.output)]

    def compare(self, *flags, **content):
        return main([*self.write(**content), *flags])

    def result(self, variant, seed):
        return json.loads((self.run_directory(variant, seed) / "result.json").read_text())

    def config(self, variant, seed=0):
        return yaml.safe_load((self.run_directory(variant, seed) / "config.yaml").read_text())

    def run_directory(self, variant, seed):
        return self.output / "runs" / variant / f"seed{seed}"

    def rows(self, name):
        with (self.output / name).open() as file:
            return list(csv.DictReader(file))
