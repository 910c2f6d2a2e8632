"""LightningModules that other packages ship, each with a few samples of made-up data.

They are built as the packages' own documentation builds them, small, and nothing of them is
edited, subclassed or wrapped. Nothing here imports `lightning_aux`: one of the tests loads their
checkpoints where it does not exist. A package that is not installed is skipped, so that the same
file serves `make test` (only `transformers` is there) and `make test-third-party` (all of them).

Looked at for Python 3.11 with torch 2.13.0 and lightning 2.6.6, and left out: schnetpack (2.0
imports a name that torch no longer has, later ones conflict with these versions), pytorch-tabular
(asks for a scikit-learn older than these), matgl (its dependencies did not resolve in minutes),
lightly, anomalib and torchgeo (need torchvision), braindecode (ships plain modules, no
LightningModule), neuralforecast (installs, but brings Ray, and time series are here already), pina
(its modules want its own Trainer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

BATCHES = 3  # of every loader below


@dataclass(frozen=True)
class Shipped:
    """One module, and where in it and in its batches things are.

    Attributes:
        field: what people use it for.
        imports: what must be importable.
        build: makes the module and its loader; the same ones in every call after the same seed.
        run: the output of the model for a batch, as a user calls the model.
        classifies: whether that output is logits.
        taps: arguments of `Taps`.
        feature: path of a module whose output is the features.
        pick: from what that module returns, the features, with `width` in the last dimension.
        paths: key paths into the batch, with the same place written in Python.
        arguments: what every objective is given besides.
        dtype: torch's default dtype, where the package asks for one.
        resumes_exactly: whether a run resumed within an epoch is the uninterrupted one, without us.
    """

    field: str
    imports: tuple[str, ...]
    build: Callable[[], tuple[L.LightningModule, DataLoader[Any]]]
    run: Callable[[Any, Any], Tensor]
    classifies: bool
    feature: str
    width: int
    paths: Mapping[str, Callable[[Any], Any]]
    pick: Callable[[Any], Tensor] = lambda output: output
    taps: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    resumes_exactly: bool = True


class Resumable:
    """A loader that goes on within an epoch, through Lightning's `state_dict` interface."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.done = self.skip = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        self.done = 0
        for batch in self.loader:
            self.done += 1
            if self.done > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["done"]


# ---------------------------------------------------------------------------------------- chemistry
SMILES = ("CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCl", "C1CCCCC1", "CC#N", "COC", "CCS", "OCCO",
          "NCCN", "c1ccncc1")  # fmt: skip


def chemprop() -> tuple[L.LightningModule, DataLoader[Any]]:
    """A message passing network that sorts molecules into three classes."""
    from chemprop import data, models, nn

    molecules = [
        data.MoleculeDatapoint.from_smi(each, [float(i % 3)]) for i, each in enumerate(SMILES)
    ]
    module = models.MPNN(
        nn.BondMessagePassing(d_h=16, depth=2, dropout=0.1),
        nn.MeanAggregation(),
        nn.MulticlassClassificationFFN(3, input_dim=16, hidden_dim=16),
        batch_norm=True,
        warmup_epochs=1,
        init_lr=0.01,
    )
    dataset = data.MoleculeDataset(molecules)
    return module, data.build_dataloader(dataset, batch_size=4, shuffle=False, num_workers=0)


def chemprop_in_training(module: Any, batch: Any) -> Tensor:
    """What its `training_step` calls, for it calls parts of itself and never `self(...)`."""
    logits: Tensor = module.predictor.train_step(
        module.fingerprint(batch.bmg, batch.V_d, batch.X_d)
    )
    return logits


# ------------------------------------------------------------------------------------------- graphs
def graphgym() -> tuple[L.LightningModule, DataLoader[Any]]:
    """A graph classifier, which writes its hidden states into the batch that it is given."""
    from torch_geometric.data import Data
    from torch_geometric.graphgym.config import cfg, set_cfg
    from torch_geometric.graphgym.model_builder import GraphGymModule
    from torch_geometric.loader import DataLoader as GraphLoader

    set_cfg(cfg)
    cfg.dataset.task, cfg.dataset.task_type = "graph", "classification"
    cfg.gnn.head, cfg.gnn.dim_inner, cfg.gnn.layers_mp, cfg.gnn.dropout = "graph", 8, 2, 0.1
    random = torch.Generator().manual_seed(1)
    rings = []
    for index in range(12):
        nodes = torch.arange(4 + index % 3)
        edges = torch.stack([nodes, nodes.roll(1)])
        rings.append(
            Data(
                # As wide as the hidden states: no layer would complain of being given them.
                x=torch.randn(len(nodes), 8, generator=random),
                edge_index=torch.cat([edges, edges.flip(0)], 1),
                y=torch.tensor([index % 3]),
            )
        )
    return GraphGymModule(8, 3, cfg), GraphLoader(rings, batch_size=4)


# ------------------------------------------------------------------------------------- tabular data
def deeptab() -> tuple[L.LightningModule, DataLoader[Any]]:
    """A transformer over three numbers and one category; batches are lists of lists."""
    from deeptab.architectures.ft_transformer import FTTransformer
    from deeptab.configs import FTTransformerConfig
    from deeptab.data import TabularDataset
    from deeptab.training import TaskModel

    random = torch.Generator().manual_seed(1)
    numbers = [torch.randn(12, 1, generator=random) for _ in range(3)]
    categories = [torch.randint(4, (12, 1), generator=random)]
    about_numbers = {f"n{i}": {"dimension": 1, "categories": None} for i in range(3)}
    about_categories = {"c": {"dimension": 1, "categories": 4}}
    config = FTTransformerConfig(d_model=16, n_layers=1, n_heads=2, transformer_dim_feedforward=16)
    module = TaskModel(
        FTTransformer,
        config,
        (about_numbers, about_categories, {}),
        num_classes=3,
        scheduler_type=None,
        lr=0.01,
    )
    dataset = TabularDataset(categories, numbers, None, torch.arange(12) % 3)
    return module, DataLoader(dataset, batch_size=4)


# ------------------------------------------------------------------------------ single-cell biology
def counts() -> tuple[Any, DataLoader[Any]]:
    """A variational model of gene counts of 24 cells from two laboratories."""
    import anndata
    import numpy
    import scvi

    random = numpy.random.default_rng(0)
    cells = anndata.AnnData(random.poisson(2.0, (24, 10)).astype("float32"))
    cells.obs["laboratory"] = ["one", "other"] * 12
    scvi.model.SCVI.setup_anndata(cells, batch_key="laboratory")
    model = scvi.model.SCVI(cells, n_hidden=16, n_latent=4, n_layers=1)
    loader = scvi.dataloaders.AnnDataLoader(model.adata_manager, batch_size=8, shuffle=False)
    return model.module, loader


def scvi_plan() -> tuple[L.LightningModule, DataLoader[Any]]:
    from scvi.train import TrainingPlan

    module, loader = counts()
    return TrainingPlan(module, lr=0.01), loader


def scvi_adversarial_plan() -> tuple[L.LightningModule, DataLoader[Any]]:
    """Manual optimisation: the model, and a classifier of laboratories that it has to fool."""
    from scvi.train import AdversarialTrainingPlan

    module, loader = counts()
    return AdversarialTrainingPlan(module, lr=0.01, adversarial_classifier=True), loader


def latent_mean(module: Any, batch: Any) -> Tensor:
    mean: Tensor = module(batch, loss_kwargs=module.loss_kwargs)[0]["qz"].loc
    return mean


def mean_of_pass(one: Any) -> Tensor:
    mean: Tensor = one.returned[0]["qz"].loc
    return mean


SCVI: dict[str, Any] = {
    "field": "single-cell biology",
    "imports": ("scvi",),
    "run": latent_mean,
    "classifies": False,
    "taps": {"logits": mean_of_pass},
    "feature": "module.z_encoder.encoder",
    "width": 16,
    "paths": {"X": lambda batch: batch["X"], "labels": lambda batch: batch["labels"]},
}


# -------------------------------------------------------------------------------------- time series
def forecasting() -> tuple[L.LightningModule, DataLoader[Any]]:
    """A temporal fusion transformer; a batch is `(dict of inputs, (target, weight))`."""
    import numpy
    import pandas
    from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet

    random = numpy.random.default_rng(0)
    hours = numpy.tile(numpy.arange(11), 3)
    table = pandas.DataFrame(
        {
            "hour": hours,
            "shop": numpy.repeat(["a", "b", "c"], 11),
            "sales": hours + random.normal(size=33),
        }
    )
    dataset = TimeSeriesDataSet(
        table,
        time_idx="hour",
        target="sales",
        group_ids=["shop"],
        min_encoder_length=4,
        max_encoder_length=4,
        max_prediction_length=2,
        time_varying_unknown_reals=["sales"],
        time_varying_known_reals=["hour"],
        static_categoricals=["shop"],
    )
    module = TemporalFusionTransformer.from_dataset(
        dataset,
        hidden_size=8,
        attention_head_size=2,
        hidden_continuous_size=4,
        dropout=0.1,
        loss=QuantileLoss([0.1, 0.5, 0.9]),
        learning_rate=0.01,
        optimizer="adam",
    )
    return module, dataset.to_dataloader(train=False, batch_size=6, num_workers=0)


# ------------------------------------------------------------------------------ materials and atoms
def nequip() -> tuple[L.LightningModule, DataLoader[Any]]:
    """An equivariant potential: forces are a derivative taken inside the forward pass."""
    from nequip.data import AtomicDataDict, from_dict
    from nequip.data.transforms import NeighborListTransform
    from nequip.train import NequIPLightningModule
    from nequip.utils.global_state import set_global_state

    set_global_state()
    random = torch.Generator().manual_seed(1)
    neighbours = NeighborListTransform(r_max=3.0)
    molecules = [
        neighbours(
            from_dict(
                {
                    "pos": torch.randn(3 + index % 2, 3, generator=random),
                    "atom_types": torch.randint(2, (3 + index % 2,), generator=random),
                    "total_energy": torch.randn(1, 1, generator=random),
                    "forces": torch.randn(3 + index % 2, 3, generator=random),
                    "pbc": torch.zeros(3, dtype=torch.bool),
                    "cell": torch.eye(3) * 50,
                }
            )
        )
        for index in range(12)
    ]
    module = NequIPLightningModule(
        model={
            "_target_": "nequip.model.NequIPGNNModel",
            "seed": 1,
            "model_dtype": "float64",
            "type_names": ["H", "O"],
            "r_max": 3.0,
            "num_layers": 2,
            "l_max": 1,
            "parity": False,
            "num_features": 4,
            "radial_mlp_depth": 1,
            "radial_mlp_width": 8,
            "avg_num_neighbors": 2.0,
        },
        num_datasets={"train": 1, "val": 0, "test": 0, "predict": 0},
        optimizer={"_target_": "torch.optim.Adam", "lr": 0.01},
        loss={
            "_target_": "nequip.train.EnergyForceLoss",
            "per_atom_energy": True,
            "coeffs": {"total_energy": 1.0, "forces": 1.0},
        },
    )
    return module, DataLoader(molecules, batch_size=4, collate_fn=AtomicDataDict.batched_from_list)


def forces_of_pass(one: Any) -> Tensor:
    forces: Tensor = one.returned["forces"]
    return forces


# --------------------------------------------------------------------------------------------- text
def hugging_face() -> tuple[L.LightningModule, DataLoader[Any]]:
    """A Hugging Face model is no LightningModule: the module around it is as thin as can be."""
    import transformers

    class Thin(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.BertConfig(
                vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=16, max_position_embeddings=12, num_labels=3,
            )  # fmt: skip
            self.net = transformers.BertForSequenceClassification(config)

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            loss: Tensor = self.net(**batch["text"], labels=batch["answer"]["class"]).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.001)

    random = torch.Generator().manual_seed(5)
    words = torch.randint(30, (12, 8), generator=random)
    samples = [
        {"text": {"input_ids": each}, "answer": {"class": torch.tensor(index % 3)}}
        for index, each in enumerate(words)
    ]
    return Thin(), DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


SHIPPED: dict[str, Shipped] = {
    "chemprop": Shipped(
        field="chemistry",
        resumes_exactly=False,
        imports=("chemprop",),
        build=chemprop,
        run=lambda module, batch: chemprop_in_training(module, batch)[:, 0],
        classifies=True,
        taps={"logits": "predictor.ffn", "forward": chemprop_in_training},
        feature="predictor.ffn.0",
        width=16,
        paths={"Y": lambda batch: batch.Y, "bmg.V": lambda batch: batch.bmg.V},
    ),
    "torch_geometric": Shipped(
        field="graphs",
        imports=("torch_geometric", "yacs"),
        build=graphgym,
        run=lambda module, batch: module(batch.clone())[0],
        classifies=True,
        feature="model.mp.layer1.layer.model",
        width=8,
        paths={"y": lambda batch: batch.y, "edge_index": lambda batch: batch.edge_index},
    ),
    "deeptab": Shipped(
        field="tabular data",
        imports=("deeptab",),
        build=deeptab,
        run=lambda module, batch: module(*batch[0]),
        classifies=True,
        feature="estimator.norm_f",
        width=16,
        paths={"1": lambda batch: batch[1], "0.0.2": lambda batch: batch[0][0][2]},
    ),
    "scvi": Shipped(build=scvi_plan, **SCVI),
    "scvi_adversarial": Shipped(
        build=scvi_adversarial_plan,
        # It toggles no optimizer; its first backward of a step is the model's.
        arguments={"backward": 0},
        **SCVI,
    ),
    "pytorch_forecasting": Shipped(
        field="time series",
        imports=("pytorch_forecasting", "pandas"),
        build=forecasting,
        run=lambda module, batch: module(batch[0])["prediction"],
        classifies=False,
        taps={"logits": lambda one: one.returned["prediction"]},
        feature="pos_wise_ff",
        width=8,
        paths={
            "1.0": lambda batch: batch[1][0],
            "0.decoder_target": lambda batch: batch[0]["decoder_target"],
        },
    ),
    "nequip": Shipped(
        field="materials and atoms",
        imports=("nequip",),
        build=nequip,
        run=lambda module, batch: module(dict(batch))["forces"],
        classifies=False,
        taps={"logits": forces_of_pass},
        feature="model.sole_model.model.func.layer1_convnet",
        pick=lambda output: output["node_features"],
        width=4,
        paths={"forces": lambda batch: batch["forces"]},
        dtype=torch.float64,  # set by the package for the whole process
    ),
    "transformers": Shipped(
        field="text",
        imports=("transformers",),
        build=hugging_face,
        run=lambda module, batch: module.net(**batch["text"]).logits,
        classifies=True,
        feature="net.bert.pooler",
        width=16,
        paths={
            "answer.class": lambda batch: batch["answer"]["class"],
            "text.input_ids": lambda batch: batch["text"]["input_ids"],
        },
    ),
}
