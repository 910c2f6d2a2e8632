"""The script that `test_shipped_modules.py` runs where `lightning_aux` cannot be imported.

For every checkpoint in a folder it does what a user without the package would do: build the module,
load its weights, and go on training from it.
"""

import importlib.util
import json
import sys
import traceback
import warnings
from pathlib import Path

import lightning as L
import torch


def resumed(shipped, path: Path) -> None:
    """Load the weights strictly and train one more epoch from the checkpoint."""
    torch.set_default_dtype(shipped.dtype)
    module, loader = shipped.build()
    saved = torch.load(path, weights_only=False)["state_dict"]
    module.load_state_dict(saved, strict=True)
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):  # some keep plain values beside them
            assert torch.equal(value, saved[name]), name
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    trainer.fit(module, loader, ckpt_path=path, weights_only=False)
    trained = [each for each in module.parameters() if each.requires_grad]
    remembered = sum(len(each.state) for each in trainer.optimizers)
    assert trainer.current_epoch == 4
    assert remembered <= len(trained), (remembered, len(trained))
    assert any(not torch.equal(value, saved[name]) for name, value in module.named_parameters())


def main(registry: str, folder: str) -> None:
    assert "lightning_aux" not in sys.modules
    sys.modules["lightning_aux"] = None  # type: ignore[assignment]  # importing it is an error now
    spec = importlib.util.spec_from_file_location("shipped_modules", registry)
    assert spec is not None
    assert spec.loader is not None
    modules = importlib.util.module_from_spec(spec)
    sys.modules["shipped_modules"] = modules
    spec.loader.exec_module(modules)

    outcomes = {}
    for path in sorted(Path(folder).glob("*.ckpt")):
        try:
            resumed(modules.SHIPPED[path.stem], path)
            outcomes[path.stem] = "resumed"
        except Exception:
            outcomes[path.stem] = traceback.format_exc()
    assert sys.modules["lightning_aux"] is None
    Path(folder, "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
