"""Encoders of text. All but ModernBERT norm behind the FFN."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace
from upcycle.architectures.module_paths import ModulePaths

SHARED_FFNS = "several of its layers share one FFN, and the fits here need the inputs of one layer"


def _encoder(
    body: str,
    layers: str,
    block: str,
    ends: str | None = None,
    closing: str | None = None,
    embedding: str = "word_embeddings",
    padding: bool = False,
) -> dict[str, Any]:
    """Where an encoder's parts are; it has no norm and no head that every class of it has."""
    inside = {"layers": f"{body}.{layers}", "embedding": f"{body}.embeddings.{embedding}"}
    paths = ModulePaths(body=body, final_norm="", **inside, blocks=(block,), ends=ends, closing=closing)
    return {"paths": paths, "encoder": True, "counts_from_padding": padding}


def _bert(body: str, padding: bool = False) -> dict[str, Any]:
    return _encoder(
        body, "encoder.layer", "intermediate.dense", "output.dense", closing="output.LayerNorm", padding=padding
    )


_BERT = FfnPlace("encoder.layer.{}", "intermediate.dense", "output.dense", act="intermediate.intermediate_act_fn")

BERT = DescribedModel("bert", "BERT", (_BERT,), **_bert("bert"))
ROBERTA = DescribedModel("roberta", "RoBERTa", (_BERT,), **_bert("roberta", True))
XLM_ROBERTA = DescribedModel("xlm-roberta", "XLM-RoBERTa", (_BERT,), **_bert("roberta", True))
ELECTRA = DescribedModel("electra", "ELECTRA", (_BERT,), **_bert("electra"))
MPNET = DescribedModel("mpnet", "MPNet", (_BERT,), **_bert("mpnet", True), returns_tuple=True)
DEBERTA = DescribedModel("deberta", "DeBERTa", (_BERT,), **_bert("deberta"), pauses=True)
DEBERTA_V2 = DescribedModel("deberta-v2", "DeBERTa v2 and v3", (_BERT,), **_bert("deberta"), pauses=True)
DISTILBERT = DescribedModel(
    "distilbert",
    "DistilBERT",
    (
        FfnPlace(
            "transformer.layer.{}", "ffn.lin1", "ffn.lin2", whole="ffn", activation="activation", dropout="dropout"
        ),
    ),
    **_encoder("distilbert", "transformer.layer", "ffn", closing="output_layer_norm"),
)
ALBERT = DescribedModel(
    "albert",
    "ALBERT",
    (FfnPlace("encoder.albert_layer_groups.{}.albert_layers.{}", "ffn", "ffn_output", act="activation"),),
    **_encoder("albert", "encoder.albert_layer_groups", "albert_layers.0.ffn", "albert_layers.0.ffn_output"),
    uncalibrated=SHARED_FFNS,
    refused={"inner_group_num": ((1,), "its groups have several layers")},
)
MODERNBERT = DescribedModel(
    "modernbert",
    "ModernBERT",
    (
        FfnPlace(
            "layers.{}",
            "mlp.Wi",
            "mlp.Wo",
            fused="gate up",
            whole="mlp",
            norm="mlp_norm",
            activation="hidden_activation",
        ),
    ),
    **_encoder("model", "layers", "mlp", embedding="tok_embeddings"),
)
