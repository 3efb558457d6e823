"""Encoders of text. All but ModernBERT norm behind the FFN."""

from __future__ import annotations

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace

_BERT = FfnPlace("encoder.layer.{}", "intermediate.dense", "output.dense", act="intermediate.intermediate_act_fn")

BERT = DescribedModel("bert", "BERT", (_BERT,))
ROBERTA = DescribedModel("roberta", "RoBERTa", (_BERT,))
XLM_ROBERTA = DescribedModel("xlm-roberta", "XLM-RoBERTa", (_BERT,))
ELECTRA = DescribedModel("electra", "ELECTRA", (_BERT,))
MPNET = DescribedModel("mpnet", "MPNet", (_BERT,))
DISTILBERT = DescribedModel(
    "distilbert",
    "DistilBERT",
    (
        FfnPlace(
            "transformer.layer.{}", "ffn.lin1", "ffn.lin2", whole="ffn", activation="activation", dropout="dropout"
        ),
    ),
)
ALBERT = DescribedModel(
    "albert",
    "ALBERT",
    (FfnPlace("encoder.albert_layer_groups.{}.albert_layers.{}", "ffn", "ffn_output", act="activation"),),
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
)
