"""The Auto classes load this file, named by `auto_map` in a model's config.json; see hub_code_mae.py."""

from .backbone_mae import MAEBackbone
from .classifier_mae import MAEForImageClassification
from .configuration_mae import MAEConfig
from .modeling_mae import MAEForPreTraining, MAEModel

AUTO_CLASSES = {
    "AutoConfig": MAEConfig,
    "AutoModel": MAEModel,
    "AutoModelForPreTraining": MAEForPreTraining,
    "AutoModelForMaskedImageModeling": MAEForPreTraining,
    "AutoModelForImageClassification": MAEForImageClassification,
    "AutoBackbone": MAEBackbone,
}
