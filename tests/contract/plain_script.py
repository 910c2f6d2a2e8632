"""The script that `test_c08_checkpoints.py` runs where `lightning_aux` cannot be imported.

For every checkpoint in a folder it does what a user without the package would do: read it, load
its weights, and go on training from it.
"""

import importlib.util
import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader


def main(models_file: str, folder: str) -> None:
    assert "lightning_aux" not in sys.modules
    sys.modules["lightning_aux"] = None  # type: ignore[assignment]  # importing it is an error now
    spec = importlib.util.spec_from_file_location("models", models_file)
    assert spec is not None
    assert spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    sys.modules["models"] = models
    spec.loader.exec_module(models)

    checkpoints = sorted(Path(folder).glob("*.ckpt"))
    for path in checkpoints:
        saved = torch.load(path, weights_only=True)
        module = models.Classifier(**saved["hyper_parameters"])
        module.load_state_dict(saved["state_dict"], strict=True)
        loaded = models.Classifier.load_from_checkpoint(path, strict=True, weights_only=True)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, saved["state_dict"][name]), name

        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=4,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = DataLoader(models.Samples(40), batch_size=8)
        val = DataLoader(models.Samples(16), batch_size=8)
        trainer.fit(module, data, val, ckpt_path=path, weights_only=True)
        assert trainer.global_step == 20, trainer.global_step
        assert len(trainer.optimizers[0].state) == len(list(module.parameters()))
    assert [name for name in sys.modules if name.startswith("lightning_aux")] == ["lightning_aux"]
    assert sys.modules["lightning_aux"] is None
    print(f"{len(checkpoints)} checkpoints")


if __name__ == "__main__":
    main(*sys.argv[1:])
